"""The keys of a Hugging Face config.json: which have no effect, which would change the arithmetic; and typed access.

A key of config.json that its model class does not read changes nothing, and published files are full of them. A key
that other classes read to compute something else is refused, though: whoever wrote it meant it.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from bitnet_numba.errors import ConfigError, printable

# Without effect on inference, whatever the value.
HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _auto_class _commit_hash
    _flash_attn_2_enabled _from_model_config _name_or_path _sliding_window_pattern architectures attention_dropout
    attention_probs_dropout_prob attn_implementation attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    bitnet_numba bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size custom_pipelines decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping embd_pdrop embedding_dropout encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout hidden_dropout_prob id2label ignore_index initializer_range is_bitnet_config is_decoder
    keys_to_ignore_at_inference label2id length_penalty max_length max_window_layers min_length model_type
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_logits_to_keep num_return_sequences
    original_max_position_embeddings output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id sliding_window_pattern suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention_2
    use_sliding_window""".split()
)
QUANTIZATION_HARMLESS = frozenset(("bits", "is_bitnet_config", "activation"))
USED = frozenset(
    """attention_bias bits head_dim hidden_act hidden_size input_bits intermediate_size max_position_embeddings mlp_bias
    num_attention_heads num_hidden_layers num_key_value_heads quantization quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size weight_bits""".split()
)
# Of Gemma 3, in whose block they mean something.
GEMMA_USED = frozenset(
    """hidden_activation query_pre_attn_scalar rope_local_base_freq sliding_window layer_types""".split()
)
QUANTIZATION_USED = frozenset(
    """quant_method linear_class quantization_mode use_rms_norm rms_norm_eps modules_to_not_convert group_size
    mode""".split()
)
ROPE_USED = frozenset(
    """rope_theta rope_type type factor low_freq_factor high_freq_factor original_max_position_embeddings beta_fast
    beta_slow attention_factor mscale mscale_all_dim truncate""".split()
)

