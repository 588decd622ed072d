"""TODO docstring."""

from typing import NamedTuple

from bitnet_numba.kernels.ptx.base import WARP
from bitnet_numba.packing import BLOCK_ROWS


class Tile(NamedTuple):
    """How a product is cut up: what its kernel is specialised to. Of "wgmma": blocks is 1, held 0, and stages hold
    weights too."""

    tokens: int  # of a block: a multiple of 8
    blocks: int  # row-blocks of a warp; even for "gated" (not of "wgmma", where warps take gate or up rows)
    row_warps: int  # warps of a block side by side along the rows
    k_warps: int  # warps that share rows, each with its own columns
    held: int  # turns of weights in registers
    stages: int  # turns of activations in shared memory; 0: straight to registers
    per_sm: int = 1  # blocks of a SM that the registers must allow
    scheme: str = "mma"  # or "wgmma", of w2a8_warpgroup.py, or "dp4a", of w2a8_columns.py
    cluster: int = 1  # "wgmma": blocks that share a tile, each with its own columns
    refill: bool = True  # "wgmma": stages are used again; else there is one for every turn

    @property
    def rows(self) -> int:
        """Rows of the matrix that a block owns (gate and up rows counted each)."""
        return self.blocks * self.row_warps * BLOCK_ROWS

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.row_warps * self.k_warps * WARP
