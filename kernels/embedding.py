"""Embedding look-up of the tokens that a pass feeds, and what begins and ends a pass.

    h[j] = row[token][j]   (bfloat16 rows, widened; or int8 rows * scale[token])

A token is tokens[position] of its slot, in device memory: a prompt token that the host stored there or the sampler's
choice. Every token that is fed passes here, so its bit in `seen`, which the samplers' repetition penalty reads, is set
here. A few kilobytes: the launch is all latency, so one thread a column is the simplest split. Its reads depend on the
sampler's result, so there is nothing to load before `pdl_wait`.

    embed_token     one token of one sequence
    embed_tokens    a pass of many tokens: a prompt's, or one of each of many sequences. Also tells the kernels that
                    follow which slot and position each is (`slot_positions`). A pass of fixed size may have tokens to
                    spare: they have slot -1, and zeros for an embedding
    finish_prompt   ends a pass over a prompt: moves the slot's position on, and copies the last token's hidden state,
                    the only one that the LM head and the sampler need
    advance         ends a step without a sampler: moves the position on by one

    grid            x: columns, THREADS to a block      y (embed_tokens): tokens
"""

from collections.abc import Callable

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.operands import EmbeddingTable, SequenceArrays, checked
from bitnet_numba.kernels.ptx.base import WARP, device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

THREADS = 256


@device_function
def bf16_element(rows, scale, token, columns, j):
    """Element j of a token's bfloat16 row."""
    return ptx.bits_to_float(uint32(uint32(rows[int64(token) * columns + j]) << uint32(16)))


@device_function
def int8_element(rows, scale, token, columns, j):
    """Element j of a token's int8 row, scaled."""
    return ptx.mul_rn(ptx.int_to_float(int32(rows[int64(token) * columns + j])), scale[token])


def make_embed_token(arch: int, int8: bool, threads: int = THREADS) -> Callable[..., None]:
    """The kernel for bfloat16 or int8 rows."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    element = int8_element if int8 else bf16_element

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


def make_embed_tokens(arch: int, int8: bool, prompt: bool, threads: int = THREADS) -> Callable[..., None]:
    """The kernel for bfloat16 or int8 rows; `prompt`: the tokens are neighbours in one slot."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    element = int8_element if int8 else bf16_element
    PROMPT = prompt

    def embed_tokens(
        rows, scale, tokens, tokens_stride, position, slot_ids, count, seen, seen_stride, h, slot_positions, columns
    ):
        trigger()
        wait()
        m = int32(cuda.blockIdx.y)
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        if PROMPT:
            slot = slot_ids[0] if m < count[0] else int32(-1)
        else:
            slot = slot_ids[m]
        pos = int32(0)
        value = float32(0)
        if slot >= 0:
            pos = int32(position[slot] + m) if PROMPT else position[slot]
            token = tokens[int64(slot) * tokens_stride + pos]
            if j < columns:
                value = element(rows, scale, token, columns, j)
            if j == 0:  # several tokens may set bits of one word
                ptx.atomic_or(seen, int64(slot) * seen_stride + (token >> 5), int32(1) << (token & 31))
        if j < columns:
            h[int64(m) * columns + j] = value
        if j == 0:
            slot_positions[2 * m] = max(slot, int32(-1))
            slot_positions[2 * m + 1] = pos

    return embed_tokens


def make_finish_prompt(arch: int, threads: int = THREADS) -> Callable[..., None]:
    """The kernel that ends a pass over a prompt."""
    wait, trigger = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)

    def finish_prompt(count, slot_ids, position, keep, h, last, slot_positions, columns):
        trigger()
        wait()
        fed = count[0]
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        if fed > 0:
            if j < columns:
                last[j] = h[int64(fed - 1) * columns + j]
            if j == 0:
                slot = slot_ids[0]
                position[slot] = int32(position[slot] + fed - keep)
                slot_positions[0], slot_positions[1] = slot, position[slot]

    return finish_prompt


def make_advance(arch: int) -> Callable[..., None]:
    """The kernel that ends a step without a sampler."""
    wait = ptx.pdl_wait(arch)

    def advance(position):
        wait()
        if cuda.threadIdx.x == 0:
            position[0] = int32(position[0] + 1)

    return advance


