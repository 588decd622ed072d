"""Sampling for a batch: the next token of every row of logits float32 [num_rows, vocab_size], in one launch.

    grid: a block a row, 768 threads; a row's settings, position and seen tokens are its slot's
    1. largest logit, lowest id first; at temperature 0 that is all
    2. top-p alone: about where the cut is (see `window`); the best token after noise (see `noise`) of all that may be
       above it is nearly always one that is above it for sure, and chosen
       else the cut: of top-p alone by a window of z; of top-k, then top-p, by radix select over keys (see `parts`),
       with one coarse pass before
         coarse pass   a histogram over z itself, 1024 bins 1/32 wide, shows in which bin the cut lies. The tokens from
                       the highest z down to that bin's end become candidates: z and id, in shared memory
         exact passes  10 bits of the key each, over the candidates alone. Too many for shared memory: over all logits
    3. largest z + Gumbel noise of what is kept

A row's logits do not fit shared memory, so z is computed again from them wherever it is needed. Loads go out four or
eight at a time: a block alone on its SM has nothing else to hide their latency. The coarse pass has bins of z instead
of the key's first digit (sign and exponent), which is the same for most tokens: additions to one word of shared memory
take turns.

Where only a coarse bin is asked for, a product with 1 / temperature stands for the division; candidates reach one bin
further down, so that equal z on both sides of a bin's border do not matter.

Sums are integers, so neither the order of candidates nor the bins change a choice: it is the token that `single`
chooses.

What stays in the kernel's body (summing bins, finding the digit) changes the machine code as a function. Loops over
tokens count int32 themselves: `range` would count int64, in registers that are short.
"""

from collections.abc import Callable
from functools import cache

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.operands import SequenceArrays, checked
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, PinnedArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling import noise, parts, window
from bitnet_numba.kernels.sampling.parts import BINS, DIGIT_BITS, ID_BITS, LARGEST, LOWEST, NAN_TOKEN, SETTINGS

THREADS = 768  # the most whose registers suffice
MAX_CANDIDATES = 4096  # 32 KB of shared memory
LIMB_BITS = 14  # of a probability's 40 bits; 2^18 tokens' sum of one limb fits 32 bits
LIMBS = 3
COARSE_BINS_PER_Z = float32(-32.0)  # z is at most 0


@device_function
def coarse_bin(z):
    """A bin that is higher for larger z: 1023 for z = 0 (and for NaN), 0 for z under -32."""
    return int32(BINS - 1 - max(int32(0), min(int32(BINS - 1), ptx.round_to_int(ptx.mul_rn(z, COARSE_BINS_PER_Z)))))


def loads_in_flight(threads: int) -> int:
    """Loads of a thread in flight where it computes much with each; twice as many where little."""
    return 6 if threads > 512 else 8


