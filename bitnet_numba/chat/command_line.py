"""The chat's command line, `python -m bitnet_numba.chat [MODEL]`.

In a terminal this is a conversation. With --prompt, or with text on standard input, it answers and exits: answers go to
standard output, everything else to standard error.
"""

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace

from bitnet_numba.chat import PROG
from bitnet_numba.chat.arguments import build_parser
from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.chat.one_shot import Output, answer_all, gather_prompts, shorten_advice
from bitnet_numba.chat.options import DEFAULTS, OPTIONS
from bitnet_numba.chat.terminal import silent_keyboard
from bitnet_numba.commands import complain, drop_output
from bitnet_numba.errors import BitNetError, ContextFull, one_line
from bitnet_numba.model_options import open_model
from bitnet_numba.sampling_params import SamplingParams


def run(argv: list[str] | None = None, prog: str = PROG) -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake. prog: what messages call the command."""
    if sys.stdout is None:
        return _fail(prog, "standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal cannot encode
    advice = ""
    try:
        args, interactive = read_arguments(argv, prog)
        output = Output(prog, args.json, args.stats, args.quiet, args.markdown)
        fields = (*(option.field for option in OPTIONS), "stop", "thinking")
        given = {name: getattr(args, name) for name in fields if getattr(args, name) not in (None, [])}
        SamplingParams(**given)  # mistakes are reported before the model is opened
        with _warnings_in_a_line(output):
            with silent_keyboard() if interactive else contextlib.nullcontext():
                engine = open_model(args, args.quiet)
            engine.tokenizer.check_thinking(args.thinking)
            advice = "; " + shorten_advice(engine)
            params = replace(engine.sampling or DEFAULTS, **given)
            conversation = Conversation(engine, params, args.system, args.raw)
            if interactive:
                _converse(conversation, args)
            else:
                answer_all(conversation, gather_prompts(args.prompt, args.file, args.raw, engine, output), output)
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


def read_arguments(argv: list[str] | None, prog: str) -> tuple[argparse.Namespace, bool]:
    """The command line, and whether it asks for a conversation in the terminal."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    interactive = not args.prompt and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if interactive and args.json:
        parser.error("--json needs --prompt or a pipe on standard input")
    if args.raw and args.system:
        parser.error("--system cannot be combined with --raw")
    if args.raw and args.thinking is not None:
        parser.error("--thinking cannot be combined with --raw")
    if args.raw and args.markdown:
        parser.error("--markdown cannot be combined with --raw")
    if args.json and args.markdown:
        parser.error("--markdown cannot be combined with --json")
    return args, interactive


def _converse(conversation: Conversation, args: argparse.Namespace) -> None:
    from bitnet_numba.chat.chat import Chat
    from bitnet_numba.chat.display import Display
    from bitnet_numba.chat.interactive import converse, title_of

    display = Display(False if args.raw else args.markdown, args.quiet)
    converse(Chat(conversation, display, title_of(args.checkpoint), args.stats), args.checkpoint is None, args.file)


class _Lines(logging.Handler):
    """Log records as lines on standard error."""

    def __init__(self, output: Output):
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        self._output.note(record.getMessage())


@contextlib.contextmanager
def _warnings_in_a_line(output: Output) -> Iterator[None]:
    """Inside, what the package warns of is printed as every other message is: it may quote a model's files."""
    logger, handler = logging.getLogger("bitnet_numba"), _Lines(output)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _fail(prog: str, message: str) -> int:
    complain(prog, message)
    return 2
