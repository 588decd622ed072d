"""The bit layout of packed ternary matrices. All comparisons are exact."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba import packing
from bitnet_numba.packing import (
    num_groups,
    pack_scales,
    pack_ternary,
    packed_scales,
    packed_words,
    padded_shape,
    unpack_scales,
    unpack_ternary,
)
from tests.conftest import GOLDEN

sizes = st.integers(1, 70)


def ternary(N: int, K: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (N, K)).astype(np.int8)


def decode_bit_by_bit(words: np.ndarray, N: int, K: int) -> list[list[int]]:
    """Decodes from the description alone: blocks, word numbers and bit pairs, one bit at a time, no NumPy operators."""
    columns_of_pairs = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    column_blocks = (K + 31) // 32
    w = [[99] * K for _ in range(N)]
    for number, word in enumerate(int(word) % 2**32 for word in words):
        block, t = divmod(number, 32)
        row = 16 * (block // column_blocks) + 8 * (t // 16) + t % 8
        first_column = 32 * (block % column_blocks) + 16 * ((t % 16) // 8)
        for pair in range(16):
            low, high = word // 2 ** (2 * pair) % 2, word // 2 ** (2 * pair + 1) % 2
            column = first_column + columns_of_pairs[pair]
            if row < N and column < K:
                w[row][column] = 2 * high + low - 2
            else:
                assert 2 * high + low == 2, "padding must be w = 0"
    return w


def test_fixed_example() -> None:
    """One matrix, packed by the published kernel's own tool."""
    example = np.load(GOLDEN / "packing_canonical_48x128.npz")
    assert np.array_equal(pack_ternary(example["ternary"]).view(np.int8), example["packed_int8"].reshape(-1))
    assert np.array_equal(unpack_ternary(pack_ternary(example["ternary"]), 48, 128), example["ternary"])


@given(sizes, st.integers(1, 140), st.integers(0, 2**32))
def test_round_trip(N: int, K: int, seed: int) -> None:
    w = ternary(N, K, seed)
    before = w.copy()
    words = pack_ternary(w)
    assert words.dtype == np.int32 and words.shape == (packed_words(N, K),)
    assert np.array_equal(unpack_ternary(words, N, K), w)
    assert np.array_equal(w, before)


@given(sizes, sizes, st.integers(0, 2**32))
def test_agrees_with_the_description(N: int, K: int, seed: int) -> None:
    w = ternary(N, K, seed)
    assert decode_bit_by_bit(pack_ternary(w), N, K) == w.tolist()


@given(st.integers(1, 4), st.integers(1, 4))
def test_is_a_permutation(row_blocks: int, col_blocks: int) -> None:
    """Each place of the matrix owns exactly two bits: flipping it changes one pair, and no two places share a pair."""
    N, K = 16 * row_blocks, 32 * col_blocks
    empty = pack_ternary(np.zeros((N, K), np.int8)).view(np.uint32)
    assert (empty == packing.ZERO_WORD).all()
    seen = set()
    for row in range(N):
        w = np.zeros((N, K), np.int8)
        for col in range(0, K, 7 if N * K > 512 else 1):
            w[row, col] = 1
            changed = pack_ternary(w).view(np.uint32) ^ empty
            (word,) = np.flatnonzero(changed)
            pair, rest = divmod(int(changed[word]).bit_length() - 1, 2)
            assert int(changed[word]) == 1 << (2 * pair) and rest == 0
            assert (word, pair) not in seen
            seen.add((int(word), pair))
            w[row, col] = 0


@given(st.integers(1, 6), st.integers(1, 100), st.data())
def test_row_slices(row_blocks: int, K: int, data: st.DataObject) -> None:
    """Packing rows a..b, both multiples of 16, equals slicing the packing."""
    w = ternary(16 * row_blocks, K, 5)
    first = data.draw(st.integers(0, row_blocks - 1))
    last = data.draw(st.integers(first + 1, row_blocks))
    words_per_row_block = packed_words(16, K)
    sliced = pack_ternary(w)[first * words_per_row_block : last * words_per_row_block]
    assert np.array_equal(pack_ternary(w[16 * first : 16 * last]), sliced)


