"""Embedding look-up of the tokens that a pass feeds, and what begins and ends a pass.

    h[j] = row[token][j]   (floats, widened; int8 rows * scale[token]; or ternary rows * scale[token, j // 128])

A token is tokens[position] of its slot, in device memory: a prompt token that the host stored there or the sampler's
choice. Every token that is fed passes here, so its bit in `seen`, which the samplers' repetition penalty reads, is set
here. A few kilobytes: the launch is all latency, so one thread a column is the simplest split. Its reads depend on the
sampler's result, so there is nothing to load before `pdl_wait`.

    embed_token     one token of one sequence
    embed_tokens    a pass of many tokens. `slot_positions` tells the kernels that follow which slot and position each
                    is: written here where the tokens are the next ones of many sequences, given for those of prompts.
                    A pass of fixed size may have tokens to spare: they have slot -1, and zeros for an embedding
    gather_last     ends passes over prompts: copies the hidden states of the prompts' last tokens, the only ones that
                    the LM head and the sampler need, and the tokens' slots and positions
    scale           multiplies the embeddings by a factor, in models that do
    advance         ends a step without a sampler: moves the position on by one

    grid            x: columns, THREADS to a block      y (embed_tokens): tokens
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.operands import EmbeddingTable, RowFormat, SequenceArrays, checked
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_OFFSET, GROUP_COLS

THREADS = 256
BLOCK_WORDS = BLOCK_ROWS * BLOCK_COLS // 16  # int32 of a block of ternary weights


@device_function
def bf16_element(rows, scale, token, columns, j):
    """Element j of a token's bfloat16 row."""
    return ptx.bits_to_float(uint32(uint32(rows[int64(token) * columns + j]) << uint32(16)))


@device_function
def f16_element(rows, scale, token, columns, j):
    """Element j of a token's float16 row."""
    return ptx.f16_low(int32(rows[int64(token) * columns + j]))


@device_function
def f32_element(rows, scale, token, columns, j):
    """Element j of a token's float32 row."""
    return rows[int64(token) * columns + j]


@device_function
def int8_element(rows, scale, token, columns, j):
    """Element j of a token's int8 row, scaled."""
    return ptx.mul_rn(ptx.int_to_float(int32(rows[int64(token) * columns + j])), scale[token])


@device_function
def ternary_element(rows, scale, token, columns, j):
    """Element j of a token's ternary row, scaled; see `packing` for where its code and its group's scale are."""
    row_block, r = int64(token >> 4), int32(token & (BLOCK_ROWS - 1))
    blocks, groups = int32(columns + (BLOCK_COLS - 1)) >> 5, int32(columns + (GROUP_COLS - 1)) >> 7
    word = rows[(row_block * blocks + (j >> 5)) * BLOCK_WORDS + (16 * (r >> 3) + 8 * (j >> 4 & 1) + (r & 7))]
    code = int32(word >> 2 * (4 * (j & 3) + (j >> 2 & 3)) & 3)
    group_scale = ptx.f16_low(int32(scale[(row_block * groups + (j >> 7)) * BLOCK_ROWS + r]))
    return ptx.mul_rn(ptx.int_to_float(int32(code - CODE_OFFSET)), group_scale)


# How an element is read, and the types of rows and scales in memory; where there are no scales, any address serves.
ELEMENTS: dict[RowFormat, tuple[Any, Any, Any]] = {
    "bf16": (bf16_element, types.uint16, types.float32),
    "f16": (f16_element, types.uint16, types.float32),
    "f32": (f32_element, types.float32, types.float32),
    "int8": (int8_element, types.int8, types.float32),
    "ternary": (ternary_element, types.int32, types.uint16),
}


def make_embed_token(arch: int, row_format: RowFormat, threads: int = THREADS) -> Callable[..., None]:
    """The kernel for rows of a format."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    element, _, _ = ELEMENTS[row_format]

    def embed_token(rows, scale, tokens, position, seen, h, columns):
        trigger()
        wait()
        token = tokens[position[0]]
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        if j < columns:
            h[j] = element(rows, scale, token, columns, j)
        if j == 0:
            seen[token >> 5] = int32(seen[token >> 5] | int32(1) << (token & 31))

    return embed_token


def make_embed_tokens(arch: int, row_format: RowFormat, prompt: bool, threads: int = THREADS) -> Callable[..., None]:
    """The kernel for rows of a format; `prompt`: `slot_positions` is given."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    element, _, _ = ELEMENTS[row_format]
    PROMPT = prompt

    def embed_tokens(
        rows, scale, tokens, tokens_stride, position, slot_ids, seen, seen_stride, h, slot_positions, columns
    ):
        trigger()
        wait()
        m = int32(cuda.blockIdx.y)
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        slot = slot_positions[2 * m] if PROMPT else slot_ids[m]
        pos = int32(0)
        value = float32(0)
        if slot >= 0:
            pos = slot_positions[2 * m + 1] if PROMPT else position[slot]
            token = tokens[int64(slot) * tokens_stride + pos]
            if j < columns:
                value = element(rows, scale, token, columns, j)
            if j == 0:  # several tokens may set bits of one word
                ptx.atomic_or(seen, int64(slot) * seen_stride + (token >> 5), int32(1) << (token & 31))
        if j < columns:
            h[int64(m) * columns + j] = value
        if j == 0 and not PROMPT:
            slot_positions[2 * m] = max(slot, int32(-1))
            slot_positions[2 * m + 1] = pos

    return embed_tokens


