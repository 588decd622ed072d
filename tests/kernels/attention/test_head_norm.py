"""RMSNorm of queries and keys by heads.

Contract: to the bit the definition with the mean of squares rounded once from float64. The reference's mean is summed
in float32, so that it differs by head_dim units of 2^-24 at most. Values are not touched.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.head_norm import head_norm
from bitnet_numba.kernels.attention.parts import HeadShape
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.reference.model import rms_norm
from tests.kernels.harness import HarnessDevice, Out, assert_close, needs_gpu, simulated


def check_head_norm(shape: HeadShape, tokens: int, seed: int) -> None:
    """One launch against the definition and the reference."""
    rng = np.random.default_rng(seed)
    heads, D, eps = shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim, np.float32(1e-6)
    x = (rng.standard_normal((tokens, heads, D)) * 10.0 ** rng.uniform(-4, 4)).astype(np.float32)
    weights = rng.uniform(-2, 2, (2, D)).astype(np.float32)
    device, out = HarnessDevice(1), Out(x.size, np.float32, x)
    norms = [Norm(device.operand(w), float(eps)) for w in weights]
    head_norm(device, device.operand(out), *norms, tokens, shape)
    device.run()
    result = out.array.reshape(x.shape)
    normed = heads - shape.num_kv_heads
    w = np.repeat(weights, [shape.num_heads, shape.num_kv_heads], axis=0)
    mean = np.mean((x * x).astype(np.float64), axis=-1, keepdims=True).astype(np.float32)[:, :normed]
    expected = w * (x[:, :normed] * (np.float32(1) / np.sqrt(mean + eps)))
    # The mean of float64 sums in another order may round to a neighbour.
    assert_close(result[:, :normed], expected, 2.0**-22 * np.abs(expected), "queries and keys")
    reference = np.stack([rms_norm(x[:, h], w[h], float(eps)) for h in range(normed)], 1)
    assert_close(result[:, :normed], reference, (D + 4) * 2.0**-24 * np.abs(reference), "against the reference")
    assert result[:, normed:].tobytes() == x[:, normed:].tobytes(), "values changed"


@simulated
@settings(max_examples=8)
@given(
    group=st.integers(1, 3), kv=st.integers(1, 3), half=st.integers(1, 40), tokens=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_simulated_head_norm(group: int, kv: int, half: int, tokens: int, seed: int) -> None:
    check_head_norm(HeadShape(group * kv, kv, 2 * half), tokens, seed)


@needs_gpu
@pytest.mark.parametrize("shape", [(32, 8, 128), (16, 8, 128), (3, 1, 100), (4, 2, 256)])
@pytest.mark.parametrize("tokens", [1, 130])
def test_head_norm_on_gpu(shape: tuple[int, int, int], tokens: int) -> None:
    check_head_norm(HeadShape(*shape), tokens, 3)


def test_launcher_refuses_what_does_not_fit() -> None:
    device, shape = DryRunDevice(90, 132), HeadShape(4, 2, 64)
    qkv, norm = device.empty(3 * 512, np.float32), Norm(device.empty(64, np.float32), 1e-6)
    head_norm(device, qkv, norm, norm, 3, shape)
    with pytest.raises(ValueError, match="head_norm: qkv holds 1536 elements"):
        head_norm(device, qkv, norm, norm, 4, shape)
    with pytest.raises(ValueError, match="head_norm: k_norm holds 63 elements"):
        head_norm(device, qkv, norm, Norm(device.empty(63, np.float32), 1e-6), 3, shape)
    with pytest.raises(ValueError, match="one eps, not 1e-06 and 1e-05"):
        head_norm(device, qkv, norm, Norm(norm.weight, 1e-5), 3, shape)
    with pytest.raises(ValueError, match="at least one is needed"):
        head_norm(device, qkv, norm, norm, 0, shape)
    with pytest.raises(ValueError, match="head_norm: 3 heads cannot share 2"):
        head_norm(device, qkv, norm, norm, 1, HeadShape(3, 2, 64))
