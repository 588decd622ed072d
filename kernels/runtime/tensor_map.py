"""Tensor maps: what the tensor memory accelerator (TMA, sm_90) needs to know of a matrix to load boxes of it."""

import threading
from functools import cache
from typing import Any

import numpy as np

from bitnet_numba.kernels.ptx.tma import Boxes
from bitnet_numba.kernels.runtime.driver import driver_call
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView

WORDS = 16  # uint64 of a map
SLAB_MAPS = 512  # a graph of 2B4T takes 120: to allocate for each would take longer than to capture it

_lock = threading.Lock()
_slabs: list[DeviceArray] = []
_num_maps = 0  # in all slabs


def _store(words: np.ndarray) -> DeviceView:
    """A map's words in device memory."""
    global _num_maps
    with _lock:
        place = _num_maps % SLAB_MAPS
        if place == 0:
            _slabs.append(DeviceArray(SLAB_MAPS * WORDS, np.uint64))
        stored = DeviceView(_slabs[-1].address + 8 * WORDS * place, WORDS, np.uint64)
        _num_maps += 1
    stored.write(words)
    return stored


@cache
def _encoder_arguments(boxes: Boxes) -> tuple[Any, ...]:
    """What the driver's encoder takes beside rank and address. To make it takes as long as all else of a map, and a
    model has hundreds of maps with the same boxes."""
    from cuda.bindings import driver

    def member(kind: str, name: str) -> Any:
        return getattr(getattr(driver, f"CUtensorMap{kind}"), f"CU_TENSOR_MAP_{name}")

    def integers(kind: str, *values: int) -> list[Any]:
        return [getattr(driver, kind)(value) for value in values]

    return (
        member("DataType", "DATA_TYPE_INT32"),
        integers("cuuint64_t", *reversed(boxes.shape)),
        integers("cuuint64_t", *(4 * stride for stride in reversed(boxes.strides))),  # bytes
        integers("cuuint32_t", *reversed(boxes.box)),
        integers("cuuint32_t", *(1 for _ in boxes.box)),  # every element of a box
        member("Interleave", "INTERLEAVE_NONE"),
        member("Swizzle", "SWIZZLE_128B" if boxes.swizzled else "SWIZZLE_NONE"),
        member("L2promotion", "L2_PROMOTION_L2_256B"),
        member("FloatOOBfill", "FLOAT_OOB_FILL_NONE"),
    )


@cache
def tensor_map(address: int, boxes: Boxes) -> DeviceArray:
    """A CUtensorMap, 128 bytes in device memory, of an array at an address: what `ptx.tma_load_2d` and `tma_load_3d`
    take.

    It is never freed: captured launches go on using it, and kernels need no fence for a map that never changes.
    """
    kind, *rest = _encoder_arguments(boxes)
    encoded = driver_call("cuTensorMapEncodeTiled", kind, len(boxes.shape), address, *rest)
    return _store(np.array([int(word) for word in encoded.opaque], np.uint64))
