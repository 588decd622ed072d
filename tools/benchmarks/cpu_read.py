"""How fast this machine's memory is read: the streaming read that a decode step is compared with."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitnet_numba.kernels.cpu.vec import add, load_i32x16, store, zero_i32x16

READ_BYTES = 1 << 29  # more than any cache holds
LINES = 8  # of 64 bytes in a round of the loop


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
    """A read of a large array by some threads, each its own part."""

    def __init__(self, nbytes: int = READ_BYTES):
        self._memory: NDArray[Any] = np.ones(nbytes // 4, np.int32)  # written, so every page has memory of its own
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def nbytes(self, threads: int) -> int:
        """Bytes that so many threads read."""
        return threads * self._part(threads)

    def seconds(self, threads: int) -> float:
        """Seconds of a read."""
        pool = self._pools.setdefault(threads, ThreadPoolExecutor(threads))
        part = self._part(threads)
        sums = (ctypes.c_int32 * (16 * threads))()
        starts = [self._memory.ctypes.data + i * part for i in range(threads)]
        results = [ctypes.addressof(sums) + 64 * i for i in range(threads)]
        start = perf_counter()
        list(pool.map(read_sum, starts, [part] * threads, results))
        seconds = perf_counter() - start
        if sum(sums) != threads * part // 4:
            raise AssertionError("the streaming read missed a part of the memory")
        return seconds

    def _part(self, threads: int) -> int:
        return self._memory.nbytes // threads // (64 * LINES) * 64 * LINES

    def close(self) -> None:
        """Ends the threads."""
        for pool in self._pools.values():
            pool.shutdown()