def embed_token_spec(arch: int, int8: bool, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    i32, f32 = types.CPointer(types.int32), types.CPointer(types.float32)
    rows = types.CPointer(types.int8 if int8 else types.uint16)
    name = f"embed_token[{'int8' if int8 else 'bf16'}, {threads}]"
    signature = (rows, f32, i32, i32, i32, f32, types.int32)
    return KernelSpec(name, make_embed_token(arch, int8, threads), signature, threads)


def embed_tokens_spec(arch: int, int8: bool, prompt: bool, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    i32, f32 = types.CPointer(types.int32), types.CPointer(types.float32)
    rows = types.CPointer(types.int8 if int8 else types.uint16)
    name = f"embed_tokens[{'int8' if int8 else 'bf16'}, {'prompt' if prompt else 'decode'}, {threads}]"
    signature = (rows, f32, i32, types.int32, i32, i32, i32, i32, types.int32, f32, i32, types.int32)
    return KernelSpec(name, make_embed_tokens(arch, int8, prompt, threads), signature, threads)


def finish_prompt_spec(arch: int, threads: int = THREADS) -> KernelSpec:
    """The variant; `threads` differs in tests only."""
    i32, f32 = types.CPointer(types.int32), types.CPointer(types.float32)
    signature = (i32, i32, i32, types.int32, f32, f32, i32, types.int32)
    return KernelSpec(f"finish_prompt[{threads}]", make_finish_prompt(arch, threads), signature, threads)


def advance_spec(arch: int) -> KernelSpec:
    """The variant: one warp."""
    return KernelSpec("advance", make_advance(arch), (types.CPointer(types.int32),), WARP)


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
    # The kernel of bfloat16 rows reads no scale: any address serves.
    arguments = (rows, scale if table.int8 else h, tokens, position, seen, h, columns)
    return device.launch(embed_token_spec(device.arch, table.int8), column_blocks(columns), arguments, use_pdl)


def embed_tokens(
    device: Device,
    table: EmbeddingTable,
    sequences: SequenceArrays,
    slot_ids: DeviceArray,
    count: DeviceArray | None,
    h: DeviceArray,
    slot_positions: DeviceArray,
    num_tokens: int,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that looks up the tokens of a pass of `num_tokens`, and sets their bits in `seen`.

    With count, int32 [1], the pass is a prompt's: token m < count[0] is that of slot slot_ids[0] at position[slot] + m,
    and the others are to spare. Without, token m is that of slot slot_ids[m] at its position, or to spare if the slot
    is -1. slot_ids int32 [num_tokens], of a prompt [1]; h float32 [num_tokens, columns]; slot_positions int32
    [num_tokens, 2] becomes slot (-1 to spare) and position of each. Raises ValueError in one line for operands of other
    types or smaller sizes.
    """
    columns, problem = table.columns, f"a pass of {num_tokens} tokens with rows of {table.columns}"
    prompt, seen_words = count is not None, -(-table.vocab_size // 32)
    (position,) = checked("embed_tokens", problem, position=(sequences.position, 1, "int32"))
    slots = position.size
    if num_tokens < 1:
        raise ValueError(f"embed_tokens: at least one token is needed, not {num_tokens}")
    if sequences.seen_stride < seen_words:
        raise ValueError(f"embed_tokens: seen has {sequences.seen_stride} words a slot, {seen_words} are needed")
    rows, scale, tokens, slot_ids, count, seen, h, slot_positions = checked(
        "embed_tokens",
        problem,
        **table.sizes(),
        tokens=(sequences.tokens, slots * sequences.tokens_stride, "int32"),
        slot_ids=(slot_ids, 1 if prompt else num_tokens, "int32"),
        count=(count, 1, "int32"),
        seen=(sequences.seen, slots * sequences.seen_stride, "int32"),
        h=(h, num_tokens * columns, "float32"),
        slot_positions=(slot_positions, 2 * num_tokens, "int32"),
    )
    # Scales of bfloat16 rows and the count of a decode pass are not read: any address serves.
    arguments = (
        rows, scale if table.int8 else h, tokens, sequences.tokens_stride, position, slot_ids,
        count if prompt else slot_ids, seen, sequences.seen_stride, h, slot_positions, columns,
    )  # fmt: skip
    spec = embed_tokens_spec(device.arch, table.int8, prompt)
    return device.launch(spec, (column_blocks(columns), num_tokens), arguments, use_pdl)


def finish_prompt(
    device: Device,
    count: DeviceArray,
    slot_ids: DeviceArray,
    position: DeviceArray,
    keep: int,
    h: DeviceArray,
    last: DeviceArray,
    slot_positions: DeviceArray,
    columns: int,
    *,
    use_pdl: bool = True,
) -> Launch:
    """The launch that ends a pass over a prompt: position[slot_ids[0]] += count[0] - keep, last = h[count[0] - 1].

    keep: 1 if a sampler follows, which moves the position on by one itself; else 0. count, slot_ids int32 [1]; position
    int32 [slots]; h float32 [tokens of the pass, columns]; last float32 [columns]; slot_positions int32 [1, 2] becomes
    the slot and its new position, as `sample_batch` takes them. Raises ValueError in one line for another `keep` and
    for operands of other types or smaller sizes.
    """
    if keep not in (0, 1):
        raise ValueError(f"finish_prompt: keep must be 0 or 1, not {keep}")
    count, slot_ids, position, h, last, slot_positions = checked(
        "finish_prompt",
        f"a prompt with rows of {columns}",
        count=(count, 1, "int32"),
        slot_ids=(slot_ids, 1, "int32"),
        position=(position, 1, "int32"),
        h=(h, columns, "float32"),
        last=(last, columns, "float32"),
        slot_positions=(slot_positions, 2, "int32"),
    )
    if h.size % columns:
        raise ValueError(f"finish_prompt: h holds {h.size} elements, not whole rows of {columns}")
    arguments = (count, slot_ids, position, keep, h, last, slot_positions, columns)
    return device.launch(finish_prompt_spec(device.arch), column_blocks(columns), arguments, use_pdl)


def advance(device: Device, position: DeviceArray, *, use_pdl: bool = True) -> Launch:
    """The launch that moves position[0], int32, on by one. Raises ValueError in one line for another array."""
    (position,) = checked("advance", "a step", position=(position, 1, "int32"))
    return device.launch(advance_spec(device.arch), 1, (position,), use_pdl)
