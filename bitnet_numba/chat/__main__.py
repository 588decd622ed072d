"""`python -m bitnet_numba.chat`: starts the command line. Ctrl-C gets its line while that is imported, too."""

import sys


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        try:
            from bitnet_numba.chat.command_line import run
        except ImportError as error:  # of a compiled library: its reason is at the end of a long text
            message, code = f"cannot start: {str(error).strip().rpartition(chr(10))[2]}", 2
        else:
            return run(argv)
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except MemoryError:
        message, code = "cannot start: memory is too short", 2
    from bitnet_numba.chat.terminal import PROG, note

    note(f"{PROG}: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
