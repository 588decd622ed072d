"""Safetensors files: lazy reading, and writing tensor by tensor."""

import errno
import functools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitnet_numba.errors import CheckpointError, one_line, printable
from bitnet_numba.model_folder import FileError, ModelFile, refuse_lfs_pointer, why

# NumPy dtype of each safetensors dtype; bfloat16 is read as uint16 bit patterns (see `bfloat16`).
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}

PIECE = 16 << 20  # bytes that are written at a time


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
        return printable(f"{self.dtype} {list(self.shape)}", 100)


class TensorFile:
    """A safetensors file: its header is checked on opening, its tensors are read on demand.

    The file stays open, so all tensors come from the same file even if another takes its place. Raises CheckpointError
    for a missing, truncated or damaged file.
    """

    def __init__(self, path: str | os.PathLike[str] | ModelFile):
        self.path = ModelFile.of(path)
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        try:
            self._fd = self.path.open()
            weakref.finalize(self, os.close, self._fd)
            with self._reopen() as file:
                file.seek(0)  # the descriptor may share its position with others
                start = file.read(64)
                refuse_lfs_pointer(start)
                # The library validates header, offsets, gaps and file length; here only the offsets are needed.
                with safe_open(self._library_path(), framework="numpy"):
                    pass
                header_size = int.from_bytes(start[:8], "little")
                file.seek(8)
                header = json.loads(file.read(header_size))
        except FileError as error:
            reason = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error}"
            raise CheckpointError(f"{self.path} {reason}") from None
        except MemoryError:
            size = os.fstat(self._fd).st_size
            raise CheckpointError(f"{self.path} ({size / 1e6:,.0f} MB) cannot be mapped: not enough memory") from None
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path} is not a readable safetensors file: {one_line(error)}") from None
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            self.specs[name] = TensorSpec(entry["dtype"], tuple(entry["shape"]))
            self._offsets[name] = 8 + header_size + entry["data_offsets"][0]

    def _reopen(self) -> BinaryIO:
        """The open file as a file object, which leaves it open when it is closed."""
        return open(self._fd, "rb", closefd=False)

    def _library_path(self) -> str:
        """A path to the open file, for the library; the file's own path where the system has no such paths."""
        of_descriptor = f"/dev/fd/{self._fd}"
        return of_descriptor if os.path.exists(of_descriptor) else str(self.path.path)

    def _locate(self, name: str) -> tuple[np.dtype[Any], TensorSpec, int]:
        spec = self.specs[name]
        if spec.dtype not in DTYPES:
            raise self._error(name, f"has dtype {spec.dtype}, which is not supported")
        return DTYPES[spec.dtype], spec, self._offsets[name]

    def _error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {printable(name)} {what}")

    def map(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only memory map of its own, which takes no more address space than the tensor."""
        dtype, spec, offset = self._locate(name)
        if spec.nbytes == 0:
            return np.empty(spec.shape, dtype)
        try:
            with self._reopen() as file:
                return np.memmap(file, dtype, "r", offset, spec.shape)
        except (OSError, ValueError) as error:  # ValueError: the file has become shorter
            raise self._error(name, f"({spec.nbytes / 1e6:,.0f} MB) cannot be mapped: {why(error)}") from None

    def view(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the whole file, mapped.

        For many tensors: each map of its own keeps a descriptor, of which some systems allow 256.
        """
        dtype, spec, offset = self._locate(name)
        if os.fstat(self._fd).st_size < offset + spec.nbytes:
            raise self._error(name, "is truncated")
        return self._bytes[offset : offset + spec.nbytes].view(dtype).reshape(spec.shape)

    @functools.cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        size = os.fstat(self._fd).st_size
        try:
            with self._reopen() as file:
                return np.memmap(file, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} ({size / 1e6:,.0f} MB) cannot be mapped: {why(error)}") from None

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as an array in memory."""
        dtype, spec, offset = self._locate(name)
        count = int(np.prod(spec.shape, dtype=np.int64))
        try:
            with self._reopen() as file:
                file.seek(offset)
                values = np.fromfile(file, dtype, count)
        except OSError as error:
            raise self._error(name, f"cannot be read: {why(error)}") from None
        if len(values) != count:
            raise self._error(name, "is truncated")
        return values.reshape(spec.shape)


def write_tensors(
    file: BinaryIO,
    plan: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, NDArray[Any]]],
    metadata: dict[str, str],
    advance: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Writes a safetensors file tensor by tensor, so that only one is in memory at a time.

    advance: called with the bytes of each piece of a tensor, when it is written.

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
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            file.write(piece.data)
            advance(len(piece))
    missing = next(expected, None)
    if missing is not None:
        raise ValueError(f"tensor {missing[0]} is missing")
