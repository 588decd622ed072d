"""How prompts are cut into passes. No device is needed."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

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

    class Uncaptured(Prefill):
        def graph(self, num_rows: int) -> Any:
            return num_rows

    buffers = SimpleNamespace(slot_positions=None, num_real=None)
    model = SimpleNamespace(heads=SimpleNamespace(head_dim=128, group=4), buffers=buffers)
    uploads = SimpleNamespace(write=lambda array, values: None)
    runtime: Any = SimpleNamespace(model=model, device=ArchSpec(90, 132), uploads=uploads, stream=None)
    state: Any = SimpleNamespace(expanded=None)
    passes: list[tuple[int, int]] = []
    clock: Any = SimpleNamespace(replay=lambda graph, tokens: passes.append((graph, tokens)))
    prefill = Uncaptured(runtime, state)
    assert prefill.block == 32
    parts = [PromptPart(slot, 0, count) for slot, count in enumerate([5, 33, 10, 32, 1])]
    assert list(prefill.feed(parts, clock)) == [[(0, 4), (1, 64), (2, 105), (3, 159), (4, 160)]]
    assert passes == [(256, 32 * (1 + 2 + 1 + 1 + 1))]
