"""What the attention kernels share: head shapes, the rotary embedding, softmax, and tensor-core fragments of one token.

`qkv` is float32 [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: a token's queries, keys and values side by
side, queries and keys not rotated yet. Head h attends to key-value head h // group.

The fragments below are the operands of mma m16n8k16 (16-bit numbers in, float32 sums) in `decode_mma` and
`paged_decode`, which multiply up to MMA_HEADS queries of one token with TILE_TOKENS tokens of the cache at a time. q
and the softmax's weights p go in as sums of terms of the cache's type, see `kv_dtype`: x = hi + mid + lo of bfloat16,
x = hi + mid of float16. With g = lane / 4 and c = lane % 4:

    q, left operand [16 rows, 16 dims]         k, right operand [16 dims, 8 tokens], two of them: a tile
      rows 0-3    hi of heads 0-3                lane: tokens g and g + 8, dims 8c .. 8c + 7 of every 32
      rows 4-7    mid of heads 0-3
      rows 8-11   lo of heads 0-3, or zeros    v [16 tokens, dims]
      rows 12-15  zeros                          lane: tokens 2c, 2c + 1, 2c + 8, 2c + 9, dims 8g .. 8g + 7 of every 64

    A head's score is the sum of its three rows. Lanes g and g + 4 add theirs up, so both hold head g % 4, tokens 2c,
    2c + 1, 2c + 8, 2c + 9: as v wants them.

A product's dimensions may be taken in any order if both operands agree: so a lane's 16 bytes of a token lie together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.kv_dtype import HalfFunctions
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32
from bitnet_numba.kernels.runtime.device import Device

MAX_HEAD_DIM = 256  # 32 lanes of LANE_DIMS
LANE_DIMS = 8  # 16-bit numbers in a 16-byte load
LOWEST = float32(-1e30)  # below every score, and finite: a difference of two is no NaN
INF = float32(np.inf)
MINUS_INF = float32(-np.inf)  # where a maximum always meets a score before it is subtracted
LOG2_E = np.log2(np.e)  # exponentials are taken to base 2

MMA_ARCH = 80  # mma of bfloat16, and of float16 in this shape
MMA_MAX_HEAD_DIM = 128  # of one token's kernels: larger keys, values and outputs do not fit the registers at once
MMA_HEADS = 4  # queries of a left operand: four rows each
TILE_TOKENS = 16  # tokens of the cache that a warp multiplies at a time
KEY_DIMS, VALUE_DIMS = 32, 64  # dimensions that one load of a token's four, or eight, lanes covers
LOW_HALVES, HIGH_HALVES = 0x5410, 0x7632  # byte_permute selectors: the lower halves of two words, and the upper ones


class HeadShape(NamedTuple):
    """The heads of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_size(self) -> int:
        """Elements of a token's queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def out_size(self) -> int:
        """Elements of a token's output."""
        return self.num_heads * self.head_dim

    def check(self, kernel: str) -> None:
        """Raises ValueError unless the key-value heads divide the heads."""
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{kernel}: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly"
            )


class RopeTables(NamedTuple):
    """Rotary embedding: dimensions i and i + head_dim / 2 of a head are rotated by the angle [position, i]."""

    cos: Any  # float32 [positions, head_dim / 2]
    sin: Any


@dataclass(frozen=True)
class SplitScratch:
    """Scratch for combining the splits of contexts. Launches that run one after the other may share it."""

    partials: Any  # float32 [..., heads of a block, partial_dims]
    stats: Any  # float32 [..., heads of a block, 2]: maximum and sum
    arrivals: Any  # int32 [..., head blocks]: zeros, before and after each launch

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        """(partials, stats, arrivals)."""
        return self.partials, self.stats, self.arrivals

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(array.nbytes for array in self.arrays)


def split_arrays(device: Device, partials: int, stats: int, arrivals: int) -> tuple[Any, Any, Any]:
    """The arrays of a `SplitScratch` of so many elements. Raises BackendError when memory is short."""
    return device.empty(partials, np.float32), device.empty(stats, np.float32), device.zeros(arrivals, np.int32)


def check_head(kernel: str, head_dim: int, group: int, max_head_dim: int = MAX_HEAD_DIM) -> None:
    """Raises ValueError for a head size that is odd or too large, or a group without heads."""
    if head_dim % 2 or not 2 <= head_dim <= max_head_dim:
        raise ValueError(f"{kernel} takes even head sizes up to {max_head_dim}, not {head_dim}")
    if group < 1:
        raise ValueError(f"{kernel}: a key-value head serves at least one query head, not {group}")


