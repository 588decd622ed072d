"""Converts a Hugging Face BitNet checkpoint into the packed checkpoint that bitnet_numba runs.

    python tools/convert.py SRC DST [--head bf16|int8] [--force] [--revision R]

This is `bitnet-numba convert` for a checkout that is not installed; see `bitnet_numba.cli.convert`.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` takes over, Ctrl-C would end in the traceback of an import.
    signal.signal(
        signal.SIGINT, lambda *_: (os.write(2, b"convert: interrupted; nothing was written\n"), os._exit(130))
    )

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitnet_numba.cli.convert import run
from bitnet_numba.commands import ignore_ctrl_c


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run(argv, "convert")


if __name__ == "__main__":
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    ignore_ctrl_c()  # too late for anything but the interpreter's own end
    sys.exit(code)
