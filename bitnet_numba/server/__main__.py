"""`python -m bitnet_numba.server`: starts the command line. Ctrl-C gets its line while that is imported, too."""

import sys


def main(argv: list[str] | None = None) -> int:
    """The command line of a process; returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        from bitnet_numba.commands import start
        from bitnet_numba.server import PROG

        return start(PROG, "bitnet_numba.server.command_line", argv)
    except KeyboardInterrupt:  # before that deals with it
        from bitnet_numba.interrupted import leave
        from bitnet_numba.server import PROG

        leave(PROG)


if __name__ == "__main__":
    sys.exit(main())
