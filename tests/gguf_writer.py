"""Writes small GGUF files, good and damaged ones."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_OF_DTYPE = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(of: Any) -> bytes:
    """A value with its type. Python's integers are u32 or i32, floats are f32; NumPy's scalars and arrays are as they
    are; bytes are written as they stand."""
    if isinstance(of, bytes):
        return of
    if isinstance(of, str):
        return struct.pack("<I", 8) + string(of)
    if isinstance(of, list):
        return struct.pack("<IIQ", 9, 8, len(of)) + b"".join(map(string, of))
    if isinstance(of, bool):
        return struct.pack("<I?", 7, of)
    if type(of) is int:
        of = np.uint32(of) if of >= 0 else np.int32(of)
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
