"""The command line, in this process and through pipes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
        (["--nonsense"], "unrecognized arguments: --nonsense"),
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
    assert "tools/convert.py" in refused(tiny_source)
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


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("<&-", 2, "standard input is closed: give --prompt"),
        ("--prompt hi >&-", 2, "standard output is closed"),
        ("--prompt hi >/dev/full", 2, "No space left"),
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
