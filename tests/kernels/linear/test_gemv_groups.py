"""The GEMV with group scales, by its launcher.

Contract: given a float32 input without a norm, every bit but silu's is the reference's (`GroupedLinear`): sums of a
group are exact, and all that follows are single float32 operations in its order. Tolerances with a norm are those of
test_gemv.py, group by group; the sum of G groups adds G roundings of the running sum.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear import gemv_groups as module
from bitnet_numba.kernels.linear.gemv import Plan
from bitnet_numba.kernels.linear.gemv_groups import gemv_groups
from bitnet_numba.kernels.linear.operands import GroupedLinear
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.packing import GROUP_COLS, num_groups, pack_scales, pack_ternary, packed_scales, packed_words
from bitnet_numba.quantize import quantize_groups
from bitnet_numba.reference.model import GroupedLinear as ReferenceLinear
from bitnet_numba.reference.model import relu2, rms_norm, silu
from tests.kernels.harness import HarnessDevice, Out, assert_close, needs_gpu, simulated
from tests.kernels.linear.test_gemv import EPS, padded, segments_of

SHAPES = [  # N, K, gated: Bonsai 8B's and 1.7B's, TriLM's, and sizes that end inside blocks, groups and quads
    (6144, 4096, False),
    (4096, 4096, False),
    (24576, 4096, True),
    (4096, 12288, False),
    (4096, 2048, False),
    (12288, 2048, True),
    (2048, 6144, False),
    (3072, 9216, False),
    (1152, 384, False),
    (33, 100, False),
    (96, 8608, True),
    (4096, 14336, False),
]


def random_grouped(rng: np.random.Generator, N: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Ternary weights int8 [N, K], and float16 scales [N, groups], some of which are 0."""
    scales = rng.uniform(0.01, 2, (N, num_groups(K))).astype(np.float16)
    scales[rng.random(scales.shape) < 0.05] = 0
    return rng.integers(-1, 2, (N, K)).astype(np.int8), scales


def check_gemv_groups(
    segments: Sequence[int], K: int, num_sms: int, norm: bool, epilogue: str, activation: str, bias: bool, seed: int
) -> None:
    """One product of random weights against the reference."""
    rng = np.random.default_rng(seed)
    N, gated = sum(segments), epilogue == "gated"
    w, scales = random_grouped(rng, N, K)
    x = (rng.standard_normal(K) * 10.0 ** rng.uniform(-6, 6)).astype(np.float32)
    weight = rng.standard_normal(K).astype(np.float32)
    b = rng.standard_normal(N).astype(np.float32) if bias else None
    m = scales.astype(np.float32)

    normed = rms_norm(x, weight, float(EPS)) if norm else x
    y = ReferenceLinear(w, m, b)(normed[None])[0]
    error = np.zeros(N)
    if norm:
        q, d = (a[0].astype(np.float64) for a in quantize_groups(normed[None]))
        steps = np.repeat(d, GROUP_COLS)[:K]
        near_half = np.abs(np.abs(normed.astype(np.float64) / steps) % 1 - 0.5) < 127 * 2.0**-20
        magnitude = np.abs(w) * np.repeat(m.astype(np.float64), GROUP_COLS, axis=1)[:, :K] * steps
        error = magnitude[:, near_half].sum(axis=1)
        error += (2.0**-19 + num_groups(K) * 2.0**-23) * (magnitude @ np.abs(q)) + 2.0**-23 * np.abs(y)
    rows = N // 2 if gated else N
    old = rng.standard_normal(rows).astype(np.float32)
    expected, bound = y, error
    if gated:
        gate, up = y[:rows], y[rows:]
        activate = relu2 if activation == "relu2" else silu
        expected = activate(gate) * up
        dg, du = error[:rows], error[rows:]
        slope = (2 * np.abs(gate) + dg) * dg if activation == "relu2" else 1.1 * dg + 2.0**-21 * np.abs(gate)
        bound = slope * (np.abs(up) + du) + np.abs(activate(gate)) * du
        if norm or activation == "silu":
            bound = bound + 2.0**-22 * np.abs(expected)
    if epilogue == "residual":
        expected = old + y
        bound = bound + (2.0**-23 * np.abs(expected) if norm else 0)

    device = HarnessDevice(num_sms)
    linear = GroupedLinear(
        device.operand(pack_ternary(w)), device.operand(pack_scales(scales)), tuple(segments), K, device.operand(b)
    )
    out = Out(rows, np.float32, old if epilogue == "residual" else None)
    given_norm = Norm(device.operand(padded(weight)), float(EPS)) if norm else None
    gemv_groups(
        device, linear, device.operand(padded(x)), device.operand(out),
        norm=given_norm, epilogue=epilogue, activation=activation,
    )  # fmt: skip
    name = device.run()
    assert_close(out.array, expected, bound, name)


