"""ModelConfig: a model's sizes and options, translated from Hugging Face's config.json, validated at construction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bitnet_numba.config_keys import (
    CLASS_DEFAULTS,
    GEMMA_USED,
    HARMLESS,
    QUANTIZATION_HARMLESS,
    QUANTIZATION_USED,
    ROPE_USED,
    USED,
    Keys,
    shown,
)
from bitnet_numba.errors import ConfigError
from bitnet_numba.module_patterns import check_patterns, names_module

WeightFormat = Literal["online", "offline", "bitlinear", "floats", "mlx"]
Activation = Literal["relu2", "silu", "gelu"]

# Linears of a layer that read the same input are stored as one matrix of several segments, with one scale each.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}

# Sums of so many products of int8 with ternary are exact in float32: the reference could not check more columns.
MAX_COLUMNS = (1 << 24) // 128
# Upper limits of a model's sizes, far above every published model's, so that a damaged config.json costs nothing.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": MAX_COLUMNS,
    "intermediate_size": MAX_COLUMNS,
    "num_layers": 4096,
    "num_heads": MAX_COLUMNS,
    "num_kv_heads": MAX_COLUMNS,
    "head_dim": MAX_COLUMNS,
    "max_context": 1 << 24,
}

_ARCHITECTURE_OF_TYPE = {"bitnet": "BitNetForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PLAIN_CLASSES = ("LlamaForCausalLM", "Qwen3ForCausalLM")  # of models that are not BitNet, too
GEMMA_CLASS = "Gemma3TextModel"
EMBEDDING_CLASSES = ("Qwen3Model", GEMMA_CLASS)  # without an LM head
_GEMMA_ACTIVATION = "gelu_pytorch_tanh"
_ACTIVATIONS: dict[str, Activation] = {"relu2": "relu2", "silu": "silu", "swish": "silu", _GEMMA_ACTIVATION: "gelu"}


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for longer contexts; `linear` uses only `factor`."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0  # of llama3
    high_freq_factor: float = 4.0
    original_context: int = 8192  # of llama3 and yarn
    beta_fast: float = 32.0  # of yarn
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # of yarn: by what cosines and sines are multiplied


@dataclass(frozen=True)
class LocalAttention:
    """Layers that attend to the last tokens only, as in Gemma 3."""

    window: int  # tokens, the query's own included
    rope_theta: float  # of these layers
    layers: tuple[bool, ...]  # which they are


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
    qk_norm: bool = False  # Qwen3: RMSNorm of each query and key head before rotation
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down
    rope_scaling: RopeScaling | None = None
    linear_norm: bool = False  # each quantised linear applies an RMSNorm of its own to its input
    linear_norm_eps: float = 1e-6
    embeds: bool = False  # an embedding model: its last hidden state is what a text means; it generates nothing
    gemma: bool = False  # norms behind attention and feed-forward, too; the embedding is scaled by sqrt(hidden_size)
    local: LocalAttention | None = None  # layers whose attention has a window
    weight_format: WeightFormat = "online"  # of the Hugging Face checkpoint, see checkpoint/huggingface.py
    dense: tuple[str, ...] | None = field(default=None)  # modules_to_not_convert

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(f"config: {name} = {shown(getattr(self, name))} is out of range (1 to {limit})")
        if self.q_size > MAX_COLUMNS:
            raise ConfigError(f"config: {self.num_heads} heads of {self.head_dim} are over {MAX_COLUMNS} columns")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"config: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ConfigError(f"config: head_dim = {self.head_dim} is odd; rotary embedding needs pairs")
        for name in ("rms_norm_eps", "linear_norm_eps", "rope_theta"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"config: {name} = {getattr(self, name)} must be a positive number")

    @property
    def group_scales(self) -> bool:
        """Whether weights have a scale for each row and 128 columns, and activations one for each token and 128."""
        return self.weight_format in ("floats", "mlx")

    @property
    def embedding_scale(self) -> float:
        """By what rows of the embedding are multiplied."""
        return math.sqrt(self.hidden_size) if self.gemma else 1.0

    def window_of(self, layer: int) -> int | None:
        """How many tokens a layer's queries attend to at most, their own included; None: all before them."""
        return self.local.window if self.local is not None and self.local.layers[layer] else None

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
        return not names_module(self.dense, module)

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "ModelConfig":
        """Translates a parsed Hugging Face config.json. ConfigError names a missing or unsupported key."""
        return _from_hf(raw)


