"""The sampler: `bitnet_numba.sampling.sample` for one sequence, by one thread, without a sort.

z = (logit - max) / temperature is never above 0, so the bits of |z| as an integer, its `depth`, rank the tokens: lower
depths come first, and of equal ones the lower id. Top-k and top-p each keep the ranks down to a cut, a depth and an id,
found by radix select: the tokens' counts, or probabilities, are added up in a histogram over the first digit of the
depth; the digit in which the running sum reaches the target is the cut's, and the next digit is looked for among its
tokens alone. Probabilities are integers in units of 2^-39, which add up exactly in any order, as they do on the GPU.

The draw then takes 64 tokens at a time, those of 16 counters of the generator, and skips those where even the largest
possible noise cannot win.
"""

import math as host_math
from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, register_jitable

from bitnet_numba.kernels.cpu import math, vec
from bitnet_numba.kernels.cpu.gumbel import LARGEST_NOISE, gumbel, random_words
from bitnet_numba.kernels.cpu.memory import (
    load_f32,
    load_f64,
    load_i32,
    load_i64,
    store_f32,
    store_f64,
    store_i32,
    store_i64,
)
from bitnet_numba.sampling import MAX_TEMPERATURE, MIN_TEMPERATURE, logit_edits
from bitnet_numba.sampling_params import SamplingParams

NO_TOKEN = -1  # in place of a token when logits hold NaN
MAX_VOCAB = 1 << 23  # sums of probabilities fit 63 bits
GROUP = 64  # tokens of 16 counters, four words each
FIRST_BITS, NEXT_BITS = 11, 10  # a depth's 31 bits are three digits
BINS = 1 << FIRST_BITS
INFINITE_DEPTH = 0x7F800000
UNIT = 2.0**-39  # of probabilities; of a token, where tokens are counted
LOWEST = -np.inf

# Settings, float64.
TEMPERATURE, TOP_P, PENALTY, MIN_Z, TOP_K, SEED_LOW, SEED_HIGH = range(7)
SETTINGS = 7
# An edit of a logit, float64: token id, what is added, and room for the logit that was there.
EDIT_TOKEN, EDIT_DELTA, EDIT_KEPT = range(3)
EDIT = 3
NO_EDITS = np.empty((0, EDIT))


