"""`bitnet-numba perplexity`: what it prints, and what it says of mistakes."""

import io
import json
import sys
from pathlib import Path

import pytest

import bitnet_numba as bn
from bitnet_numba.cli.perplexity import run

TEXT = "Once upon a time there was a fox. The fox had a lantern. " * 4


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_it_prints_the_score(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = bn.load(backend="cpu")
    want = llm.score(TEXT, window=20, stride=5)
    capsys.readouterr()  # where no test has compiled the kernels yet, that is told
    arguments = [str(text_file), "--backend", "cpu", "--window", "20", "--stride", "5"]
    assert run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["perplexity"] == want.perplexity and found["tokens"] == len(want.token_ids) and err == ""
    assert (found["window"], found["stride"], found["backend"]) == (20, 5, "cpu")
    assert run(arguments) == 0
    assert capsys.readouterr().out.startswith(f"perplexity {want.perplexity:.4f}  ({len(want.token_ids)} tokens in ")
    assert run([*arguments, "--max-tokens", "30", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["perplexity"]
        == llm.score(want.token_ids[:30], window=20, stride=5).perplexity
    )


def test_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert run(["-", "--backend", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 30


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "text.txt cannot be read: No such file or directory"),
        (b"", [], "text.txt is empty"),
        (b"a\xff", [], "text.txt is not a text in UTF-8"),
        (b"a fox", ["--window", "0"], "window must be a positive integer, not 0"),
        (b"a fox", ["--window", "9", "--stride", "9"], "stride must be at most 8, not 9"),
        (b"a fox", ["--max-tokens", "1"], "--max-tokens must be at least 2"),
        (b"a fox", ["--model", "/no/such"], "/no/such"),
    ],
)
def test_mistakes_are_one_line(
    content: bytes | None, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert run([str(path), "--backend", "reference", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("bitnet-numba perplexity: ") and message in err and err.count("\n") == 1
