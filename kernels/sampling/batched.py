"""Choosing the next token of every row of a batch: `sampler` for logits float32 [B, V], in one launch.

    grid: a block a row, 1024 threads; a row's settings, position and seen tokens are its slot's
    1. largest logit, lowest id first; at temperature 0 that is all
    2. top-k, then top-p. The first time: a histogram over 1024 ranges of z, 1/32 wide, shows in which one the cut lies;
       the tokens down to its end, z and id, go to a list in shared memory. From then on only the list is read. Then the
       cut is found exactly, by radix select over keys (`sampler_parts`) as the sampler of one row does.
       A list that would overflow is not made: every pass reads all logits then.
    3. largest z + Gumbel noise of what is left

A row's logits do not fit shared memory, so z is computed again from them wherever it is needed: for most settings in
three passes (largest, histogram, list) and for greedy rows in one. Loads go out four or eight at a time: a block alone
on its SM has nothing else to wait behind. Ranges of z instead of the key's first bits (sign and exponent)
because those are the same for most tokens, and additions to one word of shared memory take turns.

A z under -19.5 is not given noise: it could not win. Where only a range of z is asked for, a product with
1 / temperature stands for the division; the list takes a range more, so that a border between equal z does not matter.

Sums are integers, so neither the list's order nor the ranges change a choice: it is the token that `sampler` chooses.
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

THREADS = 1024
LIST = 4096  # tokens: 32 KB of shared memory
LIMB_BITS = 14  # of a probability's 40 bits: sums of one limb of 2^18 tokens fit 32 bits
LIMBS = 3
RANGES = float32(-32.0)  # of z, a unit
AHEAD, FAR_AHEAD = 4, 8  # loads of a thread in flight


@device_function
def _range_of(z):
    """A digit that is larger for larger z: 1023 for z = 0 (and for NaN), 0 for z under -32."""
    return int32(BINS - 1 - max(int32(0), min(int32(BINS - 1), ptx.round_to_int(ptx.mul_rn(z, RANGES)))))


def make_sampler_many(arch: int, threads: int = THREADS, list_size: int = LIST) -> Callable[..., None]:
    """The kernel; `threads` at most 1024."""
    wait = ptx.pdl_wait(arch)
    WARPS, BINS_EACH, BIN_LIMBS = threads // WARP, BINS // threads, LIMBS * BINS
    LIMB, TWO_LIMBS = (1 << LIMB_BITS) - 1, (1 << 2 * LIMB_BITS) - 1
    LOWEST = float32(-np.inf)

    def sample_many(logits, vocab, settings, where, tokens, tokens_stride, seen, seen_stride, position, out):
        z_s = ptx.pointer(cuda.shared.array(list_size, float32))
        id_s = ptx.pointer(cuda.shared.array(list_size, int32))
        bins_s = cuda.shared.array(BIN_LIMBS, int32)  # [LIMBS, BINS]
        bins_r = cuda.local.array(BINS_EACH, int64)
        x_r = cuda.local.array(FAR_AHEAD, float32)
        seen_r = cuda.local.array(FAR_AHEAD, int32)  # the words of `seen` for x_r; 0 where nothing is penalised
        keys_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        sums_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        found_s = ptx.pointer(
            cuda.shared.array(3, int64)
        )  # the digit, what ranks above it, whether all of it is wanted
        length_s = cuda.shared.array(1, int32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        row = int32(cuda.blockIdx.x)
        wait()
        slot = where[2 * row]
        if slot < 0:
            return
        pos = where[2 * row + 1]
        setting = int64(slot) * SETTINGS
        seen_rd = int64(slot) * seen_stride
        x_rd = int64(row) * vocab
        temperature = max(float32(settings[setting + TEMPERATURE]), TINY)
        penalty = float32(settings[setting + PENALTY])
        penalizes = penalty != float32(1)

        # 1. Penalty, and the largest logit.
        top, top_id, broken = LOWEST, int32(vocab), int32(0)
        for first in range(tid, vocab, threads * FAR_AHEAD):
            for u in range(FAR_AHEAD):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab else LOWEST
                seen_r[u] = seen[seen_rd + (token >> 5)] if penalizes and token < vocab else int32(0)
            for u in range(FAR_AHEAD):
                token = int32(first + u * threads)
                if token < vocab:
                    x = penalized(x_r[u], seen_r[u], token, penalty)
                    if x != x:
                        broken = int32(1)
                    if x > top or top_id == vocab:
                        top, top_id = x, token
        broken = cuda.syncthreads_or(broken)
        best = block_best(key_of(top, top_id) if top_id < vocab else int64(0), keys_s, warp, lane, WARPS)

        if settings[setting + TEMPERATURE] != 0.0 and not broken:
            largest = unordered(uint32(best >> ID_BITS))
            inverse = ptx.div_rn(float32(1), temperature)  # for what is cheaper than z and nearly z
            # 2. The cuts of top-k (stage 0) and top-p (stage 1).
            cut = int64(0)
            listed = int32(-1)  # tokens in the list; -1 without one
            for stage in range(2):
                target = int64(settings[setting + TOP_K])
                wanted = target > 0 and target < vocab
                if stage == 1:
                    wanted = settings[setting + TOP_P] < 1.0
                    target = int64(0)
                coarse = listed < 0
                prefix, shift = int64(0), int32(32 + ID_BITS)
                whole = False
                while wanted and shift > 0 and not whole:
                    if not coarse:
                        shift = int32(shift - DIGIT_BITS)
                    for i in range(tid, BIN_LIMBS, threads):
                        bins_s[i] = int32(0)
                    if tid == 0:
                        found_s[0], found_s[1], found_s[2] = int64(0), int64(0), int64(0)
                        length_s[0] = int32(0)
                    cuda.syncthreads()
                    size = listed if listed >= 0 else vocab
                    for first in range(tid, size, threads * AHEAD):
                        for u in range(AHEAD):
                            i = int32(first + u * threads)
                            x_r[u] = LOWEST
                            seen_r[u] = int32(0)
                            if i < size:
                                x_r[u] = z_s[i] if listed >= 0 else logits[x_rd + i]
                                if listed < 0 and penalizes:
                                    seen_r[u] = seen[seen_rd + (i >> 5)]
                        for u in range(AHEAD):
                            i = int32(first + u * threads)
                            if i < size:
                                z, token = x_r[u], i
                                counts = True
                                digit = int32(0)
                                if listed >= 0:
                                    token = id_s[i]
                                else:
                                    z = penalized(z, seen_r[u], token, penalty)
                                    digit = _range_of(ptx.mul_rn(ptx.add_rn(z, -largest), inverse))
                                    # The last range holds whatever is left; it is not worth taking turns for.
                                    counts = digit > 0 or not coarse
                                    if counts and (stage == 1 or not coarse):
                                        z = shifted(z, largest, temperature)
                                if counts and not (coarse and stage == 0):
                                    key = key_of(z, token)
                                    counts = key >= cut
                                    if not coarse:
                                        digit = int32((key >> shift) & (BINS - 1))
                                        counts = counts and key >> (shift + DIGIT_BITS) == prefix
                                if counts:
                                    if stage == 0:
                                        cuda.atomic.add(bins_s, digit, int32(1))
                                    else:
                                        share = probability(z)
                                        cuda.atomic.add(bins_s, digit, int32(share & LIMB))
                                        if share > LIMB:
                                            cuda.atomic.add(bins_s, digit + BINS, int32(share >> LIMB_BITS & LIMB))
                                        if share > TWO_LIMBS:
                                            cuda.atomic.add(bins_s, digit + 2 * BINS, int32(share >> 2 * LIMB_BITS))
                    cuda.syncthreads()
                    # Running sums from the highest digit down: thread t has BINS - 1 - BINS_EACH * t and those below.
                    own = int64(0)
                    for j in range(BINS_EACH):
                        digit = BINS - 1 - BINS_EACH * tid - j
                        low, high = int64(uint32(bins_s[digit])), int64(uint32(bins_s[digit + BINS]))
                        bins_r[j] = low + (high << LIMB_BITS)
                        bins_r[j] += int64(uint32(bins_s[digit + 2 * BINS])) << 2 * LIMB_BITS
                        own += bins_r[j]
                    running, total = running_sums(own, sums_s, warp, lane, WARPS)
                    if stage == 1 and target == 0:
                        target = wanted_sum(settings[setting + TOP_P], total)
                    for j in range(BINS_EACH):
                        digit = BINS - 1 - BINS_EACH * tid - j
                        if running < target and target <= running + bins_r[j]:
                            found_s[0], found_s[1] = digit, running
                            found_s[2] = int64(target == running + bins_r[j])
                        running += bins_r[j]
                    cuda.syncthreads()
                    least_range = int32(found_s[0])
                    if not coarse:
                        prefix = (prefix << DIGIT_BITS) | found_s[0]
                        target -= found_s[1]
                        whole = found_s[2] != 0
                    elif least_range > 0:
                        full = False
                        for first in range(tid, vocab, threads * AHEAD):
                            for u in range(AHEAD):
                                token = int32(first + u * threads)
                                x_r[u] = logits[x_rd + token] if token < vocab else LOWEST
                                seen_r[u] = seen[seen_rd + (token >> 5)] if penalizes and token < vocab else int32(0)
                            for u in range(AHEAD):
                                token = int32(first + u * threads)
                                x = penalized(x_r[u], seen_r[u], token, penalty)
                                # One range more: equal z may lie on both sides of a border of what is only nearly z.
                                near = _range_of(ptx.mul_rn(ptx.add_rn(x, -largest), inverse)) >= least_range - 1
                                if near and token < vocab and not full:
                                    z = shifted(x, largest, temperature)
                                    if key_of(z, token) >= cut:
                                        place = cuda.atomic.add(length_s, 0, int32(1))
                                        full = place >= list_size
                                        if not full:
                                            z_s[place], id_s[place] = z, token
                        cuda.syncthreads()
                        if length_s[0] <= list_size:
                            listed = length_s[0]
                    coarse = False
                    cuda.syncthreads()  # everyone has read what the next pass clears
                if wanted:
                    cut = prefix << shift

            # 3. Noise.
            # The likeliest token's noise is above -2.82 and no noise above 16.64: a z under -19.5 cannot win.
            least = max(float32(settings[setting + LEAST_Z]), float32(-19.5))
            key0, key1 = uint32(settings[setting + SEED_LOW]), uint32(settings[setting + SEED_HIGH])
            best = int64(0)
            if listed >= 0:
                for i in range(tid, listed, threads):
                    if z_s[i] >= least and key_of(z_s[i], id_s[i]) >= cut:
                        c0, c1, c2, c3 = random_words(id_s[i] >> 2, pos + 1, key0, key1)
                        x = ptx.add_rn(z_s[i], gumbel(chosen_word(c0, c1, c2, c3, id_s[i] & 3)))
                        best = max(best, key_of(x, id_s[i]))
            else:
                for quad in range(tid, (vocab + 3) // 4, threads):
                    kept = int32(0)
                    for j in range(4):
                        token = int32(quad * 4 + j)
                        x_r[j] = logits[x_rd + token] if token < vocab else LOWEST
                    word = seen[seen_rd + (quad >> 3)] if penalizes else int32(0)
                    for j in range(4):
                        token = int32(quad * 4 + j)
                        x = penalized(x_r[j], word, token, penalty)
                        if ptx.mul_rn(ptx.add_rn(x, -largest), inverse) >= float32(-20) and token < vocab:
                            x_r[j] = shifted(x, largest, temperature)
                            if x_r[j] >= least and key_of(x_r[j], token) >= cut:
                                kept = int32(kept | 1 << j)
                    if kept:
                        c0, c1, c2, c3 = random_words(quad, pos + 1, key0, key1)
                        for j in range(4):
                            if kept >> j & 1:
                                x = ptx.add_rn(x_r[j], gumbel(chosen_word(c0, c1, c2, c3, j)))
                                best = max(best, key_of(x, quad * 4 + j))
            cuda.syncthreads()
            best = block_best(best, keys_s, warp, lane, WARPS)

        if tid == 0:
            choice = int64(NAN_TOKEN) if broken else token_of(best)
            tokens[int64(slot) * tokens_stride + pos + 1] = int32(max(choice, int64(0)))
            position[slot] = int32(pos + 1)
            out[row] = int64(int64(pos + 1) << 32) | (choice & 0xFFFFFFFF)
            cuda.threadfence_system()

    return sample_many


_P = types.CPointer
SIGNATURE = (
    *(_P(types.float32), types.int32, _P(types.float64), _P(types.int32)),  # logits, vocab, settings, where
    *(_P(types.int32), types.int32, _P(types.int32), types.int32),  # tokens, seen and their strides
    *(_P(types.int32), _P(types.int64)),  # position, out
)


def sampler_many_spec(arch: int, threads: int = THREADS, list_size: int = LIST) -> KernelSpec:
    """The compiled form; the arguments only for tests."""
    kernel = make_sampler_many(arch, threads, list_size)
    return KernelSpec(f"sampler_many[{threads}, {list_size}]", kernel, SIGNATURE, threads)


def sampler_many(
    device: Device,
    logits: DeviceArray,
    rows: int,
    vocab: int,
    settings: DeviceArray,
    where: DeviceArray,
    tokens: DeviceArray,
    tokens_stride: int,
    seen: DeviceArray,
    position: DeviceArray,
    out: DeviceArray | PinnedArray,
    use_pdl: bool = True,
) -> Launch:
    """The launch that chooses the token after the one that each row fed.

    logits float32 [rows, vocab]; where int32 [rows, 2]: slot and position of a row, slot -1 to skip it; settings
    float64 [slots, SETTINGS], see `sampler_parts.settings`; position int32 [slots], becomes the row's position + 1;
    tokens int32 [slots, tokens_stride], the choice goes to [slot, position + 1]; seen int32 [slots, ceil(vocab / 32)];
    out int64 [rows], becomes (position + 1) << 32 | token, the token NAN_TOKEN (as 32 bits) if logits hold NaN.
    Raises ValueError with the sizes if they do not fit together.
    """
    if rows < 1 or not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"the sampler takes 1 to {MAX_VOCAB} tokens and at least a row, not {rows} rows of {vocab}")
    slots, seen_stride = position.size, -(-vocab // 32)
    sizes: dict[str, tuple[DeviceArray | PinnedArray, int]] = {
        "logits": (logits, rows * vocab),
        "settings": (settings, slots * SETTINGS),
        "where": (where, 2 * rows),
        "tokens": (tokens, slots * tokens_stride),
        "seen": (seen, slots * seen_stride),
        "out": (out, rows),
    }
    for name, (array, size) in sizes.items():
        if array.size < size:
            raise ValueError(f"sampler_many: {name} holds {array.size} elements, {size} are needed")
    arguments = (logits, vocab, settings, where, tokens, tokens_stride, seen, seen_stride, position, out)
    return device.launch(sampler_many_spec(device.arch), rows, arguments, use_pdl)