def padded_head_dim(head_dim: int) -> int:
    """Dimensions of a token in the cache: head_dim rounded up to 16-byte loads."""
    return -(-head_dim // LANE_DIMS) * LANE_DIMS


def partial_dims(head_dim: int, lane_dims: int = LANE_DIMS) -> int:
    """Dimensions of a head's partial result in the tensor-core kernels: head_dim rounded up to whole loads of eight
    lanes."""
    return -(-head_dim // (8 * lane_dims)) * 8 * lane_dims


def heads_per_block(group: int, limit: int = MMA_HEADS) -> int:
    """Query heads that one block serves: the largest divisor of the group up to `limit`."""
    return max(heads for heads in range(1, limit + 1) if group % heads == 0)


def power_of_two(n: int) -> int:
    """The next power of two, n itself included."""
    return 1 << (n - 1).bit_length()


def score_scale(head_dim: int) -> Any:
    """Factor of the queries, float32: 1 / sqrt(head_dim), and exponentials to base 2."""
    return float32(head_dim**-0.5 * LOG2_E)


# ---- Rotary embedding and the cache's words -------------------------------------------------------------------------


@device_function
def rotate_pair(x0, x1, cos, sin):
    """Dimensions i and i + head_dim / 2 of a query or key, rotated. Rounds as NumPy does."""
    return ptx.add_rn(ptx.mul_rn(x0, cos), ptx.mul_rn(-x1, sin)), ptx.add_rn(ptx.mul_rn(x1, cos), ptx.mul_rn(x0, sin))


def make_rotated_query(head_dim: int) -> Callable:
    """The device function `rotated(qkv, cos, sin, q_rd, angle, d)` for a head size: dimension d of the query at
    qkv[q_rd], rotated and scaled, 0 beyond head_dim. cos[angle], sin[angle] start the position's angles."""
    D, HALF, SCALE, ZERO = head_dim, head_dim // 2, score_scale(head_dim), float32(0)

    @device_function
    def rotated(qkv, cos, sin, q_rd, angle, d):
        value = ZERO
        if d < D:
            upper = d >= HALF
            j = int32(d - HALF) if upper else d
            turned = ptx.mul_rn(qkv[q_rd + (j if upper else int32(d + HALF))], sin[angle + j])
            value = ptx.mul_rn(
                ptx.add_rn(ptx.mul_rn(qkv[q_rd + d], cos[angle + j]), turned if upper else -turned), SCALE
            )
        return value

    return rotated


@device_function
def finite_or_inf(x):
    """Infinity in place of NaN, for outputs: a product that quantises without a norm drops NaN, but not infinity."""
    return x if x == x else INF


# ---- Registers ------------------------------------------------------------------------------------------------------


@device_function
def load4_into(r, n, source, i):
    """r[n .. n + 3] = source[i .. i + 3], one 16-byte load."""
    r[n], r[n + 1], r[n + 2], r[n + 3] = ptx.load4(source, i)


# ---- Fragments of one token's attention on tensor cores -------------------------------------------------------------


def make_term_functions(half: HalfFunctions, lane_dims: int = LANE_DIMS) -> tuple[Callable, Callable]:
    """Device functions that split queries and weights into terms of a type:

    store_query(q_s, head, word, x0, x1)    dimensions 2 word, 2 word + 1 of a head's query as left operand: registers
        0 and 2 hold rows 0 .. 7 (first and second terms), 1 and 3 rows 8 .. 15 (third terms, zeros).
        q_s: [steps, lane, 4 registers]
    weight_terms(s0, s1, t0, t1, g)         a lane's weights, as words of tokens (2c, 2c + 1) and (2c + 8, 2c + 9):
        lanes g < MMA_HEADS give (hi, hi, lo, lo) of head g, the others (mid, mid, 0, 0) of head g - MMA_HEADS; with two
        terms lo is 0
    """
    pack, low, high = half.pack, half.low, half.high
    THREE, WIDE = half.terms == 3, lane_dims == 16

    @device_function
    def store_query(q_s, head, word, x0, x1):
        first = pack(x0, x1)
        x0, x1 = x0 - low(first), x1 - high(first)
        middle = pack(x0, x1)
        step, c = int32((word >> 4) * 2 + (word >> 1 & 1)), word >> 2 & 3
        if WIDE:  # a lane's load has 16 dimensions: those of four steps
            step, c = int32((word >> 5) * 4 + (word >> 1 & 3)), word >> 3 & 3
        to = int32((step * WARP + head * 4 + c) * 4 + (word & 1) * 2)
        q_s[to] = first
        q_s[to + 1] = pack(x0 - low(middle), x1 - high(middle)) if THREE else int32(0)
        q_s[to + 64] = middle
        q_s[to + 65] = int32(0)

    @device_function
    def weight_terms(s0, s1, t0, t1, g):
        hi0, hi1 = pack(s0, s1), pack(t0, t1)
        s0, s1, t0, t1 = s0 - low(hi0), s1 - high(hi0), t0 - low(hi1), t1 - high(hi1)
        mid0, mid1 = pack(s0, s1), pack(t0, t1)
        lo0 = lo1 = int32(0)
        if THREE:
            lo0 = pack(s0 - low(mid0), s1 - high(mid0))
            lo1 = pack(t0 - low(mid1), t1 - high(mid1))
        if g >= MMA_HEADS:
            hi0, hi1, lo0, lo1 = mid0, mid1, int32(0), int32(0)
        return hi0, hi1, lo0, lo1

    return store_query, weight_terms


def make_tile_functions(
    arch: int, head_dim: int, index: Any, words: int, lane_dims: int = LANE_DIMS
) -> tuple[Callable, Callable, Callable]:
    """Device functions for a lane's part of a tile, for a head size, of which a token has `words` words in the cache
    and a load of 16 bytes `lane_dims` dimensions:

    load_keys(k_r, keys, at, left, g, c)        tokens g and g + 8 of a tile into registers; `at`: the lane's own first
                                                word; zeros from token `left` of the tile on
    load_values(v_r, values, at, left, g, c)    tokens 2c, 2c + 1, 2c + 8 and 2c + 9 likewise
    mask_tile(s0, s1, t0, t1, c, last)          the scores of these tokens, without those after token `last`

    `index`: the integer type that a token's number in the tile has; what is fastest differs between the kernels.
    """
    stream = ptx.stream_load(arch)
    # 16-byte loads of a lane for a token's key, and value
    L, Q = -(-head_dim // (4 * lane_dims)), -(-head_dim // (8 * lane_dims))
    WORDS = words
    WHOLE = WORDS == 16 * L and WORDS == 32 * Q  # every lane of every load has dimensions

    @device_function
    def load_keys(k_r, keys, at, left, g, c):
        for i in range(L):
            for t in range(2):
                n = 8 * i + 4 * t
                k_r[n] = k_r[n + 1] = k_r[n + 2] = k_r[n + 3] = int32(0)
                if index(g + 8 * t) < left and (WHOLE or 16 * i + 4 * c < WORDS):
                    rd = at + (8 * t * WORDS + 16 * i)
                    k_r[n], k_r[n + 1], k_r[n + 2], k_r[n + 3] = stream(keys, rd)

    @device_function
    def load_values(v_r, values, at, left, g, c):
        for i in range(Q):
            for t in range(4):
                n = 16 * i + 4 * t
                to = (t & 1) + 4 * (t & 2)
                v_r[n] = v_r[n + 1] = v_r[n + 2] = v_r[n + 3] = int32(0)
                if index(2 * c + to) < left and (WHOLE or 32 * i + 4 * g < WORDS):
                    rd = at + (to * WORDS + 32 * i)
                    v_r[n], v_r[n + 1], v_r[n + 2], v_r[n + 3] = stream(values, rd)

    @device_function
    def mask_tile(s0, s1, t0, t1, c, last):
        s0 = s0 if index(2 * c) <= last else MINUS_INF
        s1 = s1 if index(2 * c + 1) <= last else MINUS_INF
        t0 = t0 if index(2 * c + 8) <= last else MINUS_INF
        t1 = t1 if index(2 * c + 9) <= last else MINUS_INF
        return s0, s1, t0, t1

    return load_keys, load_values, mask_tile


@device_function
def online_softmax(s0, s1, t0, t1, row_max, row_sum):
    """A head's running maximum over the warp and this lane's sum of weights, with a tile's scores (to base 2) added:
    (four weights, row_max, row_sum, the factor of what was summed up before)."""
    before = row_max
    row_max = max(row_max, max(max(s0, s1), max(t0, t1)))
    row_max = max(row_max, ptx.shuffle_xor(row_max, 1))
    row_max = max(row_max, ptx.shuffle_xor(row_max, 2))
    alpha = ptx.exp2_approx(before - row_max)
    s0, s1 = ptx.exp2_approx(s0 - row_max), ptx.exp2_approx(s1 - row_max)
    t0, t1 = ptx.exp2_approx(t0 - row_max), ptx.exp2_approx(t1 - row_max)
    row_sum = row_sum * alpha + ((s0 + s1) + (t0 + t1))
    return s0, s1, t0, t1, row_max, row_sum, alpha


def make_store_out(head_dim: int) -> Callable:
    """The device function `store_out(out, wr, d, x0, x1, x2, x3, inverse)` for a head size: dimensions d .. d + 3 (at
    out[wr]) times `inverse`, but for what pads the head."""
    D = head_dim

    @device_function
    def store_out(out, wr, d, x0, x1, x2, x3, inverse):
        for k in range(4):
            if d + k < D:
                out[wr + k] = finite_or_inf((x0 if k == 0 else x1 if k == 1 else x2 if k == 2 else x3) * inverse)

    return store_out
