"""ModelConfig: a model's sizes and options, translated from Hugging Face's config.json, validated at construction."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bitnet_numba.errors import ConfigError

WeightFormat = Literal["online", "offline", "bitlinear"]
Activation = Literal["relu2", "silu"]

# Linears of a layer that read the same input are stored as one matrix of several segments, with one scale each.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}

# Keys of config.json without effect on inference.
_WITHOUT_EFFECT = frozenset(
    """architectures attention_dropout auto_map bitnet_numba bos_token_id dtype eos_token_id hidden_dropout id2label
    initializer_range label2id max_length model_type name_or_path pad_token_id pretraining_tp torch_dtype
    transformers_version use_cache _name_or_path _from_model_config unsloth_version unsloth_fixed
    _attn_implementation_autoset attn_implementation _attn_implementation chunk_size_feed_forward diversity_penalty
    early_stopping length_penalty min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    encoder_no_repeat_ngram_size output_attentions output_hidden_states output_scores problem_type repetition_penalty
    return_dict return_dict_in_generate temperature top_k top_p typical_p tie_encoder_decoder tokenizer_class
    torchscript""".split()
)
_USED = frozenset(
    """attention_bias head_dim hidden_act hidden_size input_bits intermediate_size max_position_embeddings mlp_bias
    num_attention_heads num_hidden_layers num_key_value_heads quantization_config rms_norm_eps rope_parameters
    rope_scaling rope_theta tie_word_embeddings vocab_size weight_bits""".split()
)
_QUANTIZATION_KEYS = frozenset(
    "quant_method linear_class quantization_mode use_rms_norm rms_norm_eps modules_to_not_convert".split()
)
_ARCHITECTURES = ("BitNetForCausalLM", "BitnetForCausalLM", "LlamaForCausalLM")
_MAX_SIZE = 1 << 24  # upper limit of every size in a config


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for longer contexts; `linear` uses only `factor`."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A BitNet model's sizes and options. Raises ConfigError, naming the value, if one is invalid."""

    vocab_size: int
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the feed-forward
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # key and value heads; query head i reads kv head i // (num_heads // num_kv_heads)
    head_dim: int
    max_context: int  # in tokens, prompt and answer together
    rms_norm_eps: float
    rope_theta: float
    activation: Activation
    sub_norms: bool  # BitNet: RMSNorm before o_proj and down_proj
    tied: bool  # the LM head is the embedding
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down
    rope_scaling: RopeScaling | None = None
    linear_norm: bool = False  # each quantised linear applies an RMSNorm of its own to its input
    linear_norm_eps: float = 1e-6
    weight_format: WeightFormat = "online"  # of the Hugging Face checkpoint, see checkpoint/huggingface.py
    dense: tuple[str, ...] | None = field(default=None)  # modules_to_not_convert

    def __post_init__(self) -> None:
        for (
            name
        ) in "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_context".split():
            if not 1 <= getattr(self, name) <= _MAX_SIZE:
                raise ConfigError(f"config: {name} = {getattr(self, name)} is out of range")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"config: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ConfigError(f"config: head_dim = {self.head_dim} is odd; rotary embedding needs pairs")
        for name in ("rms_norm_eps", "linear_norm_eps", "rope_theta"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"config: {name} = {getattr(self, name)} must be a positive number")

    @property
    def q_size(self) -> int:
        """Total width of the query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Total width of the key heads, and of the value heads."""
        return self.num_kv_heads * self.head_dim

    def group_shape(self, group: str) -> tuple[tuple[int, ...], int]:
        """Rows of each segment and columns of a group's matrix: ((rows, ...), K)."""
        shapes = {
            "qkv": ((self.q_size, self.kv_size, self.kv_size), self.hidden_size),
            "o": ((self.hidden_size,), self.q_size),
            "gate_up": ((self.intermediate_size, self.intermediate_size), self.hidden_size),
            "down": ((self.hidden_size,), self.intermediate_size),
        }
        return shapes[group]

    def group_bias(self, group: str) -> bool:
        """Whether the linears of a group have a bias."""
        return self.attention_bias if group in ("qkv", "o") else self.mlp_bias

    def is_ternary(self, module: str) -> bool:
        """Whether a linear is quantised, by its full Hugging Face name such as model.layers.0.mlp.up_proj."""
        if self.dense is None:
            return module != "lm_head"
        for pattern in self.dense:
            # As in transformers: a suffix, or a regular expression for a prefix that ends at a module boundary.
            if module.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module):
                return False
        return True

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "ModelConfig":
        """Translates a parsed Hugging Face config.json. ConfigError names a missing or unsupported key."""
        return _from_hf(raw)


