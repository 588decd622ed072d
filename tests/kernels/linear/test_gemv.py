"""The W2A8 matrix-vector product, in all its forms.

Contract: int32 sums are exact. Given int8 input, or a float32 input without a norm, so is everything after them: the
scale, bias, residual and relu2 are single float32 operations in the reference's own order.

Tolerance, where there is a norm: 1 / rms comes from an approximation and a sum in another order, and the absmax is
multiplied by it: relative error at most 2^-20 altogether. A q whose unrounded value lies within 127 * 2^-20 of a half
may round the other way, which moves a row's sum by at most 1 for each such column; all else stays within 2^-19 of the
row's largest sum of magnitudes. silu adds the exponential's 2 ulp.
"""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear.gemv import BLOCK_MAX_WARPS, Plan, plan, spec, w2a8_gemv
from bitnet_numba.packing import BLOCK_ROWS, pack_ternary
from bitnet_numba.quantize import quantize_activations
from bitnet_numba.reference.model import relu2, rms_norm, silu
from tests.kernels.harness import Out, arch, assert_close, needs_gpu, run, simulated

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


def check_gemv(
    N: int, K: int, split: Plan, prologue: str, epilogue: str, activation: str, bias: bool, seed: int
) -> None:
    """One product of random ternary weights, N rows in three segments of odd scales, against the reference."""
    rng = np.random.default_rng(seed)
    gated = epilogue == "gated"
    padded_K = -(-K // 32) * 32
    w = rng.integers(-1, 2, (N, K)).astype(np.int8)
    x = (rng.standard_normal(K) * 10.0 ** rng.uniform(-6, 6)).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    bounds = (N // 2, N) if gated else (N // 3, N // 3 + 5)
    scales = np.array([0.0137, 1.71, 0.29], np.float32)
    m = scales[np.searchsorted(bounds, np.arange(N), side="right")]
    b = rng.standard_normal(N).astype(np.float32) if bias else None

    normed = rms_norm(x, norm, float(EPS)) if prologue == "norm" else x
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

    def pad(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a, np.zeros(padded_K - K, a.dtype)])

    if prologue == "int8":
        given_x, given_norm = pad(q).view(np.int32), np.array([s[0], q.astype(np.int64).sum()], np.float32)
    else:
        given_x, given_norm = pad(x), pad(norm)
    out = Out(rows, np.int32) if epilogue == "acc" else Out(rows, np.float32, old if epilogue == "residual" else None)
    kernel = spec(arch(), K, split, prologue, epilogue, activation, bias)
    blocks = -(-rows // BLOCK_ROWS)
    arguments = [
        pack_ternary(w),
        given_x,
        given_norm,
        EPS,
        scales,
        b,
        out,
        rows,
        blocks,
        blocks if gated else 0,
        *bounds,
    ]
    run(kernel, split.grid, arguments)
    if epilogue == "acc":
        assert np.array_equal(out.array, acc), f"{kernel.name}: {np.flatnonzero(out.array != acc)[:5]} differ"
    else:
        assert_close(out.array, expected, bound, kernel.name)


FORMS = st.sampled_from(
    [
        ("int8", "acc", "relu2"),
        ("int8", "store", "relu2"),
        ("quantize", "residual", "relu2"),
        ("norm", "store", "relu2"),
        ("norm", "residual", "relu2"),
        ("quantize", "gated", "relu2"),
        ("norm", "gated", "relu2"),
        ("norm", "gated", "silu"),
    ]
)


@simulated
@settings(max_examples=10)
@example(N=40, K=290, kind=("int8", "acc", "relu2"), bias=False, units=1, parts=3, grid=1, seed=1)
@given(
    N=st.integers(1, 70),
    K=st.integers(1, 300),
    kind=FORMS,
    bias=st.booleans(),
    units=st.integers(1, 2),
    parts=st.integers(1, 2),
    grid=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_gemv(
    N: int, K: int, kind: tuple[str, str, str], bias: bool, units: int, parts: int, grid: int, seed: int
) -> None:
    rows = N
    if kind[1] == "gated":
        rows = -(-N // 16) * 16
        N = 2 * rows
    rounds = (rows - 1) // (BLOCK_ROWS * units * grid) + 1
    check_gemv(N, K, Plan(units, parts, rounds, grid), *kind, bias, seed)


@simulated
def test_simulated_nan() -> None:
    """NaN in a vector that is normed makes every output NaN."""
    K = 70
    kernel = spec(arch(), K, Plan(1, 1, 1, 1), "norm", "store")
    x, norm = np.zeros(96, np.float32), np.ones(96, np.float32)
    x[:K] = 1
    x[33] = np.nan
    out = Out(16, np.float32)
    words = pack_ternary(np.ones((16, K), np.int8))
    run(kernel, 1, [words, x, norm, EPS, np.ones(3, np.float32), None, out, 16, 1, 0, 16, 16], repeat=1)
    assert np.isnan(out.array).all()


@pytest.mark.parametrize("num_sms", [1, 46, 132])
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_plan_covers_every_row_once(N: int, K: int, gated: bool, num_sms: int) -> None:
    halves = 2 if gated else 1
    split = plan(N, K, num_sms, gated)
    units = -(-N // (BLOCK_ROWS * halves))
    done = [
        block + (turn * split.units + slot) * split.grid
        for turn in range(split.rounds)
        for slot in range(split.units)
        for block in range(split.grid)
    ]
    assert sorted(unit for unit in done if unit < units) == list(range(units))
    assert split.units * halves * split.parts <= BLOCK_MAX_WARPS
    assert split.grid <= num_sms


def test_plan_refuses_what_a_block_cannot_hold() -> None:
    with pytest.raises(ValueError, match="200000 columns are more than the 114688"):
        plan(16, 200000, 132)


@needs_gpu
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_full_size_on_gpu(N: int, K: int, gated: bool) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device

    split = plan(N, K, usable_device().num_sms, gated)
    check_gemv(N, K, split, "int8", "gated" if gated else "acc", "relu2", False, 1)


@needs_gpu
@settings(max_examples=25)
@given(
    N=st.integers(1, 6000),
    K=st.integers(1, 5000),
    kind=FORMS,
    bias=st.booleans(),
    num_sms=st.sampled_from([1, 7, 132]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_on_gpu(N: int, K: int, kind: tuple[str, str, str], bias: bool, num_sms: int, seed: int) -> None:
    gated = kind[1] == "gated"
    if gated:
        N = -(-N // 32) * 32
    check_gemv(N, K, plan(N, K, num_sms, gated), *kind, bias, seed)


@needs_gpu
def test_single_call_on_gpu() -> None:
    """The prepared launch: right, under 10 us of host time a call, and refusing what does not fit."""
    from time import perf_counter

    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream
    from bitnet_numba.kernels.runtime.memory import DeviceArray

    device, stream, rng = usable_device(), Stream(), np.random.default_rng(3)
    N, K = 3840, 2560
    w = rng.integers(-1, 2, (N, K)).astype(np.int8)
    q, s = quantize_activations(rng.standard_normal(K).astype(np.float32))
    scales = np.array([0.7, 0.011, 3.3], np.float32)
    words, given_q = DeviceArray.of(pack_ternary(w)), DeviceArray.of(q)
    quantization = DeviceArray.of(np.array([s[0], q.sum(dtype=np.int64)], np.float32))
    out = DeviceArray(N, np.float32)
    launch = w2a8_gemv(device, words, given_q, quantization, DeviceArray.of(scales), out, N, K, ends=(2560, 3200, 3840))
    launch(stream.handle)
    stream.synchronize()
    m = np.repeat(scales, (2560, 640, 640))
    assert np.array_equal(out.read(), (w.astype(np.int32) @ q.astype(np.int32)).astype(np.float32) * m / s)
    times = []
    for _ in range(20):
        start = perf_counter()
        for _ in range(100):
            launch(stream.handle)
        times.append((perf_counter() - start) / 100)
        stream.synchronize()
    assert np.median(times) < 10e-6
    with pytest.raises(ValueError, match=r"words holds \d+ elements, a 3856 x 2560 product takes"):
        w2a8_gemv(device, words, given_q, quantization, DeviceArray.of(scales), out, 3856, K)
    with pytest.raises(ValueError, match=r"segments that end at \(100, 3839\)"):
        w2a8_gemv(device, words, given_q, quantization, DeviceArray.of(scales), out, N, K, ends=(100, 3839))
