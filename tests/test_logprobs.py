"""Log probabilities as arrays are those that were put in."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.logprobs import NONE, LogprobList, LogprobRows
from bitnet_numba.sampling import TokenLogprob


def rows_of(tops: list[int], seed: int) -> tuple[LogprobRows, list[TokenLogprob | None]]:
    """Rows of random numbers, and what is to be read from them."""
    rng, width = np.random.default_rng(seed), 5
    tokens = rng.integers(0, 1 << 18, len(tops)).tolist()
    ids = rng.integers(0, 1 << 18, (len(tops), width)).astype(np.int32)
    values = rng.standard_normal((len(tops), 1 + width)).astype(np.float32)
    expected: list[TokenLogprob | None] = []
    for token, top, own_ids, own in zip(tokens, tops, ids.tolist(), values.tolist(), strict=True):
        likely = list(zip(own_ids[: max(top, 0)], own[1:], strict=False))
        expected.append(None if top == NONE else TokenLogprob(token, own[0], likely))
    return LogprobRows.pack(tokens, tops, ids, values), expected


@given(tops=st.lists(st.integers(NONE, 5), max_size=6), seed=st.integers(0, 99))
def test_rows(tops: list[int], seed: int) -> None:
    rows, expected = rows_of(tops, seed)
    assert len(rows) == len(tops) and list(rows) == expected and rows[1:] == expected[1:]
    assert [rows[-1 - i] for i in range(len(rows))] == expected[::-1]


@given(steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=6), top=st.integers(0, 5))
def test_answers(steps: list[tuple[int, int]], top: int) -> None:
    """An answer's rows, each from a step in which others have asked for more or less."""
    sources, expected = [], []
    for seed, (other, row) in enumerate(steps):
        rows, read = rows_of([top if i == row else other for i in range(3)], seed)
        sources.append(rows if seed % 7 else list(rows))
        expected.append(read[row])
    found = LogprobList(sources, [row for _, row in steps])
    assert found == expected and list(found) == expected and found[1:] == expected[1:]
    for source, (_, row) in zip(sources, steps, strict=True):
        found.append(source, row)
        found.keep_own()
    assert found == [*expected, *expected]


def test_an_answer_can_keep_its_own_only() -> None:
    rows, expected = rows_of([3] * 1000, 1)
    found = LogprobList([rows, rows], [7, 9])
    found.keep_own()
    assert list(found) == [expected[7], expected[9]]
    assert [len(source) for source in found._sources] == [2, 2]
