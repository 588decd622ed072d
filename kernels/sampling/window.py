"""Top-p for one block's row of logits, without a list of all that is kept: the cut is looked for in a window of z.

    1. mass      M, the sum of exp(z), nearly: each thread adds up its tokens as it looks for the largest
    2. masses    a histogram of exp(z) over MASS_BINS bins of z, nearly, from 0 down to where the tokens below cannot
                 sum up to 1 - top_p; the bin in which the running sum passes top_p of M is about where the cut is
    3. window    that bin and its neighbours: its tokens are listed, and the exact sums (see `parts`) of all tokens and
                 of those above it tell whether the cut is in it; then radix select finds it among those listed

Steps 1 and 2 are off by less than `below_cut` leaves: MASS_ERROR for sums and exponentials, half a unit of 2^-MASS_BITS
for each token's rounding. So they tell of most tokens whether they are above the cut, and where the token with the best
noise is one of these, it is chosen without step 3: only about one row in 2,000 needs it, where logits are flat.

Step 3 decides exactly. Where it fails (the list overflows, since many z are nearly equal, or M is out of range), the
caller has to look among all tokens.

Flat logits are what this is for: of 128,256 normal ones top-p keeps half, but 3 of 1024 bins hold a few hundred.
"""

import math
from collections.abc import Callable

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64
from bitnet_numba.kernels.sampling import parts
from bitnet_numba.kernels.sampling.parts import BINS, LOWEST

LOG2_E = float32(1 / math.log(2))
MASS_BITS = 30  # the row's whole mass, in the histogram's units, is 2^30
MASS_UNIT = 2.0**30  # of a thread's share of M, as an integer
MAX_MASS = float32(2.0**19)  # M of the largest vocabulary is 2^18 at most; what is not below this (or NaN) is no mass
MASS_BINS = 3 * BINS
# More than a running sum of masses is off by, but for the rounding of each: 2^-13. M's float32 sums of up to 342 tokens
# a thread are within 2^-15, and powers of two, whose exponents are below 127, within 2^-14.
MASS_ERROR = 1 << MASS_BITS - 13
BORDER = float32(0.01)  # of a bin: equal z may lie on both sides of the border of what is only nearly z
RANGE_MARGIN = float32(0.01)
ZERO_SHARE = float32(-28.0)  # exp(z) is less than 2^-39 from here on: its share is 0


@device_function
def mass_share(mass, reference, largest, log2_scale):
    """A thread's part of M as an integer. mass: sum of 2^((x - reference) * log2_scale) over its tokens."""
    share = mass * ptx.exp2_approx((reference - largest) * log2_scale) if mass != float32(0) else mass
    return int64(float(share if share < MAX_MASS else MAX_MASS) * MASS_UNIT)


@device_function
def bins_per_z(top_p, mass, vocab_size):
    """Bins per unit of z, so that MASS_BINS of them reach down to the z below which all tokens sum up to less than
    (1 - top_p) mass."""
    lowest = float32(math.log(float32(1.0 - top_p) * mass / float32(vocab_size)))
    return float32(MASS_BINS) / (RANGE_MARGIN - lowest)


@device_function
def mass_offset(mass):
    """What a token's exponent of 2 takes to become its part of the row's mass, in units of 2^-MASS_BITS."""
    return float32(MASS_BITS) - float32(math.log(mass)) * LOG2_E


@device_function
def mass_units(below, log2_scale, offset):
    """A token's part of the row's mass; below: its logit less the largest."""
    return ptx.round_to_int(ptx.exp2_approx(below * log2_scale + offset))


@device_function
def below_cut(top_p, vocab_size):
    """A sum of masses of tokens before one that is kept for sure."""
    return int64(top_p * float(1 << MASS_BITS)) - MASS_ERROR - (vocab_size >> 1)