KINDS = st.sampled_from(
    [
        (False, "store", "relu2"),
        (False, "residual", "relu2"),
        (False, "gated", "relu2"),
        (True, "store", "relu2"),
        (True, "gated", "silu"),
    ]
)


@simulated
@settings(max_examples=12)
@example(N=40, K=800, kind=(False, "store", "relu2"), bias=False, units=1, parts=2, grid=1, seed=1)
@example(N=20, K=1250, kind=(False, "gated", "relu2"), bias=True, units=1, parts=1, grid=2, seed=2)
@given(
    N=st.integers(1, 70),
    K=st.integers(1, 700),
    kind=KINDS,
    bias=st.booleans(),
    units=st.integers(1, 2),
    parts=st.integers(1, 3),
    grid=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_gemv_groups(
    N: int, K: int, kind: tuple[bool, str, str], bias: bool, units: int, parts: int, grid: int, seed: int
) -> None:  # fmt: skip
    gated = kind[1] == "gated"
    segments = segments_of(2 * N if gated else N, gated)
    rows = segments[0] if gated else sum(segments)
    rounds = (rows - 1) // (16 * units * grid) + 1
    with pytest.MonkeyPatch.context() as patch:  # few warps, so that the simulator is done soon
        patch.setattr(module, "plan", lambda *_: Plan(units, parts, rounds, grid))
        check_gemv_groups(segments, K, 1, *kind, bias, seed)


@simulated
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_simulated_numbers_that_are_not_finite(monkeypatch: pytest.MonkeyPatch, with_norm: bool, value: float) -> None:
    """One in a vector shows in every output."""
    monkeypatch.setattr(module, "plan", lambda *_: Plan(1, 1, 1, 1))
    device = HarnessDevice(1)
    x = padded(np.ones(300, np.float32))
    x[33] = value
    out = Out(16, np.float32)
    words, scales = pack_ternary(np.ones((16, 300), np.int8)), pack_scales(np.ones((16, 3), np.float16))
    linear = GroupedLinear(device.operand(words), device.operand(scales), (16,), 300)
    norm = Norm(device.operand(np.ones(320, np.float32)), float(EPS))
    gemv_groups(device, linear, device.operand(x), device.operand(out), norm=norm if with_norm else None)
    device.run(repeat=1)
    assert not np.isfinite(out.array).any()
    assert np.isnan(out.array).all() or np.isinf(value) and not with_norm


@needs_gpu
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
@pytest.mark.parametrize("norm", [False, True])
def test_gemv_groups_on_gpu(N: int, K: int, gated: bool, norm: bool) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device

    segments = (N // 2, N // 2) if gated else segments_of(N, False)
    for epilogue in ("gated",) if gated else ("store", "residual"):
        check_gemv_groups(segments, K, usable_device().num_sms, norm, epilogue, "silu", True, N + K)


@pytest.mark.parametrize("name", ["words", "scales", "bias", "x", "norm", "out"])
def test_launcher_refuses_each_operand(name: str) -> None:
    """One element too few, and a dtype that the kernel does not take."""
    device, N, K = DryRunDevice(90, 132), 64, 300
    arrays = {
        "words": device.empty(packed_words(N, K), np.int32),
        "scales": device.empty(packed_scales(N, K), np.float16),
        "bias": device.empty(N, np.float32),
        "x": device.empty(320, np.float32),
        "norm": device.empty(320, np.float32),
        "out": device.empty(N, np.float32),
    }
    size, dtype = arrays[name].size, arrays[name].dtype
    for array, problem in (
        (arrays[name], None),
        (device.empty(size - 1, dtype), f"holds {size - 1} elements"),
        (device.empty(size, np.float64), "must be .*, not float64"),
    ):
        given = {**arrays, name: array}
        linear = GroupedLinear(given["words"], given["scales"], (N,), K, given["bias"])
        arguments = device, linear, given["x"], given["out"]
        if problem is None:
            gemv_groups(*arguments, norm=Norm(given["norm"], 1e-5))
            continue
        with pytest.raises(ValueError, match=f"gemv_groups: {name}:? {problem}"):
            gemv_groups(*arguments, norm=Norm(given["norm"], 1e-5))
    with pytest.raises(ValueError, match="gemv_groups: 14368 columns are more than 14336"):
        module.plan(64, 14368, 132)
    with pytest.raises(ValueError, match="no epilogue 'acc', only store, residual, gated"):
        gemv_groups(device, linear, given["x"], given["out"], epilogue="acc")
