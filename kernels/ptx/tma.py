"""The tensor memory accelerator (TMA), mbarriers and clusters (sm_90).

TMA copies boxes of a matrix, described by a tensor map (`Device.tensor_map`), to shared memory, while an mbarrier
there counts the bytes. An mbarrier goes through phases of parity 0, 1, 0, ...; a phase is over when one thread has
announced its bytes (`mbarrier_expect_tx`) and these have been written. One that counts warps instead
(`mbarrier_init_warps`) says when all have read what a stage holds.

Boxes whose rows have 128 bytes, int8 or bfloat16, are written with the 128-byte swizzle that wgmma reads: the 16-byte
piece c of row r lies at piece c ^ (r % 8), so that a column of eight rows touches every bank once.

    row   piece 0 1 2 3 4 5 6 7
     0          0 1 2 3 4 5 6 7
     1          1 0 3 2 5 4 7 6
     2          2 3 0 1 6 7 4 5
     :
     7          7 6 5 4 3 2 1 0

Addresses are 32-bit addresses in shared memory, see `shared_address`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bitnet_numba.kernels.ptx.base import WARP, device_function, instruction, simulated_thread

SPAN_INTS = 32  # int32 of a swizzled row: 128 bytes
PANEL_ALIGN = 1024  # bytes: the swizzle repeats every eight rows


class Boxes(NamedTuple):
    """An array in memory and the boxes that it is loaded in, sizes in int32, from the outermost dimension on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # of all dimensions but the last, which is contiguous
    box: tuple[int, ...]
    swizzled: bool  # a box has rows of SPAN_INTS, which are written with the swizzle

    @staticmethod
    def of_matrix(rows: int, row_ints: int, box_rows: int, box_ints: int) -> "Boxes":
        """Of a matrix; swizzled if a box's rows have SPAN_INTS."""
        return Boxes((rows, row_ints), (row_ints,), (box_rows, box_ints), box_ints == SPAN_INTS)

    @property
    def size(self) -> int:
        """int32 from the array's first element to its last."""
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, (*self.strides, 1), strict=True))


@dataclass
class SimulatedTensorMap:
    """A tensor map under the simulator, of an int32 array that begins where the boxes' does."""

    array: np.ndarray
    boxes: Boxes

    def load(self, *start: int) -> np.ndarray:
        """The box at an element, as it is written to shared memory: zeros outside the array."""
        boxes = self.boxes
        whole = np.lib.stride_tricks.as_strided(
            self.array[: boxes.size], boxes.shape, [4 * n for n in (*boxes.strides, 1)], writeable=False
        )
        box = np.zeros(boxes.box, np.int32)
        part = whole[tuple(slice(n, n + size) for n, size in zip(start, boxes.box, strict=True))]
        box[tuple(slice(n) for n in part.shape)] = part
        return simulated_swizzle(box.reshape(-1, SPAN_INTS)) if boxes.swizzled else box


