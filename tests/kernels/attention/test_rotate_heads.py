"""RMSNorm and rotation of the heads of whole texts.

Contract: the reference's, at each token's position in its text. A rotated element is a sum of two products, so its
error goes with the pair's size; the norm's mean is summed in float64 and differs from the reference's by head_dim
units.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.parts import RopeTables
from bitnet_numba.kernels.attention.rotate_heads import rotate_heads
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.reference.model import rms_norm, rotate
from tests.kernels.attention.test_text_attention import starts_of
from tests.kernels.harness import HarnessDevice, Out, assert_close, needs_gpu, simulated


def check_rotate_heads(heads: int, D: int, lengths: list[int], norm: bool, seed: int) -> None:
    """One launch against the reference."""
    rng = np.random.default_rng(seed)
    starts, eps = starts_of(lengths), 1e-6
    x = (rng.standard_normal((len(starts), heads, D)) * 10.0 ** rng.uniform(-2, 2)).astype(np.float32)
    weight = rng.uniform(-2, 2, D).astype(np.float32)
    angles = rng.uniform(-4, 4, (max(lengths), D // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    device, out = HarnessDevice(1), Out(x.size, np.float32, x)
    tables = RopeTables(device.operand(cos), device.operand(sin))
    own = Norm(device.operand(weight), eps) if norm else None
    rotate_heads(device, device.operand(out), own, tables, device.operand(starts), len(starts), heads, D)
    device.run()
    result, used = out.array.reshape(x.shape), starts >= 0
    positions = (np.arange(len(starts)) - starts)[used]
    normed = rms_norm(x[used], weight, eps) if norm else x[used]
    expected = rotate(normed, *(np.concatenate([of[positions]] * 2, axis=1) for of in (cos, sin)))
    pair = np.abs(normed).reshape(-1, heads, 2, D // 2).sum(axis=2)
    bound = (D * norm + 8) * 2.0**-24 * np.concatenate([pair, pair], axis=-1)
    assert_close(result[used], expected, bound, "rotated heads")
    assert result[~used].tobytes() == x[~used].tobytes(), "an unused row was written"


@simulated
@settings(max_examples=6)
@given(
    heads=st.integers(1, 5), half=st.integers(1, 40), lengths=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    norm=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_simulated_rotate_heads(heads: int, half: int, lengths: list[int], norm: bool, seed: int) -> None:
    check_rotate_heads(heads, 2 * half, lengths, norm, seed)


@needs_gpu
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 128), (1, 256), (3, 100)])
@pytest.mark.parametrize("norm", [False, True])
def test_rotate_heads_on_gpu(heads: int, head_dim: int, norm: bool) -> None:
    check_rotate_heads(heads, head_dim, [1, 300, 17], norm, 3)


def test_launcher_refuses_what_does_not_fit() -> None:
    device = DryRunDevice(90, 132)
    x, starts = device.empty(3 * 256, np.float32), device.empty(3, np.int32)
    angles = device.empty(32, np.float32)
    tables, norm = RopeTables(angles, angles), Norm(device.empty(64, np.float32), 1e-6)
    rotate_heads(device, x, norm, tables, starts, 3, 4, 64)
    with pytest.raises(ValueError, match="rotate_heads: x holds 768 elements"):
        rotate_heads(device, x, norm, tables, starts, 3, 5, 64)
    with pytest.raises(ValueError, match="rotate_heads: text_starts holds 3 elements"):
        rotate_heads(device, x, norm, tables, starts, 4, 2, 64)
    with pytest.raises(ValueError, match="at least one is needed"):
        rotate_heads(device, x, norm, tables, starts, 0, 4, 64)
    with pytest.raises(ValueError, match="rotate_heads takes even head sizes"):
        rotate_heads(device, x, None, tables, starts, 3, 4, 63)
