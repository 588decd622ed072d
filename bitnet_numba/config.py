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
from bitnet_numba.config_rope import (
    GEMMA_ACTIVATION,
    KINDS,
    MAX_CONTEXT,
    MAX_LAYERS,
    LocalAttention,
    RopeScaling,
    has_kinds,
    read_gemma,
    read_rope,
    rope_key,
)
from bitnet_numba.errors import ConfigError, printable
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
    "num_layers": MAX_LAYERS,
    "num_heads": MAX_COLUMNS,
    "num_kv_heads": MAX_COLUMNS,
    "head_dim": MAX_COLUMNS,
    "max_context": MAX_CONTEXT,
}

# What config.json calls them, where that is another name.
_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_context": "max_position_embeddings",
}

_ARCHITECTURE_OF_TYPE = {"bitnet": "BitNetForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PLAIN_CLASSES = ("LlamaForCausalLM", "Qwen3ForCausalLM")  # of models that are not BitNet, too
# What ternary models that people have need, and this package lacks. By class; GGUF files' names are in gguf_config.py.
MINICPM_NEEDS = "the scaled embedding, residuals and logits of MiniCPM (BitCPM4)"
DELTA_NET_NEEDS = "the gated delta net layers of Qwen3.5 (Bonsai 27B)"
MISSING = {
    "MiniCPMForCausalLM": MINICPM_NEEDS,
    "Qwen3_5ForCausalLM": DELTA_NET_NEEDS,
    "Qwen3_5ForConditionalGeneration": DELTA_NET_NEEDS,
}
GEMMA_CLASS = "Gemma3TextModel"
EMBEDDING_CLASSES = ("Qwen3Model", GEMMA_CLASS)  # without an LM head
_ACTIVATIONS: dict[str, Activation] = {"relu2": "relu2", "silu": "silu", "swish": "silu", GEMMA_ACTIVATION: "gelu"}


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
    activation_planes: int = 1  # int8 planes of the inputs of linears with group scales: 1 or 2
    weight_format: WeightFormat = "online"  # of the Hugging Face checkpoint, see checkpoint/huggingface.py
    dense: tuple[str, ...] | None = field(default=None)  # modules_to_not_convert

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                key, value = _KEYS.get(name, name), shown(getattr(self, name))
                raise ConfigError(f"config: {key} = {value} is out of range (1 to {limit})")
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
    parts = [("quantization_config", raw.get("quantization_config"), QUANTIZATION_HARMLESS | QUANTIZATION_USED)]
    name = rope_key(keys)
    rope = raw.get(name)
    if rope is not None and architecture == GEMMA_CLASS and has_kinds(rope):
        parts += [(f"{name}: {kind}", rope.get(kind), ROPE_USED) for kind in KINDS]
        parts.append((name, rope, frozenset(KINDS)))
    else:
        parts.append((name, rope, ROPE_USED))
    for name, given, known in parts:
        unknown += [f"{name}: {key}" for key in Keys(given or {}, "").unknown(known)]
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
    theta, scaling, local = (*read_rope(keys, default), None) if not gemma else read_gemma(keys, default, head_dim)
    activation = GEMMA_ACTIVATION
    if not gemma:
        activation = keys.choice("hidden_act", default["hidden_act"], ("relu2", "silu", "swish"))
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
        missing = [MISSING[name] for name in MISSING if architectures == [name]]
        why = f": {missing[0]} are missing here" if missing else f" (one of {', '.join(CLASS_DEFAULTS)})"
        raise ConfigError(f"config.json: architectures = {shown(keys.get('architectures'))} is not supported{why}")
    return str(architectures[0])


def _class_of_type(keys: Keys) -> str | None:
    model_type = keys.get("model_type")
    return _ARCHITECTURE_OF_TYPE.get(model_type) if isinstance(model_type, str) else None


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
    for key, allowed in (("bits", (2,)), ("group_size", (32, 64, 128))):
        if quantization.get(key) not in allowed:
            raise ConfigError(
                f"{quantization.where}: {key} = {shown(quantization.get(key))} is not supported "
                f"(one of {', '.join(map(str, allowed))})"
            )
    for key in quantization.raw:
        if key not in ("bits", "group_size", "mode"):
            raise ConfigError(
                f"{quantization.where}: {printable(str(key))} is quantised in its own way, which is not supported"
            )
    if architecture not in PLAIN_CLASSES:
        raise ConfigError(f"{quantization.where}: MLX folders of {architecture} are not supported")
    return "mlx"
