"""Files that a user names: read as text or bytes with distrust, and replaced whole or not at all."""

import codecs
import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from bitnet_numba.errors import RequestError, printable

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def file_path(name: str) -> Path:
    """The path that a user has typed, `~` included. Raises RequestError if there is no such home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise RequestError(f"{printable(name)}: there is no such home folder") from None


def well_formed(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which cannot be encoded. Invalid UTF-8 in terminals and arguments, and
    JSON escapes, produce them."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def decode_text(data: bytes) -> str:
    """Text of a file or pipe: UTF-8, or what its byte order mark says; U+FFFD for what is invalid."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding, "replace")


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file, without white space at its ends. Raises RequestError if it is no text, empty or too large."""
    data = read_bytes(path, max_bytes, "the context")
    text = decode_text(data)
    if "\0" in text:
        raise RequestError(f"{shown_name(path)} is not a text file")
    if not text.strip():
        raise RequestError(f"{shown_name(path)} is empty")
    return text.strip()


def read_bytes(path: Path, max_bytes: int, reader: str) -> bytes:
    """The content of a file. Raises RequestError if it is missing or larger than `reader`, named in words, can take.

    Devices and pipes are not read: they may have no end.
    """
    name = shown_name(path)
    with refusing(path, "read"):
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise RequestError(f"{name} is {'a folder' if stat.S_ISDIR(info.st_mode) else 'not a regular file'}")
        with open(path, "rb", opener=_open_without_waiting) as file:
            data = file.read(max_bytes + 1)
    if data is None:  # Linux calls some files of /proc regular whose readers wait for what comes
        raise RequestError(f"{name} is not a regular file")
    if len(data) > max_bytes:
        raise RequestError(f"{name} is too large for {reader}: more than {max_bytes:,} bytes")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_file(path: Path, data: bytes, check_replaceable: Callable[[Path], object]) -> None:
    """Writes a file whole. Raises RequestError, and changes nothing, if it cannot.

    check_replaceable: called with the path of an existing file; raises RequestError unless that may be replaced. A
    symbolic link stays, and the file that it leads to is replaced.
    """
    with refusing(path, "written"):
        target = Path(os.path.realpath(path))
        mode = _mode(path, check_replaceable)
        if not target.parent.is_dir():
            raise RequestError(f"{shown_name(path)} cannot be written: there is no folder {shown_name(target.parent)}")
        _replace(target, data, mode)


def _mode(path: Path, check_replaceable: Callable[[Path], object]) -> int | None:
    """The permissions of an existing file, None if there is none. Raises RequestError unless it may be replaced."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    try:
        check_replaceable(path)
    except RequestError as error:
        raise RequestError(f"{error}: nothing was written") from None
    if not os.access(path, os.W_OK):
        raise RequestError(f"{shown_name(path)} cannot be written: it is read-only")
    return stat.S_IMODE(mode)


def _replace(target: Path, data: bytes, mode: int | None) -> None:
    """Puts a new file in the place of `target`, with all of `data` in it, or else leaves everything as it was."""
    partial = target.with_name(f".bitnet-chat-{secrets.token_hex(8)}")
    with open(partial, "xb") as file:  # exclusive: it overwrites no file and follows no link
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                os.chmod(partial, mode)
            file.close()  # before renaming, for Windows
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def refusing(path: Path, action: str) -> Iterator[None]:
    """Turns what the file system says, and names that it cannot have, into one RequestError."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{shown_name(path)} cannot be {action}: {error.strerror or error}") from None
    except ValueError:  # a NUL, or a character that the file system's encoding does not have
        raise RequestError(f"{shown_name(path)} cannot be {action}: this cannot be the name of a file") from None


def shown_name(path: Path) -> str:
    """A path for a message."""
    return printable(str(path))
