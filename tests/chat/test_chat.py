"""The chat: conversations over a toy backend, the command line in process and through pipes, and a pseudo-terminal."""

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from bitnet_numba.chat import __main__ as chat
from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.chat.interactive import COMMANDS, EXAMPLES, Terminal
from bitnet_numba.chat.terminal import WordWrap, clean
from bitnet_numba.engine.request import GenerationOptions
from bitnet_numba.errors import ContextFull, RequestError
from bitnet_numba.sampling import SamplingParams
from tests.engine.toy_backend import tokens_of, toy_engine

EOT = 1999
TIMEOUT = 300  # seconds for what takes one or two: only to end a test that hangs, however busy the machine is


def toy_conversation(answer: str = "Fine.", context: int = 256, **options: Any) -> Conversation:
    llm, _ = toy_engine([*tokens_of(answer), EOT], context)
    return Conversation(llm, GenerationOptions(), **options)


def ask(talk: Conversation, text: str) -> str:
    return "".join(talk.ask(text))


# Conversations


def test_turns_are_remembered_undone_and_forgotten() -> None:
    talk = toy_conversation(system="Be kind.")
    assert ask(talk, "One?") == ask(talk, "Two?") == "Fine."
    assert [m["content"] for m in talk.messages] == ["One?", "Fine.", "Two?", "Fine."]
    assert talk.undo() == "Two?"
    assert [m["content"] for m in talk.messages] == ["One?", "Fine."]
    assert talk.undo() == "One?" and talk.undo() is None
    ask(talk, "Three?")
    talk.reset()
    assert talk.messages == [] and talk.last is None and talk.session.held == 0 and talk.system == "Be kind."


def test_after_undo_only_the_new_question_is_computed() -> None:
    talk = toy_conversation()
    ask(talk, "One?")
    held = talk.session.held
    ask(talk, "Two?")
    talk.undo()
    ask(talk, "Four?")
    assert talk.last is not None and talk.last.stats.reused_tokens >= held


def test_saved_conversations_come_back(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    talk = toy_conversation(system="Be k\u00efnd.")
    ask(talk, "One?")
    talk.save(path)
    talk.save(path)  # its own kind may be replaced
    other = toy_conversation()
    ask(other, "else")
    other.load(path)
    assert other.system == "Be k\u00efnd."
    assert other.messages == [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Fine."}]
    assert ask(other, "Two?") == "Fine."
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"bitnet_numba_chat": 2, "system": "", "messages": []}',
        b'{"bitnet_numba_chat": 1, "system": 3, "messages": []}',
        b'{"bitnet_numba_chat": 1, "system": "", "messages": [{"role": "user", "content": "x"}]}',
        b'{"bitnet_numba_chat": 1, "system": "", "messages": [{"role": "user"}, {"role": "assistant"}]}',
        b'{"bitnet_numba_chat": 1, "system": "", "messages": [[], []]}',
    ],
)
def test_other_files_are_neither_loaded_nor_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    talk = toy_conversation()
    ask(talk, "One?")
    for action in (talk.load, talk.save):
        with pytest.raises(RequestError, match="precious"):
            action(path)
    assert path.read_bytes() == content
    assert len(talk.messages) == 2


def test_saving_where_nothing_can_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written"):
        toy_conversation().save(tmp_path / "no" / "folder")
    with pytest.raises(RequestError, match="cannot be read"):
        toy_conversation().load(tmp_path / "nothing")


def test_a_question_that_does_not_fit_is_forgotten() -> None:
    talk = toy_conversation(context=40)
    ask(talk, "One?")
    before = list(talk.messages)
    with pytest.raises(ContextFull):
        talk.ask("word " * 60)
    with pytest.raises(RequestError, match="the prompt is empty"):
        talk.ask("  \n")
    assert talk.messages == before
    assert ask(talk, "Two?") == "Fine."


def test_an_interrupted_answer_is_kept_as_far_as_it_was_shown() -> None:
    talk = toy_conversation("one two three four")
    pieces = talk.ask("Count.")
    shown = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages[-1]["content"] == shown
    assert ask(talk, "On.") == "one two three four"


def test_an_answer_that_fails_leaves_no_trace() -> None:
    llm, backend = toy_engine(tokens_of("one two three"))
    talk = Conversation(llm, GenerationOptions())
    backend.fail_after = 1
    with pytest.raises(ValueError, match="failed"):
        ask(talk, "Count.")
    assert talk.messages == []


def test_raw_texts_are_continued_on_their_own() -> None:
    talk = toy_conversation(raw=True)
    assert ask(talk, "Once upon") == "Fine."
    assert talk.messages == []
    assert talk.last is not None and talk.last.stats.prompt_tokens == len(tokens_of("Once upon")) + 1


# What the terminal shows


@given(st.text(alphabet="ab \n\u4e2d-", max_size=120), st.lists(st.integers(1, 10)), st.integers(2, 20))
def test_wrapping_changes_spaces_and_line_ends_only(text: str, cuts: list[int], width: int) -> None:
    wrap, shown, start = WordWrap(width), "", 0
    for cut in [*cuts, len(text)]:
        shown += wrap.push(text[start : start + cut])
        start += cut
    shown += wrap.finish()
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    assert all(cell_len(line.rstrip()) <= width + 1 for line in shown.split("\n"))
    assert shown.count("\n") >= text.count("\n")
    whole = WordWrap(width)
    assert whole.push(text) + whole.finish() == shown


