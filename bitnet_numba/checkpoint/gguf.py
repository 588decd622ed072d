"""GGUF files of BitNet models: finds every tensor of a model and reads it, whatever its type.

Names, order of rows and hyperparameters are those of llama.cpp and bitnet.cpp. A GgufCheckpoint gives the same tensors
as a HuggingFaceCheckpoint, by their names there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.checkpoint import gguf_types as types
from bitnet_numba.checkpoint.gguf_config import LINEAR_NORM, ROPE_FACTORS, find_architecture, hf_config
from bitnet_numba.checkpoint.gguf_file import GgufFile, TensorInfo, Value
from bitnet_numba.checkpoint.huggingface import GroupLinear, Rounding, TernaryLinear
from bitnet_numba.checkpoint.rows import group_ternary
from bitnet_numba.config import GEMMA_CLASS, PLAIN_CLASSES, ModelConfig
from bitnet_numba.errors import CheckpointError, printable
from bitnet_numba.model_folder import ModelFile

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn_sub_norm": "attn_sub_norm",
    "ffn_sub_norm": "ffn_sub_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = _NAMES | {  # where norms stand behind attention and feed-forward, too
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
T = TypeVar("T", bound=np.generic)
_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.DOTALL)
_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")


class GgufCheckpoint:
    """An open GGUF file. Each `take_...` reads a tensor once; `refuse_leftovers` fails if one was not taken.

    Raises CheckpointError or ConfigError, naming the file, key or tensor.
    """

    def __init__(self, path: Path, i2s_layout: types.I2sLayout | None = None):
        """i2s_layout: of tensors of type I2_S; None is x86, and the only choice for a file without them."""
        files = open_parts(ModelFile.of(path))
        self.folder, self.name = files[0].path.folder, str(files[0].path)
        self.metadata: Mapping[str, Value] = files[0].metadata
        self._architecture = find_architecture(self.metadata, self.name)[1]
        self._where: dict[str, GgufFile] = {}
        for file in files:
            for name in file.tensors:
                if self._where.setdefault(name, file) is not file:
                    raise self._error(name, f"is in {self._where[name].path.name} and in {file.path.name}")
        self._infos: dict[str, TensorInfo] = {name: file.tensors[name] for name, file in self._where.items()}
        for name in self._infos:
            self._check_type(name)
        if i2s_layout and all(info.type != types.I2_S for info in self._infos.values()):
            raise CheckpointError(f"{self.name} has no tensors of type I2_S, so there is no layout of them to choose")
        self._layout: types.I2sLayout = i2s_layout or "x86"
        self._left = set(self._infos)
        self._rounding: dict[str, Rounding] = {}
        plain = self._architecture.hf_class in PLAIN_CLASSES and LINEAR_NORM not in self._infos
        grouped = plain and self._has_group_scales()
        self.raw_config, self._notes = hf_config(self.metadata, self._infos, self._rope_factors(), grouped, self.name)
        if grouped and (
            repacked := sorted({info.type for info in self._linears().values()} & {types.TQ1_0, types.TQ2_0})
        ):
            names = ", ".join(map(types.type_name, repacked))
            self._notes.append(
                f"{names} has one scale for 256 columns: of a model that had one for 128, as Ternary-Bonsai, this file "
                "holds other weights"
            )
        self.config = ModelConfig.from_hf(self.raw_config)
        if self.config.num_layers > len(self._infos):
            raise CheckpointError(f"{self.name}: too few tensors for {self.config.num_layers} layers")
        self.nbytes = sum(info.nbytes or 0 for info in self._infos.values())

    @property
    def count(self) -> int:
        """Number of tensors."""
        return len(self._infos)

    @property
    def notes(self) -> list[str]:
        """What the user should know about this file and its conversion so far, a line each."""
        return [*self._notes, *(f"{name}: {rounding}" for name, rounding in self._rounding.items() if rounding.changed)]

    def note_rounding(self, name: str, values: NDArray[np.float32], kept: NDArray[np.float32], dtype: str) -> None:
        """Adds to the notes what is lost of values that are kept in a dtype. Raises CheckpointError for overflow."""
        self._rounding.setdefault(name, Rounding(dtype)).add(name, values, kept)

    def take_floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A tensor of floating-point numbers, exactly converted to float32. CheckpointError for NaN and infinity."""
        name = gguf_name(name, self._architecture.hf_class == GEMMA_CLASS)
        info = self._take(name, shape)
        if info.type not in types.FLOATS:
            raise self._error(name, f"has type {types.type_name(info.type)}, expected F32, F16 or BF16")
        values = types.dequantise(info.type, self._where[name].read(name)).reshape(shape)
        if not np.isfinite(values).all():
            raise self._error(name, "holds NaN or infinity")
        return values

    def take_norm(self, name: str, size: int) -> NDArray[np.float32]:
        """The weight of a norm of a layer's own, float32 [size]; Gemma's are kept with the 1 that is added to them."""
        return self.take_floats(name, (size,))

    def take_rows(self, name: str, shape: tuple[int, int]) -> "GgufRows":
        """A matrix of any type, of which rows can be read."""
        name = gguf_name(name)
        self._take(name, shape)
        return GgufRows(self._where[name], name, self._layout)

    def take_groups(self, module: str, N: int, K: int, bias: bool) -> GroupLinear:
        """A ternary linear [N, K] with group scales by its full name in transformers."""
        name = gguf_name(f"{module}.weight")
        self._take(name, (N, K))
        t, scales = group_ternary(GgufRows(self._where[name], name, self._layout, ternary=True), self)
        bias_values = self.take_floats(f"{module}.bias", (N,)) if bias else None
        if self._is_permuted(module):
            heads = N // self.config.head_dim
            t, scales = unpermute(t, heads), unpermute(scales, heads)
            bias_values = None if bias_values is None else unpermute(bias_values, heads)
        return GroupLinear(t, scales, bias_values)

    def _is_permuted(self, module: str) -> bool:
        return self._architecture.permuted and module.endswith(("q_proj", "k_proj"))

    def _linears(self) -> dict[str, TensorInfo]:
        return {name: info for name, info in self._infos.items() if _LINEAR.fullmatch(name)}

    def _has_group_scales(self) -> bool:
        """Whether a linear has more than one scale, or may have: what is not ternary is refused when it is read."""
        linears = self._linears()
        if any(info.type in types.GROUPED and info.type != types.IQ2_BN for info in linears.values()):
            return True
        for name, info in linears.items():
            if info.type == types.I2_S:
                continue
            data = self._where[name].read(name)
            if len(info.shape) == 2 and types.may_have_several_scales(info.type, data):
                try:
                    types.ternary(info.type, data, columns=info.shape[1])
                except ValueError as error:
                    if str(error) in (types.SEVERAL_SCALES, types.NOT_ONE_SCALE):
                        return True
        return False

    def take_sub_norm(self, layer: int, name: str, size: int) -> NDArray[np.float32]:
        """attn_sub_norm or ffn_sub_norm of a layer, float32 [size]."""
        return self.take_floats(f"model.layers.{layer}.{name}.weight", (size,))

    def take_linear(self, module: str, N: int, K: int, bias: bool) -> TernaryLinear:
        """A quantised linear [N, K] by its full name in transformers."""
        name = gguf_name(f"{module}.weight")
        info = self._take(name, (N, K))
        try:
            t, m = types.ternary(info.type, self._where[name].read(name), self._layout, K)
        except ValueError as error:
            raise self._error(name, str(error)) from None
        bias_values = self.take_floats(f"{module}.bias", (N,)) if bias else None
        factor = f"{name.removesuffix('.weight')}.scale"  # beside weights that are -1, 0 and 1
        if factor in self._infos:
            with np.errstate(all="ignore"):
                m = m * self.take_floats(factor, () if self._infos[factor].shape == () else (1,)).reshape(())[()]
            if not (np.isfinite(m) and m > 0):
                raise self._error(factor, "must be one positive number")
        t = t.reshape(N, K)
        if self._is_permuted(module):
            t = unpermute(t, N // self.config.head_dim)
            bias_values = None if bias_values is None else unpermute(bias_values, N // self.config.head_dim)
        norm = None
        if self.config.linear_norm:
            norm = self.take_floats(f"{name.removesuffix('.weight')}_norm_in.weight", (K,))
        return TernaryLinear(t, m, bias_values, norm)

    def refuse_leftovers(self) -> None:
        """Raises CheckpointError if a tensor has not been taken."""
        if self._left:
            raise CheckpointError(f"{self.name}: unexpected tensor {printable(min(self._left))}")

    def drop_if_equal(self, name: str, to: str) -> None:
        """A file with a second copy of a tensor is one whose head is not tied, so there is nothing to drop."""

    def _check_type(self, name: str) -> None:
        kind = self._infos[name].type
        shown = types.type_name(kind)
        if self._infos[name].nbytes is None:
            missing = f": {types.MISSING[kind]}" if kind in types.MISSING else ""
            raise self._error(name, f"has type {shown}, which is not supported{missing}")
        if _LINEAR.fullmatch(name) and kind not in types.TERNARY:
            raise self._error(name, f"has type {shown}, so this is no ternary model")

    def _rope_factors(self) -> NDArray[np.float32] | None:
        if ROPE_FACTORS not in self._infos:
            return None
        return self.take_floats(ROPE_FACTORS, self._infos[ROPE_FACTORS].shape).reshape(-1)

    def _take(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        if name not in self._infos:
            raise CheckpointError(f"{self.name}: tensor {name} is missing")
        if self._infos[name].shape != shape:
            raise self._error(name, f"has shape {list(self._infos[name].shape)}, expected {list(shape)}")
        self._left.discard(name)
        return self._infos[name]

    def _error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: tensor {printable(name)} {what}")


class GgufRows:
    """A matrix of a GGUF file, of which some rows are read at a time; see `rows.Rows`.

    Raises CheckpointError if it cannot be read row by row.
    """

    def __init__(self, file: GgufFile, name: str, layout: types.I2sLayout, ternary: bool = False):
        """ternary: whether it holds ternary weights, which Q4_0 cannot hold exactly."""
        self._file, self._layout, self._ternary = file, layout, ternary
        self.name, self.where = name, f"{file.path}: tensor {printable(name)}"
        self._kind, self.shape = file.tensors[name].type, file.tensors[name].shape
        self.dtype = types.type_name(self._kind) if self._kind in types.FLOATS else ""
        try:
            self._row = types.row_nbytes(self._kind, self.shape[1])
        except ValueError as error:
            raise self._error(str(error)) from None

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        start, stop, _ = rows.indices(self.shape[0])
        data = self._file.read(self.name, start * self._row, (stop - start) * self._row)
        try:
            values = self._values(data)
        except ValueError as error:
            raise self._error(str(error)) from None
        if not np.isfinite(values).all():
            raise self._error("holds NaN or infinity")
        return values.reshape(-1, self.shape[1])

    def _values(self, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self._kind == types.I2_S:
            scale = types.i2s_scale(self._file.read(self.name, self.shape[0] * self._row))
            return types.i2s_rows(data, scale, self._layout)
        if self._kind == types.IQ2_BN:
            return types.iq2_bn_rows(data, self.shape[1])
        if self._kind == types.Q4_0 and self._ternary:
            return types.q4_0_ternary(data)
        return types.dequantise(self._kind, data)

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where} {what}")


def open_parts(path: ModelFile) -> list[GgufFile]:
    """The file at a path; all files in order if it is one of several that a model was split into.

    Raises CheckpointError if one is missing, damaged, or of another model.
    """
    file = GgufFile(path, types.kind_and_nbytes)
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or count < 2:
        return [file]
    match = _PART.fullmatch(path.name)
    if match is None or int(match[2]) != count:
        raise CheckpointError(f"{path} is one of {count} files, but not named like NAME-00001-of-{count:05}.gguf")
    files = []
    for i in range(count):
        part = GgufFile(path.folder / f"{match[1]}-{i + 1:05}-of-{count:05}.gguf", types.kind_and_nbytes)
        if part.metadata.get("split.count") != count or part.metadata.get("split.no") != i:
            raise CheckpointError(f"{part.path} is not file {i + 1} of {count}, as its name says")
        files.append(part)
    total, found = files[0].metadata.get("split.tensors.count"), sum(len(part.tensors) for part in files)
    if total not in (None, found):
        raise CheckpointError(
            f"{files[0].path}: the {count} files hold {found} tensors, not {printable(str(total), 20)}"
        )
    return files


def gguf_name(name: str, gemma: bool = False) -> str:
    """A tensor's name in GGUF files, of its name in transformers; other names as they are."""
    module, _, part = name.rpartition(".")
    layer = _OF_LAYER.fullmatch(module)
    prefix, module = (f"blk.{layer[1]}.", layer[2]) if layer else ("", module)
    names = _GEMMA_NAMES if gemma else _NAMES
    return f"{prefix}{names[module]}.{part}" if module in names else name


def unpermute(rows: NDArray[T], heads: int) -> NDArray[T]:
    """Rows of q or k [N, ...] in the order of transformers, where dimensions i and i + head_dim / 2 rotate together.

    Files of the architecture llama have these side by side.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
