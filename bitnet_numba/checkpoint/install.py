"""Writing a folder so that it appears, or replaces another one, as a whole; and reading it while that happens.

Hidden entries beside a target NAME:

    .NAME.bitnet-lock       a file, locked while a conversion runs
    .NAME.bitnet-01234567   the folder that is being written; after the exchange the old one, until it is deleted
    .NAME.bitnet-old        the old folder, for the moment between two renames where folders cannot be exchanged at once

What a killed conversion leaves of them is deleted, or put back, by the next one.
"""

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from bitnet_numba.errors import CheckpointError, printable
from bitnet_numba.model_folder import ModelFolder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("bitnet_numba")
T = TypeVar("T")
ATTEMPTS = 100  # to read a folder between two replacements
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems that have none
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}  # EPERM: some containers forbid the call
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux
_MAX_NAME = 200  # bytes of a target's name in the names beside it; a name may have 255


class BeingWritten(CheckpointError):
    """Another process is writing the folder right now."""


class CannotWrite(CheckpointError):
    """The folder cannot be written: its place is read-only, or the disk is full."""


@contextlib.contextmanager
def replacing(target: Path, check: Callable[[], object]) -> Iterator[Path]:
    """A new folder that takes the place of `target` at the end, or is deleted if anything fails.

    At every moment `target` is the old folder or the new one, whole. A symbolic link is followed. `check` is called
    before the folder is created and again before it is put in place; it raises if `target` must not be replaced.

    Raises BeingWritten if another process is replacing `target`.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as locked:
        if locked:
            _clear_up(target)
        check()
        folder = _beside(target, secrets.token_hex(4))
        try:
            folder.mkdir()
            yield folder
            _write_through(folder)
            check()
            _put_in_place(folder, target)
            _sync_entries(target.parent)
        finally:
            if not _exists(target) and _exists(_beside(target, "old")):
                os.rename(_beside(target, "old"), target)
            shutil.rmtree(folder, ignore_errors=True)  # after the exchange, this is the old one
            shutil.rmtree(_beside(target, "old"), ignore_errors=True)
            if _exists(folder):
                _log.warning("%s cannot be deleted", printable(str(folder), 400))


def read_folder(path: str | os.PathLike[str], names: Iterable[str], read: Callable[[ModelFolder], T]) -> T:
    """What `read` makes of an open folder, of whose files `names` all come from the same folder.

    If a conversion replaces it meanwhile, that is the old folder or the new one. What a conversion moved away when it
    was killed is read in place of a missing folder. Raises what `read` or ModelFolder raises.
    """
    for _ in range(ATTEMPTS):
        folder = _open_folder(path)
        try:
            folder.hold(names)
            if not folder.replaced():  # then nothing of it had been deleted when the files were opened
                return read(folder)
        finally:
            folder.close()
    raise CheckpointError(f"{folder} is being replaced again and again")


def delete(target: Path) -> None:
    """Deletes a folder, and what killed conversions have left beside it. If this is killed, `target` is gone or whole.

    Raises BeingWritten, or OSError.
    """
    target = Path(os.path.realpath(target))
    with _locked(target):
        if _exists(target):
            os.rename(target, _beside(target, secrets.token_hex(4)))
        _clear_up(target)
        shutil.rmtree(_beside(target, "old"), ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)  # if that was put back


def wait_for_writer(target: Path, seconds: float = 0.5) -> None:
    """Returns when no other process is replacing a folder, which it looks at every so many seconds. Raises OSError."""
    while True:
        try:
            with _locked(Path(os.path.realpath(target))):
                return
        except BeingWritten:
            time.sleep(seconds)


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is an entry of this name, or one that a killed conversion has moved away."""
    with contextlib.suppress(OSError, ValueError):
        return _exists(Path(path)) or _exists(_beside(Path(os.path.realpath(path)), "old"))
    return True  # what cannot be known is no name of something else


def _open_folder(path: str | os.PathLike[str]) -> ModelFolder:
    try:
        return ModelFolder(path)
    except CheckpointError:
        with contextlib.suppress(OSError, ValueError, CheckpointError):
            target = Path(os.path.realpath(path))
            if not _exists(target):
                return ModelFolder(_beside(target, "old"), shown=path)
        return ModelFolder(path)  # there again, if that was the moment between two renames


def _put_in_place(folder: Path, target: Path) -> None:
    if not _exists(target):
        os.rename(folder, target)
    elif not _exchange(folder, target):
        old = _beside(target, "old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(folder, target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two entries at once. False where the system or the file system cannot. Raises OSError."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old C library
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Holds the target's lock; yields False where there are no locks. BeingWritten if another process holds it."""
    if fcntl is None:
        yield False
        return
    path = _beside(target, "lock")
    while True:
        with open(path, "a+b") as file:
            locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                shown = printable(str(target), 400)
                raise BeingWritten(f"another conversion is writing {shown} right now") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                locked = False
            if locked and not _is_at(file, path):
                continue  # who held the lock has deleted its file, so this lock would lock nobody out
            try:
                yield locked
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _clear_up(target: Path) -> None:
    """Puts back or deletes what killed conversions into `target` have left. Needs the lock."""
    old = _beside(target, "old")
    if not _exists(target) and old.is_dir():
        os.rename(old, target)
    left = re.compile(re.escape(f".{_short(target.name)}.bitnet-") + "([0-9a-f]{8}|old|partial)")
    for path in target.parent.iterdir():
        if left.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _beside(target: Path, suffix: str) -> Path:
    return target.parent / f".{_short(target.name)}.bitnet-{suffix}"


def _short(name: str) -> str:
    data = os.fsencode(name)
    return name if len(data) <= _MAX_NAME else hashlib.sha256(data).hexdigest()


def _exists(path: Path) -> bool:
    """Whether there is an entry of this name, a link without a target included. Raises OSError if that is unknown."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _write_through(folder: Path) -> None:
    """Makes sure that a folder's files are on the disk before they take the place of others."""
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
    _sync_entries(folder)


def _sync_entries(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot, nor can Windows
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
