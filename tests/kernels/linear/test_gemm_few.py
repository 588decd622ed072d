"""The W2A8 product of 1 to 8 tokens.

Contract: int32 sums are exact, and everything after them is a single float32 operation at a time, in the order of the
reference. Where the kernel norms and quantises, q and s are those of quantize.py: the definition's, with the mean of
squares rounded once from float64. So everything is compared with `==`, but for silu, as of test_gemm.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear import gemm_few as gemm_few_module
from bitnet_numba.kernels.linear.gemm import gemm
from bitnet_numba.kernels.linear.gemm_few import MAX_TOKENS, Plan, gemm_few, plan
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations
from bitnet_numba.kernels.linear.quantize import quantize_spec
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.packing import BLOCK_ROWS, pack_ternary
from bitnet_numba.quantize import quantize_activations
from bitnet_numba.reference.model import relu2, silu
from tests.kernels.harness import HarnessDevice, Out, arch, assert_close, needs_gpu, run, simulated
from tests.kernels.linear.test_gemv import segments_of

EPS, ONE, TINY = np.float32(1e-5), np.float32(1), np.float32(1e-30)
SHAPES = [(2560, 2560, False), (3840, 2560, False), (13824, 2560, True), (2560, 6912, False), (3200, 3200, False),
          (1152, 384, False), (16, 32, False), (33, 36, False)]  # fmt: skip


def check_gemm_few(
    segments: Sequence[int], K: int, num_sms: int, tokens: int, count: int, prologue: str, epilogue: str,
    activation: str, bias: bool, seed: int, nan: bool = False, cluster: int = 1,
) -> None:  # fmt: skip
    """One product of random ternary weights, in segments of odd scales, `count` of the tokens real; nan: the first
    token holds one."""
    rng = np.random.default_rng(seed)
    N, gated = sum(segments), epilogue == "gated"
    w = rng.integers(-1, 2, (N, K)).astype(np.int8)
    x = (rng.standard_normal((tokens, K)) * 10.0 ** rng.uniform(-6, 6, (tokens, 1))).astype(np.float32)
    norm = rng.uniform(-2, 2, K).astype(np.float32)
    scales = np.array([0.0137, 1.71, 0.29], np.float32)[: len(segments)]
    m = np.repeat(scales, segments)
    b = rng.standard_normal(N).astype(np.float32) if bias else None

    normed = x
    if prologue == "norm":
        mean = np.mean((x * x).astype(np.float64), axis=-1, keepdims=True).astype(np.float32)
        normed = norm * (x * (ONE / np.sqrt(mean + EPS)))
    q, s = quantize_activations(normed)
    if activation == "silu" and prologue == "int8":
        s = s * np.float32(K) + np.float32(3 * K)  # the simulator's exp refuses to overflow
    acc = (q.astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32)
    y = acc.astype(np.float32) * m / s
    if b is not None:
        y = y + b
    rows = N // 2 if gated else N
    old = rng.standard_normal((tokens, rows)).astype(np.float32)
    expected, bound = y, np.zeros(())
    if gated:
        expected = (relu2 if activation == "relu2" else silu)(y[:, :rows]) * y[:, rows:]
        bound = 2.0**-21 * np.abs(expected.astype(np.float64)) if activation == "silu" else bound
    elif epilogue == "residual":
        expected = old + y
    if nan:
        x[0, rng.integers(K)] = np.nan

    device = HarnessDevice(num_sms)
    linear = PackedLinear(
        device.operand(pack_ternary(w)), device.operand(scales), tuple(segments), K, device.operand(b)
    )
    given: Any = device.operand(x)
    if prologue == "int8":
        stored = np.zeros((tokens, -(-K // 32) * 32), np.int8)
        stored[:, :K] = q
        q_sum = q.sum(axis=1, dtype=np.int32)
        given = QuantizedActivations(*(device.operand(array) for array in (stored, s[:, 0].copy(), q_sum)))
    size, residual = tokens * rows, epilogue == "residual"
    out = Out(size, np.int32) if epilogue == "acc" else Out(size, np.float32, old if residual else None)
    before = out.array.reshape(tokens, rows).copy()
    given_norm = Norm(device.operand(norm), float(EPS)) if prologue == "norm" else None
    gemm_few(
        device, linear, given, device.operand(np.array([count], np.int32)), device.operand(out), tokens,
        norm=given_norm, epilogue=epilogue, activation=activation, cluster=cluster,
    )  # fmt: skip
    name = device.run()
    result = out.array.reshape(tokens, rows)
    wanted, first = (acc if epilogue == "acc" else expected), int(nan)
    if first < count:
        bounds = np.broadcast_to(bound, wanted.shape)[first:count]
        assert_close(result[first:count], wanted[first:count], bounds, name)
    assert not nan or np.isnan(result[0]).all()
    assert result[count:].tobytes() == before[count:].tobytes(), f"{name}: wrote tokens that are not there"


KINDS = st.sampled_from(
    [
        ("int8", "acc", "relu2"),
        ("int8", "store", "relu2"),
        ("int8", "gated", "silu"),
        ("quantize", "residual", "relu2"),
        ("quantize", "gated", "relu2"),
        ("norm", "store", "relu2"),
        ("norm", "residual", "relu2"),
        ("norm", "gated", "relu2"),
    ]
)


@simulated
@settings(max_examples=8)
@example(N=40, pieces=133, kind=("int8", "acc", "relu2"), bias=False, warps=4, grid=1, tokens=8, short=0, seed=1)
@example(N=60, pieces=140, kind=("norm", "residual", "relu2"), bias=True, warps=8, grid=3, tokens=3, short=1, seed=2)
@example(N=32, pieces=50, kind=("quantize", "gated", "relu2"), bias=True, warps=8, grid=2, tokens=2, short=0, seed=3)
@example(N=32, pieces=50, kind=("norm", "store", "relu2"), bias=True, warps=4, grid=2, tokens=2, short=2, seed=3)
@given(
    N=st.integers(1, 70),
    pieces=st.integers(1, 75),
    kind=KINDS,
    bias=st.booleans(),
    warps=st.sampled_from([4, 8]),
    grid=st.integers(1, 3),
    tokens=st.integers(1, 8),
    short=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_gemm_few(
    N: int, pieces: int, kind: tuple[str, str, str], bias: bool, warps: int, grid: int, tokens: int, short: int,
    seed: int,
) -> None:  # fmt: skip
    gated = kind[1] == "gated"
    segments = segments_of(2 * N if gated else N, gated)
    rows = segments[0] if gated else sum(segments)
    split = Plan((rows - 1) // (BLOCK_ROWS * grid) + 1, warps, grid)
    with pytest.MonkeyPatch.context() as patch:  # few warps, so that the simulator is done soon
        patch.setattr(gemm_few_module, "plan", lambda *_: split)
        check_gemm_few(segments, 4 * pieces, 1, tokens, max(0, tokens - short), *kind, bias, seed)


@simulated
@pytest.mark.parametrize(("prologue", "tokens", "cluster"), [("norm", 4, 2), ("quantize", 2, 2), ("norm", 6, 3)])
def test_simulated_clusters(prologue: str, tokens: int, cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_few_module, "plan", lambda *_: Plan(2, 4, cluster))
    check_gemm_few((16 * cluster, 20), 340, 1, tokens, tokens - 1, prologue, "store", "relu2", True, 5, False, cluster)


@simulated
@pytest.mark.parametrize("prologue", ["quantize", "norm"])
def test_simulated_nan_stays_with_its_token(prologue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_few_module, "plan", lambda *_: Plan(1, 4, 1))
    check_gemm_few((16,), 72, 1, 2, 2, prologue, "store", "relu2", False, 4, nan=True)


def rows_whose_mean_hangs_on_the_order(tokens: int, K: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [tokens, K], K a power of 4: the sum of squares is a tie between two float32 but for three terms that
    float64 drops one by one and keeps together, and 1 / sqrt differs between the two."""
    x = np.zeros((tokens, K), np.float32)
    for row in x:
        large = rng.uniform(2, 8**0.5, 1000).astype(np.float32)
        squares = large * large  # from 4 to 8, where a unit of float32 is 2^-21
        means = np.stack([squares, np.nextafter(squares, np.float32(9))]) / np.float32(K)
        inverses = ONE / np.sqrt(means + TINY)
        odd = squares.view(np.int32) % 2 == 1
        found = large[(inverses[0] != inverses[1]) & ~odd & (squares < 7.9)]
        places = rng.permutation(K)[:5]
        row[places[0]], row[places[1]] = found[0], 2.0**-11  # half a unit: a tie, which goes to the even one
        row[places[2:]] = 2.0**-26  # a quarter of a float64's unit each
    return x


