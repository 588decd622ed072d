"""The end of a process that Ctrl-C has interrupted before it did anything. Imports nothing that takes time."""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def leave(prog: str) -> "NoReturn":
    """Tells it in a line and ends the process at once, with exit code 130. prog: what messages call the command."""
    try:
        os.write(2, f"{prog}: interrupted\n".encode())
    except OSError:  # standard error is closed
        pass
    os._exit(130)
