"""Top-p for one block's row of logits, without a list of all that is kept: the cut is looked for in a window of z.

    1. mass      M, the sum of exp(z), nearly: each thread adds up its tokens as it looks for the largest
    2. masses    a histogram of exp(z) over BINS bins of z, nearly, from 0 down to where the tokens below cannot sum up
                 to 1 - top_p; the bin in which the running sum passes top_p of M is about where the cut is
    3. window    that bin and its neighbours: its tokens are listed, and the exact sums (see `parts`) of all tokens and
                 of those above it tell whether the cut is in it; then radix select finds it among those listed

Only step 3 decides, so the first two may round as they like. Where it fails (the list overflows, since many z are
nearly equal, or M is out of range), the caller has to look among all tokens.

Flat logits are what this is for: of 128,256 normal ones top-p keeps half, but 3 of 1024 bins hold a few hundred.
"""

import math
from collections.abc import Callable

from numba import cuda

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, int64
from bitnet_numba.kernels.sampling import parts
from bitnet_numba.kernels.sampling.parts import BINS, LOWEST

LOG2_E = float32(1 / math.log(2))
MASS_BITS = 30  # the row's whole mass, in the histogram's units, is 2^30
MASS_UNIT = 2.0**30  # of a thread's share of M, as an integer
MAX_MASS = float32(2.0**19)  # M of the largest vocabulary is 2^18 at most; what is not below this (or NaN) is no mass
RANGE_MARGIN = float32(0.01)
ZERO_SHARE = float32(-28.0)  # exp(z) is less than 2^-39 from here on: its share is 0


@device_function
def mass_share(mass, reference, largest, log2_scale):
    """A thread's part of M as an integer. mass: sum of 2^((x - reference) * log2_scale) over its tokens."""
    share = mass * ptx.exp2_approx((reference - largest) * log2_scale)
    return int64(float(share if share < MAX_MASS else MAX_MASS) * MASS_UNIT)


@device_function
def bins_per_z(top_p, mass, vocab_size):
    """Bins per unit of z, so that BINS of them reach down to the z below which all tokens sum up to less than
    (1 - top_p) mass."""
    lowest = float32(math.log(float32(1.0 - top_p) * mass / float32(vocab_size)))
    return float32(BINS) / (RANGE_MARGIN - lowest)


def make_window(threads: int, max_candidates: int, loads: int) -> tuple[Callable, Callable]:
    """The device functions `add_masses` and `list_window` for a block of so many threads with so many loads each in
    flight."""
    LOADS = loads

    @device_function
    def add_masses(bins_s, loads, source, largest, log2_scale, mass, bins_per_logit, tid):
        """Adds exp(z) / mass of each token, in units of 2^-MASS_BITS, to its bin; bin 0 is z = 0."""
        logits, seen, x_rd, seen_rd, vocab_size, has_penalty, penalty = source
        x_r, seen_r = loads
        offset = float32(MASS_BITS) - float32(math.log(mass)) * LOG2_E
        for first in range(tid, vocab_size, threads * LOADS):
            ptx.no_unroll()
            for u in range(LOADS):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab_size else LOWEST
                seen_r[u] = seen[seen_rd + (token >> 5)] if has_penalty and token < vocab_size else int32(0)
            for u in range(LOADS):
                token = int32(first + u * threads)
                below = parts.penalized(x_r[u], seen_r[u], token, penalty) - largest
                place = below * -bins_per_logit
                if place < float32(BINS):
                    cuda.atomic.add(bins_s, int32(place), int32(ptx.exp2_approx(below * log2_scale + offset)))

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
        for first in range(tid, vocab_size, threads * LOADS):
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
        return total, above

    return add_masses, list_window
