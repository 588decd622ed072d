"""Embedding look-up of the tokens that a step feeds, and a note that they have been seen.

    h[j] = row[token][j]   (bfloat16 rows, widened; or int8 rows * scale[token])

The token is tokens[position], in device memory: a prompt token that the host stored there or the sampler's choice. Bits
of `seen` are what the sampler's repetition penalty reads; every token that is fed passes here, so they are set here.
5 KB for 2B4T: the launch is all latency, and one thread a column is the simplest split. Its reads depend on the
sampler's result, so there is nothing to load early.

`embed` looks up one token of one sequence. `embed_many` begins a pass of many rows: it also tells the kernels after it
which slot (sequence) and position each row is, `where`. Rows that a pass of fixed size has to spare are slot -1 and
hold zeros. `finish_prompt` ends a pass over a prompt: it moves the slot's position on and hands on its last row, of
which alone the head and the sampler want to know.

    grid of embed_many:   x: columns, THREADS a block      y: rows
"""

from collections.abc import Callable

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function, float32, int32, int64, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import KernelSpec

THREADS = 256


@device_function
def _widened_bf16(rows, scale, token, columns, j):
    return ptx.bits_to_float(uint32(uint32(rows[int64(token) * columns + j]) << uint32(16)))


@device_function
def _scaled_int8(rows, scale, token, columns, j):
    return ptx.mul_rn(ptx.int_to_float(int32(rows[int64(token) * columns + j])), scale[token])


def make_embed(arch: int, int8: bool, threads: int = THREADS) -> Callable[..., None]:
    """The kernel for bfloat16 or int8 rows."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    look_up = _scaled_int8 if int8 else _widened_bf16

    def embed(rows, scale, tokens, position, seen, h, columns):
        release()
        wait()
        token = tokens[position[0]]
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        if j < columns:
            h[j] = look_up(rows, scale, token, columns, j)
        if j == 0:
            seen[token >> 5] = int32(seen[token >> 5] | int32(1) << (token & 31))

    return embed


def make_embed_many(arch: int, int8: bool, prompt: bool, threads: int = THREADS) -> Callable[..., None]:
    """The kernel for bfloat16 or int8 rows; `prompt`: rows are neighbouring tokens of one slot."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    look_up = _scaled_int8 if int8 else _widened_bf16
    PROMPT = prompt

    def embed_many(rows, scale, tokens, tokens_stride, position, slots, count, seen, seen_stride, h, where, columns):
        release()
        wait()
        m = int32(cuda.blockIdx.y)
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        if PROMPT:
            slot = slots[0] if m < count[0] else int32(-1)
        else:
            slot = slots[m]
        pos = int32(0)
        value = float32(0)
        if slot >= 0:
            pos = int32(position[slot] + m) if PROMPT else position[slot]
            token = tokens[int64(slot) * tokens_stride + pos]
            if j < columns:
                value = look_up(rows, scale, token, columns, j)
            if j == 0:  # several rows may set bits of one word
                ptx.atomic_or(seen, int64(slot) * seen_stride + (token >> 5), int32(1) << (token & 31))
        if j < columns:
            h[int64(m) * columns + j] = value
        if j == 0:
            where[2 * m] = max(slot, int32(-1))
            where[2 * m + 1] = pos

    return embed_many


