"""Prints a model's perplexity on a text file.

    python tools/perplexity.py FILE [--model MODEL] [--window N] [--stride N] [--json]

This is `bitnet-numba perplexity` for a checkout that is not installed; see `bitnet_numba.cli.perplexity`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitnet_numba.commands import start

if __name__ == "__main__":
    sys.exit(start("perplexity", "bitnet_numba.cli.perplexity", None))
