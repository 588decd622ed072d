"""The chat in a pseudo-terminal."""

import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

TIMEOUT = 300  # seconds for what takes one or two: only to end a test that hangs, however busy the machine is


class FakeTerminal:
    """The chat in a pseudo-terminal, as someone at a keyboard has it."""

    def __init__(self, command: list[str], home: Path):
        import pty

        environment = dict(os.environ, XDG_STATE_HOME=str(home), TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", COLUMNS="80")
        self.process, self.keyboard = pty.fork()
        if self.process == 0:
            os.execve(command[0], command, environment)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = TIMEOUT) -> str:
        """Reads until a text shows up after what was waited for before; returns all in between."""
        until = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.keyboard], [], [], max(until - time.monotonic(), 0))
            assert ready, f"{text!r} did not show up in {self.shown!r}"
            try:
                data = os.read(self.keyboard, 65536).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"left before {text!r} showed up: {self.shown!r}") from None
            self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]", "", data)
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def shows(self, text: str) -> bool:
        """Whether a text shows up within a second."""
        try:
            return bool(self.wait_for(text, 1))
        except AssertionError:
            return False

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def leave(self) -> int:
        """The exit code, after the program has ended."""
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                os.close(self.keyboard)
                return os.waitstatus_to_exitcode(status)
            if select.select([self.keyboard], [], [], 0.1)[0]:
                try:
                    os.read(self.keyboard, 65536)
                except OSError:
                    time.sleep(0.05)
        os.kill(self.process, signal.SIGKILL)
        raise AssertionError("the chat did not leave")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_a_terminal_that_hangs_up_ends_the_chat_quietly(tiny_packed: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    script = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from bitnet_numba.chat.__main__ import main;"
        f"sys.stderr = open({str(errors)!r}, 'w', buffering=1); code = main(sys.argv[1:]);"
        "sys.stderr.write(f'left with {code}')"
    )
    terminal = FakeTerminal([sys.executable, "-c", script, str(tiny_packed), "--backend", "reference"], tmp_path)
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    os.close(terminal.keyboard)
    until = time.monotonic() + TIMEOUT
    while not os.waitpid(terminal.process, os.WNOHANG)[0]:
        assert time.monotonic() < until, "the chat did not leave"
        time.sleep(0.05)
    assert errors.read_text() in ("left with 0", "left with 2")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")  # the child calls nothing but exec
def test_a_conversation_at_the_keyboard(tiny_packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bitnet_numba.chat", str(tiny_packed), "--backend", "reference"]
    terminal = FakeTerminal([*command, "--temperature", "0", "--max-new-tokens", "20"], tmp_path)
    assert "reference backend" in terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.type("Hello there.\r")
    terminal.wait_for("[cut after 20 tokens")
    terminal.type("/stats\r")
    assert "answer 20 tokens" in terminal.wait_for("/512")
    terminal.wait_for("> ")
    terminal.type("not to be sent\x03")  # Ctrl-C drops the line
    terminal.wait_for("not to be sent")
    terminal.wait_for("> ")
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D or /exit leaves")
    terminal.wait_for("> ")
    up, down = "\x1b[A", "\x1b[B"
    keys = up
    while not terminal.shows("/stats"):  # the history has what was sent before it, once it is loaded
        terminal.type(keys)
        keys = down + up  # on a slow machine the first may only be late: two steps up would be too far
    terminal.type("\r")
    terminal.wait_for("/512")
    terminal.type("/undo\r")
    terminal.wait_for("removed: Hello there.")
    terminal.wait_for("> ")  # until the line is being edited, the terminal itself eats a Ctrl-D
    terminal.type("\x04")
    assert terminal.leave() == 0
    history = (tmp_path / "bitnet-numba" / "history").read_text()
    assert "+Hello there." in history and "not to be sent" not in history
