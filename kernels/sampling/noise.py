"""Noise for one block's row of logits: the token whose z plus Gumbel noise is largest.

Noise costs two logarithms, so tokens that cannot win are given none. The likeliest token is always kept, and then the
best of the first tokens is known: a token wins against that only if its uniform number u is above exp(-exp(z - bound)),
and hence 1 - u below exp(z - bound), which an approximate power of two tells.
"""

from collections.abc import Callable

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.sampling import parts, window
from bitnet_numba.kernels.sampling.parts import ID_BITS, LOWEST

MAX_NOISE = float32(16.7)  # no noise is larger
# The likeliest token's noise is above -2.82: a z under this cannot win.
MIN_WINNING_Z = float32(-19.5)
Z_MARGIN = float32(2.0**-12)  # more than what is only nearly z is off by, above MIN_WINNING_Z
REACH_MARGIN = float32(0.02)  # more than rounding takes from a token's reach, as the exponent of 2
NEAR = float32(2.0 - 2.0**-21)  # 2 less what rounding takes from `nearness`


@device_function
def nearness(x, word, largest, log2_scale, offset):
    """Above NEAR if a token may win: 1 + u + 2^((x - largest) * log2_scale + offset), of u without its half."""
    one_and_u = ptx.bits_to_float(uint32(uint32(word >> uint32(9)) | uint32(0x3F800000)))
    return one_and_u + ptx.exp2_approx((x - largest) * log2_scale + offset)


@device_function
def draw_of(request):
    """(the new token's position, the halves of the seed) of a row's request. Loaded where they are needed: registers
    are short before."""
    settings, setting, slot_positions, row = request
    key0, key1 = uint32(settings[setting + parts.SEED_LOW]), uint32(settings[setting + parts.SEED_HIGH])
    return slot_positions[2 * row + 1] + 1, key0, key1


@device_function
def lowest_winning_z(request):
    """No token below this z is chosen."""
    return max(float32(request[0][request[1] + parts.MIN_Z]), MIN_WINNING_Z)


def make_noise(threads: int) -> tuple[Callable, Callable]:
    """The device functions `best_of_candidates` and `best_of_tokens` for a block of so many threads; both return the
    thread's best key after noise."""

    @device_function
    def best_of_candidates(candidates, num_candidates, request, cut, tid):
        """Of listed tokens, from the cut on."""
        z_s, id_s = candidates
        position, key0, key1 = draw_of(request)
        min_z = lowest_winning_z(request)
        best = int64(0)
        i = tid
        while i < num_candidates:
            if z_s[i] >= min_z and parts.key_of(z_s[i], id_s[i]) >= cut:
                c0, c1, c2, c3 = parts.random_words(id_s[i] >> 2, position, key0, key1)
                x = ptx.add_rn(z_s[i], parts.gumbel(parts.chosen_word(c0, c1, c2, c3, id_s[i] & 3)))
                best = max(best, parts.key_of(x, id_s[i]))
            i = int32(i + threads)
        return best

    @device_function
    def noise_of_tokens(loads, source, scale, bound, cut, min_z, draw, first, end):
        """Of tokens that may reach `bound`: of every `threads`-th four of the tokens 4 first .. 4 end - 1."""
        logits, seen, x_rd, seen_rd, vocab_size, has_penalty, penalty = source
        x_r, _ = loads
        largest, inverse, temperature = scale
        position, key0, key1 = draw
        log2_scale = inverse * window.LOG2_E
        offset = REACH_MARGIN - bound * window.LOG2_E
        least_z = max(bound - MAX_NOISE, min_z - Z_MARGIN)
        best = int64(0)
        quad = int32(first)
        while quad < end:
            ptx.no_unroll()
            for j in range(4):
                token = int32(quad * 4 + j)
                x_r[j] = logits[x_rd + token] if token < vocab_size else LOWEST
            if has_penalty:
                word = seen[seen_rd + (quad >> 3)]
                for j in range(4):
                    x_r[j] = parts.penalized(x_r[j], word, int32(quad * 4 + j), penalty)
            top = max(max(x_r[0], x_r[1]), max(x_r[2], x_r[3]))
            if (top - largest) * inverse > least_z:
                c0, c1, c2, c3 = parts.random_words(quad, position, key0, key1)
                near = float32(0)
                for j in range(4):
                    near = max(
                        near, nearness(x_r[j], parts.chosen_word(c0, c1, c2, c3, j), largest, log2_scale, offset)
                    )
                if near > NEAR:
                    for j in range(4):
                        token = int32(quad * 4 + j)
                        bits = parts.chosen_word(c0, c1, c2, c3, j)
                        if token < vocab_size and nearness(x_r[j], bits, largest, log2_scale, offset) > NEAR:
                            z = parts.shifted(x_r[j], largest, temperature)
                            if z >= min_z and parts.key_of(z, token) >= cut:
                                best = max(best, parts.key_of(ptx.add_rn(z, parts.gumbel(bits)), token))
            quad = int32(quad + threads)
        return best

    @device_function
    def best_of_tokens(loads, source, scale, request, likeliest, cut, lowest_z, keys_s, tid):
        """Of all tokens, from the cut and from lowest_z on. likeliest: the token whose z is 0."""
        position, key0, key1 = draw_of(request)
        min_z = max(lowest_winning_z(request), lowest_z)
        quads = int32((source[4] + 3) >> 2)
        c0, c1, c2, c3 = parts.random_words(likeliest >> 2, position, key0, key1)
        bound = parts.gumbel(parts.chosen_word(c0, c1, c2, c3, likeliest & 3))
        first_quads = min(int32(threads), quads)
        draw = position, key0, key1
        best = noise_of_tokens(loads, source, scale, bound, cut, min_z, draw, tid, first_quads)
        cuda.syncthreads()  # everyone has read what keys_s held
        best = parts.block_best(best, keys_s, int32(tid // WARP), int32(tid % WARP), threads // WARP)
        if best > 0:
            bound = max(bound, parts.unordered(uint32(best >> ID_BITS)))
        rest = noise_of_tokens(loads, source, scale, bound, cut, min_z, draw, tid + threads, quads)
        cuda.syncthreads()  # everyone has read the best so far
        return max(best, rest)

    return best_of_candidates, best_of_tokens
