"""What command lines share: their start, messages of one line, and output that may be closed or full.

Ctrl-C is told in one line from the start on, so this imports little.
"""

import _thread
import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from bitnet_numba.errors import printable, suggestion
from bitnet_numba.interrupted import leave

PATIENCE = 2.0  # seconds of silence on standard input before it is said what is being waited for

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any, NoReturn


def start(prog: str, module: str, argv: list[str] | None) -> int:
    """Imports `module` and returns its `run(argv, prog)`: the exit code; 2 if it cannot start, 130 after Ctrl-C.

    prog: what messages and help call the command. argv: None for those of the process, which then only has to end.
    """
    try:
        try:
            with leaving_at_once(prog):
                run = importlib.import_module(module).run
        except ImportError as error:  # of a compiled library: its reason is at the end of a long text
            message, code = f"cannot start: {str(error).strip().rpartition(chr(10))[2]}", 2
        else:
            with _ctrl_c_calls(_interrupt), _repeating_lost_interrupts():
                return int(run(argv, prog))
    except KeyboardInterrupt:
        ignore_ctrl_c()  # who presses it once more gets no traceback
        message, code = "interrupted", 130
    except MemoryError:
        message, code = "cannot start: memory is too short", 2
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        message, code = "no thread can be started: memory is too short, or so many are not allowed", 2
    finally:
        if argv is None:
            ignore_ctrl_c()
    complain(prog, message)
    return code


def make_parser(prog: str, **options: "Any") -> "argparse.ArgumentParser":
    """An argparse.ArgumentParser, and a class for its subparsers, whose errors are one line."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "NoReturn":
            unknown = message.partition("unrecognized arguments: ")[2][:100].partition(" ")[0].partition("=")[0]
            options = [option for parser in self._all() for option in parser._option_string_actions]
            advice = suggestion(unknown, options, 0.75)
            complain(self.prog, f"{message}{advice and f': {advice}'} (see --help)")
            sys.exit(2)

        def _all(self) -> "list[Parser]":
            """This parser and those of its commands: the outer one tells what an inner one does not know."""
            actions = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
            return [self, *(parser for action in actions for parser in action.choices.values())]

        def print_help(self, file: object = None) -> None:
            # Here, where a full or closed standard output is dealt with.
            print(self.format_help(), end="", flush=True)

    return Parser(prog=prog, **options)


def output(prog: str, text: str) -> int:
    """Prints on standard output; returns the exit code: 0, or 2 if it is closed or full."""
    if sys.stdout is None:
        complain(prog, "standard output is closed")
        return 2
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader has closed the pipe
        drop_output()
    except OSError as error:
        drop_output()
        complain(prog, f"output failed: {error.strerror}")
        return 2
    return 0


def drop_output() -> None:
    """Discards buffered output, so that flushing it at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(prog: str, message: str) -> None:
    """Prints one line on standard error, unless that is closed or full."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"{prog}: {printable(message, 1000)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading_input(tell: Callable[[str], None], typed: str, awaited: str) -> Iterator[None]:
    """Around reading standard input until it ends: tells whoever sits at a terminal what is awaited.

    typed: told at once if standard input is a keyboard. awaited: told after a silence if it is a pipe.
    """
    import threading

    silence = threading.Timer(PATIENCE, tell, [awaited])
    silence.daemon = True
    if sys.stdin.isatty():
        tell(f"type {typed}; Ctrl-D on a line of its own ends it")
    elif sys.stderr is not None and sys.stderr.isatty():
        silence.start()
    try:
        yield
    finally:
        silence.cancel()


def ignore_ctrl_c() -> None:
    """From now on, Ctrl-C does nothing."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def leaving_at_once(prog: str) -> contextlib.AbstractContextManager[None]:
    """Inside, Ctrl-C ends the process: an exception may be swallowed in the middle of an import, or become another."""
    return _ctrl_c_calls(lambda number, frame: leave(prog))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, but in the middle of an import only after it: there, it may be swallowed."""
    while frame is not None and frame.f_code is not start.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _thread.start_new_thread(_interrupt_later, (_thread.get_ident(),))
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def _repeating_lost_interrupts() -> Iterator[None]:
    """Inside, a KeyboardInterrupt in a callback of a library, from where no exception comes out, is raised anew."""
    before = sys.unraisablehook

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if lost.exc_type is KeyboardInterrupt:
            _thread.start_new_thread(_interrupt_later, (_thread.get_ident(),))
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt_later(main_thread: int) -> None:
    time.sleep(0.02)
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread, signal.SIGINT)  # wakes it where it waits for the system
    else:
        _thread.interrupt_main()


@contextlib.contextmanager
def _ctrl_c_calls(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, Ctrl-C does this, unless it is ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before not in (signal.default_int_handler, _interrupt):  # ignored, as under nohup
        yield
        return
    try:
        signal.signal(signal.SIGINT, handler)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
