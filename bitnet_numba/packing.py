"""Ternary matrices <-> packed int32 words: the definition of the bit layout.

A weight w in {-1, 0, +1} is stored as the two-bit code w + 2. A matrix [N, K] (N output rows, K input columns) is cut
into blocks of 16 rows x 32 columns, stored block by block: row-blocks outermost, then column-blocks along K. A block is
32 int32 words (128 bytes) of 16 codes each. Word t of a block holds 16 consecutive columns of one row:

             columns 0-15     columns 16-31
    row 0    t =  0           t =  8
    ...      ...              ...
    row 7    t =  7           t = 15
    row 8    t = 16           t = 24
    ...      ...              ...
    row 15   t = 23           t = 31            row = 8 * (t // 16) + t % 8,  first column = 16 * ((t % 16) // 8)

Inside a word the 16 codes are interleaved, so that one shift and one mask put four neighbouring columns into the four
bytes of a register, ready for a four-way byte dot product (dp4a). Bit pair p (bits 2p and 2p + 1) holds column

    p        0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15
    column   0  4  8 12 |  1  5  9 13 |  2  6 10 14 |  3  7 11 15
             byte 0        byte 1        byte 2        byte 3

    (word >> 2*i) & CODE_MASK  ->  bytes = codes of columns 4i, 4i+1, 4i+2, 4i+3        i = 0..3

The codes stay unsigned in the dot product; with q the int8 activations,

    sum(q * w) = sum(q * code) - CODE_OFFSET * sum(q)

N is padded to a multiple of 16 and K to a multiple of 32 with w = 0; the true sizes are stored elsewhere.

Some models have a scale for each row and group of 128 columns. These are float16 [N, K / 128], stored like the words:
row-blocks outermost, then groups along K, then the 16 rows of the block; so what a row-block needs next is 32 bytes.
Rows of padding have the scale 0.
"""

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 16
BLOCK_COLS = 32
WORD_CODES = 16  # codes in one int32 word
CODE_OFFSET = 2  # stored code = w + CODE_OFFSET
CODE_BITS = 2
CODES_PER_BYTE = 4  # also the number of shifts that yield all codes of a word
CODE_MASK = 0x03030303  # one code in each of four bytes
ZERO_WORD = 0xAAAAAAAA  # sixteen codes of w = 0
GROUP_COLS = 128  # columns that share a scale, in models that have one for each row and group; the last may be shorter

# Axes of a packed matrix as an array of words; a permutation of them turns storage order into row-major order.
_STORED = ("row_block", "col_block", "row_half", "col_half", "row")
_STORED_SIZES = {"row_half": 2, "col_half": 2, "row": 8}
_ROW_MAJOR = ("row_block", "row_half", "row", "col_block", "col_half")


