"""The text that a command reads: a file, or standard input."""

import io
import sys
from pathlib import Path

from bitnet_numba.commands import complain, reading_input
from bitnet_numba.errors import RequestError, printable

STANDARD_INPUT = "-"


def read_text(name: str, prog: str) -> str:
    """A text in UTF-8: of a file, or of standard input, for which a terminal is told that it is awaited.

    prog: what messages call the command. Raises RequestError if it cannot be read, or is empty.
    """
    what = "standard input" if name == STANDARD_INPUT else printable(name, 400)
    try:
        text = _read_standard_input(prog) if name == STANDARD_INPUT else Path(name).read_text("utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{what} is not a text in UTF-8") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text:
        raise RequestError(f"{what} is empty")
    return text


def _read_standard_input(prog: str) -> str:
    if sys.stdin is None:
        raise RequestError("standard input is closed: give FILE")

    def tell(message: str) -> None:
        complain(prog, message)

    with reading_input(tell, "the text", "reading the text from standard input, until it ends"):
        data = sys.stdin.buffer.read()
    return io.TextIOWrapper(io.BytesIO(data), "utf-8").read()  # with line ends as of a file
