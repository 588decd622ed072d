"""What config.json says of Gemma 3's block, as transformers reads it."""

from typing import Any

import pytest

from bitnet_numba.config import ModelConfig, config_notes
from bitnet_numba.config_rope import LocalAttention
from bitnet_numba.errors import ConfigError

LOCAL, FULL = "sliding_attention", "full_attention"
GEMMA = {
    "architectures": ["Gemma3TextModel"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 256,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 7,
    "sliding_window": 512,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "use_bidirectional_attention": False,
}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(GEMMA | changes)


def test_block() -> None:
    config = read()
    assert config.gemma and config.embeds and config.tied and config.qk_norm and config.linear_norm
    assert not config.sub_norms and not config.group_scales
    assert (config.activation, config.embedding_scale, config.rope_theta) == ("gelu", 16.0, 1e6)
    assert config_notes(GEMMA) == []
    assert not ModelConfig.from_hf({"architectures": ["Qwen3Model"]}).gemma


def test_layers_with_a_window() -> None:
    pattern = (True,) * 5 + (False, True)  # each sixth layer has none
    assert read().local == LocalAttention(512, 1e4, pattern)
    assert read(layer_types=[LOCAL if local else FULL for local in pattern]) == read()
    assert read(sliding_window_pattern=2).local == LocalAttention(512, 1e4, (True, False) * 3 + (True,))
    assert [read(sliding_window_pattern=2).window_of(i) for i in (0, 1)] == [512, None]
    assert read(layer_types=[FULL] * 7).local is None and read(layer_types=[FULL] * 7).window_of(0) is None
    without = {key: value for key, value in GEMMA.items() if key != "sliding_window"}
    assert ModelConfig.from_hf(without).local == LocalAttention(4096, 1e4, pattern)  # the class's default


def test_rotary_bases_of_either_version() -> None:
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": None}
    kinds = {FULL: {"rope_type": "default", "rope_theta": 5e5}, LOCAL: {"rope_type": "default", "rope_theta": 2e4}}
    assert read(**old) == read(rope_parameters=kinds)
    assert config_notes(GEMMA | {"rope_parameters": kinds, "_sliding_window_pattern": 6}) == []
    (note,) = config_notes(GEMMA | {"rope_parameters": kinds | {FULL: {"wobble": 3}}})
    assert "without effect here: rope_parameters: full_attention: wobble = 3" in note
    assert (read(**old).rope_theta, read(**old).local) == (5e5, LocalAttention(512, 2e4, read().local.layers))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pre_attn_scalar": 168}, r"query_pre_attn_scalar = 168 is not supported, only head_dim, 64"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu' is not supported"),
        ({"layer_types": [FULL] * 6}, "layer_types = .* is not supported"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types = .* is not supported"),
        ({"sliding_window": 0}, "sliding_window = 0 is out of range"),
        ({"sliding_window": "x"}, "sliding_window must be an integer, not 'x'"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern = 0 must be at least 1"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers = .* is out of range"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "rotary scaling of Gemma3TextModel is not supported",
        ),
        ({"rope_parameters": {FULL: {"rope_type": "linear"}}}, "full_attention: rope_type = 'linear' is not supported"),
        ({"rope_parameters": {FULL: {"type": "linear", "factor": 8.0}}}, "full_attention: rope_type = 'linear' is not"),
        (
            {"rope_parameters": {LOCAL: {"partial_rotary_factor": 0.5}}},
            "sliding_attention: partial_rotary_factor = 0.5",
        ),
        ({"rope_parameters": {FULL: 5}}, "full_attention must be a JSON object, not 5"),
        ({"rope_parameters": {"chunked_attention": {}}}, "differs from layer to layer is not supported"),
        (
            {"rope_parameters": {FULL: {}}, "rope_scaling": {"type": "linear", "factor": 8.0}},
            "rotary scaling of Gemma3TextModel is not supported",
        ),
        ({"use_bidirectional_attention": True}, "tokens would attend to those after them"),
        ({"attn_logit_softcapping": 50.0}, "attention scores would be capped"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)