def make_sample_batch(arch: int, threads: int = THREADS, max_candidates: int = MAX_CANDIDATES) -> Callable[..., None]:
    """The kernel; `threads` at most 1024."""
    wait = ptx.pdl_wait(arch)
    LOADS = loads_in_flight(threads)
    MAX_LOADS = 2 * LOADS
    add_masses, find_cut, list_window = window.make_window(threads, max_candidates, LOADS)
    best_of_candidates, best_of_tokens = noise.make_noise(threads)
    WARPS, BINS_EACH, LIMB_BINS = threads // WARP, -(-BINS // threads), LIMBS * BINS
    LIMB, TWO_LIMBS = (1 << LIMB_BITS) - 1, (1 << 2 * LIMB_BITS) - 1

    @device_function
    def clear(bins_s, tid):
        """Sets all bins to 0."""
        for j in range(-(-LIMB_BINS // threads)):
            if tid + j * threads < LIMB_BINS:
                bins_s[tid + j * threads] = int32(0)

    @device_function
    def find_best(loads, source, log2_scale, tid):
        """The thread's (largest logit after the penalty, its token, whether one is NaN or infinite, mass, reference):
        if log2_scale is not 0, mass is the sum of 2^((x - reference) * log2_scale) over its tokens, as near as
        `window` asks."""
        logits, seen, x_rd, seen_rd, vocab_size, has_penalty, penalty = source
        x_r, seen_r = loads
        top, top_id, has_nan = LOWEST, int32(vocab_size), int32(0)
        mass, reference = float32(0), LOWEST
        for first in range(tid, vocab_size, threads * MAX_LOADS):
            for u in range(MAX_LOADS):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab_size else LOWEST
                seen_r[u] = seen[seen_rd + (token >> 5)] if has_penalty and token < vocab_size else int32(0)
            for u in range(MAX_LOADS):
                token = int32(first + u * threads)
                if token < vocab_size:
                    x = parts.penalized(x_r[u], seen_r[u], token, penalty)
                    x_r[u] = x
                    if not x <= LARGEST:  # NaN or infinity
                        has_nan = int32(1)
                    if x > top or top_id == vocab_size:
                        top, top_id = x, token
            if log2_scale != float32(0):
                if mass == float32(0):  # no token so far is above -infinity
                    reference = top if top > LOWEST else float32(0)
                for u in range(MAX_LOADS):
                    mass += ptx.exp2_approx((x_r[u] - reference) * log2_scale)
        return top, top_id, has_nan, mass, reference

    @device_function
    def add_probability(bins_s, z, digit):
        """Adds exp(z), limb by limb, to a digit's bin."""
        share = parts.probability(z)
        cuda.atomic.add(bins_s, digit, int32(share & LIMB))
        if share > LIMB:
            cuda.atomic.add(bins_s, digit + BINS, int32(share >> LIMB_BITS & LIMB))
        if share > TWO_LIMBS:
            cuda.atomic.add(bins_s, digit + 2 * BINS, int32(share >> 2 * LIMB_BITS))

    @device_function
    def add_digits(bins_s, loads, candidates, num_candidates, source, scale, radix, coarse, stage, tid):
        """The histogram of a pass: over coarse bins of z, or over the digit at `shift` of the keys that begin with
        `prefix`; in both of the tokens from the cut so far on. Stage 0 counts tokens, stage 1 adds probabilities."""
        logits, seen, x_rd, seen_rd, vocab_size, has_penalty, penalty = source
        x_r, seen_r = loads
        z_s, id_s = candidates
        largest, inverse, temperature = scale
        cut, prefix, shift = radix
        size = num_candidates if num_candidates >= 0 else vocab_size
        first = tid
        while first < size:
            for u in range(LOADS):
                i = int32(first + u * threads)
                x_r[u] = LOWEST
                seen_r[u] = int32(0)
                if i < size:
                    x_r[u] = z_s[i] if num_candidates >= 0 else logits[x_rd + i]
                    if num_candidates < 0 and has_penalty:
                        seen_r[u] = seen[seen_rd + (i >> 5)]
            for u in range(LOADS):
                i = int32(first + u * threads)
                if i < size:
                    z, token = x_r[u], i
                    counts = True
                    digit = int32(0)
                    if num_candidates >= 0:
                        token = id_s[i]
                    else:
                        z = parts.penalized(z, seen_r[u], token, penalty)
                        digit = coarse_bin(ptx.mul_rn(ptx.add_rn(z, -largest), inverse))
                        # Bin 0 holds whatever is left; it is not worth taking turns for.
                        counts = digit > 0 or not coarse
                        if counts and (stage == 1 or not coarse):
                            z = parts.shifted(z, largest, temperature)
                    if counts and not (coarse and stage == 0):
                        key = parts.key_of(z, token)
                        counts = key >= cut
                        if not coarse:
                            digit = int32((key >> shift) & (BINS - 1))
                            counts = counts and key >> (shift + DIGIT_BITS) == prefix
                    if counts:
                        if stage == 0:
                            cuda.atomic.add(bins_s, digit, int32(1))
                        else:
                            add_probability(bins_s, z, digit)
            first = int32(first + threads * LOADS)

    @device_function
    def list_candidates(candidates, length_s, loads, source, scale, cut, cut_bin, tid):
        """Lists the tokens from the cut so far on whose coarse bin is at least cut_bin - 1; counts those that do not
        fit."""
        logits, seen, x_rd, seen_rd, vocab_size, has_penalty, penalty = source
        x_r, seen_r = loads
        z_s, id_s = candidates
        largest, inverse, temperature = scale
        full = False
        first = tid
        while first < vocab_size:
            for u in range(LOADS):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab_size else LOWEST
                seen_r[u] = seen[seen_rd + (token >> 5)] if has_penalty and token < vocab_size else int32(0)
            for u in range(LOADS):
                token = int32(first + u * threads)
                x = parts.penalized(x_r[u], seen_r[u], token, penalty)
                # One bin below: equal z may lie on both sides of the border of what is only nearly z.
                near = coarse_bin(ptx.mul_rn(ptx.add_rn(x, -largest), inverse)) >= cut_bin - 1
                if near and token < vocab_size and not full:
                    z = parts.shifted(x, largest, temperature)
                    if parts.key_of(z, token) >= cut:
                        wr = cuda.atomic.add(length_s, 0, int32(1))
                        full = wr >= max_candidates
                        if not full:
                            z_s[wr], id_s[wr] = z, token
            first = int32(first + threads * LOADS)

    def sample_batch(
        logits, vocab_size, settings, slot_positions, tokens, tokens_stride, seen, seen_stride, position, chosen, ring
    ):
        z_s = ptx.pointer(cuda.shared.array(max_candidates, float32))
        id_s = ptx.pointer(cuda.shared.array(max_candidates, int32))
        bins_s = cuda.shared.array(LIMB_BINS, int32)  # [LIMBS, BINS]
        bins_r = cuda.local.array(BINS_EACH, int64)
        x_r = cuda.local.array(MAX_LOADS, float32)
        seen_r = cuda.local.array(MAX_LOADS, int32)  # the words of `seen` for x_r; 0 without a penalty
        keys_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        sums_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        # The digit of the cut, the sum above it, and whether all of the digit's keys are kept.
        found_s = ptx.pointer(cuda.shared.array(3, int64))
        length_s = cuda.shared.array(1, int32)
        window_s = ptx.pointer(cuda.shared.array(3, float32))  # the row's mass, bins per z, lowest z that may be kept
        likeliest_s = cuda.shared.array(1, int32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        row = int32(cuda.blockIdx.x)
        wait()
        slot = slot_positions[2 * row]
        if slot < 0:
            return
        setting, seen_rd, x_rd = int32(slot * SETTINGS), int32(slot * seen_stride), int32(row * vocab_size)
        temperature = max(float32(settings[setting + parts.TEMPERATURE]), parts.MIN_TEMPERATURE)
        penalty = float32(settings[setting + parts.PENALTY])
        has_penalty = penalty != float32(1)
        source = logits, seen, x_rd, seen_rd, vocab_size, has_penalty, penalty
        loads, candidates = (x_r, seen_r), (z_s, id_s)
        request = settings, setting, slot_positions, row

        sampled = settings[setting + parts.TEMPERATURE] != 0.0
        inverse = ptx.div_rn(float32(1), temperature)  # a product with it is cheaper than z and nearly z
        log2_scale = inverse * window.LOG2_E

        # 1. The largest logit after the penalty.
        needs_mass = sampled and settings[setting + parts.TOP_P] < 1.0
        top, top_id, has_nan, mass, reference = find_best(loads, source, log2_scale if needs_mass else float32(0), tid)
        has_nan = cuda.syncthreads_or(has_nan)
        best = parts.block_best(
            parts.key_of(top, top_id) if top_id < vocab_size else int64(0), keys_s, warp, lane, WARPS
        )

        if not parts.is_finite(best):
            has_nan = int32(1)

        if sampled and not has_nan:
            largest = parts.unordered(uint32(best >> ID_BITS))
            if tid == 0:
                likeliest_s[0] = int32(parts.token_of(best))
                window_s[1], window_s[2] = float32(0), noise.MIN_WINNING_Z
            scale = largest, inverse, temperature
            _, total = parts.running_sums(
                window.mass_share(mass, reference, largest, log2_scale), sums_s, warp, lane, WARPS
            )
            row_mass = float32(float(total) / window.MASS_UNIT)
            top_k = int64(settings[setting + parts.TOP_K])
            # 2. Top-p alone: about where the cut is.
            loose = False
            if needs_mass and (top_k <= 0 or top_k >= vocab_size) and row_mass < window.MAX_MASS:
                clear(bins_s, tid)
                if tid == 0:
                    found_s[0], found_s[1] = int64(-1), int64(-1)
                cuda.syncthreads()
                top_p = settings[setting + parts.TOP_P]
                per_z = window.bins_per_z(top_p, row_mass, vocab_size)
                add_masses(bins_s, loads, source, largest, log2_scale, row_mass, inverse * per_z, tid)
                cuda.syncthreads()
                find_cut(bins_s, found_s, sums_s, top_p, vocab_size, tid)
                cuda.syncthreads()
                loose = found_s[0] >= 0
                if tid == 0:
                    window_s[0], window_s[1] = row_mass, per_z
                    if found_s[1] >= 0:
                        window_s[2] = float32(-(int32(found_s[1]) + 2)) / per_z
                cuda.syncthreads()

            decided = False
            if loose:  # the best of more than is kept, perhaps
                lowest_z = window_s[2]
                best = best_of_tokens(loads, source, scale, request, likeliest_s[0], int64(0), lowest_z, keys_s, tid)
                best = parts.block_best(best, keys_s, warp, lane, WARPS)
                winner = int32(parts.token_of(best))
                word = seen[seen_rd + (winner >> 5)] if has_penalty else int32(0)
                below = parts.penalized(logits[x_rd + winner], word, winner, penalty) - largest
                sure = window.below_cut(settings[setting + parts.TOP_P], vocab_size)
                decided = window.is_surely_kept(bins_s, below, log2_scale, window_s[0], inverse * window_s[1], sure)
                cuda.syncthreads()  # everyone has read the sums
            if not decided:
                num_candidates = int32(-1)  # -1 while there is no list of them
                # The cuts of top-k (stage 0) and top-p (stage 1).
                cut = int64(0)
                for stage in range(2):
                    target = int64(settings[setting + parts.TOP_K])
                    wanted = target > 0 and target < vocab_size
                    if stage == 1:
                        target, wanted = int64(0), settings[setting + parts.TOP_P] < 1.0
                    prefix, shift = int64(0), int32(32 + ID_BITS)
                    windowed = False
                    per_z = window_s[1]
                    if stage == 1 and wanted and per_z > float32(0):
                        # After it, candidates are the window's tokens, and the target is what those above leave of it.
                        cut_bin = int32(found_s[0])
                        if tid == 0:
                            length_s[0] = int32(0)
                        cuda.syncthreads()
                        if cut_bin >= 0:
                            low, high = float32(-(cut_bin + 3)) / per_z, float32(2 - cut_bin) / per_z
                            total, above = list_window(candidates, length_s, loads, source, scale, low, high, tid)
                            _, total = parts.running_sums(total, sums_s, warp, lane, WARPS)
                            cuda.syncthreads()
                            _, above = parts.running_sums(above, sums_s, warp, lane, WARPS)
                            left = parts.top_p_target(settings[setting + parts.TOP_P], total) - above
                            cuda.syncthreads()
                            own = int64(0)
                            i = tid
                            while i < min(length_s[0], int32(max_candidates)):
                                own += parts.probability(z_s[i])
                                i = int32(i + threads)
                            _, total = parts.running_sums(own, sums_s, warp, lane, WARPS)  # in the window
                            windowed = length_s[0] <= max_candidates and 0 < left and left <= total
                            if windowed:
                                num_candidates, target = length_s[0], left
                                # The first digits are the same for all in the window.
                                first_key = parts.key_of(low, int32(parts.MAX_VOCAB - 1))
                                last_key = parts.key_of(min(high, float32(0)), int32(0))
                                while first_key >> (shift - DIGIT_BITS) == last_key >> (shift - DIGIT_BITS):
                                    shift = int32(shift - DIGIT_BITS)
                                prefix = first_key >> shift
                    cuda.syncthreads()  # everyone has read what the passes clear
                    coarse = num_candidates < 0
                    whole = False
                    while wanted and shift > 0 and not whole:
                        if not coarse:
                            shift = int32(shift - DIGIT_BITS)
                        clear(bins_s, tid)
                        if tid == 0:
                            found_s[0], found_s[1], found_s[2] = int64(0), int64(0), int64(0)
                            length_s[0] = int32(0)
                        cuda.syncthreads()
                        radix = cut, prefix, shift
                        add_digits(bins_s, loads, candidates, num_candidates, source, scale, radix, coarse, stage, tid)
                        cuda.syncthreads()
                        # Running sums from the highest digit down: thread t has BINS - 1 - BINS_EACH * t and below.
                        own = int64(0)
                        for j in range(BINS_EACH):
                            digit = BINS - 1 - BINS_EACH * tid - j
                            bins_r[j] = int64(0)
                            if digit >= 0:
                                low, high = int64(uint32(bins_s[digit])), int64(uint32(bins_s[digit + BINS]))
                                bins_r[j] = low + (high << LIMB_BITS)
                                bins_r[j] += int64(uint32(bins_s[digit + 2 * BINS])) << 2 * LIMB_BITS
                            own += bins_r[j]
                        running, total = parts.running_sums(own, sums_s, warp, lane, WARPS)
                        if stage == 1 and target == 0:
                            target = parts.top_p_target(settings[setting + parts.TOP_P], total)
                        for j in range(BINS_EACH):
                            digit = BINS - 1 - BINS_EACH * tid - j
                            if running < target and target <= running + bins_r[j]:
                                found_s[0], found_s[1] = digit, running
                                found_s[2] = int64(target == running + bins_r[j])
                            running += bins_r[j]
                        cuda.syncthreads()
                        cut_bin = int32(found_s[0])
                        if not coarse:
                            prefix = (prefix << DIGIT_BITS) | found_s[0]
                            target -= found_s[1]
                            whole = found_s[2] != 0
                        elif cut_bin > 0:
                            list_candidates(candidates, length_s, loads, source, scale, cut, cut_bin, tid)
                            cuda.syncthreads()
                            if length_s[0] <= max_candidates:
                                num_candidates = length_s[0]
                        coarse = False
                        cuda.syncthreads()  # everyone has read what the next pass clears
                    if wanted:
                        cut = prefix << shift
                    if windowed:  # they are not all that is kept
                        num_candidates = int32(-1)

                # 3. Noise.
                if num_candidates >= 0:
                    best = best_of_candidates(candidates, num_candidates, request, cut, tid)
                    cuda.syncthreads()
                else:
                    best = best_of_tokens(
                        loads, source, scale, request, likeliest_s[0], cut, noise.MIN_WINNING_Z, keys_s, tid
                    )
                best = parts.block_best(best, keys_s, warp, lane, WARPS)

        if tid == 0:
            token = int64(NAN_TOKEN) if has_nan else parts.token_of(best)
            slot, pos = slot_positions[2 * row], slot_positions[2 * row + 1]
            tokens[int64(slot) * tokens_stride + pos + 1] = int32(max(token, int64(0)))
            position[slot] = int32(pos + 1)
            chosen[(pos + 1) % ring if ring else row] = int64(int64(pos + 1) << 32) | (token & 0xFFFFFFFF)
            cuda.threadfence_system()

    return sample_batch


@cache
def spec(arch: int, threads: int = THREADS, max_candidates: int = MAX_CANDIDATES) -> KernelSpec:
    """The variant; `threads` and `max_candidates` differ in tests only."""
    f32, f64, i32, i64 = (types.CPointer(kind) for kind in (types.float32, types.float64, types.int32, types.int64))
    signature = (f32, types.int32, f64, i32, i32, types.int32, i32, types.int32, i32, i64, types.int32)
    kernel = make_sample_batch(arch, threads, max_candidates)
    return KernelSpec(f"sample_batch[{threads}, {max_candidates}]", kernel, signature, threads)


def sample_batch(
    device: Device,
    logits: DeviceArray,
    vocab_size: int,
    sequences: SequenceArrays,
    slot_positions: DeviceArray,
    chosen: DeviceArray | PinnedArray,
    num_rows: int,
    ring_size: int = 0,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that chooses, for each row, the token after the one that the row fed.

    logits float32 [num_rows, vocab_size]; slot_positions int32 [num_rows, 2]: a row's slot (-1: the row is skipped) and
    the position that it fed; chosen int64 [num_rows] becomes (position + 1) << 32 | token, with NAN_TOKEN as 32 bits if
    a logit is NaN or the largest is infinite. With ring_size, chosen is int64 [ring_size], and a row's entry is number
    (position + 1) % ring_size. Of the slot, tokens[position + 1] becomes the token (0 for NAN_TOKEN) and position moves
    on to position + 1; of a single row it may be the word of slot_positions. Raises ValueError in one line for a
    vocabulary that is too large, no rows, and operands of other types or smaller sizes.
    """
    if num_rows < 1 or not 1 <= vocab_size <= parts.MAX_VOCAB:
        needed = f"at least one row and 1 to {parts.MAX_VOCAB} tokens are needed"
        raise ValueError(f"sample_batch: {needed}, not {num_rows} x {vocab_size}")
    if num_rows * vocab_size >= 1 << 31:
        raise ValueError(f"sample_batch: {num_rows} x {vocab_size} logits are more than 2^31 - 1")
    problem = f"a batch of {num_rows} rows of {vocab_size}"
    (position,) = checked("sample_batch", problem, position=(sequences.position, 1, "int32"))
    slots, seen_words = position.size, -(-vocab_size // 32)
    if sequences.seen_stride < seen_words:
        raise ValueError(f"sample_batch: seen has {sequences.seen_stride} words a slot, {problem} takes {seen_words}")
    if chosen.dtype != "int64" or chosen.size < (ring_size or num_rows):
        wanted = f"int64 [{ring_size or num_rows}]"
        raise ValueError(f"sample_batch: chosen must be {wanted}, not {chosen.dtype} [{chosen.size}]")
    logits, settings, slot_positions, tokens, seen = checked(
        "sample_batch",
        problem,
        logits=(logits, num_rows * vocab_size, "float32"),
        settings=(sequences.settings, slots * SETTINGS, "float64"),
        slot_positions=(slot_positions, 2 * num_rows, "int32"),
        tokens=(sequences.tokens, slots * sequences.tokens_stride, "int32"),
        seen=(sequences.seen, slots * sequences.seen_stride, "int32"),
    )
    arguments = (
        logits, vocab_size, settings, slot_positions, tokens, sequences.tokens_stride, seen, sequences.seen_stride,
        position, chosen, ring_size,
    )  # fmt: skip
    return device.launch(spec(device.arch), num_rows, arguments, use_pdl)
