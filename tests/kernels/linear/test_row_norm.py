"""RMSNorm of rows by itself.

Contract: the definition with the mean of squares rounded once from float64, and one more rounding where it is added to
what is there.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear.row_norm import row_norm
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import DryRunDevice
from tests.kernels.harness import HarnessDevice, Out, assert_close, needs_gpu, simulated


def check_row_norm(tokens: int, K: int, add: bool, seed: int) -> None:
    """One launch against the definition."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, K)) * 10.0 ** rng.uniform(-4, 4)).astype(np.float32)
    before = rng.standard_normal((tokens, K)).astype(np.float32)
    weight, eps = rng.uniform(-2, 2, K).astype(np.float32), np.float32(1e-6)
    device, out = HarnessDevice(1), Out(x.size, np.float32, before)
    norm = Norm(device.operand(weight), float(eps))
    row_norm(device, device.operand(x), norm, device.operand(out), tokens, K, add=add)
    device.run()
    mean = np.mean((x * x).astype(np.float64), axis=-1, keepdims=True).astype(np.float32)
    expected = weight * (x * (np.float32(1) / np.sqrt(mean + eps)))
    # The mean of float64 sums in another order may round to a neighbour.
    bound = 2.0**-22 * np.abs(expected)
    if add:
        expected = before + expected
        bound = bound + 2.0**-23 * np.abs(expected)
    assert_close(out.array.reshape(x.shape), expected, bound, "rows")


@simulated
@settings(max_examples=6)
@given(
    tokens=st.integers(1, 3), pieces=st.integers(1, 100), add=st.booleans(), seed=st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_simulated_row_norm(tokens: int, pieces: int, add: bool, seed: int) -> None:
    check_row_norm(tokens, 4 * pieces, add, seed)


@needs_gpu
@pytest.mark.parametrize("K", [4, 640, 1024, 5000])
@pytest.mark.parametrize("add", [False, True])
def test_row_norm_on_gpu(K: int, add: bool) -> None:
    check_row_norm(130, K, add, 3)


def test_launcher_refuses_what_does_not_fit() -> None:
    device = DryRunDevice(90, 132)
    x, norm = device.empty(3 * 64, np.float32), Norm(device.empty(64, np.float32), 1e-6)
    row_norm(device, x, norm, x, 3, 64)
    with pytest.raises(ValueError, match="row_norm: x holds 192 elements"):
        row_norm(device, x, norm, x, 4, 64)
    with pytest.raises(ValueError, match="a multiple of 4 columns, not 62"):
        row_norm(device, x, norm, x, 3, 62)
    with pytest.raises(ValueError, match="at least one is needed"):
        row_norm(device, x, norm, x, 0, 64)
