"""The chat's command line, `python -m bitnet_numba.chat [CHECKPOINT]`.

In a terminal this is a conversation. With --prompt, or with text on standard input, it answers and exits: answers go to
standard output, everything else to standard error.
"""

import argparse
import codecs
import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

from rich.console import Console

from bitnet_numba.chat import PROG
from bitnet_numba.chat.conversation import NO_TEMPLATE, Conversation, describe
from bitnet_numba.chat.saved import well_formed
from bitnet_numba.chat.terminal import clean, note
from bitnet_numba.commands import complain, drop_output, make_parser
from bitnet_numba.engine.engine import BACKENDS, Engine, load
from bitnet_numba.errors import BitNetError, ContextFull, RequestError, one_line
from bitnet_numba.hub.fetch import as_hub_model, find_model, is_gguf
from bitnet_numba.sampling_params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.6, top_p=0.9)  # for models without a generation_config.json
MODEL_HELP = (
    "a model of the Hugging Face hub, such as owner/name, downloaded and converted when it is first used; a short name "
    "that `bitnet-numba models list --known` shows; or a converted model folder (default: the built-in model)"
)
PARAMS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_new_tokens", "stop")


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(prog, description="Talk to a BitNet model.")
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help=MODEL_HELP)
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="answer this and exit; repeat it for further turns",
    )
    add("--system", default="", metavar="TEXT", help="system message (default: none)")
    add("--raw", action="store_true", help="continue the text as it is, without chat template or turns")
    add("--json", action="store_true", help="print each answer as one line of JSON, in ASCII; needs --prompt or a pipe")
    add("--stats", action="store_true", help="show speed and memory after each answer")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--revision", metavar="R", help="branch, tag or commit of a model of the hub (default: main)")
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what runs the model (default: auto: CUDA if usable, otherwise the CPU)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="threads of the CPU backend (default: one for each physical core)",
    )
    add(
        "--context",
        type=int,
        metavar="N",
        help="maximum tokens of the whole conversation (default: the model's maximum)",
    )
    group = parser.add_argument_group("answers", "A model's generation_config.json overrides these defaults.")
    add = group.add_argument
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"maximum tokens per answer (default: {DEFAULTS.max_new_tokens})",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )
    for flag, kind, metavar, meaning in (
        ("--temperature", float, "T", "divide the logits by T; 0 always takes the most likely token"),
        ("--top-p", float, "P", "sample from the smallest set of tokens with total probability P"),
        ("--top-k", int, "K", "sample from the K most likely tokens; 0: from all"),
        ("--min-p", float, "P", "drop tokens less likely than P times the most likely one"),
        ("--repetition-penalty", float, "R", "values above 1 make tokens that have already occurred less likely"),
    ):
        add(
            flag,
            type=kind,
            metavar=metavar,
            help=f"{meaning} (default: {getattr(DEFAULTS, flag[2:].replace('-', '_'))})",
        )
    add("--seed", type=int, metavar="N", help="the same seed gives the same answers (default: a new seed for each)")
    return parser


