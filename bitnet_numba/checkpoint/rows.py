"""Matrices of a checkpoint that are read some rows at a time: the format in which embedding and LM head are kept, and
weights that are ternary times a scale for each row and group of columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.checkpoint.packed import RowFormat
from bitnet_numba.errors import CheckpointError
from bitnet_numba.packing import num_groups, pack_scales, pack_ternary
from bitnet_numba.quantize import find_group_scales

ROWS_AT_A_TIME = 8192
LARGEST_F16 = np.float32(65504)
HeadFormat = Literal["source", "bf16", "int8"]  # what may be asked for; "source" keeps the values as they are
HEAD_FORMATS: tuple[HeadFormat, ...] = ("source", "bf16", "int8")

Named = tuple[str, NDArray[Any]]


class Rows(Protocol):
    """A matrix in a file."""

    @property
    def name(self) -> str:
        """The tensor's name, for notes."""

    @property
    def where(self) -> str:
        """What an error begins with."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""

    @property
    def dtype(self) -> str:
        """BF16, F16 or F32; "" for quantised values."""

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        """Some rows. Raises CheckpointError if they cannot be read, or hold NaN or infinity."""


class NotesRounding(Protocol):
    """A checkpoint that tells its user what is lost."""

    def note_rounding(self, name: str, values: NDArray[np.float32], kept: NDArray[np.float32], dtype: str) -> None:
        """Adds to its notes what is lost of values that are kept in another dtype. CheckpointError for overflow."""


@dataclass(frozen=True)
class FloatRows:
    """A matrix of floats in memory, or mapped; bfloat16 as uint16 bit patterns."""

    name: str
    dtype: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.values.shape

    @property
    def where(self) -> str:
        """What an error begins with."""
        return f"tensor {self.name}"

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        part = self.values[rows]
        floats = to_float32(part) if self.dtype == "BF16" else part.astype(np.float32)
        return _finite(floats, self)


@dataclass(frozen=True)
class MlxRows:
    """A matrix that MLX quantised to two bits: code * scale + bias, with sixteen codes to a word from its lowest bits.

    words uint32 [N, K / 16]; scales and biases float32 [N, K / columns of a group].
    """

    name: str
    words: NDArray[np.uint32]
    scales: NDArray[np.float32]
    biases: NDArray[np.float32]
    dtype = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return len(self.words), 16 * self.words.shape[1]

    @property
    def where(self) -> str:
        """What an error begins with."""
        return f"tensor {self.name}"

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        codes = (self.words[rows, :, None] >> np.arange(0, 32, 2, dtype=np.uint32)) & np.uint32(3)
        scales, biases = self.scales[rows, :, None], self.biases[rows, :, None]
        with np.errstate(all="ignore"):
            values = codes.reshape(*scales.shape[:2], -1).astype(np.float32) * scales + biases
        return _finite(values.reshape(len(codes), -1), self)


def _finite(values: NDArray[np.float32], rows: Rows) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{rows.where} holds NaN or infinity")
    return values


def pieces(rows: Rows) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """All rows, some at a time, so that not all are in memory as float32."""
    for start in range(0, rows.shape[0], ROWS_AT_A_TIME):
        part = slice(start, min(start + ROWS_AT_A_TIME, rows.shape[0]))
        yield part, rows[part]


def group_ternary(rows: Rows, checkpoint: NotesRounding) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """A matrix as ternary weights [N, K] and the scales of each row and 128 columns [N, groups].

    Raises CheckpointError for weights that are not exactly of this kind.
    """
    N, K = rows.shape
    t, scales = np.empty((N, K), np.int8), np.empty((N, num_groups(K)), np.float32)
    for part, values in pieces(rows):
        found = find_group_scales(values)
        if found is None:
            raise CheckpointError(
                f"{rows.where} is not ternary weights times a scale for each row and 128 columns, "
                "so this is not a ternary model"
            )
        t[part], scales[part] = found
    return t, _as_half(rows, scales, checkpoint)


def _as_half(rows: Rows, scales: NDArray[np.float32], checkpoint: NotesRounding) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if not np.isfinite(half).all() or ((half == 0) & (scales > 0)).any():
        raise CheckpointError(f"{rows.where} has a scale that is out of the range of float16")
    checkpoint.note_rounding(f"{rows.name}: scales", scales, half.astype(np.float32), "float16")
    return half


def row_format(rows: Rows, wanted: HeadFormat, group_scales: bool) -> RowFormat:
    """The format in which a checkpoint's embedding or LM head is kept: as it is, unless another one is asked for.

    group_scales: whether the model's linears have them; then its rows may be ternary, too. Quantised values that are
    not become float16, which is far more precise than they are.
    """
    if wanted != "source":
        return wanted
    if group_scales and all(find_group_scales(values) is not None for values in _values(rows)):
        return "ternary"
    if rows.dtype == "BF16" or all(map(_is_bfloat16, _values(rows))):
        return "bf16"
    if rows.dtype == "F16" or (rows.dtype == "F32" and all(map(_is_half, _values(rows)))):
        return "f16"
    if rows.dtype == "F32":
        return "f32"
    return "f16" if all(np.abs(values).max() <= LARGEST_F16 for values in _values(rows)) else "bf16"


def _values(rows: Rows) -> Iterator[NDArray[np.float32]]:
    return (values for _, values in pieces(rows))


def _is_bfloat16(values: NDArray[np.float32]) -> bool:
    return not (values.view(np.uint32) & np.uint32(0xFFFF)).any()


def _is_half(values: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16), values)


def row_tensors(
    checkpoint: NotesRounding, name: str, rows: Rows, kept_as: RowFormat, advance: Callable[[int], None]
) -> Iterator[Named]:
    """The tensors of embedding or LM head; `advance` gets the bytes that are ready.

    int8 rows have one scale absmax / 127 per row.
    """
    if kept_as == "ternary":
        t, scales = group_ternary(rows, checkpoint)
        for suffix, array in (("words", pack_ternary(t)), ("scales", pack_scales(scales))):
            advance(array.nbytes)
            yield f"{name}.{suffix}", array
        return
    dtype = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32, "int8": np.int8}[kept_as]
    out: NDArray[Any] = np.empty(rows.shape, dtype)
    scales_of_rows = np.empty(rows.shape[0], np.float32)
    for part, values in pieces(rows):
        if kept_as == "int8":
            out[part], scales_of_rows[part] = _int8_rows(values)
        elif kept_as == "bf16":
            out[part] = from_float32(values)
            checkpoint.note_rounding(rows.name, values, to_float32(out[part]), "bfloat16")
        else:
            out[part] = values
            checkpoint.note_rounding(rows.name, values, out[part].astype(np.float32), "float16")
        advance(out[part].nbytes)
    yield f"{name}.weight", out
    if kept_as == "int8":
        advance(scales_of_rows.nbytes)
        yield f"{name}.scale", scales_of_rows


def _int8_rows(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scales = np.abs(values).max(axis=1) / np.float32(127)
    scales = np.where(scales >= np.finfo(np.float32).tiny, scales, np.float32(1))
    return np.clip(np.rint(values / scales[:, None]), -127, 127).astype(np.int8), scales
