"""Writes small GGUF files, good and damaged ones, with and without a model in them."""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_numba.checkpoint.gguf_types import F32, I2_S

Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]

_OF_DTYPE = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(of: Any) -> bytes:
    """A value with its type. Python's integers are u32 where they fit, and floats f32; bytes are as they stand."""
    if isinstance(of, bytes):
        return of
    if isinstance(of, str):
        return struct.pack("<I", 8) + string(of)
    if isinstance(of, list):
        return struct.pack("<IIQ", 9, 8, len(of)) + b"".join(map(string, of))
    if isinstance(of, bool):
        return struct.pack("<I?", 7, of)
    if type(of) is int:
        of = np.uint32(of) if 0 <= of < 1 << 32 else np.uint64(of) if of > 0 else np.int64(of)
    elif type(of) is float:
        of = np.float32(of)
    kind = _OF_DTYPE[of.dtype.str[1:]]
    if of.shape:
        return struct.pack("<IIQ", 9, kind, len(of)) + of.tobytes()
    return struct.pack("<I", kind) + of.tobytes()


def info(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor info; the shape has rows first."""
    head = string(name) + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, offset)


def gguf(
    metadata: Mapping[str, Any] | Sequence[tuple[str, Any]],
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]],
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF file of keys and tensors: (GGML type, shape, bytes)."""
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    head, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        head += info(name, shape, kind, len(data))
        data += content + bytes(-len(content) % alignment)
    keys = b"".join(string(key) + value(of) for key, of in pairs)
    return whole(keys, head, data, len(pairs), len(tensors), version, alignment)


def whole(
    keys: bytes, infos: bytes, data: bytes, n_keys: int, n_tensors: int, version: int = 3, alignment: int = 32
) -> bytes:
    """A GGUF file of its written parts and numbers, which may be wrong."""
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + infos
    return header + bytes(-len(header) % alignment) + data


HIDDEN, LAYERS, HEADS, KV, FFN, VOCAB = 128, 2, 4, 2, 256, 260
LINEARS = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def floats(values: Any) -> bytes:
    return np.asarray(values, "<f4").tobytes()


def i2s(t: np.ndarray, scale: float) -> bytes:
    """Type I2_S, as on x86."""
    runs = (t + 1).astype(np.uint8).reshape(-1, 4, 32)
    return (runs[:, 0] << 6 | runs[:, 1] << 4 | runs[:, 2] << 2 | runs[:, 3]).tobytes() + floats([scale] + [0] * 7)


def small_model(architecture: str = "llama") -> tuple[dict[str, Any], Tensors, dict[str, np.ndarray]]:
    """Metadata and tensors of a small file, and the ternary weights in it."""
    rng = np.random.default_rng(5)
    letters = [chr(c) for c in range(0x21, 0x7F)] + [chr(c) for c in range(0x100, 0x100 + VOCAB - 96)]
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": FFN,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*letters, "<|begin|>", "<|end|>"],
        "tokenizer.ggml.token_type": np.array([1] * (VOCAB - 2) + [3, 3], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": VOCAB - 2,
        "tokenizer.ggml.eos_token_id": VOCAB - 1,
    }
    metadata["tokenizer.ggml.tokens"][-4] = "ab"
    tensors: Tensors = {
        "token_embd.weight": (F32, (VOCAB, HIDDEN), floats(rng.integers(-9, 9, (VOCAB, HIDDEN)))),
        "output_norm.weight": (F32, (HIDDEN,), floats(rng.uniform(0.5, 2, HIDDEN))),
    }
    weights = {}
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = (F32, (HIDDEN,), floats(rng.uniform(0.5, 2, HIDDEN)))
        if architecture != "llama":
            for name, size in (("attn_sub_norm", HIDDEN), ("ffn_sub_norm", FFN)):
                tensors[f"blk.{i}.{name}.weight"] = (F32, (size,), floats(rng.uniform(0.5, 2, size)))
        for k, (name, shape) in enumerate(LINEARS.items()):
            t = rng.integers(-1, 2, shape)
            weights[f"blk.{i}.{name}"] = t
            tensors[f"blk.{i}.{name}.weight"] = (I2_S, shape, i2s(t, 0.01 * (1 + k + 10 * i)))
    return metadata, tensors, weights


Change = Callable[[dict[str, Any], Tensors], None]


def write(path: Path, architecture: str = "llama", change: Change | None = None) -> Path:
    """A small file, after `change` has edited its metadata and tensors in place."""
    metadata, tensors, _ = small_model(architecture)
    if change is not None:
        change(metadata, tensors)
    path.write_bytes(gguf(metadata, tensors))
    return path


def set_keys(**keys: Any) -> Change:
    """A change of keys; two underscores stand for a point."""
    return lambda metadata, tensors: metadata.update({key.replace("__", "."): of for key, of in keys.items()})
