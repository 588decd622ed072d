"""Safetensors files read lazily, and the packed checkpoint: the folder that `tools/convert.py` writes.

A packed checkpoint holds config.json (the source's own plus the key "bitnet_numba"), model.safetensors, tokenizer.json,
tokenizer_config.json and generation_config.json. Its tensors, for layer i and group g of `config.GROUPS`:

    embed.weight             bfloat16 [vocab, hidden]; or int8, with embed.scale float32 [vocab]
    head.weight              the same, only where the head is not the embedding
    norm.weight              float32 [hidden]
    layers.i.input_norm.weight, layers.i.post_attention_norm.weight            float32 [hidden]
    layers.i.attn_sub_norm.weight, layers.i.ffn_sub_norm.weight                float32, where config.sub_norms
    layers.i.g.words         int32, the ternary matrix [N, K] of all segments, packed (see `packing`)
    layers.i.g.scales        float32 [segments]: y = acc * scale / s
    layers.i.g.bias          float32 [N], where there is one
    layers.i.g.norms         float32 [segments, K], where config.linear_norm
    layers.i.g.weight        bfloat16 [N, K] in place of words, scales and norms, for a group that is not quantised
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitnet_numba.config import GROUPS, ModelConfig
from bitnet_numba.errors import BitNetError, CheckpointError, ConfigError, one_line
from bitnet_numba.packing import packed_words, unpack_ternary

FORMAT = 1
HeadForm = Literal["bf16", "int8"]
HEAD_FORMS: tuple[HeadForm, ...] = ("bf16", "int8")

# Safetensors type names and the NumPy type their bytes are read as; bfloat16 stays a bit pattern (see `bfloat16`).
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's safetensors type name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class TensorFile:
    """One safetensors file: its header is checked when it is opened, its tensors are read when asked for.

    Raises CheckpointError for a missing, truncated or damaged file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        try:
            # The library checks header, offsets, gaps and file length; what is left here is only to find the bytes.
            with safe_open(str(path), framework="numpy"):
                pass
            with open(path, "rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_size))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {one_line(error)}") from None
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            self.specs[name] = TensorSpec(entry["dtype"], tuple(entry["shape"]))
            self._offsets[name] = 8 + header_size + entry["data_offsets"][0]

    def _locate(self, name: str) -> tuple[np.dtype[Any], TensorSpec, int]:
        spec = self.specs[name]
        if spec.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name} has type {spec.dtype}, which is not supported")
        return DTYPES[spec.dtype], spec, self._offsets[name]

    def map(self, name: str) -> NDArray[Any]:
        """A read-only array over the file's own pages; nothing is copied until it is used."""
        dtype, spec, offset = self._locate(name)
        if spec.nbytes == 0:
            return np.empty(spec.shape, dtype)
        return np.memmap(self.path, dtype, "r", offset, spec.shape)

    def read(self, name: str) -> NDArray[Any]:
        """A copy in memory that leaves the rest of the file alone."""
        dtype, spec, offset = self._locate(name)
        count = int(np.prod(spec.shape, dtype=np.int64))
        values = np.fromfile(self.path, dtype, count, offset=offset)
        if len(values) != count:
            raise CheckpointError(f"{self.path}: tensor {name} is cut short")
        return values.reshape(spec.shape)


def write_tensors(
    file: BinaryIO,
    plan: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, NDArray[Any]]],
    metadata: dict[str, str],
) -> None:
    """Writes a safetensors file tensor by tensor, so that only one is in memory at a time.

    `tensors` must yield exactly the names of `plan`, in its order, with its types and shapes; else ValueError.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, spec in plan.items():
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensor data starts on a 64-byte border of the file
    file.write(len(text).to_bytes(8, "little") + text)
    expected = iter(plan.items())
    for name, array in tensors:
        want_name, want = next(expected, ("nothing more", TensorSpec("U8", ())))
        if name != want_name or array.shape != want.shape or array.dtype != DTYPES[want.dtype]:
            raise ValueError(f"expected {want_name} {want}, got {name} {array.dtype} {list(array.shape)}")
        file.write(np.ascontiguousarray(array).data)
    missing = next(expected, None)
    if missing is not None:
        raise ValueError(f"tensor {missing[0]} was not given")


def packed_plan(config: ModelConfig, head: HeadForm) -> dict[str, TensorSpec]:
    """Every tensor of a packed checkpoint, in file order, with its type and shape."""
    plan: dict[str, TensorSpec] = {}

    def rows(name: str) -> None:
        shape = (config.vocab_size, config.hidden_size)
        plan[f"{name}.weight"] = TensorSpec("I8" if head == "int8" else "BF16", shape)
        if head == "int8":
            plan[f"{name}.scale"] = TensorSpec("F32", (config.vocab_size,))

    def norm(name: str, size: int) -> None:
        plan[f"{name}.weight"] = TensorSpec("F32", (size,))

    rows("embed")
    if not config.tied:
        rows("head")
    norm("norm", config.hidden_size)
    for i in range(config.num_layers):
        norm(f"layers.{i}.input_norm", config.hidden_size)
        norm(f"layers.{i}.post_attention_norm", config.hidden_size)
        if config.sub_norms:
            norm(f"layers.{i}.attn_sub_norm", config.q_size)
            norm(f"layers.{i}.ffn_sub_norm", config.intermediate_size)
        for group in GROUPS:
            segments, K = config.group_shape(group)
            N, name = sum(segments), f"layers.{i}.{group}"
            if group_is_ternary(config, i, group):
                plan[f"{name}.words"] = TensorSpec("I32", (packed_words(N, K),))
                plan[f"{name}.scales"] = TensorSpec("F32", (len(segments),))
                if config.linear_norm:
                    plan[f"{name}.norms"] = TensorSpec("F32", (len(segments), K))
            else:
                plan[f"{name}.weight"] = TensorSpec("BF16", (N, K))
            if config.group_bias(group):
                plan[f"{name}.bias"] = TensorSpec("F32", (N,))
    return plan


def group_is_ternary(config: ModelConfig, layer: int, group: str) -> bool:
    """Whether a layer's group is quantised. Raises ConfigError where modules_to_not_convert splits a group."""
    kinds = {config.is_ternary(f"model.layers.{layer}.{module}") for module in GROUPS[group]}
    if len(kinds) > 1:
        raise ConfigError(
            "config.json: modules_to_not_convert names some but not all of "
            f"{', '.join(GROUPS[group])} in layer {layer}, which is not supported"
        )
    return kinds.pop()


