"""`bitnet-numba completion SHELL`: prints a script with which a shell completes commands and options."""

import argparse
import importlib
from typing import Any

from bitnet_numba.cli import PROG
from bitnet_numba.commands import make_parser, output

SHELLS = ("bash", "zsh", "fish")
HOW = """to use it:
  bash   eval "$(bitnet-numba completion bash)"        in ~/.bashrc
  zsh    eval "$(bitnet-numba completion zsh)"         in ~/.zshrc, after compinit
  fish   bitnet-numba completion fish > ~/.config/fish/completions/bitnet-numba.fish
"""
PATHS = ("MODEL", "SRC", "DST", "FILE", "PATH")  # arguments of these names are completed with files and folders


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        prog,
        description="Print a script with which your shell completes commands and options at the Tab key.",
        epilog=HOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="the shell that you use")
    return parser


def run(argv: list[str] | None = None, prog: str = "bitnet-numba completion") -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake."""
    args = build_parser(prog).parse_args(argv)
    import shtab

    return output(prog, shtab.complete(whole_parser(), args.shell) + "\n")


def whole_parser() -> argparse.ArgumentParser:
    """The command lines of all commands in one, as the shell sees them."""
    from bitnet_numba.cli.main import COMMANDS

    parser = argparse.ArgumentParser(PROG)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers()
    for name, (module, summary) in COMMANDS.items():
        try:
            command = importlib.import_module(module).build_parser(f"{PROG} {name}")
        except ImportError:  # its extra is not installed: the name is known all the same
            commands.add_parser(name, help=summary, description=summary)
            continue
        _complete_paths(command)
        commands.add_parser(name, help=summary, description=summary, parents=[command], add_help=False)
    return parser


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    import shtab

    for action in parser._actions:
        where: Any = action  # shtab reads an attribute that argparse does not know
        if action.metavar in PATHS:
            where.complete = shtab.FILE
        elif isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command)
