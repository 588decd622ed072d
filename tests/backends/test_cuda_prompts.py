"""How prompts are cut into passes. No device is needed."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.backends.cuda import prompts
from bitnet_numba.backends.cuda.prompts import Prefill, PromptPart, page_places, plan_passes
from bitnet_numba.kernels.runtime.spec import ArchSpec

parts_lists = st.lists(st.builds(PromptPart, st.integers(0, 9), st.integers(0, 500), st.integers(1, 100)), max_size=8)


@given(parts_lists, st.sampled_from([1, 4, 16, 32]), st.sampled_from([32, 48, 64]))
def test_every_token_is_in_one_pass_and_in_order(parts: list[PromptPart], block: int, max_rows: int) -> None:
    tokens, ends = [], []
    for slot_positions, pass_ends in plan_passes(parts, block, max_rows):
        rows = slot_positions.tolist()
        assert 1 <= len(rows) <= max_rows and rows[-1][0] >= 0
        for first in range(0, len(rows), block):  # of one prompt, without gaps, and what is to spare at the end
            used = [row for row in rows[first : first + block] if row[0] >= 0]
            assert used and used == rows[first : first + len(used)]
            assert used == [[used[0][0], used[0][1] + i] for i in range(len(used))]
        ends += [(i, tuple(rows[row])) for i, row in pass_ends]
        tokens += [(slot, position) for slot, position in rows if slot >= 0]
    assert tokens == [(slot, start + i) for slot, start, count in parts for i in range(count)]
    assert ends == [(i, (slot, start + count - 1)) for i, (slot, start, count) in enumerate(parts)]


def test_pages_that_a_pass_attends_to() -> None:
    rows = [(2, 0), (2, 1), (-1, -1), (0, 127), (0, 128), (2, 2), (-1, 2**30)]
    assert page_places(np.array(rows, np.int32), 10) == [20, 0, 1, 2]


def test_what_a_pass_is_said_to_compute_is_what_its_parts_count() -> None:
    """Otherwise many short prompts would look like a small part of what a round may compute."""
    buffers = SimpleNamespace(slot_positions=None, num_real=None)
    model = SimpleNamespace(heads=SimpleNamespace(head_dim=128, group=4), buffers=buffers)
    uploads = SimpleNamespace(write=lambda array, values: None)
    runtime: Any = SimpleNamespace(model=model, device=ArchSpec(90, 132), uploads=uploads, stream=None)
    state: Any = SimpleNamespace(expanded=None)
    passes: list[tuple[int, int]] = []
    clock: Any = SimpleNamespace(replay=lambda graph, tokens: passes.append((graph, tokens)))
    prefill: Any = Prefill(runtime, state)
    prefill._graphs = {rows: rows for rows in prefill.sizes}
    assert prefill.block == 32
    parts = [PromptPart(slot, 0, count) for slot, count in enumerate([5, 33, 10, 32, 1])]
    assert list(prefill.feed(parts, clock)) == [[(0, 4), (1, 64), (2, 105), (3, 159), (4, 160)]]
    assert passes == [(256, 32 * (1 + 2 + 1 + 1 + 1))]


def test_the_first_pass_of_a_size_runs_while_its_launches_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Pass:
        def __init__(self, model: Any, state: Any, num_rows: int):
            self.num_rows = num_rows

        def one_by_one(self) -> Iterator[Any]:
            for i in range(2):
                events.append(f"make {i}")
                yield lambda stream, i=i: events.append(f"run {i} of {self.num_rows} on {stream}")

    def capture(launches: list[Any]) -> Any:
        events.append(f"capture {len(launches)}")
        return SimpleNamespace(replay=lambda stream: events.append("replay"))

    monkeypatch.setattr(prompts, "PrefillPass", Pass)
    buffers = SimpleNamespace(slot_positions=0, num_real=0)
    model = SimpleNamespace(heads=SimpleNamespace(head_dim=128, group=4), buffers=buffers)
    runtime: Any = SimpleNamespace(
        model=model, device=ArchSpec(90, 132), uploads=SimpleNamespace(write=lambda array, values: None),
        stream=SimpleNamespace(handle=7, capture=capture),
    )  # fmt: skip
    prefill = Prefill(runtime, SimpleNamespace(expanded=None))  # type: ignore[arg-type]
    timed: list[int] = []

    def replay(graph: Any, tokens: int) -> None:
        timed.append(tokens)
        graph.replay(None)

    clock: Any = SimpleNamespace(replay=replay)
    for _ in range(2):
        assert list(prefill.feed([PromptPart(0, 0, 40)], clock)) == [[(0, 39)]]
    assert events == ["make 0", "run 0 of 64 on 7", "make 1", "run 1 of 64 on 7", "capture 2", "replay"]
    assert timed == [64], "what a first pass takes is the host's time"


def test_passes_are_padded_to_what_can_be_captured_before() -> None:
    assert prompts.pass_sizes() == [16, 32, 64, 128, 256, 480, 512, 1024, 2048, 3072]


def test_what_a_round_computes_is_a_pass_without_padding() -> None:
    assert prompts.round_tokens(32) == [64, 128, 256, 480, 1024, 2048, 3072]
    assert prompts.round_tokens(128) == [128, 256, 512, 1024, 2048, 3072]
    for granularity in (8, 16, 32, 64, 128):
        sizes = prompts.round_tokens(granularity)
        assert set(sizes) <= set(prompts.pass_sizes()) and not any(size % granularity for size in sizes)
