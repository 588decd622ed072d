"""config.json -> ModelConfig: what is understood, what is refused, and that nothing else ever comes out."""

import copy
import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.config import EMBEDDING_CLASSES, MAX_COLUMNS, PLAIN_CLASSES, ModelConfig, config_notes
from bitnet_numba.config_keys import HARMLESS, QUANTIZATION_HARMLESS, QUANTIZATION_USED, REFUSED, ROPE_USED, USED
from bitnet_numba.config_rope import RopeScaling
from bitnet_numba.errors import ConfigError
from bitnet_numba.reference.model import EXACT_COLUMNS
from tests.strategies import json_values
from tools.make_checkpoint import LLAMA3_ROPE, PRESETS

ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
OFFLINE = ONLINE | {"quantization_mode": "offline"}
BASE: dict[str, Any] = PRESETS["2b-4t"][1] | {"quantization_config": OFFLINE}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(BASE | changes)


def test_2b4t() -> None:
    config = read()
    assert (config.hidden_size, config.num_layers, config.head_dim) == (2560, 30, 128)
    assert (config.activation, config.sub_norms, config.tied, config.weight_format) == ("relu2", True, True, "offline")
    assert config.group_shape("qkv") == ((2560, 640, 640), 2560)
    assert config.group_shape("gate_up") == ((6912, 6912), 2560)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    _, raw = PRESETS[name]
    config = ModelConfig.from_hf(raw | {"quantization_config": {"quant_method": "bitnet"}})
    assert config.sub_norms == (raw["architectures"][0] not in (*PLAIN_CLASSES, *EMBEDDING_CLASSES))
    assert config.head_dim == raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])


def test_first_spelling_needs_no_quantization_config() -> None:
    _, raw = PRESETS["3b"]
    config = ModelConfig.from_hf(raw | {"weight_bits": 1, "input_bits": 8})
    assert config.weight_format == "online" and config.head_dim == 100 and config.activation == "silu"


@pytest.mark.parametrize(
    ("quantization", "form"),
    [
        ({}, "bitlinear"),
        ({"quantization_mode": "online"}, "bitlinear"),
        ({"linear_class": "autobitlinear"}, "offline"),
        (ONLINE, "online"),
        (OFFLINE, "offline"),
    ],
)
def test_weight_formats(quantization: dict[str, Any], form: str) -> None:
    assert read(quantization_config={"quant_method": "bitnet"} | quantization).weight_format == form


def test_rope_old_and_new_keys() -> None:
    assert read(rope_theta=1234.5).rope_theta == 1234.5
    new = {key: value for key, value in BASE.items() if key != "rope_theta"}
    config = ModelConfig.from_hf(new | {"rope_parameters": {"rope_theta": 99.0, "rope_type": "default"}})
    assert config.rope_theta == 99.0 and config.rope_scaling is None
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == RopeScaling("linear", 2.0)
    assert read(rope_scaling=LLAMA3_ROPE).rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    config = ModelConfig.from_hf(new | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}})
    assert config.rope_theta == 5e5 and config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


def test_modules_to_not_convert() -> None:
    assert not read().is_ternary("lm_head")
    assert read().is_ternary("model.layers.0.mlp.up_proj")
    config = read(quantization_config=OFFLINE | {"modules_to_not_convert": ["lm_head", "down_proj"]})
    assert not config.is_ternary("lm_head") and not config.is_ternary("model.layers.0.mlp.down_proj")
    assert config.is_ternary("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("patterns", [[], ["model.embed_tokens"], ["lm_head.weight"], ["down_proj"]])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", [ONLINE, OFFLINE, {"quant_method": "bitnet"}])
def test_a_quantised_head_is_refused(patterns: list[str], tied: bool, quantization: dict[str, Any]) -> None:
    """In transformers an explicit list replaces the default, which spares the LM head, tied or not."""
    with pytest.raises(ConfigError, match="without lm_head quantises the LM head"):
        read(tie_word_embeddings=tied, quantization_config=quantization | {"modules_to_not_convert": patterns})


