"""bfloat16 numbers as uint16 bit patterns: the upper half of a float32. NumPy has no such dtype."""

import numpy as np
from numpy.typing import NDArray


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bit patterns, exactly. Any shape."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def from_float32(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bfloat16 bit patterns nearest to float32 values, ties to even. Any shape; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet_nan, rounded >> np.uint32(16)).astype(np.uint16)
