"""Memory that shows when a kernel reads what it should not."""

import ctypes
import mmap

import numpy as np
import pytest


def end_of_memory(values: np.ndarray) -> np.ndarray:
    """A copy of an array behind which lies memory that must not be touched."""
    page = mmap.PAGESIZE
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0):
        pytest.skip("memory cannot be protected here")
    copy = np.frombuffer(memory, np.uint8, values.nbytes, size - values.nbytes).view(values.dtype).reshape(values.shape)
    copy[:] = values
    return copy
