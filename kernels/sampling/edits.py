"""Edits of logits before sampling: bias, presence and frequency penalty, tokens that may not come.

What `bitnet_numba.sampling.logit_edits` adds and its mask takes out, in a copy of each row of logits float32
[num_rows, vocab_size]: the samplers read the copy, and log probabilities are of what the model said.

    grid: a block a row; a row's settings, lists and tokens are its slot's
    1. copies the row, with -inf for the tokens that its mask does not allow, if its sequence has masks (see `Grammar`);
       what later steps write is masked, too. NaN stays, for the sampler to see
    2. counts the tokens of the answer so far (tokens[prompt length .. position]): their places in the copy become 0,
       then 1 is added for each time that a token comes (whole numbers: exact in any order)
    3. logit + ((bias - presence) - frequency * count) for tokens of the answer. Who finds a token's bit in a bit set in
       shared memory unset is the one thread that does so for this token, and nobody else touches its place any more
    4. logit + bias for biased tokens that are not in the answer
    5. -inf for the tokens that end an answer, while it is shorter than it has to be

Nothing is kept from step to step, so whatever becomes of a sequence between two steps, the edits are right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.operands import SequenceArrays, checked
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling.parts import MAX_VOCAB
from bitnet_numba.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams

THREADS = 1024
WORDS = MAX_VOCAB // 32  # 32 KB of shared memory
LOADS = 8  # of a thread in flight

# Settings, float64, and lists of a slot. Lists: biased tokens by rising ids, then those that end an answer.
PRESENCE, FREQUENCY, PROMPT_LENGTH, MIN_LENGTH, NUM_BIASED, NUM_ENDS, MASKED = range(7)
SETTINGS = 7
MAX_LISTED = MAX_LOGIT_BIAS + MAX_STOP_TOKENS


@dataclass(frozen=True)
class EditArrays:
    """What is done to the logits of each slot's sequence, and masks of a step's rows."""

    settings: Any  # float64 [slots, SETTINGS]
    listed: Any  # int32 [slots, MAX_LISTED]: tokens with a bias, and from MAX_LOGIT_BIAS on those that end an answer
    biases: Any  # float32 [slots, MAX_LOGIT_BIAS]
    masks: Any  # int32 [masks, vocab_size / 32]: a token may come if bit token % 32 of word token // 32 is set
    mask_ids: Any  # int32 [rows]: each row's mask; read of rows whose sequence is MASKED only


def pack_edits(
    params: SamplingParams, prompt_length: int, masked: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slot's part of `EditArrays`: settings, listed, biases. masked: each of its rows comes with a mask."""
    listed, biases = np.zeros(MAX_LISTED, np.int32), np.zeros(MAX_LOGIT_BIAS, np.float32)
    num_biased, num_ends = len(params.biases), len(params.ends)
    listed[:num_biased] = [token for token, _ in params.biases]
    biases[:num_biased] = [bias for _, bias in params.biases]
    listed[MAX_LOGIT_BIAS : MAX_LOGIT_BIAS + num_ends] = params.ends
    min_length = prompt_length + params.min_tokens
    penalties = params.presence_penalty, params.frequency_penalty
    values = (*penalties, prompt_length, min_length, num_biased, num_ends, masked)
    return np.array(values, np.float64), listed, biases


