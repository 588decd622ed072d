"""`python -m bitnet_numba`: the command `bitnet-numba`."""

import sys

from bitnet_numba.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