class _Keys:
    """Typed access to a parsed JSON object; every error is a ConfigError that names the key."""

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where} must be a JSON object")
        self.raw = raw
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.where}: {key} must be an integer, not {_short(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.where}: {key} must be a number, not {_short(value)}")
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{self.where}: {key} is out of range") from None

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} must be true or false, not {_short(value)}")
        return value

    def refuse_unknown(self, known: frozenset[str]) -> None:
        for key, value in self.raw.items():
            if key not in known and value not in (None, False, 0, "", [], {}):
                raise ConfigError(f"{self.where}: key {_short(key)} = {_short(value)} is not supported")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    keys = _Keys(raw, "config.json")
    keys.refuse_unknown(_WITHOUT_EFFECT | _USED)
    architectures = keys.get("architectures", [])
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in _ARCHITECTURES:
        one_of = ", ".join(_ARCHITECTURES)
        raise ConfigError(f"config.json: architectures = {_short(architectures)} is not supported (one of {one_of})")
    architecture = architectures[0]
    original = architecture == "BitnetForCausalLM"  # the first release: online format, silu
    for key, supported in (("weight_bits", (1, 2)), ("input_bits", (8,))):
        if keys.get(key) is not None and keys.get(key) not in supported:
            raise ConfigError(f"config.json: {key} = {_short(keys.get(key))} is not supported")

    heads, hidden = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    if "head_dim" not in raw and (heads < 1 or hidden % heads):
        raise ConfigError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    activation = keys.get("hidden_act", "silu")
    if activation not in ("relu2", "silu"):
        raise ConfigError(f"config.json: hidden_act = {_short(activation)} is not supported (relu2 or silu)")
    theta, scaling = _rope(keys)
    weight_format, linear_norm, linear_norm_eps, dense = _quantization(keys, original)
    return ModelConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", hidden // max(heads, 1)),
        max_context=keys.integer("max_position_embeddings"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=activation,
        sub_norms=architecture != "LlamaForCausalLM",
        tied=keys.boolean("tie_word_embeddings", False),
        attention_bias=keys.boolean("attention_bias", False),
        mlp_bias=keys.boolean("mlp_bias", False),
        linear_norm=linear_norm,
        linear_norm_eps=linear_norm_eps,
        weight_format=weight_format,
        dense=dense,
    )


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from the old keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    name = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    rope = _Keys(keys.get(name, {}), f"config.json: {name}")
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        rope.refuse_unknown(frozenset(("rope_theta", "rope_type", "type")))
        return theta, None
    if kind == "linear":
        known = {"rope_theta", "rope_type", "type", "factor"}
        scaling = RopeScaling("linear", rope.number("factor"))
    elif kind == "llama3":
        known = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        known |= {"rope_theta", "rope_type", "type", "factor"}
        scaling = RopeScaling(
            "llama3",
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        )
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if not (0 < low < high and math.isfinite(high) and 1 <= scaling.original_context <= _MAX_SIZE):
            raise ConfigError(f"{rope.where}: the llama3 factors contradict each other")
    else:
        raise ConfigError(f"{rope.where}: type {_short(kind)} is not supported (default, linear or llama3)")
    if not (math.isfinite(scaling.factor) and scaling.factor > 0):
        raise ConfigError(f"{rope.where}: factor must be a positive number")
    rope.refuse_unknown(frozenset(known))
    return theta, scaling


def _quantization(keys: _Keys, original: bool) -> tuple[WeightFormat, bool, float, tuple[str, ...] | None]:
    """Weight format, linear_norm, its epsilon and modules_to_not_convert, from quantization_config."""
    if keys.get("quantization_config") is None:
        if original:
            return "online", False, 1e-6, None
        raise ConfigError("config.json: no quantization_config, so this is not a BitNet checkpoint")
    quantization = _Keys(keys.get("quantization_config"), "config.json: quantization_config")
    quantization.refuse_unknown(_QUANTIZATION_KEYS)
    method = quantization.get("quant_method", "bitnet")
    linear_class = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    if method != "bitnet":
        raise ConfigError(f"{quantization.where}: quant_method {_short(method)} is not supported (bitnet)")
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise ConfigError(f"{quantization.where}: linear_class {_short(linear_class)} is not supported")
    if mode not in ("online", "offline"):
        raise ConfigError(f"{quantization.where}: quantization_mode {_short(mode)} is not supported")
    weight_format: WeightFormat = "bitlinear"  # this class is always packed, whatever the mode is
    if linear_class == "autobitlinear":
        weight_format = "online" if mode == "online" else "offline"
    dense = quantization.get("modules_to_not_convert")
    if dense is not None:
        if not isinstance(dense, list) or not all(isinstance(pattern, str) for pattern in dense):
            raise ConfigError(f"{quantization.where}: modules_to_not_convert must be a list of names")
        for pattern in dense:
            try:
                re.compile(rf"(?:{pattern})")
            except (re.error, OverflowError, RecursionError):
                raise ConfigError(f"{quantization.where}: {_short(pattern)} is not a module name or pattern") from None
    return (
        weight_format,
        quantization.boolean("use_rms_norm", False),
        quantization.number("rms_norm_eps", 1e-6),
        None if dense is None else tuple(dense),
    )
