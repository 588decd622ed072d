"""Absmean and absmax quantisation, against recorded traces (exact) and by their properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitnet_numba import quantize
from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.checkpoint.safetensors_file import TensorFile
from bitnet_numba.quantize import (
    absmean_scale,
    find_group_scales,
    quantize_activations,
    quantize_groups,
    quantize_groups_twice,
    ternarize,
)
from tests.conftest import GOLDEN, GoldenCase

finite = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=True)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=finite)
powers_of_two = st.integers(-20, 20).map(lambda e: np.float32(2.0**e))


@pytest.mark.golden
def test_activations_match_the_traces(golden: GoldenCase) -> None:
    """q and s of every traced linear, bit for bit."""
    names = [name[: -len("/q")] for name in golden.recorded if name.endswith("/q")]
    assert len(names) == 7
    for name in names:
        q, s = quantize_activations(golden.recorded[f"{name}/in"])
        assert np.array_equal(q, golden.recorded[f"{name}/q"]), name
        assert np.array_equal(s[:, 0], golden.recorded[f"{name}/s"]), name


def test_weights_match_the_packed_checkpoint() -> None:
    """Ternarising the master gives the words and, rounded to bfloat16, the scales that transformers packed from it."""
    master = TensorFile(GOLDEN / "online" / "model.safetensors")
    packed = TensorFile(GOLDEN / "offline" / "model.safetensors")
    modules = [name[: -len(".weight_scale")] for name in packed.specs if "layers.0." in name and "scale" in name]
    assert len(modules) == 7
    for module in modules:
        t, m = ternarize(to_float32(master.read(f"{module}.weight")))
        planes = packed.read(f"{module}.weight")
        stored = np.concatenate([planes >> 2 * i & 3 for i in range(4)]).astype(np.int8) - np.int8(1)
        assert np.array_equal(t, stored), module
        assert from_float32(np.array([m]))[0] == packed.read(f"{module}.weight_scale")[0], module


@given(matrices)
def test_activation_ranges(x: np.ndarray) -> None:
    q, s = quantize_activations(x)
    assert q.dtype == np.int8 and q.shape == x.shape
    assert s.dtype == np.float32 and s.shape == (len(x), 1)
    assert q.min() >= -127, "absmax alone never reaches -128"
    absmax = np.abs(x).max(axis=1)
    assert (np.abs(q).max(axis=1)[absmax >= quantize.EPSILON] == 127).all(), "the largest value uses the whole range"
    assert (np.sign(q) * np.sign(x) >= 0).all()


@given(matrices, powers_of_two)
def test_activations_scale(x: np.ndarray, factor: np.float32) -> None:
    """A power of two rounds nothing: q stays, s is divided by it, wherever the clamp does not act."""
    absmax = np.abs(x).max(axis=1)
    x = x[(absmax > 1e-3) & (absmax * factor > 1e-3)]
    if len(x):
        q, s = quantize_activations(x)
        scaled_q, scaled_s = quantize_activations(x * factor)
        assert np.array_equal(q, scaled_q)
        assert np.array_equal(s / factor, scaled_s)


@given(hnp.arrays(np.int8, st.tuples(st.integers(1, 8), st.integers(1, 24)), elements=st.integers(-127, 127)))
def test_activations_are_idempotent(q: np.ndarray) -> None:
    """What quantisation produced (some value is +-127) quantises to itself."""
    q[:, 0] = 127
    again, s = quantize_activations(q.astype(np.float32))
    # s = fl(fl(1 / 127) * 127) is one or the float beside it; no whole number up to 127 is moved by that.
    assert np.array_equal(again, q) and np.allclose(s, 1, rtol=2e-7)


def test_activations_round_half_to_even() -> None:
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 64.0]], np.float32)
    q, _ = quantize_activations(np.append(x, [[127 * 64 / 64.0]], axis=1).astype(np.float32))
    s = np.float32(1) / np.float32(127) * np.float32(127)
    assert s == 1
    assert q[0, :6].tolist() == [0, 2, 2, 0, -2, -2]


def test_activation_clamp() -> None:
    """Below 1e-5 the scale stops growing."""
    s_max = (np.float32(1) / np.float32(1e-5)) * np.float32(127)
    for x in (0.0, 1e-45, 1e-38, 1e-7, 9e-6):
        q, s = quantize_activations(np.full((1, 3), x, np.float32))
        assert s[0, 0] == s_max
        assert (q == np.rint(np.float32(x) * s_max)).all()


@given(matrices)
def test_ternary_values(w: np.ndarray) -> None:
    t, m = ternarize(w)
    assert t.dtype == np.int8 and t.shape == w.shape
    assert m.dtype == np.float32 and m >= quantize.EPSILON
    assert set(np.unique(t)) <= {-1, 0, 1}
    assert (t * np.sign(w) >= 0).all()
    # Far from the rounding border |w| = m / 2 the code is beyond doubt; a border's width is a few float32 steps.
    assert (np.abs(t)[np.abs(w) > np.float32(0.500001) * m] == 1).all()
    assert (t[np.abs(w) < np.float32(0.499999) * m] == 0).all()


@given(matrices, powers_of_two)
def test_ternary_scale(w: np.ndarray, factor: np.float32) -> None:
    if absmean_scale(w) > 1e-3 and absmean_scale(w * factor) > 1e-3:
        t, m = ternarize(w)
        scaled_t, scaled_m = ternarize(w * factor)
        assert np.array_equal(t, scaled_t)
        assert m * factor == scaled_m


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32), st.floats(2.0**-9, 2.0**9, width=32))
def test_ternary_is_idempotent(N: int, K: int, seed: int, scale: float) -> None:
    """A matrix of -m, 0, m ternarises to itself: its absmean is at most m and, while a third is not zero, above m/3."""
    t = np.random.default_rng(seed).integers(-1, 2, (N, K)).astype(np.int8)
    if np.count_nonzero(t):
        again, _ = ternarize(t * np.float32(scale))
        assert np.array_equal(again, t)


def test_absmean_clamp() -> None:
    for w in (0.0, 1e-45, 1e-34, 9e-6):
        t, m = ternarize(np.full((2, 2), w, np.float32))
        assert m == np.float32(1e-5)
        assert (t == np.rint(np.float32(w) * (np.float32(1) / np.float32(1e-5)))).all()


def test_half_precision_masters() -> None:
    w = np.array([[0.5, -0.25], [0.125, -1.0]], np.float16)
    t, m = ternarize(w)
    assert m == np.float32(0.46875)
    assert t.tolist() == [[1, -1], [0, -1]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_raise(bad: float) -> None:
    x = np.array([[1.0, bad]], np.float32)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_activations(x)
    with pytest.raises(ValueError, match="NaN or infinity"):
        ternarize(x)


def test_empty_raises() -> None:
    with pytest.raises(ValueError, match="empty"):
        ternarize(np.zeros((0, 3), np.float32))
    with pytest.raises(ValueError, match="without columns"):
        quantize_activations(np.zeros((3, 0), np.float32))


@given(hnp.arrays(np.uint16, st.integers(1, 50)))
def test_bfloat16_round_trip(bits: np.ndarray) -> None:
    """Every bfloat16 survives; NaN stays NaN."""
    values = to_float32(bits)
    nan = np.isnan(values)
    assert np.array_equal(from_float32(values)[~nan], bits[~nan])
    assert np.isnan(to_float32(from_float32(values))[nan]).all()


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_bfloat16_rounds_to_nearest(x: np.ndarray) -> None:
    """No bfloat16 beside the chosen one is nearer, and a tie goes to the even one."""
    bits = from_float32(x)
    error = np.abs(to_float32(bits).astype(np.float64) - x)
    for step in (-1, 1):
        neighbour = to_float32((bits.astype(np.int64) + step).clip(0, 65535).astype(np.uint16)).astype(np.float64)
        with np.errstate(invalid="ignore"):
            other = np.abs(neighbour - x)
        assert not (other < error).any()
        assert (bits[other == error] % 2 == 0).all()


@given(st.integers(1, 4), st.integers(1, 400), st.integers(0, 99))
def test_groups_are_quantised_by_themselves(M: int, K: int, seed: int) -> None:
    """Each 128 columns as a token of their own, the last ones too; d = 1 / s."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((M, K)) * 10.0 ** rng.integers(-3, 4, K)).astype(np.float32)
    q, d = quantize_groups(x)
    assert q.shape == (M, K) and d.shape == (M, -(-K // 128))
    for g in range(d.shape[1]):
        columns = slice(128 * g, 128 * (g + 1))
        own, s = quantize_activations(x[:, columns])
        assert np.array_equal(q[:, columns], own) and np.array_equal(d[:, g, None], np.float32(1) / s)


@given(st.integers(1, 4), st.integers(1, 400), st.integers(0, 99))
def test_a_second_plane_has_what_the_first_rounds_off(M: int, K: int, seed: int) -> None:
    """One plane is off by up to half a step, two by up to a 254th of that, and the rounding of x * s, 127 * 2^-24."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((M, K)) * 10.0 ** rng.integers(-3, 4, K)).astype(np.float32)
    q, q2, d = quantize_groups_twice(x)
    one_q, one_d = quantize_groups(x)
    assert np.array_equal(q, one_q) and np.array_equal(d, one_d) and q2.shape == q.shape and np.abs(q2).max() <= 127
    steps = np.repeat(d.astype(np.float64), 128, axis=1)[:, :K]
    rounding = 2 * 127 * 2.0**-24
    assert (np.abs(x - q * steps) <= (0.5 + rounding) * steps).all()
    assert (np.abs(x - (q + q2 / 254) * steps) <= (0.5 / 254 + rounding) * steps).all()


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 99))
def test_group_scales_are_found(N: int, K: int, seed: int) -> None:
    """What was put together is taken apart; one value that is no multiple is noticed."""
    rng = np.random.default_rng(seed)
    t = rng.integers(-1, 2, (N, K)).astype(np.int8)
    t[0, : min(K, 128)] = 0  # a group without a scale
    scales = rng.uniform(0.01, 2, (N, -(-K // 128))).astype(np.float32)
    of_columns = np.repeat(scales, 128, axis=1)[:, :K]
    found = find_group_scales(t * of_columns)
    assert found is not None
    assert np.array_equal(found[0], t)
    assert np.array_equal(np.repeat(found[1], 128, axis=1)[:, :K] * t, t * of_columns)
    assert found[1][0, 0] == 0
    values = t * of_columns
    row, column = rng.integers(N), rng.integers(K)
    largest = np.abs(values[row, column // 128 * 128 : column // 128 * 128 + 128]).max()
    values[row, column] = largest / 3 if np.count_nonzero(values[row, column // 128 * 128 :][:128]) > 1 else np.nan
    assert find_group_scales(values) is None or np.count_nonzero(t[row]) < 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_group_scales_of_what_is_not_finite(value: float) -> None:
    values = np.ones((2, 200), np.float32)
    values[1, 150] = value
    assert find_group_scales(values) is None
