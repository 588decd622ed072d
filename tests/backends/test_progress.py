"""What a user sees while kernels are compiled."""

import io

import pytest

from bitnet_numba.backends.progress import CompileProgress, shown_by


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(error: io.StringIO, monkeypatch: pytest.MonkeyPatch, total: int) -> str:
    monkeypatch.setattr("sys.stderr", error)
    progress = CompileProgress("this CPU", total)
    for done in (0, 1, 1, 3):
        progress.reach(done)
    progress.advance()
    progress.close()
    return error.getvalue()


def test_a_terminal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "\rCompiling kernels for this CPU, once: {} of 4"
    expected = "".join(line.format(done) for done in (0, 1, 3, 4)) + "\n"
    assert shown(Terminal(), monkeypatch, 4) == expected


def test_a_log_gets_one_line_at_the_start_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    start = "Compiling kernels for this CPU, once: "
    assert shown(io.StringIO(), monkeypatch, 4) == f"{start}0 of 4 ...\n{start}done\n"


@pytest.mark.parametrize("error", [Terminal(), io.StringIO()])
def test_a_status_line_shows_it_instead(error: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str | None] = []
    with shown_by(lines.append):
        assert shown(error, monkeypatch, 4) == ""
        assert lines == [*(f"Compiling kernels for this CPU, once: {done} of 4" for done in (0, 1, 3, 4)), None]
        lines.clear()
        assert shown(error, monkeypatch, 0) == "" and not lines
    assert shown(error, monkeypatch, 4) and not lines


@pytest.mark.parametrize("error", [Terminal(), io.StringIO()])
def test_nothing_to_compile_is_not_mentioned(error: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(error, monkeypatch, 0) == ""


def test_a_program_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    progress = CompileProgress("this CPU", 2)
    progress.advance()
    progress.close()
