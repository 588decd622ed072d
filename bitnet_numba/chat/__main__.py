"""`python -m bitnet_numba.chat`: starts the command line. Ctrl-C gets its line while that is imported, too."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from bitnet_numba.chat import PROG
from bitnet_numba.errors import printable


def main(argv: list[str] | None = None) -> int:
    """The command line of a process; returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        try:
            with _leaving_at_once():
                from bitnet_numba.chat.command_line import run
        except ImportError as error:  # of a compiled library: its reason is at the end of a long text
            message, code = f"cannot start: {str(error).strip().rpartition(chr(10))[2]}", 2
        else:
            return run(argv)
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # who presses it once more gets no traceback
        message, code = "interrupted", 130
    except MemoryError:
        message, code = "cannot start: memory is too short", 2
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"{PROG}: {printable(message)}", file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process: an exception may be swallowed in the middle of an import, or become another."""

    def leave(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{PROG}: interrupted\n".encode())
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as under nohup
        yield
        return
    try:
        signal.signal(signal.SIGINT, leave)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
