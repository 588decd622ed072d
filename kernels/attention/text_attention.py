"""Attention within whole texts, in float32: for embeddings, whose texts are computed in one pass each, without a cache.

Each token attends to those of its text up to itself, or to the last `window` of them. Queries and keys have been
rotated. Keys and values are read as float32 where the products wrote them: a cache in 16 bits would turn the vectors
that come of them by more than int8 activations do.

    block     16 tokens of one text  x  HEADS query heads that share a key-value head      grid x: heads, y: tokens
    thread    row i = thread / 8; lane j = thread % 8 of the row's eight
              scores of keys j, j + 8, ... of a tile;  output dimensions 4 j .. 4 j + 3, 4 j + 32 .., ...

    queries [HEADS, 16, D] stay in shared memory; for each tile of KEYS keys, counted from the text's beginning:
    keys to shared memory | scores, running maximum, weights | values to the same memory | outputs

A row's eight lanes are neighbours in a warp, so that maxima and sums go by shuffles. Tiles are counted from the text's
beginning, and one in which all of a row's keys are masked changes nothing of it: a token's result depends on its text
alone, to the bit. Every product is a float32 multiply-add, a third of what an H200 could do at best, since shared
memory feeds them: 100 us for 2048 rows of 16 heads of 128 in texts of 128 tokens, 283 in texts of 512, 871 in one.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.attention.parts import LOWEST, MINUS_INF, HeadShape, check_head, score_scale
from bitnet_numba.kernels.operands import checked
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, device_function, float32, int32, int64
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec

BLOCK_TOKENS = 16  # a text begins at a multiple of so many rows
LANES = 8  # threads of a row
THREADS = BLOCK_TOKENS * LANES
LANE_COLUMNS = 4 * LANES  # dimensions that a row's lanes have at a time
WHOLE_HEAD_DIM = 128  # up to here two heads and 32 keys fit shared memory
NO_WINDOW = np.int32(2**31 - 1)


def make_text_attention(arch: int, head_dim: int, group: int) -> Callable[..., None]:
    """The kernel for a head size, a multiple of 4, and `group` query heads a key-value head."""
    wait, release = ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    D, HEADS = head_dim, heads_of_block(head_dim, group)
    KEYS = 32 if head_dim <= WHOLE_HEAD_DIM else 16
    HEAD_BLOCKS = group // HEADS
    PARTS = -(-head_dim // LANE_COLUMNS)  # of a lane's output
    CHUNKS, ROW = LANES * PARTS, LANE_COLUMNS * PARTS + 4  # 16-byte pieces; floats of a row, so that 8 rows are apart
    P_ROW = KEYS + 4
    Q_FLOATS, KV_FLOATS, P_FLOATS = HEADS * BLOCK_TOKENS * ROW, KEYS * ROW, HEADS * BLOCK_TOKENS * P_ROW
    OWN = KEYS // LANES  # keys of a lane in a tile
    SCORES, OUTPUTS = HEADS * OWN, HEADS * PARTS * 4
    Q_LOADS, KV_LOADS = np.int32(HEADS * BLOCK_TOKENS * CHUNKS), np.int32(KEYS * CHUNKS)
    STEP, D_STEPS, TILE = np.int32(THREADS), np.int32(-(-D // 4)), np.int32(KEYS)
    SCALE, ZERO = score_scale(D), float32(0)

    @device_function
    def load_tile(kv_s, source, first, size, left, tid):
        """Rows of keys or values, each `size` floats after the last, into shared memory; zeros from row `left` on."""
        for i in range(tid, KV_LOADS, STEP):
            key, chunk = int32(i // CHUNKS), int32(i % CHUNKS)
            a = b = c = d = ZERO
            if key < left and 4 * chunk < D:
                a, b, c, d = ptx.load4(source, first + int64(key) * size + 4 * chunk)
            ptx.store4(kv_s, key * ROW + 4 * chunk, a, b, c, d)

    @device_function
    def multiply_keys(s_r, q_s, kv_s, row, lane):
        """Scores of a row's heads and a lane's keys."""
        for n in range(SCORES):
            s_r[n] = ZERO
        for step in range(D_STEPS):
            d = 4 * step
            for h in range(HEADS):
                q0, q1, q2, q3 = ptx.load4(q_s, (h * BLOCK_TOKENS + row) * ROW + d)
                for n in range(OWN):
                    k0, k1, k2, k3 = ptx.load4(kv_s, (lane + LANES * n) * ROW + d)
                    s_r[h * OWN + n] += q0 * k0
                    s_r[h * OWN + n] += q1 * k1
                    s_r[h * OWN + n] += q2 * k2
                    s_r[h * OWN + n] += q3 * k3

    @device_function
    def multiply_values(o_r, p_s, kv_s, row, lane):
        """o_r += p . v of a tile."""
        for k in range(0, KEYS, 4):
            for h in range(HEADS):
                p0, p1, p2, p3 = ptx.load4(p_s, (h * BLOCK_TOKENS + row) * P_ROW + k)
                for part in range(PARTS):
                    i, at = 4 * (h * PARTS + part), k * ROW + LANE_COLUMNS * part + 4 * lane
                    for n in range(4):
                        p = p0 if n == 0 else p1 if n == 1 else p2 if n == 2 else p3
                        v0, v1, v2, v3 = ptx.load4(kv_s, at + n * ROW)
                        o_r[i] += p * v0
                        o_r[i + 1] += p * v1
                        o_r[i + 2] += p * v2
                        o_r[i + 3] += p * v3

    def text_attention(q, k, v, text_starts, out, num_heads, num_kv_heads, window):
        q_s = ptx.pointer(cuda.shared.array(Q_FLOATS, float32, SHARED_ALIGN))
        kv_s = ptx.pointer(cuda.shared.array(KV_FLOATS, float32, SHARED_ALIGN))
        p_s = ptx.pointer(cuda.shared.array(P_FLOATS, float32, SHARED_ALIGN))
        s_r = cuda.local.array(SCORES, float32)
        o_r = cuda.local.array(OUTPUTS, float32)
        max_r = cuda.local.array(HEADS, float32)
        sum_r = cuda.local.array(HEADS, float32)

        release()
        tid = int32(cuda.threadIdx.x)
        row, lane = int32(tid // LANES), int32(tid % LANES)
        # The last tokens first: they have the longest way.
        first = int32((int32(cuda.gridDim.y) - 1 - int32(cuda.blockIdx.y)) * BLOCK_TOKENS)
        head_block = int32(cuda.blockIdx.x)
        kv_head = head_block if HEAD_BLOCKS == 1 else ptx.udiv(head_block, int32(HEAD_BLOCKS))
        first_head, size = int32(head_block * HEADS), int32(num_kv_heads * D)
        wait()
        start = int32(text_starts[first])
        if start < 0:
            return
        used = int32(0)
        for i in range(BLOCK_TOKENS):
            used = int32(used + int32(text_starts[first + i] >= 0))
        for i in range(tid, Q_LOADS, STEP):
            r, chunk = int32(i // CHUNKS), int32(i % CHUNKS)
            h, token = int32(r // BLOCK_TOKENS), int32(first + r % BLOCK_TOKENS)
            a = b = c = d = ZERO
            if 4 * chunk < D:
                a, b, c, d = ptx.load4(q, (int64(token) * num_heads + first_head + h) * D + 4 * chunk)
            ptx.store4(q_s, r * ROW + 4 * chunk, a * SCALE, b * SCALE, c * SCALE, d * SCALE)
        for n in range(OUTPUTS):
            o_r[n] = ZERO
        for h in range(HEADS):
            max_r[h], sum_r[h] = LOWEST, ZERO
        position = int32(first - start + row)
        end = int32(first - start + used)  # keys that the block's last token sees
        before = int32(max(int32(0), int32(first - start + 1 - window)))  # that none of the block's tokens sees
        for tile in range(int32(before // KEYS * KEYS), end, TILE):
            rd = int64(start + tile) * size + kv_head * D
            load_tile(kv_s, k, rd, size, int32(end - tile), tid)
            cuda.syncthreads()
            multiply_keys(s_r, q_s, kv_s, row, lane)
            for h in range(HEADS):
                largest = max_r[h]
                for n in range(OWN):
                    key = int32(tile + lane + LANES * n)
                    if key > position or position - key >= window:
                        s_r[h * OWN + n] = MINUS_INF
                    largest = max(largest, s_r[h * OWN + n])
                for step in range(3):
                    largest = max(largest, ptx.shuffle_xor(largest, 1 << step))
                alpha = ptx.exp2_approx(max_r[h] - largest)
                max_r[h] = largest
                weights = ZERO
                for n in range(OWN):
                    weight = ptx.exp2_approx(s_r[h * OWN + n] - largest)
                    weights += weight
                    p_s[(h * BLOCK_TOKENS + row) * P_ROW + lane + LANES * n] = weight
                sum_r[h] = sum_r[h] * alpha + weights
                for n in range(4 * PARTS):
                    o_r[4 * PARTS * h + n] *= alpha
            cuda.syncthreads()
            load_tile(kv_s, v, rd, size, int32(end - tile), tid)
            cuda.syncthreads()
            multiply_values(o_r, p_s, kv_s, row, lane)
            cuda.syncthreads()

        for h in range(HEADS):
            total = sum_r[h]
            for step in range(3):
                total += ptx.shuffle_xor(total, 1 << step)
            if row < used:
                wr = (int64(first + row) * num_heads + first_head + h) * D
                for part in range(PARTS):
                    i, d = 4 * (h * PARTS + part), LANE_COLUMNS * part + 4 * lane
                    if d < D:
                        ptx.store4(
                            out, wr + d, ptx.div_rn(o_r[i], total), ptx.div_rn(o_r[i + 1], total),
                            ptx.div_rn(o_r[i + 2], total), ptx.div_rn(o_r[i + 3], total),
                        )  # fmt: skip

    return text_attention


def heads_of_block(head_dim: int, group: int) -> int:
    """Query heads that share one reading of the keys: two, if shared memory and the group allow."""
    return 2 if head_dim <= WHOLE_HEAD_DIM and group % 2 == 0 else 1


@cache
def text_attention_spec(arch: int, head_dim: int, group: int) -> KernelSpec:
    """The variant for a head size and a number of query heads per key-value head.

    Raises ValueError for a head size that is no multiple of 4 or over MAX_HEAD_DIM.
    """
    check_head("text_attention", head_dim, group)
    if head_dim % 4:
        raise ValueError(f"text_attention takes head sizes that are multiples of 4, not {head_dim}")
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (f32, f32, f32, i32, f32, types.int32, types.int32, types.int32)
    kernel = make_text_attention(arch, head_dim, group)
    return KernelSpec(f"text_attention[{head_dim}, {group}]", kernel, signature, THREADS, wide_loads=2)


def text_attention(
    device: Device,
    q: Any,
    k: Any,
    v: Any,
    text_starts: Any,
    out: Any,
    num_tokens: int,
    shape: HeadShape,
    *,
    window: int | None = None,
    use_pdl: bool = True,
) -> Launch:
    """out = softmax(q . K / sqrt(head_dim)) . V over a token's text up to itself, or the last `window` tokens of that.

    q, out float32 [num_tokens, num_heads, head_dim]; k, v float32 [num_tokens, num_kv_heads, head_dim]; text_starts
    int32 [num_tokens]: the row of the first token of a row's text, a multiple of BLOCK_TOKENS, or -1 for rows that are
    not used and not written. num_tokens: a multiple of BLOCK_TOKENS. Raises ValueError if an operand is too small or of
    another dtype.
    """
    shape.check("text_attention")
    if num_tokens < 1 or num_tokens % BLOCK_TOKENS:
        raise ValueError(f"text_attention: a multiple of {BLOCK_TOKENS} tokens is needed, not {num_tokens}")
    if window is not None and window < 1:
        raise ValueError(f"text_attention: a window has at least one token, not {window}")
    spec = text_attention_spec(device.arch, shape.head_dim, shape.group)
    kv_size = num_tokens * shape.num_kv_heads * shape.head_dim
    q, k, v, text_starts, out = checked(
        "text_attention",
        f"{num_tokens} x {shape.num_heads} heads of {shape.head_dim}, {shape.num_kv_heads} key-value heads",
        q=(q, num_tokens * shape.out_size, "float32"),
        k=(k, kv_size, "float32"),
        v=(v, kv_size, "float32"),
        text_starts=(text_starts, num_tokens, "int32"),
        out=(out, num_tokens * shape.out_size, "float32"),
    )
    grid = shape.num_heads // heads_of_block(shape.head_dim, shape.group), num_tokens // BLOCK_TOKENS
    arguments = (q, k, v, text_starts, out, shape.num_heads, shape.num_kv_heads, window or NO_WINDOW)
    return device.launch(spec, grid, arguments, use_pdl)