def class_alone(architecture: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({"architectures": [architecture], "quantization_config": ONLINE} | changes)


def test_absent_keys_take_the_defaults_of_the_class() -> None:
    config = class_alone("BitNetForCausalLM")
    assert (config.activation, config.rope_theta, config.num_kv_heads, config.rms_norm_eps) == ("relu2", 5e5, 5, 1e-5)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (128256, 2560, 6912)
    assert (config.num_layers, config.num_heads, config.head_dim, config.max_context) == (30, 20, 128, 2048)
    assert not config.tied and not config.attention_bias
    for architecture in ("LlamaForCausalLM", "BitnetForCausalLM"):
        config = class_alone(architecture)
        assert (config.activation, config.rope_theta, config.rms_norm_eps) == ("silu", 1e4, 1e-6)
        assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 11008)
        assert (config.num_layers, config.num_heads, config.num_kv_heads, config.max_context) == (32, 32, 32, 2048)
    assert class_alone("LlamaForCausalLM", num_attention_heads=8).num_kv_heads == 8
    assert class_alone("LlamaForCausalLM", hidden_act="swish") == class_alone("LlamaForCausalLM")


def test_null_is_not_always_absent() -> None:
    assert class_alone("BitNetForCausalLM", num_key_value_heads=None).num_kv_heads == 20
    assert class_alone("BitNetForCausalLM", head_dim=None).head_dim == 128
    with pytest.raises(ConfigError, match="hidden_size must be an integer, not null"):
        class_alone("BitNetForCausalLM", hidden_size=None)


def test_the_class_may_come_from_model_type() -> None:
    raw = {key: value for key, value in BASE.items() if key != "architectures"}
    assert ModelConfig.from_hf(raw).sub_norms and config_notes(raw) == []
    assert not ModelConfig.from_hf(raw | {"model_type": "llama", "architectures": []}).sub_norms
    with pytest.raises(ConfigError, match="architectures = null is not supported"):
        ModelConfig.from_hf(raw | {"model_type": "mamba"})
    (note,) = config_notes(BASE | {"model_type": "llama"})
    assert note == "config.json: read as BitNetForCausalLM, although model_type = 'llama'"


def test_only_llama_has_a_bias_in_its_feed_forward() -> None:
    assert class_alone("LlamaForCausalLM", mlp_bias=True).mlp_bias
    assert not class_alone("BitNetForCausalLM", mlp_bias=True).mlp_bias


def test_rope_scaling_replaces_rope_parameters() -> None:
    parameters = {"rope_type": "default", "rope_theta": 77.0}
    linear = {"type": "linear", "factor": 2.0}
    both: dict[str, Any] = {"rope_scaling": linear, "rope_parameters": parameters}
    assert read(**both, rope_theta=5.0).rope_theta == 5.0, "the base in rope_parameters goes with the rest of it"
    assert class_alone("LlamaForCausalLM", **both).rope_theta == 1e4
    assert class_alone("LlamaForCausalLM", **both).rope_scaling == RopeScaling("linear", 2.0)
    assert read(rope_scaling=linear | {"rope_theta": 9.0}, rope_parameters=parameters).rope_theta == 9.0
    assert read(rope_scaling={}, rope_parameters=parameters, rope_theta=5.0).rope_theta == 77.0
    assert read(rope_parameters={"rope_type": "default"}, rope_theta=5.0).rope_theta == 5.0
    assert read(rope_scaling={"type": "linear", "rope_type": "default", "factor": 2.0}).rope_scaling is None
    without = {key: value for key, value in LLAMA3_ROPE.items() if key != "original_max_position_embeddings"}
    assert read(rope_scaling=without) == read(rope_scaling=without | {"original_max_position_embeddings": 4096})


