"""How prompts are cut into passes. No device is needed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.backends.cuda.prompts import PromptPart, page_places, plan_passes

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
