"""The GEMV, in all its variants, by its launcher.

Contract: int32 sums are exact. Given int8 input, or a float32 input without a norm, so is everything after them: the
scale, bias, residual and relu2 are single float32 operations in the reference's own order.

Tolerance, where there is a norm: 1 / rms comes from an approximation and a sum in another order, and the absmax is
multiplied by it: relative error at most 2^-20 altogether. A q whose unrounded value lies within 127 * 2^-20 of a half
may round the other way, which moves a row's sum by at most 1 for each such column; all else stays within 2^-19 of the
row's largest sum of magnitudes. silu adds the exponential's 2 ulp.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear import gemv as gemv_module
from bitnet_numba.kernels.linear.gemv import BLOCK_MAX_WARPS, Plan, gemv, plan
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations
from bitnet_numba.kernels.linear.quantize import quantize_spec
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import CARVEOUT_BYTES, RESERVED_BYTES
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, pack_ternary
from bitnet_numba.quantize import quantize_activations
from bitnet_numba.reference.model import relu2, rms_norm, silu
from tests.kernels.harness import HarnessDevice, Out, arch, assert_close, needs_gpu, run, simulated

EPS = np.float32(1e-5)
SHAPES = [  # N, K, gated: the published table's, two large ones, and those of other models
    (2560, 2560, False),
    (3840, 2560, False),
    (13824, 2560, True),
    (2560, 6912, False),
    (3200, 3200, False),
    (4800, 3200, False),
    (3200, 10240, False),
    (20480, 3200, False),
    (5120, 27648, False),
    (55296, 5120, True),
    (17280, 3200, True),
    (28672, 4096, True),
    (4096, 14336, False),
    (1152, 384, False),
    (16, 32, False),
    (33, 31, False),
]


def padded(a: np.ndarray) -> np.ndarray:
    """A vector with zeros at its end, to whole blocks of columns."""
    return np.concatenate([a, np.zeros(-len(a) % BLOCK_COLS, a.dtype)])


def int8_sums(w: np.ndarray, q: np.ndarray, num_sms: int) -> np.ndarray:
    """w @ q by the GEMV: int32 [N] from ternary int8 [N, K] and int8 [K]."""
    device, (N, K) = HarnessDevice(num_sms), w.shape
    out = Out(N, np.int32)
    linear = PackedLinear(device.operand(pack_ternary(w)), device.operand(np.ones(1, np.float32)), (N,), K)
    q_sum, scale = np.array([q.sum(dtype=np.int32)], np.int32), np.ones(1, np.float32)
    x = QuantizedActivations(*(device.operand(array) for array in (padded(q), scale, q_sum)))
    gemv(device, linear, x, device.operand(out), epilogue="acc")
    device.run()
    return out.array


def check_gemv(
    segments: Sequence[int], K: int, num_sms: int, prologue: str, epilogue: str, activation: str, bias: bool, seed: int
) -> None:
    """One product of random ternary weights, in segments of odd scales, against the reference."""
    rng = np.random.default_rng(seed)
    N, gated = sum(segments), epilogue == "gated"
    w = rng.integers(-1, 2, (N, K)).astype(np.int8)
    x = (rng.standard_normal(K) * 10.0 ** rng.uniform(-6, 6)).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    scales = np.array([0.0137, 1.71, 0.29], np.float32)[: len(segments)]
    m = np.repeat(scales, segments)
    b = rng.standard_normal(N).astype(np.float32) if bias else None

    normed = x
    if prologue == "norm":
        normed = rms_norm(x, norm, float(EPS))
    elif prologue == "exact norm":
        mean = np.mean((x * x).astype(np.float64)).astype(np.float32)
        normed = norm * (x * (np.float32(1) / np.sqrt(mean + EPS)))
    q, s = quantize_activations(normed)
    acc = (w.astype(np.int64) @ q.astype(np.int64)).astype(np.int32)
    y = acc.astype(np.float32) * m / s
    error = np.zeros(N)
    if prologue == "norm":
        unrounded = np.abs(normed.astype(np.float64) * np.float64(s[0]))
        near_half = np.abs(unrounded % 1 - 0.5) < 127 * 2.0**-20
        magnitude = np.abs(w).astype(np.float64)
        error = (magnitude[:, near_half].sum(axis=1) + 2.0**-19 * (magnitude @ np.abs(q.astype(np.float64)))) * m / s[0]
    if b is not None:
        y = y + b
        error = error + (2.0**-23 * np.abs(y) if prologue == "norm" else 0)
    rows = N // 2 if gated else N
    old = rng.standard_normal(rows).astype(np.float32)
    expected, bound = y, error
    if gated:
        gate, up = y[:rows], y[rows:]
        activate = relu2 if activation == "relu2" else silu
        expected = activate(gate) * up
        # |d act| <= (2 |g| + dg) dg for relu2, 1.1 dg for silu; the exponential adds 2 ulp, each operation half of one.
        dg, du = error[:rows], error[rows:]
        slope = (2 * np.abs(gate) + dg) * dg if activation == "relu2" else 1.1 * dg + 2.0**-21 * np.abs(gate)
        bound = slope * (np.abs(up) + du) + np.abs(activate(gate)) * du
        if prologue == "norm" or activation == "silu":
            bound = bound + 2.0**-22 * np.abs(expected)
    if epilogue == "residual":
        expected = old + y
        bound = bound + (2.0**-23 * np.abs(expected) if prologue == "norm" else 0)

    device = HarnessDevice(num_sms)
    linear = PackedLinear(
        device.operand(pack_ternary(w)), device.operand(scales), tuple(segments), K, device.operand(b)
    )
    given: Any = device.operand(padded(x))
    if prologue == "int8":
        q_sum = np.array([q.sum(dtype=np.int32)], np.int32)
        given = QuantizedActivations(device.operand(padded(q)), device.operand(s), device.operand(q_sum))
    out = Out(rows, np.int32) if epilogue == "acc" else Out(rows, np.float32, old if epilogue == "residual" else None)
    given_norm = Norm(device.operand(padded(norm)), float(EPS)) if prologue.endswith("norm") else None
    gemv(
        device, linear, given, device.operand(out), norm=given_norm, epilogue=epilogue, activation=activation,
        exact=prologue == "exact norm",
    )  # fmt: skip
    name = device.run()
    if epilogue == "acc":
        assert np.array_equal(out.array, acc), f"{name}: {np.flatnonzero(out.array != acc)[:5]} differ"
    else:
        assert_close(out.array, expected, bound, name)


KINDS = st.sampled_from(
    [
        ("int8", "acc", "relu2"),
        ("int8", "store", "relu2"),
        ("quantize", "residual", "relu2"),
        ("norm", "store", "relu2"),
        ("norm", "residual", "relu2"),
        ("quantize", "gated", "relu2"),
        ("norm", "gated", "relu2"),
        ("norm", "gated", "silu"),
        ("exact norm", "store", "relu2"),
        ("exact norm", "residual", "relu2"),
        ("exact norm", "gated", "relu2"),
        ("exact norm", "gated", "silu"),
    ]
)


def segments_of(N: int, gated: bool) -> tuple[int, ...]:
    """About N rows: gate and up rows of whole blocks, or one to three segments with ends inside blocks."""
    if gated:
        half = -(-N // (2 * BLOCK_ROWS)) * BLOCK_ROWS
        return half, half
    return (N // 3, 5, N - N // 3 - 5) if N > 18 else (N - 1, 1) if N > 9 else (N,)


@simulated
@settings(max_examples=10)
@example(N=40, K=290, kind=("int8", "acc", "relu2"), bias=False, units=1, parts=3, grid=1, seed=1)
@given(
    N=st.integers(1, 70),
    K=st.integers(1, 300),
    kind=KINDS,
    bias=st.booleans(),
    units=st.integers(1, 2),
    parts=st.integers(1, 2),
    grid=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_gemv(
    N: int, K: int, kind: tuple[str, str, str], bias: bool, units: int, parts: int, grid: int, seed: int
) -> None:
    gated = kind[1] == "gated"
    segments = segments_of(2 * N if gated else N, gated)
    rows = segments[0] if gated else sum(segments)
    rounds = (rows - 1) // (BLOCK_ROWS * units * grid) + 1
    with pytest.MonkeyPatch.context() as patch:  # few warps, so that the simulator is done soon
        patch.setattr(gemv_module, "plan", lambda *_: Plan(units, parts, rounds, grid))
        check_gemv(segments, K, 1, *kind, bias, seed)


@simulated
@pytest.mark.parametrize(("with_norm", "exact"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_simulated_numbers_that_are_not_finite(
    monkeypatch: pytest.MonkeyPatch, with_norm: bool, exact: bool, value: float
) -> None:
    """One in a vector makes every output NaN."""
    K = 70
    monkeypatch.setattr(gemv_module, "plan", lambda *_: Plan(1, 1, 1, 1))
    device = HarnessDevice(1)
    x = padded(np.ones(K, np.float32))
    x[33] = value
    out = Out(16, np.float32)
    words, scales = pack_ternary(np.ones((16, K), np.int8)), np.ones(1, np.float32)
    linear = PackedLinear(device.operand(words), device.operand(scales), (16,), K)
    norm = Norm(device.operand(np.ones(96, np.float32)), float(EPS))
    gemv(device, linear, device.operand(x), device.operand(out), norm=norm if with_norm else None, exact=exact)
    device.run(repeat=1)
    assert np.isnan(out.array).all()


@simulated
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-19, 1e-10, 1e18, 1.5e19, 1e20, 1e38])
def test_simulated_exact_norm_is_that_of_quantize(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where squares are no normal float32 or their sum is none: both then have the reference's zeros."""
    K, rng, eps = 72, np.random.default_rng(4), 1e-12
    monkeypatch.setattr(gemv_module, "plan", lambda *_: Plan(1, 3, 1, 1))
    w, x = rng.integers(-1, 2, (16, K)).astype(np.int8), (size * rng.uniform(0.8, 1, K)).astype(np.float32)
    weight, ones = rng.standard_normal(K).astype(np.float32), np.ones(1, np.float32)
    device, out = HarnessDevice(1), Out(16, np.float32)
    linear = PackedLinear(device.operand(pack_ternary(w)), device.operand(ones), (16,), K)
    norm = Norm(device.operand(padded(weight)), eps)
    gemv(device, linear, device.operand(padded(x)), device.operand(out), norm=norm, exact=True)
    device.run(repeat=1)
    q, s, q_sum = Out(len(padded(x)) // 4, np.int32), Out(1, np.float32), Out(1, np.int32)
    run(quantize_spec(arch(), K, True, 32), 1, [x, weight, np.float32(eps), q, s, q_sum], 1)
    sums = w.astype(np.int32) @ q.array.view(np.int8)[:K].astype(np.int32)
    assert np.array_equal(out.array, sums.astype(np.float32) / s.array)
    with np.errstate(over="ignore"):
        assert np.abs(q.array.view(np.int8)[:K] - quantize_activations(rms_norm(x, weight, eps))[0]).max() <= 1


@simulated
@pytest.mark.parametrize("size", [0.0, 1e-30, 2e-9, 4e-6, 1e-5])
@pytest.mark.parametrize("exact", [False, True])
def test_simulated_tiny_after_the_norm(size: float, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the largest normed element is below 1e-5, q is what the reference says: smaller numbers, not 127."""
    K, rng = 70, np.random.default_rng(1)
    monkeypatch.setattr(gemv_module, "plan", lambda *_: Plan(1, 2, 1, 1))
    w, x = rng.integers(-1, 2, (16, K)).astype(np.int8), rng.standard_normal(K).astype(np.float32)
    norm = (size * rng.uniform(0.5, 1, K)).astype(np.float32)
    normed = rms_norm(x, norm, float(EPS))
    q, s = quantize_activations(normed)
    assert (np.abs(normed).max() < 1e-5) == (np.abs(q).max() < 127)
    # No q lies so near to a half that rounding could move it (see the module's tolerance).
    assert (np.abs(np.abs(normed.astype(np.float64) * np.float64(s[0])) % 1 - 0.5) > 127 * 2.0**-20).all()
    device, out, scales = HarnessDevice(1), Out(16, np.float32), np.ones(1, np.float32)
    linear = PackedLinear(device.operand(pack_ternary(w)), device.operand(scales), (16,), K)
    given_norm = Norm(device.operand(padded(norm)), float(EPS))
    gemv(device, linear, device.operand(padded(x)), device.operand(out), norm=given_norm, exact=exact)
    device.run(repeat=1)
    sums = w.astype(np.int32) @ q.astype(np.int32)
    assert_close(out.array, sums.astype(np.float32) / s, 2.0**-20 * np.abs(sums) / s, f"norms of {size}")


@pytest.mark.parametrize("num_sms", [1, 46, 132])
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_plan_covers_every_row_once(N: int, K: int, gated: bool, num_sms: int) -> None:
    halves = 2 if gated else 1
    split = plan(N, K, num_sms, gated)
    units = -(-N // (BLOCK_ROWS * halves))
    done = [
        block + (round_ * split.units + slot) * split.grid
        for round_ in range(split.rounds)
        for slot in range(split.units)
        for block in range(split.grid)
    ]
    assert sorted(unit for unit in done if unit < units) == list(range(units))
    assert split.units * halves * split.parts <= BLOCK_MAX_WARPS
    assert split.grid <= num_sms


def test_plan_refuses_what_a_block_cannot_hold() -> None:
    with pytest.raises(ValueError, match="200000 columns are more than the 114688"):
        plan(16, 200000, 132)


def operands(device: DryRunDevice, N: int = 64, K: int = 100) -> tuple[PackedLinear, QuantizedActivations, DeviceArray]:
    """Weights, activations and an output that fit together."""
    words = device.empty(pack_ternary(np.zeros((N, K), np.int8)).size, np.int32)
    linear = PackedLinear(words, device.empty(1, np.float32), (N,), K)
    return linear, QuantizedActivations.empty(device, 1, K), device.empty(N, np.float32)


def test_launcher_chooses_the_variant() -> None:
    device = DryRunDevice(90, 132)
    linear, q, out = operands(device)
    norm, x = Norm(device.empty(128, np.float32), 1e-5), device.empty(128, np.float32)
    assert gemv(device, linear, q, out).name.startswith("gemv[100 int8 store ")
    assert gemv(device, linear, q, device.empty(64, np.int32), epilogue="acc").name.startswith("gemv[100 int8 acc ")
    assert gemv(device, linear, x, out, epilogue="residual").name.startswith("gemv[100 quantize residual ")
    assert gemv(device, linear, x, out, norm=norm).name.startswith("gemv[100 norm store ")
    gate_up = PackedLinear(linear.words, device.empty(2, np.float32), (32, 32), 100, device.empty(64, np.float32))
    launch = gemv(device, gate_up, x, out, norm=norm, epilogue="gated", activation="silu")
    assert launch.name.startswith("gemv[100 norm gated silu bias ")
    assert len({spec.name for spec in device.specs}) == 5
    assert not gemv(device, linear, x, out).spec.one_per_sm
    spread = gemv(device, linear, x, out, spread=True).spec
    assert spread.one_per_sm and 2 * spread.dynamic_shared > CARVEOUT_BYTES - 2 * RESERVED_BYTES


def test_launcher_refuses_what_does_not_fit() -> None:
    device = DryRunDevice(90, 132)
    linear, q, out = operands(device)
    x = device.empty(128, np.float32)
    with pytest.raises(ValueError, match=r"^gemv: words holds \d+ elements, a 80 x 100 product takes"):
        gemv(device, PackedLinear(linear.words, linear.scales, (80,), 100), q, device.empty(80, np.float32))
    with pytest.raises(ValueError, match="^gemv: x holds 100 elements, a 64 x 100 product takes 128$"):
        gemv(device, linear, device.empty(100, np.float32), out)
    with pytest.raises(ValueError, match="^gemv: norm holds 100 elements, a 64 x 100 product takes 128$"):
        gemv(device, linear, x, out, norm=Norm(device.empty(100, np.float32), 1e-5))
    with pytest.raises(ValueError, match="^gemv: out must be int32, not float32$"):
        gemv(device, linear, q, out, epilogue="acc")
    with pytest.raises(ValueError, match="^gemv: x must be float32, not int8$"):
        gemv(device, linear, q.q, out)
    with pytest.raises(ValueError, match="^gemv: no epilogue 'add'"):
        gemv(device, linear, q, out, epilogue="add")
    with pytest.raises(ValueError, match="^gemv: the norm comes before quantisation"):
        gemv(device, linear, q, out, norm=Norm(x, 1e-5))
    with pytest.raises(ValueError, match=r"^gemv: rows come in 1 to 3 segments"):
        gemv(device, PackedLinear(linear.words, linear.scales, (16,) * 4, 100), q, out)
    with pytest.raises(ValueError, match=r"^gemv: \(60, 4\)"):
        gemv(device, PackedLinear(linear.words, linear.scales, (60, 4), 100), q, out, epilogue="gated")


@needs_gpu
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_full_size_on_gpu(N: int, K: int, gated: bool) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device

    check_gemv(
        segments_of(N, gated), K, usable_device().num_sms, "int8", "gated" if gated else "acc", "relu2", False, 1
    )


@needs_gpu
@settings(max_examples=25)
@given(
    N=st.integers(1, 6000),
    K=st.integers(1, 5000),
    kind=KINDS,
    bias=st.booleans(),
    num_sms=st.sampled_from([1, 7, 132]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_on_gpu(N: int, K: int, kind: tuple[str, str, str], bias: bool, num_sms: int, seed: int) -> None:
    check_gemv(segments_of(N, kind[1] == "gated"), K, num_sms, *kind, bias, seed)


@needs_gpu
def test_single_call_on_gpu() -> None:
    """The prepared launch, on arrays of the device: right, and under 10 us of host time a call."""
    from time import perf_counter

    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream

    device, stream, rng = usable_device(), Stream(), np.random.default_rng(3)
    segments, K = (2560, 640, 640), 2560
    w = rng.integers(-1, 2, (sum(segments), K)).astype(np.int8)
    q, s = quantize_activations(rng.standard_normal(K).astype(np.float32))
    scales = np.array([0.7, 0.011, 3.3], np.float32)
    linear = PackedLinear(device.array(pack_ternary(w)), device.array(scales), segments, K)
    x = QuantizedActivations(
        device.array(q), device.array(s), device.array(np.array([q.sum(dtype=np.int32)], np.int32))
    )
    out = device.empty(sum(segments), np.float32)
    launch = gemv(device, linear, x, out)
    launch(stream.handle)
    stream.synchronize()
    m = np.repeat(scales, segments)
    assert np.array_equal(out.read(), (w.astype(np.int32) @ q.astype(np.int32)).astype(np.float32) * m / s)
    times = []
    for _ in range(20):
        start = perf_counter()
        for _ in range(100):
            launch(stream.handle)
        times.append((perf_counter() - start) / 100)
        stream.synchronize()
    assert np.median(times) < 10e-6