@pytest.mark.parametrize(
    "changes",
    [
        {"is_bitnet_config": True, "rope_interleaved": False},
        {"quantization_config": OFFLINE | {"is_bitnet_config": True, "bits": 2, "activation": "swiglu"}},
        {"partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 30, "task_specific_params": {"a": 1}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 1.0}},
        {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 28},
        {"sliding_window": 4096, "activation": "swiglu", "bits": 2},
        {"logit_scale": 1.0, "embedding_multiplier": 1, "final_logit_softcapping": None, "num_experts": 0},
        {"no_rope_layers": [1] * 30, "qk_norm": False, "attention_chunk_size": None},
        {"use_cache": True, "transformers_version": "5.0", "auto_map": {"AutoConfig": "x"}, "new_key": False},
    ],
)
def test_harmless_keys_pass_in_silence(changes: dict[str, Any]) -> None:
    assert read(**changes) == read() and config_notes(BASE | changes) == []


def test_unknown_keys_are_noted() -> None:
    changes: dict[str, Any] = {"mood": "fine", "rope_scaling": LLAMA3_ROPE | {"attn_scale": 3}}
    changes |= {"x" * 500: [[[1] * 999] * 9] * 9, "\x1b[31m": "a\nb", "quantization_config": OFFLINE | {"group": 128}}
    read(**changes)
    (note,) = config_notes(BASE | changes)
    assert "mood = 'fine'" in note and "rope_scaling: attn_scale = 3" in note and "group = 128" in note
    assert len(note) < 400 and note.isprintable()
    (note,) = config_notes(BASE | {f"key{i}": i + 1 for i in range(50)})
    assert note.endswith("key9 = 10 and 40 more")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 4095),
        ("sliding_window", "4096"),
        ("attention_chunk_size", 64),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("logit_scale", 0.0625),
        ("attention_multiplier", 0.0078125),
        ("embedding_multiplier", 12.0),
        ("scale_depth", 1.4),
        ("final_logit_softcapping", 30.0),
        ("qk_norm", True),
        ("num_experts", 8),
        ("num_local_experts", [8]),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("rope_interleaved", True),
        ("clip_qkv", 8),
        ("per_layer_config", {"0": {"num_attention_heads": 1}}),
        ("activation", "gelu"),
    ],
)
def test_keys_that_change_the_arithmetic_are_refused(key: str, value: Any) -> None:
    """With the key, its value and what it would change."""
    with pytest.raises(ConfigError, match=rf"config.json: {key} = .* is not supported: .*(would|not all)"):
        read(**{key: value})


def test_no_key_is_in_two_lists() -> None:
    assert not (HARMLESS & USED or HARMLESS & set(REFUSED) or USED & set(REFUSED))


