"""Attention within whole texts.

Contract: the reference's attention, with its window, of every token over its own text, in float32; rows that are not
used are not written; a token's bits depend on its text alone.

Tolerance: scores are sums of head_dim products, each rounded and added with 2^-24 of the largest partial sum at most;
weights are exponentials of them with another 2^-22, and outputs sums of weights times values.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.parts import HeadShape
from bitnet_numba.kernels.attention.text_attention import BLOCK_TOKENS, text_attention
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.reference.model import attend
from tests.kernels.harness import HarnessDevice, Out, assert_close, needs_gpu, simulated


def starts_of(lengths: list[int]) -> np.ndarray:
    """`text_starts` of texts, one after the other at multiples of BLOCK_TOKENS."""
    parts = []
    for length in lengths:
        start = sum(map(len, parts))
        parts.append(np.full(-(-length // BLOCK_TOKENS) * BLOCK_TOKENS, -1, np.int32))
        parts[-1][:length] = start
    return np.concatenate(parts)


def check_text_attention(shape: HeadShape, lengths: list[int], window: int | None, seed: int) -> None:
    """One launch against the reference, and each text alone."""
    rng = np.random.default_rng(seed)
    D, H, G = shape.head_dim, shape.num_heads, shape.num_kv_heads

    def run(starts: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        out = Out(q.size, np.float32)
        poison = out.array.copy().reshape(q.shape)
        device = HarnessDevice(1)
        operands = [device.operand(array) for array in (q, k, v, starts, out)]
        text_attention(device, *operands, len(starts), shape, window=window)
        device.run()
        result = out.array.reshape(q.shape).copy()
        assert result[starts < 0].tobytes() == poison[starts < 0].tobytes(), "an unused row was written"
        return result

    starts = starts_of(lengths)
    q, k, v = (rng.standard_normal((len(starts), heads, D)).astype(np.float32) * 2 for heads in (H, G, G))
    q[starts < 0] = k[starts < 0] = v[starts < 0] = np.nan
    result = run(starts, q, k, v)
    for start in set(starts) - {-1}:
        (rows,) = np.nonzero(starts == start)
        expected = attend(q[rows], k[rows], v[rows], window)
        size = np.abs(q[rows]).max() * np.abs(k[rows]).max() * D**0.5
        bound = (2 * size * D**0.5 * 2.0**-24 + 2.0**-20) * np.abs(v[rows]).max()
        assert_close(result[rows], expected, bound, f"{shape}, text at {start}")
    last = slice(int(starts.max()), len(starts))
    own = run(starts[last] - starts[last].max() * (starts[last] >= 0), q[last], k[last], v[last])
    assert own[: lengths[-1]].tobytes() == result[last][: lengths[-1]].tobytes(), "a text's bits depend on the others"


@simulated
@settings(max_examples=3)
@given(
    group=st.integers(1, 3), kv=st.integers(1, 2), quarter=st.sampled_from((1, 9, 33)), seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=2), window=st.sampled_from((None, 1, 7, 33)),
)  # fmt: skip
def test_simulated_text_attention(
    group: int, kv: int, quarter: int, seed: int, lengths: list[int], window: int | None
) -> None:
    check_text_attention(HeadShape(group * kv, kv, 4 * quarter), lengths, window, seed)


@needs_gpu
@pytest.mark.parametrize("shape", [(16, 8, 128), (4, 1, 256), (4, 2, 64), (3, 1, 100), (4, 1, 4)])
@pytest.mark.parametrize("window", [None, 1, 50, 512])
def test_text_attention_on_gpu(shape: tuple[int, int, int], window: int | None) -> None:
    check_text_attention(HeadShape(*shape), [1, 300, 16, 17, 700, 33], window, 3)


def test_launcher_refuses_what_does_not_fit() -> None:
    device, shape = DryRunDevice(90, 132), HeadShape(4, 2, 64)
    q, kv, starts = (device.empty(16 * n, np.float32) for n in (256, 128, 1))
    starts = device.empty(16, np.int32)
    text_attention(device, q, kv, kv, starts, q, 16, shape)
    with pytest.raises(ValueError, match="text_attention: q holds 4096 elements"):
        text_attention(device, q, kv, kv, starts, q, 32, shape)
    with pytest.raises(ValueError, match="a multiple of 16 tokens is needed, not 15"):
        text_attention(device, q, kv, kv, starts, q, 15, shape)
    with pytest.raises(ValueError, match="a window has at least one token, not 0"):
        text_attention(device, q, kv, kv, starts, q, 16, shape, window=0)
    with pytest.raises(ValueError, match="head sizes that are multiples of 4, not 6"):
        text_attention(device, q, kv, kv, starts, q, 16, HeadShape(4, 2, 6))
    with pytest.raises(ValueError, match="text_attention: 3 heads cannot share 2"):
        text_attention(device, q, kv, kv, starts, q, 16, HeadShape(3, 2, 64))
