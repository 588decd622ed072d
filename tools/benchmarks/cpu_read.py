"""How fast this machine's memory is read: the streaming read that a decode step is compared with."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitnet_numba.kernels.cpu.vec import add, load_i32x16, store, zero_i32x16

READ_BYTES = 1 << 29  # more than any cache holds
WINDOW_BYTES = 8 * READ_BYTES  # takes as long as a window of decoding: a shorter one finds memory faster, for a moment
LINES = 8  # of 64 bytes in a round of the loop


def ones() -> NDArray[np.int32]:
    """Memory to read: written, since pages that never were are all the same one, in the cache."""
    return np.ones(READ_BYTES // 4, np.int32)


@njit(nogil=True)
def read_sum(address, nbytes, sums):
    """Reads from an address on, a multiple of 512 bytes, as the kernels do: one stream, 64 bytes at a time.

    The sum over each of the 16 int32 columns goes to address `sums`, so that no load can be dropped.
    """
    a, b, c, d = zero_i32x16(), zero_i32x16(), zero_i32x16(), zero_i32x16()
    for p in range(address, address + nbytes, 64 * LINES):
        a, b = add(a, load_i32x16(p, 0)), add(b, load_i32x16(p, 64))
        c, d = add(c, load_i32x16(p, 128)), add(d, load_i32x16(p, 192))
        a, b = add(a, load_i32x16(p, 256)), add(b, load_i32x16(p, 320))
        c, d = add(c, load_i32x16(p, 384)), add(d, load_i32x16(p, 448))
    store(sums, 0, add(add(a, b), add(c, d)))


class StreamingRead:
    """A read of a large array by some threads, each its own part. Where its pages lie makes a difference: a file that
    was mapped from scattered small pages can be a third slower than memory of the same size."""

    def __init__(self, memory: NDArray[np.int32], repeats: int):
        """repeats: of the read, in a window."""
        self._memory, self._repeats = memory, repeats
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def nbytes(self, threads: int) -> int:
        """Bytes that so many threads read in a window."""
        return self._repeats * threads * self._part(threads)

    def seconds(self, threads: int) -> float:
        """Seconds of a window."""
        pool = self._pools.setdefault(threads, ThreadPoolExecutor(threads))
        part = self._part(threads)
        sums = (ctypes.c_int32 * (16 * threads))()
        starts = [self._memory.ctypes.data + i * part for i in range(threads)]
        results = [ctypes.addressof(sums) + 64 * i for i in range(threads)]
        start = perf_counter()
        for _ in range(self._repeats):
            list(pool.map(read_sum, starts, [part] * threads, results))
        seconds = perf_counter() - start
        return seconds

    def _part(self, threads: int) -> int:
        return self._memory.nbytes // threads // (64 * LINES) * 64 * LINES

    def close(self) -> None:
        """Ends the threads."""
        for pool in self._pools.values():
            pool.shutdown()
