"""Log probabilities of tokens, and the most likely tokens, from rows of logits float32 [num_rows, vocab_size].

    grid: a block a row
    1. the largest logit of each thread's tokens, and of the row
    2. the sum of exp(logit - largest); meanwhile the tokens from the k-th largest of the threads' largest on are listed
       in shared memory: the k most likely are among them, and no more than k threads have any
    3. the most likely of the list, k times

Ranks are those of the samplers' keys (see `parts`): equal logits by rising id. A record is RECORD words: place 0 is for
the token asked about, 1 .. k for the most likely ones; `ids` has in place 0 the token's position, written last, so that
a host which polls page-locked memory sees when a record is complete.
"""

import math
from collections.abc import Callable

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.operands import SequenceArrays, checked
from bitnet_numba.kernels.ptx.base import WARP, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, PinnedArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling import parts
from bitnet_numba.kernels.sampling.parts import ID_BITS, LOWEST, MAX_VOCAB
from bitnet_numba.sampling_params import MAX_LOGPROBS

THREADS = 1024
RECORD = 1 + MAX_LOGPROBS
MAX_LISTED = MAX_LOGPROBS * (MAX_VOCAB // THREADS)  # 40 KB of shared memory
LOADS = 8  # of a thread in flight
NONE = -1  # in place of how many of the most likely tokens are wanted: no record


def make_logprobs(arch: int, threads: int = THREADS) -> Callable[..., None]:
    """The kernel, for up to MAX_LISTED / MAX_LOGPROBS * threads tokens."""
    wait = ptx.pdl_wait(arch)
    WARPS = threads // WARP

    def logprobs(logits, vocab_size, slot_positions, ahead, tokens, tokens_stride, wanted, ids, values, ring_size):
        listed_s = ptx.pointer(cuda.shared.array(MAX_LISTED, int64))
        keys_s = ptx.pointer(cuda.shared.array(WARPS, int64))
        sums_s = ptx.pointer(cuda.shared.array(WARPS, float32))
        length_s = cuda.shared.array(1, int32)
        x_r = cuda.local.array(LOADS, float32)
        tid = int32(cuda.threadIdx.x)
        warp, lane = int32(tid // WARP), int32(tid % WARP)
        row = int32(cuda.blockIdx.x)
        wait()
        slot = slot_positions[2 * row]
        if slot < 0:
            return
        k = wanted[slot]
        if k < 0:
            return
        k = min(k, vocab_size)
        pos = int32(slot_positions[2 * row + 1] + ahead)
        x_rd = int64(row) * vocab_size

        # 1. The largest.
        top, top_id = LOWEST, int32(vocab_size)
        for first in range(tid, vocab_size, threads * LOADS):
            for u in range(LOADS):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab_size else LOWEST
            for u in range(LOADS):
                token = int32(first + u * threads)
                if token < vocab_size and (x_r[u] > top or top_id == vocab_size):
                    top, top_id = x_r[u], token
        own = parts.key_of(top, top_id) if top_id < vocab_size else int64(0)
        best = parts.block_best(own, keys_s, warp, lane, WARPS)
        largest = parts.unordered(uint32(best >> ID_BITS))

        # The k-th largest of the threads' largest.
        least = best
        for _ in range(k):
            cuda.syncthreads()
            least = parts.block_best(own, keys_s, warp, lane, WARPS)
            if own == least:
                own = int64(0)
        if tid == 0:
            length_s[0] = int32(0)
        cuda.syncthreads()

        # 2. The sum, and the list.
        total = float32(0)
        for first in range(tid, vocab_size, threads * LOADS):
            for u in range(LOADS):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab_size else LOWEST
            for u in range(LOADS):
                token = int32(first + u * threads)
                if token < vocab_size:
                    total = float32(total + float32(math.exp(ptx.add_rn(x_r[u], -largest))))
                    key = parts.key_of(x_r[u], token)
                    if k > 0 and key >= least:
                        wr = cuda.atomic.add(length_s, 0, int32(1))
                        if wr < MAX_LISTED:
                            listed_s[wr] = key
        total = ptx.warp_sum(total)
        if lane == 0:
            sums_s[warp] = total
        cuda.syncthreads()
        total = ptx.warp_sum(sums_s[lane] if lane < WARPS else float32(0))
        shift = float32(math.log(total))

        # 3. The record.
        record = int64(pos % ring_size if ring_size > 0 else row) * RECORD
        length = min(length_s[0], int32(MAX_LISTED))
        for i in range(k):
            own = int64(0)
            for j in range(tid, length, threads):
                if listed_s[j] < least or i == 0:
                    own = max(own, listed_s[j])
            cuda.syncthreads()
            least = parts.block_best(own, keys_s, warp, lane, WARPS)
            if tid == 0:
                ids[record + 1 + i] = int32(parts.token_of(least))
                values[record + 1 + i] = ptx.add_rn(
                    ptx.add_rn(parts.unordered(uint32(least >> ID_BITS)), -largest), -shift
                )
        if tid == 0:
            token = tokens[int64(slot) * tokens_stride + pos]
            values[record] = ptx.add_rn(ptx.add_rn(logits[x_rd + token], -largest), -shift)
            cuda.threadfence_system()
            ids[record] = pos

    return logprobs


def spec(arch: int, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (f32, types.int32, i32, types.int32, i32, types.int32, i32, i32, f32, types.int32)
    return KernelSpec(f"logprobs[{threads}]", make_logprobs(arch, threads), signature, threads)


def logprobs(
    device: Device,
    logits: DeviceArray,
    vocab_size: int,
    sequences: SequenceArrays,
    slot_positions: DeviceArray,
    ahead: int,
    wanted: DeviceArray,
    ids: DeviceArray | PinnedArray,
    values: DeviceArray | PinnedArray,
    num_rows: int,
    ring_size: int = 0,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that tells, for each row, the log probability of a token and the most likely tokens in its place.

    logits float32 [num_rows, vocab_size]. slot_positions int32 [num_rows, 2]: a row's slot (-1: the row is skipped) and
    a position; the token is the slot's at that position + ahead. wanted int32 [slots]: how many of the most likely
    tokens, up to MAX_LOGPROBS; NONE: no record. ids int32, values float32 [num_rows, RECORD], or with ring_size
    [ring_size, RECORD]: then the record for position p is p % ring_size. Raises ValueError in one line for a vocabulary
    that is too large, no rows, and operands of other types or smaller sizes.
    """
    if num_rows < 1 or not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"logprobs: at least one row and 1 to {MAX_VOCAB} tokens are needed, not {num_rows} x {vocab_size}"
        )
    problem = f"a batch of {num_rows} rows of {vocab_size}"
    (position,) = checked("logprobs", problem, position=(sequences.position, 1, "int32"))
    slots, records = position.size, (ring_size or num_rows) * RECORD
    for name, array, dtype in (("ids", ids, "int32"), ("values", values, "float32")):
        if array.dtype != dtype or array.size < records:
            raise ValueError(f"logprobs: {name} must be {dtype} [{records}], not {array.dtype} [{array.size}]")
    logits, slot_positions, tokens, wanted = checked(
        "logprobs",
        problem,
        logits=(logits, num_rows * vocab_size, "float32"),
        slot_positions=(slot_positions, 2 * num_rows, "int32"),
        tokens=(sequences.tokens, slots * sequences.tokens_stride, "int32"),
        wanted=(wanted, slots, "int32"),
    )
    arguments = (
        logits, vocab_size, slot_positions, ahead, tokens, sequences.tokens_stride, wanted, ids, values, ring_size
    )  # fmt: skip
    return device.launch(spec(device.arch), num_rows, arguments, use_pdl)
