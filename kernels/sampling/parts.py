"""What both samplers (`single` and `batched`) are made of: settings, keys, cuts, random numbers.

Tokens are ranked by falling z = (logit - max) / temperature, equal ones by rising id, as `bitnet_numba.sampling` does:

                  49              18 17              0
            key: | z as an integer  | 2^18 - 1 - id  |     larger key = earlier rank; no two are equal

Top-k and top-p each keep the tokens from the highest key down to a cut. It is found by radix select, DIGIT_BITS of the
key a pass, from the top: a pass adds up a histogram over the next digit of those keys that share the digits found so
far (of how many there are for top-k, of their probabilities for top-p); the digit in which the running sum from above
reaches the target is the cut's.

Probabilities are added as integers, exp(z) in units of 2^-39: exact, so the same in any order and however the work is
split. Shared memory adds 32 bits at a time, so a probability's 40 bits are cut into limbs, the lowest bits first, with
a histogram each; the sum of a bin's limbs, each shifted to its place, is the bin's. All else is float32 in the
definition's own order of operations; only exp and log may differ from NumPy's in the last bit. So both samplers choose
the same token.
"""

import math

import numpy as np
from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, int64, uint32
from bitnet_numba.sampling import MAX_TEMPERATURE, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, SamplingParams

ID_BITS = 18
MAX_VOCAB = 1 << ID_BITS
DIGIT_BITS = 10
BINS = 1 << DIGIT_BITS
FIRST_SHIFT = 32 + ID_BITS - DIGIT_BITS
PROBABILITY_UNIT = float32(2.0**39)  # that is 1: the sum of 2^18 tokens fits 63 bits
NAN_TOKEN = -1  # in place of a token when a logit is NaN or the largest is infinite
MIN_TEMPERATURE = float32(np.finfo(np.float32).tiny)
LOWEST = float32(-np.inf)
LARGEST = float32(np.finfo(np.float32).max)
WEYL_0, WEYL_1 = PHILOX_WEYL

# Settings, float64: read from device memory, so that one captured graph serves every request.
TEMPERATURE, TOP_P, PENALTY, MIN_Z, TOP_K, SEED_LOW, SEED_HIGH = range(7)
SETTINGS = 7


def pack_settings(params: SamplingParams) -> np.ndarray:
    """Sampling parameters as the kernels read them, float64 [SETTINGS]. The seed is set unless temperature is 0."""
    seed = params.seed or 0
    min_z = math.log(params.min_p) if params.min_p > 0 else -math.inf
    temperature, top_k = min(params.temperature, MAX_TEMPERATURE), min(params.top_k, MAX_VOCAB)
    values = (temperature, params.top_p, params.repetition_penalty, min_z, top_k)
    return np.array([*values, seed & 0xFFFFFFFF, seed >> 32], np.float64)


# ---- Logits -> z ----------------------------------------------------------------------------------------------------


@device_function
def penalized(x, word, token, penalty):
    """A logit after the repetition penalty; word: the one of `seen` with the token's bit, or 0 without a penalty."""
    if uint32(word) >> uint32(token & 31) & uint32(1):
        x = ptx.div_rn(x, penalty) if x > float32(0) else ptx.mul_rn(x, penalty)
    return x


@device_function
def shifted(x, largest, temperature):
    """z of a logit."""
    return ptx.add_rn(ptx.div_rn(ptx.add_rn(x, -largest), temperature), float32(0))


# ---- Keys -----------------------------------------------------------------------------------------------------------


@device_function
def ordered(x):
    """A float as an unsigned integer that orders as floats do (NaN aside); -0 becomes 0."""
    bits = ptx.float_to_bits(ptx.add_rn(x, float32(0)))
    return uint32(bits ^ uint32(0xFFFFFFFF)) if bits & uint32(0x80000000) else uint32(bits | uint32(0x80000000))


@device_function
def unordered(word):
    """The float of which `ordered` made a word."""
    flip = uint32(0x80000000) if word & uint32(0x80000000) else uint32(0xFFFFFFFF)
    return ptx.bits_to_float(uint32(word ^ flip))


