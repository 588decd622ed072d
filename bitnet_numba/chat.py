"""Talk to a BitNet model: `python -m bitnet_numba.chat [CHECKPOINT]`.

In a terminal this is a conversation. With --prompt, or with text on standard input, it answers and exits: the answer on
standard output, everything else on standard error.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from dataclasses import asdict
from typing import NoReturn

from rich.console import Console

from bitnet_numba.conversation import AnswerOptions, Conversation
from bitnet_numba.engine import BACKENDS, Engine, load
from bitnet_numba.errors import BitNetError, ContextFull
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.session import Completion
from bitnet_numba.terminal import printable

PROG = "bitnet-chat"
NO_TEMPLATE = "this model has no chat template: turns are plain 'User: ...', 'Assistant: ...'; see also --raw"
TRY_LESS = "the context is full; give a shorter prompt, fewer of them or a larger --context"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog=PROG, description="Talk to a BitNet model.")
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="a converted model folder (default: the built-in model)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="answer this and exit; again for a further turn")
    add("--system", default="", metavar="TEXT", help="a system message to start with (default: none)")
    add("--raw", action="store_true", help="continue the text as it is, without the chat template and without turns")
    add("--json", action="store_true", help="print each answer as one line of JSON; needs --prompt or a pipe")
    add("--stats", action="store_true", help="show speed and memory after each answer")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--backend", choices=BACKENDS, default="auto", help="what computes (default: auto: CUDA if it can be used)")
    add("--context", type=int, metavar="N", help="tokens of the whole conversation (default: the model's most)")
    group = parser.add_argument_group("answers")
    add = group.add_argument
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text; may be repeated")
    add("--temperature", type=float, default=0.6, help="0 always takes the likeliest token (default: %(default)s)")
    add("--top-p", type=float, default=0.9, help="the likeliest tokens that reach this share (default: %(default)s)")
    add("--top-k", type=int, default=0, help="so many of the likeliest tokens, 0: all (default: %(default)s)")
    add("--min-p", type=float, default=0.0, help="least share of the likeliest token's (default: %(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1 avoids repetition (default: %(default)s)")
    add("--seed", type=int, help="the same seed gives the same answers (default: a new one each time)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    interactive = not args.prompt and sys.stdin.isatty() and sys.stdout.isatty()
    if interactive and args.json:
        parser.error("--json needs --prompt or a pipe on standard input")
    if args.raw and args.system:
        parser.error("--system has no place in a text that is continued as it is (--raw)")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        options = AnswerOptions(
            SamplingParams(args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty, args.seed),
            args.max_new_tokens,
            tuple(args.stop),
        )
        prompts = args.prompt if args.prompt or interactive else [_read_stdin(args.raw)]
        conversation = Conversation(open_model(args), options, args.system, args.raw)
        if interactive:
            from bitnet_numba.chat_terminal import converse

            converse(conversation, args.checkpoint, args.stats)
        else:
            answer_all(conversation, prompts, args.json, args.stats)
    except ContextFull as error:
        return _fail(f"{error}: {TRY_LESS}")
    except BitNetError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever was reading has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def open_model(args: argparse.Namespace) -> Engine:
    """Loads the model that the command line names, saying so on a terminal while it takes."""
    console = Console(stderr=True)
    waiting = console.status("opening the model ...") if console.is_terminal else contextlib.nullcontext()
    with waiting:
        return load(args.checkpoint, args.backend, args.context)


def answer_all(conversation: Conversation, prompts: list[str], as_json: bool, stats: bool) -> None:
    """Answers prompts, one turn each, on standard output."""
    if not conversation.raw and not conversation.engine.tokenizer.has_chat_template:
        print(f"{PROG}: {NO_TEMPLATE}", file=sys.stderr)
    for prompt in prompts:
        for piece in conversation.ask(prompt):
            if not as_json:
                print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        completion = conversation.last
        assert completion is not None
        if as_json:
            speed = {
                "prefill_tokens_per_second": completion.stats.prefill_tokens_per_second,
                "tokens_per_second": completion.stats.tokens_per_second,
            }
            print(json.dumps({"prompt": prompt, **asdict(completion), **speed}, ensure_ascii=False), flush=True)
        else:
            print(flush=True)
        if completion.finish_reason == "context":
            print(f"{PROG}: {TRY_LESS}", file=sys.stderr)
        if stats:
            print(describe(completion, conversation), file=sys.stderr)


def describe(completion: Completion, conversation: Conversation) -> str:
    """One line of figures about an answer."""
    stats, session = completion.stats, conversation.session
    prefill = f"prefill {stats.prompt_tokens - stats.reused_tokens:,} tokens"
    if stats.reused_tokens:
        prefill += f" (and {stats.reused_tokens:,} reused)"
    decode = f"answer {stats.generated_tokens:,} tokens"
    if stats.generated_tokens > 1:
        decode += f", {stats.tokens_per_second:,.1f} tokens/s"
    memory = ", ".join(f"{name.replace('_', ' ')} {size / 1e6:,.1f} MB" for name, size in stats.memory.items())
    return (
        f"{prefill}, {stats.prefill_tokens_per_second:,.1f} tokens/s | {decode} | "
        f"context {session.held:,}/{session.capacity:,} | {memory}"
    )


def _read_stdin(raw: bool) -> str:
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    # The line end is the shell's; a text to be continued keeps all else.
    return text.removesuffix("\n") if raw else text.strip()


def _fail(message: str) -> int:
    print(f"{PROG}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
