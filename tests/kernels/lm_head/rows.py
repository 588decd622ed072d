"""Random rows of an LM head, in every dtype."""

import numpy as np

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.kernels.operands import RowDtype


def random_rows(
    rng: np.random.Generator, num_rows: int, K: int, dtype: RowDtype
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Rows of a table, their scales, and what they stand for, float64 [num_rows, K]."""
    if dtype == "int8":
        rows = rng.integers(-128, 128, (num_rows, K)).astype(np.int8)
        scale = rng.uniform(0.001, 3, num_rows).astype(np.float32)
        return rows, scale, rows.astype(np.float64) * scale[:, None]
    values = rng.standard_normal((num_rows, K), np.float32)
    if dtype == "bf16":
        bits = from_float32(values)
        return bits, None, to_float32(bits).astype(np.float64)
    if dtype == "f16":  # the largest numbers and denormal ones among them
        values = (values * 10.0 ** rng.choice([0, 0, 0, -6, 4], values.shape)).clip(-65504, 65504)
    rows = values.astype(np.float16 if dtype == "f16" else np.float32)
    return rows, None, rows.astype(np.float64)
