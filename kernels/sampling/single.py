"""Sampling for one sequence: the whole of `bitnet_numba.sampling` over logits float32 [vocab_size], in one launch.

A token never visits the host to be chosen: the launch also stores it where the next step's embedding look-up reads
it, moves the position on, and writes it to a ring in page-locked memory that the host reads at leisure.

    grid: up to 64 blocks, one an SM, so that all are resident at once whatever else an SM holds; block b owns
          vocab_size / grid neighbouring tokens, in shared memory. Cards of fewer SMs than that takes: see `fits`
    1. every block: repetition penalty; largest logit, lowest id first  -> one 64-bit atomic maximum
       temperature 0: the last block to finish stores the token, and that is all
    2. (grid barrier) z = (logit - max) / temperature
    3. top-k, then top-p: radix select over keys (see `parts`). In each pass a block adds its tokens to a histogram in
       shared memory and then to the grid's, meets the others at a grid barrier, and finds the digit for itself.
    4. largest z + Gumbel noise of the tokens at or above the cut and min-p's z; the last block stores it

The grid's histograms take turns: one is added to while the next is cleared; the third may still be read by a block
that has just left the barrier. Barriers instead of a launch for each pass: greedy steps then have no idle launches.

What stays in the kernel's body (penalty, summing bins, finding the digit, storing the token) changes the machine code
as a function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.operands import SequenceArrays, checked
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, PinnedArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling import parts
from bitnet_numba.kernels.sampling.parts import BINS, DIGIT_BITS, ID_BITS, LARGEST, LOWEST, NAN_TOKEN, SETTINGS

THREADS = 256  # four bins of a histogram each
BLOCKS_PER_SM = 2  # that registers allow: one of this launch, and what the launches around it have there
MAX_BLOCKS = 64
BLOCK_TOKENS = 4096  # 16 KB of shared memory
MAX_QUADS = 2  # groups of four neighbouring logits that a thread loads at a time: the share of each of 2B4T's
HISTOGRAMS = 3
NAN_KEY = 1 << (32 + ID_BITS)  # above every key
LIMB_BITS = 20  # two limbs of a probability; 4096 tokens' sum of one fits 32 bits

# Scratch, int64 words, and counters, int32. Zeroed once; every launch leaves zeros.
BEST, CHOSEN, HISTOGRAM = 0, 1, 2
SCRATCH_WORDS = HISTOGRAM + HISTOGRAMS * BINS
ARRIVED, LEFT = 0, 1
COUNTERS = 2


@dataclass(frozen=True)
class SamplerScratch:
    """Where the blocks of a launch meet; zeros between launches. Launches that do not overlap may share one."""

    words: DeviceArray  # int64 [SCRATCH_WORDS]
    counters: DeviceArray  # int32 [COUNTERS]

    @staticmethod
    def allocate(device: Device) -> "SamplerScratch":
        """New zeros. Raises BackendError when memory is short."""
        return SamplerScratch(device.zeros(SCRATCH_WORDS, "int64"), device.zeros(COUNTERS, "int32"))

    @property
    def arrays(self) -> tuple[DeviceArray, ...]:
        """Both."""
        return self.words, self.counters

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(array.nbytes for array in self.arrays)


@device_function
def grid_barrier(counters, arrivals, tid):
    """Until `arrivals` threads 0 have come here in all: no thread of the grid goes on before all have written."""
    cuda.syncthreads()
    if tid == 0:
        ptx.atomic_add_release(counters, ARRIVED, uint32(1))
        while ptx.load_acquire(counters, ARRIVED) < uint32(arrivals):
            pass
    cuda.syncthreads()


def quads_of(arch: int) -> int:
    """Groups of four neighbouring logits that a thread loads at a time; two would spill on sm_80 to sm_89."""
    return 1 if 80 <= arch < 90 else MAX_QUADS


def make_sample(arch: int, threads: int = THREADS, block_tokens: int = BLOCK_TOKENS) -> Callable[..., None]:
    """The kernel; the launch's grid may be any number of blocks that are all resident and own every token."""
    wait = ptx.pdl_wait(arch)
    WARPS, BINS_EACH, LIMB_BINS = threads // WARP, BINS // threads, 2 * BINS
    QUADS = quads_of(arch)
    X_REGS, STRIDE, BATCH = 4 * QUADS, 4 * threads, np.int32(4 * QUADS * threads)
    LIMB = (1 << LIMB_BITS) - 1

    @device_function
    def add_digits(bins_s, z_s, start, num_own, cut, prefix, shift, stage, tid):
        """The block's histogram over the digit at `shift` of keys from the cut on that begin with `prefix`."""
        for i in range(tid, num_own, threads):
            ptx.no_unroll()
            key = parts.key_of(z_s[i], start + i)
            if key >= cut and key >> (shift + DIGIT_BITS) == prefix:
                digit = (key >> shift) & (BINS - 1)
                if stage == 0:
                    cuda.atomic.add(bins_s, digit, int32(1))
                else:
                    share = parts.probability(z_s[i])
                    cuda.atomic.add(bins_s, digit, int32(share & LIMB))
                    if share > LIMB:
                        cuda.atomic.add(bins_s, digit + BINS, int32(share >> LIMB_BITS))

    @device_function
    def add_noise(z_s, start, num_own, cut, min_z, pos, settings, vocab_size, tid):
        """The thread's (largest z + noise of the tokens that are kept, its token)."""
        top, top_id = LOWEST, int32(vocab_size)
        for quad in range(tid, (num_own + 3) // 4, threads):
            kept = int32(0)
            for j in range(4):
                i = int32(quad * 4 + j)
                if i < num_own:
                    if z_s[i] >= min_z and parts.key_of(z_s[i], start + i) >= cut:
                        kept = int32(kept | 1 << j)
            if kept:
                c0, c1, c2, c3 = parts.random_words(
                    (start >> 2) + quad, pos + 1, uint32(settings[parts.SEED_LOW]), uint32(settings[parts.SEED_HIGH])
                )
                for j in range(4):
                    if kept >> j & 1:
                        x = ptx.add_rn(z_s[quad * 4 + j], parts.gumbel(parts.chosen_word(c0, c1, c2, c3, j)))
                        if x > top or top_id == vocab_size:
                            top, top_id = x, int32(start + quad * 4 + j)
        return top, top_id

    @device_function
    def add_to_grid(scratch, histogram, bins_s, tid):
        """Adds the block's histogram to the grid's."""
        for i in range(tid, BINS, threads):
            share = int64(uint32(bins_s[i])) + (int64(uint32(bins_s[i + BINS])) << LIMB_BITS)
            if share != 0:
                ptx.atomic_add_wide(scratch, histogram + i, share)

    def sample(logits, vocab_size, settings, position, tokens, seen, scratch, counters, ring, ring_size):
        z_s = ptx.pointer(cuda.shared.array(block_tokens, float32))
        bins_s = cuda.shared.array(LIMB_BINS, int32)  # [2 limbs, BINS]
        x_r = cuda.local.array(X_REGS, float32)
        bins_r = cuda.local.array(BINS_EACH, int64)  # the grid's sums in this thread's digits
        keys_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        sums_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        # The digit of the cut, the sum above it, and whether all of the digit's keys are kept.
        found_s = ptx.pointer(cuda.shared.array(3, int64))
        last_s = ptx.pointer(cuda.shared.array(1, int32))
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        block, grid = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        # A block's tokens: whole groups of four, which share random words.
        size = int32((vocab_size + 4 * grid - 1) // (4 * grid) * 4)
        start = int32(block * size)
        num_own = max(int32(0), min(size, int32(vocab_size - start)))
        temperature = max(float32(settings[parts.TEMPERATURE]), parts.MIN_TEMPERATURE)
        greedy = settings[parts.TEMPERATURE] == 0.0
        penalty = float32(settings[parts.PENALTY])
        wait()
        pos = int32(position[0])
        arrivals = int32(0)

        # 1. Penalty, and the largest logit.
        top, top_id, has_nan = LOWEST, int32(vocab_size), int32(0)
        for first in range(int32(4 * tid), num_own, BATCH):
            for j in range(QUADS):  # on their way together
                i = int32(first + j * STRIDE)
                for k in range(4):
                    x_r[4 * j + k] = LOWEST
                    if num_own < i + 4 and i + k < num_own:
                        x_r[4 * j + k] = logits[start + i + k]
                if i + 4 <= num_own:
                    x_r[4 * j], x_r[4 * j + 1], x_r[4 * j + 2], x_r[4 * j + 3] = ptx.load4(logits, start + i)
            for j in range(QUADS):
                i = int32(first + j * STRIDE)
                word = int32(0)  # four neighbouring tokens' bits lie in one word
                if penalty != float32(1) and i < num_own:
                    word = seen[int32(start + i) >> 5]
                for k in range(4):
                    if i + k < num_own:
                        token = int32(start + i + k)
                        x = parts.penalized(x_r[4 * j + k], word, token, penalty)
                        z_s[i + k] = x
                        if not x <= LARGEST:  # NaN or infinity
                            has_nan = int32(1)
                        if x > top or top_id == vocab_size:
                            top, top_id = x, token
        has_nan = cuda.syncthreads_or(has_nan)
        best_word = BEST
        noisy = int32(0)  # 0: the largest logit; 1: the largest of z plus noise
        while True:
            key = parts.key_of(top, top_id) if top_id < vocab_size else int64(0)
            key = parts.block_best(key, keys_s, warp, lane, WARPS)
            if tid == 0:
                ptx.atomic_max_wide(scratch, best_word, int64(NAN_KEY) if has_nan else key)
            if greedy or noisy == 1:
                break
            arrivals = int32(arrivals + grid)
            grid_barrier(counters, arrivals, tid)
            best = scratch[BEST]
            if best == int64(NAN_KEY) or not parts.is_finite(best):
                break
            # 2. Shift and temperature.
            largest = parts.unordered(uint32(best >> ID_BITS))
            for i in range(tid, num_own, threads):
                z_s[i] = parts.shifted(z_s[i], largest, temperature)
            cuda.syncthreads()

            # 3. The cuts of top-k (stage 0) and top-p (stage 1).
            passes = int32(0)
            cut = int64(0)
            for stage in range(2):
                target = int64(settings[parts.TOP_K])
                if stage == 0:
                    wanted = target > 0 and target < vocab_size
                else:
                    wanted = settings[parts.TOP_P] < 1.0
                    target = int64(0)
                prefix, shift = int64(0), int32(32 + ID_BITS)
                whole = False
                while wanted and shift > 0 and not whole:
                    shift = int32(shift - DIGIT_BITS)
                    histogram = HISTOGRAM + passes % HISTOGRAMS * BINS
                    next_histogram = HISTOGRAM + (passes + 1) % HISTOGRAMS * BINS
                    for i in range(tid, LIMB_BINS, threads):
                        bins_s[i] = int32(0)
                    for i in range(block * threads + tid, BINS, grid * threads):
                        scratch[next_histogram + i] = int64(0)
                    cuda.syncthreads()
                    add_digits(bins_s, z_s, start, num_own, cut, prefix, shift, stage, tid)
                    cuda.syncthreads()
                    add_to_grid(scratch, histogram, bins_s, tid)
                    arrivals = int32(arrivals + grid)
                    grid_barrier(counters, arrivals, tid)
                    # Running sums from the highest digit down: thread t has BINS - 1 - BINS_EACH * t and those below.
                    own = int64(0)
                    for j in range(BINS_EACH):
                        digit = BINS - 1 - BINS_EACH * tid - j
                        bins_r[j] = scratch[histogram + digit]
                        own += bins_r[j]
                    running, total = parts.running_sums(own, sums_s, warp, lane, WARPS)
                    if stage == 1 and shift == parts.FIRST_SHIFT:
                        target = parts.top_p_target(settings[parts.TOP_P], total)
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

            # 4. Noise.
            noisy = int32(1)
            best_word = CHOSEN
            min_z = float32(settings[parts.MIN_Z])
            top, top_id = add_noise(z_s, start, num_own, cut, min_z, pos, settings, vocab_size, tid)
            cuda.syncthreads()

        # 5. The last block to leave stores the token and clears the scratch.
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
            if best != int64(NAN_KEY) and parts.is_finite(best):
                if not greedy:
                    best = scratch[CHOSEN]
                token = parts.token_of(best)
            tokens[pos + 1] = int32(max(token, int64(0)))
            position[0] = int32(pos + 1)
            ring[(pos + 1) % ring_size] = int64(int64(pos + 1) << 32) | (token & 0xFFFFFFFF)
            scratch[BEST] = int64(0)
            scratch[CHOSEN] = int64(0)
            counters[ARRIVED] = int32(0)
            counters[LEFT] = int32(0)
        if not greedy:
            for i in range(tid, HISTOGRAMS * BINS, threads):
                scratch[HISTOGRAM + i] = int64(0)

    return sample


@cache
def spec(arch: int, threads: int = THREADS, block_tokens: int = BLOCK_TOKENS) -> KernelSpec:
    """The variant; `threads` and `block_tokens` differ in tests only."""
    f32, f64, i32, i64 = (types.CPointer(kind) for kind in (types.float32, types.float64, types.int32, types.int64))
    signature = (f32, types.int32, f64, i32, i32, i32, i64, i32, i64, types.int32)
    kernel = make_sample(arch, threads, block_tokens)
    name, quads = f"sample[{threads}, {block_tokens}]", quads_of(arch)
    return KernelSpec(name, kernel, signature, threads, BLOCKS_PER_SM, wide_loads=quads)


def fits(num_sms: int, vocab_size: int) -> bool:
    """Whether a block an SM can own every token. If not, `sample_batch` serves the sequence as a batch of one."""
    return vocab_size <= min(MAX_BLOCKS, num_sms) * BLOCK_TOKENS


def num_blocks(num_sms: int, vocab_size: int) -> int:
    """Blocks of a launch: as many as are resident at once for certain. They wait for each other.

    Raises ValueError if the vocabulary is too large for them.
    """
    blocks = min(MAX_BLOCKS, num_sms)
    most = min(parts.MAX_VOCAB, blocks * BLOCK_TOKENS)
    if not 1 <= vocab_size <= most:
        raise ValueError(f"sample: the vocabulary must have 1 to {most} tokens, not {vocab_size}")
    return blocks


def sample(
    device: Device,
    logits: DeviceArray,
    vocab_size: int,
    sequence: SequenceArrays,
    scratch: SamplerScratch,
    ring: DeviceArray | PinnedArray,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that chooses the token after position[0] of a sequence.

    logits float32 [vocab_size], aligned to 16 bytes; sequence: of one slot; position[0] moves on by one and
    tokens[position[0]] becomes the token. ring int64: entry p % size becomes p << 32 | token for the new position p,
    with NAN_TOKEN as 32 bits (and token 0 in `tokens`) if a logit is NaN or the largest is infinite; the host may read
    it once the step has ended. Raises ValueError in one line for a vocabulary that does not fit and for operands of
    other types or smaller sizes.
    """
    grid = num_blocks(device.num_sms, vocab_size)
    if ring.dtype != "int64" or ring.size < 1:
        raise ValueError(f"sample: ring must be int64 with at least one element, not {ring.dtype} [{ring.size}]")
    problem = f"a vocabulary of {vocab_size}"
    logits, settings, position, tokens, seen, words, counters = checked(
        "sample",
        problem,
        logits=(logits, vocab_size, "float32"),
        settings=(sequence.settings, SETTINGS, "float64"),
        position=(sequence.position, 1, "int32"),
        tokens=(sequence.tokens, sequence.tokens_stride, "int32"),
        seen=(sequence.seen, -(-vocab_size // 32), "int32"),
        words=(scratch.words, SCRATCH_WORDS, "int64"),
        counters=(scratch.counters, COUNTERS, "int32"),
    )
    arguments = (logits, vocab_size, settings, position, tokens, seen, words, counters, ring, ring.size)
    return device.launch(spec(device.arch), grid, arguments, use_pdl)
