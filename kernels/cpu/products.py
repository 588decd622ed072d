"""The products of a layer: what they read, normalised and quantised, and their rows, in pieces that members take.

Whatever a linear is (ternary or bfloat16 rows, one scale or three, with a bias or without), `product` makes float32
rows of it; each region says where they go.
"""

import numpy as np
from numba import njit

from bitnet_numba.kernels.cpu import lm_head, math, norm, vec
from bitnet_numba.kernels.cpu.compiler import call
from bitnet_numba.kernels.cpu.layout import GELU, MAX_ROWS, MAX_TOKENS, MIN_ROWS, PIECES, SEGMENTS, SILU
from bitnet_numba.kernels.cpu.memory import load_f32, load_i8, load_i32, store_f32, store_i8, store_i32
from bitnet_numba.kernels.cpu.team import enter, leave, take
from bitnet_numba.kernels.cpu.vec import OPTIONS
from bitnet_numba.packing import BLOCK_ROWS

# ---- What products read ---------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def enter_inputs(state, region, pieces, M):
    """Enters the region in which M tokens' activations are prepared: of one token, that of the product's pieces, where
    each member prepares them for itself; of more, one of their own, with a piece for each token."""
    return enter(state, region, pieces if M == 1 else M)


@njit(**OPTIONS)
def next_token(state, region, inside, M, m):
    """The token to prepare after token m, which is -1 at first; M or more if there is none."""
    if not inside:
        return M
    return m + 1 if M == 1 else take(state, region)


@njit(**OPTIONS)
def enter_pieces(state, region, pieces, inside, M):
    """Goes on to the region of the product's pieces, after `enter_inputs`: its number, and whether the member is
    inside."""
    if M == 1:
        return region, inside
    region = leave(state, region, inside)
    return region, enter(state, region, pieces)


@njit(**OPTIONS)
def inputs_of(job, member):
    """Where prepared activations are, of every product alike.

    (int8 q [segments, M, stride], stride, bytes of a segment, float32 s and int32 sums of q [segments, MAX_TOKENS],
    prepared float32 activations). Where weights have group scales, steps stand in place of s and offsets in place of
    sums, both [M, job.groups]; see `norm.quantize_groups`. A second plane's follow them, and its q is at segment 1.
    """
    if job.tokens == 1:
        base, tokens = job.own + member * job.own_stride, 1
    else:
        base, tokens = job.shared, MAX_TOKENS
    segment = tokens * job.q_stride
    s = base + SEGMENTS * segment
    sums = s + job.scale_bytes
    return base, job.q_stride, segment, s, sums, sums + job.scale_bytes


@njit(**OPTIONS)
def prepare(place, model, linear, x, K, weight, eps, own, job, inputs, m):
    """One token's activations, float32 [K] at address x, normalised (if `weight` is not 0), as a linear reads them.

    place: the number of the linear in the model, under which its int8 activations are recorded, if they are.
    """
    q, q_stride, segment, s, sums, planes = inputs
    h = x
    if weight != 0:
        h = own + job.h
        norm.rms_norm(x, weight, K, eps, h)
    if linear.words == 0:
        lm_head.prepare_bf16(h, K, planes + m * job.plane_stride)
        return
    if linear.group_scales != 0:
        at, first = 4 * m * job.groups, q + m * q_stride
        if job.planes == 1:
            norm.quantize_groups(h, K, first, s + at, sums + at)
        else:
            second, at2 = first + segment, at + second_plane(job)
            norm.quantize_groups_twice(h, K, first, second, s + at, s + at2, sums + at, sums + at2)
            record(place, 1, K, second, job, m)
        record(place, 0, K, first, job, m)
        return
    for i in range(linear.segments if linear.norms != 0 else 1):
        source = h
        if linear.norms != 0:
            source = own + job.h + 4 * (K + 16)
            norm.rms_norm(h, linear.norms + 4 * i * K, K, np.float32(model.linear_eps), source)
        scale, q_sum = norm.quantize(source, K, q + i * segment + m * q_stride)
        store_f32(s, 4 * (i * MAX_TOKENS + m), scale)
        store_i32(sums, 4 * (i * MAX_TOKENS + m), q_sum)
        record(place, i, K, q + i * segment + m * q_stride, job, m)


@njit(**OPTIONS)
def record(place, segment, K, q, job, m):
    """Copies int8 activations [K] to where they are recorded, if they are."""
    if job.record != 0:
        at = job.record + ((place * SEGMENTS + segment) * MAX_TOKENS + m) * job.q_stride
        for k in range(K):
            store_i8(at, k, load_i8(q, k))


