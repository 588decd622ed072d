"""What more than one operation takes, and the check that every launcher makes of its operands.

Arrays are DeviceArrays, or anything else with `__cuda_array_interface__` (CuPy, PyTorch, Numba device arrays).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from bitnet_numba.kernels.runtime.memory import DeviceArray, as_device_array
from bitnet_numba.packing import packed_scales, packed_words

RowDtype = Literal["bf16", "f16", "f32", "int8"]  # of rows that the LM-head kernels multiply
RowFormat = Literal["bf16", "f16", "f32", "int8", "ternary"]  # of the rows of an embedding table
ROW_DTYPES = {"bf16": "uint16", "f16": "float16", "f32": "float32", "int8": "int8", "ternary": "int32"}  # in memory


@cache
def _dtypes(names: str) -> tuple[np.dtype, ...]:
    return tuple(np.dtype(name) for name in names.split())


def checked(kernel: str, problem: str, **operands: tuple[Any, int, str]) -> list[Any]:
    """The operands as DeviceArrays, in their order; None stays None.

    operands: name=(array, elements that it must hold at least, dtypes that it may have, such as "float32 int32").
    Arrays are DeviceArrays or have `__cuda_array_interface__`. Raises ValueError in one line that names the kernel, the
    operand, what it is, and what `problem` (such as "a 2560 x 6912 product") takes.
    """
    arrays: list[DeviceArray | None] = []
    for name, (value, size, dtypes) in operands.items():
        if value is None:
            arrays.append(None)
            continue
        try:
            array = as_device_array(value)
        except ValueError as error:
            raise ValueError(f"{kernel}: {name}: {error}") from None
        if array.dtype not in _dtypes(dtypes):
            raise ValueError(f"{kernel}: {name} must be {' or '.join(dtypes.split())}, not {array.dtype}")
        if array.size < size:
            raise ValueError(f"{kernel}: {name} holds {array.size} elements, {problem} takes {size}")
        arrays.append(array)
    return arrays


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: x * weight / sqrt(mean(x^2) + eps)."""

    weight: Any  # float32 [columns rounded up to 32], zeros at the end
    eps: float


@dataclass(frozen=True)
class EmbeddingTable:
    """A row for each token of the vocabulary: the embedding, and the LM head where the two are tied."""

    rows: Any  # [vocab_size, columns] of the type in ROW_DTYPES; or ternary, packed (see `packing`)
    scale: Any  # float32 [vocab_size] of int8 rows; float16, group scales in storage order, of ternary rows; or None
    vocab_size: int
    columns: int
    format: RowFormat

    def __post_init__(self) -> None:
        scaled = self.format in ("int8", "ternary")
        if scaled != (self.scale is not None):
            raise ValueError(f"an embedding table of {self.format} rows takes {'scales' if scaled else 'no scales'}")

    @property
    def dtype(self) -> RowDtype:
        """Of rows that the LM-head kernels multiply. Raises ValueError for ternary rows."""
        if self.format == "ternary":
            raise ValueError("an LM head of ternary rows is a ternary product: kernels/linear multiplies it")
        return self.format

    def sizes(self) -> dict[str, tuple[Any, int, str]]:
        """Operands for `checked`."""
        shape, dtype = (self.vocab_size, self.columns), ROW_DTYPES[self.format]
        if self.format == "ternary":
            return {
                "rows": (self.rows, packed_words(*shape), dtype),
                "scale": (self.scale, packed_scales(*shape), "float16"),
            }
        return {
            "rows": (self.rows, self.vocab_size * self.columns, dtype),
            "scale": (self.scale, self.vocab_size, "float32"),
        }


@dataclass(frozen=True)
class SequenceArrays:
    """What the kernels know of sequences, each in a slot, and change as they decode."""

    tokens: Any  # int32 [slots, tokens_stride]: a slot's tokens by position
    tokens_stride: int
    position: Any  # int32 [slots]: the position that is fed next
    seen: Any  # int32 [slots, seen_stride]: a bit for every token that was fed
    seen_stride: int
    settings: Any  # float64 [slots, sampling.parts.SETTINGS]