def make_gather_last(arch: int, threads: int = THREADS) -> Callable[..., None]:
    """The kernel that ends passes over prompts."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)

    def gather_last(row_ids, h, slot_positions, last, last_slot_positions, columns):
        trigger()
        wait()
        i = int32(cuda.blockIdx.y)
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        row = row_ids[i]
        if row >= 0 and j < columns:
            last[int64(i) * columns + j] = h[int64(row) * columns + j]
        if j == 0:
            last_slot_positions[2 * i] = slot_positions[2 * row] if row >= 0 else int32(-1)
            last_slot_positions[2 * i + 1] = slot_positions[2 * row + 1] if row >= 0 else int32(0)

    return gather_last


def make_advance(arch: int) -> Callable[..., None]:
    """The kernel that ends a step without a sampler."""
    wait = ptx.pdl_wait(arch)

    def advance(position):
        wait()
        if cuda.threadIdx.x == 0:
            position[0] = int32(position[0] + 1)

    return advance


def make_scale(arch: int, threads: int = THREADS) -> Callable[..., None]:
    """The kernel."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)

    def scale(h, size, factor):
        trigger()
        wait()
        i = int64(cuda.blockIdx.x) * threads + int32(cuda.threadIdx.x)
        if i < size:
            h[i] = ptx.mul_rn(h[i], factor)

    return scale


