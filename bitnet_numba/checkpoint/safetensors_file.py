"""Safetensors files: lazy reading, and writing tensor by tensor."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitnet_numba.errors import CheckpointError, one_line

# NumPy dtype of each safetensors dtype; bfloat16 is read as uint16 bit patterns (see `bfloat16`).
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
    """A tensor's safetensors dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class TensorFile:
    """A safetensors file: its header is checked on opening, its tensors are read on demand.

    Raises CheckpointError for a missing, truncated or damaged file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        try:
            # The library validates header, offsets, gaps and file length; here only the offsets are needed.
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
            raise CheckpointError(f"{self.path}: tensor {name} has dtype {spec.dtype}, which is not supported")
        return DTYPES[spec.dtype], spec, self._offsets[name]

    def map(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only memory map."""
        dtype, spec, offset = self._locate(name)
        if spec.nbytes == 0:
            return np.empty(spec.shape, dtype)
        return np.memmap(self.path, dtype, "r", offset, spec.shape)

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as an array in memory."""
        dtype, spec, offset = self._locate(name)
        count = int(np.prod(spec.shape, dtype=np.int64))
        values = np.fromfile(self.path, dtype, count, offset=offset)
        if len(values) != count:
            raise CheckpointError(f"{self.path}: tensor {name} is truncated")
        return values.reshape(spec.shape)


def write_tensors(
    file: BinaryIO,
    plan: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, NDArray[Any]]],
    metadata: dict[str, str],
) -> None:
    """Writes a safetensors file tensor by tensor, so that only one is in memory at a time.

    Raises ValueError unless `tensors` yields exactly the names of `plan`, in its order, with its dtypes and shapes.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, spec in plan.items():
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligns the tensor data to 64 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    expected = iter(plan.items())
    for name, array in tensors:
        want_name, want = next(expected, ("nothing more", TensorSpec("U8", ())))
        if name != want_name or array.shape != want.shape or array.dtype != DTYPES[want.dtype]:
            raise ValueError(f"expected {want_name} {want}, got {name} {array.dtype} {list(array.shape)}")
        file.write(np.ascontiguousarray(array).data)
    missing = next(expected, None)
    if missing is not None:
        raise ValueError(f"tensor {missing[0]} is missing")