def test_sizes_that_no_backend_computes_exactly() -> None:
    assert MAX_COLUMNS == EXACT_COLUMNS
    read(intermediate_size=MAX_COLUMNS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "['GPT2LMHeadModel'] is not supported (one of BitNetForCausalLM, "),
        ({"architectures": ["MiniCPMForCausalLM"]}, "logits of MiniCPM (BitCPM4) are missing here"),
        ({"architectures": ["Qwen3_5ForConditionalGeneration"]}, "gated delta net layers of Qwen3.5 (Bonsai 27B) are"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_hidden_layers": 1 << 24}, "num_hidden_layers = 16777216 is out of range (1 to 4096)"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0 is out of range"),
        ({"intermediate_size": MAX_COLUMNS + 1}, "intermediate_size = 131073 is out of range"),
        ({"head_dim": 8192}, "20 heads of 8192 are over 131072 columns"),
        ({"quantization_config": None}, "no quantization_config"),
        ({"quantization_config": []}, "must be a JSON object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq'"),
        ({"quantization_config": OFFLINE | {"bits": 4}}, "bits = 4"),
        ({"quantization_config": OFFLINE | {"linear_class": "x"}}, "linear_class"),
        ({"quantization_config": OFFLINE | {"quantization_mode": "x"}}, "quantization_mode"),
        ({"quantization_config": OFFLINE | {"modules_to_not_convert": "lm_head"}}, "must be a list"),
        ({"quantization_config": OFFLINE | {"modules_to_not_convert": ["("]}}, "not a module name or pattern"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1}}, "mscale = 1 is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}, "beta_fast = 1 is below"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope_type = 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor = -1 must be a positive"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs from layer to layer"),
        ({"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 1}, "contradict each other"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 7}, "not a multiple"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"head_dim": 127}, "head_dim = 127 is odd"),
        ({"vocab_size": -5}, "vocab_size = -5 is out of range"),
        ({"vocab_size": "many"}, "vocab_size must be an integer, not 'many'"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"num_hidden_layers": 1e3}, "num_hidden_layers must be an integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps = 1e-60 is out of range"),
        ({"rope_theta": float("inf")}, "rope_theta = inf must be a positive number"),
        ({"rope_theta": 10**400}, " is out of range"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"weight_bits": 4}, "weight_bits = 4"),
        ({"intermediate_size": None}, "intermediate_size must be an integer, not null"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


nasty = st.sampled_from([None, True, -1, 0, 0.5, 1e-60, 1 << 24, 10**400, math.inf, math.nan, "", "\n\x1b[1m", [], {}])
values = json_values | nasty | st.builds(lambda depth: json.loads("[" * depth + "]" * depth), st.integers(1, 300))


def some_of(names: Iterable[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(names)) | st.text(max_size=12), values, max_size=3)


@given(
    some_of(USED | set(REFUSED)),
    some_of(HARMLESS),
    some_of(QUANTIZATION_USED | QUANTIZATION_HARMLESS),
    some_of(ROPE_USED),
    st.sampled_from(["rope_scaling", "rope_parameters"]),
)
def test_fuzzed_values(
    used: dict[str, Any], harmless: dict[str, Any], quantization: dict[str, Any], rope: dict[str, Any], name: str
) -> None:
    """Whatever stands in a config.json: a valid configuration, or a ConfigError of one line."""
    raw = copy.deepcopy(BASE) | {name: LLAMA3_ROPE | rope} | harmless | used
    if isinstance(raw["quantization_config"], dict):
        raw["quantization_config"] |= quantization
    try:
        config = ModelConfig.from_hf(json.loads(json.dumps(raw)))
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 400
    else:
        for group in ("qkv", "o", "gate_up", "down"):
            segments, K = config.group_shape(group)
            assert min(segments) >= 1 and 1 <= K <= MAX_COLUMNS
        assert all(note.isprintable() and len(note) < 2000 for note in config_notes(raw))


QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


def test_qwen3() -> None:
    """Norms of queries and keys, heads of any size; without quantization_config, weights are found to be ternary."""
    config = ModelConfig.from_hf(QWEN3)
    assert config.qk_norm and not config.sub_norms and config.tied and not config.attention_bias
    assert (config.q_size, config.kv_size, config.group_scales) == (128, 64, True)
    defaults = class_alone("Qwen3ForCausalLM")
    assert (defaults.head_dim, defaults.num_kv_heads, defaults.max_context) == (128, 32, 32768)
    assert not class_alone("LlamaForCausalLM").group_scales and not class_alone("LlamaForCausalLM").qk_norm


def test_yarn() -> None:
    """As transformers reads it; see test_model for what it computes."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384}
    found = ModelConfig.from_hf(QWEN3 | {"rope_scaling": scaling}).rope_scaling
    assert found == RopeScaling("yarn", 4.0, 1.0, 4.0, 16384, 32.0, 1.0, 0.1 * math.log(4) + 1)
    scaling |= {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "truncate": True}
    found = ModelConfig.from_hf(QWEN3 | {"rope_scaling": scaling}).rope_scaling
    assert found == RopeScaling("yarn", 4.0, 1.0, 4.0, 16384, 16.0, 2.0, 1.5)
    with pytest.raises(ConfigError, match="rope_theta = 1 is not above 1"):
        ModelConfig.from_hf(QWEN3 | {"rope_scaling": scaling, "rope_theta": 1})


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"group_size": 128, "bits": 4}, r"bits = 4 is not supported \(one of 2\)"),
        ({"group_size": 128, "bits": "2"}, "bits = '2' is not supported"),
        ({"group_size": 16, "bits": 2}, r"group_size = 16 is not supported \(one of 32, 64, 128\)"),
        ({"group_size": None, "bits": 2}, "group_size = null is not supported"),
        ({"group_size": 128, "bits": 2, "mode": "mxfp4"}, "mode = 'mxfp4' is not supported"),
        (
            {"group_size": 128, "bits": 2, "model.layers.0.mlp.up_proj": {"bits": 8}},
            "up_proj is quantised in its own way",
        ),
    ],
)
def test_mlx(quantization: dict[str, Any], reason: str) -> None:
    good = {"group_size": 64, "bits": 2, "mode": "affine"}
    assert ModelConfig.from_hf(QWEN3 | {"quantization": good, "quantization_config": good}).weight_format == "mlx"
    assert ModelConfig.from_hf(QWEN3 | {"quantization": good}).group_scales
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.from_hf(QWEN3 | {"quantization": quantization})
    with pytest.raises(ConfigError, match="of BitNetForCausalLM are not supported"):
        ModelConfig.from_hf(BASE | {"quantization_config": good})
