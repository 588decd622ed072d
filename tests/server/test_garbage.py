"""Python's garbage collector runs between the rounds of answers, and as usual while there are none."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from bitnet_numba.server.garbage import FULL, RoundCollector
from tests.engine.toy_backend import ToyBackend, ToyBatch
from tests.server.helpers import Running
from tests.server.slow_model import CHAT, body


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    (gc.enable if enabled else gc.disable)()


class Knot:
    """Garbage that holds itself."""

    def __init__(self) -> None:
        self.self = self


def test_what_a_round_leaves_is_collected_after_it() -> None:
    gc.enable()
    collector = RoundCollector()
    collector.hold()
    gc.set_threshold(50, 10, 10)
    knots = [weakref.ref(Knot()) for _ in range(1000)]
    assert not gc.isenabled() and all(knot() is not None for knot in knots)
    collector.collect()
    assert all(knot() is None for knot in knots) and not gc.isenabled()
    collector.release()
    assert gc.isenabled()


def test_who_had_no_collector_gets_none() -> None:
    gc.disable()
    collector = RoundCollector()
    collector.hold()
    collector.release()
    assert not gc.isenabled()


def test_several_loops_leave_the_collector_as_it_was() -> None:
    """A second model, begun while the first one answers."""
    gc.enable()
    first = RoundCollector()
    first.hold()
    second = RoundCollector()
    first.hold()
    second.hold()
    first.release()
    assert not gc.isenabled()
    second.release()
    second.release()
    assert gc.isenabled()
    second.hold()
    second.release()
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("counts", "thresholds", "collected"),
    [
        ((700, 10, 10), (700, 10, 10), None),
        ((701, 10, 10), (700, 10, 10), 0),
        ((701, 11, 10), (700, 10, 10), 1),
        ((5, 11, 11), (700, 10, 10), 1),
        ((5, 0, 11), (700, 10, 10), None),
        ((701, 11, 10 * FULL), (700, 10, 10), 1),
        ((701, 11, 10 * FULL + 1), (700, 10, 10), 2),
        ((5, 0, 10 * FULL + 1), (700, 10, 10), 2),
        ((9000, 11, 1000), (2000, 10, 0), 1),  # where the second counts for nothing, as of Python 3.14
        ((9000, 9000, 9000), (0, 10, 10), 2),
    ],
)
def test_how_much_is_collected(
    counts: tuple[int, int, int],
    thresholds: tuple[int, int, int],
    collected: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(gc, "get_count", lambda: counts)
    monkeypatch.setattr(gc, "get_threshold", lambda: thresholds)
    monkeypatch.setattr(gc, "collect", lambda generation=2: asked.append(generation))
    RoundCollector().collect()
    assert asked == ([] if collected is None else [collected])


def test_a_server_collects_between_rounds(slow: tuple[Running, ToyBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    gc.enable()
    running, _ = slow
    during: list[bool] = []
    collect = ToyBatch.collect

    def noted(self: ToyBatch) -> list[tuple[int, int]]:
        during.append(gc.isenabled())
        return collect(self)

    monkeypatch.setattr(ToyBatch, "collect", noted)
    assert running.post(CHAT, body(max_tokens=20)).status_code == 200
    assert len(during) >= 20 and not any(during)
    running.wait_until(gc.isenabled)
