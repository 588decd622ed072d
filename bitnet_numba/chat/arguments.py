"""The options of the chat's command line."""

import argparse

from bitnet_numba.chat import PROG
from bitnet_numba.chat.options import DEFAULTS, OPTIONS, STOP, THINKING
from bitnet_numba.commands import make_parser
from bitnet_numba.model_options import add_model_options

EPILOG = """examples:
  %(prog)s                                   talk to the built-in model
  %(prog)s 2b4t --system "Be brief."         talk to Microsoft's 2B-4T model
  %(prog)s 2b4t --prompt "Why is the sky blue?"
  %(prog)s 2b4t --file notes.txt --prompt "What is still to be done?"
  git diff | %(prog)s 2b4t --prompt "Describe this change in one sentence."
"""


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        prog,
        usage="%(prog)s [MODEL] [options]",
        description="Talk to a BitNet model: a conversation in the terminal, or, with --prompt or with text on\n"
        "standard input, one answer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="answer this and exit; repeat it for further turns; text on standard input goes before the first",
    )
    add(
        "--file",
        action="append",
        default=[],
        metavar="PATH",
        help="a text file that goes with the first question; may be repeated",
    )
    add("--system", default="", metavar="TEXT", help="system message: how the model should answer (default: none)")
    add("--raw", action="store_true", help="continue the text as it is, without chat template or turns")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--markdown",
        action=argparse.BooleanOptionalAction,
        help="show answers with headings, lists and code as such (default: on a terminal, without --raw)",
    )
    add("--json", action="store_true", help="print each answer as one line of JSON, in ASCII; needs --prompt or a pipe")
    add("--stats", action="store_true", help="show speed and memory after each answer")
    add("--quiet", action="store_true", help="print answers and errors, no hints")
    add_model_options(parser)
    group = parser.add_argument_group("answers", "A model's generation_config.json overrides these defaults.")
    add = group.add_argument
    for option in OPTIONS:
        default = getattr(DEFAULTS, option.field)
        words = "a new seed for each" if default is None else default
        add(f"--{option.name}", type=option.kind, metavar=option.metavar, help=f"{option.meaning} (default: {words})")
    add("--stop", action="append", default=[], metavar="TEXT", help=f"{STOP}; may be repeated")
    add("--thinking", action=argparse.BooleanOptionalAction, help=f"{THINKING} (default: as the model does)")
    return parser
