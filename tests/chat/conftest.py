"""The command line in this process."""

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet_numba.chat import __main__ as chat


@pytest.fixture
def run(
    tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def call(
        *args: str, stdin: bytes = b"", keyboard: bool = False, model: Path | None = tiny_packed
    ) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: keyboard)
        argv = [*([str(model)] if model else []), "--backend", "reference", "--max-new-tokens", "6", *args]
        ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            code = chat.main(argv)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            signal.signal(signal.SIGINT, ctrl_c)
        return code, *capsys.readouterr()

    return call