def pack_settings(params: SamplingParams) -> np.ndarray:
    """Sampling parameters as `sample` reads them, float64 [7]. The seed is set unless temperature is 0."""
    seed = params.seed or 0
    temperature = params.temperature and min(max(params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)
    min_z = host_math.log(params.min_p) if params.min_p > 0 else LOWEST
    values = (temperature, params.top_p, params.repetition_penalty, min_z, min(params.top_k, MAX_VOCAB))
    return np.array([*values, seed & 0xFFFFFFFF, seed >> 32], np.float64)


def pack_edits(params: SamplingParams, generated: Sequence[int]) -> np.ndarray:
    """`sampling.logit_edits` as `sample` reads them, float64 [n, 3]."""
    ids, deltas = logit_edits(params, generated)
    return np.column_stack([ids, deltas, np.zeros(len(ids))]).astype(np.float64)


@register_jitable
def padded(vocab):
    """A vocabulary's size rounded up to whole groups."""
    return (vocab + GROUP - 1) // GROUP * GROUP


@register_jitable
def scratch_bytes(vocab):
    """Bytes that `sample` needs: z, amounts and candidates of every token, and a histogram."""
    return 12 * padded(vocab) + 8 * BINS


# ---- Operations -----------------------------------------------------------------------------------------------------


@intrinsic
def where_greater(typingctx, a, b, x, y):
    """Lanes of x where a > b, else of y; a and b float32 or signed integers."""

    def codegen(context, builder, sig, args):
        compare = builder.fcmp_ordered if a.lane == "f32" else builder.icmp_signed
        return builder.select(compare(">", args[0], args[1]), args[2], args[3])

    return x(a, b, x, y), codegen


@intrinsic
def lane_numbers(typingctx):
    """0, 1, ... 15."""
    result = vec.Vec(16, "i32")

    def codegen(context, builder, sig, args):
        return vec.vector(16, "i32")([vec.I32(i) for i in range(16)])

    return result(), codegen


@intrinsic(prefer_literal=True)
def load_every_fourth(typingctx, address, offset, first):
    """float32 numbers first, first + 4, ... first + 60 from memory."""
    if not isinstance(first, types.IntegerLiteral):
        return None
    start = first.literal_value

    def codegen(context, builder, sig, args):
        sixty_four = ir.VectorType(vec.LANES["f32"], GROUP)
        v = builder.load(vec.pointer_to(context, builder, sig, args, sixty_four), align=1)
        return builder.shuffle_vector(v, v, vec.vector(16, "i32")([vec.I32(start + 4 * i) for i in range(16)]))

    return vec.Vec(16, "f32")(address, offset, first), codegen


# ---- Logits -> z ----------------------------------------------------------------------------------------------------


@njit(**vec.OPTIONS)
def edit_logits(logits, edits, num_edits):
    """Adds to the logits of single tokens, all different."""
    for at in range(0, 8 * EDIT * num_edits, 8 * EDIT):
        token = 4 * np.int64(load_f64(edits, at + 8 * EDIT_TOKEN))
        x = load_f32(logits, token)
        store_f64(edits, at + 8 * EDIT_KEPT, np.float64(x))
        store_f32(logits, token, x + np.float32(load_f64(edits, at + 8 * EDIT_DELTA)))


@njit(**vec.OPTIONS)
def restore_logits(logits, edits, num_edits):
    """Puts the edited logits back."""
    for at in range(0, 8 * EDIT * num_edits, 8 * EDIT):
        token = 4 * np.int64(load_f64(edits, at + 8 * EDIT_TOKEN))
        store_f32(logits, token, np.float32(load_f64(edits, at + 8 * EDIT_KEPT)))


@njit(**vec.OPTIONS)
def copy_logits(logits, vocab, z):
    """Copies logits to z, whose last group is filled up with -inf. False if one is NaN."""
    deepest = vec.zero_i32x16()
    whole = vocab - vocab % 16
    for at in range(4 * whole, 4 * padded(vocab), 64):
        vec.store(z, at, vec.splat_f32x16(LOWEST))
    for at in range(4 * whole, 4 * vocab, 4):
        store_f32(z, at, load_f32(logits, at))
    for at in range(0, 4 * whole, 64):
        vec.store(z, at, vec.load_f32x16(logits, at))
    for at in range(0, 4 * padded(vocab), 64):
        depth = vec.and_(vec.as_ints(vec.load_f32x16(z, at)), 0x7FFFFFFF)
        deepest = where_greater(depth, deepest, depth, deepest)
    nan = where_greater(deepest, vec.splat_i32x16(INFINITE_DEPTH), vec.splat_i32x16(1), vec.zero_i32x16())
    return vec.sum_lanes(nan) == 0


@njit(**vec.OPTIONS)
def penalize(logits, vocab, history, history_length, penalty, z):
    """Writes the penalised logits of the tokens in `history` to z. Twice the same token changes nothing."""
    factor = np.float32(penalty)
    for i in range(history_length):
        token = load_i64(history, 8 * i)
        if 0 <= token < vocab:
            x = load_f32(logits, 4 * token)
            store_f32(z, 4 * token, x / factor if x > np.float32(0) else x * factor)


@njit(**vec.OPTIONS)
def best_of_lanes(best, ids, scratch):
    """(largest value, the lowest id that has it) of 16 lanes. scratch: 128 bytes."""
    vec.store(scratch, 0, best)
    vec.store(scratch, 64, ids)
    value, token = load_f32(scratch, 0), load_i32(scratch, 64)
    for lane in range(1, 16):
        other, other_id = load_f32(scratch, 4 * lane), load_i32(scratch, 64 + 4 * lane)
        if other > value or (other == value and other_id < token):
            value, token = other, other_id
    return value, token


@njit(**vec.OPTIONS)
def largest(z, vocab, scratch):
    """(largest z, the lowest id that has it)."""
    best, best_ids = vec.splat_f32x16(LOWEST), lane_numbers()
    ids = lane_numbers()
    for at in range(0, 4 * vocab, 64):
        v = vec.load_f32x16(z, at)
        best_ids = where_greater(v, best, ids, best_ids)
        best = vec.maximum(v, best)
        ids = vec.add(ids, vec.splat_i32x16(16))
    return best_of_lanes(best, best_ids, scratch)


@njit(**vec.OPTIONS)
def scale(z, vocab, most, temperature):
    """z = (z - most) / temperature."""
    m, t = vec.splat_f32x16(most), vec.splat_f32x16(temperature)
    for at in range(0, 4 * vocab, 64):
        vec.store(z, at, vec.div(vec.sub(vec.load_f32x16(z, at), m), t))


# ---- Cuts -----------------------------------------------------------------------------------------------------------


@njit(**vec.OPTIONS)
def amount_of(amounts, token):
    """What a token adds to a running sum, in units of 2^-39."""
    return np.int64(load_f32(amounts, 4 * token) * np.float32(1 / UNIT))


@njit(**vec.OPTIONS)
def depth_of(z, token):
    """The bits of |z| of a token."""
    return load_i32(z, 4 * token) & 0x7FFFFFFF


@njit(**vec.OPTIONS)
def clear(histogram, bins):
    for at in range(0, 8 * bins, 8):
        store_i64(histogram, at, 0)


@njit(**vec.OPTIONS)
def add_to(histogram, digit, amount):
    store_i64(histogram, 8 * digit, load_i64(histogram, 8 * digit) + amount)


@njit(**vec.OPTIONS)
def reach(histogram, before, target):
    """(the first digit with which a running sum reaches the target, the sum before it)."""
    digit = np.int64(0)
    while before + load_i64(histogram, 8 * digit) < target:
        before += load_i64(histogram, 8 * digit)
        digit += 1
    return digit, before


@njit(**vec.OPTIONS)
def fill_amounts(z, vocab, counting, amounts):
    """What each token adds to a running sum: one unit, or its probability before division by their sum."""
    for at in range(0, 4 * vocab, 64):
        vec.store(amounts, at, vec.splat_f32x16(UNIT) if counting else math.exp(vec.load_f32x16(z, at)))


@njit(**vec.OPTIONS)
def find_cut(z, vocab, amounts, count, share, candidates, histogram):
    """The (depth, id) of the last rank that is kept: where the running sum reaches `count`, or if 0, a share of all.

    amounts: float32 [vocab], in units of 2^-39. candidates: int32 [vocab]. histogram: int64 [BINS].
    """
    before = np.int64(0)
    shift = 2 * NEXT_BITS
    clear(histogram, BINS)
    for token in range(vocab):
        add_to(histogram, depth_of(z, token) >> shift, amount_of(amounts, token))
    total = np.int64(0)
    for at in range(0, 8 * BINS, 8):
        total += load_i64(histogram, at)
    target = count if count > 0 else max(np.int64(1), np.int64(np.ceil(share * np.float64(total))))
    depth, before = reach(histogram, before, target)
    n = np.int64(0)
    for token in range(vocab):
        store_i32(candidates, 4 * n, token)
        n += depth_of(z, token) >> shift == depth
    while shift > 0:
        shift -= NEXT_BITS
        clear(histogram, 1 << NEXT_BITS)
        for i in range(n):
            token = load_i32(candidates, 4 * i)
            add_to(histogram, depth_of(z, token) >> shift & ((1 << NEXT_BITS) - 1), amount_of(amounts, token))
        digit, before = reach(histogram, before, target)
        depth = depth << NEXT_BITS | digit
        kept = np.int64(0)
        for i in range(n):
            token = load_i32(candidates, 4 * i)
            store_i32(candidates, 4 * kept, token)
            kept += depth_of(z, token) >> shift == depth
        n = kept
    i = np.int64(0)  # what is left has one depth, in ascending order of ids
    token = load_i32(candidates, 0)
    before += amount_of(amounts, token)
    while before < target:
        i += 1
        token = load_i32(candidates, 4 * i)
        before += amount_of(amounts, token)
    return depth, token


@njit(**vec.OPTIONS)
def drop_after(z, vocab, depth, token):
    """Tokens of ranks after a cut get z = -inf, so no probability."""
    cut, last, ids = vec.splat_i32x16(depth), vec.splat_i32x16(token), lane_numbers()
    lowest = vec.splat_f32x16(LOWEST)
    for at in range(0, 4 * vocab, 64):
        v = vec.load_f32x16(z, at)
        own = vec.and_(vec.as_ints(v), 0x7FFFFFFF)
        of_cut = where_greater(ids, last, lowest, v)
        vec.store(z, at, where_greater(cut, own, v, where_greater(own, cut, lowest, of_cut)))
        ids = vec.add(ids, vec.splat_i32x16(16))


# ---- The draw -------------------------------------------------------------------------------------------------------


@njit(**vec.OPTIONS)
def draw(z, vocab, min_z, position, key0, key1, scratch):
    """The token with the largest z + noise, of those with z >= min_z."""
    best, best_ids = vec.splat_f32x16(LOWEST), vec.zero_i32x16()
    lowest, least = vec.splat_f32x16(LOWEST), vec.splat_f32x16(min_z)
    fourths = vec.shl(lane_numbers(), 2)
    limit = np.float32(LOWEST)
    for first in range(0, vocab, GROUP):
        at = 4 * first
        z0, z1 = load_every_fourth(z, at, 0), load_every_fourth(z, at, 1)
        z2, z3 = load_every_fourth(z, at, 2), load_every_fourth(z, at, 3)
        fours = (z0, z1, z2, z3)
        most = vec.max_lanes(vec.maximum(vec.maximum(z0, z1), vec.maximum(z2, z3)))
        if most == np.float32(LOWEST) or most + np.float32(LARGEST_NOISE) < limit or most < np.float32(min_z):
            continue
        words = random_words(vec.add(lane_numbers(), vec.splat_i32x16(first // 4)), position, key0, key1)
        ids = vec.add(fourths, vec.splat_i32x16(first))
        for word in range(4):
            score = where_greater(least, fours[word], lowest, vec.add(fours[word], gumbel(words[word])))
            best_ids = where_greater(score, best, ids, best_ids)
            best = vec.maximum(score, best)
            ids = vec.add(ids, vec.splat_i32x16(1))
        limit = vec.max_lanes(best)
    _, token = best_of_lanes(best, best_ids, scratch)
    return token


@njit(**vec.OPTIONS)
def sample(logits, vocab, history, history_length, settings, edits, num_edits, scratch):
    """The next token, int64; NO_TOKEN if logits hold NaN or the largest is infinite.

    logits: float32 [vocab]. history: int64 [history_length], all tokens so far, including the prompt. settings: see
    `pack_settings`. edits: float64 [num_edits, 3], see `pack_edits`; the logits are as before in the end. scratch:
    scratch_bytes(vocab). All but the sizes are addresses.
    """
    edit_logits(logits, edits, num_edits)
    token = choose(logits, vocab, history, history_length, settings, scratch)
    restore_logits(logits, edits, num_edits)
    return token


@njit(**vec.OPTIONS)
def choose(logits, vocab, history, history_length, settings, scratch):
    """`sample` of edited logits."""
    z, amounts = scratch, scratch + 4 * padded(vocab)
    candidates = amounts + 4 * padded(vocab)
    histogram = candidates + 4 * padded(vocab)
    if not copy_logits(logits, vocab, z):
        return np.int64(NO_TOKEN)
    penalty = load_f64(settings, 8 * PENALTY)
    if penalty != 1.0:
        penalize(logits, vocab, history, history_length, penalty, z)
    most, token = largest(z, vocab, histogram)
    temperature = load_f64(settings, 8 * TEMPERATURE)
    if np.isinf(most):
        return np.int64(NO_TOKEN)
    if temperature == 0.0:
        return np.int64(token)
    scale(z, vocab, most, temperature)
    top_k, top_p = np.int64(load_f64(settings, 8 * TOP_K)), load_f64(settings, 8 * TOP_P)
    for counting in (True, False):  # top-k, then top-p; one call of each function compiles faster than two
        if 0 < top_k < vocab if counting else top_p < 1.0:
            fill_amounts(z, vocab, counting, amounts)
            count = top_k if counting else np.int64(0)
            depth, token = find_cut(z, vocab, amounts, count, top_p, candidates, histogram)
            drop_after(z, vocab, depth, token)
    key0, key1 = np.int64(load_f64(settings, 8 * SEED_LOW)), np.int64(load_f64(settings, 8 * SEED_HIGH))
    return np.int64(draw(z, vocab, load_f64(settings, 8 * MIN_Z), history_length, key0, key1, histogram))
