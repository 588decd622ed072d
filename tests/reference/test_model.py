"""The NumPy model against what transformers computed, and against itself.

Golden numbers are transformers' own, float32 (tests/golden/record.py). Given the same float32 input, q is exact and a
linear's output differs only in the order of its last two operations: 1e-5 of the row's largest value is fifty times
what was seen. Over whole models both compute with the same int8 activations (see tests/int8_activations.py): then
logits differ by float32 rounding, a few 1e-6 of their spread; 1e-4 is required.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.huggingface import HuggingFaceCheckpoint
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.config import ModelConfig
from bitnet_numba.quantize import quantize_groups
from bitnet_numba.reference import model as ref
from bitnet_numba.reference.model import Cache, Model
from tests.conftest import GoldenCase
from tests.int8_activations import LOGITS_TOLERANCE, check_logits, collected, imposed, per_linear, recorded_groups
from tools.make_checkpoint import LLAMA3_ROPE, PRESETS, make_checkpoint

PROMPTS = ("bos1", "text7", "text33")


def run(model: Model, ids: np.ndarray, cache: Cache) -> np.ndarray:
    return model.logits(model.forward(np.asarray(ids), cache))


@pytest.mark.golden
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits(golden: GoldenCase, prompt: str) -> None:
    model = Model(golden.packed)
    ids = golden.recorded[f"ids/{prompt}"]
    q = [q[: len(ids)] for q in recorded_groups(golden.recorded, prompt)]
    with imposed(per_linear(q)):
        logits = run(model, ids, Cache(model.config, len(ids)))
    check_logits(logits, golden.recorded[f"logits/{prompt}"], golden.recorded[f"std/{prompt}"])


def test_other_int8_activations_than_flips_are_noticed(golden: GoldenCase) -> None:
    model = Model(golden.packed)
    ids = golden.recorded["ids/text7"]
    q = [q[: len(ids)] for q in recorded_groups(golden.recorded, "text7")]
    q[-1] = q[-1].copy()
    q[-1][3, 5] += 1
    with pytest.raises(AssertionError, match="was rounded to"), imposed(per_linear(q)):
        run(model, ids, Cache(model.config, len(ids)))
    q[-1][3, 5] += 1
    with pytest.raises(AssertionError, match="off by more than one"), imposed(per_linear(q)):
        run(model, ids, Cache(model.config, len(ids)))


@pytest.mark.golden
def test_online_hidden_states(golden_online: GoldenCase) -> None:
    """bfloat16 master weights, ternarised by the converter: embedding and first layer."""
    model = Model(golden_online.packed)
    ids = golden_online.recorded["ids/text33"]
    embedded, after = golden_online.recorded["hidden/text33"]
    x = model.embedding.look_up(ids)
    assert np.array_equal(x, embedded)
    cache = Cache(model.config, len(ids))
    cos, sin = ref.rope_tables(model.config, np.arange(len(ids)))
    with imposed(per_linear(recorded_groups(golden_online.recorded, "text33"))):
        out = model.layers[0](x, cos, sin, partial(cache.append, 0))
    assert np.abs(out - after).max() < 1e-4 * after.std()


@pytest.mark.golden
@pytest.mark.parametrize("prompt", ["text7", "text33"])
def test_greedy_continuation(golden: GoldenCase, prompt: str) -> None:
    """Every token is the recorded one: the two best logits are always further apart than two logits' tolerances. The
    recorded tokens are fed back, one at a time."""
    model = Model(golden.packed)
    ids, expected = golden.recorded[f"ids/{prompt}"], golden.recorded[f"greedy/{prompt}"]
    margins = golden.recorded[f"greedy_margin/{prompt}"]
    assert len(expected) == 32 and margins.min() > 2 * LOGITS_TOLERANCE * golden.recorded[f"std/{prompt}"]
    cache = Cache(model.config, len(ids) + len(expected))
    with imposed(per_linear(recorded_groups(golden.recorded, prompt))):
        logits = run(model, ids, cache)[-1]
        for token in expected:
            assert logits.argmax() == token
            logits = run(model, np.array([token]), cache)[-1]


@pytest.mark.golden
def test_linears_match_the_traces(golden: GoldenCase) -> None:
    last = golden.packed.config.num_layers - 1
    layer = Model(golden.packed).layers[last]
    linears = {
        "self_attn.q_proj": layer.q,
        "self_attn.k_proj": layer.k,
        "self_attn.v_proj": layer.v,
        "self_attn.o_proj": layer.o,
        "mlp.gate_proj": layer.gate,
        "mlp.up_proj": layer.up,
        "mlp.down_proj": layer.down,
    }
    for module, linear in linears.items():
        name = f"trace/layers.{last}.{module}"
        out = linear(golden.recorded[f"{name}/in"])
        expected = golden.recorded[f"{name}/out"]
        error = np.abs(out - expected).max(axis=1) / np.abs(expected).max(axis=1)
        assert error.max() < 1e-5, name


@pytest.mark.golden
def test_norms_match_the_traces(golden: GoldenCase) -> None:
    layer, eps = Model(golden.packed).layers[0], golden.packed.config.rms_norm_eps
    norms = {"input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_attention_norm}
    if golden.packed.config.sub_norms:
        norms |= {"self_attn.attn_sub_norm": layer.attn_sub_norm, "mlp.ffn_sub_norm": layer.ffn_sub_norm}
    for name, weight in norms.items():
        out = ref.rms_norm(golden.recorded[f"trace/layers.0.{name}/in"], weight, eps)
        expected = golden.recorded[f"trace/layers.0.{name}/out"]
        # A mean of up to 640 squares, a root and two products: within a few float32 steps of each value.
        assert np.allclose(out, expected, rtol=1e-6, atol=0), name


@pytest.mark.golden
def test_rope_matches_the_trace(golden: GoldenCase) -> None:
    cos, sin = ref.rope_tables(golden.packed.config, np.arange(7))
    assert np.abs(cos - golden.recorded["trace/rope/cos"]).max() < 2e-7
    assert np.abs(sin - golden.recorded["trace/rope/sin"]).max() < 2e-7


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_cached_equals_uncached(tiny_model: Model, pieces: list[int], seed: int) -> None:
    """However a prompt is cut into calls, the logits agree; only float32 rounding varies with the products' shapes."""
    ids = np.random.default_rng(seed).integers(0, tiny_model.config.vocab_size, sum(pieces))
    with collected() as linears:
        whole = run(tiny_model, ids, Cache(tiny_model.config, len(ids)))
    cache = Cache(tiny_model.config, len(ids))
    with imposed(linears):
        parts = np.concatenate([run(tiny_model, part, cache) for part in np.split(ids, np.cumsum(pieces)[:-1])])
    check_logits(parts, whole, whole.std())


