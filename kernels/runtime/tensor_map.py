"""The description of a matrix that the tensor memory accelerator (TMA, sm_90) loads boxes of."""

from functools import cache

import numpy as np

from bitnet_numba.kernels.ptx.tma import SPAN_INTS
from bitnet_numba.kernels.runtime.driver import driver_call
from bitnet_numba.kernels.runtime.memory import DeviceArray


@cache
def tensor_map(address: int, rows: int, row_ints: int, box_rows: int, box_ints: int) -> DeviceArray:
    """What `tma_load_2d` wants to know of a matrix at an address, int32 [rows, row_ints], and of the boxes to copy: a
    CUtensorMap in device memory. Boxes of SPAN_INTS a row come swizzled. It is kept, 128 bytes, since captured
    launches go on using it; and since it never changes, nor does its place ever hold another, kernels need no fence."""
    from cuda.bindings import driver

    def member(kind: str, name: str) -> object:
        return getattr(getattr(driver, f"CUtensorMap{kind}"), f"CU_TENSOR_MAP_{name}")

    def numbers(kind: str, *values: int) -> list:
        return [getattr(driver, kind)(value) for value in values]

    encoded = driver_call(
        "cuTensorMapEncodeTiled",
        member("DataType", "DATA_TYPE_INT32"),
        2,
        address,
        numbers("cuuint64_t", row_ints, rows),
        numbers("cuuint64_t", 4 * row_ints),
        numbers("cuuint32_t", box_ints, box_rows),
        numbers("cuuint32_t", 1, 1),
        member("Interleave", "INTERLEAVE_NONE"),
        member("Swizzle", "SWIZZLE_128B" if box_ints == SPAN_INTS else "SWIZZLE_NONE"),
        member("L2promotion", "L2_PROMOTION_L2_256B"),
        member("FloatOOBfill", "FLOAT_OOB_FILL_NONE"),
    )
    return DeviceArray.of(np.array([int(word) for word in encoded.opaque], np.uint64))
