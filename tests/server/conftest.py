"""Servers that several tests share."""

from collections.abc import Iterator

import pytest

from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import load
from tests.server.helpers import Running, serving


@pytest.fixture(scope="session")
def built_in() -> Iterator[Engine]:
    """The built-in model on the CPU; not the one that `server` serves."""
    with load(backend="cpu", threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """A server of the built-in model."""
    with serving(lambda: load(backend="cpu", threads=1), models=("bitnet-demo", "gpt-4o-mini")) as running:
        yield running
