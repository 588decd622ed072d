"""The process that renders chat templates: started for the first one, and replaced if a template ends it."""

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import IO, Any

from bitnet_numba.errors import TokenizerError, printable
from bitnet_numba.text import template_worker
from bitnet_numba.text.template_worker import LENGTH_BYTES


class TemplateLimit(TokenizerError):
    """A chat template takes too much time or memory."""


class TemplateProcess:
    """Renders templates, one at a time, from any thread."""

    def __init__(self, seconds: float = 3.0) -> None:
        """seconds: for each rendering; published templates take milliseconds."""
        self._seconds = seconds
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: Mapping[str, Any] | None) -> str:
        """The text that a template makes of `variables`, which JSON must be able to hold; None only compiles it.

        Raises TokenizerError if the template is not valid or fails, TemplateLimit if it takes too much time or memory.
        """
        request = json.dumps([source, variables]).encode()
        with self._lock:
            started = monotonic()
            try:
                reply = self._ask(request)
            except BaseException:  # an interrupt, for example: what the process writes next would be the old reply
                self.stop()
                raise
            if reply is None:
                code = self.stop(patience=1)
                if monotonic() - started >= self._seconds:
                    raise TemplateLimit(f"chat template: it takes longer than {self._seconds:g} seconds")
                raise TemplateLimit(f"chat template: it ended the process that renders it (exit code {code})")
            if "limit" in reply:
                self.stop()  # its memory may be in pieces
                raise TemplateLimit(f"chat template: {reply['limit']}")
        if "error" in reply:
            raise TokenizerError(f"chat template: {printable(' '.join(reply['error'].split()))}")
        return str(reply["text"])

    def _ask(self, request: bytes) -> dict[str, Any] | None:
        """The reply to a request; None if the process ended instead."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            unsent = memoryview(len(request).to_bytes(LENGTH_BYTES, "big") + request)
            while unsent:
                unsent = unsent[process.stdin.write(unsent) :]
        header = _read(process.stdout, LENGTH_BYTES)
        data = _read(process.stdout, int.from_bytes(header, "big")) if header is not None else None
        return None if data is None else json.loads(data)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.stop()  # something else has ended it in the meantime
        if self._process is None:
            if not sys.executable or getattr(sys, "frozen", False):
                raise TokenizerError(
                    "chat template: rendering it needs a Python interpreter, and this program has none"
                )
            paths = {str(Path(_origin(name)).parent.parent) for name in ("jinja2", "markupsafe")}
            try:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        "-X",
                        "utf8",
                        template_worker.__file__,
                        str(self._seconds),
                        *sorted(paths),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    bufsize=0,
                    start_new_session=True,  # a Ctrl-C in the terminal is not for it
                    creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                )
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise TokenizerError(f"no process to render the chat template can be started: {reason}") from None
        return self._process

    def stop(self, patience: float = 0) -> int | None:
        """Ends the process, if there is one; returns its exit code. The next rendering starts another.

        patience: seconds in which it may end by itself, so that the exit code is its own.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        _close(process)
        return process.wait()

    def forget(self) -> None:
        """After a fork, in the child: the process belongs to the parent, and another thread may have held the lock."""
        self._lock = Lock()
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # not ours to wait for
            _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()  # unbuffered: nothing is written


def _origin(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise TokenizerError(f"{name} is not installed: chat templates cannot be rendered")
    return spec.origin


def _read(stream: IO[bytes], count: int) -> bytes | None:
    """Exactly `count` bytes; None if the stream ends before."""
    data = bytearray()
    while len(data) < count:
        piece = stream.read(min(count - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


PROCESS = TemplateProcess()
atexit.register(PROCESS.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS.forget)
