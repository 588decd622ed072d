"""An HTTP server with OpenAI's interface, and a page to talk to; needs the extra `serve`."""

PROG = "python -m bitnet_numba.server"
