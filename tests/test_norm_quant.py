"""RMSNorm and quantisation of rows.

Contract: q, s and the sum equal, bit for bit, those of the definition with the mean of squares rounded once from
float64
(whatever the block size). The reference takes that mean in float32: it may differ by K units of 2^-24 at most,
usually by one, so that s is within K * 2^-24 of the reference's, and a q differs by at most 1. silu's exponential may
differ from NumPy's in its last bit, which moves values by 2^-22: there q may differ by 1, where n * s is that close
to a tie.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.forms import KernelForm
from bitnet_numba.kernels.norm_quant import norm_quant_form
from bitnet_numba.quantize import quantize_activations
from bitnet_numba.reference.model import relu2, rms_norm, silu
from tests.kernel_harness import Out, arch, assert_close, needs_gpu, run, run_simulated

ONE = np.float32(1)


def check_norm_quant(
    form: KernelForm, tokens: int, K: int, activation: str, norm: bool, seed: int, scale: float
) -> None:
    """Compares one launch with the definition and with the reference."""
    rng = np.random.default_rng(seed)
    gated, padded = activation != "none", -(-K // 32) * 32
    x = (rng.standard_normal((tokens, 2 * K if gated else K)) * scale).astype(np.float32)
    x[0] *= rng.integers(0, 2)  # sometimes a row of zeros
    weight = rng.uniform(-2, 2, K).astype(np.float32)
    eps = np.float32(rng.choice([1e-5, 1e-6]))
    q, s, total = Out(tokens * padded, np.int8), Out(tokens, np.float32), Out(tokens, np.int32)
    run(form, tokens, [x, x.shape[1], K, weight, eps, q, s, total])

    v = x
    if gated:
        v = (relu2 if activation == "relu2" else silu)(x[:, :K]) * x[:, K:]
    n = v
    if norm:
        mean = np.mean((v * v).astype(np.float64), axis=-1, keepdims=True).astype(np.float32)
        n = weight * (v * (ONE / np.sqrt(mean + eps)))
    expected_q, expected_s = quantize_activations(n)
    rows = q.array.reshape(tokens, padded)
    assert not rows[:, K:].any(), "the padding is not zero"
    assert np.array_equal(total.array, rows.astype(np.int32).sum(axis=1))
    if activation == "silu":
        assert_close(s.array, expected_s[:, 0], 2.0**-20 * expected_s[:, 0], "s")
        near_tie = np.abs(np.abs(n * expected_s % 1) - 0.5) < 127 * 2.0**-20
        assert_close(rows[:, :K], expected_q, near_tie.astype(np.float64), "q")
    else:
        assert s.array.tobytes() == expected_s.tobytes()
        assert np.array_equal(rows[:, :K], expected_q)
    if norm:
        reference_q, reference_s = quantize_activations(rms_norm(v, weight, float(eps)))
        assert_close(s.array, reference_s[:, 0], (K + 8) * 2.0**-24 * reference_s[:, 0], "s against the reference")
        assert_close(rows[:, :K], reference_q, 1, "q against the reference")


shapes = {
    "activation": st.sampled_from(["none", "relu2", "silu"]),
    "norm": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "scale": st.sampled_from([1e-9, 0.01, 1.0, 300.0]),
}


@settings(max_examples=12)
@given(tokens=st.integers(1, 2), K=st.integers(1, 200), threads=st.sampled_from([32, 64]), **shapes)
def simulate_norm_quant(
    tokens: int, K: int, threads: int, activation: str, norm: bool, seed: int, scale: float
) -> None:
    form = norm_quant_form(arch(), K, activation, norm, threads)
    check_norm_quant(form, tokens, K, activation, norm, seed, scale)


def test_simulated() -> None:
    run_simulated(__file__)


@needs_gpu
@settings(max_examples=20)
@given(tokens=st.integers(1, 64), K=st.sampled_from([1, 31, 100, 2560, 6912, 14336, 27648]), **shapes)
def test_norm_quant_on_gpu(tokens: int, K: int, activation: str, norm: bool, seed: int, scale: float) -> None:
    check_norm_quant(norm_quant_form(arch(), K, activation, norm), tokens, K, activation, norm, seed, scale)


@pytest.mark.parametrize("K", [0, 27649])
def test_refuses_row_sizes(K: int) -> None:
    with pytest.raises(ValueError, match=f"columns, not {K}"):
        norm_quant_form(90, K)


def test_refuses_unknown_activation() -> None:
    with pytest.raises(ValueError, match="none, relu2, silu, not 'gelu'"):
        norm_quant_form(90, 64, "gelu")
