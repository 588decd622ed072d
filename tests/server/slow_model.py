"""A model that takes its time, for tests of load and of connections."""

import time
from typing import Any

from bitnet_numba.engine.engine import Engine
from tests.engine.toy_backend import ToyBackend, tokens_of, toy_engine
from tests.server.helpers import Running

CHAT = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
SLOW = 0.002  # seconds that a step of the toy model takes


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **fields}


def slow_engine(backends: list[ToyBackend]) -> Engine:
    """A model that answers " fox fox fox ..." and takes its time; its backend is added to the list."""
    engine, backend = toy_engine(tokens_of(" fox"), context=4096)
    choose = backend.choose

    def slowly(*arguments: Any) -> int:
        time.sleep(SLOW)
        return choose(*arguments)

    backend.choose = slowly  # type: ignore[method-assign]
    backends.append(backend)
    return engine


def free(running: Running) -> bool:
    """Whether nothing is open or runs."""
    return running.service.open == 0 and running.service.running == 0