def simulated_swizzle(rows: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes, int32 [n, SPAN_INTS], with their pieces as the swizzle puts them; its own inverse."""
    pieces = rows.reshape(len(rows), 8, 4)
    order = np.arange(8) ^ np.arange(len(rows))[:, None] & 7
    return np.take_along_axis(pieces, order[:, :, None], axis=1).reshape(rows.shape)


class SimulatedMbarrier:
    """An mbarrier of the simulator, in `SimulatedThread.mbarriers` by its address. A copy is made at its start or when
    it is waited for, by chance: so a missing wait changes the result."""

    def __init__(self, count: int = 1) -> None:
        self.count = count  # arrivals of a phase
        self.phase, self.arrived, self.missing = 0, 0, 0  # bytes
        self.copies: list[Callable[[], None]] = []  # that are still to be made

    def over(self, parity: int) -> bool:
        """Whether the phase with this parity is over, once the copies have been made."""
        while self.copies:
            self.copies.pop(0)()
        return self.phase % 2 != parity

    def change(self, arrived: int = 0, announced: int = 0, copied: int = 0) -> None:
        """Counts arrivals and bytes; the phase ends when all that were announced have come."""
        self.arrived += arrived
        self.missing += announced - copied
        assert self.arrived <= self.count
        if self.arrived == self.count and self.missing == 0:
            self.phase, self.arrived = self.phase + 1, 0


# ---- mbarriers -----------------------------------------------------------------------------------------------------


@instruction("mbarrier.init.shared::cta.b64 [$0], 1; fence.mbarrier_init.release.cluster;", "", "r", effects=True)
def mbarrier_init(address: Any) -> None:
    """Makes the int64 at an address an mbarrier that one thread arrives at. One thread, then a barrier. sm_90."""
    simulated_thread().mbarriers[int(address)] = SimulatedMbarrier()


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "", "rr", effects=True)
def mbarrier_expect_tx(mbarrier: Any, nbytes: Any) -> None:
    """Arrives at the mbarrier at an address, whose phase ends when `nbytes` have been copied. One thread. sm_90."""
    simulated_thread().mbarriers[int(mbarrier)].change(1, announced=int(nbytes))


@instruction("mbarrier.init.shared::cta.b64 [$0], $1; fence.mbarrier_init.release.cluster;", "", "rr", effects=True)
def mbarrier_init_warps(address: Any, warps: Any) -> None:
    """Makes the int64 at an address an mbarrier that so many warps arrive at. One thread, then a barrier. sm_90."""
    simulated_thread().mbarriers[int(address)] = SimulatedMbarrier(int(warps))


@instruction(
    "{ .reg .pred one; bar.warp.sync 0xffffffff; elect.sync _|one, 0xffffffff; "
    "@one mbarrier.arrive.shared::cta.b64 _, [$0]; }",
    "",
    "r",
    effects=True,
)
def mbarrier_arrive_warp(mbarrier: Any) -> None:
    """This warp arrives at the mbarrier at an address: what its threads have read until now may change. sm_90."""
    thread = simulated_thread()
    thread.syncwarp()
    if thread.thread_id % WARP == 0:
        thread.mbarriers[int(mbarrier)].change(1)


@instruction(
    "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }",
    "",
    "rr",
    effects=True,
)
def mbarrier_wait(mbarrier: Any, parity: Any) -> None:
    """Blocks until the phase with this parity is over. sm_90."""
    state = simulated_thread().mbarriers[int(mbarrier)]
    simulated_thread().wait_until(lambda: state.over(int(parity)))


@instruction(
    "{ .reg .pred done; again: mbarrier.test_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }",
    "",
    "rr",
    effects=True,
)
def mbarrier_spin(mbarrier: Any, parity: Any) -> None:
    """`mbarrier_wait` for short waits: it asks again and again, and instructions before it are not held up. sm_90."""
    state = simulated_thread().mbarriers[int(mbarrier)]
    simulated_thread().wait_until(lambda: state.over(int(parity)))


# ---- Copies --------------------------------------------------------------------------------------------------------


@instruction("prefetch.tensormap [$0];", "", "p", effects=True)
def prefetch_tensor_map(tensor_map: Any, i: Any) -> None:
    """Loads a tensor map (i = 0) into its cache, so that the first `tma_load_2d` need not wait for it. sm_90."""


@instruction(
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$0, {$3, $4}], [$2];",
    "",
    "psrrrr",
    effects=True,
)
def _tma_load_2d(tensor_map: Any, i: Any, array: Any, address: Any, mbarrier: Any, column: Any, row: Any) -> None:
    _simulated_load(tensor_map, array, address, mbarrier, row, column)


@instruction(
    "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$0, {$3, $4, $5}], [$2];",
    "",
    "psrrrrr",
    effects=True,
)
def _tma_load_3d(
    tensor_map: Any, i: Any, array: Any, address: Any, mbarrier: Any, column: Any, row: Any, layer: Any
) -> None:
    _simulated_load(tensor_map, array, address, mbarrier, layer, row, column)


def _simulated_load(tensor_map: SimulatedTensorMap, array: Any, address: Any, mbarrier: Any, *start: Any) -> None:
    thread = simulated_thread()
    state, to = thread.mbarriers[int(mbarrier)], int(address)

    def copy() -> None:
        box = tensor_map.load(*map(int, start))
        array[to // 4 : to // 4 + box.size] = box.reshape(-1)
        state.change(copied=4 * box.size)

    assert to % 128 == 0
    if thread.block.order.random() < 0.5:
        copy()
    else:
        state.copies.append(copy)


# A function around the instruction, which narrows the operands: if kernels narrow them, the compiler orders the same
# instructions otherwise.
@device_function
def tma_load_2d(tensor_map: Any, i: Any, array: Any, address: Any, mbarrier: Any, column: Any, row: Any) -> None:
    """Starts copying the box at (row, column), counted in int32, to an address in a shared array, a multiple of 128
    (PANEL_ALIGN if swizzled), row after row, with zeros outside the matrix. Its bytes, zeros too, are counted by
    the mbarrier at an address. tensor_map: see `Device.tensor_map`; i = 0. One thread. sm_90."""
    _tma_load_2d(tensor_map, i, array, address, mbarrier, column, row)


@device_function
def tma_load_3d(
    tensor_map: Any, i: Any, array: Any, address: Any, mbarrier: Any, column: Any, row: Any, layer: Any
) -> None:
    """As `tma_load_2d`, the box at (layer, row, column) of an array of matrices, one after the other. sm_90."""
    _tma_load_3d(tensor_map, i, array, address, mbarrier, column, row, layer)


@instruction("fence.proxy.async.shared::cta;", "", "", effects=True)
def fence_proxy_async() -> None:
    """Before a barrier: what this thread has stored to shared memory is there for the TMA and for wgmma, which read it
    another way than threads do. sm_90."""


# ---- Clusters: blocks that run together and reach each other's shared memory ----------------------------------------


@instruction("barrier.cluster.arrive;", "", "", effects=True)
def cluster_arrive() -> None:
    """Arrives at the cluster's barrier: blocks past it see what this thread has written to shared memory. sm_90."""
    simulated_thread().arrive_at_cluster()


@instruction("barrier.cluster.wait;", "", "", effects=True)
def cluster_wait() -> None:
    """Blocks until all threads of the cluster have arrived at its barrier. sm_90."""
    simulated_thread().wait_for_cluster()


@instruction(
    "{ .reg .b32 t; mapa.shared::cluster.u32 t, $1, $2; ld.shared::cluster.b32 $0, [t]; }", "r", "srr", effects=True
)
def cluster_load(array: Any, address: Any, rank: Any) -> Any:
    """The int32 at an address in a shared array of the cluster's block of that rank. sm_90."""
    return simulated_thread().shared_of(array, int(rank))[int(address) // 4]


@instruction(
    "{ .reg .b32 t; mapa.shared::cluster.u32 t, $0, $1; st.shared::cluster.f32 [t], $2; }", "", "srrf", effects=True
)
def cluster_store_f32(array: Any, address: Any, rank: Any, value: Any) -> None:
    """Stores a float32 at an address in a shared array of the cluster's block of that rank. sm_90."""
    simulated_thread().shared_of(array, int(rank))[int(address) // 4] = value


@instruction(
    "{ .reg .b32 t; mapa.shared::cluster.u32 t, $0, $1; st.shared::cluster.v4.f32 [t], {$2, $3, $4, $5}; }", "",
    "srrffff", effects=True,
)  # fmt: skip
def cluster_store4_f32(array: Any, address: Any, rank: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """As `cluster_store_f32`, four neighbours at an address that is a multiple of 16. sm_90."""
    simulated_thread().shared_of(array, int(rank))[int(address) // 4 :][:4] = a, b, c, d
