"""Hugging Face BitNet checkpoints: finds every tensor of a model and reads it, whatever its weight format.

The three weight formats of a quantised linear (`ModelConfig.weight_format`), all read as ternary t and a float32 scale
m such that y = sum(q * t) * m / s:

    online      floating-point master weights, ternarised on reading: m = absmean
    offline     packed uint8 and weight_scale = absmean: m = weight_scale, and a bias is scaled with it;
                or, as some versions of transformers save it, the same unpacked to floats
    bitlinear   packed uint8 and weight_scale = 1 / absmean: m = 1 / weight_scale

and two of models that are not BitNet, whose weights have a scale for each row and 128 columns (`take_groups`):

    floats      floats that must be found to be ternary times a scale
    mlx         two-bit codes, scales and biases of MLX, which must be found to be that, too

Packed uint8 is [out / 4, in], in planes along the output rows: bits 2i, 2i + 1 of byte [r, c] hold t + 1 of row
i * out / 4 + r.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.checkpoint.packed import read_config
from bitnet_numba.checkpoint.rows import FloatRows, MlxRows, Rows, group_ternary
from bitnet_numba.checkpoint.safetensors_file import DTYPES, TensorFile, TensorSpec
from bitnet_numba.config import ModelConfig, config_notes
from bitnet_numba.errors import CheckpointError, printable
from bitnet_numba.json_file import read_json
from bitnet_numba.model_folder import ModelFile, ModelFolder
from bitnet_numba.quantize import ternarize

_FLOATS = ("BF16", "F16", "F32")
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that some files have and no model needs, of whatever type: they follow from the config.
_IGNORED = re.compile(
    r"(.+\.)?(rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|position_ids|masked_bias|causal_mask)"
)
_ROWS_AT_A_TIME = 8192  # of tensors that are compared
# The two names of each sub-norm.
_SUB_NORMS = {
    "attn_sub_norm": ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"),
    "ffn_sub_norm": ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"),
}


@dataclass(frozen=True)
class TernaryLinear:
    """A quantised linear: t int8 [N, K], scale m, bias float32 [N] or None, input norm float32 [K] or None."""

    t: NDArray[np.int8]
    m: np.float32
    bias: NDArray[np.float32] | None
    norm: NDArray[np.float32] | None


@dataclass(frozen=True)
class GroupLinear:
    """A ternary linear with group scales: t int8 [N, K], scales float16 [N, groups], bias float32 [N] or None."""

    t: NDArray[np.int8]
    scales: NDArray[np.float16]
    bias: NDArray[np.float32] | None


class HuggingFaceCheckpoint:
    """An open Hugging Face folder. Each `take_...` reads a tensor once; `refuse_leftovers` fails if one was not taken.

    Raises CheckpointError or ConfigError, naming the file, key or tensor.
    """

    def __init__(self, folder: Path | ModelFolder):
        self.folder = ModelFolder.of(folder)
        self.raw_config = read_config(self.folder)
        if "bitnet_numba" in self.raw_config:
            raise CheckpointError(f"{self.folder} is already a packed checkpoint")
        self.config = ModelConfig.from_hf(self.raw_config)
        try:
            json.dumps(self.raw_config, indent=2)  # as it will be written
        except RecursionError:
            raise CheckpointError(f"{folder}: config.json is nested too deeply") from None
        self._notes = config_notes(self.raw_config)
        self._rounding: dict[str, Rounding] = {}
        self._files: dict[str, TensorFile] = {}
        for path in _tensor_files(self.folder):
            file = TensorFile(path)
            for name in file.specs:
                if name in self._files:
                    shown = printable(name)
                    raise CheckpointError(f"{path}: tensor {shown} is already in {self._files[name].path.name}")
                self._files[name] = file
        self._stored_as: dict[str, str] = {}
        self._left = {name for name in self._files if not _IGNORED.fullmatch(name)}
        for name in sorted(self._left):
            if self._spec(name).dtype not in DTYPES:
                dtype = self._spec(name).dtype
                raise CheckpointError(f"{folder}: tensor {printable(name)} has dtype {dtype}, which is not supported")
        if self.config.num_layers > len(self._files):
            raise CheckpointError(f"{folder}: too few tensors for {self.config.num_layers} layers")
        # One matrix under two names may be stored under either.
        only_head = self.config.tied and EMBEDDING not in self._files and LM_HEAD in self._files
        if only_head:
            self._stored_as[EMBEDDING] = LM_HEAD
        if self.config.embeds:  # saved without the class around it that has an LM head
            self._stored_as |= {f"model.{name}": name for name in self._left if not name.startswith("model.")}
        self.nbytes = sum(self._spec(name).nbytes for name in self._left)

    @property
    def count(self) -> int:
        """Number of tensors."""
        return len(self._files)

    @property
    def notes(self) -> list[str]:
        """What the user should know about this checkpoint and its conversion so far, a line each."""
        return [*self._notes, *(f"{name}: {rounding}" for name, rounding in self._rounding.items() if rounding.changed)]

    def note_rounding(self, name: str, values: NDArray[np.float32], kept: NDArray[np.float32], dtype: str) -> None:
        """Adds to the notes what is lost of values that are kept in a dtype. Raises CheckpointError for overflow."""
        self._rounding.setdefault(name, Rounding(dtype)).add(name, values, kept)

    def take_floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A floating-point tensor, exactly converted to float32. CheckpointError for NaN and infinity."""
        return _as_float32(*self._take(name, shape, _FLOATS), name)

    def take_norm(self, name: str, size: int) -> NDArray[np.float32]:
        """The weight of a norm of a layer's own, float32 [size]; Gemma's are kept as what they differ from 1."""
        weight = self.take_floats(name, (size,))
        return weight + np.float32(1) if self.config.gemma else weight

    def take_rows(self, name: str, shape: tuple[int, int]) -> Rows:
        """A matrix of floats, or of what MLX makes of floats, of which rows can be read."""
        module = self._stored_as.get(name, name).removesuffix(".weight")
        if self.config.weight_format == "mlx" and f"{module}.scales" in self._files:
            return self._take_mlx(module, shape)
        stored, spec = self._find(name, shape, _FLOATS)
        return FloatRows(stored, spec.dtype, self._files[stored].map(stored))

    def take_groups(self, module: str, N: int, K: int, bias: bool) -> GroupLinear:
        """A ternary linear [N, K] with group scales by its full module name."""
        t, scales = group_ternary(self.take_rows(f"{module}.weight", (N, K)), self)
        return GroupLinear(t, scales, self.take_floats(f"{module}.bias", (N,)) if bias else None)

    def take_sub_norm(self, layer: int, name: str, size: int) -> NDArray[np.float32]:
        """attn_sub_norm or ffn_sub_norm of a layer, by either of its names, float32 [size]."""
        ours, other = (f"model.layers.{layer}.{spelling}.weight" for spelling in _SUB_NORMS[name])
        return self.take_floats(other if other in self._files and ours not in self._files else ours, (size,))

    def take_linear(self, module: str, N: int, K: int, bias: bool) -> TernaryLinear:
        """A quantised linear [N, K] by its full module name, in any weight format."""
        weight_format = self.config.weight_format
        bias_values = self.take_floats(f"{module}.bias", (N,)) if bias else None
        of_norm = "norm" if self.config.embeds else "rms_norm"
        norm = self.take_floats(f"{module}.{of_norm}.weight", (K,)) if self.config.linear_norm else None
        name = f"{module}.weight"
        if weight_format == "online":
            t, m = ternarize(self.take_floats(name, (N, K)))
            return TernaryLinear(t, m, bias_values, norm)
        magnitude = np.float32(1)
        if weight_format == "offline" and self._spec(name).dtype in _FLOATS:
            t, magnitude = _signs(self.take_floats(name, (N, K)), name)
        elif N % 4:
            raise CheckpointError(f"tensor {name}: {N} rows cannot be packed four to a byte")
        else:
            t = _unpack_planes(self._take(name, (N // 4, K), ("U8",))[1], name)
        stored = self._take_scale(f"{module}.weight_scale")
        with np.errstate(over="ignore"):
            m = stored * magnitude if weight_format == "offline" else np.float32(1) / stored
        if not (np.isfinite(m) and m > 0):
            raise CheckpointError(f"tensor {module}.weight_scale = {stored} is out of range")
        if bias_values is not None and weight_format == "offline":
            bias_values = bias_values * stored
        return TernaryLinear(t, m, bias_values, norm)

    def refuse_leftovers(self) -> None:
        """Raises CheckpointError if a tensor has not been taken."""
        if self._left:
            raise CheckpointError(f"{self.folder}: unexpected tensor {printable(min(self._left))}")

    def drop_if_equal(self, name: str, to: str) -> None:
        """Accepts a redundant copy of a tensor (a tied head stored twice). CheckpointError if its values differ."""
        if name not in self._left:
            return
        dtype, other = self._spec(name).dtype, self._spec(to).dtype
        if self._spec(name).shape != self._spec(to).shape or dtype not in _FLOATS:
            raise CheckpointError(f"tensor {name} differs from {to}, but config.json says they are tied")
        copy, original = self._files[name].map(name), self._files[to].map(to)
        for start in range(0, len(copy), _ROWS_AT_A_TIME):
            some, same = copy[start : start + _ROWS_AT_A_TIME], original[start : start + _ROWS_AT_A_TIME]
            if dtype != other:
                some, same = _as_float32(dtype, some, name), _as_float32(other, same, to)
            if not np.array_equal(some, same):
                raise CheckpointError(f"tensor {name} differs from {to}, but config.json says they are tied")
        self._left.discard(name)

    def _spec(self, name: str) -> TensorSpec:
        name = self._stored_as.get(name, name)
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self._files[name].specs[name]

    def _take(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> tuple[str, NDArray[Any]]:
        name, spec = self._find(name, shape, dtypes)
        return spec.dtype, self._files[name].read(name)

    def _take_mlx(self, module: str, shape: tuple[int, int]) -> MlxRows:
        N, K = shape
        columns = (self.raw_config.get("quantization_config") or self.raw_config["quantization"])["group_size"]
        if K % columns:
            raise CheckpointError(f"tensor {module}.weight: {K} columns are not whole groups of {columns}")
        words = self._take(f"{module}.weight", (N, K // 16), ("U32",))[1]
        scales, biases = (self.take_floats(f"{module}.{part}", (N, K // columns)) for part in ("scales", "biases"))
        return MlxRows(f"{module}.weight", words, scales, biases)

    def _find(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> tuple[str, TensorSpec]:
        """The name under which a tensor is stored, and its checked spec; it counts as taken."""
        name = self._stored_as.get(name, name)
        spec = self._spec(name)
        if spec.dtype not in dtypes:
            raise CheckpointError(f"tensor {name} has dtype {spec.dtype}, expected {' or '.join(dtypes)}")
        if spec.shape != shape:
            raise CheckpointError(f"tensor {name} has shape {list(spec.shape)}, expected {list(shape)}")
        self._left.discard(name)
        return name, spec

    def _take_scale(self, name: str) -> np.float32:
        shape: tuple[int, ...] = () if self._spec(name).shape == () else (1,)
        value = self.take_floats(name, shape).reshape(())[()]
        if not value > 0:
            raise CheckpointError(f"tensor {name} = {value} must be positive")
        return np.float32(value)


class Rounding:
    """What is lost of some values that are rounded, added up."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self.count = self.changed = 0
        self._error = self._size = 0.0  # sums of squares

    def add(self, name: str, values: NDArray[np.float32], rounded: NDArray[np.float32]) -> None:
        if not np.isfinite(rounded).all():
            raise CheckpointError(f"{name}: {np.abs(values).max()} is too large for {self._dtype}")
        error = rounded - values
        self.count += values.size
        self.changed += int(np.count_nonzero(error))
        self._error += _sum_of_squares(error)
        self._size += _sum_of_squares(values)

    def __str__(self) -> str:
        rms = math.sqrt(self._error / self._size)
        return f"kept as {self._dtype}, which rounds {self.changed / self.count:.1%} of the values; rms error {rms:.2%}"


def _sum_of_squares(values: NDArray[np.float32]) -> float:
    flat = values.ravel()
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))  # without a float64 copy of them all


def _tensor_files(folder: ModelFolder) -> list[ModelFile]:
    """The safetensors files of a folder: the single file, as in transformers whatever else is there, or the shards."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors (other file formats are not supported)")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = set(map(json.dumps, weight_map.values()))
    for name in map(json.loads, names):
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise CheckpointError(f"{index}: {printable(repr(name), 80)} is not a safetensors file name")
    return [folder / json.loads(name) for name in sorted(names)]


def _as_float32(dtype: str, values: NDArray[Any], name: str) -> NDArray[np.float32]:
    floats = to_float32(values) if dtype == "BF16" else values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise CheckpointError(f"tensor {name} holds NaN or infinity")
    return floats


def _unpack_planes(packed: NDArray[np.uint8], name: str) -> NDArray[np.int8]:
    """uint8 [N / 4, K] in four planes of rows -> ternary int8 [N, K]."""
    t = np.concatenate([(packed >> np.uint8(2 * plane)) & np.uint8(3) for plane in range(4)])
    if (t == 3).any():
        raise CheckpointError(f"tensor {name} holds the unused code 3 and is damaged")
    return t.view(np.int8) - np.int8(1)


def _signs(values: NDArray[np.float32], name: str) -> tuple[NDArray[np.int8], np.float32]:
    """Ternary floats -c, 0 and c as int8 of -1, 0 and 1, and c. CheckpointError for floats that are not ternary."""
    sizes = np.abs(values)
    magnitude = sizes.max()
    if not ((sizes == magnitude) | (sizes == 0)).all():
        raise CheckpointError(f"tensor {name} holds floats that are not ternary, but config.json says offline")
    return np.sign(values).astype(np.int8), magnitude if magnitude > 0 else np.float32(1)
