"""Embedding look-up of the token at the present position, and a note that it has been seen.

    h[j] = row[token][j]   (bfloat16 rows, widened; or int8 rows * scale[token])

The token is tokens[position], in device memory: a prompt token that the host stored there or the sampler's choice. Bits
of `seen` are what the sampler's repetition penalty reads; every token that is fed passes here, so they are set here.
5 KB for 2B4T: the launch is all latency, and one thread a column is the simplest split. Its reads depend on the
sampler's result, so there is nothing to load early.
"""

from collections.abc import Callable

from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels.device import Device, DeviceArray, Launch
from bitnet_numba.kernels.forms import KernelForm
from bitnet_numba.kernels.intrinsics import (
    bits_to_float,
    grid_release,
    grid_wait,
    int32,
    int64,
    int_to_float,
    mul_rn,
    uint32,
)

THREADS = 256


def make_embed(arch: int, int8: bool, threads: int = THREADS) -> Callable[..., None]:
    """The kernel for bfloat16 or int8 rows."""
    wait, release = grid_wait(arch), grid_release(arch)
    INT8 = int8

    def embed(rows, scale, tokens, position, seen, h, columns):
        release()
        wait()
        token = tokens[position[0]]
        j = int32(cuda.blockIdx.x * threads + cuda.threadIdx.x)
        if j < columns:
            value = rows[int64(token) * columns + j]
            if INT8:
                h[j] = mul_rn(int_to_float(int32(value)), scale[token])
            else:
                h[j] = bits_to_float(uint32(uint32(value) << uint32(16)))
        if j == 0:
            seen[token >> 5] = int32(seen[token >> 5] | int32(1) << (token & 31))

    return embed


def embed_form(arch: int, int8: bool, threads: int = THREADS) -> KernelForm:
    """The compiled form; `threads` only for tests."""
    words, floats = types.CPointer(types.int32), types.CPointer(types.float32)
    rows = types.CPointer(types.int8 if int8 else types.uint16)
    name = f"embed[{'int8' if int8 else 'bf16'}, {threads}]"
    signature = (rows, floats, words, words, words, floats, types.int32)
    return KernelForm(name, make_embed(arch, int8, threads), signature, threads)


def embed_grid(columns: int, threads: int = THREADS) -> int:
    """Blocks of a launch."""
    return -(-columns // threads)


def embed(
    device: Device,
    rows: DeviceArray,
    scale: DeviceArray | None,
    tokens: DeviceArray,
    position: DeviceArray,
    seen: DeviceArray,
    h: DeviceArray,
    columns: int,
    overlap: bool = True,
) -> Launch:
    """The launch that looks up tokens[position[0]].

    rows uint16 (bfloat16 bits) or int8 [vocab, columns]; scale float32 [vocab] for int8 rows, else None; tokens int32;
    position int32 [1]; seen int32 [ceil(vocab / 32)]; h float32 [columns].
    Raises ValueError if the sizes do not fit together or the rows have another type.
    """
    if rows.dtype not in ("uint16", "int8"):
        raise ValueError(f"embedding rows must be uint16 (bfloat16) or int8, not {rows.dtype}")
    int8 = rows.dtype == "int8"
    vocab = rows.size // columns
    if rows.size != vocab * columns or h.size < columns or seen.size < -(-vocab // 32):
        raise ValueError(
            f"embedding: {rows.size} elements in rows of {columns}, h of {h.size}, seen of {seen.size} words do not fit"
        )
    if int8 and (scale is None or scale.size < vocab):
        raise ValueError(f"embedding: int8 rows need {vocab} scales, not {0 if scale is None else scale.size}")
    # bfloat16 rows have no scales; any address serves for the one that is not read.
    arguments = (rows, scale if scale is not None else h, tokens, position, seen, h, columns)
    return Launch(embed_form(device.arch, int8), embed_grid(columns), arguments, device, overlap)


def forms(arch: int) -> list[KernelForm]:
    """Every compiled form."""
    return [embed_form(arch, int8) for int8 in (False, True)]
