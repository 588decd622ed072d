"""Servers that several tests share."""

from collections.abc import Iterator
from typing import Any

import pytest

from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import load
from tests.engine.toy_backend import ToyBackend
from tests.server.helpers import Running, serving
from tests.server.slow_model import slow_engine


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


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    """OpenAI's own, for `server`; what is not closed, Python's garbage collector complains of in a later test."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def slow() -> Iterator[tuple[Running, ToyBackend]]:
    """Two answers at a time and two that wait."""
    backends: list[ToyBackend] = []
    with serving(lambda: slow_engine(backends), max_sequences=2, max_waiting=2, drain_timeout=5.0) as running:
        yield running, backends[0]
