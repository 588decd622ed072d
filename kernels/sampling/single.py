"""Choosing the next token on the device: the whole of `bitnet_numba.sampling` over logits float32 [V], in one launch.

A token never visits the host to be chosen: the launch also stores it where the next step's embedding look-up reads
it, moves the position on, and writes it to a ring in page-locked memory that the host reads at leisure.

    grid: up to 64 blocks, all resident at once; block b owns V / grid neighbouring tokens in shared memory
    1. every block: repetition penalty; largest logit, lowest id first  -> one 64-bit atomic maximum
       temperature 0: the last block to arrive stores the token. That is all: 513 KB read for V = 128256.
    2. (grid barrier) z = (logit - max) / temperature
    3. top-k, then top-p: the cut is found by radix select, 10 bits a pass, over the keys of `sampler_parts`. A pass
       adds up a histogram of the tokens that share the bits found so far (of how many there are for top-k, of their
       probabilities for top-p), meets the other blocks at a barrier, and looks where the target is reached.
    4. largest z + Gumbel noise of the tokens at or above the cut and min-p's least z; the last block stores it

Measured (H200, V = 128256, us a launch in a graph, none overlapping): greedy 5.7, with a penalty 7.7, temperature alone
10.7, top-k 16.5, top-p 27.6, everything 35.3. The histogram is two arrays of int32, which shared memory adds to by
itself: with one of int64, added to in loops of compare-and-swap, top-k took 50.7 and everything 68.4. A launch for each
pass instead of barriers would cost greedy steps about 1 us for each pass that they do not need.
"""

from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, PinnedArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling.parts import (
    BINS,
    DIGIT_BITS,
    FIRST_SHIFT,
    ID_BITS,
    LEAST_Z,
    MAX_VOCAB,
    NAN_TOKEN,
    PENALTY,
    SEED_HIGH,
    SEED_LOW,
    SETTINGS,
    TEMPERATURE,
    TINY,
    TOP_K,
    TOP_P,
    block_best,
    chosen_word,
    gumbel,
    key_of,
    penalized,
    probability,
    random_words,
    running_sums,
    shifted,
    token_of,
    unordered,
    wanted_sum,
)
from bitnet_numba.kernels.sampling.parts import settings as settings  # for callers

THREADS = 256  # two blocks fit a SM of any architecture; four bins of a histogram each
MAX_BLOCKS = 64
SLICE = 4096  # tokens of a block: 16 KB of shared memory
HISTOGRAMS = 3  # in turn: one is added to, one was just read, one is being cleared
NAN_KEY = 1 << (32 + ID_BITS)  # above every key
LIMB_BITS = 20  # a block's 4096 tokens of one limb, 20 or 19 bits, fit 32

# Scratch, int64 words, and counters, int32. Zeroed once; every launch leaves zeros.
BEST, CHOSEN, HISTOGRAM = 0, 1, 2
SCRATCH_WORDS = HISTOGRAM + HISTOGRAMS * BINS
ARRIVED, LEFT = 0, 1
COUNTERS = 2


@device_function
def _grid_barrier(counters, arrivals, tid):
    """All threads of all blocks arrive before any goes on; all that was written before is visible."""
    cuda.syncthreads()
    if tid == 0:
        ptx.atomic_add_release(counters, ARRIVED, uint32(1))
        while ptx.load_acquire(counters, ARRIVED) < uint32(arrivals):
            pass
    cuda.syncthreads()


