"""The command line, in this process and through pipes."""

import io
import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

import pytest

from bitnet_numba import model_options
from bitnet_numba.chat import command_line
from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.engine.completion import Completion, Stats
from bitnet_numba.engine.loading import load
from bitnet_numba.model_options import LOAD_OPTIONS, add_model_options, load_options

TIMEOUT = 300  # seconds for what takes one or two: only to end a test that hangs, however busy the machine is


def test_prompts_are_turns_of_one_conversation(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("--prompt", "One?", "--prompt", "Two?", "--json", "--seed", "1", "--stats")
    assert code == 0
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("One?", "Two?")
    assert first["finish_reason"] in ("stop", "length") and len(first["token_ids"]) <= 6
    reused = second["stats"]["reused_tokens"]
    assert first["stats"]["prompt_tokens"] <= reused < second["stats"]["prompt_tokens"]
    assert second["stats"]["memory"]["weights"] > 0
    assert err.count("context") == 2 and "tokens/s" in err


def test_the_same_seed_answers_the_same_and_sampling_flags_count(run: Callable[..., tuple[int, str, str]]) -> None:
    def answer(*flags: str) -> str:
        return run("--prompt", "One?", "--temperature", "2", "--seed", "5", *flags)[1]

    assert answer() == answer()
    greedy = run("--prompt", "One?", "--temperature", "0")[1]
    assert answer() != greedy
    assert answer("--top-k", "1") == answer("--top-p", "1e-9") == answer("--min-p", "1") == greedy
    assert answer("--seed", "6") != answer()
    assert answer("--repetition-penalty", "1e-3") != answer()
    assert answer("--system", "Be brief.") != answer() != answer("--raw")
    text = answer().removesuffix("\n")
    assert answer("--stop", text[2:4]) == text[: text.index(text[2:4])] + "\n"


def test_a_pipe_is_one_prompt(run: Callable[..., tuple[int, str, str]]) -> None:
    piped = run("--temperature", "0", stdin=b"One?\nAnd two?\n")
    assert piped == run("--temperature", "0", "--prompt", "One?\nAnd two?")
    assert piped[0] == 0 and piped[1].endswith("\n") and piped[2] == ""
    assert run("--raw", "--json", stdin=b" x \n")[1].startswith('{"prompt": " x "')


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["--prompt", "word " * 3000], "but the context holds"),
        (["--prompt", "x", "--context", "3"], "but the context holds 3"),
        (["--prompt", "x", "--context", "0"], "context must be between"),
        (["--prompt", "x", "--context", "many"], "argument --context: invalid int value: 'many'"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "x", "--top-p", "nan"], "top_p must be"),
        (["--prompt", "x", "--top-k", "-2"], "top_k must be"),
        (["--prompt", "x", "--min-p", "2"], "min_p must be"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty must be"),
        (["--prompt", "x", "--seed", "-1"], "seed must be"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["--prompt", "x", "--stop", ""], "a stop string must be"),
        (["--prompt", "x", "--backend", "tpu"], "argument --backend: invalid choice"),
        (["--prompt", "x", "--raw", "--system", "y"], "--system cannot be combined"),
        (["--nonsense"], "unrecognized arguments: --nonsense (see --help)"),
        (["--max-tokens", "3"], "unrecognized arguments: --max-tokens 3: did you mean --max-new-tokens? (see --help)"),
        (["--threds=3", "--x"], "unrecognized arguments: --threds=3 --x: did you mean --threads? (see --help)"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_give_one_line_and_exit_code_2(
    run: Callable[..., tuple[int, str, str]], args: list[str], message: str
) -> None:
    code, out, err = run(*args)
    assert code == 2 and out == ""
    assert err.startswith("bitnet-chat: ") and message in err and err.count("\n") == 1


def test_bad_folders_give_one_line_and_exit_code_2(
    run: Callable[..., tuple[int, str, str]], tiny_packed: Path, tiny_source: Path, tmp_path: Path
) -> None:
    def refused(model: Path) -> str:
        code, out, err = run("--prompt", "x", model=model)
        assert code == 2 and out == "" and err.count("\n") == 1
        return err

    assert "does not exist" in refused(tmp_path / "none")
    assert "not a model folder" in refused(tmp_path)
    assert "bitnet-numba convert" in refused(tiny_source)
    folder = Path(shutil.copytree(tiny_packed, tmp_path / "copy"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "unsafe" in refused(folder)
    config["chat_template"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    code, _, err = run("--prompt", "x", model=folder)  # no mistake, but worth a line
    assert code == 0 and "no chat template" in err and err.count("\n") == 1
    assert run("--prompt", "x", "--raw", model=folder)[2] == ""
    (folder / "tokenizer.json").write_bytes(b"{")
    assert "tokenizer.json is damaged" in refused(folder)


def test_help_names_every_flag_with_its_default(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for flag in "prompt system raw json stats backend context max-new-tokens stop temperature top-p top-k".split():
        assert f"--{flag}" in out
    assert "(default: 0.6)" in out and "(default: 512)" in out and "generation_config.json" in out


def test_a_model_says_how_to_sample_from_it(
    run: Callable[..., tuple[int, str, str]], tiny_packed: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_packed, tmp_path / "copy"))
    flags = ("--prompt", "One?", "--seed", "3")
    plain = run(*flags, model=model)
    assert run(*flags, "--temperature", "0.6", "--top-p", "0.9", model=model) == plain
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 2.5, "top_k": 90}')
    assert run(*flags, model=model) == run(*flags, "--temperature", "2.5", "--top-k", "90", "--top-p", "1") != plain
    assert run(*flags, "--temperature", "0", model=model) == run(*flags, "--temperature", "0")
    (model / "generation_config.json").write_text('{"do_sample": false}')
    assert run(*flags, model=model) == run(*flags, "--temperature", "0")
    (model / "generation_config.json").write_text('{"temperature": "hot"}')
    assert run(*flags, model=model)[:2] == plain[:2]


def test_a_model_says_how_long_its_answers_are(
    run: Callable[..., tuple[int, str, str]],
    tiny_packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    model = Path(shutil.copytree(tiny_packed, tmp_path / "copy"))
    (model / "generation_config.json").write_text('{"do_sample": false, "max_new_tokens": 2}')
    flags = ("--prompt", "One?")
    assert command_line.run([str(model), "--backend", "reference", *flags]) == 0
    answer = capsys.readouterr().out
    assert answer == run(*flags, "--max-new-tokens", "2", model=model)[1] != run(*flags, model=model)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("<&-", 2, "standard input is closed: give --prompt"),
        ("--prompt hi >&-", 2, "standard output is closed"),
        ("--prompt hi >/dev/full", 2, "No space left"),
        ("--help >/dev/full", 2, "No space left"),
        ("--prompt hi --json --stats >/dev/full", 2, "No space left"),
        ("--prompt hi --stats 2>&-", 0, ""),
        ("--prompt '' 2>&-", 2, ""),
        ("--prompt '' 2>/dev/full", 2, ""),
        ("</dev/zero", 2, "but the context holds 512 tokens"),
    ],
)
def test_closed_and_full_streams(tiny_packed: Path, redirection: str, code: int, message: str) -> None:
    command = f'"{sys.executable}" -m bitnet_numba.chat "{tiny_packed}" --backend reference --max-new-tokens 3'
    done = subprocess.run(
        ["sh", "-c", f"{command} {redirection}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    err = done.stderr.decode()
    assert done.returncode == code and message in err and err.count("\n") == bool(message)


def test_a_pipe_through_a_real_process(tiny_packed: Path) -> None:
    command = [sys.executable, "-m", "bitnet_numba.chat", str(tiny_packed), "--backend", "reference"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "5", "--json"], input=b"One?", capture_output=True, timeout=TIMEOUT, check=True
    )
    assert json.loads(done.stdout)["prompt"] == "One?" and done.stderr == b""
    wrong = subprocess.run([*command, "--top-p", "2"], input=b"One?", capture_output=True, timeout=TIMEOUT, check=False)
    assert wrong.returncode == 2 and wrong.stdout == b"" and wrong.stderr.count(b"\n") == 1
    # A reader that leaves early is no mistake of the user's.
    with subprocess.Popen(
        [*command, "--prompt", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as early:
        assert early.stdout is not None and early.stderr is not None
        early.stdout.close()
        assert early.stderr.read() == b"" and early.wait(TIMEOUT) == 0


def test_json_is_valid_whatever_the_text_and_the_encoding(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    prompts = ("caf\u00e9 \U0001f600", "nul \0, escape \x1b, line ends \n\r\u2028\x85", "bad \udcff", '"\\')
    code, _, err = run("--json", *(part for prompt in prompts for part in ("--prompt", prompt)))
    lines = written.getvalue().decode("ascii").splitlines()
    assert code == 0 and not err
    assert [json.loads(line)["prompt"] for line in lines] == [prompt.replace("\udcff", "\ufffd") for prompt in prompts]


def test_text_that_the_encoding_lacks_is_replaced(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tiny_packed: Path
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(Conversation, "ask", lambda talk, text: yield_text(talk, "\U0001f600 caf\u00e9"))
    assert run("--prompt", "x")[0] == 0
    assert written.getvalue().replace(b"\r\n", b"\n") == b"? caf?\n"


def yield_text(talk: Conversation, text: str) -> Iterator[str]:
    """An answer of this text."""
    yield text
    talk.last = Completion(text, [], "stop", Stats(1, 0, 1, 1.0, 1.0, {}))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_standard_input_in_any_unicode_with_its_mark(run: Callable[..., tuple[int, str, str]], encoding: str) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    code, out, _ = run("--json", stdin=f"{mark}caf\u00e9 \U0001f600\n".encode(encoding))
    assert code == 0 and json.loads(out)["prompt"] == "caf\u00e9 \U0001f600"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" \t\r\n\n", "the prompt is empty"),
        (b"\xef\xbb\xbf", "the prompt is empty"),
        (b"x" * 1_000_000, "but the context holds"),
        (b"x " * 2000, "but the context holds"),
        (b"\0" * 2000, "but the context holds"),
    ],
)
def test_input_that_cannot_be_answered(run: Callable[..., tuple[int, str, str]], data: bytes, message: str) -> None:
    code, out, err = run(stdin=data)
    assert code == 2 and not out and message in err and err.count("\n") == 1


def test_who_is_to_type_the_prompt_is_told(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(stdin=b"One?", keyboard=True)  # standard output leads to a file
    assert code == 0 and out and "Ctrl-D" in err and err.count("\n") == 1


def test_odd_bytes_are_answered(run: Callable[..., tuple[int, str, str]]) -> None:
    for data in (b"\0", b"a\0b", b"\xff", b"\xff\xfe\x00", b"\x1b[2J", b"\xed\xa0\x80"):
        code, out, err = run("--json", stdin=data)
        assert code == 0 and json.loads(out) and not err


def test_messages_show_no_control_characters(
    run: Callable[..., tuple[int, str, str]], tiny_packed: Path, tmp_path: Path
) -> None:
    bad = "\x1b[2J\n\udcff"
    for args in (
        ("--prompt", "x", "--top-k", bad),
        ("--prompt", "x", f"--{bad}"),
        ("--prompt", "x", "--backend", bad),
        ("--prompt", "x", bad, bad),
    ):
        code, _, err = run(*args)
        assert code == 2 and err.count("\n") == 1 and "\x1b" not in err
    code, _, err = run("--prompt", "x", model=tmp_path / "\x1b[2J\n")
    assert code == 2 and err.count("\n") == 1 and "\x1b" not in err
    folder = Path(shutil.copytree(tiny_packed, tmp_path / "copy"))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": bad, "eos_token_id": bad}))
    code, _, err = run("--prompt", "x", model=folder)
    assert code == 0 and "ignored" in err and "\x1b" not in err
    assert all(line.startswith("bitnet-chat: ") for line in err.splitlines())


def test_command_lines_pass_on_all_that_loading_takes() -> None:
    assert list(signature(load).parameters) == ["path", *LOAD_OPTIONS[:3], "revision", *LOAD_OPTIONS[3:]]
    parser = ArgumentParser()
    add_model_options(parser)
    given = ["--backend=cpu", "--context=9", "--threads=1", "--kv-dtype=float32", "--activations=int8x2"]
    options = load_options(parser.parse_args(["model", *given]))
    assert options == dict(zip(LOAD_OPTIONS, ("cpu", 9, 1, "float32", "int8x2"), strict=True))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            MemoryError("Unable to allocate 5 GiB"),
            2,
            "memory is too short: Unable to allocate 5 GiB; a smaller --context",
        ),
        (OSError(5, "Input/output error"), 2, "input or output failed: Input/output error"),
        (RuntimeError("can't start new thread"), 2, "no thread can be started: memory is too short"),
    ],
)
def test_what_stops_the_start_is_told_in_one_line(
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*_: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(model_options, "load", fail)
    assert run("--prompt", "x")[0] == code
    result = run("--prompt", "x")
    assert result[:2] == (code, "") and result[2].startswith(f"bitnet-chat: {message}") and result[2].count("\n") == 1


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise MemoryError", 2, "cannot start: memory is too short"),
        ("raise ImportError('long\\ntext\\nno libblas.so')", 2, "cannot start: no libblas.so"),
    ],
)
def test_what_stops_the_imports_is_told_in_one_line(line: str, code: int, message: str) -> None:
    script = (
        "import sys\nclass Finder:\n def find_spec(self, name, *_):\n"
        f"  if name == 'numpy': {line}\n"
        "sys.meta_path.insert(0, Finder())\nfrom bitnet_numba.chat.__main__ import main\nsys.exit(main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.decode().splitlines()) == (code, b"", [f"bitnet-chat: {message}"])


def test_ctrl_c_in_an_answer_leaves_its_message_a_line(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(talk: Conversation, text: str) -> Iterator[str]:
        yield "Once upon"
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    assert run("--prompt", "x") == (130, "Once upon\n", "bitnet-chat: interrupted\n")


def test_mistakes_are_told_before_the_model_is_opened(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for args in (("--temperature", "-1"), ("--max-new-tokens", "0"), ("--stop", "")):
        assert "must be" in run("--prompt", "x", *args, model=tmp_path / "none")[2]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_during_the_imports_leaves_at_once() -> None:
    # It arrives where an exception would be swallowed.
    script = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n def find_spec(self, name, *_):\n  if name == 'numpy':\n"
        "   try: os.kill(os.getpid(), signal.SIGINT)\n   except BaseException: pass\n"
        "sys.meta_path.insert(0, Finder())\nfrom bitnet_numba.chat.__main__ import main\nsys.exit(main(['--help']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"bitnet-chat: interrupted\n")