@cache
def embed_token_spec(arch: int, row_format: RowFormat, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    i32, f32 = types.CPointer(types.int32), types.CPointer(types.float32)
    rows, scale = map(types.CPointer, ELEMENTS[row_format][1:])
    name = f"embed_token[{row_format}, {threads}]"
    signature = (rows, scale, i32, i32, i32, f32, types.int32)
    return KernelSpec(name, make_embed_token(arch, row_format, threads), signature, threads)


@cache
def embed_tokens_spec(arch: int, row_format: RowFormat, prompt: bool, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    i32, f32 = types.CPointer(types.int32), types.CPointer(types.float32)
    rows, scale = map(types.CPointer, ELEMENTS[row_format][1:])
    name = f"embed_tokens[{row_format}, {'prompt' if prompt else 'decode'}, {threads}]"
    signature = (rows, scale, i32, types.int32, i32, i32, i32, types.int32, f32, i32, types.int32)
    return KernelSpec(name, make_embed_tokens(arch, row_format, prompt, threads), signature, threads)


@cache
def gather_last_spec(arch: int, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    i32, f32 = types.CPointer(types.int32), types.CPointer(types.float32)
    signature = (i32, f32, i32, f32, i32, types.int32)
    return KernelSpec(f"gather_last[{threads}]", make_gather_last(arch, threads), signature, threads)


@cache
def advance_spec(arch: int) -> KernelSpec:
    """The variant: one warp."""
    return KernelSpec("advance", make_advance(arch), (types.CPointer(types.int32),), WARP)


@cache
def scale_spec(arch: int, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    signature = (types.CPointer(types.float32), types.int64, types.float32)
    return KernelSpec(f"scale[{threads}]", make_scale(arch, threads), signature, threads)


def column_blocks(columns: int, threads: int = THREADS) -> int:
    """Blocks of a launch along x."""
    return -(-columns // threads)


def embed_token(
    device: Device, table: EmbeddingTable, sequence: SequenceArrays, h: DeviceArray, *, use_pdl: bool = True
) -> Launch:
    """The launch that looks up tokens[position[0]] of a sequence and sets its bit in `seen`.

    sequence: of one slot; h float32 [columns]. Raises ValueError in one line for operands of other types or smaller
    sizes.
    """
    columns, problem = table.columns, f"a table of {table.vocab_size} rows of {table.columns}"
    rows, scale, tokens, position, seen, h = checked(
        "embed_token",
        problem,
        **table.sizes(),
        tokens=(sequence.tokens, sequence.tokens_stride, "int32"),
        position=(sequence.position, 1, "int32"),
        seen=(sequence.seen, -(-table.vocab_size // 32), "int32"),
        h=(h, columns, "float32"),
    )
    arguments = (rows, h if scale is None else scale, tokens, position, seen, h, columns)
    return device.launch(embed_token_spec(device.arch, table.format), column_blocks(columns), arguments, use_pdl)


def embed_tokens(
    device: Device,
    table: EmbeddingTable,
    sequences: SequenceArrays,
    slot_ids: DeviceArray | None,
    h: DeviceArray,
    slot_positions: DeviceArray,
    num_tokens: int,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that looks up the tokens of a pass of `num_tokens`, and sets their bits in `seen`.

    slot_ids: int32 [num_tokens], where the pass feeds the next token of each of these slots, at the slot's position (or
    none if the slot is -1): slot_positions, int32 [num_tokens, 2], becomes slot (-1: to spare) and position of each.
    None: slot_positions says which tokens of which slots these are; of slot -1, they are to spare. h float32
    [num_tokens, columns]. Raises ValueError in one line for operands of other types or smaller sizes.
    """
    columns, problem = table.columns, f"a pass of {num_tokens} tokens with rows of {table.columns}"
    prompt, seen_words = slot_ids is None, -(-table.vocab_size // 32)
    (position,) = checked("embed_tokens", problem, position=(sequences.position, 1, "int32"))
    slots = position.size
    if num_tokens < 1:
        raise ValueError(f"embed_tokens: at least one token is needed, not {num_tokens}")
    if sequences.seen_stride < seen_words:
        raise ValueError(f"embed_tokens: seen has {sequences.seen_stride} words a slot, {seen_words} are needed")
    rows, scale, tokens, slot_ids, seen, h, slot_positions = checked(
        "embed_tokens",
        problem,
        **table.sizes(),
        tokens=(sequences.tokens, slots * sequences.tokens_stride, "int32"),
        slot_ids=(slot_ids, num_tokens, "int32"),
        seen=(sequences.seen, slots * sequences.seen_stride, "int32"),
        h=(h, num_tokens * columns, "float32"),
        slot_positions=(slot_positions, 2 * num_tokens, "int32"),
    )
    # The slots of a pass over prompts are not read: any address serves.
    arguments = (
        rows, h if scale is None else scale, tokens, sequences.tokens_stride, position,
        slot_positions if prompt else slot_ids, seen, sequences.seen_stride, h, slot_positions, columns,
    )  # fmt: skip
    spec = embed_tokens_spec(device.arch, table.format, prompt)
    return device.launch(spec, (column_blocks(columns), num_tokens), arguments, use_pdl)


def gather_last(
    device: Device,
    row_ids: DeviceArray,
    h: DeviceArray,
    slot_positions: DeviceArray,
    last: DeviceArray,
    last_slot_positions: DeviceArray,
    num_rows: int,
    columns: int,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that copies rows of a pass: last[i] = h[row_ids[i]], and the same of slot_positions. Where the row is
    -1, nothing is copied and the slot becomes -1.

    row_ids int32 [num_rows]; h float32 [tokens of the pass, columns]; slot_positions int32 [tokens of the pass, 2];
    last float32 [num_rows, columns]; last_slot_positions int32 [num_rows, 2], as `sample_batch` takes it. Raises
    ValueError in one line unless there is a row, and for operands of other types or smaller sizes.
    """
    if num_rows < 1:
        raise ValueError(f"gather_last: at least one row is needed, not {num_rows}")
    row_ids, h, slot_positions, last, last_slot_positions = checked(
        "gather_last",
        f"{num_rows} rows of {columns}",
        row_ids=(row_ids, num_rows, "int32"),
        h=(h, columns, "float32"),
        slot_positions=(slot_positions, 2, "int32"),
        last=(last, num_rows * columns, "float32"),
        last_slot_positions=(last_slot_positions, 2 * num_rows, "int32"),
    )
    arguments = (row_ids, h, slot_positions, last, last_slot_positions, columns)
    return device.launch(gather_last_spec(device.arch), (column_blocks(columns), num_rows), arguments, use_pdl)


def advance(device: Device, position: DeviceArray, *, use_pdl: bool = True) -> Launch:
    """The launch that moves position[0], int32, on by one. Raises ValueError in one line for another array."""
    (position,) = checked("advance", "a step", position=(position, 1, "int32"))
    return device.launch(advance_spec(device.arch), 1, (position,), use_pdl)


def scale(device: Device, h: DeviceArray, size: int, factor: float, *, use_pdl: bool = True) -> Launch:
    """The launch that multiplies h, float32 [size], by a factor. Raises ValueError in one line for another array."""
    (h,) = checked("scale", f"{size} elements", h=(h, size, "float32"))
    return device.launch(scale_spec(device.arch), column_blocks(size), (h, size, factor), use_pdl)
