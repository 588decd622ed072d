"""The command `bitnet-numba`, which is `python -m bitnet_numba`: one module for each of its commands."""

PROG = "bitnet-numba"
