"""A stricter scheduler for Numba's CUDA simulator, in place of its own.

Numba's simulator starts a Python thread for each CUDA thread and polls them, which is slow, and has no warps. Here
each is a greenlet, of which one runs at a time until it reaches a barrier; so blocks run many times faster, and
 - a barrier of one warp (shuffles, syncwarp) concerns its 32 threads alone, as on the device, one of a warpgroup 128;
 - blocks are independent: shared arrays belong to one block; those of a cluster run together, see each other's shared
   arrays until a block ends, and meet at its barrier, which opens once all have arrived, though not all wait; one
   of them gets ahead of the others: shared memory that is written too early changes the result;
 - a deadlock at barriers is an error, not a hang;
 - the order of threads between barriers is shuffled anew each time: a missing barrier changes the result;
 - shared and local arrays start as NaN (or -1), so that a read before the first write shows;
 - cp.async copies are made at some barrier after their start, or when they are waited for at the latest, and TMA copies
   at once or when they are waited for: memory that is read or used again without that wait changes the result.
"""

import random
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import cached_property
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba import cuda
from numba.core import types
from numba.cuda.simulator import kernel as simulator_kernel
from numba.cuda.simulator import kernelapi
from numba.np.numpy_support import as_dtype

from bitnet_numba.kernels import ptx

WARP, WARPGROUP = 32, 128  # threads
SWITCHES = 0.05, 0.6  # how often another block of a cluster gets its turn, though this one could go on


class SimulatedThread(greenlet):
    """One CUDA thread. It runs only between being chosen by its block and reaching a barrier."""

    def __init__(self, block: "Block", rank: int, target: Callable[[], None], threadIdx: Any, thread_id: int):
        super().__init__(parent=getcurrent())
        self.gr_context = copy_context()  # how the launch treats floating-point errors
        self.block, self.rank, self._kernel = block, rank, target
        self.blockIdx, self.threadIdx, self.thread_id = block.block_indices[rank], threadIdx, thread_id
        self.offers: list[Any] = [None, None]  # this lane's values in its even and its odd exchanges
        self.exchanges = 0
        self.computed: list[tuple[int, Any]] = [(0, None)] * 2  # by its warp's first thread: of which exchange, what
        self.async_copies: list[list[Any]] = [[]]  # groups of copies under way, see kernels/ptx/cp_async.py
        self.vote = False
        self.arrivals = self.cluster_waits = 0  # at the cluster's barrier
        self.waits_at = "start"  # "", "start", "cluster", "block", "warpgroup", "warp" or "condition"
        self.condition: Callable[[], bool] = lambda: True
        self.done = False

    def run(self) -> None:
        """What `switch` starts."""
        try:
            if self.block.failure is None:
                self._kernel()
        except Exception as error:  # the thread that launched the kernel raises it
            self.block.fail(f"block {list(self.blockIdx)}, thread {list(self.threadIdx)}: {error!r}")
        self.done = True

    def _wait(self, where: str) -> None:
        for group in self.async_copies:
            if group and self.block.order.random() < 0.5:
                for to, i, source, j, size in group:
                    to[i : i + 4] = source[j : j + 4] if size else 0
                group.clear()
        self.waits_at = where
        self.parent.switch()
        if self.block.failure is not None:
            raise RuntimeError("another thread of the block failed")
        self.waits_at = ""

    def syncthreads(self) -> None:
        self._wait("block")

    def arrive_at_cluster(self) -> None:
        if self.arrivals > self.cluster_waits:
            raise RuntimeError("a thread arrives twice at the cluster's barrier without a wait")
        self.arrivals += 1

    def wait_for_cluster(self) -> None:
        if self.arrivals == self.cluster_waits:
            raise RuntimeError("a thread waits at the cluster's barrier, but has not arrived")
        self._wait("cluster")
        self.cluster_waits += 1

    @property
    def shared(self) -> dict[Any, np.ndarray]:
        """The shared arrays of this thread's block, by code and line that make them."""
        return self.block.shared[self.rank]

    def shared_of(self, own: np.ndarray, rank: int) -> np.ndarray:
        """The counterpart of a shared array in the cluster's block of that rank, which must not have ended."""
        if all(thread.done for thread in self._mates(rank)):
            raise RuntimeError(f"the cluster's block {rank}, whose shared memory is used, has ended")
        return self.block.shared[rank][next(line for line, array in self.shared.items() if array is own)]

    def _mates(self, rank: int | None = None) -> list["SimulatedThread"]:
        """The threads of this thread's block, or of the cluster's block of a rank."""
        size = len(self.block.threads) // len(self.block.block_indices)
        return self.block.threads[(self.rank if rank is None else rank) * size :][:size]

    def syncwarp(self) -> None:
        self._wait("warp")

    def syncwarpgroup(self) -> None:
        self._wait("warpgroup")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Lets other threads run until the condition is met."""
        self.condition = condition
        self._wait("condition")

    @property
    def mbarriers(self) -> dict[int, Any]:
        """The mbarriers of this thread's block, by address; see kernels/ptx/tma.py."""
        return self.block.mbarriers[self.rank]

    def _votes(self, value: Any) -> list[bool]:
        self.vote = bool(value)
        self.syncthreads()
        votes = [thread.vote for thread in self._mates() if not thread.done]
        self.syncthreads()
        return votes

    def syncthreads_or(self, value: Any) -> int:
        return int(any(self._votes(value)))

    @cached_property
    def _warp(self) -> list["SimulatedThread"]:
        """The threads of this thread's warp."""
        start = self.thread_id // WARP * WARP
        return self._mates()[start : start + WARP]

    def _offer_to_warp(self, value: Any) -> int:
        """Shows the warp a value; returns the slot in which the others' are then."""
        slot = self.exchanges % 2  # it is written again two exchanges later, when all have read it
        self.exchanges += 1
        self.offers[slot] = value
        self.syncwarp()
        return slot

    def gather_in_warp(self, value: Any) -> list[Any]:
        """The value that each lane of the warp passes, in lane order."""
        slot = self._offer_to_warp(value)
        return [thread.offers[slot] for thread in self._warp]

    def once_in_warp(self, value: Any, compute: Callable[[list[Any]], Any]) -> Any:
        """`compute` of the values that the lanes pass, in lane order: one lane computes it, all get it."""
        slot = self._offer_to_warp(value)
        first = self._warp[0]
        if first.computed[slot][0] != self.exchanges:
            first.computed[slot] = self.exchanges, compute([thread.offers[slot] for thread in self._warp])
        return first.computed[slot][1]

    def exchange_in_warp(self, value: Any, source: Callable[[int], int]) -> Any:
        """A warp shuffle: the value of lane `source(own lane)`."""
        slot = self._offer_to_warp(value)
        return self._warp[source(self.thread_id % WARP)].offers[slot]