# ---- Regions of rows ------------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def piece_rows(N, members, job):
    """Rows of a piece of a region of N rows: whole pairs of row-blocks, few when each is multiplied by many tokens."""
    rows = (N // (members * PIECES) + MIN_ROWS - 1) // MIN_ROWS * MIN_ROWS
    return max(MIN_ROWS, min(MAX_ROWS if job.tokens <= 8 else 2 * MIN_ROWS, rows))


@njit(**OPTIONS)
def product(linear, segment, K, first, last, inputs, own, job, y):
    """Rows first .. last - 1, all of one segment, for all tokens: float32 [M, MAX_ROWS] to address y."""
    M = job.tokens
    q, q_stride, segment_bytes, s, sums, planes = inputs
    if linear.words == 0:
        # The rows are written to columns `first` .. of their row.
        padded_K = max(K, lm_head.MIN_COLUMNS)
        call(
            job.kernels.bf16_rows,
            (linear.rows, padded_K, planes, job.plane_stride, M, y - 4 * first, MAX_ROWS, first, last),
        )
        if linear.bias != 0:
            for m in range(M):
                for n in range(last - first):
                    at = y + 4 * (m * MAX_ROWS + n)
                    store_f32(at, 0, load_f32(at, 0) + load_f32(linear.bias, 4 * (first + n)))
        return
    if linear.group_scales != 0:
        group_product(linear, K, first, last, inputs, own, job, y)
        return
    own_norm = segment if linear.norms != 0 else 0
    q, s, sums = q + own_norm * segment_bytes, s + 4 * own_norm * MAX_TOKENS, sums + 4 * own_norm * MAX_TOKENS
    padded_K = (K + 31) // 32 * 32
    first_block, last_block = first // BLOCK_ROWS, (last + BLOCK_ROWS - 1) // BLOCK_ROWS
    acc, acc_stride = own + job.acc, MAX_ROWS + 2 * BLOCK_ROWS
    if M == 1:
        call(job.kernels.gemv, (linear.words, padded_K, q, load_i32(sums, 0), acc, first_block, last_block))
    else:
        unpacked = own + job.unpacked
        call(
            job.kernels.gemm,
            (linear.words, padded_K, q, q_stride, sums, M, acc, acc_stride, first_block, last_block, unpacked),
        )
    acc += 4 * (first - first_block * BLOCK_ROWS)
    m_scale = load_f32(linear.scales, 4 * segment)
    bias = linear.bias + 4 * first if linear.bias != 0 else 0
    for m in range(M):
        scale = load_f32(s, 4 * m)
        norm.dequantize_rows(acc + 4 * m * acc_stride, last - first, m_scale, scale, bias, y + 4 * m * MAX_ROWS)


@njit(**OPTIONS)
def group_product(linear, K, first, last, inputs, own, job, y):
    """`product` of a linear with group scales: of each plane of the activations, one after the other."""
    q, q_stride, segment, d, offsets, _ = inputs
    first_block = first // BLOCK_ROWS
    out, stride = own + job.acc + 4 * (first - first_block * BLOCK_ROWS), MAX_ROWS + 2 * BLOCK_ROWS
    for plane in range(job.planes):
        at = plane * second_plane(job)
        plane_product(linear, K, first, last, q + plane * segment, q_stride, d + at, offsets + at, own, job)
        for m in range(job.tokens):
            to = y + 4 * m * MAX_ROWS
            if plane == 0:
                copy(out + 4 * m * stride, last - first, to)
            else:
                add(out + 4 * m * stride, last - first, to)
    if linear.bias != 0:
        for m in range(job.tokens):
            add(linear.bias + 4 * first, last - first, y + 4 * m * MAX_ROWS)


@njit(**OPTIONS)
def second_plane(job):
    """Bytes from the steps and offsets of the first plane to those of the second."""
    return job.scale_bytes // 2


@njit(**OPTIONS)
def plane_product(linear, K, first, last, q, q_stride, d, offsets, own, job):
    """Rows from the block of row `first` on, of a product of one plane with weights with group scales, for all tokens:
    float32 [M, MAX_ROWS + 2 BLOCK_ROWS] to own + job.acc."""
    padded_K = (K + 31) // 32 * 32
    first_block, last_block = first // BLOCK_ROWS, (last + BLOCK_ROWS - 1) // BLOCK_ROWS
    out, stride = own + job.acc, MAX_ROWS + 2 * BLOCK_ROWS
    if job.tokens == 1:
        call(
            job.kernels.gemv_groups,
            (linear.words, linear.group_scales, padded_K, q, d, offsets, out, first_block, last_block),
        )
    else:
        call(
            job.kernels.gemm_groups,
            (
                linear.words, linear.group_scales, padded_K, q, q_stride, d, offsets, job.groups, job.tokens, out,
                stride, first_block, last_block, own + job.unpacked,
            ),
        )  # fmt: skip


@njit(**OPTIONS)
def pieces_of(N, members, job):
    """Pieces of a region of N rows."""
    rows = piece_rows(N, members, job)
    return (N + rows - 1) // rows


@njit(**OPTIONS)
def qkv_pieces(q_size, kv_size, members, job):
    """Pieces of q, and of each of k and v."""
    rows = piece_rows(q_size, members, job)
    return (q_size + rows - 1) // rows, (kv_size + rows - 1) // rows


@njit(inline="always", **OPTIONS)
def qkv_rows(linear, q_size, kv_size, K, members, state, region, inputs, own, job):
    """q, k and v of all tokens: float32 [M, q_size + 2 kv_size]."""
    rows, y, N = piece_rows(q_size, members, job), own + job.y, q_size + 2 * kv_size
    q_pieces, kv_pieces = qkv_pieces(q_size, kv_size, members, job)
    while True:
        piece = take(state, region)
        if piece >= q_pieces + 2 * kv_pieces:
            return
        segment = np.int64(0) if piece < q_pieces else 1 + (piece - q_pieces) // kv_pieces
        start = 0 if segment == 0 else q_size + (segment - 1) * kv_size
        end = start + (q_size if segment == 0 else kv_size)
        first = start + rows * (piece if segment == 0 else (piece - q_pieces) % kv_pieces)
        last = min(first + rows, end)
        product(linear, segment, K, first, last, inputs, own, job, y)
        for m in range(job.tokens):
            copy(y + 4 * m * MAX_ROWS, last - first, job.qkv + 4 * (m * N + first))


@njit(inline="always", **OPTIONS)
def residual_rows(linear, post_norm, N, K, members, state, region, inputs, own, job):
    """A product of N rows that is added to the residual stream [M, N], or if a norm follows, kept for `add_normed`."""
    rows, y = piece_rows(N, members, job), own + job.y
    while True:
        first = take(state, region) * rows
        if first >= N:
            return
        last = min(first + rows, N)
        product(linear, np.int64(0), K, first, last, inputs, own, job, y)
        for m in range(job.tokens):
            if post_norm == 0:
                add(y + 4 * m * MAX_ROWS, last - first, job.x + 4 * (m * N + first))
            else:
                copy(y + 4 * m * MAX_ROWS, last - first, job.final + 4 * (m * N + first))


@njit(inline="always", **OPTIONS)
def add_normed(post_norm, N, eps, state, region, job):
    """Adds what `residual_rows` has kept, normed, to the residual stream, in a region of its own; nothing if
    `post_norm` is 0. Returns the number of the next region."""
    if post_norm == 0:
        return region
    inside = enter(state, region, job.tokens)
    if inside:
        m = take(state, region)
        while m < job.tokens:
            y = job.final + 4 * m * N
            norm.rms_norm(y, post_norm, N, eps, y)
            add(y, N, job.x + 4 * m * N)
            m = take(state, region)
    return leave(state, region, inside)


@njit(inline="always", **OPTIONS)
def gated_rows(linear, model, members, state, region, inputs, own, job):
    """activation(gate) * up of all tokens: float32 [M, intermediate]."""
    N, rows, gate = model.intermediate, piece_rows(model.intermediate, members, job), own + job.y
    up = gate + 4 * MAX_TOKENS * MAX_ROWS
    while True:
        first = take(state, region) * rows
        if first >= N:
            return
        last = min(first + rows, N)
        product(linear, np.int64(0), model.hidden, first, last, inputs, own, job, gate)
        product(linear, np.int64(1), model.hidden, N + first, N + last, inputs, own, job, up)
        for m in range(job.tokens):
            at = 4 * m * MAX_ROWS
            activate(model.activation, gate + at, up + at, last - first)
            copy(gate + at, last - first, job.mlp_hidden + 4 * (m * N + first))


@njit(**OPTIONS)
def activate(activation, gate, up, n):
    """gate = activation(gate) * up, float32 [n] with room for whole lanes."""
    for i in range(0, 4 * n, 64):
        g, u = vec.load_f32x16(gate, i), vec.load_f32x16(up, i)
        if activation == SILU:
            g = math.silu(g)
        elif activation == GELU:
            g = math.gelu(g)
        else:
            g = math.relu2(g)
        vec.store(gate, i, vec.mul(g, u))


@njit(**OPTIONS)
def scale(x, n, factor):
    """x *= factor, float32 [n]."""
    for i in range(0, 4 * n, 4):
        store_f32(x, i, load_f32(x, i) * factor)


@njit(**OPTIONS)
def copy(y, n, out):
    """float32 [n] from one address to another."""
    whole = n // 16 * 16
    for i in range(0, 4 * whole, 64):
        vec.store(out, i, vec.load_f32x16(y, i))
    for i in range(4 * whole, 4 * n, 4):
        store_f32(out, i, load_f32(y, i))


@njit(**OPTIONS)
def add(y, n, x):
    """x += y, float32 [n]."""
    whole = n // 16 * 16
    for i in range(0, 4 * whole, 64):
        vec.store(x, i, vec.add(vec.load_f32x16(x, i), vec.load_f32x16(y, i)))
    for i in range(4 * whole, 4 * n, 4):
        store_f32(x, i, load_f32(x, i) + load_f32(y, i))
