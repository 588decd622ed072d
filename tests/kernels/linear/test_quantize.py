"""RMSNorm and quantisation of rows.

Contract: q, s and the sum equal, bit for bit, those of the definition with the mean of squares rounded once from
float64 (whatever the number of threads). The reference takes that mean in float32: it may differ by K units of 2^-24 at
most, usually by one, so that s is within K * 2^-24 of the reference's, and a q differs by at most 1.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear.operands import QuantizedActivations
from bitnet_numba.kernels.linear.quantize import quantize, quantize_spec
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.quantize import quantize_activations
from bitnet_numba.reference.model import rms_norm
from tests.kernels.harness import HarnessDevice, Out, arch, assert_close, needs_gpu, run, simulated

ONE = np.float32(1)


def check_quantize(spec: KernelSpec, tokens: int, K: int, norm: bool, seed: int, scale: float) -> None:
    """Compares one launch with the definition and with the reference."""
    rng = np.random.default_rng(seed)
    padded, wide = -(-K // 32) * 32, K % 4 == 0
    x = (rng.standard_normal((tokens, K)) * scale).astype(np.float32)
    x[0] *= rng.integers(0, 2)  # sometimes a row of zeros
    weight = rng.uniform(-2, 2, K).astype(np.float32)
    eps = np.float32(rng.choice([1e-5, 1e-6]))
    q = Out(tokens * padded // 4, np.int32) if wide else Out(tokens * padded, np.int8)
    s, q_sum = Out(tokens, np.float32), Out(tokens, np.int32)
    run(spec, tokens, [x, weight, eps, q, s, q_sum])

    n = x
    if norm:
        mean = np.mean((x * x).astype(np.float64), axis=-1, keepdims=True).astype(np.float32)
        n = weight * (x * (ONE / np.sqrt(mean + eps)))
    expected_q, expected_s = quantize_activations(n)
    rows = q.array.view(np.int8).reshape(tokens, padded)
    assert not rows[:, K:].any(), "the padding is not zero"
    assert np.array_equal(q_sum.array, rows.astype(np.int32).sum(axis=1))
    assert s.array.tobytes() == expected_s.tobytes()
    assert np.array_equal(rows[:, :K], expected_q)
    if norm:
        reference_q, reference_s = quantize_activations(rms_norm(x, weight, float(eps)))
        assert_close(s.array, reference_s[:, 0], (K + 8) * 2.0**-24 * reference_s[:, 0], "s against the reference")
        assert_close(rows[:, :K], reference_q, 1, "q against the reference")


def check_nan(spec: KernelSpec, K: int, seed: int) -> None:
    """A row that holds NaN gets s = NaN; the rows beside it get what they get without."""
    rng = np.random.default_rng(seed)
    padded, wide = -(-K // 32) * 32, K % 4 == 0
    x, weight = rng.standard_normal((3, K)).astype(np.float32), rng.uniform(0.5, 2, K).astype(np.float32)
    at = int(rng.integers(K))
    results = []
    for value in (x[1, at], np.float32(np.nan), -np.float32(np.nan)):
        x[1, at] = value
        q = Out(3 * padded // 4, np.int32) if wide else Out(3 * padded, np.int8)
        s, q_sum = Out(3, np.float32), Out(3, np.int32)
        run(spec, 3, [x, weight, np.float32(1e-5), q, s, q_sum], 1)
        results.append([out.array.view(np.uint8).reshape(3, -1).copy() for out in (q, s, q_sum)])
        assert np.isnan(s.array).tolist() == [False, bool(np.isnan(value)), False]
    for result in results[1:]:
        for without, array in zip(results[0], result, strict=True):
            assert np.array_equal(array[::2], without[::2]), "a row with NaN changed another"


shapes = {
    "norm": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "scale": st.sampled_from([1e-9, 0.01, 1.0, 300.0]),
}


@simulated
@settings(max_examples=12)
@given(tokens=st.integers(1, 2), K=st.integers(1, 200), threads=st.sampled_from([32, 64]), **shapes)
def test_simulated_quantize(tokens: int, K: int, threads: int, norm: bool, seed: int, scale: float) -> None:
    check_quantize(quantize_spec(arch(), K, norm, threads), tokens, K, norm, seed, scale)


@simulated
@settings(max_examples=6)
@given(K=st.integers(1, 200), norm=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_simulated_nan(K: int, norm: bool, seed: int) -> None:
    check_nan(quantize_spec(arch(), K, norm, 64), K, seed)


@needs_gpu
@settings(max_examples=20)
@given(tokens=st.integers(1, 64), K=st.sampled_from([1, 31, 100, 2560, 6912, 14336, 27648]), **shapes)
def test_quantize_on_gpu(tokens: int, K: int, norm: bool, seed: int, scale: float) -> None:
    check_quantize(quantize_spec(arch(), K, norm), tokens, K, norm, seed, scale)


@needs_gpu
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("K", [101, 2560, 6912, 27648])
def test_nan_on_gpu(K: int, norm: bool) -> None:
    check_nan(quantize_spec(arch(), K, norm), K, K)


@pytest.mark.parametrize("K", [0, 28673])
def test_refuses_row_sizes(K: int) -> None:
    with pytest.raises(ValueError, match=f"columns, not {K}"):
        quantize_spec(90, K)


def test_blocks_of_32_rows_go_to_an_sm_each() -> None:
    for arch_, tokens, spread in ((90, 16, False), (90, 32, True), (90, 64, False), (100, 32, False)):
        device = DryRunDevice(arch_, 132)
        x, out = device.empty(tokens * 256, np.float32), QuantizedActivations.empty(device, tokens, 256)
        assert quantize(device, x, out, tokens, 256).spec.one_per_sm == spread


def test_launcher_refuses_what_does_not_fit() -> None:
    device = DryRunDevice(90, 132)
    x, out = device.empty(3 * 2560, np.float32), QuantizedActivations.empty(device, 3, 2560)
    norm = Norm(device.empty(2560, np.float32), 1e-5)
    launch = quantize(device, x, out, 3, 2560, norm=norm)
    assert launch.spec.name == quantize_spec(90, 2560, True).name and device.specs == [launch.spec]
    with pytest.raises(ValueError, match="quantize: q holds 7680 elements, 4 rows of 2560 columns takes 10240"):
        quantize(device, x, out, 4, 2560)
    with pytest.raises(ValueError, match="quantize: x holds 7680 elements"):
        quantize(device, x, QuantizedActivations.empty(device, 4, 2560), 4, 2560)
    with pytest.raises(ValueError, match="quantize: norm must be float32, not int8"):
        quantize(device, x, out, 3, 2560, norm=Norm(out.q, 1e-5))
    with pytest.raises(ValueError, match="at least one is needed"):
        quantize(device, x, out, 0, 2560)
    with pytest.raises(ValueError, match="columns, not 28673"):
        quantize(device, x, out, 1, 28673)


@pytest.mark.parametrize("name", ["q", "scale", "q_sum", "x", "norm"])
def test_launcher_refuses_each_operand(name: str) -> None:
    """One element too few, and a dtype that the kernel does not take."""
    device = DryRunDevice(90, 132)
    out = QuantizedActivations.empty(device, 3, 2560)
    arrays = {**vars(out), "x": device.empty(3 * 2560, np.float32), "norm": device.empty(2560, np.float32)}
    size, dtype = arrays[name].size, arrays[name].dtype
    for array, problem in (
        (device.empty(size - 1, dtype), f"holds {size - 1} elements"),
        (device.empty(size, np.float64), "must be .*, not float64"),
    ):
        given = {**arrays, name: array}
        changed = QuantizedActivations(given["q"], given["scale"], given["q_sum"])
        with pytest.raises(ValueError, match=f"quantize: {name} {problem}"):
            quantize(device, given["x"], changed, 3, 2560, norm=Norm(given["norm"], 1e-5))


@simulated
@pytest.mark.parametrize("norm", [False, True])
def test_simulated_launch(norm: bool) -> None:
    """The arguments that the launcher makes."""
    rng, device, K = np.random.default_rng(100), HarnessDevice(2), 100
    x, weight = rng.standard_normal((2, K)).astype(np.float32), rng.uniform(0.5, 2, K).astype(np.float32)
    padded = -(-K // 32) * 32
    q, s, q_sum = Out(2 * padded // 4, np.int32), Out(2, np.float32), Out(2, np.int32)  # q in words of four
    q_view = device.operand(q)
    q_view.size, q_view.dtype = 2 * padded, np.dtype(np.int8)
    out = QuantizedActivations(q_view, device.operand(s), device.operand(q_sum))
    quantize(device, device.operand(x), out, 2, K, norm=Norm(device.operand(weight), 1e-5) if norm else None)
    device.run(1)
    n = x
    if norm:
        mean = np.mean((x * x).astype(np.float64), axis=-1, keepdims=True).astype(np.float32)
        n = weight * (x * (ONE / np.sqrt(mean + np.float32(1e-5))))
    expected_q, expected_s = quantize_activations(n)
    rows = q.array.view(np.int8).reshape(2, padded)
    assert np.array_equal(rows[:, :K], expected_q) and not rows[:, K:].any()
    assert s.array.tobytes() == expected_s.tobytes()
    assert np.array_equal(q_sum.array, expected_q.sum(axis=1, dtype=np.int32))
