"""The hyperparameters of a GGUF file, as the config.json that the same model has as a Hugging Face folder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.checkpoint.gguf_file import Numbers, TensorInfo, Value
from bitnet_numba.config import DELTA_NET_NEEDS, GEMMA_CLASS, MINICPM_NEEDS
from bitnet_numba.config_keys import Keys, is_off, shown
from bitnet_numba.config_rope import MAX_LAYERS
from bitnet_numba.errors import CheckpointError, ConfigError, printable


@dataclass(frozen=True)
class Architecture:
    """What the name of an architecture says about a model, beside its keys."""

    hf_class: str
    model_type: str
    activation: str
    sub_norms: bool
    permuted: bool  # rows of q and k are in the order for rotating neighbouring pairs


_BITNET = Architecture("BitNetForCausalLM", "bitnet", "relu2", sub_norms=True, permuted=False)
ARCHITECTURES = {
    "bitnet": Architecture("BitNetForCausalLM", "bitnet", "silu", sub_norms=True, permuted=False),
    "bitnet-b1.58": _BITNET,
    "bitnet-25": _BITNET,
    "llama": Architecture("LlamaForCausalLM", "llama", "silu", sub_norms=False, permuted=True),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", "silu", sub_norms=False, permuted=False),
    "gemma3": Architecture(GEMMA_CLASS, "gemma3_text", "gelu_pytorch_tanh", sub_norms=False, permuted=False),
}
MISSING = {"minicpm": MINICPM_NEEDS, "qwen35": DELTA_NET_NEEDS}
EMBEDDING_CLASSES = {"qwen3": "Qwen3Model", "gemma3": GEMMA_CLASS}  # of architectures with norms before their linears
# Keys of an architecture that are read, or that change nothing.
KNOWN = frozenset(
    """block_count context_length embedding_length feed_forward_length vocab_size attention.head_count
    attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon
    rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.finetuned rope.scaling.yarn_beta_fast
    rope.scaling.yarn_beta_slow rope.scale_linear tensor_data_layout attention.causal""".split()
)
MUST_BE_ONE = frozenset(("logit_scale", "embedding_scale", "residual_scale", "rope.scaling.attn_factor"))
# Keys that would change the arithmetic unless they are off.
MUST_BE_OFF = frozenset(
    """expert_count expert_used_count expert_shared_count attention.sliding_window attention.scale attention.clamp_kqv
    attention.max_alibi_bias attn_logit_softcapping final_logit_softcapping use_parallel_residual
    attention.layer_norm_epsilon attention.temperature_scale pooling_type""".split()
)
GEMMA_KEYS = frozenset(("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"))
ROPE_FACTORS = "rope_freqs.weight"
LINEAR_NORM = "blk.0.attn_q_norm_in.weight"  # of embedding models, in which each linear has a norm of its own
LAST_TOKEN = 3  # pooling_type
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def find_architecture(metadata: Mapping[str, Value], where: object) -> tuple[str, Architecture]:
    """Name and meaning of a file's architecture. CheckpointError, naming what is missing, if it is not supported."""
    rotated = next((key for key in metadata if key.startswith("prism.hadamard.")), None)
    if rotated is not None:
        raise CheckpointError(
            f"{where}: the weights are rotated ({printable(rotated, 60)}), and the transform for that is missing here"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{where} holds no model: general.type = {shown(kind)}")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        missing = MISSING.get(name) if isinstance(name, str) else None
        why = f": {missing} are missing here" if missing else f" (one of {', '.join(ARCHITECTURES)})"
        raise CheckpointError(f"{where}: the architecture {shown(name)} is not supported{why}")
    return name, ARCHITECTURES[name]


def hf_config(
    metadata: Mapping[str, Value],
    tensors: Mapping[str, TensorInfo],
    rope_factors: NDArray[np.float32] | None,
    group_scales: bool,
    where: str,
) -> tuple[dict[str, Any], list[str]]:
    """config.json as transformers would write it, and notes for the user.

    rope_factors: the divisors of the rotary frequencies that the file holds as a tensor. group_scales: whether weights
    have many scales, as in models that are not BitNet. `where` names the file.

    Raises CheckpointError or ConfigError for what is missing or not supported.
    """
    name, architecture = find_architecture(metadata, where)
    embeds = name in EMBEDDING_CLASSES and LINEAR_NORM in tensors
    if name == "gemma3" and not embeds:
        raise CheckpointError(f"{where} has no norm before each linear: of gemma3, only embedding models are supported")
    prefix = f"{name}."
    keys = Keys(
        {key.removeprefix(prefix): of for key, of in metadata.items() if key.startswith(prefix)}, where + ": " + name
    )
    notes = []
    pooling = keys.get("pooling_type", LAST_TOKEN)
    if embeds:
        keys = Keys({key: of for key, of in keys.raw.items() if key != "pooling_type"}, keys.where)
        if pooling != LAST_TOKEN:
            notes.append(f"{prefix}pooling_type = {shown(pooling)} is ignored: the last token's state is the embedding")
    local: dict[str, Any] = {}
    if name == "gemma3":
        local = _gemma_window(keys)
        if "attention.sliding_window" not in keys.raw:
            notes.append(
                f"{prefix}attention.sliding_window is missing, so that all layers attend to whole texts, with one "
                "rotary base, as in llama.cpp; a folder of the same model may say otherwise"
            )
        keys = Keys({key: of for key, of in keys.raw.items() if key not in GEMMA_KEYS}, keys.where)
    _refuse_other_arithmetic(keys)
    heads = _same_everywhere(keys, "attention.head_count")
    head_dim = _head_dim(keys, tensors, heads)
    scaling = _rope_scaling(keys, rope_factors, head_dim)
    eps = shortest(keys.number("attention.layer_norm_rms_epsilon"))
    config: dict[str, Any] = {
        "architectures": [EMBEDDING_CLASSES[name] if embeds else architecture.hf_class],
        "model_type": architecture.model_type,
        "hidden_act": architecture.activation,
        "vocab_size": _rows(tensors, "token_embd.weight", where),
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": _same_everywhere(keys, "feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _same_everywhere(keys, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": eps,
        "rope_theta": shortest(keys.number("rope.freq_base", 10000.0)),
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    if name == "gemma3":
        config |= local | {"hidden_activation": architecture.activation, "query_pre_attn_scalar": head_dim}
    if not group_scales:
        config["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        }
    if embeds:
        config["quantization_config"] |= {"use_rms_norm": True, "rms_norm_eps": eps}
    for ours in ("bos_token_id", "eos_token_id"):
        token = metadata.get(f"tokenizer.ggml.{ours}")
        if type(token) is int:
            config[ours] = token
    return config, notes + _notes(keys, prefix)


def _gemma_window(keys: Keys) -> dict[str, Any]:
    """Which layers of Gemma 3 attend to a window, as llama.cpp reads it: none, unless the file names one."""
    layers, window = keys.integer("block_count"), keys.integer("attention.sliding_window", 0)
    if not 1 <= layers <= MAX_LAYERS:
        return {}  # which is refused with the other sizes
    if window == 0:
        return {"layer_types": ["full_attention"] * layers}
    local = {"sliding_window": window, "sliding_window_pattern": keys.integer("attention.sliding_window_pattern", 6)}
    return local | {"rope_local_base_freq": shortest(keys.number("rope.freq_base_swa", 10000.0))}


def shortest(value: float) -> float:
    """The shortest decimal number that is the same float32: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _refuse_other_arithmetic(keys: Keys) -> None:
    for key, value in keys.raw.items():
        neutral = (key not in MUST_BE_OFF or is_off(value)) and (key not in MUST_BE_ONE or value in (0, 1))
        if key == "attention.causal":
            neutral = value is True
        if key == "attention.sliding_window" and type(value) is int:
            neutral = value == 0 or value >= keys.integer("context_length")
        if not neutral:
            raise ConfigError(f"{keys.where}: {key} = {shown(value)} is not supported: it would change the arithmetic")


def _notes(keys: Keys, prefix: str) -> list[str]:
    known = KNOWN | MUST_BE_OFF | MUST_BE_ONE
    names = [key for key in keys.raw if key not in known and not is_off(keys.raw[key])]
    if not names:
        return []
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    listed = ", ".join(f"{printable(prefix + key, 60)} = {shown(keys.raw[key])}" for key in names[:10])
    return [f"unknown keys, without effect here: {listed}{more}"]


def _rows(tensors: Mapping[str, TensorInfo], name: str, where: str) -> int:
    if name not in tensors:
        raise CheckpointError(f"{where}: tensor {name} is missing")
    return tensors[name].shape[0] if tensors[name].shape else 1


def _same_everywhere(keys: Keys, key: str, default: int | None = None) -> int:
    """An integer that may be given for each layer, if all layers have the same."""
    value = keys.get(key)
    if not isinstance(value, Numbers):
        return keys.integer(key, default)
    of_layers = value.values
    if of_layers.dtype.kind not in "iu" or not of_layers.size or (of_layers != of_layers[0]).any():
        raise ConfigError(f"{keys.where}: {key} differs from layer to layer, which is not supported")
    return int(of_layers[0])


def _head_dim(keys: Keys, tensors: Mapping[str, TensorInfo], heads: int) -> int:
    rows = _rows(tensors, "blk.0.attn_q.weight", keys.where)
    if heads < 1 or rows % heads:
        raise ConfigError(f"{keys.where}: {rows} rows of blk.0.attn_q.weight do not fit {shown(heads)} heads")
    head_dim = rows // heads
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            value = shown(keys.get(key))
            raise ConfigError(f"{keys.where}: {key} = {value} is not supported, since heads have {head_dim} columns")
    return head_dim


def _rope_scaling(keys: Keys, factors: NDArray[np.float32] | None, head_dim: int) -> dict[str, Any] | None:
    kind = keys.choice("rope.scaling.type", "linear", ("none", "linear", "yarn"))
    old = "rope.scaling.factor" not in keys.raw
    factor = shortest(keys.number("rope.scale_linear" if old else "rope.scaling.factor", 1.0))
    linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None
    if kind == "yarn" and factors is None:
        yarn = {"rope_type": "yarn", "factor": factor}
        yarn["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        for beta in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{beta}" in keys.raw:
                yarn[beta] = shortest(keys.number(f"rope.scaling.yarn_{beta}"))
        return yarn
    if factors is None or (factors == 1).all():
        return linear
    # The tensor holds what the config's numbers come to; all published models have the same ones beside the factor.
    scaling = {"rope_type": "llama3", "factor": shortest(float(factors.max())), **_LLAMA3}
    theta = keys.number("rope.freq_base", 10000.0)
    expected = _llama3_factors(theta, head_dim, scaling)
    if linear or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise ConfigError(f"{keys.where}: the rotary factors in {ROPE_FACTORS} are not those of a Llama 3 model")
    return scaling


def _llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """By what rope scaling of type llama3 divides each rotary frequency: [head_dim / 2]."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth))
