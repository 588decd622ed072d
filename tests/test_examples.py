"""Every example runs, with the built-in model, and shows what it says."""

import io
import runpy
import sys
from pathlib import Path

import pytest

from tests.kernels.harness import needs_gpu

EXAMPLES = Path(__file__).parent.parent / "examples"
GGUF = Path(__file__).parent / "golden" / "gguf" / "llama-tq2_0.gguf"
GPU = ["kernel_in_torch"]

# Example -> its arguments, what is typed, and what its output must have.
RUNS: dict[str, tuple[list[str], str, list[str]]] = {
    "generate": ([], "", ["[length; 60 tokens, "]),
    "chat_loop": (
        [],
        "Tell me a story about a fox and a lantern.\nWhat did they find?\n",
        ["[0 of ", " were there already]"],
    ),
    "batch": ([], "", ["a fox: ", "a mouse: ", "the third answer is the same"]),
    "requests_come_and_go": ([], "", ["request 1 ended: interrupted", "request 3 ended: "]),
    "tasks": ([], "", ["a drum: ", "a boat: ", "a cake: "]),
    "compare_backends": ([], "", [" logits after each", "differences: median "]),
    "read_packed": ([], "", ["layers.0.qkv.words", "layer 0, v: "]),
    "inspect_gguf": ([str(GGUF)], "", ["general.architecture", "llama", "TQ2_0: "]),
}


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, typed: str = "") -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_example_is_run_here() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted([*RUNS, *GPU])


@pytest.mark.parametrize("name", RUNS)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, typed, expected = RUNS[name]
    run(name, arguments, monkeypatch, typed)
    out = capsys.readouterr().out
    for text in expected:
        assert text in out, out


def test_a_damaged_gguf_file_or_none_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(GGUF.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"cut\.gguf is not a readable GGUF file"):
        run("inspect_gguf", [str(file)], monkeypatch)
    with pytest.raises(SystemExit, match="usage: python examples/inspect_gguf.py FILE.gguf"):
        run("inspect_gguf", [], monkeypatch)


@needs_gpu
def test_kernel_in_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    run("kernel_in_torch", [], monkeypatch)
    shapes, _, difference = capsys.readouterr().out.rpartition(": ")
    assert shapes == "(8, 2560) -> (8, 3840), largest difference from NumPy"
    assert float(difference) < 1e-3  # of values around 100; products are exact, scales are not
