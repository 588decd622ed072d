"""The command-line chat: `python -m bitnet_numba.chat`."""

PROG = "bitnet-chat"