def check_order(tokens: int, K: int, seed: int) -> bool:
    """The kernel against quantize.py and itself without a norm, on rows where another order gives other bits. Returns
    whether the rows were such that first to last would have."""
    rng = np.random.default_rng(seed)
    x, device = rows_whose_mean_hangs_on_the_order(tokens, K, rng), HarnessDevice(1)
    w, scales, count = (
        rng.integers(-1, 2, (16, K)).astype(np.int8),
        np.array([0.3], np.float32),
        np.array([tokens], np.int32),
    )
    q, s, q_sum = Out(tokens * K // 4, np.int32), Out(tokens, np.float32), Out(tokens, np.int32)
    norm, linear = (
        np.ones(K, np.float32),
        PackedLinear(device.operand(pack_ternary(w)), device.operand(scales), (16,), K),
    )
    run(quantize_spec(arch(), K), tokens, [x, norm, TINY, q, s, q_sum], 1)
    quantized = q.array.view(np.int8), s.array, q_sum.array
    results = []
    for activations, given_norm in (
        (QuantizedActivations(*(device.operand(array.copy()) for array in quantized)), None),
        (device.operand(x), Norm(device.operand(norm), float(TINY))),
    ):
        out = Out(tokens * 16, np.float32)
        gemm_few(device, linear, activations, device.operand(count), device.operand(out), tokens, norm=given_norm)
        device.run(1)
        results.append(out.array.tobytes())
    assert results[0] == results[1]
    squares = (x * x).astype(np.float64)
    in_order, exact = squares.cumsum(axis=-1)[:, -1], [math.fsum(row) for row in squares]
    return bool((in_order.astype(np.float32) != np.array(exact, np.float32)).any())


@simulated
def test_simulated_squares_are_added_up_in_the_order_of_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_few_module, "plan", lambda *_: Plan(1, 4, 1))
    assert any([check_order(4, 4096, seed) for seed in range(2)])


