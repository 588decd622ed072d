"""Saved conversations: JSON to go on with, which is read with distrust, and Markdown for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_numba.chat.files import read_bytes, shown_name, well_formed, write_file
from bitnet_numba.errors import RequestError

FORMAT = 1
MAX_BYTES = 16 << 20  # far above what a context holds; reading JSON takes many times its size in memory
EXPORTED = "<!-- a conversation, exported by bitnet-numba -->\n"  # the first line of Markdown that may be replaced


def write_conversation(path: Path, system: str, messages: Sequence[dict[str, Any]]) -> None:
    """Writes a conversation as JSON. Raises RequestError, and changes nothing, if it cannot.

    An existing file is replaced only if it is a saved conversation. A symbolic link stays, and the file that it leads
    to is replaced.
    """
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    saved = {"bitnet_numba_chat": FORMAT, "system": system, "messages": turns}
    text = json.dumps(saved, ensure_ascii=False, indent=2) + "\n"
    write_file(path, text.encode("utf-8", "backslashreplace"), read_conversation)  # surrogates: as JSON escapes


def read_conversation(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Reads a saved conversation: the system message, and the others, which alternate between user and assistant.

    Raises RequestError if the file is missing or is not one.
    """
    name, data = shown_name(path), read_bytes(path, MAX_BYTES, "a saved conversation")
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


def export_markdown(path: Path, title: str, system: str, turns: Sequence[tuple[str, str, str]]) -> None:
    """Writes a conversation as Markdown. Raises RequestError, and changes nothing, if it cannot.

    turns: role, thought and text of each; a thought is quoted before the answer that it is for. An existing file is
    replaced only if it was written by this function.
    """
    parts = [f"{EXPORTED}\n# {title}"]
    if system:
        parts.append(f"**System message**\n\n{_quoted(system)}")
    for role, thought, text in turns:
        parts.append(f"## {'You' if role == 'user' else 'Model'}")
        parts += [_quoted(f"*Thought*\n\n{thought}")] if thought else []
        parts.append(text.strip())
    write_file(path, ("\n\n".join(parts) + "\n").encode("utf-8", "replace"), _check_exported)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _check_exported(path: Path) -> None:
    if not read_bytes(path, MAX_BYTES, "an exported conversation").startswith(EXPORTED.encode()):
        raise RequestError(f"{shown_name(path)} is there already, and is not an exported conversation")