def test_wrapping_breaks_between_words() -> None:
    wrap = WordWrap(12)
    assert wrap.push("The dog and the kite.\n\nA new line") + wrap.finish() == "The dog and\nthe kite.\n\nA new line"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert clean("a\x1b[31mb\r\x07\x9b\tc\nd\u00a0\u4e2d\U0001f642") == (
        "a\ufffd[31mb\ufffd\ufffd\tc\nd\u00a0\u4e2d\U0001f642"
    )


def test_commands_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    talk = toy_conversation()
    terminal = Terminal(talk, show_stats=False)

    def shown(line: str, stays: bool = True) -> str:
        assert terminal.handle(line) == stays
        return capsys.readouterr().out

    terminal.greet(None)
    greeting = capsys.readouterr().out
    assert all(example in greeting for example in EXAMPLES) and "/help" in greeting and "toy backend" in greeting
    assert shown("/stats") == "no answer yet\n"
    assert shown("One?") == "Fine.\n"
    assert "answer 4 tokens" in shown("/stats") and "context" in shown("/stats")
    assert shown("/system Be brief.") == shown("/system") == "system message: Be brief.\n"
    assert talk.system == "Be brief."
    assert shown("/system -") == "no system message\n"
    path = tmp_path / "chat.json"
    assert shown(f"/save {path}").startswith("saved 2 messages")
    assert shown("/undo") == "removed: One?\n"
    assert "nothing to remove" in shown("/undo")
    assert "> One?\nFine.\n" in shown(f"/load {path}")
    assert len(talk.messages) == 2
    assert "cannot be read" in shown(f"/load {tmp_path / 'none'}")
    assert shown("/save") == "give a file name, such as chat.json\n"
    assert "unknown command /nonsense" in shown("/nonsense")
    assert shown(" ") == ""
    assert shown(" /nonsense") == "Fine.\n"
    assert all(command.split()[0] in shown("/help") for command in COMMANDS)
    assert shown("/reset") == "a new conversation\n" and talk.messages == []
    assert shown("/exit", stays=False) == ""


def test_a_full_context_is_told_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    terminal = Terminal(toy_conversation("on and on " * 50, context=40), show_stats=True)
    assert terminal.handle("Go.")
    out = capsys.readouterr().out
    assert "[cut: the context is full]" in out and "/undo" in out and "/reset" in out and "context 40/40" in out
    assert "larger --context" in out
    assert terminal.handle("Go.")
    out = capsys.readouterr().out
    assert "but the context holds 40: nothing was sent" in out and "/undo" in out
    largest = toy_conversation("on and on " * 2000, context=4096)
    Terminal(largest, show_stats=False).handle("Go.")
    out = capsys.readouterr().out
    assert "/undo" in out and "--context" not in out


def test_commands_that_cannot_be_meant_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation()
    terminal = Terminal(talk, show_stats=False)
    terminal.handle("One?")
    for line in ("/reset now please", "/undo 3", "/RESET\nnow"):
        capsys.readouterr()
        assert terminal.handle(line) and len(talk.messages) == 2
        assert "takes no argument" in capsys.readouterr().out
    assert terminal.handle("/Help") and "/undo" in capsys.readouterr().out
    assert terminal.handle("/Reset") and talk.messages == []
    terminal = Terminal(toy_conversation(raw=True), show_stats=False)
    terminal.handle("One?")
    for line in ("/undo", "/reset", "/save x.json", "/load x.json", "/system x"):
        capsys.readouterr()
        assert terminal.handle(line) and "--raw" in capsys.readouterr().out
    assert not Path("x.json").exists()


def test_a_model_that_breaks_down_is_told_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation()
    terminal = Terminal(talk, show_stats=False)

    def break_down(*_: object) -> Iterator[int]:
        raise ValueError("logits hold NaN")
        yield 0

    context = talk.session._context()
    decode, context.decode = context.decode, break_down  # type: ignore[method-assign]
    assert terminal.handle("Go.") and talk.messages == []
    assert "numbers that are not finite: logits hold NaN" in " ".join(capsys.readouterr().out.split())
    context.decode = decode  # type: ignore[method-assign]
    assert terminal.handle("Go.") and capsys.readouterr().out == "Fine.\n"


def test_a_long_answer_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation("on and on " * 50)
    talk.options = GenerationOptions(max_new_tokens=5)
    Terminal(talk, show_stats=False).handle("Go.")
    assert "[cut after 5 tokens: see --max-new-tokens]" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    talk = toy_conversation("on and on " * 50)
    terminal = Terminal(talk, show_stats=False)
    write = terminal.write
    counted: list[str] = []

    def write_and_press(text: str) -> None:
        counted.append(text)
        if len(counted) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        write(text)

    terminal.write = write_and_press  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    assert terminal.handle("Go.")
    assert signal.getsignal(signal.SIGINT) is before
    assert "[stopped]" in capsys.readouterr().out
    assert talk.last is not None and talk.last.finish_reason == "interrupted"
    assert 4 <= talk.last.stats.generated_tokens <= 6
    assert terminal.handle("Go on.")


# The command line


@pytest.fixture
def run(
    tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def call(*args: str, stdin: bytes = b"", model: Path | None = tiny_packed) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        argv = [*([str(model)] if model else []), "--backend", "reference", "--max-new-tokens", "6", *args]
        try:
            code = chat.main(argv)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        return code, *capsys.readouterr()

    return call


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
    run: Callable[..., tuple[int, str, str]], tiny_packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    talk = toy_conversation()
    talk.options = GenerationOptions(SamplingParams(0.5, top_k=40))
    Terminal(talk, show_stats=False).handle("/help")
    assert "temperature 0.5, top-p 1, top-k 40, min-p 0, repetition-penalty 1" in capsys.readouterr().out


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
