"""config.json -> ModelConfig: what is understood, what is refused, and that nothing else ever comes out."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.config import ModelConfig, RopeScaling
from bitnet_numba.errors import ConfigError
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
    assert config.sub_norms == (raw["architectures"] != ["LlamaForCausalLM"])
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
    config = read(quantization_config=OFFLINE | {"modules_to_not_convert": ["model.layers.1", "down_proj"]})
    assert config.is_ternary("lm_head"), "an explicit list replaces the default"
    assert not config.is_ternary("model.layers.1.mlp.up_proj")
    assert config.is_ternary("model.layers.11.mlp.up_proj"), "a prefix ends at a module border"
    assert not config.is_ternary("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"sliding_window": 4096}, "'sliding_window' = 4096"),
        ({"quantization_config": None}, "no quantization_config"),
        ({"quantization_config": []}, "must be a JSON object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        ({"quantization_config": OFFLINE | {"bits": 4}}, "'bits' = 4"),
        ({"quantization_config": OFFLINE | {"linear_class": "x"}}, "linear_class"),
        ({"quantization_config": OFFLINE | {"quantization_mode": "x"}}, "quantization_mode"),
        ({"quantization_config": OFFLINE | {"modules_to_not_convert": "lm_head"}}, "must be a list"),
        ({"quantization_config": OFFLINE | {"modules_to_not_convert": ["("]}}, "not a module name or pattern"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "type 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor must be a positive"),
        ({"rope_scaling": LLAMA3_ROPE | {"beta_fast": 3}}, "'beta_fast'"),
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
        ({"rope_theta": 10**400}, "rope_theta is out of range"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"weight_bits": 4}, "weight_bits = 4"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_harmless_keys_pass() -> None:
    read(use_cache=True, transformers_version="5.0", auto_map={"AutoConfig": "x"}, sliding_window=None, new_key=False)


keys = st.sampled_from([*BASE, "rope_scaling", "rope_parameters", "head_dim", "mlp_bias"]) | st.text(max_size=12)
quantization_keys = st.sampled_from([*OFFLINE, "modules_to_not_convert", "use_rms_norm", "rms_norm_eps"])


@given(st.dictionaries(keys, json_values, max_size=4), st.dictionaries(quantization_keys, json_values, max_size=3))
def test_fuzzed_values(changes: dict[str, Any], quantization: dict[str, Any]) -> None:
    """Whatever stands in a config.json: a valid configuration or a ConfigError of one line."""
    raw = copy.deepcopy(BASE) | changes
    if isinstance(raw["quantization_config"], dict):
        raw["quantization_config"] |= quantization
    try:
        config = ModelConfig.from_hf(json.loads(json.dumps(raw)))
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        for group in ("qkv", "o", "gate_up", "down"):
            segments, K = config.group_shape(group)
            assert min(segments) >= 1 and K >= 1
