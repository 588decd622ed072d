"""TODO docstring."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_numba.kernels.ptx.base import SIMULATED, device_function, instruction, int32

# The 8-byte pieces of a row-block's 128 columns that hold two neighbouring rows: 16 columns after the other.
_ROW_PAIR_OFFSETS = [128 * (n // 2) + 32 * (n % 2) for n in range(8)]
_ROW_PAIR_PTX = " ".join(
    f"ld.shared.v2.b32 {{${2 * n}, ${2 * n + 1}}}, [$16+{piece}];" for n, piece in enumerate(_ROW_PAIR_OFFSETS)
)

# ---- Warpgroups -----------------------------------------------------------------------------------------------------

# Warpgroups (sm_90a alone): four neighbouring warps multiply what the copy engine has brought to shared memory. A panel
# there is [rows, 128 bytes], int8 or bfloat16, a row for each token (or weight row); of row t the 16-byte piece c lies
# at c ^ (t % 8) ("128-byte swizzle"): eight rows' pieces touch every bank once.
SPAN_INTS = 32  # of a row
PANEL_ALIGN = 1024  # bytes


@dataclass
class SimulatedTensorMap:
    """What stands for a tensor map under the simulator: a matrix, int32, and how many rows and columns a copy takes."""

    matrix: np.ndarray
    rows: int
    ints: int


def _swizzled(panel: np.ndarray) -> np.ndarray:
    """A panel, int32 [rows, SPAN_INTS], with its pieces where the swizzle puts them; or back again."""
    pieces = panel.reshape(len(panel), 8, 4)
    order = np.arange(8) ^ np.arange(len(panel))[:, None] & 7
    return np.take_along_axis(pieces, order[:, :, None], axis=1).reshape(panel.shape)


# What follows takes places in shared memory: 32-bit addresses, see `shared_address`.


@instruction("mbarrier.init.shared::cta.b64 [$0], 1; fence.mbarrier_init.release.cluster;", "", "r", effects=True)
def mbarrier_init(at: Any) -> None:
    """Makes the int64 at a place count the bytes that copies bring. One thread, then a barrier. sm_90."""


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "", "rr", effects=True)
def mbarrier_expect_tx(at: Any, count: Any) -> None:
    """Says how many bytes the copies that report to a place will bring: then its phase is over. One thread. sm_90."""


@instruction(
    "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }",
    "",
    "rr",
    effects=True,
)
def mbarrier_wait(at: Any, parity: Any) -> None:
    """Until the phase with this parity (0, 1, 0, ...) is over. All threads of a block together. sm_90."""
    thread: Any = threading.current_thread()
    thread.syncthreads()  # simulated copies arrive at once; but the thread that starts them must have come by


@instruction("barrier.cluster.arrive;", "", "", effects=True)
def cluster_arrive() -> None:
    """The thread has come to the cluster's barrier: what it wrote to shared memory will be seen beyond it. sm_90."""


@instruction("barrier.cluster.wait;", "", "", effects=True)
def cluster_wait() -> None:
    """Until all threads of the cluster have come to its barrier. sm_90."""
    thread: Any = threading.current_thread()
    thread.synccluster()


@instruction("prefetch.tensormap [$0];", "", "p", effects=True)
def prefetch_tensor_map(source: Any, i: Any) -> None:
    """Asks for a `tensor_map` (i: 0), so that the first `tma_load_2d` by it need not wait for it. sm_90."""


if SIMULATED:

    def cluster_load(p: Any, at: Any, rank: Any) -> Any:
        """The int32 at a place of a shared array, in the cluster's block of that rank. sm_90."""
        thread: Any = threading.current_thread()
        return thread.shared_of(p, int(rank))[int(at) // 4]

    def load_row_pair(p: Any, at: Any) -> tuple:
        """The words of a lane's two rows in a row-block's 128 columns, int32 x 16: of both rows, 16 columns after the
        other. at: the place of the first in a shared array."""
        first = int(at) // 4
        return tuple(int32(p[first + piece // 4 + r]) for piece in _ROW_PAIR_OFFSETS for r in range(2))

    def tma_load_2d(source: Any, i: Any, to: Any, at: Any, arrival: Any, column: Any, row: Any) -> None:
        """Starts copying a box of a matrix from (row, column) on, in int32, to place `at` of a shared array, row after
        row, zeros beyond the matrix' end; `arrival` counts the bytes. source: a `tensor_map`, i: 0. A panel is
        swizzled. One thread. sm_90."""
        box = np.zeros((source.rows, source.ints), np.int32)
        part = source.matrix[int(row) : int(row) + source.rows, int(column) : int(column) + source.ints]
        box[: part.shape[0], : part.shape[1]] = part
        if source.ints == SPAN_INTS:
            box = _swizzled(box)
        assert int(at) % 128 == 0
        to[int(at) // 4 : int(at) // 4 + box.size] = box.reshape(-1)

else:

    @instruction(
        "{ .reg .b32 t; mapa.shared::cluster.u32 t, $1, $2; ld.shared::cluster.b32 $0, [t]; }", "r", "rr", effects=True
    )
    def _cluster_load(at: Any, rank: Any) -> Any: ...

    @device_function
    def cluster_load(p: Any, at: Any, rank: Any) -> Any:
        return _cluster_load(at, int32(rank))

    @instruction(_ROW_PAIR_PTX, "r" * 16, "r", effects=True)
    def _load_row_pair(at: Any) -> Any: ...

    @device_function
    def load_row_pair(p: Any, at: Any) -> Any:
        return _load_row_pair(at)

    @instruction(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$0, {$3, $4}], [$2];",
        "",
        "prrrr",
        effects=True,
    )
    def _tma_load_2d(source: Any, i: Any, at: Any, arrival: Any, column: Any, row: Any) -> None: ...

    @device_function
    def tma_load_2d(source: Any, i: Any, to: Any, at: Any, arrival: Any, column: Any, row: Any) -> None:
        _tma_load_2d(source, i, at, arrival, column, row)