@device_function
def is_surely_kept(sums_s, below, log2_scale, mass, bins_per_logit, sure):
    """Whether the masses before a token, those of its bin among them, sum up to less than `sure`. sums_s: running sums
    of the bins."""
    place = below * -bins_per_logit + BORDER
    if not place < float32(MASS_BINS):
        return False
    return int64(sums_s[int32(place)]) - int64(mass_units(below, log2_scale, mass_offset(mass))) < sure


def make_window(threads: int, max_candidates: int, loads: int) -> tuple[Callable, Callable, Callable]:
    """The device functions `add_masses`, `find_cut` and `list_window` for a block of so many threads with so many loads
    each in flight."""
    LOADS, BINS_EACH = loads, -(-MASS_BINS // threads)

    @device_function
    def add_masses(bins_s, loads, source, largest, log2_scale, mass, bins_per_logit, tid):
        """Adds exp(z) / mass of each token, in units of 2^-MASS_BITS, to its bin; bin 0 is z = 0."""
        logits, seen, x_rd, seen_rd, vocab_size, has_penalty, penalty = source
        x_r, seen_r = loads
        offset = mass_offset(mass)
        first = tid
        while first < vocab_size:
            ptx.no_unroll()
            for u in range(LOADS):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab_size else LOWEST
                seen_r[u] = seen[seen_rd + (token >> 5)] if has_penalty and token < vocab_size else int32(0)
            for u in range(LOADS):
                token = int32(first + u * threads)
                below = parts.penalized(x_r[u], seen_r[u], token, penalty) - largest
                place = below * -bins_per_logit
                if place < float32(MASS_BINS):
                    cuda.atomic.add(bins_s, int32(place), mass_units(below, log2_scale, offset))
            first = int32(first + threads * LOADS)

    @device_function
    def find_cut(bins_s, found_s, sums_s, top_p, vocab_size, tid):
        """Makes running sums of the histogram. found_s, which holds -1, becomes the bins in which they reach top_p, and
        in which they reach it for sure."""
        own = int64(0)
        for j in range(BINS_EACH):
            if BINS_EACH * tid + j < MASS_BINS:
                own += int64(bins_s[BINS_EACH * tid + j])
        running, _ = parts.running_sums(own, sums_s, int32(tid // WARP), int32(tid % WARP), threads // WARP)
        about = int64(top_p * float(1 << MASS_BITS))
        sure = about + MASS_ERROR + (vocab_size >> 1)
        for j in range(BINS_EACH):
            i = int32(BINS_EACH * tid + j)
            if i < MASS_BINS:
                after = running + int64(bins_s[i])
                if running < about and about <= after:
                    found_s[0] = i
                if running < sure and sure <= after:
                    found_s[1] = i
                running = after
                bins_s[i] = int32(after)

    @device_function
    def list_window(candidates, length_s, loads, source, scale, low, high, tid):
        """Lists the tokens whose z is between low and high, and counts those that do not fit.

        Returns the thread's sums of probabilities: of all tokens, and of those above the window.
        """
        logits, seen, x_rd, seen_rd, vocab_size, has_penalty, penalty = source
        x_r, seen_r = loads
        z_s, id_s = candidates
        largest, inverse, temperature = scale
        total, above = int64(0), int64(0)
        first = tid
        while first < vocab_size:
            ptx.no_unroll()
            for u in range(LOADS):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab_size else LOWEST
                seen_r[u] = seen[seen_rd + (token >> 5)] if has_penalty and token < vocab_size else int32(0)
            for u in range(LOADS):
                token = int32(first + u * threads)
                x = parts.penalized(x_r[u], seen_r[u], token, penalty)
                if (x - largest) * inverse > ZERO_SHARE:
                    z = parts.shifted(x, largest, temperature)
                    share = parts.probability(z)
                    total += share
                    if z > high:
                        above += share
                    elif z >= low:
                        wr = cuda.atomic.add(length_s, 0, int32(1))
                        if wr < max_candidates:
                            z_s[wr], id_s[wr] = z, token
            first = int32(first + threads * LOADS)
        return total, above

    return add_masses, find_cut, list_window