@needs_gpu
def test_squares_are_added_up_in_the_order_of_quantize_on_gpu() -> None:
    assert any([check_order(4, 4096, seed) for seed in range(50)])


@pytest.mark.parametrize("num_sms", [1, 46, 132])
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_plan_covers_every_row_once(N: int, K: int, gated: bool, num_sms: int) -> None:
    split = plan(N, K, num_sms, gated)
    if split is None:
        assert num_sms < 132
        return
    units = -(-N // (BLOCK_ROWS * (2 if gated else 1)))
    done = [block + slot * split.grid for slot in range(split.units) for block in range(split.grid)]
    assert sorted(unit for unit in done if unit < units) == list(range(units))


def test_launcher_refuses_what_does_not_fit() -> None:
    device = DryRunDevice(90, 132)
    N, K, M = 64, 100, 3
    words, scales = device.zeros(4 * 128 * 4, "int32"), device.zeros(1, "float32")
    linear = PackedLinear(words, scales, (N,), K)
    count, out, x = device.zeros(1, "int32"), device.zeros(M * N, "float32"), device.zeros(M * K, "float32")
    assert gemm_few(device, linear, x, count, out, M).name.startswith("gemm_few[100 3 quantize store")
    with pytest.raises(ValueError, match=f"gemm_few: 1 to {MAX_TOKENS} tokens, not 9"):
        gemm_few(device, linear, x, count, out, 9)
    with pytest.raises(ValueError, match="gemm_few: x holds 296 elements, a 64 x 100 product of 3 tokens takes 300"):
        gemm_few(device, linear, device.zeros(296, "float32"), count, out, M)
    with pytest.raises(ValueError, match="gemm_few: no epilogue 'add'"):
        gemm_few(device, linear, x, count, out, M, epilogue="add")
    with pytest.raises(ValueError, match="rows of a multiple of 4 columns, not 99"):
        gemm_few(device, PackedLinear(words, scales, (N,), 99), x, count, out, M)
    quantized = QuantizedActivations.empty(device, M, K)
    with pytest.raises(ValueError, match="x is quantised"):
        gemm_few(device, linear, quantized, count, out, M, norm=Norm(x, 1e-5))
    with pytest.raises(ValueError, match="cannot hold its share of a 64 x 100000 product"):
        gemm_few(device, PackedLinear(words, scales, (N,), 100000), quantized, count, out, M)


def test_when_it_is_chosen() -> None:
    def name(arch: int, M: int, N: int, K: int) -> str:
        device = DryRunDevice(arch, 132)
        words, scales = device.zeros(N * K // 16, "int32"), device.zeros(1, "float32")
        x, count, out = (
            QuantizedActivations.empty(device, M, K),
            device.zeros(1, "int32"),
            device.zeros(M * N, "float32"),
        )
        return gemm(device, PackedLinear(words, scales, (N,), K), x, count, out, M).name

    assert name(90, 8, 2560, 6912).startswith("gemm_few[6912 8 int8 store")
    assert name(90, 1, 2560, 6912) == name(90, 8, 2560, 6912)
    assert name(90, 9, 2560, 6912).startswith("gemm[sm_90")
    assert name(80, 8, 2560, 6912).startswith("gemm[sm_80")  # not measured there
    assert name(90, 8, 8192, 28672).startswith("gemm[sm_90")  # too large for the registers


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_full_size_on_gpu(N: int, K: int, gated: bool, tokens: int) -> None:
    for prologue in ("int8", "norm", "quantize") if tokens <= 4 else ("int8",):
        segments, epilogue = segments_of(N, gated), "gated" if gated else "residual"
        check_gemm_few(segments, K, 132, tokens, tokens, prologue, epilogue, "relu2", False, tokens)


@needs_gpu
@settings(max_examples=30)
@given(
    N=st.integers(1, 3000),
    pieces=st.integers(1, 700),
    kind=KINDS,
    bias=st.booleans(),
    tokens=st.integers(1, 8),
    short=st.integers(0, 2),
    nan=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_on_gpu(
    N: int, pieces: int, kind: tuple[str, str, str], bias: bool, tokens: int, short: int, nan: bool, seed: int
) -> None:
    gated = kind[1] == "gated"
    segments, count = segments_of(2 * N if gated else N, gated), max(0, tokens - short)
    nan = nan and kind[0] != "int8" and count > 0
    check_gemm_few(segments, 4 * pieces, 132, tokens, count, *kind, bias, seed, nan)
