"""Writes a random Hugging Face checkpoint of any supported class, for tests and benchmarks.

    python tools/make_checkpoint.py --preset 2b-4t [--format online|offline|bitlinear|floats] [--seed S] DST

The sizes are those of the published models; weights and tokenizer are random, so the model generates nonsense.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bitnet_numba.bfloat16 import from_float32
from bitnet_numba.checkpoint.safetensors_file import TensorSpec, write_tensors
from bitnet_numba.config import EMBEDDING_CLASSES, GROUPS, ModelConfig
from bitnet_numba.errors import BitNetError, CheckpointError
from bitnet_numba.text.chat_template import BITNET_TEMPLATE

WEIGHT_FORMATS = ("online", "offline", "bitlinear", "floats")
QUANTIZATION = {
    "online": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"},
    "offline": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    "bitlinear": {"quant_method": "bitnet", "modules_to_not_convert": None},
}  # of floats: none
MASTER_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def preset(
    kind: str,
    weight_format: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    inner: int,
    vocab: int,
    context: int,
    **more: Any,
) -> tuple[str, dict[str, Any]]:
    """The weight format and the config.json of a model; kind is bitnet, 1bitllm, llama, qwen3, or of embedding models
    qwen3-embedding or gemma-embedding."""
    architecture, activation = {
        "bitnet": ("BitNetForCausalLM", "relu2"),
        "1bitllm": ("BitnetForCausalLM", "silu"),
        "llama": ("LlamaForCausalLM", "silu"),
        "qwen3": ("Qwen3ForCausalLM", "silu"),
        "qwen3-embedding": ("Qwen3Model", "silu"),
        "gemma-embedding": ("Gemma3TextModel", "gelu_pytorch_tanh"),
    }[kind]
    types = {"bitnet": "bitnet", "qwen3": "qwen3", "qwen3-embedding": "qwen3", "gemma-embedding": "gemma3_text"}
    config = {
        "architectures": [architecture],
        "model_type": types.get(kind, "llama"),
        "hidden_act": activation,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": kind != "llama",
    }
    return weight_format, config | more


QWEN3 = {"head_dim": 128, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "use_sliding_window": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384}
FALCON3 = {"head_dim": 256, "rope_theta": 1000042.0, "rms_norm_eps": 1e-6}
GEMMA3 = {
    "head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "sliding_window": 512, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
PRESETS = {
    "tiny": preset("bitnet", "online", 256, 2, 8, 2, 640, 2048, 512, rope_theta=500000.0),
    "tiny-1bitllm": preset("1bitllm", "online", 192, 2, 2, 2, 352, 2002, 256),
    "tiny-llama": preset("llama", "bitlinear", 128, 2, 4, 2, 320, 2048, 256),
    "2b-4t": preset("bitnet", "offline", 2560, 30, 20, 5, 6912, 128256, 4096, rope_theta=500000.0),
    "3b": preset("1bitllm", "online", 3200, 26, 32, 32, 8640, 32002, 2048),
    "large": preset("1bitllm", "online", 1536, 24, 16, 16, 4096, 32002, 2048),
    "llama3-8b": preset("llama", "bitlinear", 4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=500000.0),
    "llama3.2-1b": preset(
        "llama",
        "bitlinear",
        2048,
        16,
        32,
        8,
        8192,
        128256,
        131072,
        rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE,
        tie_word_embeddings=True,
    ),
    "falcon3-1b": preset("llama", "bitlinear", 2048, 18, 8, 4, 8192, 131072, 8192, **FALCON3),
    "falcon3-3b": preset("llama", "bitlinear", 3072, 22, 12, 4, 9216, 131072, 32768, **FALCON3),
    "falcon3-7b": preset("llama", "bitlinear", 3072, 28, 12, 4, 23040, 131072, 32768, **FALCON3),
    "bonsai-1.7b": preset("qwen3", "floats", 2048, 28, 16, 8, 6144, 151669, 32768, **QWEN3),
    "bonsai-4b": preset("qwen3", "floats", 2560, 36, 32, 8, 9728, 151669, 32768, **QWEN3),
    "bonsai-8b": preset(
        "qwen3", "floats", 4096, 36, 32, 8, 12288, 151669, 65536, rope_scaling=YARN, tie_word_embeddings=False, **QWEN3
    ),
    "trilm-3.9b": preset("llama", "floats", 3072, 30, 24, 24, 9216, 50688, 2048),
    "embedding-0.6b": preset("qwen3-embedding", "online", 1024, 28, 16, 8, 3072, 151936, 32768, **QWEN3),
    "embedding-270m": preset("gemma-embedding", "online", 640, 18, 4, 1, 2048, 262144, 32768, **GEMMA3),
    "falcon3-10b": preset("llama", "bitlinear", 3072, 40, 12, 4, 23040, 131072, 32768, **FALCON3),
}


def make_checkpoint(
    folder: Path, raw_config: dict[str, Any], weight_format: str, seed: int = 0, dtype: str = "bf16", shards: int = 1
) -> None:
    """Writes a random checkpoint with the given config.json into a new folder.

    weight_format: see checkpoint/huggingface.py. dtype: of the tensors that are not packed.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} already exists")
    raw = raw_config | {"torch_dtype": "bfloat16"}
    if weight_format != "floats":
        raw["quantization_config"] = QUANTIZATION[weight_format] | raw_config.get("quantization_config", {})
        if raw["architectures"][0] in EMBEDDING_CLASSES:  # each linear has its norm, with the epsilon of all others
            raw["quantization_config"] |= {"use_rms_norm": True, "rms_norm_eps": raw["rms_norm_eps"]}
    end = raw["vocab_size"] - len(SPECIAL_TOKENS)
    raw |= {"bos_token_id": end, "eos_token_id": end + 1}
    config = ModelConfig.from_hf(raw)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": [end + 1, end + 2]})
    write_tokenizer(folder, config.vocab_size, config.max_context)
    plan = source_plan(config, weight_format, MASTER_DTYPES[dtype], raw["architectures"][0] == "BitnetForCausalLM")
    names = list(plan)
    per_shard = -(-len(names) // shards)
    rng = np.random.default_rng(seed)
    weight_map = {}
    for i in range(shards):
        part = {name: plan[name] for name in names[i * per_shard : (i + 1) * per_shard]}
        file_name = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(part, file_name)
        with open(folder / file_name, "wb") as file:
            write_tensors(file, part, random_tensors(part, weight_format, rng), {"format": "pt"})
    if shards > 1:
        total = sum(spec.nbytes for spec in plan.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def source_plan(config: ModelConfig, weight_format: str, dtype: str, first_spelling: bool) -> dict[str, TensorSpec]:
    """Every tensor of a Hugging Face checkpoint with its type and shape."""
    plan = {"model.embed_tokens.weight": TensorSpec(dtype, (config.vocab_size, config.hidden_size))}
    sub_norms = ("inner_attn_ln", "ffn_layernorm") if first_spelling else ("attn_sub_norm", "ffn_sub_norm")
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        plan[f"{prefix}.input_layernorm.weight"] = TensorSpec(dtype, (config.hidden_size,))
        plan[f"{prefix}.post_attention_layernorm.weight"] = TensorSpec(dtype, (config.hidden_size,))
        if config.gemma:
            for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                plan[f"{prefix}.{name}.weight"] = TensorSpec(dtype, (config.hidden_size,))
        if config.sub_norms:
            plan[f"{prefix}.self_attn.{sub_norms[0]}.weight"] = TensorSpec(dtype, (config.q_size,))
            plan[f"{prefix}.mlp.{sub_norms[1]}.weight"] = TensorSpec(dtype, (config.intermediate_size,))
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                plan[f"{prefix}.self_attn.{name}.weight"] = TensorSpec(dtype, (config.head_dim,))
        for group, modules in GROUPS.items():
            segments, K = config.group_shape(group)
            for module, N in zip(modules, segments, strict=True):
                name = f"{prefix}.{module}"
                if not config.is_ternary(name) or weight_format in ("online", "floats"):
                    plan[f"{name}.weight"] = TensorSpec(dtype, (N, K))
                else:
                    plan[f"{name}.weight"] = TensorSpec("U8", (N // 4, K))
                    plan[f"{name}.weight_scale"] = TensorSpec(dtype, (1,))
                if config.linear_norm and config.is_ternary(name):
                    norm = "norm" if config.embeds else "rms_norm"
                    plan[f"{name}.{norm}.weight"] = TensorSpec(dtype, (K,))
                if config.group_bias(group):
                    plan[f"{name}.bias"] = TensorSpec(dtype, (N,))
    plan["model.norm.weight"] = TensorSpec(dtype, (config.hidden_size,))
    if not config.tied:
        plan["lm_head.weight"] = TensorSpec(dtype, (config.vocab_size, config.hidden_size))
    # Embedding models are saved without the class around them that has an LM head.
    return {name.removeprefix("model."): spec for name, spec in plan.items()} if config.embeds else plan


def random_tensors(
    plan: dict[str, TensorSpec], weight_format: str, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Random values for each tensor of a plan; every matrix has a spread of its own."""
    four_codes = np.array([a + 4 * b + 16 * c + 64 * d for a, b, c, d in np.ndindex(3, 3, 3, 3)], np.uint8)
    for name, spec in plan.items():
        if spec.dtype == "U8":
            yield name, four_codes[rng.integers(0, len(four_codes), spec.shape, np.uint8)]
            continue
        if name.endswith("weight_scale"):
            absmean = rng.uniform(0.01, 0.03)
            values = np.full(spec.shape, absmean if weight_format == "offline" else 1 / absmean, np.float32)
        elif name.endswith("norm.weight") or "layernorm" in name or "_ln." in name:
            values = rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        elif weight_format == "floats":
            values = ternary_floats(spec.shape, rng)
        else:
            values = rng.standard_normal(spec.shape, np.float32)
            values *= np.float32(0.02 * rng.uniform(0.6, 1.6))
        if spec.dtype == "BF16":
            yield name, from_float32(values)
        else:
            yield name, values.astype(np.float16 if spec.dtype == "F16" else np.float32)


def ternary_floats(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random ternary weights times a scale for each row and 128 columns, float32; every dtype holds them exactly."""
    N, K = shape
    scales = rng.integers(128, 256, (N, -(-K // 128))).astype(np.float32) * np.float32(2.0**-13)
    return rng.integers(-1, 2, shape, np.int8) * np.repeat(scales, 128, axis=1)[:, :K]


SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")


def write_tokenizer(folder: Path, vocab_size: int, context: int) -> None:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, most of them made-up syllables."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    most = vocab_size - len(SPECIAL_TOKENS)
    if most < len(vocab):
        raise CheckpointError(f"a vocabulary of {vocab_size} is too small for the {len(vocab)} bytes")
    syllables = [c + v for c in "bdfghjklmnprstvwz" for v in "aeiou"]

    def grow(left: str, right: str) -> None:
        if len(vocab) < most and left + right not in vocab:
            merges.append((left, right))
            vocab[left + right] = len(vocab)

    for syllable in syllables:
        grow(syllable[0], syllable[1])
    words = list(syllables)
    for syllable in syllables:
        grow("Ġ", syllable)
        words.append("Ġ" + syllable)
    for start in words:  # the list grows as it is walked: longer and longer words
        if len(vocab) == most:
            break
        for syllable in syllables:
            grow(start, syllable)
            words.append(start + syllable)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[1],
            "chat_template": BITNET_TEMPLATE,
            "model_max_length": context,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to write")
    parser.add_argument("--preset", choices=PRESETS, required=True, help="model whose sizes are used")
    parser.add_argument(
        "--format",
        dest="weight_format",
        choices=WEIGHT_FORMATS,
        help="weight format (default: that of the published model)",
    )
    parser.add_argument("--dtype", choices=MASTER_DTYPES, default="bf16", help="floating-point dtype (default: bf16)")
    parser.add_argument("--layers", type=int, help="number of layers (default: the model's)")
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    args = parser.parse_args(argv)
    weight_format, config = PRESETS[args.preset]
    if args.layers is not None:
        config = config | {"num_hidden_layers": args.layers}
    try:
        if not 1 <= args.shards <= 64 or args.seed < 0:
            raise CheckpointError("--shards must be between 1 and 64, and --seed at least 0")
        make_checkpoint(args.dst, config, args.weight_format or weight_format, args.seed, args.dtype, args.shards)
    except BitNetError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_checkpoint: cannot write {args.dst}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
