"""The process of `bitnet-numba` and `python -m bitnet_numba`. Ctrl-C gets its line while the rest is imported, too."""

import sys


def main() -> int:
    """The command line of a process; returns its exit code, see `cli.main`."""
    try:
        from bitnet_numba.cli.main import main

        return main()
    except KeyboardInterrupt:  # before that deals with it
        from bitnet_numba.cli import PROG
        from bitnet_numba.interrupted import leave

        leave(PROG)


if __name__ == "__main__":
    sys.exit(main())
