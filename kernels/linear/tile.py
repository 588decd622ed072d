"""Tile: how a GEMM is cut up over CTAs and warps."""

from typing import NamedTuple

from bitnet_numba.kernels.ptx.base import WARP
from bitnet_numba.packing import BLOCK_ROWS


class Tile(NamedTuple):
    """What a GEMM kernel is specialised to. With "wgmma" row_blocks is 1, reg_stages 0, and stages hold weights too."""

    tokens: int  # of a CTA: a multiple of 8
    row_blocks: int  # of a warp, 16 rows each; even for "gated", except with "wgmma", whose warps take gate or up rows
    row_warps: int  # warps of a CTA side by side along the rows
    k_warps: int  # warps that share rows, each with its own columns
    reg_stages: int  # k_iters of weights in registers
    stages: int  # k_iters of activations in shared memory; 0: straight to registers
    ctas_per_sm: int = 1  # resident CTAs; limits the registers
    scheme: str = "mma"  # or "wgmma" (gemm_wgmma.py), or "dp4a" (gemm_dp4a.py)
    cluster: int = 1  # "wgmma": CTAs that share a tile, each with its own columns
    refill: bool = True  # "wgmma": stages are a ring; else there is one for every k_iter

    @property
    def rows(self) -> int:
        """Rows of the matrix that a CTA owns (gate and up rows counted each)."""
        return self.row_blocks * self.row_warps * BLOCK_ROWS

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.row_warps * self.k_warps * WARP
