"""A short soak over HTTP, of which `tools/soak.py --http` is the long form; and that it finds what is wrong."""

from typing import Any

import pytest

from tests.engine.toy_backend import tokens_of, toy_engine
from tests.server.helpers import Running, serving
from tests.server.soak import HttpSoak, Lost
from tools.soak import main


def test_nothing_is_lost(server: Running) -> None:
    answers = []
    soak = HttpSoak(server.url, 16, seed=1)
    soak.run(300, lambda: answers.append(1))
    assert len(answers) == soak.counts.total() == 300 and len(soak.counts) == 7
    server.wait_until(lambda: server.service.open == 0 and server.service.running == 0)


@pytest.mark.parametrize("wrong", ["another answer", "an error", "no end"])
def test_what_is_lost_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda: toy_engine(tokens_of(" fox"))[0], max_waiting=64) as running:
        soak = HttpSoak(running.url, 2, seed=1)
        soak.run(60)
        if wrong == "another answer":
            for key in soak._known:
                soak._known[key] = [text + "!" for text in soak._known[key]]
        elif wrong == "an error":
            running.service.draining = True
        else:

            def closing(*arguments: Any) -> str:
                return ""

            monkeypatch.setattr("bitnet_numba.server.completions.closing_events", closing)
        with pytest.raises(Lost):
            soak.run(200)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--http", "--backend", "cpu", "--events", "50", "--connections", "4"]) == 0
    out = capsys.readouterr().out
    assert "50 requests in " in out and "open files" in out
