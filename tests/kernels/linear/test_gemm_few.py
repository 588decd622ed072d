"""The W2A8 product of 1 to 8 tokens.

Contract: that of the other GEMMs (test_gemm.py): everything is compared with `==`, but for silu.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear import gemm as gemm_module
from bitnet_numba.kernels.linear.gemm import gemm
from bitnet_numba.kernels.linear.gemm_few import Plan, make_gemm_few, plan
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.packing import BLOCK_ROWS, pack_ternary
from bitnet_numba.reference.model import relu2, silu
from tests.kernels.harness import HarnessDevice, Out, assert_close, needs_gpu, simulated
from tests.kernels.linear.test_gemv import segments_of

SHAPES = [(2560, 2560, False), (3840, 2560, False), (13824, 2560, True), (2560, 6912, False), (3200, 3200, False),
          (1152, 384, False), (16, 32, False), (33, 31, False)]  # fmt: skip


def check_gemm_few(
    segments: Sequence[int], K: int, split: Plan, tokens: int, count: int, epilogue: str, activation: str, bias: bool,
    seed: int,
) -> None:  # fmt: skip
    """One product of random ternary weights, in segments of odd scales, `count` of the tokens real; the last of them
    has the scale of a token that holds NaN."""
    rng = np.random.default_rng(seed)
    N, gated = sum(segments), epilogue == "gated"
    w = rng.integers(-1, 2, (N, K)).astype(np.int8)
    q = np.zeros((tokens, -(-K // 32) * 32), np.int8)
    q[:, :K] = rng.integers(-127, 128, (tokens, K))
    s = (rng.uniform(0.5, 2, tokens) * 10.0 ** rng.integers(-3, 4, tokens)).astype(np.float32)
    if activation == "silu":
        s = s * np.float32(K) + np.float32(3 * K)  # the simulator's exp refuses to overflow
    scales = np.array([0.0137, 1.71, 0.29], np.float32)[: len(segments)]
    b = rng.standard_normal(N).astype(np.float32) if bias else None
    acc = (q[:, :K].astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32)
    y = acc.astype(np.float32) * np.repeat(scales, segments) / s[:, None]
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
    nan = count > 0 and epilogue in ("store", "residual")
    if nan:
        s[count - 1] = np.nan

    device = HarnessDevice(split.grid)
    linear = PackedLinear(
        device.operand(pack_ternary(w)), device.operand(scales), tuple(segments), K, device.operand(b)
    )
    x = QuantizedActivations(*(device.operand(array) for array in (q, s, q.sum(axis=1, dtype=np.int32))))
    size, residual = tokens * rows, epilogue == "residual"
    out = Out(size, np.int32) if epilogue == "acc" else Out(size, np.float32, old if residual else None)
    before = out.array.reshape(tokens, rows).copy()
    given_count = device.operand(np.array([count], np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm_module, "choose_few", lambda *_: split)
        gemm(device, linear, x, given_count, device.operand(out), tokens, epilogue=epilogue, activation=activation)
    name = device.run()
    result, finite = out.array.reshape(tokens, rows), count - nan
    wanted = acc if epilogue == "acc" else expected
    if finite:
        assert_close(result[:finite], wanted[:finite], np.broadcast_to(bound, wanted.shape)[:finite], name)
    assert np.isnan(result[finite:count].astype(np.float32)).all()
    assert result[count:].tobytes() == before[count:].tobytes(), f"{name}: wrote tokens that are not there"


KINDS = st.sampled_from(
    [("acc", "relu2"), ("store", "relu2"), ("residual", "relu2"), ("gated", "relu2"), ("gated", "silu")]
)


@simulated
@settings(max_examples=8)
@example(N=40, K=530, kind=("acc", "relu2"), bias=False, warps=4, grid=1, tokens=8, short=0, seed=1)
@example(N=60, K=560, kind=("residual", "relu2"), bias=True, warps=8, grid=3, tokens=3, short=1, seed=2)
@example(N=32, K=200, kind=("gated", "relu2"), bias=True, warps=8, grid=2, tokens=2, short=0, seed=3)
@example(N=32, K=2400, kind=("store", "relu2"), bias=True, warps=4, grid=2, tokens=2, short=2, seed=3)
@given(
    N=st.integers(1, 70),
    K=st.integers(1, 600),
    kind=KINDS,
    bias=st.booleans(),
    warps=st.sampled_from([4, 8]),
    grid=st.integers(1, 3),
    tokens=st.integers(1, 8),
    short=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_gemm_few(
    N: int, K: int, kind: tuple[str, str], bias: bool, warps: int, grid: int, tokens: int, short: int, seed: int
) -> None:
    gated = kind[0] == "gated"
    segments = segments_of(2 * N if gated else N, gated)
    rows = segments[0] if gated else sum(segments)
    split = Plan((rows - 1) // (BLOCK_ROWS * grid) + 1, warps, grid)
    check_gemm_few(segments, K, split, tokens, max(0, tokens - short), *kind, bias, seed)


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


def test_refuses_other_numbers_of_warps() -> None:
    with pytest.raises(ValueError, match="no product of few tokens is made of"):
        make_gemm_few(90, 64, Plan(1, 6, 1))


def test_when_it_is_chosen() -> None:
    def name(arch: int, M: int, N: int, K: int) -> str:
        device = DryRunDevice(arch, 132)
        words, scales = device.zeros(N * K // 16, "int32"), device.zeros(1, "float32")
        x, count = QuantizedActivations.empty(device, M, K), device.zeros(1, "int32")
        out = device.zeros(M * N, "float32")
        return gemm(device, PackedLinear(words, scales, (N,), K), x, count, out, M).name

    assert name(90, 4, 2560, 6912).startswith("gemm_few[6912 store")
    assert name(90, 1, 2560, 6912) == name(90, 4, 2560, 6912)
    assert name(90, 5, 2560, 6912).startswith("gemm[sm_90")  # a step of eight is shorter so
    assert name(80, 4, 2560, 6912).startswith("gemm[sm_80")  # not measured there
    assert name(90, 4, 8192, 28672).startswith("gemm[sm_90")  # too large for the registers


def split_of(N: int, K: int, gated: bool) -> Plan:
    """How 132 SMs multiply a matrix that fits them."""
    split = plan(N, K, 132, gated)
    assert split is not None
    return split


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_full_size_on_gpu(N: int, K: int, gated: bool, tokens: int) -> None:
    split, epilogue = split_of(N, K, gated), "gated" if gated else "residual"
    check_gemm_few(segments_of(N, gated), K, split, tokens, tokens, epilogue, "relu2", False, tokens)


@needs_gpu
@settings(max_examples=30)
@given(
    N=st.integers(1, 3000),
    K=st.integers(1, 2800),
    kind=KINDS,
    bias=st.booleans(),
    tokens=st.integers(1, 8),
    short=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_on_gpu(
    N: int, K: int, kind: tuple[str, str], bias: bool, tokens: int, short: int, seed: int
) -> None:
    gated = kind[0] == "gated"
    segments = segments_of(2 * N if gated else N, gated)
    split = split_of(sum(segments), K, gated)
    check_gemm_few(segments, K, split, tokens, max(0, tokens - short), *kind, bias, seed)
