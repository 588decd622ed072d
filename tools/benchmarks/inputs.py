"""Random models, weights and prompts to measure with, for every backend."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers

from bitnet_numba.checkpoint.packed import FORMAT, RowFormat, packed_plan
from bitnet_numba.checkpoint.safetensors_file import write_tensors
from bitnet_numba.config import ModelConfig
from bitnet_numba.text.tiktoken import byte_alphabet
from tools.make_checkpoint import PRESETS, QUANTIZATION


def random_words(count: int, seed: int = 0) -> np.ndarray:
    """int32 words of random ternary codes: 1, 2 and 3."""
    words = np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint32)
    pairs = np.uint32(0x55555555)
    return (words | (~(words | words >> np.uint32(1)) & pairs)).view(np.int32)


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Tokens of a prompt."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def write_random_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer whose tokens are words of random letters, as long as those of real ones."""
    letters, rng = "abcdefghijklmnopqrstuvwxyz", random.Random(8)
    words = dict.fromkeys(byte_alphabet())
    while len(words) < vocab_size:
        # Half of them begin with a space.
        words[rng.choice(("", "\u0120")) + "".join(rng.choices(letters, k=rng.randint(3, 7)))] = None
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def row_formats(preset: str) -> tuple[RowFormat, ...]:
    """The formats of embedding and LM head that a model of PRESETS is measured with."""
    weight_format, raw = PRESETS[preset]
    # Of the models that are ternary without saying so, Bonsai's embedding and head are, too; TriLM's are not.
    return ("ternary",) if weight_format == "floats" and raw["model_type"] != "llama" else ("bf16", "int8")


def write_random_packed(folder: Path, head: RowFormat, preset: str = "2b-4t") -> None:
    """A packed checkpoint of random weights with the sizes of a model of PRESETS, made directly, without the way
    through a Hugging Face checkpoint."""
    weight_format, raw = PRESETS[preset]
    raw = raw | {"bitnet_numba": {"format": FORMAT, "embed": head, "head": head}}
    if weight_format != "floats":
        raw["quantization_config"] = QUANTIZATION[weight_format]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    plan_ = packed_plan(ModelConfig.from_hf(raw), head, head)
    words = random_words(1 << 22)
    rng = np.random.default_rng(1)
    halves = (rng.standard_normal(1 << 22).astype(np.float32) * np.float32(0.02)).view(np.uint32) >> np.uint32(16)
    kinds = {
        "I32": words,
        "BF16": halves.astype(np.uint16),
        "F16": rng.uniform(0.01, 0.03, 1 << 16).astype(np.float16),
        "I8": rng.integers(-127, 128, 1 << 22).astype(np.int8),
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in plan_.items():
            size = int(np.prod(tensor.shape))
            if tensor.dtype == "F32":
                yield name, np.full(tensor.shape, 1.0 if "norm" in name else 2e-4, np.float32)
            else:
                yield name, np.resize(kinds[tensor.dtype], size).reshape(tensor.shape)

    with open(folder / "model.safetensors", "wb") as file:
        write_tensors(file, plan_, tensors(), {})