def config_notes(raw: Mapping[str, Any]) -> list[str]:
    """What a user should know about a valid config.json: one line for each of its peculiarities, often none."""
    keys, notes = Keys(raw, ""), []
    architecture, by_type = _architecture(keys), _class_of_type(keys)
    if by_type not in (None, architecture) and architecture not in ("BitnetForCausalLM", *EMBEDDING_CLASSES):
        notes.append(f"config.json: read as {architecture}, although model_type = {shown(keys.get('model_type'))}")
    unknown = keys.unknown(HARMLESS | USED | (GEMMA_USED if architecture == GEMMA_CLASS else frozenset()))
    for name, known in (
        ("quantization_config", QUANTIZATION_HARMLESS | QUANTIZATION_USED),
        (_rope_key(keys), ROPE_USED),
    ):
        unknown += [f"{name}: {key}" for key in Keys(raw.get(name) or {}, "").unknown(known)]
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        notes.append(f"config.json: unknown keys, without effect here: {', '.join(unknown[:10])}{more}")
    return notes


def _from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(raw, "config.json")
    architecture = _architecture(keys)
    gemma, embeds = architecture == GEMMA_CLASS, architecture in EMBEDDING_CLASSES
    keys.refuse_other_arithmetic(GEMMA_USED if gemma else frozenset())
    default = CLASS_DEFAULTS[architecture]
    for key, supported in (("weight_bits", (1, 1.58, 2)), ("bits", (1, 1.58, 2)), ("input_bits", (8,))):
        if keys.get(key) is not None and keys.get(key) not in supported:
            raise ConfigError(f"config.json: {key} = {shown(keys.get(key))} is not supported")

    heads = keys.integer("num_attention_heads", default["num_attention_heads"])
    hidden = keys.integer("hidden_size", default["hidden_size"])
    if keys.get("head_dim", default["head_dim"]) is not None:
        head_dim = keys.integer("head_dim", default["head_dim"])
    elif heads < 1 or hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size {shown(hidden)} is not a multiple of num_attention_heads {shown(heads)}"
        )
    else:
        head_dim = hidden // heads
    kv_heads = default["num_key_value_heads"] or heads
    if "num_key_value_heads" in raw:  # null means as many as query heads, whatever the class
        kv_heads = heads if raw["num_key_value_heads"] is None else keys.integer("num_key_value_heads")
    theta, scaling, local = (*_rope(keys, default), None) if not gemma else _gemma_attention(keys, default, head_dim)
    activation = (
        _GEMMA_ACTIVATION if gemma else keys.choice("hidden_act", default["hidden_act"], ("relu2", "silu", "swish"))
    )
    weight_format, linear_norm, linear_norm_eps, dense = _quantization(keys, architecture)
    config = ModelConfig(
        vocab_size=keys.integer("vocab_size", default["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size", default["intermediate_size"]),
        num_layers=keys.integer("num_hidden_layers", default["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=keys.integer("max_position_embeddings", default["max_position_embeddings"]),
        rms_norm_eps=keys.number("rms_norm_eps", default["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=_ACTIVATIONS[activation],
        sub_norms=architecture not in (*PLAIN_CLASSES, *EMBEDDING_CLASSES),
        qk_norm=embeds or architecture == "Qwen3ForCausalLM",
        tied=keys.boolean("tie_word_embeddings", False) or embeds,
        attention_bias=keys.boolean("attention_bias", False),
        # The other classes' feed-forward has no bias, whatever is written.
        mlp_bias=keys.boolean("mlp_bias", False) and architecture == "LlamaForCausalLM",
        linear_norm=linear_norm,
        linear_norm_eps=linear_norm_eps,
        embeds=embeds,
        gemma=gemma,
        local=local,
        weight_format=weight_format,
        dense=dense,
    )
    if config.is_ternary("lm_head"):
        raise ConfigError(
            "config.json: quantization_config: modules_to_not_convert without lm_head quantises the LM head, "
            "which is not supported"
        )
    return config


def _architecture(keys: Keys) -> str:
    """The model class: what `architectures` names; where it is absent, that of model_type."""
    architectures = keys.get("architectures") or [_class_of_type(keys)]
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in list(CLASS_DEFAULTS):
        one_of = ", ".join(CLASS_DEFAULTS)
        raise ConfigError(
            f"config.json: architectures = {shown(keys.get('architectures'))} is not supported (one of {one_of})"
        )
    return str(architectures[0])


def _class_of_type(keys: Keys) -> str | None:
    model_type = keys.get("model_type")
    return _ARCHITECTURE_OF_TYPE.get(model_type) if isinstance(model_type, str) else None


def _rope(keys: Keys, default: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling. As in transformers, rope_scaling replaces all of rope_parameters unless it is empty."""
    name = _rope_key(keys)
    rope = Keys(keys.get(name) or {}, f"config.json: {name}")
    rope.refuse_other_arithmetic()
    if any(isinstance(value, Mapping) for value in rope.raw.values()):
        raise ConfigError(f"{rope.where}: rotary embedding that differs from layer to layer is not supported")
    theta = (keys if rope.get("rope_theta") is None else rope).number("rope_theta", default["rope_theta"])
    kind = rope.choice("rope_type", rope.get("type", "default"), ("default", "linear", "llama3", "yarn"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    original = rope.integer(
        "original_max_position_embeddings", keys.get("max_position_embeddings", default["max_position_embeddings"])
    )
    elsewhere = keys.get("original_max_position_embeddings", original)  # versions differ in which of the two they read
    if not (1 <= original <= _LIMITS["max_context"] and original == elsewhere):
        raise ConfigError(f"{rope.where}: the original context and the rest contradict each other")
    if kind == "yarn":
        if theta <= 1:
            raise ConfigError(f"{rope.where}: rope_theta = {theta:g} is not above 1, as yarn needs it")
        return theta, _yarn(rope, original)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise ConfigError(f"{rope.where}: the llama3 factors contradict each other")
    return theta, RopeScaling("llama3", rope.number("factor"), low, high, original)


def _gemma_attention(keys: Keys, default: dict[str, Any], head_dim: int) -> tuple[float, None, LocalAttention | None]:
    """Rotary base, no scaling, and the layers with a window, in the form of either version of transformers."""
    keys.choice("hidden_activation", _GEMMA_ACTIVATION, (_GEMMA_ACTIVATION,))
    keys.choice("hidden_act", _GEMMA_ACTIVATION, (_GEMMA_ACTIVATION,))
    if (scalar := keys.number("query_pre_attn_scalar", default["query_pre_attn_scalar"])) != head_dim:
        raise ConfigError(
            f"config.json: query_pre_attn_scalar = {scalar:g} is not supported, only head_dim, {head_dim}"
        )
    theta, local_theta = default["rope_theta"], default["rope_local_base_freq"]
    rope = keys.get("rope_parameters") or {}
    if isinstance(rope, Mapping) and any(isinstance(value, Mapping) for value in rope.values()):
        bases = {}
        for kind in ("full_attention", "sliding_attention"):
            own = Keys(rope.get(kind) or {}, f"config.json: rope_parameters: {kind}")
            own.choice("rope_type", "default", ("default",))
            bases[kind] = own.number("rope_theta", theta if kind == "full_attention" else local_theta)
        theta, local_theta = bases["full_attention"], bases["sliding_attention"]
    else:
        theta, scaling = _rope(keys, default)
        if scaling is not None:
            raise ConfigError(f"config.json: rotary scaling of {GEMMA_CLASS} is not supported")
        local_theta = keys.number("rope_local_base_freq", local_theta)
    count = keys.integer("num_hidden_layers", default["num_hidden_layers"])
    if not 1 <= count <= _LIMITS["num_layers"]:
        return theta, None, None  # which is refused with the other sizes
    kinds = keys.get("layer_types")
    if kinds is None:
        pattern = keys.integer("sliding_window_pattern", default["sliding_window_pattern"])
        if pattern < 1:
            raise ConfigError(f"config.json: sliding_window_pattern = {shown(pattern)} must be at least 1")
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != count
        or any(kind not in ("sliding_attention", "full_attention") for kind in kinds)
    ):
        raise ConfigError(f"config.json: layer_types = {shown(kinds)} is not supported")
    local = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(local):
        return theta, None, None
    window = keys.integer("sliding_window", default["sliding_window"])
    if not 1 <= window <= _LIMITS["max_context"]:
        raise ConfigError(f"config.json: sliding_window = {shown(window)} is out of range")
    return theta, None, LocalAttention(window, local_theta, local)


def _yarn(rope: Keys, original: int) -> RopeScaling:
    """YaRN (Peng et al., 2023) with the defaults of transformers."""
    for key, supported in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if rope.get(key, supported) != supported:
            raise ConfigError(f"{rope.where}: {key} = {shown(rope.get(key))} is not supported")
    factor = rope.number("factor")
    fast = 32.0 if rope.get("beta_fast") is None else rope.number("beta_fast")
    slow = 1.0 if rope.get("beta_slow") is None else rope.number("beta_slow")
    if fast < slow:
        raise ConfigError(f"{rope.where}: beta_fast = {fast:g} is below beta_slow = {slow:g}")
    attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if rope.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    return RopeScaling("yarn", factor, 1.0, 4.0, original, fast, slow, attention)


def _rope_key(keys: Keys) -> str:
    return "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"


def _quantization(keys: Keys, architecture: str) -> tuple[WeightFormat, bool, float, tuple[str, ...] | None]:
    """Weight format, linear_norm, its epsilon and modules_to_not_convert, from quantization_config."""
    given = keys.get("quantization_config", keys.get("quantization"))
    if given is None:
        if architecture == "BitnetForCausalLM":
            return "online", False, 1e-6, None
        if architecture in EMBEDDING_CLASSES:  # each linear has its norm, with the epsilon of all others
            return "online", True, keys.number("rms_norm_eps", CLASS_DEFAULTS[architecture]["rms_norm_eps"]), None
        if architecture in PLAIN_CLASSES:
            return "floats", False, 1e-6, None  # which must be found to be ternary
        raise ConfigError("config.json: no quantization_config, so this is not a BitNet checkpoint")
    if isinstance(given, Mapping) and "group_size" in given and "quant_method" not in given:
        return _mlx(Keys(given, "config.json: quantization_config"), architecture), False, 1e-6, None
    quantization = Keys(keys.get("quantization_config"), "config.json: quantization_config")
    quantization.choice("quant_method", "bitnet", ("bitnet",))
    if quantization.get("bits", 2) not in (1, 1.58, 2):
        raise ConfigError(f"{quantization.where}: bits = {shown(quantization.get('bits'))} are not ternary weights")
    linear_class = quantization.choice("linear_class", "bitlinear", ("bitlinear", "autobitlinear"))
    mode = quantization.choice("quantization_mode", "offline", ("online", "offline"))
    weight_format: WeightFormat = "bitlinear"  # this class is always packed, whatever the mode is
    if linear_class == "autobitlinear":
        weight_format = "online" if mode == "online" else "offline"
    dense = quantization.get("modules_to_not_convert")
    return (
        weight_format,
        quantization.boolean("use_rms_norm", False),
        1e-6 if quantization.get("rms_norm_eps") is None else quantization.number("rms_norm_eps"),
        None if dense is None else check_patterns(dense, f"{quantization.where}: modules_to_not_convert"),
    )


def _mlx(quantization: Keys, architecture: str) -> WeightFormat:
    """Checks the quantisation of a folder of MLX: two bits for every weight."""
    quantization.choice("mode", "affine", ("affine",))
    unknown = [key for key in quantization.raw if key not in ("bits", "group_size", "mode")]
    if quantization.get("bits") != 2 or quantization.get("group_size") not in (32, 64, 128) or unknown:
        raise ConfigError(f"{quantization.where} = {shown(dict(quantization.raw))} is not supported: bits must be 2")
    if architecture not in PLAIN_CLASSES:
        raise ConfigError(f"{quantization.where}: MLX folders of {architecture} are not supported")
    return "mlx"