@device_function
def find(listed, first, count, token):
    """The place of a token in a rising list, or -1."""
    low, high = int32(0), int32(count)
    while low < high:
        middle = int32((low + high) // 2)
        if listed[first + middle] < token:
            low = int32(middle + 1)
        else:
            high = middle
    if low < count and listed[first + low] == token:
        return low
    return int32(-1)


@device_function
def masked(x, word, token):
    """A logit, or -inf if the token's bit in its word of a mask is not set; NaN stays."""
    if word >> (token & 31) & 1 == 0 and x == x:
        return float32(-np.inf)
    return x


@device_function
def mask_word(masks, mask_rd, token):
    """A token's word of a mask; without a mask (mask_rd < 0) one that allows all."""
    return masks[mask_rd + (token >> 5)] if mask_rd >= 0 else int32(-1)


def make_edit_logits(arch: int, threads: int = THREADS) -> Callable[..., None]:
    """The kernel."""
    wait = ptx.pdl_wait(arch)

    def edit_logits(
        logits, vocab_size, slot_positions, tokens, tokens_stride, settings, listed, biases, masks, mask_ids, edited
    ):
        seen_s = cuda.shared.array(WORDS, int32)
        x_r = cuda.local.array(LOADS, float32)
        mask_r = cuda.local.array(LOADS, int32)
        tid = int32(cuda.threadIdx.x)
        row = int32(cuda.blockIdx.x)
        wait()
        slot = slot_positions[2 * row]
        if slot < 0:
            return
        length = int32(slot_positions[2 * row + 1] + 1)
        setting = int64(slot) * SETTINGS
        presence, frequency = float32(settings[setting + PRESENCE]), float32(settings[setting + FREQUENCY])
        prompt_length = int32(settings[setting + PROMPT_LENGTH])
        num_biased, num_ends = int32(settings[setting + NUM_BIASED]), int32(settings[setting + NUM_ENDS])
        count = int32(0)  # tokens of the answer, where they matter
        if presence != float32(0) or frequency != float32(0):
            count = max(int32(0), int32(length - prompt_length))
        x_rd = int64(row) * vocab_size
        tokens_rd = int64(slot) * tokens_stride + prompt_length
        listed_rd, biases_rd = int64(slot) * MAX_LISTED, int64(slot) * MAX_LOGIT_BIAS
        mask_rd = int64(-1)
        if settings[setting + MASKED] != 0.0:
            mask_rd = int64(mask_ids[row]) * ((vocab_size + 31) // 32)

        # 1. The copy.
        for first in range(tid, vocab_size, threads * LOADS):
            for u in range(LOADS):
                token = int32(first + u * threads)
                x_r[u] = logits[x_rd + token] if token < vocab_size else float32(0)
                mask_r[u] = mask_word(masks, mask_rd, token) if token < vocab_size else int32(-1)
            for u in range(LOADS):
                token = int32(first + u * threads)
                if token < vocab_size:
                    edited[x_rd + token] = masked(x_r[u], mask_r[u], token)
        if count > 0 or num_biased > 0:
            for word in range(tid, (vocab_size + 31) // 32, threads):
                seen_s[word] = int32(0)
        cuda.syncthreads()

        # 2. Counts.
        for i in range(tid, count, threads):
            edited[x_rd + tokens[tokens_rd + i]] = float32(0)
        cuda.syncthreads()
        for i in range(tid, count, threads):
            ptx.atomic_add_f32(edited, x_rd + tokens[tokens_rd + i], float32(1))
        cuda.syncthreads()

        # 3. Tokens of the answer.
        for i in range(tid, count, threads):
            token = tokens[tokens_rd + i]
            bit = int32(int32(1) << (token & 31))
            if cuda.atomic.or_(seen_s, token >> 5, bit) & bit == 0:
                place = find(listed, listed_rd, num_biased, token)
                delta = biases[biases_rd + place] if place >= 0 else float32(0)
                delta = ptx.add_rn(delta, -presence)
                delta = ptx.add_rn(delta, -ptx.mul_rn(frequency, edited[x_rd + token]))
                x = ptx.add_rn(logits[x_rd + token], delta)
                edited[x_rd + token] = masked(x, mask_word(masks, mask_rd, token), token)
        cuda.syncthreads()

        # 4. Biased tokens that are not in the answer.
        for i in range(tid, num_biased, threads):
            token = listed[listed_rd + i]
            if seen_s[token >> 5] >> (token & 31) & 1 == 0:
                x = ptx.add_rn(logits[x_rd + token], biases[biases_rd + i])
                edited[x_rd + token] = masked(x, mask_word(masks, mask_rd, token), token)
        cuda.syncthreads()

        # 5. Tokens that may not come yet.
        if length < int32(settings[setting + MIN_LENGTH]):
            for i in range(tid, num_ends, threads):
                token = listed[listed_rd + MAX_LOGIT_BIAS + i]
                edited[x_rd + token] = ptx.add_rn(logits[x_rd + token], float32(-np.inf))

    return edit_logits


@cache
def spec(arch: int, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    f32, f64, i32 = (types.CPointer(kind) for kind in (types.float32, types.float64, types.int32))
    signature = (f32, types.int32, i32, i32, types.int32, f64, i32, f32, i32, i32, f32)
    return KernelSpec(f"edit_logits[{threads}]", make_edit_logits(arch, threads), signature, threads)


def edit_logits(
    device: Device,
    logits: DeviceArray,
    vocab_size: int,
    sequences: SequenceArrays,
    slot_positions: DeviceArray,
    edits: EditArrays,
    edited: DeviceArray,
    num_rows: int,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that copies rows of logits to `edited`, with the edits of each row's slot.

    logits, edited float32 [num_rows, vocab_size]; slot_positions int32 [num_rows, 2]: a row's slot (-1: the row is
    skipped) and the position that it fed. Raises ValueError in one line for a vocabulary that is too large, no rows,
    and operands of other types or smaller sizes.
    """
    if num_rows < 1 or not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"edit_logits: at least one row and 1 to {MAX_VOCAB} tokens are needed, not {num_rows} x {vocab_size}"
        )
    problem = f"a batch of {num_rows} rows of {vocab_size}"
    (position,) = checked("edit_logits", problem, position=(sequences.position, 1, "int32"))
    slots, size = position.size, num_rows * vocab_size
    logits, slot_positions, tokens, settings, listed, biases, masks, mask_ids, edited = checked(
        "edit_logits",
        problem,
        logits=(logits, size, "float32"),
        slot_positions=(slot_positions, 2 * num_rows, "int32"),
        tokens=(sequences.tokens, slots * sequences.tokens_stride, "int32"),
        settings=(edits.settings, slots * SETTINGS, "float64"),
        listed=(edits.listed, slots * MAX_LISTED, "int32"),
        biases=(edits.biases, slots * MAX_LOGIT_BIAS, "float32"),
        masks=(edits.masks, -(-vocab_size // 32), "int32"),
        mask_ids=(edits.mask_ids, num_rows, "int32"),
        edited=(edited, size, "float32"),
    )
    arguments = (
        logits, vocab_size, slot_positions, tokens, sequences.tokens_stride, settings, listed, biases, masks, mask_ids,
        edited,
    )  # fmt: skip
    return device.launch(spec(device.arch), num_rows, arguments, use_pdl)