def padded_shape(N: int, K: int) -> tuple[int, int]:
    """The sizes (N, K) rounded up to whole blocks. Raises ValueError unless both are at least 1."""
    if N < 1 or K < 1:
        raise ValueError(f"a ternary matrix needs at least one row and one column, not {N} x {K}")
    return -(-N // BLOCK_ROWS) * BLOCK_ROWS, -(-K // BLOCK_COLS) * BLOCK_COLS


def packed_words(N: int, K: int) -> int:
    """Number of int32 words of a ternary [N, K] matrix, including padding."""
    padded_N, padded_K = padded_shape(N, K)
    return padded_N * padded_K // WORD_CODES


def num_groups(K: int) -> int:
    """Groups of columns of a matrix with group scales."""
    return -(-K // GROUP_COLS)


def packed_scales(N: int, K: int) -> int:
    """Number of group scales of a ternary [N, K] matrix, including those of padded rows."""
    return padded_shape(N, K)[0] * num_groups(K)


def pack_scales(scales: NDArray[np.float16]) -> NDArray[np.float16]:
    """Group scales float16 [N, groups] in storage order: [padded N * groups].

    Raises ValueError for another dtype or rank, or an empty matrix.
    """
    if not isinstance(scales, np.ndarray) or scales.dtype != np.float16 or scales.ndim != 2:
        raise ValueError("group scales must be a float16 matrix [N, groups]")
    N, groups = scales.shape
    padded = np.zeros((padded_shape(N, groups)[0], groups), np.float16)
    padded[:N] = scales
    return padded.reshape(-1, BLOCK_ROWS, groups).transpose(0, 2, 1).reshape(-1)


def unpack_scales(scales: NDArray[np.float16], N: int, K: int) -> NDArray[np.float16]:
    """The group scales [N, groups] of a ternary [N, K] matrix, from storage order. ValueError for another length."""
    if scales.dtype != np.float16 or scales.shape != (packed_scales(N, K),):
        raise ValueError(f"a {N} x {K} matrix has {packed_scales(N, K)} group scales in float16, not {scales.shape}")
    blocks = scales.reshape(-1, num_groups(K), BLOCK_ROWS).transpose(0, 2, 1)
    return np.ascontiguousarray(blocks.reshape(-1, num_groups(K))[:N])


def pack_ternary(w: NDArray[np.int8]) -> NDArray[np.int32]:
    """Packs int8 [N, K] with values in {-1, 0, 1} into int32 words [packed_words(N, K)].

    Raises ValueError for another dtype, rank or value, or an empty matrix.
    """
    if not isinstance(w, np.ndarray) or w.dtype != np.int8:
        raise ValueError(f"ternary weights must be an int8 array, not {getattr(w, 'dtype', type(w).__name__)}")
    if w.ndim != 2:
        raise ValueError(f"ternary weights must be a matrix [N, K], not an array of rank {w.ndim}")
    N, K = w.shape
    padded_N, padded_K = padded_shape(N, K)
    if w.min() < -1 or w.max() > 1:
        row, col = np.argwhere((w < -1) | (w > 1))[0]
        raise ValueError(f"ternary weights must be -1, 0 or 1; row {row}, column {col} is {w[row, col]}")

    codes = np.full((padded_N, padded_K), CODE_OFFSET, np.uint8)
    np.add(w, CODE_OFFSET, out=codes[:N, :K], casting="unsafe")
    # Four neighbouring columns are one little-endian uint32: byte j = code of column 4i + j.
    quads = codes.view("<u4").reshape(padded_N, padded_K // WORD_CODES, CODES_PER_BYTE)
    words = quads[:, :, 0].copy()  # [N, K / 16]
    for i in range(1, CODES_PER_BYTE):
        words |= quads[:, :, i] << np.uint32(CODE_BITS * i)
    return _reorder(words, padded_N, padded_K, _ROW_MAJOR, _STORED).view(np.int32).reshape(-1)


def unpack_ternary(words: NDArray[np.int32], N: int, K: int) -> NDArray[np.int8]:
    """Unpacks int32 words [packed_words(N, K)] into int8 [N, K].

    Raises ValueError for another dtype, rank or length, or if a word holds the unused code 0.
    """
    if not isinstance(words, np.ndarray) or words.dtype != np.int32 or words.ndim != 1:
        raise ValueError("packed words must be a one-dimensional int32 array")
    if len(words) != packed_words(N, K):
        raise ValueError(f"a {N} x {K} matrix takes {packed_words(N, K)} packed words, not {len(words)}")
    padded_N, padded_K = padded_shape(N, K)
    row_major = _reorder(words.view("<u4"), padded_N, padded_K, _STORED, _ROW_MAJOR)
    row_major = row_major.reshape(padded_N, padded_K // WORD_CODES)
    every_pair = np.uint32(0x55555555)
    if ((row_major | row_major >> np.uint32(1)) & every_pair != every_pair).any():
        raise ValueError("packed words hold the unused code 0 and are damaged")
    quads = np.empty((padded_N, padded_K // WORD_CODES, CODES_PER_BYTE), "<u4")
    for i in range(CODES_PER_BYTE):
        np.right_shift(row_major, np.uint32(CODE_BITS * i), out=quads[:, :, i])
    quads &= np.uint32(CODE_MASK)
    codes = quads.view(np.int8).reshape(padded_N, padded_K)
    codes -= CODE_OFFSET
    return np.ascontiguousarray(codes[:N, :K])


def _reorder(words: np.ndarray, N: int, K: int, source: tuple[str, ...], target: tuple[str, ...]) -> np.ndarray:
    """Words of a padded [N, K] matrix with axes `source`, as a contiguous array with axes `target`."""
    sizes = _STORED_SIZES | {"row_block": N // BLOCK_ROWS, "col_block": K // BLOCK_COLS}
    shaped = words.reshape([sizes[axis] for axis in source])
    return np.ascontiguousarray(shaped.transpose([source.index(axis) for axis in target]))