def make_sampler(arch: int, threads: int = THREADS, slice_size: int = SLICE) -> Callable[..., None]:
    """The kernel; the launch's grid may be any number of blocks that are all resident and own every token."""
    wait = ptx.pdl_wait(arch)
    WARPS, BINS_EACH, BIN_LIMBS = threads // WARP, BINS // threads, 2 * BINS
    LIMB = (1 << LIMB_BITS) - 1
    LOWEST = float32(-np.inf)

    def sample(logits, vocab, setting, position, tokens, seen, scratch, counters, ring, ring_size):
        z_s = ptx.pointer(cuda.shared.array(slice_size, float32))
        bins_s = cuda.shared.array(BIN_LIMBS, int32)  # [2, BINS]: low limbs, high limbs
        bins_r = cuda.local.array(BINS_EACH, int64)  # the grid's sums in this thread's digits
        keys_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        sums_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        found_s = ptx.pointer(
            cuda.shared.array(3, int64)
        )  # the digit, what ranks above it, whether all of it is wanted
        last_s = ptx.pointer(cuda.shared.array(1, int32))
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        block, grid = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        size = int32((vocab + 4 * grid - 1) // (4 * grid) * 4)  # a block's tokens: whole groups of four random words
        start = int32(block * size)
        count = max(int32(0), min(size, int32(vocab - start)))
        temperature = max(float32(setting[TEMPERATURE]), TINY)
        greedy = setting[TEMPERATURE] == 0.0
        penalty = float32(setting[PENALTY])
        wait()
        pos = int32(position[0])
        barriers = int32(0)

        # 1. Penalty, and the largest logit.
        top, top_id, broken = LOWEST, int32(vocab), int32(0)
        for i in range(tid, count, threads):
            token = int32(start + i)
            word = seen[token >> 5] if penalty != float32(1) else int32(0)
            x = penalized(logits[token], word, token, penalty)
            z_s[i] = x
            if x != x:
                broken = int32(1)
            if x > top or top_id == vocab:
                top, top_id = x, token
        broken = cuda.syncthreads_or(broken)
        best_slot = BEST
        turn = int32(0)  # 0: the largest logit; 1: the largest of logit plus noise
        while True:
            key = block_best(key_of(top, top_id) if top_id < vocab else int64(0), keys_s, warp, lane, WARPS)
            if tid == 0:
                ptx.atomic_max_wide(scratch, best_slot, int64(NAN_KEY) if broken else key)
            if greedy or turn == 1:
                break
            barriers = int32(barriers + grid)
            _grid_barrier(counters, barriers, tid)
            best = scratch[BEST]
            if best == int64(NAN_KEY):
                break
            # 2. Shift and temperature.
            largest = unordered(uint32(best >> ID_BITS))
            for i in range(tid, count, threads):
                z_s[i] = shifted(z_s[i], largest, temperature)
            cuda.syncthreads()

            # 3. The cuts of top-k (stage 0) and top-p (stage 1).
            passes = int32(0)
            cut = int64(0)
            for stage in range(2):
                target = int64(setting[TOP_K])
                if stage == 0:
                    wanted = target > 0 and target < vocab
                else:
                    wanted = setting[TOP_P] < 1.0
                    target = int64(0)
                prefix, shift = int64(0), int32(32 + ID_BITS)
                whole = False
                while wanted and shift > 0 and not whole:
                    shift = int32(shift - DIGIT_BITS)
                    now = HISTOGRAM + passes % HISTOGRAMS * BINS
                    after = HISTOGRAM + (passes + 1) % HISTOGRAMS * BINS
                    for i in range(tid, BIN_LIMBS, threads):
                        bins_s[i] = int32(0)
                    for i in range(block * threads + tid, BINS, grid * threads):
                        scratch[after + i] = int64(0)
                    cuda.syncthreads()
                    for i in range(tid, count, threads):
                        ptx.no_unroll()
                        key = key_of(z_s[i], start + i)
                        if key >= cut and key >> (shift + DIGIT_BITS) == prefix:
                            digit = (key >> shift) & (BINS - 1)
                            if stage == 0:
                                cuda.atomic.add(bins_s, digit, int32(1))
                            else:
                                share = probability(z_s[i])
                                cuda.atomic.add(bins_s, digit, int32(share & LIMB))
                                if share > LIMB:
                                    cuda.atomic.add(bins_s, digit + BINS, int32(share >> LIMB_BITS))
                    cuda.syncthreads()
                    for i in range(tid, BINS, threads):
                        share = int64(uint32(bins_s[i])) + (int64(uint32(bins_s[i + BINS])) << LIMB_BITS)
                        if share != 0:
                            ptx.atomic_add_wide(scratch, now + i, share)
                    barriers = int32(barriers + grid)
                    _grid_barrier(counters, barriers, tid)
                    # Running sums from the highest digit down: thread t has BINS - 1 - BINS_EACH * t and those below.
                    own = int64(0)
                    for j in range(BINS_EACH):
                        digit = BINS - 1 - BINS_EACH * tid - j
                        bins_r[j] = scratch[now + digit]
                        own += bins_r[j]
                    running, total = running_sums(own, sums_s, warp, lane, WARPS)
                    if stage == 1 and shift == FIRST_SHIFT:
                        target = wanted_sum(setting[TOP_P], total)
                    for j in range(BINS_EACH):
                        digit = BINS - 1 - BINS_EACH * tid - j
                        if running < target and target <= running + bins_r[j]:
                            found_s[0], found_s[1] = digit, running
                            found_s[2] = int64(target == running + bins_r[j])
                        running += bins_r[j]
                    cuda.syncthreads()
                    prefix = (prefix << DIGIT_BITS) | found_s[0]
                    target -= found_s[1]
                    whole = found_s[2] != 0
                    passes = int32(passes + 1)
                if wanted:
                    cut = prefix << shift
            least = float32(setting[LEAST_Z])

            # 4. Noise.
            turn = int32(1)
            best_slot = CHOSEN
            top, top_id = LOWEST, int32(vocab)
            for quad in range(tid, (count + 3) // 4, threads):
                kept = int32(0)
                for j in range(4):
                    i = int32(quad * 4 + j)
                    if i < count:
                        if z_s[i] >= least and key_of(z_s[i], start + i) >= cut:
                            kept = int32(kept | 1 << j)
                if kept:
                    c0, c1, c2, c3 = random_words(
                        (start >> 2) + quad, pos + 1, uint32(setting[SEED_LOW]), uint32(setting[SEED_HIGH])
                    )
                    for j in range(4):
                        if kept >> j & 1:
                            x = ptx.add_rn(z_s[quad * 4 + j], gumbel(chosen_word(c0, c1, c2, c3, j)))
                            if x > top or top_id == vocab:
                                top, top_id = x, int32(start + quad * 4 + j)
            cuda.syncthreads()

        # The last block to leave stores the token and clears the scratch.
        if tid == 0:
            ptx.threadfence()
            last_s[0] = int32(ptx.atomic_fetch_add(counters, LEFT, uint32(1))) == grid - 1
            ptx.threadfence()
        cuda.syncthreads()
        if not last_s[0]:
            return
        if tid == 0:
            best = scratch[BEST]
            token = int64(NAN_TOKEN)
            if best != int64(NAN_KEY):
                if not greedy:
                    best = scratch[CHOSEN]
                token = token_of(best)
            tokens[pos + 1] = int32(max(token, int64(0)))
            position[0] = int32(pos + 1)
            ring[(pos + 1) % ring_size] = int64(int64(pos + 1) << 32) | (token & 0xFFFFFFFF)
            cuda.threadfence_system()
            scratch[BEST] = int64(0)
            scratch[CHOSEN] = int64(0)
            counters[ARRIVED] = int32(0)
            counters[LEFT] = int32(0)
        if not greedy:
            for i in range(tid, HISTOGRAMS * BINS, threads):
                scratch[HISTOGRAM + i] = int64(0)

    return sample


_P = types.CPointer
SIGNATURE = (
    *(_P(types.float32), types.int32, _P(types.float64), _P(types.int32), _P(types.int32)),  # logits .. tokens
    *(_P(types.int32), _P(types.int64), _P(types.int32), _P(types.int64), types.int32),  # seen .. ring_size
)


def sampler_spec(arch: int, threads: int = THREADS, slice_size: int = SLICE) -> KernelSpec:
    """The compiled form; the arguments only for tests."""
    return KernelSpec(
        f"sampler[{threads}, {slice_size}]", make_sampler(arch, threads, slice_size), SIGNATURE, threads, 2
    )


def sampler_grid(num_sms: int, vocab: int) -> int:
    """Blocks of a launch: all can be resident at once (two a SM fit everywhere) and own every token.

    Raises ValueError if the vocabulary is too large.
    """
    blocks = min(MAX_BLOCKS, 2 * num_sms)
    if not 1 <= vocab <= min(MAX_VOCAB, blocks * SLICE):
        raise ValueError(f"the sampler takes 1 to {min(MAX_VOCAB, blocks * SLICE)} tokens, not {vocab}")
    return blocks


def sampler(
    device: Device,
    logits: DeviceArray,
    vocab: int,
    setting: DeviceArray,
    position: DeviceArray,
    tokens: DeviceArray,
    seen: DeviceArray,
    scratch: DeviceArray,
    counters: DeviceArray,
    ring: DeviceArray | PinnedArray,
    use_pdl: bool = True,
) -> Launch:
    """The launch that chooses the token after position[0].

    logits float32 [vocab]; setting float64 [SETTINGS], see `settings`; position int32 [1], moved on by one; tokens
    int32 [capacity + 1], the choice goes to tokens[position + 1]; seen int32 [ceil(vocab / 32)], a bit for each token
    of the history; scratch int64 [SCRATCH_WORDS] and counters int32 [COUNTERS], zeroed once; ring int64: entry p % size
    becomes p << 32 | token for the new position p, the token NAN_TOKEN (as 32 bits) if logits hold NaN.
    Raises ValueError with the sizes if they do not fit together.
    """
    grid = sampler_grid(device.num_sms, vocab)
    sizes: dict[str, tuple[DeviceArray | PinnedArray, int]] = {
        "logits": (logits, vocab),
        "settings": (setting, SETTINGS),
        "seen": (seen, -(-vocab // 32)),
        "scratch": (scratch, SCRATCH_WORDS),
        "counters": (counters, COUNTERS),
        "ring": (ring, 1),
    }
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"sampler: {name} holds {array.size} elements, {size} are needed")
    arguments = (logits, vocab, setting, position, tokens, seen, scratch, counters, ring, ring.size)
    return device.launch(sampler_spec(device.arch), grid, arguments, use_pdl)
