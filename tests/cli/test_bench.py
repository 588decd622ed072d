"""`bitnet-numba bench`: figures, and what is shared of a machine."""

import json
from pathlib import Path

import pytest

from bitnet_numba.cli import bench, machine
from bitnet_numba.cli.main import main


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the machine takes a second, and has tests of its own."""
    monkeypatch.setattr(machine, "probe", lambda what: {"instruction_set": "avx2", "threads": 3})


def test_figures_of_a_folder(tiny_packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    arguments = ["bench", str(tiny_packed), "--backend", "reference", "--context", "64", "--seconds", "0.01"]
    arguments += ["--kv-dtype", "float32", "--activations", "int8"]
    for _ in range(2):  # its own file may be replaced
        assert main([*arguments, "--json", "--share", str(path)]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(path.read_text())
    assert out.endswith(path.read_text()) and err.count("\n") == 2 and "is written" in err
    assert (figures["backend"], figures["kv_dtype"], figures["activations"]) == ("reference", "float32", "int8")
    assert figures["backend"] == "reference" and figures["model"]["name"] == "local"
    assert figures["prompt"]["tokens"] == 63 and 1 <= figures["answer"]["tokens"] <= 48
    for speed in (figures["prompt"], figures["answer"]):
        assert 2 <= speed["runs"] <= 50
        assert 0 < speed["median_tokens_per_second"] <= speed["best_tokens_per_second"]
    assert figures["machine"]["cpu"]["threads"] == 3
    text = bench.describe(figures)
    assert "reads" in text and "writes" in text and "local" in text and "avx2" in text
    assert str(tmp_path) not in json.dumps(figures) and str(Path.home()) not in json.dumps(figures)
    path.write_text('{"mine": 1}')
    assert main([*arguments, "--share", str(path)]) == 2
    assert "nothing was written" in capsys.readouterr().err and path.read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--seconds", "nan"], "--seconds must be above 0"),
        (["--context", "5"], "but the context holds 5"),
        (["--context", "0"], "context must be between"),
        (["--threads", "0"], "threads must be between 1 and"),
    ],
)
def test_mistakes(tiny_packed: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny_packed), "--backend", "reference", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1