@device_function
def key_of(x, token):
    """Larger for larger x, and for lower tokens of equal x; above 0."""
    return int64(int64(ordered(x)) << ID_BITS) | int64(MAX_VOCAB - 1 - token)


@device_function
def token_of(key):
    """The token of a key."""
    return MAX_VOCAB - 1 - (key & (MAX_VOCAB - 1))


@device_function
def is_finite(key):
    """Whether the float of a key is above -infinity."""
    return key >> ID_BITS > int64(ordered(LOWEST))


@device_function
def best_of_warps(keys_s, lane, warps):
    """What `block_best` returned, from what it left in shared memory."""
    key = keys_s[lane] if lane < warps else int64(0)
    for step in range(5):
        key = max(key, ptx.shuffle_xor(key, 1 << step))
    return key


@device_function
def block_best(key, keys_s, warp, lane, warps):
    """The largest key of a block's threads, in every thread. keys_s: shared int64 [warps]."""
    for step in range(5):
        key = max(key, ptx.shuffle_xor(key, 1 << step))
    if lane == 0:
        keys_s[warp] = key
    cuda.syncthreads()
    return best_of_warps(keys_s, lane, warps)


# ---- Cuts -----------------------------------------------------------------------------------------------------------


@device_function
def probability(z):
    """exp(z) in units of 2^-39."""
    return int64(float32(math.exp(z)) * PROBABILITY_UNIT)


@device_function
def running_sums(own, sums_s, warp, lane, warps):
    """(sum over the threads before this one, sum over all) of int64 `own`. sums_s: shared int64 [warps]."""
    running = own
    for step in range(5):
        below = ptx.shuffle(running, max(int32(lane - (1 << step)), int32(0)))
        if lane >= 1 << step:
            running += below
    if lane == 31:
        sums_s[warp] = running
    cuda.syncthreads()
    before, total = int64(0), int64(0)
    for i in range(warps):
        if i < warp:
            before += sums_s[i]
        total += sums_s[i]
    return before + running - own, total


@device_function
def top_p_target(top_p, total):
    """The running sum at which top-p cuts."""
    return max(int64(1), int64(math.ceil(top_p * float(total))))


# ---- Noise ----------------------------------------------------------------------------------------------------------


@device_function
def philox_round(c0, c1, c2, c3, key0, key1):
    high0, low0 = ptx.mul_hi(c0, uint32(PHILOX_MULTIPLIERS[0])), ptx.mul_lo(c0, uint32(PHILOX_MULTIPLIERS[0]))
    high1, low1 = ptx.mul_hi(c2, uint32(PHILOX_MULTIPLIERS[1])), ptx.mul_lo(c2, uint32(PHILOX_MULTIPLIERS[1]))
    return uint32(uint32(high1 ^ c1) ^ key0), low1, uint32(uint32(high0 ^ c3) ^ key1), low0


@device_function
def random_words(quad, position, key0, key1):
    """Philox4x32-10: four random words, of tokens 4 quad .. 4 quad + 3 at a position, from the seed's two halves."""
    c0, c1, c2, c3 = uint32(quad), uint32(position), uint32(0), uint32(0)
    for _ in range(PHILOX_ROUNDS):
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, key0, key1)
        key0, key1 = uint32(key0 + uint32(WEYL_0)), uint32(key1 + uint32(WEYL_1))
    return c0, c1, c2, c3


@device_function
def chosen_word(c0, c1, c2, c3, j):
    """Word j of four."""
    return c0 if j == 0 else c1 if j == 1 else c2 if j == 2 else c3


@device_function
def gumbel(word):
    """-log(-log(u)) with u of 23 random bits, as in `sampling.gumbel_noise`."""
    u = ptx.mul_rn(ptx.add_rn(ptx.int_to_float(int32(word >> uint32(9))), float32(0.5)), float32(2.0**-23))
    return -float32(math.log(-float32(math.log(u))))