# What absent keys mean depends on the class, as in transformers.
_LLAMA = {
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,  # as many as query heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
_BITNET = {
    "head_dim": None,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "max_position_embeddings": 2048,
    "num_attention_heads": 20,
    "num_hidden_layers": 30,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_QWEN3 = {
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 151936,
}
_GEMMA3 = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "BitNetForCausalLM": _BITNET,
    "BitnetForCausalLM": _LLAMA,  # the first release
    "LlamaForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3Model": _QWEN3,
    "Gemma3TextModel": _GEMMA3,
}

Raw = Mapping[str, Any]
Neutral = Callable[[Any, Raw], bool]  # whether a value changes nothing, in the config.json that it stands in


def is_off(value: Any, raw: Raw | None = None) -> bool:
    """Whether a value says that something is not there: null, false, zero, or empty."""
    return value is None or value in (False, 0, "", [], {})


def _is_one(value: Any, raw: Raw) -> bool:
    return value is None or value == 1


def _is_known_activation(value: Any, raw: Raw) -> bool:
    return is_off(value) or value in ("swiglu", "silu", "swish", "relu2", "squared_relu")


def _exceeds_context(value: Any, raw: Raw) -> bool:
    """Whether a window of attention is off, or so long that no context reaches its end."""
    context = raw.get("max_position_embeddings")
    if is_off(value) or value == -1 or raw.get("use_sliding_window") is False:
        return True
    return type(value) is type(context) is int and value >= context


def _is_full_attention(value: Any, raw: Raw) -> bool:
    return is_off(value) or (isinstance(value, list) and all(kind == "full_attention" for kind in value))


def _is_rope_everywhere(value: Any, raw: Raw) -> bool:
    return is_off(value) or (isinstance(value, list) and all(rotated == 1 for rotated in value))


# Keys of other model classes that would change the arithmetic, the values with which they do not, and what they do.
_CHANGES: tuple[tuple[str, Neutral, str], ...] = (
    ("partial_rotary_factor rotary_pct rotary_percent", _is_one, "only a part of each head would be rotated"),
    ("rope_interleaved rope_interleave rope_traditional", is_off, "rotation would pair neighbouring dimensions"),
    ("no_rope_layers", _is_rope_everywhere, "some layers would have no rotary embedding"),
    ("no_rope_layer_interval alibi use_mrope", is_off, "positions would be encoded in another way"),
    ("rope_local_base_freq", is_off, "some layers would have another rotary base"),
    ("sliding_window attention_chunk_size attention_window_size", _exceeds_context, "attention would have a window"),
    ("layer_types", _is_full_attention, "not all layers would be full attention"),
    ("embedding_multiplier scale_emb embedding_scale", _is_one, "the embedding would be scaled"),
    (
        "activation hidden_activation activation_function",
        _is_known_activation,
        "the activation would be another",
    ),
    ("residual_multiplier", _is_one, "residuals would be scaled"),
    ("scale_depth", is_off, "residuals would be scaled"),
    ("attn_temperature_tuning scale_attn_by_inverse_layer_idx", is_off, "attention scores would be scaled"),
    ("attention_multiplier query_pre_attn_scalar", is_off, "attention scores would be scaled in another way"),
    ("key_multiplier attention_in_multiplier attention_out_multiplier", _is_one, "attention would be scaled"),
    ("logit_scale logits_scaling output_multiplier lm_head_multiplier", _is_one, "logits would be scaled"),
    ("dim_model_base", is_off, "logits would be scaled"),
    ("final_logit_softcapping logit_cap", is_off, "logits would be capped"),
    ("attn_logit_softcapping", is_off, "attention scores would be capped"),
    ("use_bidirectional_attention", is_off, "tokens would attend to those after them"),
    ("clip_qkv", is_off, "queries, keys and values would be clipped"),
    ("qk_norm use_qk_norm qk_layernorm qk_layer_norms", is_off, "queries and keys would be normalised"),
    ("use_parallel_residual parallel_attn parallel_residual", is_off, "attention and feed-forward would be parallel"),
    ("kv_lora_rank q_lora_rank", is_off, "keys and values would come from latent vectors"),
    (
        "num_experts num_local_experts n_routed_experts moe_num_experts",
        is_off,
        "feed-forward would be a choice of experts",
    ),
    ("is_encoder_decoder add_cross_attention", is_off, "the model would attend to an encoder's output"),
    ("pruned_heads per_layer_config", is_off, "layers would differ from each other"),
)
REFUSED = {key: (neutral, reason) for keys, neutral, reason in _CHANGES for key in keys.split()}


class Keys:
    """Typed access to a parsed JSON object; every error is a ConfigError of one line that names the key."""

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where} must be a JSON object, not {shown(raw)}")
        self.raw = raw
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        """The value; null is as good as absent."""
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer. Where it is absent the default stands in; null is no integer."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.where}: {key} must be an integer, not {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that float32 can hold and that is above zero."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.where}: {key} must be a number, not {shown(value)}")
        # Beyond these, float32 arithmetic would be left with zero or infinity.
        if not 1e-30 <= value <= 1e30:
            kind = "is out of range" if value > 0 and value != math.inf else "must be a positive number"
            raise ConfigError(f"{self.where}: {key} = {shown(value)} {kind}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} must be true or false, not {shown(value)}")
        return value

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """One of some words."""
        value = self.get(key, default)
        if value not in choices:
            raise ConfigError(f"{self.where}: {key} = {shown(value)} is not supported (one of {', '.join(choices)})")
        return str(value)

    def refuse_other_arithmetic(self, used: frozenset[str] = frozenset()) -> None:
        """Raises ConfigError for a key that would change the arithmetic, naming it and what it would change.

        used: keys that the model's class reads itself.
        """
        for key, value in self.raw.items():
            neutral, reason = REFUSED.get(key, (None, "")) if key not in used else (None, "")
            if neutral is not None and not neutral(value, self.raw):
                raise ConfigError(f"{self.where}: {key} = {shown(value)} is not supported: {reason}")

    def unknown(self, known: frozenset[str]) -> list[str]:
        """The keys that neither are known nor say that something is off, each with its value, fit to be printed."""
        names = [key for key in self.raw if key not in known and key not in REFUSED]
        return [f"{printable(key, 60)} = {shown(self.raw[key])}" for key in names if not is_off(self.raw[key])]

    def _given(self, key: str, default: Any) -> Any:
        if key not in self.raw and default is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        return self.raw.get(key, default)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 60


def shown(value: object) -> str:
    """A JSON value as one short piece of text, however large or deep it is."""
    return "null" if value is None else printable(_repr.repr(value), 60)
