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
from dataclasses import asdict, replace
from typing import NoReturn

from rich.console import Console

from bitnet_numba.chat.conversation import NO_TEMPLATE, AnswerOptions, Conversation, describe
from bitnet_numba.chat.terminal import printable
from bitnet_numba.engine.engine import BACKENDS, Engine, load
from bitnet_numba.errors import BitNetError, ContextFull, RequestError
from bitnet_numba.sampling import SamplingParams

PROG = "bitnet-chat"
DEFAULTS = SamplingParams(temperature=0.6, top_p=0.9)  # for models that do not say how to sample from them
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog=PROG, description="Talk to a BitNet model.")
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="a converted model folder (default: the built-in model)")
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="answer this and exit; repeat for further turns",
    )
    add("--system", default="", metavar="TEXT", help="a system message to start with (default: none)")
    add("--raw", action="store_true", help="continue the text as it is: no chat template, no turns")
    add("--json", action="store_true", help="print each answer as one line of JSON; needs --prompt or a pipe")
    add("--stats", action="store_true", help="show speed and memory after each answer")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what runs the model (default: auto: CUDA if usable)",
    )
    add(
        "--context",
        type=int,
        metavar="N",
        help="tokens of the whole conversation (default: the model's maximum)",
    )
    group = parser.add_argument_group("answers", "A model's generation_config.json overrides these defaults.")
    add = group.add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; may be repeated",
    )
    for flag, kind, meaning in (
        ("--temperature", float, "0 always takes the most likely token"),
        ("--top-p", float, "sample from the smallest set of tokens with total probability P"),
        ("--top-k", int, "sample from the K most likely tokens; 0 for all"),
        ("--min-p", float, "drop tokens below this share of the top token's probability"),
        ("--repetition-penalty", float, "above 1 avoids repetition"),
    ):
        add(flag, type=kind, help=f"{meaning} (default: {getattr(DEFAULTS, flag[2:].replace('-', '_'))})")
    add("--seed", type=int, help="the same seed gives the same answers (default: a new one each time)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if sys.stdout is None:
        return _fail("standard output is closed: there is nowhere to answer")
    interactive = not args.prompt and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if interactive and args.json:
        parser.error("--json needs --prompt or a pipe on standard input")
    if args.raw and args.system:
        parser.error("--system has no place in a text that is continued as it is (--raw)")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    advice = ""
    try:
        given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
        SamplingParams(**given)  # a mistake shows before the model is opened
        engine = open_model(args)
        advice = "; " + less(engine)
        options = AnswerOptions(replace(engine.sampling or DEFAULTS, **given), args.max_new_tokens, tuple(args.stop))
        prompts = args.prompt if args.prompt or interactive else [_read_stdin(args.raw, engine)]
        conversation = Conversation(engine, options, args.system, args.raw)
        if interactive:
            from bitnet_numba.chat.interactive import converse

            converse(conversation, args.checkpoint, args.stats)
        else:
            answer_all(conversation, prompts, args.json, args.stats)
    except ContextFull as error:
        return _fail(f"{error}{advice}")
    except BitNetError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever was reading has read enough
        _drop_output()
    except OSError as error:
        _drop_output()
        return _fail(f"input or output failed: {error.strerror or error}")
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
        note(f"{PROG}: {NO_TEMPLATE}")
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
            note(f"{PROG}: the context is full; {less(conversation.engine)}")
        if stats:
            note(describe(completion, conversation))


def less(engine: Engine) -> str:
    """What to do, on the command line, about a full context."""
    larger = " or a larger --context" if engine.context < engine.config.max_context else ""
    return f"give a shorter prompt{',' if larger else ' or'} fewer of them{larger}"


def _read_stdin(raw: bool, engine: Engine) -> str:
    if sys.stdin is None:
        raise RequestError("standard input is closed: give --prompt")
    most = engine.context * engine.tokenizer.longest_token
    data = sys.stdin.buffer.read(most + 1)
    if len(data) > most:
        raise ContextFull(f"the prompt has more than {most:,} bytes, but the context holds {engine.context} tokens")
    text = data.decode("utf-8", "replace")
    # The line end is the shell's; a text to be continued keeps all else.
    return text.removesuffix("\n") if raw else text.strip()


def note(message: str) -> None:
    """A line on standard error; nothing where that is closed or full."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)


def _fail(message: str) -> int:
    note(f"{PROG}: {message}")
    return 2


def _drop_output() -> None:
    """What is still to be written goes nowhere, so that leaving does not fail on it again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
