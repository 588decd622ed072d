"""Answers without a conversation: prompts of the command line, of files and of standard input."""

import json
import sys
from dataclasses import asdict, dataclass

from rich.console import Console

from bitnet_numba.chat.attachments import read_attachment, with_attachments
from bitnet_numba.chat.conversation import NO_TEMPLATE, Conversation
from bitnet_numba.chat.display import Display, View, Waiting, write
from bitnet_numba.chat.files import decode_text, well_formed
from bitnet_numba.chat.report import describe, forgotten
from bitnet_numba.chat.terminal import clean, note
from bitnet_numba.commands import drop_output, reading_input
from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import ContextFull, RequestError


@dataclass(frozen=True)
class Output:
    """What is printed besides answers, and how."""

    prog: str
    json: bool = False
    stats: bool = False
    quiet: bool = False
    markdown: bool | None = None  # None: on a terminal

    def note(self, message: str) -> None:
        """Prints a line on standard error, unless quiet."""
        if not self.quiet:
            note(f"{self.prog}: {message}")


class _ExactView:
    """The text as the model wrote it, for files and other programs."""

    def push(self, text: str) -> None:
        write(text)

    def stopping(self) -> None:
        pass

    def finish(self) -> None:
        write("\n")


def gather_prompts(prompts: list[str], files: list[str], raw: bool, engine: Engine, output: Output) -> list[str]:
    """The prompts to answer: files and standard input, if it leads to a file or pipe, go before the first.

    Raises RequestError if there is none, or if a file or standard input cannot be read; ContextFull if it cannot fit.
    """
    attachments = [read_attachment(name, engine) for name in files]
    piped = ""
    if sys.stdin is not None and (not sys.stdin.isatty() or not (prompts or files)):
        also = "as well, until it ends (</dev/null: there is none)" if prompts or files else "until it ends"
        with reading_input(output.note, "the prompt", f"reading standard input {also}"):
            piped = _read_stdin(raw, engine)
    elif not prompts and not files:
        raise RequestError("standard input is closed: give --prompt")
    first, rest = (prompts or [""])[0], prompts[1:]
    if raw:
        parts = [*(attachment.text for attachment in attachments), piped, first]
        return ["\n\n".join(part for part in parts if part), *rest]
    question = "\n\n".join(part for part in (piped, first) if part.strip())
    return [with_attachments(attachments, question) if attachments else question, *rest]


def answer_all(conversation: Conversation, prompts: list[str], output: Output) -> None:
    """Prints the answers to prompts, one turn each."""
    if not conversation.raw and not conversation.engine.tokenizer.has_chat_template:
        output.note(NO_TEMPLATE)
    for prompt in prompts:
        prompt = well_formed(prompt)
        _answer(conversation, prompt, output)
        _report(conversation, prompt, output)


def _answer(conversation: Conversation, prompt: str, output: Output) -> None:
    unread = conversation.unread
    pieces = conversation.ask(prompt)
    if conversation.unread > unread:
        output.note(forgotten((conversation.unread - unread) // 2))
    waiting = Waiting(Console(stderr=True, force_terminal=False if output.quiet else None), conversation)
    view: View | None = None if output.json else _new_view(conversation, output)
    waiting.start()
    try:
        for piece in pieces:
            if not piece:
                waiting.progress()
                continue
            waiting.stop()
            if view is not None:
                view.push(clean(piece) if sys.stdout.isatty() else piece)
    except BaseException:  # Ctrl-C as well
        waiting.stop()
        _end_line(view)
        raise
    waiting.stop()
    if view is not None:
        view.finish()


def _end_line(view: View | None) -> None:
    """Gives the message that follows a line of its own, if standard output is still there."""
    try:
        if view is not None:
            view.finish()
    except OSError:
        drop_output()


def _new_view(conversation: Conversation, output: Output) -> View:
    display = Display(output.markdown if not conversation.raw else False)
    return display.new_view(conversation.thoughts) if display.console.is_terminal or display.markdown else _ExactView()


def _report(conversation: Conversation, prompt: str, output: Output) -> None:
    completion = conversation.last
    assert completion is not None
    if output.json:
        speed = {
            "prefill_tokens_per_second": completion.stats.prefill_tokens_per_second,
            "tokens_per_second": completion.stats.tokens_per_second,
        }
        line = json.dumps({"prompt": prompt, **asdict(completion), **speed})
        print(line, flush=True)  # ASCII: any encoding will do
    if completion.finish_reason == "context":
        output.note(f"the context is full; {shorten_advice(conversation.engine)}")
    elif completion.finish_reason == "length" and sys.stdout.isatty():
        output.note(f"cut after {conversation.params.max_new_tokens:,} tokens; see --max-new-tokens")
    if output.stats:
        note(describe(completion, conversation))


def shorten_advice(engine: Engine) -> str:
    """How to fit the context, in terms of the command line."""
    larger = " or a larger --context" if engine.context < engine.config.max_context else ""
    return f"give a shorter prompt{',' if larger else ' or'} fewer of them{larger}"


def _read_stdin(raw: bool, engine: Engine) -> str:
    limit = engine.context * engine.tokenizer.longest_token
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise ContextFull(f"the prompt has more than {limit:,} bytes, but the context holds {engine.context} tokens")
    text = decode_text(data)
    # The last line end comes from the shell; all other whitespace of a text to be continued matters.
    return text.removesuffix("\n") if raw else text.strip()
