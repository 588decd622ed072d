"""`python -m bitnet_numba.chat`: starts the command line. Ctrl-C gets its line while that is imported, too."""

import sys

from bitnet_numba.chat.terminal import PROG, note


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        from bitnet_numba.chat.command_line import run

        return run(argv)
    except KeyboardInterrupt:
        note(f"{PROG}: interrupted")
        return 130
    except MemoryError:
        note(f"{PROG}: memory is too short to start")
        return 2


if __name__ == "__main__":
    sys.exit(main())
