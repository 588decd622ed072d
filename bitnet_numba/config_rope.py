"""Positions in config.json: rotary base and scaling, and the layers of Gemma 3 whose attention has a window."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bitnet_numba.config_keys import Keys, shown
from bitnet_numba.errors import ConfigError

MAX_CONTEXT = 1 << 24  # tokens; MAX_LAYERS likewise far above every published model's
MAX_LAYERS = 4096
GEMMA_ACTIVATION = "gelu_pytorch_tanh"
FULL, LOCAL = KINDS = ("full_attention", "sliding_attention")  # of Gemma's layers


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


def read_rope(keys: Keys, default: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling. As in transformers, rope_scaling replaces all of rope_parameters unless it is empty."""
    name = rope_key(keys)
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
    if not (1 <= original <= MAX_CONTEXT and original == elsewhere):
        raise ConfigError(f"{rope.where}: the original context and the rest contradict each other")
    if kind == "yarn":
        if theta <= 1:
            raise ConfigError(f"{rope.where}: rope_theta = {theta:g} is not above 1, as yarn needs it")
        return theta, _yarn(rope, original)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise ConfigError(f"{rope.where}: the llama3 factors contradict each other")
    return theta, RopeScaling("llama3", rope.number("factor"), low, high, original)


def read_gemma(keys: Keys, default: dict[str, Any], head_dim: int) -> tuple[float, None, LocalAttention | None]:
    """Rotary base, no scaling, and the layers with a window, in the form of either version of transformers."""
    keys.choice("hidden_activation", GEMMA_ACTIVATION, (GEMMA_ACTIVATION,))
    keys.choice("hidden_act", GEMMA_ACTIVATION, (GEMMA_ACTIVATION,))
    if (scalar := keys.number("query_pre_attn_scalar", default["query_pre_attn_scalar"])) != head_dim:
        raise ConfigError(
            f"config.json: query_pre_attn_scalar = {scalar:g} is not supported, only head_dim, {head_dim}"
        )
    theta, local_theta = default["rope_theta"], default["rope_local_base_freq"]
    by_kind = keys.get("rope_parameters")
    if has_kinds(by_kind):
        bases = {FULL: theta, LOCAL: local_theta}
        for kind, base in bases.items():
            own = Keys(by_kind.get(kind) or {}, f"config.json: rope_parameters: {kind}")
            own.refuse_other_arithmetic()
            own.choice("rope_type", own.get("type", "default"), ("default",))
            bases[kind] = own.number("rope_theta", base)
        theta, local_theta = bases[FULL], bases[LOCAL]
        # Beside them, rope_scaling may ask for a scaling.
        scaling = read_rope(Keys({**keys.raw, "rope_parameters": None}, keys.where), default)[1]
    else:
        theta, scaling = read_rope(keys, default)
        local_theta = keys.number("rope_local_base_freq", local_theta)
    if scaling is not None:
        raise ConfigError("config.json: rotary scaling of Gemma3TextModel is not supported")
    count = keys.integer("num_hidden_layers", default["num_hidden_layers"])
    if not 1 <= count <= MAX_LAYERS:
        return theta, None, None  # which is refused with the other sizes
    kinds = keys.get("layer_types")
    if kinds is None:
        pattern = keys.integer("sliding_window_pattern", default["sliding_window_pattern"])
        if pattern < 1:
            raise ConfigError(f"config.json: sliding_window_pattern = {shown(pattern)} must be at least 1")
        kinds = [LOCAL if (i + 1) % pattern else FULL for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (LOCAL, FULL) for kind in kinds):
        raise ConfigError(f"config.json: layer_types = {shown(kinds)} is not supported")
    local = tuple(kind == LOCAL for kind in kinds)
    if not any(local):
        return theta, None, None
    window = keys.integer("sliding_window", default["sliding_window"])
    if not 1 <= window <= MAX_CONTEXT:
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


def rope_key(keys: Keys) -> str:
    """The key that has the rotary embedding's options."""
    return "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"


def has_kinds(rope: Any) -> bool:
    """Whether rotary options are those of Gemma's kinds of layers, each by itself."""
    return isinstance(rope, Mapping) and not rope.keys().isdisjoint(KINDS)
