"""GGUF files, versions 2 and 3, little endian: metadata, and where the bytes of each tensor are.

Nothing in a file is believed before it is checked: a length is compared with what is left of the file before anything
of that size is read, so that a damaged header costs neither memory nor time.
"""

import errno
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.errors import CheckpointError, printable
from bitnet_numba.model_folder import FileError, ModelFile, refuse_lfs_pointer, why

MAGIC = b"GGUF"
ALIGNMENT = "general.alignment"
STRING, ARRAY = 8, 9
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
MAX_HEADER = 100_000_000  # bytes; vocabularies of 262,144 tokens with their merges take 15 MB
_MAX_ITEMS = 1 << 22  # keys, strings and tensors of a header together
_MAX_KEY = 1 << 16  # bytes of a key or of a tensor's name, as in llama.cpp
_MAX_DIMENSIONS = 4
_LARGEST = 1 << 62  # elements of a tensor


@dataclass(frozen=True, eq=False)
class Numbers:
    """An array of numbers as the value of a key. It equals nothing else, as NumPy's arrays do not."""

    values: NDArray[Any]


Value = bool | int | float | str | list[str] | Numbers  # of a key


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's GGML type, its shape (rows first, as in NumPy) and the place of its bytes in the file.

    nbytes: None for a type of unknown size.
    """

    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int | None


SizeOf = Callable[[int, tuple[int, ...], int], tuple[int, int | None]]


class GgufFile:
    """An open GGUF file: the header is checked on opening, tensors are read on demand.

    The file stays open, so all tensors come from the same file even if another takes its place. Raises CheckpointError
    for a missing, truncated or damaged file.
    """

    def __init__(self, path: str | os.PathLike[str] | ModelFile, size_of: SizeOf):
        """size_of: the type and bytes of a tensor of a GGML type and shape, with so many bytes up to the next one; None
        if its bytes are not known; ValueError, with the reason, if no tensor of this type can have this shape."""
        self.path = ModelFile.of(path)
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._fd = self.path.open()
            weakref.finalize(self, os.close, self._fd)
            with self._reopen() as file:
                self._read_header(_Header(file, os.fstat(self._fd).st_size), size_of)
        except FileError as error:
            reason = "does not exist" if error.errno == errno.ENOENT else f"cannot be read: {error}"
            raise CheckpointError(f"{self.path} {reason}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {why(error)}") from None
        except _Damage as error:
            raise CheckpointError(f"{self.path} is not a readable GGUF file: {error}") from None

    def read(self, name: str, start: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        """`nbytes` bytes of a tensor from `start` on, or all that are left, in memory. KeyError if there is none."""
        info = self.tensors[name]
        assert info.nbytes is not None
        count = info.nbytes - start if nbytes is None else nbytes
        try:
            with self._reopen() as file:
                file.seek(info.offset + start)
                data = np.fromfile(file, np.uint8, count)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {printable(name)} cannot be read: {why(error)}") from None
        if len(data) != count:
            raise CheckpointError(f"{self.path}: tensor {printable(name)} is truncated")
        return data

    def _reopen(self) -> BinaryIO:
        """The open file as a file object, which leaves it open when it is closed."""
        return open(self._fd, "rb", closefd=False)

    def _read_header(self, header: "_Header", size_of: SizeOf) -> None:
        magic = header.take(4)
        if magic != MAGIC:
            refuse_lfs_pointer(magic + header.take(60))
            raise _Damage("it does not start with GGUF")
        version = header.integer("<I")
        if version not in (2, 3):
            big = int.from_bytes(version.to_bytes(4, "big"), "little") in (2, 3)
            raise _Damage("it is big-endian" if big else f"version {version} is not supported (2 or 3)")
        tensors, keys = header.integer("<Q"), header.integer("<Q")
        # The smallest key takes 13 bytes, the smallest tensor 24.
        if keys > header.left // 13 or tensors > header.left // 24:
            raise _Damage(f"it is too short for {keys} keys and {tensors} tensors")
        for _ in range(keys):
            key = header.text("a key", _MAX_KEY)
            if key in self.metadata:
                raise _Damage(f"key {printable(key)} stands twice")
            self.metadata[key] = header.value(header.integer("<I"), printable(key))
        infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name = header.text("a tensor's name", _MAX_KEY)
            if name in infos:
                raise _Damage(f"tensor {printable(name)} stands twice")
            infos[name] = header.tensor(printable(name))
        self._place(infos, header, size_of)

    def _place(
        self,
        infos: dict[str, tuple[int, tuple[int, ...], int]],
        header: "_Header",
        size_of: SizeOf,
    ) -> None:
        """Finds each tensor in the file, and that it is in the file and shares no byte with another."""
        alignment = self.metadata.get(ALIGNMENT, 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _Damage(f"{ALIGNMENT} is not a power of two")
        first = -(-header.position // alignment) * alignment
        end, last = first, ""
        in_order = sorted(infos.items(), key=lambda item: item[1][2])
        ends = [offset for _, (_, _, offset) in in_order[1:]] + [header.size - first]
        for (name, (kind, shape, offset)), next_offset in zip(in_order, ends, strict=False):
            shown = printable(name)
            if offset % alignment:
                raise _Damage(f"tensor {shown} is not aligned to {alignment} bytes")
            try:
                kind, nbytes = size_of(kind, shape, next_offset - offset)
            except ValueError as error:
                raise _Damage(f"tensor {shown} {error}") from None
            if first + offset < end:
                raise _Damage(f"tensors {printable(last)} and {shown} overlap")
            end, last = first + offset + (nbytes or 0), name
            if end > header.size:
                raise _Damage(f"tensor {shown} ends after the end of the file, which is truncated")
            self.tensors[name] = TensorInfo(kind, shape, first + offset, nbytes)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file at a path that begins as GGUF files do, whatever its name is."""
    try:
        with open(ModelFile.of(path).open(), "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, CheckpointError):
        return False


class _Damage(Exception):
    """What is wrong with a file."""


class _Header:
    """Reads a header's parts in order."""

    def __init__(self, file: BinaryIO, size: int):
        file.seek(0)  # the descriptor may share its position with others
        self._file = file
        self.size = size
        self.position = 0
        self._items = 0

    @property
    def left(self) -> int:
        """Bytes that may still belong to the header."""
        return min(self.size, MAX_HEADER) - self.position

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.left:
            if self.position + nbytes <= self.size:
                raise _Damage(f"its header is larger than {MAX_HEADER // 10**6} MB")
            raise _Damage("it is truncated, or a length in its header is wrong")
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise _Damage("it is truncated")
        self.position += nbytes
        return data

    def integer(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def text(self, what: str, limit: int = MAX_HEADER) -> str:
        self._items += 1
        if self._items > _MAX_ITEMS:
            raise _Damage(f"its header has more than {_MAX_ITEMS:,} parts")
        length = self.integer("<Q")
        if length > limit and length <= self.left:
            raise _Damage(f"{what} has {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise _Damage(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Value:
        """The value of a key."""
        if kind == STRING:
            return self.text(key)
        if kind in SCALARS:
            dtype = SCALARS[kind]
            scalar: bool | int | float = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
            return scalar
        if kind != ARRAY:
            raise _Damage(f"{key} has the unknown type {kind}")
        element, count = self.integer("<I"), self.integer("<Q")
        if element == STRING:
            return [self.text(key) for _ in range(count)]
        if element in SCALARS:
            dtype = SCALARS[element]
            return Numbers(np.frombuffer(self.take(count * dtype.itemsize), dtype))
        raise _Damage(f"{key} is an array of the unsupported type {element}")

    def tensor(self, name: str) -> tuple[int, tuple[int, ...], int]:
        """GGML type, shape and offset of a tensor."""
        dimensions = self.integer("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise _Damage(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.integer("<Q") for _ in range(dimensions))[::-1]
        elements = 1
        for size in shape:
            elements *= size
        if not 0 < elements <= _LARGEST:
            raise _Damage(f"tensor {name} has {elements} elements")
        return self.integer("<I"), shape, self.integer("<Q")