def test_one_shift_and_mask_give_four_columns() -> None:
    """What kernels rely on: (word >> 2i) & CODE_MASK holds columns 4i..4i+3 in its four bytes."""
    w = ternary(16, 32, 3)
    words = pack_ternary(w).view(np.uint32)
    for t, word in enumerate(words):
        row, column = 8 * (t // 16) + t % 8, 16 * ((t % 16) // 8)
        for i in range(packing.CODES_PER_BYTE):
            four = np.array([(int(word) >> 2 * i) & packing.CODE_MASK], np.uint32).view(np.int8)
            assert np.array_equal(four - packing.CODE_OFFSET, w[row, column + 4 * i : column + 4 * i + 4])


def test_non_contiguous_input() -> None:
    w = ternary(40, 64, 1)
    assert np.array_equal(pack_ternary(w.T), pack_ternary(np.ascontiguousarray(w.T)))
    assert np.array_equal(pack_ternary(w[::2]), pack_ternary(w[::2].copy()))


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (np.full((2, 3), 2, np.int8), "row 0, column 0 is 2"),
        (np.array([[0, 1], [0, -2]], np.int8), "row 1, column 1 is -2"),
        (np.zeros((2, 3), np.int32), "int8 array, not int32"),
        (np.zeros((2, 3)), "not float64"),
        ([[1, 0]], "not list"),
        (np.zeros(3, np.int8), "rank 1"),
        (np.zeros((2, 2, 2), np.int8), "rank 3"),
        (np.zeros((0, 3), np.int8), "0 x 3"),
        (np.zeros((3, 0), np.int8), "3 x 0"),
    ],
)
def test_pack_refuses(w: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_ternary(w)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (np.zeros(32, np.int64), "int32"),
        (np.zeros((2, 16), np.int32), "one-dimensional"),
        (np.zeros(31, np.int32), "takes 32 packed words, not 31"),
        (np.zeros(32, np.int32), "unused code 0"),
    ],
)
def test_unpack_refuses(words: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_ternary(words, 16, 32)


def test_unpack_refuses_empty() -> None:
    with pytest.raises(ValueError, match="0 x 32"):
        unpack_ternary(np.zeros(0, np.int32), 0, 32)


def test_padded_shape() -> None:
    assert padded_shape(1, 1) == (16, 32)
    assert padded_shape(16, 32) == (16, 32)
    assert padded_shape(17, 33) == (32, 64)


@given(sizes, st.integers(1, 600), st.integers(0, 99))
def test_group_scales_lie_where_the_description_says(N: int, K: int, seed: int) -> None:
    """Row-blocks outermost, then groups of 128 columns, then 16 rows; rows of padding have 0."""
    groups = (K + 127) // 128
    scales = np.random.default_rng(seed).uniform(0.1, 2, (N, groups)).astype(np.float16)
    packed = pack_scales(scales)
    assert num_groups(K) == groups and len(packed) == packed_scales(N, K)
    for i, scale in enumerate(packed):
        row, group = 16 * (i // (16 * groups)) + i % 16, i // 16 % groups
        assert scale == (scales[row, group] if row < N else 0)
    assert np.array_equal(unpack_scales(packed, N, K), scales)


def test_bad_group_scales() -> None:
    with pytest.raises(ValueError, match="must be a float16 matrix"):
        pack_scales(np.ones((2, 2), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a float16 matrix"):
        pack_scales(np.ones(2, np.float16))
    with pytest.raises(ValueError, match="a 17 x 129 matrix has 64 group scales"):
        unpack_scales(np.ones(32, np.float16), 17, 129)
