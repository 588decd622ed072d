"""Saved conversations: files that are replaced whole or not at all, and are read with distrust."""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet_numba.errors import RequestError, printable

FORMAT = 1
MAX_BYTES = 16 << 20  # far above what a context holds; reading JSON takes many times its size in memory


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


def write_conversation(path: Path, system: str, messages: Sequence[dict[str, Any]]) -> None:
    """Writes a conversation as JSON. Raises RequestError, and changes nothing, if it cannot.

    An existing file is replaced only if it is a saved conversation. A symbolic link stays, and the file that it leads
    to is replaced.
    """
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    saved = {"bitnet_numba_chat": FORMAT, "system": system, "messages": turns}
    text = json.dumps(saved, ensure_ascii=False, indent=2) + "\n"
    with _refusing(path, "written"):
        target = Path(os.path.realpath(path))
        mode = _check_replaceable(path)
        if not target.parent.is_dir():
            raise RequestError(f"{_name(path)} cannot be written: there is no folder {_name(target.parent)}")
        _replace(target, text.encode("utf-8", "backslashreplace"), mode)  # surrogates: as JSON escapes


def _check_replaceable(path: Path) -> int | None:
    """The permissions of an existing file, None if there is none. Raises RequestError unless it may be replaced."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    try:
        read_conversation(path)
    except RequestError as error:
        raise RequestError(f"{error}: nothing was written") from None
    if not os.access(path, os.W_OK):
        raise RequestError(f"{_name(path)} cannot be written: it is read-only")
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


def read_conversation(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Reads a saved conversation: the system message, and the others, which alternate between user and assistant.

    Raises RequestError if the file is missing or is not one. Devices and pipes are not read: they may have no end.
    """
    name = _name(path)
    with _refusing(path, "read"):
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise RequestError(f"{name} is {'a folder' if stat.S_ISDIR(info.st_mode) else 'not a regular file'}")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RequestError(f"{name} is too large for a saved conversation: more than {MAX_BYTES >> 20} MB")
    try:
        saved = json.loads(data)
    except (ValueError, RecursionError):
        saved = None
    if not (isinstance(saved, dict) and saved.get("bitnet_numba_chat") == FORMAT):
        raise RequestError(f"{name} is not a saved conversation")
    system, messages = saved.get("system"), saved.get("messages")
    if not isinstance(system, str) or not isinstance(messages, list) or len(messages) % 2:
        raise RequestError(f"{name} is not a saved conversation")
    turns = []
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        content = message.get("content") if isinstance(message, dict) and message.get("role") == role else None
        if not isinstance(content, str):
            raise RequestError(f"{name} is not a saved conversation: message {i + 1} is not one of role {role}")
        turns.append({"role": role, "content": well_formed(content)})
    return well_formed(system), turns


@contextlib.contextmanager
def _refusing(path: Path, action: str) -> Iterator[None]:
    """Turns what the file system says, and names that it cannot have, into one RequestError."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{_name(path)} cannot be {action}: {error.strerror or error}") from None
    except ValueError:  # a NUL, or a character that the file system's encoding does not have
        raise RequestError(f"{_name(path)} cannot be {action}: this cannot be the name of a file") from None


def _name(path: Path) -> str:
    return printable(str(path))
