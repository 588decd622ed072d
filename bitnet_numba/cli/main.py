"""`bitnet-numba COMMAND ...`: finds the command and starts it. Nothing heavy is imported before it is known."""

import sys

import bitnet_numba
from bitnet_numba.cli import PROG
from bitnet_numba.commands import complain, ignore_ctrl_c, leaving_at_once, output, start
from bitnet_numba.errors import shown, suggestion

# Command -> the module that has its `run(argv, prog)`, and what it does.
COMMANDS = {
    "chat": ("bitnet_numba.chat.command_line", "talk to a model in the terminal, or answer a prompt and exit"),
    "serve": ("bitnet_numba.server.command_line", "serve a model over HTTP, as OpenAI does, and a page to talk to it"),
    "convert": ("bitnet_numba.cli.convert", "write a model of Hugging Face as a packed folder of your choice"),
    "models": ("bitnet_numba.cli.models", "list, show and delete the models that were downloaded by name"),
    "perplexity": ("bitnet_numba.cli.perplexity", "show how well a model predicts a text"),
    "embed": ("bitnet_numba.cli.embed", "print what lines of text mean, as vectors of an embedding model"),
    "doctor": ("bitnet_numba.cli.doctor", "show what runs on this machine, how fast, and why not more"),
    "bench": ("bitnet_numba.cli.bench", "measure how fast a model runs on this machine"),
    "completion": ("bitnet_numba.cli.completion", "let your shell complete commands and options at the Tab key"),
}
COMMAND_LINES = "\n".join(f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items())
HELP = f"""usage: {PROG} COMMAND ...

BitNet b1.58 language models on your CPU or NVIDIA GPU.

commands:
{COMMAND_LINES}

options:
  --version  print the version and exit
  -h, --help print this and exit; {PROG} COMMAND --help explains a command

examples:
  {PROG} chat                       talk to the small model that is built in
  {PROG} chat 2b4t                  download Microsoft's 2B-4T model (1.2 GB) once, and talk to it
  {PROG} chat owner/name            the same with any BitNet model of the Hugging Face hub
  {PROG} serve 2b4t                 2B-4T at http://127.0.0.1:8000, for browsers and OpenAI's clients
  {PROG} models list --known        well-known models and their short names
"""


def main(argv: list[str] | None = None) -> int:
    """The command line of a process; returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) > 1 and arguments[0] == "help":
        arguments = [arguments[1], "--help"]
    try:
        with leaving_at_once(PROG):
            code = _special(arguments)
        if code is None:
            name, *rest = arguments
            code = start(f"{PROG} {name}", COMMANDS[name][0], rest)
    finally:
        if argv is None:
            ignore_ctrl_c()  # too late for anything but the interpreter's own end
    return code


def _special(arguments: list[str]) -> int | None:
    """Does what is no command and returns the exit code; None for a command."""
    first = arguments[0] if arguments else "--help"
    if first in COMMANDS:
        return None
    if first in ("-h", "--help", "help"):
        return output(PROG, HELP)
    if first in ("--version", "-V"):
        return output(PROG, f"{PROG} {bitnet_numba.__version__}\n")
    if first.startswith("-"):
        advice = suggestion(first.lower(), ("--help", "--version"), 0.75)
        complain(PROG, f"unknown option {shown(first)}{advice and f': {advice}'} (see --help)")
        return 2
    advice = suggestion(first.lower(), COMMANDS, 0.5) or f"commands: {', '.join(COMMANDS)}"
    complain(PROG, f"unknown command {shown(first)}; {advice}")
    return 2