@pytest.fixture(scope="module")
def tiny_model(tiny_packed: Path) -> Model:
    return Model(open_packed(tiny_packed))


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 300), st.integers(0, 99))
def test_integer_product_is_exact(M: int, N: int, K: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, t = rng.integers(-128, 128, (M, K)).astype(np.int8), rng.integers(-1, 2, (N, K)).astype(np.int8)
    assert np.array_equal(ref.integer_product(q, t), q.astype(np.int64) @ t.T.astype(np.int64))


def test_integer_product_at_its_limit() -> None:
    """The largest sums possible, at the most columns allowed."""
    q = np.full((1, ref.EXACT_COLUMNS), -128, np.int8)
    t = np.ones((2, ref.EXACT_COLUMNS), np.int8)
    t[1, ::2] = 0
    assert ref.integer_product(q, t)[0].tolist() == [-128 * ref.EXACT_COLUMNS, -64 * ref.EXACT_COLUMNS]
    with pytest.raises(ValueError, match="would not be exact"):
        ref.integer_product(np.ones((1, ref.EXACT_COLUMNS + 1), np.int8), np.ones((1, ref.EXACT_COLUMNS + 1), np.int8))


@given(st.integers(1, 6), st.integers(0, 8), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(0, 99))
def test_attention_by_the_formula(M: int, past: int, heads: tuple[int, int], seed: int) -> None:
    """Against one query and one head at a time, in float64."""
    (H, G), D, T = heads, 6, past + M
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((M, H, D), (T, G, D), (T, G, D)))
    out = ref.attend(q, k, v)
    for m in range(M):
        for h in range(H):
            seen = past + m + 1
            scores = k[:seen, h * G // H].astype(np.float64) @ q[m, h] / np.sqrt(D)
            weights = np.exp(scores - scores.max())
            expected = weights @ v[:seen, h * G // H] / weights.sum()
            assert np.allclose(out[m, h], expected, rtol=1e-5, atol=1e-6)


def config_with(**changes: object) -> ModelConfig:
    _, raw = PRESETS["tiny-llama"]
    return ModelConfig.from_hf(raw | {"quantization_config": {"quant_method": "bitnet"}} | changes)


def test_rope_linear_scaling() -> None:
    """Positions divided by the factor."""
    positions = np.arange(0, 40, 4)
    scaled = ref.rope_tables(config_with(rope_scaling={"type": "linear", "factor": 4.0}), positions)
    plain = ref.rope_tables(config_with(), positions // 4)
    assert np.allclose(scaled, plain, atol=1e-5)


def test_rope_llama3_scaling() -> None:
    """Waves longer than the original context are stretched by the factor, those a quarter of it or less are kept."""
    config = config_with(rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, head_dim=64)
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    cos, sin = ref.rope_tables(config, np.array([1]))
    angles = np.arctan2(sin[0, :32], cos[0, :32])
    wavelength = 2 * np.pi / plain
    long, short = wavelength > 8192, wavelength < 8192 / 4
    assert long.any() and short.any() and not (long | short).all()
    assert np.allclose(angles[long], plain[long] / 32, rtol=1e-4, atol=1e-9)
    assert np.allclose(angles[short], plain[short], rtol=1e-4)
    blended = ~(long | short)
    assert (angles[blended] < plain[blended]).all() and (angles[blended] > plain[blended] / 32).all()


def test_yarn() -> None:
    """Against the formula of transformers, `_compute_yarn_parameters`, in float64."""
    theta, D, factor, original = 1e6, 64, 4.0, 16384
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    config = config_with(rope_scaling=scaling, rope_theta=theta, head_dim=D)
    plain = theta ** -(np.arange(0, D, 2) / D)
    first, last = (D * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(theta)) for turns in (32, 1))
    ramp = np.clip((np.arange(D // 2) - np.floor(first)) / (np.ceil(last) - np.floor(first)), 0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    assert (ramp == 0).any() and (ramp == 1).any() and ((0 < ramp) & (ramp < 1)).any()
    positions = np.array([0, 1, 7, 300])
    cos, sin = ref.rope_tables(config, positions)
    angles = positions[:, None] * np.concatenate([frequencies, frequencies])
    factor_of_attention = 0.1 * np.log(factor) + 1
    assert np.abs(cos - np.cos(angles) * factor_of_attention).max() < 1e-4  # angles of 300 in float32
    assert np.abs(sin - np.sin(angles) * factor_of_attention).max() < 1e-4


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 300), st.booleans(), st.integers(0, 99))
def test_a_linear_with_group_scales(M: int, N: int, K: int, bias: bool, seed: int) -> None:
    """Against the same activations and weights in float64: float32 rounds each of the few steps of a group."""
    rng = np.random.default_rng(seed)
    groups = -(-K // 128)
    t, m = rng.integers(-1, 2, (N, K)).astype(np.int8), rng.uniform(0.01, 2, (N, groups)).astype(np.float32)
    x, b = rng.standard_normal((M, K)).astype(np.float32), rng.standard_normal(N).astype(np.float32) if bias else None
    y = ref.GroupedLinear(t, m, b)(x)
    q, d = quantize_groups(x)
    columns = np.arange(K) // 128
    exact = (q * d.astype(float)[:, columns]) @ (t * m[:, columns]).T
    size = (abs(q.astype(int)) * d.astype(float)[:, columns]) @ (abs(t) * m[:, columns]).T
    tolerance = (groups + 3) * 2.0**-23 * (size + (0 if b is None else abs(b)))
    assert (np.abs(y - (exact if b is None else exact + b)) <= tolerance).all()


VARIANTS = {
    "1bitllm": ("tiny-1bitllm", "online", {}),
    "llama": ("tiny-llama", "bitlinear", {}),
    "bias": ("tiny-llama", "offline", {"attention_bias": True, "mlp_bias": True}),
    "dense": ("tiny-llama", "bitlinear", {"quantization_config": {"modules_to_not_convert": ["lm_head", "down_proj"]}}),
    "linear-norm": ("tiny-llama", "online", {"quantization_config": {"use_rms_norm": True}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", ["bf16", "int8"])
def test_every_supported_class_runs(variant: str, head: str, tmp_path: Path) -> None:
    """Against the same model computed straight from the Hugging Face tensors in float64, without quantised sums."""
    name, form, changes = VARIANTS[variant]
    _, config = PRESETS[name]
    make_checkpoint(tmp_path / "source", config | changes, form, seed=3)
    convert(tmp_path / "source", tmp_path / "packed", head)
    model = Model(open_packed(tmp_path / "packed"))
    logits = run(model, np.arange(9), Cache(model.config, 9))
    assert logits.shape == (9, model.config.vocab_size) and np.isfinite(logits).all() and logits.std() > 0
    source = HuggingFaceCheckpoint(tmp_path / "source")
    down = source.config.is_ternary("model.layers.0.mlp.down_proj")
    x = np.random.default_rng(0).standard_normal((3, model.config.intermediate_size), np.float32)
    if down:
        linear = source.take_linear("model.layers.0.mlp.down_proj", *_down_shape(model), model.config.mlp_bias)
        if linear.norm is not None:
            normed = linear.norm * (x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6))
        else:
            normed = x.astype(np.float64)
        s = 127 / np.abs(normed).max(axis=1, keepdims=True)
        expected = np.rint(normed * s) @ linear.t.T.astype(np.float64) * linear.m / s
        expected += 0 if linear.bias is None else linear.bias
        tolerance = 1e-5 if linear.norm is None else 2e-2  # the norm's own rounding can flip a q: one step in 127
    else:
        weight = source.take_floats("model.layers.0.mlp.down_proj.weight", _down_shape(model))
        expected, tolerance = x @ weight.T.astype(np.float64), 1e-5
    out = model.layers[0].down(x)
    assert np.abs(out - expected).max() < tolerance * np.abs(expected).max()


def _down_shape(model: Model) -> tuple[int, int]:
    return model.config.hidden_size, model.config.intermediate_size