class Block:
    """The threads of one block, or of a cluster's blocks (neighbours along y), of which one runs at a time."""

    order = random.Random(0)  # shuffles the threads between barriers
    cluster = 1  # blocks of a cluster
    names: dict[str, Any] = {}  # noqa: RUF012 - globals of the module of the kernel that runs
    early: list[Any] = []  # noqa: RUF012 - blockIdx of a cluster's blocks that wait for the others to be launched

    def __init__(self, function: Callable[..., None], grid_dim: Any, block_dim: Any, debug: bool):
        self._function, self._block_dim = function, block_dim
        Block.names = function.__globals__
        self.threads: list[SimulatedThread] = []
        self.block_indices: list[Any] = []  # blockIdx of each of its blocks
        self.shared: list[dict[Any, np.ndarray]] = []  # of each block
        self.mbarriers: list[dict[int, Any]] = []  # of each block
        self.failure: str | None = None
        self._ahead = 0  # which of the blocks runs, while the others stand still
        self._switch = self.order.choice(SWITCHES)

    @classmethod
    def of_clusters(cls, size: int) -> None:
        """Sets the cluster size of the next launch. Raises RuntimeError if the last left a cluster incomplete."""
        unfinished, cls.early, cls.cluster = len(cls.early), [], size
        if unfinished:
            raise RuntimeError(f"{unfinished} blocks of the last launch were no whole cluster and did not run")

    def run(self, grid_point: Any, *args: Any) -> None:
        """Runs the block to its end, with its cluster. Raises RuntimeError if a thread fails, or at a deadlock."""
        Block.early.append(kernelapi.Dim3(*grid_point))
        if len(Block.early) < Block.cluster:
            return
        self.block_indices, Block.early = Block.early, []
        self.shared = [{} for _ in self.block_indices]
        self.mbarriers = [{} for _ in self.block_indices]
        with np.errstate(all="ignore"):  # the device wraps and overflows silently
            for rank in range(len(self.block_indices)):
                for thread_id, (z, y, x) in enumerate(np.ndindex(*reversed(self._block_dim))):
                    index = kernelapi.Dim3(x, y, z)
                    self.threads.append(SimulatedThread(self, rank, lambda: self._function(*args), index, thread_id))
            self._run_threads()
        if self.failure is not None:
            raise RuntimeError(f"simulated kernel failed in {self.failure}")

    def fail(self, reason: str) -> None:
        """Remembers the first failure; every other thread ends when it runs again."""
        if self.failure is None:
            self.failure = reason

    def _run_threads(self) -> None:
        """Runs each thread to its next barrier, until all have ended."""
        live = list(self.threads)
        ready = self._in_turn(live)
        while live:
            ready.sort(key=lambda _: self.order.random())
            for thread in ready:
                thread.switch()
            live = [thread for thread in live if not thread.done]
            ready = list(live) if self.failure is not None else self._in_turn(self._released(live))
            if not ready and live:
                barriers = sorted({f"{thread.waits_at} (warp {thread.thread_id // WARP})" for thread in live})
                block = list(live[0].blockIdx)
                self.fail(f"block {block}: deadlock: threads wait at different barriers: {barriers}")
                ready = list(live)

    def _in_turn(self, ready: list[SimulatedThread]) -> list[SimulatedThread]:
        """Those of the block that runs: of a cluster, one gets ahead of the others for a random time."""
        if len(self.block_indices) == 1:
            return ready
        ranks = sorted({thread.rank for thread in ready})
        if ranks and (self._ahead not in ranks or self.order.random() < self._switch):
            self._ahead = self.order.choice(ranks)
        return [thread for thread in ready if thread.rank == self._ahead]

    @staticmethod
    def _released(live: list[SimulatedThread]) -> list[SimulatedThread]:
        """The threads whose barrier has opened."""

        def groups(size: int, where: str) -> list[SimulatedThread]:
            found: dict[Any, list[SimulatedThread]] = {}
            for thread in live:
                found.setdefault((thread.rank, thread.thread_id // size), []).append(thread)
            together = [group for group in found.values() if all(thread.waits_at == where for thread in group)]
            return [thread for group in together for thread in group]

        places = {thread.waits_at for thread in live}
        if len(places) == 1 and not places & {"condition", "cluster"}:  # all have reached it
            return list(live)
        ready = [thread for thread in live if thread.waits_at == "condition" and thread.condition()]
        arrivals = min((thread.arrivals for thread in live), default=0)  # those that have ended count as arrived
        ready += [thread for thread in live if thread.waits_at == "start"]
        ready += [thread for thread in live if thread.waits_at == "cluster" and thread.arrivals <= arrivals]
        return ready + groups(1 << 16, "block") + groups(WARPGROUP, "warpgroup") + groups(WARP, "warp")


_python_thread = threading.current_thread


def current_thread() -> Any:
    """The simulated thread that runs, in place of Python's; outside of kernels, Python's."""
    running = getcurrent()
    return running if isinstance(running, SimulatedThread) else _python_thread()


def _local_array(self: Any, shape: Any, dtype: Any, alignment: Any = None) -> np.ndarray:
    return _poisoned(shape, dtype)


def _shared_array(self: Any, shape: Any, dtype: Any, alignment: Any = None) -> np.ndarray:
    """An array for each line of source and each block; of size 0, all dynamic shared memory."""
    if shape == 0:
        shape = self._dynshared_size // np.dtype(as_dtype(dtype) if isinstance(dtype, types.Type) else dtype).itemsize
    caller = sys._getframe(1)
    line = (caller.f_code, caller.f_lineno)
    shared = current_thread().shared
    if line not in shared:
        shared[line] = _poisoned(shape, dtype)
    return shared[line]


def _poisoned(shape: Any, dtype: Any) -> np.ndarray:
    array = np.empty(shape, as_dtype(dtype) if isinstance(dtype, types.Type) else dtype)
    array.view(np.uint8)[...] = 0xFF
    return array


_uses_cuda: dict[int, bool] = {}  # by id of a module's globals: whether one of them is numba.cuda outside of kernels
_call_kernel = simulator_kernel.FakeCUDAKernel.__call__


def _call(self: Any, *args: Any) -> Any:
    """Calls a device function as it is if its module has no numba.cuda that would have to be replaced: none at all, or
    it is the kernel's module, where that is replaced during the whole launch."""
    if not self._device:
        return _call_kernel(self, *args)
    names = self.fn.__globals__
    if names is Block.names:
        return self.fn(*args)
    if id(names) not in _uses_cuda:
        _uses_cuda[id(names)] = any(
            value is cuda or isinstance(value, kernelapi.FakeCUDAModule) for value in names.values()
        )
    return _call_kernel(self, *args) if _uses_cuda[id(names)] else self.fn(*args)


_LANES = np.arange(WARP)
_BUTTERFLIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # each lane's value and another's
    "warp_sum": lambda x, other: (x + other).astype(np.float32),
    "warp_sum_int": lambda x, other: (x + other).astype(np.int32),
    "warp_max": lambda x, other: np.where(other > x, other, x),
}


def _reduction(combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """What a function of `ptx.warp` computes in five shuffles, in one exchange."""

    def compute(values: list[Any]) -> np.ndarray:
        x = np.array(values)
        for step in range(5):
            x = combine(x, x[_LANES ^ 1 << step])
        return x

    def reduce(x: Any) -> Any:
        thread = current_thread()
        return thread.once_in_warp(x, compute)[thread.thread_id % WARP]

    return reduce


def install() -> None:
    """Replaces the simulator's scheduler, poisons shared and local arrays, and makes a warp's reductions fast."""
    for name, combine in _BUTTERFLIES.items():
        setattr(ptx, name, _reduction(combine))
    threading.current_thread = current_thread
    simulator_kernel.BlockManager = Block
    simulator_kernel.FakeCUDAKernel.__call__ = _call
    kernelapi.FakeCUDALocal.array = _local_array
    kernelapi.FakeCUDAShared.array = _shared_array
