"""Model folders, opened so that every file comes from the same folder even if another takes its place meanwhile.

A folder is opened once, and its files relative to it, never again by its path. Only regular files of bounded size are
read, because a pipe or a device would hold the program up for ever.
"""

import errno
import io
import os
import stat
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

from bitnet_numba.errors import CheckpointError, printable

MAX_SIZE = 100_000_000  # bytes of a file that is read as a whole; the tokenizer.json of large vocabularies has 35 MB
_RELATIVE = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd  # not on Windows
_OPEN_FOLDER = (
    os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_PATH", 0)
)  # may be searched, need not be read
_OPEN_FILE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # errors that mean that there is no such file
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class FileError(OSError):
    """A file that cannot be read. The message is only the reason; it does not name the file."""

    def __str__(self) -> str:
        return self.strerror or "unreadable"


class ModelFolder:
    """An open folder; `folder / name` is a file in it. Raises CheckpointError if there is no such folder."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        shown: str | os.PathLike[str] | None = None,
        made_from: Mapping[str, str] | None = None,
    ):
        """shown: the path that messages name instead of `path`. made_from: for files that
        were generated, the source that messages name in their place."""
        self.path = Path(path)
        self.made_from = {name: printable(source, 400) for name, source in (made_from or {}).items()}
        self._shown = printable(os.fspath(path if shown is None else shown), 400)
        self.fd: int | None = None
        self.held: dict[str, int | FileError] = {}  # files that `hold` has opened, or why it could not
        self._descriptors: list[int] = []
        self._close = weakref.finalize(self, _close_all, self._descriptors)
        try:
            found = os.stat(path)
            if not stat.S_ISDIR(found.st_mode):
                raise CheckpointError(f"{self} is not a folder{_gguf_hint(str(self))}")
            if _RELATIVE:
                self.fd = os.open(path, _OPEN_FOLDER)
                self._descriptors.append(self.fd)
                found = os.fstat(self.fd)
        except FileNotFoundError:
            raise CheckpointError(f"{self} does not exist") from None
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            raise CheckpointError(f"{self} cannot be opened: {why(error)}") from None
        self._identity = found.st_dev, found.st_ino

    @staticmethod
    def of(folder: "str | os.PathLike[str] | ModelFolder") -> "ModelFolder":
        """`folder` itself, or the folder at a path, opened."""
        return folder if isinstance(folder, ModelFolder) else ModelFolder(folder)

    def __str__(self) -> str:
        return self._shown

    def __truediv__(self, name: str) -> "ModelFile":
        return ModelFile(self, name)

    def hold(self, names: Iterable[str]) -> None:
        """Opens these files now, as far as they exist: they can be read even when they have been deleted."""
        for name in names:
            try:
                fd = (self / name).open()
                self._descriptors.append(fd)
                self.held[name] = fd
            except FileError as error:
                self.held[name] = error

    def close(self) -> None:
        """Closes what is open; a file that is opened now is found by its path."""
        self._close()
        self.held, self.fd = {}, None

    def replaced(self) -> bool:
        """Whether the path no longer leads to this folder, so that it may have been deleted in part."""
        try:
            now = os.stat(self.path)
        except OSError:
            return True
        return (now.st_dev, now.st_ino) != self._identity


class ModelFile:
    """A file of a model folder, which need not exist. It reads as a `pathlib.Path` does, and prints as the path."""

    def __init__(self, folder: ModelFolder, name: str):
        self.folder, self.name = folder, name

    @staticmethod
    def of(file: "str | os.PathLike[str] | ModelFile") -> "ModelFile":
        """`file` itself, or the file at a path."""
        return file if isinstance(file, ModelFile) else ModelFolder(Path(file).parent) / Path(file).name

    def __str__(self) -> str:
        return self.folder.made_from.get(self.name) or os.path.join(str(self.folder), printable(self.name))

    def exists(self) -> bool:
        """Whether there is anything of this name; a link that leads nowhere does not count."""
        held = self.folder.held.get(self.name)
        if held is not None:
            return not isinstance(held, FileError) or held.errno not in _NOTHING
        try:
            os.stat(self._path, dir_fd=self.folder.fd)
        except OSError as error:
            return error.errno not in _NOTHING
        except ValueError:  # a null character in the name
            return False
        return True

    is_file = exists  # what is not a regular file is refused, with the reason, when it is read

    def open(self) -> int:
        """A file descriptor for reading. Raises FileError if there is no regular file."""
        held = self.folder.held.get(self.name)
        if isinstance(held, FileError):
            raise held
        try:
            if held is not None:
                return os.dup(held)
            fd = os.open(self._path, _OPEN_FILE, dir_fd=self.folder.fd)
        except (OSError, ValueError) as error:
            raise FileError(getattr(error, "errno", None) or errno.EINVAL, why(error)) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileError(errno.EINVAL, "it is not a regular file")
        return fd

    def read_bytes(self) -> bytes:
        """The content. Raises FileError, also for more than MAX_SIZE bytes and for a Git LFS pointer."""
        with open(self.open(), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_SIZE:
                raise FileError(errno.EFBIG, f"it is larger than {MAX_SIZE // 10**6} MB")
            try:
                file.seek(0)  # the descriptor may share its position with others
                data = file.read(size)
            except OSError as error:
                raise FileError(error.errno, why(error)) from None
        refuse_lfs_pointer(data)
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content as text, with newlines as `Path.read_text` has them. Raises FileError or UnicodeDecodeError."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding).read()

    @property
    def path(self) -> Path:
        """Where to find the file by its path, for libraries that open it themselves."""
        return self.folder.path / self.name

    @property
    def _path(self) -> str:
        return self.name if self.folder.fd is not None else str(self.path)


def refuse_lfs_pointer(start: bytes) -> None:
    """Raises FileError if a file that starts like this only says where Git LFS keeps the real one."""
    if start.startswith(_LFS_POINTER):
        raise FileError(errno.EINVAL, "it is a Git LFS pointer: run git lfs pull in its repository")


def why(error: Exception) -> str:
    """The reason of an OSError without the path, or the message of another error."""
    return getattr(error, "strerror", None) or printable(str(error))


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _gguf_hint(shown: str) -> str:
    """What to do about a GGUF file where a model folder is wanted."""
    return f"; run  bitnet-numba convert {shown} DST  first" if shown.lower().endswith(".gguf") else ""