@dataclass(frozen=True)
class PackedCheckpoint:
    """An open packed checkpoint. `tensor` maps; nothing is read before it is used."""

    folder: Path
    config: ModelConfig
    head: HeadForm
    file: TensorFile

    @property
    def names(self) -> list[str]:
        """Every tensor's name, in file order."""
        return list(self.file.specs)

    def tensor(self, name: str) -> NDArray[Any]:
        """A tensor over the file's own pages, read-only; bfloat16 as uint16 bit patterns. KeyError if there is none."""
        return self.file.map(name)

    def ternary(self, name: str, N: int, K: int) -> NDArray[np.int8]:
        """A tensor of packed words, unpacked: int8 [N, K]. Raises CheckpointError when the words are damaged."""
        try:
            return unpack_ternary(np.asarray(self.tensor(name)), N, K)
        except ValueError as error:
            raise CheckpointError(f"{self.file.path}: tensor {name}: {error}") from None

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.file.specs.values())


def open_packed(folder: str | os.PathLike[str]) -> PackedCheckpoint:
    """Opens a packed checkpoint and checks that every tensor is there, with its type and shape, and no other.

    Raises CheckpointError or ConfigError with one line that names what is wrong.
    """
    folder = Path(folder)
    raw = read_config(folder)
    packed = raw.get("bitnet_numba")
    if packed is None:
        raise CheckpointError(f"{folder} is not converted yet: run  python tools/convert.py {folder} DST")
    if not isinstance(packed, dict) or packed.get("format") != FORMAT or packed.get("head") not in HEAD_FORMS:
        raise CheckpointError(
            f"{folder} was written in a packed format that this version does not read; convert it again"
        )
    config = ModelConfig.from_hf(raw)
    head: HeadForm = packed["head"]
    file = TensorFile(folder / "model.safetensors")
    # A damaged config may ask for millions of layers: compare counts before the plan is drawn up.
    if config.num_layers > len(file.specs):
        raise CheckpointError(f"{file.path}: too few tensors for {config.num_layers} layers")
    plan = packed_plan(config, head)
    for name, spec in plan.items():
        if name not in file.specs:
            raise CheckpointError(f"{file.path}: tensor {name} is missing")
        if file.specs[name] != spec:
            raise CheckpointError(f"{file.path}: tensor {name} is {file.specs[name]}, expected {spec}")
    extra = next((name for name in file.specs if name not in plan), None)
    if extra is not None:
        raise CheckpointError(f"{file.path}: unexpected tensor {extra}")
    for name, spec in plan.items():
        if spec.dtype == "F32" and not np.isfinite(file.map(name)).all():
            raise CheckpointError(f"{file.path}: tensor {name} holds NaN or infinity")
        if name.endswith((".scale", ".scales")) and not (file.map(name) > 0).all():
            raise CheckpointError(f"{file.path}: tensor {name} holds a scale that is not positive")
    return PackedCheckpoint(folder, config, head, file)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder. Raises CheckpointError with one line if there is none to read."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json")
    return read_json(folder / "config.json")


def read_json(path: Path, error_type: type[BitNetError] = CheckpointError) -> dict[str, Any]:
    """A parsed JSON object. Raises `error_type` with one line for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"{path} is not readable JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise error_type(f"{path} must hold a JSON object")
    return value