def run(argv: list[str] | None = None, prog: str = PROG) -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake. prog: what messages call the command."""
    if sys.stdout is None:
        return _fail(prog, "standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal cannot encode
    advice = ""
    try:
        parser = build_parser(prog)
        args = parser.parse_args(argv)
        interactive = not args.prompt and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        if interactive and args.json:
            parser.error("--json needs --prompt or a pipe on standard input")
        if args.raw and args.system:
            parser.error("--system cannot be combined with --raw")
        given = {name: getattr(args, name) for name in PARAMS if getattr(args, name) is not None}
        SamplingParams(**given)  # mistakes are reported before the model is opened
        with _warnings_in_a_line(prog):
            engine = open_model(args)
            advice = "; " + shorten_advice(engine)
            params = replace(engine.sampling or DEFAULTS, **given)
            prompts = args.prompt if args.prompt or interactive else [_read_stdin(args.raw, engine, prog)]
            conversation = Conversation(engine, params, args.system, args.raw)
            if interactive:
                from bitnet_numba.chat.interactive import converse

                converse(conversation, args.checkpoint, args.stats)
            else:
                answer_all(conversation, prompts, args.json, args.stats, prog)
    except ContextFull as error:
        return _fail(prog, f"{error}{advice}")
    except BitNetError as error:
        return _fail(prog, str(error))
    except MemoryError as error:
        return _fail(prog, f"memory is too short: {one_line(error)}; a smaller --context needs less")
    except BrokenPipeError:  # the reader has closed the pipe
        drop_output()
    except OSError as error:
        drop_output()
        return _fail(prog, f"input or output failed: {error.strerror or error}")
    return 0


class _Lines(logging.Handler):
    """Log records as lines on standard error."""

    def __init__(self, prog: str):
        super().__init__(logging.WARNING)
        self._prog = prog

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{self._prog}: {record.getMessage()}")


@contextlib.contextmanager
def _warnings_in_a_line(prog: str) -> Iterator[None]:
    """Inside, what the package warns of is printed as every other message is: it may quote a model's files."""
    logger, handler = logging.getLogger("bitnet_numba"), _Lines(prog)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def open_model(args: argparse.Namespace) -> Engine:
    """Loads the model that the command line names, with a status line on a terminal."""
    path, revision = args.checkpoint, args.revision
    if path and (is_gguf(path) or as_hub_model(path, revision) is not None):
        # Before the status line, because a download and a conversion show their own.
        path, revision = find_model(path, revision), None
    console = Console(stderr=True)
    waiting = console.status("loading the model ...") if console.is_terminal else contextlib.nullcontext()
    with waiting:
        return load(path, args.backend, args.context, args.threads, revision)


def answer_all(conversation: Conversation, prompts: list[str], as_json: bool, stats: bool, prog: str = PROG) -> None:
    """Prints the answers to prompts, one turn each."""
    if not conversation.raw and not conversation.engine.tokenizer.has_chat_template:
        note(f"{prog}: {NO_TEMPLATE}")
    for prompt in prompts:
        prompt = well_formed(prompt)
        try:
            for piece in conversation.ask(prompt):
                if not as_json:
                    print(clean(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        except KeyboardInterrupt:
            if not as_json:
                print(flush=True)  # the message that follows has a line of its own
            raise
        completion = conversation.last
        assert completion is not None
        if as_json:
            speed = {
                "prefill_tokens_per_second": completion.stats.prefill_tokens_per_second,
                "tokens_per_second": completion.stats.tokens_per_second,
            }
            print(
                json.dumps({"prompt": prompt, **asdict(completion), **speed}), flush=True
            )  # ASCII: any encoding will do
        else:
            print(flush=True)
        if completion.finish_reason == "context":
            note(f"{prog}: the context is full; {shorten_advice(conversation.engine)}")
        if stats:
            note(describe(completion, conversation))


def shorten_advice(engine: Engine) -> str:
    """How to fit the context, in terms of the command line."""
    larger = " or a larger --context" if engine.context < engine.config.max_context else ""
    return f"give a shorter prompt{',' if larger else ' or'} fewer of them{larger}"


def _read_stdin(raw: bool, engine: Engine, prog: str) -> str:
    if sys.stdin is None:
        raise RequestError("standard input is closed: give --prompt")
    if sys.stdin.isatty():  # only standard output leads elsewhere
        note(f"{prog}: type the prompt; Ctrl-D on a line of its own ends it")
    limit = engine.context * engine.tokenizer.longest_token
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise ContextFull(f"the prompt has more than {limit:,} bytes, but the context holds {engine.context} tokens")
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    text = data.decode(encoding, "replace")
    # The last line end comes from the shell; all other whitespace of a text to be continued matters.
    return text.removesuffix("\n") if raw else text.strip()


def _fail(prog: str, message: str) -> int:
    complain(prog, message)
    return 2