def make_finish_prompt(arch: int, threads: int = THREADS) -> Callable[..., None]:
    """The kernel that ends a pass over a prompt."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)

    def finish_prompt(count, slots, position, keep, h, last, where, columns):
        release()
        wait()
        fed = count[0]
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        if fed > 0:
            if j < columns:
                last[j] = h[int64(fed - 1) * columns + j]
            if j == 0:
                slot = slots[0]
                position[slot] = int32(position[slot] + fed - keep)
                where[0], where[1] = slot, position[slot]

    return finish_prompt


def make_advance(arch: int) -> Callable[..., None]:
    """The kernel that ends a step without a sampler: the position moves on by one."""
    wait = ptx.pdl_wait(arch)

    def advance(position):
        wait()
        if cuda.threadIdx.x == 0:
            position[0] = int32(position[0] + 1)

    return advance


def advance_spec(arch: int) -> KernelSpec:
    """The compiled form."""
    return KernelSpec("advance", make_advance(arch), (types.CPointer(types.int32),), 32)


def embed_spec(arch: int, int8: bool, threads: int = THREADS) -> KernelSpec:
    """The compiled form; `threads` only for tests."""
    words, floats = types.CPointer(types.int32), types.CPointer(types.float32)
    rows = types.CPointer(types.int8 if int8 else types.uint16)
    name = f"embed[{'int8' if int8 else 'bf16'}, {threads}]"
    signature = (rows, floats, words, words, words, floats, types.int32)
    return KernelSpec(name, make_embed(arch, int8, threads), signature, threads)


def embed_grid(columns: int, threads: int = THREADS) -> int:
    """Blocks of a launch."""
    return -(-columns // threads)


def _check_rows(rows: DeviceArray, scale: DeviceArray | None, columns: int) -> tuple[bool, int]:
    """Whether rows are int8, and how many there are. Raises ValueError if they are neither kind."""
    if rows.dtype not in ("uint16", "int8"):
        raise ValueError(f"embedding rows must be uint16 (bfloat16) or int8, not {rows.dtype}")
    int8, vocab = rows.dtype == "int8", rows.size // columns
    if rows.size != vocab * columns:
        raise ValueError(f"embedding: {rows.size} elements are no rows of {columns}")
    if int8 and (scale is None or scale.size < vocab):
        raise ValueError(f"embedding: int8 rows need {vocab} scales, not {0 if scale is None else scale.size}")
    return int8, vocab


def embed(
    device: Device,
    rows: DeviceArray,
    scale: DeviceArray | None,
    tokens: DeviceArray,
    position: DeviceArray,
    seen: DeviceArray,
    h: DeviceArray,
    columns: int,
    use_pdl: bool = True,
) -> Launch:
    """The launch that looks up tokens[position[0]].

    rows uint16 (bfloat16 bits) or int8 [vocab, columns]; scale float32 [vocab] for int8 rows, else None; tokens int32;
    position int32 [1]; seen int32 [ceil(vocab / 32)]; h float32 [columns].
    Raises ValueError if the sizes do not fit together or the rows have another type.
    """
    int8, vocab = _check_rows(rows, scale, columns)
    if h.size < columns or seen.size < -(-vocab // 32):
        raise ValueError(f"embedding: h of {h.size}, seen of {seen.size} words do not fit {vocab} rows of {columns}")
    # bfloat16 rows have no scales; any address serves for the one that is not read.
    arguments = (rows, scale if scale is not None else h, tokens, position, seen, h, columns)
    return device.launch(embed_spec(device.arch, int8), embed_grid(columns), arguments, use_pdl)


def embed_many_spec(arch: int, int8: bool, prompt: bool, threads: int = THREADS) -> KernelSpec:
    """The compiled form; `threads` only for tests."""
    i32, words, floats = types.int32, types.CPointer(types.int32), types.CPointer(types.float32)
    rows = types.CPointer(types.int8 if int8 else types.uint16)
    name = f"embed_many[{'int8' if int8 else 'bf16'}, {'prompt' if prompt else 'decode'}, {threads}]"
    signature = (rows, floats, words, i32, words, words, words, words, i32, floats, words, i32)
    return KernelSpec(name, make_embed_many(arch, int8, prompt, threads), signature, threads)


def embed_many(
    device: Device,
    rows: DeviceArray,
    scale: DeviceArray | None,
    tokens: DeviceArray,
    tokens_stride: int,
    position: DeviceArray,
    slots: DeviceArray,
    count: DeviceArray | None,
    seen: DeviceArray,
    h: DeviceArray,
    where: DeviceArray,
    size: int,
    columns: int,
    use_pdl: bool = True,
) -> Launch:
    """The launch that looks up the tokens of a pass of `size` rows.

    With count (int32 [1]) it is a prompt: row m < count is the token of slot slots[0] at position[slot] + m. Without,
    row m is the token of slot slots[m] at its position; slots[m] -1 is a row to spare. rows uint16 (bfloat16 bits) or
    int8 [vocab, columns]; scale float32 [vocab] for int8 rows, else None; tokens int32 [S, tokens_stride]; position
    int32 [S]; slots int32 [size] or [1]; seen int32 [S, ceil(vocab / 32)]; h float32 [size, columns]; where int32
    [size, 2].
    Raises ValueError if the sizes do not fit together or the rows have another type.
    """
    int8, vocab = _check_rows(rows, scale, columns)
    sequences, seen_stride = position.size, -(-vocab // 32)
    sizes = {
        "tokens": (tokens, sequences * tokens_stride),
        "slots": (slots, size if count is None else 1),
        "seen": (seen, sequences * seen_stride),
        "h": (h, size * columns),
        "where": (where, 2 * size),
    }
    for name, (array, needed) in sizes.items():
        if array.size < needed:
            raise ValueError(f"embed_many: {name} holds {array.size} elements, {needed} are needed")
    # Any address serves for what is not read: scales of bfloat16 rows, the count of a decode pass.
    arguments = (
        rows, scale if scale is not None else h, tokens, tokens_stride, position, slots,
        count if count is not None else slots, seen, seen_stride, h, where, columns,
    )  # fmt: skip
    spec = embed_many_spec(device.arch, int8, count is not None)
    return device.launch(spec, (embed_grid(columns), size), arguments, use_pdl)


def finish_prompt_spec(arch: int, threads: int = THREADS) -> KernelSpec:
    """The compiled form; `threads` only for tests."""
    i32, words, floats = types.int32, types.CPointer(types.int32), types.CPointer(types.float32)
    signature = (words, words, words, i32, floats, floats, words, i32)
    return KernelSpec(f"finish_prompt[{threads}]", make_finish_prompt(arch, threads), signature, threads)


def finish_prompt(
    device: Device,
    count: DeviceArray,
    slots: DeviceArray,
    position: DeviceArray,
    keep: int,
    h: DeviceArray,
    last: DeviceArray,
    where: DeviceArray,
    columns: int,
    use_pdl: bool = True,
) -> Launch:
    """The launch that ends a pass over a prompt: position[slots[0]] += count - keep, and row count - 1 of h to `last`.

    keep is 1 if a sampler follows, which moves the position on by one itself, else 0. where[0], where[1] become slot
    and new position, as `sampler_many` wants them of `last`. count int32 [1]; slots int32 [1]; position int32 [S]; h
    float32 [rows, columns]; last float32 [columns]; where int32 [2]. Raises ValueError for sizes that do not fit.
    """
    if keep not in (0, 1) or h.size % columns or last.size < columns or where.size < 2:
        raise ValueError(
            f"finish_prompt: keep {keep}, {h.size} elements in rows of {columns}, last of {last.size} do not fit"
        )
    arguments = (count, slots, position, keep, h, last, where, columns)
    return device.launch(finish_prompt_spec(device.arch), embed_grid(columns), arguments, use_pdl)
