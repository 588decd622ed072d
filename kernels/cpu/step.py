"""A pass of up to MAX_TOKENS tokens through the model, and the logits after it: what every member of a team runs.

    work      what each member of the team runs: jobs, each of which is
    forward   token ids -> final hidden states [M, hidden]; keys and values go to the cache
    logits    final hidden states [M, hidden] -> [M, vocab], and of these, if asked for, the next token of each

A layer is four regions of rows (qkv, o, gate_up, down) with what lies between them; members take pieces of each region
until none is left, and wait for each other where one region needs all of another. What a product reads, each member
normalises and quantises for itself while there is one token (it costs less than waiting for another that does), and the
members share that work among them when there are more.

All tokens of a pass are alike: a token has a position and a block table, and those of one sequence or of many make no
difference. Its numbers depend on the tokens before it alone. `MODEL`, `LAYER` and `JOB` are what the compiled code is
told: addresses and sizes, in 64-bit words.
"""

import numpy as np
from numba import njit

from bitnet_numba.kernels.cpu import attention, kv_cache, lm_head, math, norm, sampler, vec
from bitnet_numba.kernels.cpu.compiler import entry
from bitnet_numba.kernels.cpu.gemm import gemm
from bitnet_numba.kernels.cpu.gemv import gemv
from bitnet_numba.kernels.cpu.memory import (
    load_f32,
    load_i8,
    load_i32,
    load_i64,
    load_u16,
    store_f32,
    store_i32,
    store_i64,
)
from bitnet_numba.kernels.cpu.team import barrier, next_job, start_job, take
from bitnet_numba.kernels.cpu.vec import OPTIONS
from bitnet_numba.packing import BLOCK_ROWS

MAX_TOKENS = 64  # of a pass
SEGMENTS = 3  # at most, of a linear: q, k and v
PIECES = 6  # of a region, for each member: the more, the better they share it, the fewer, the longer each stream
MIN_ROWS, MAX_ROWS = 32, 256  # of a piece
HEAD_ROWS = 256  # of the LM head in a piece
FORWARD, LOGITS = 1, 2  # kinds of jobs
RELU2, SILU = 0, 1

_INT, _FLOAT = np.int64, np.float64
# A linear: addresses, 0 for what it does not have.
LINEAR = np.dtype(
    [
        ("segments", _INT),  # matrices that were joined: q, k and v, or gate and up
        ("words", _INT),  # packed ternary weights; or else
        ("rows", _INT),  # bfloat16 [N, K]
        ("scales", _INT),  # float32 [segments]
        ("bias", _INT),  # float32 [N]
        ("norms", _INT),  # float32 [segments, K]: each linear's own RMSNorm
    ]
)
LAYER = np.dtype(
    [(name, _INT) for name in ("input_norm", "post_attention_norm", "attn_sub_norm", "ffn_sub_norm")]  # float32, or 0
    + [(name, LINEAR) for name in ("qkv", "o", "gate_up", "down")]
)
MODEL = np.dtype(
    [(name, _INT) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "activation")]
    + [("eps", _FLOAT), ("linear_eps", _FLOAT)]
    + [("norm", _INT)]  # the last one, float32 [hidden]
    + [
        (name, _INT) for name in ("embed", "embed_scale", "head", "head_scale", "head_sums")
    ]  # bf16, or int8 with scales
    + [("embed_int8", _INT)]
)
JOB = np.dtype(
    [("kind", _INT), ("tokens", _INT)]
    # Of each token: its id (int64), its position (int64), the address of its sequence's block table (int64).
    + [(name, _INT) for name in ("ids", "positions", "tables")]
    + [("cos", _INT), ("sin", _INT)]  # float32 [positions, head_dim / 2]
    + [("cache", _INT), ("page_stride", _INT), ("layer_stride", _INT)]  # page 0, bytes to the next page and layer
    # Shared: float32 [M, ...] of the residual stream, the products' results, and the final hidden states.
    + [(name, _INT) for name in ("x", "qkv", "attn_out", "mlp_hidden", "final", "logits", "logits_stride")]
    + [("splits", _INT), ("partials", _INT)]  # of the longest context; partial outputs of attention
    # Quantised and prepared activations: MAX_TOKENS tokens that all share, or one token for each member.
    + [(name, _INT) for name in ("q_stride", "plane_stride", "shared")]
    # Each member's own memory, and where in it are what.
    + [
        (name, _INT)
        for name in ("own", "own_stride", "h", "acc", "y", "unpacked", "scratch", "own_partials", "sampler")
    ]
    # Sampling after logits, if `settings` is not 0: of each token float64 settings (see `sampler.pack_settings`), the
    # address of its history (int64) and how long that is; and the tokens sampled, int64.
    + [(name, _INT) for name in ("settings", "histories", "history_lengths", "sampled")]
)


@entry
def work(member, members, state, isa, dtype, heads, model, layers, job):
    """Member 0: runs one job, together with the others. The others: run jobs until the team is stopped."""
    number = 0
    while True:
        if member == 0:
            if members > 1:
                start_job(state)
        else:
            number = next_job(state, number)
            if number < 0:
                return
        if job[0].kind == FORWARD:
            forward(isa, dtype, heads, member, members, state, model[0], layers, job[0])
        else:
            logits(isa, member, members, state, model[0], job[0])
        if member == 0:
            return


@njit(inline="always", **OPTIONS)
def forward(isa, dtype, heads, member, members, state, model, layers, job):
    """All layers."""
    M, hidden, eps = job.tokens, model.hidden, np.float32(model.eps)
    for m in range(member, M, members):
        embed(model, load_i64(job.ids, 8 * m), job.x + 4 * m * hidden)
    barrier(state, members)
    own = job.own + member * job.own_stride
    q_size, kv_size = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for i in range(len(layers)):
        layer = layers[i]
        cache = job.cache + i * job.layer_stride
        inputs = inputs_of(job, member, members, hidden)
        for m in tokens_of(job, member, members):
            prepare(model, layer.qkv, job.x + 4 * m * hidden, hidden, layer.input_norm, eps, own, job, inputs, m)
        meet(job, state, members)
        qkv_rows(isa, layer.qkv, q_size, kv_size, hidden, members, state, inputs, own, job)
        barrier(state, members)
        rotate_and_store(dtype, member, members, model, cache, job)
        barrier(state, members)
        attend(isa, dtype, heads, members, state, model, cache, own, job)
        barrier(state, members)
        inputs = inputs_of(job, member, members, q_size)
        for m in tokens_of(job, member, members):
            attn_out = gather(members, model, own, job, m)
            prepare(model, layer.o, attn_out, q_size, layer.attn_sub_norm, eps, own, job, inputs, m)
        meet(job, state, members)
        residual_rows(isa, layer.o, hidden, q_size, members, state, inputs, own, job)
        barrier(state, members)
        inputs = inputs_of(job, member, members, hidden)
        for m in tokens_of(job, member, members):
            x = job.x + 4 * m * hidden
            prepare(model, layer.gate_up, x, hidden, layer.post_attention_norm, eps, own, job, inputs, m)
        meet(job, state, members)
        gated_rows(isa, layer.gate_up, model, members, state, inputs, own, job)
        barrier(state, members)
        K = model.intermediate
        inputs = inputs_of(job, member, members, K)
        for m in tokens_of(job, member, members):
            mlp_hidden = job.mlp_hidden + 4 * m * K
            prepare(model, layer.down, mlp_hidden, K, layer.ffn_sub_norm, eps, own, job, inputs, m)
        meet(job, state, members)
        residual_rows(isa, layer.down, hidden, K, members, state, inputs, own, job)
        barrier(state, members)
    for m in range(member, M, members):
        norm.rms_norm(job.x + 4 * m * hidden, model.norm, hidden, eps, job.final + 4 * m * hidden)
    barrier(state, members)


@njit(**OPTIONS)
def embed(model, token, x):
    """A token's row of the embedding, float32 [hidden] to address x."""
    K = model.hidden
    if model.embed_int8:
        row, scale = model.embed + token * K, load_f32(model.embed_scale, 4 * token)
        for i in range(K):
            store_f32(x, 4 * i, np.float32(load_i8(row, i)) * scale)
    else:
        row = model.embed + token * K * 2
        for i in range(K):
            store_i32(x, 4 * i, load_u16(row, 2 * i) << 16)


# ---- What products read ---------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def tokens_of(job, member, members):
    """The tokens whose activations a member prepares: all, if that is one, otherwise its share."""
    return range(0, 1, 1) if job.tokens == 1 else range(member, job.tokens, members)


@njit(**OPTIONS)
def meet(job, state, members):
    """Waits for the others' share, if there is one."""
    if job.tokens > 1:
        barrier(state, members)


@njit(**OPTIONS)
def inputs_of(job, member, members, K):
    """Where prepared activations of K columns are: (int8 q [segments, M, stride], stride, bytes of a segment, float32 s
    and int32 sums of q [segments, MAX_TOKENS], prepared float32 activations)."""
    if job.tokens == 1:
        base, tokens = job.own + member * job.own_stride, 1
    else:
        base, tokens = job.shared, MAX_TOKENS
    segment = tokens * job.q_stride
    s = base + SEGMENTS * segment
    sums = s + 4 * SEGMENTS * MAX_TOKENS
    return base, job.q_stride, segment, s, sums, sums + 4 * SEGMENTS * MAX_TOKENS


@njit(**OPTIONS)
def prepare(model, linear, x, K, weight, eps, own, job, inputs, m):
    """One token's activations, float32 [K] at address x, normalised (if `weight` is not 0), as a linear reads them."""
    q, q_stride, segment, s, sums, planes = inputs
    h = x
    if weight != 0:
        h = own + job.h
        norm.rms_norm(x, weight, K, eps, h)
    if linear.words == 0:
        lm_head.prepare_bf16(h, K, planes + m * job.plane_stride)
        return
    for i in range(linear.segments if linear.norms != 0 else 1):
        source = h
        if linear.norms != 0:
            source = own + job.h + 4 * (K + 16)
            norm.rms_norm(h, linear.norms + 4 * i * K, K, np.float32(model.linear_eps), source)
        scale, q_sum = norm.quantize(source, K, q + i * segment + m * q_stride)
        store_f32(s, 4 * (i * MAX_TOKENS + m), scale)
        store_i32(sums, 4 * (i * MAX_TOKENS + m), q_sum)


# ---- Regions of rows ------------------------------------------------------------------------------------------------


@njit(**OPTIONS)
def piece_rows(N, members, job):
    """Rows of a piece of a region of N rows: whole pairs of row-blocks, few when each is multiplied by many tokens."""
    rows = (N // (members * PIECES) + MIN_ROWS - 1) // MIN_ROWS * MIN_ROWS
    return max(MIN_ROWS, min(MAX_ROWS if job.tokens <= 8 else 2 * MIN_ROWS, rows))


@njit(**OPTIONS)
def product(isa, linear, segment, K, first, last, inputs, own, job, y):
    """Rows first .. last - 1, all of one segment, for all tokens: float32 [M, MAX_ROWS] to address y."""
    M = job.tokens
    q, q_stride, segment_bytes, s, sums, planes = inputs
    if linear.words == 0:
        # The rows are written to columns `first` .. of their row.
        padded_K = max(K, lm_head.MIN_COLUMNS)
        lm_head.head_bf16(isa, linear.rows, padded_K, planes, job.plane_stride, M, y - 4 * first, MAX_ROWS, first, last)
        if linear.bias != 0:
            for m in range(M):
                for n in range(last - first):
                    at = y + 4 * (m * MAX_ROWS + n)
                    store_f32(at, 0, load_f32(at, 0) + load_f32(linear.bias, 4 * (first + n)))
        return
    own_norm = segment if linear.norms != 0 else 0
    q, s, sums = q + own_norm * segment_bytes, s + 4 * own_norm * MAX_TOKENS, sums + 4 * own_norm * MAX_TOKENS
    padded_K = (K + 31) // 32 * 32
    first_block, last_block = first // BLOCK_ROWS, (last + BLOCK_ROWS - 1) // BLOCK_ROWS
    acc, acc_stride = own + job.acc, MAX_ROWS + 2 * BLOCK_ROWS
    if M == 1:
        gemv(isa, linear.words, padded_K, q, load_i32(sums, 0), acc, first_block, last_block)
    else:
        unpacked = own + job.unpacked
        gemm(isa, linear.words, padded_K, q, q_stride, sums, M, acc, acc_stride, first_block, last_block, unpacked)
    acc += 4 * (first - first_block * BLOCK_ROWS)
    m_scale = load_f32(linear.scales, 4 * segment)
    bias = linear.bias + 4 * first if linear.bias != 0 else 0
    for m in range(M):
        scale = load_f32(s, 4 * m)
        norm.dequantize_rows(acc + 4 * m * acc_stride, last - first, m_scale, scale, bias, y + 4 * m * MAX_ROWS)


@njit(inline="always", **OPTIONS)
def qkv_rows(isa, linear, q_size, kv_size, K, members, state, inputs, own, job):
    """q, k and v of all tokens: float32 [M, q_size + 2 kv_size]."""
    rows, y, N = piece_rows(q_size, members, job), own + job.y, q_size + 2 * kv_size
    q_pieces, kv_pieces = (q_size + rows - 1) // rows, (kv_size + rows - 1) // rows
    while True:
        piece = take(state)
        if piece >= q_pieces + 2 * kv_pieces:
            return
        segment = np.int64(0) if piece < q_pieces else 1 + (piece - q_pieces) // kv_pieces
        start = 0 if segment == 0 else q_size + (segment - 1) * kv_size
        end = start + (q_size if segment == 0 else kv_size)
        first = start + rows * (piece if segment == 0 else (piece - q_pieces) % kv_pieces)
        last = min(first + rows, end)
        product(isa, linear, segment, K, first, last, inputs, own, job, y)
        for m in range(job.tokens):
            copy(y + 4 * m * MAX_ROWS, last - first, job.qkv + 4 * (m * N + first))


@njit(inline="always", **OPTIONS)
def residual_rows(isa, linear, N, K, members, state, inputs, own, job):
    """A product of N rows that is added to the residual stream [M, N]."""
    rows, y = piece_rows(N, members, job), own + job.y
    while True:
        first = take(state) * rows
        if first >= N:
            return
        last = min(first + rows, N)
        product(isa, linear, np.int64(0), K, first, last, inputs, own, job, y)
        for m in range(job.tokens):
            add(y + 4 * m * MAX_ROWS, last - first, job.x + 4 * (m * N + first))


@njit(inline="always", **OPTIONS)
def gated_rows(isa, linear, model, members, state, inputs, own, job):
    """activation(gate) * up of all tokens: float32 [M, intermediate]."""
    N, rows, gate = model.intermediate, piece_rows(model.intermediate, members, job), own + job.y
    up = gate + 4 * MAX_TOKENS * MAX_ROWS
    while True:
        first = take(state) * rows
        if first >= N:
            return
        last = min(first + rows, N)
        product(isa, linear, np.int64(0), model.hidden, first, last, inputs, own, job, gate)
        product(isa, linear, np.int64(1), model.hidden, N + first, N + last, inputs, own, job, up)
        for m in range(job.tokens):
            at = 4 * m * MAX_ROWS
            activate(model.activation, gate + at, up + at, last - first)
            copy(gate + at, last - first, job.mlp_hidden + 4 * (m * N + first))


@njit(**OPTIONS)
def activate(activation, gate, up, n):
    """gate = activation(gate) * up, float32 [n] with room for whole lanes."""
    for i in range(0, 4 * n, 64):
        g, u = vec.load_f32x16(gate, i), vec.load_f32x16(up, i)
        vec.store(gate, i, vec.mul(math.silu(g) if activation == SILU else math.relu2(g), u))


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


# ---- Attention ------------------------------------------------------------------------------------------------------


@njit(inline="always", **OPTIONS)
def rotate_and_store(dtype, member, members, model, cache, job):
    """Rotates q and k of all tokens, and writes k and v to the cache: a member's share of (token, kv head)."""
    D, G, H = model.head_dim, model.kv_heads, model.heads
    N = (H + 2 * G) * D
    for i in range(member, job.tokens * G, members):
        m, g = i // G, i % G
        position = load_i64(job.positions, 8 * m)
        table = load_i64(job.tables, 8 * m)
        cos, sin = job.cos + 2 * position * D, job.sin + 2 * position * D
        row = job.qkv + 4 * m * N
        for h in range(g * (H // G), (g + 1) * (H // G)):
            kv_cache.rotate(row + 4 * h * D, row + 4 * h * D, D, cos, sin)
        k, v = row + 4 * (H + g) * D, row + 4 * (H + G + g) * D
        kv_cache.rotate(k, k, D, cos, sin)
        kv_cache.store_kv(dtype, cache, job.page_stride, table, G, g, D, position, k, v)


@njit(**OPTIONS)
def is_split(members, model, job):
    """Whether long contexts are cut into splits for several members: when there are few tokens and kv heads."""
    return job.splits > 1 and job.tokens * model.kv_heads < 4 * members


@njit(inline="always", **OPTIONS)
def attend(isa, dtype, heads, members, state, model, cache, own, job):
    """Attention of all tokens; a piece is a token and kv head, or a split of it."""
    D, G, H = model.head_dim, model.kv_heads, model.heads
    R, N, row = H // G, (H + 2 * G) * D, attention.partial_bytes(D)
    split = is_split(members, model, job)
    parts = job.splits if split else 1
    scratch = own + job.scratch
    while True:
        piece = take(state)
        if piece >= job.tokens * G * parts:
            return
        m, g, part = piece // parts // G, piece // parts % G, piece % parts
        length = load_i64(job.positions, 8 * m) + 1
        table = load_i64(job.tables, 8 * m)
        q = job.qkv + 4 * (m * N + g * R * D)
        used = (length + attention.SPLIT - 1) // attention.SPLIT
        if split:
            if part < used:
                at = job.partials + ((m * G + g) * job.splits + part) * R * row
                attention.attend(
                    isa, dtype, heads, cache, job.page_stride, table, G, g, R, D, q, length, part, at, scratch
                )
        else:
            at = own + job.own_partials
            for i in range(used):
                attention.attend(
                    isa,
                    dtype,
                    heads,
                    cache,
                    job.page_stride,
                    table,
                    G,
                    g,
                    R,
                    D,
                    q,
                    length,
                    i,
                    at + i * R * row,
                    scratch,
                )
            for r in range(R):
                out = job.attn_out + 4 * ((m * H + g * R + r) * D)
                attention.combine(at + r * row, R * row, length, D, out, scratch)


@njit(inline="always", **OPTIONS)
def gather(members, model, own, job, m):
    """Address of a token's attention output, float32 [H * D], joined from its splits if there are any."""
    D, G, H = model.head_dim, model.kv_heads, model.heads
    if not is_split(members, model, job):
        return job.attn_out + 4 * m * H * D
    R, row = H // G, attention.partial_bytes(D)
    length = load_i64(job.positions, 8 * m) + 1
    # Every member joins for itself when there is one token.
    out = own + job.h + 8 * (H * D + 16)
    for h in range(H):
        at = job.partials + ((m * G + h // R) * job.splits * R + h % R) * row
        attention.combine(at, R * row, length, D, out + 4 * h * D, own + job.scratch)
    return out


# ---- Logits ---------------------------------------------------------------------------------------------------------


@njit(inline="always", **OPTIONS)
def logits(isa, member, members, state, model, job):
    """Final hidden states [M, hidden] -> logits [M, vocab]."""
    K, N, M = model.hidden, model.vocab, job.tokens
    padded_K = max(K, lm_head.MIN_COLUMNS)
    planes = inputs_of(job, member, members, K)[5]
    for m in tokens_of(job, member, members):
        x, prepared = job.final + 4 * m * K, planes + m * job.plane_stride
        if model.embed_int8:
            lm_head.prepare_int8(isa, x, K, prepared)
        else:
            lm_head.prepare_bf16(x, K, prepared)
    meet(job, state, members)
    while True:
        first = take(state) * HEAD_ROWS
        if first >= N:
            break
        last = min(first + HEAD_ROWS, N)
        x_stride, out, y_stride = job.plane_stride, job.logits, job.logits_stride
        if model.embed_int8:
            scales, sums = model.head_scale, model.head_sums
            lm_head.head_int8(isa, model.head, padded_K, scales, sums, planes, x_stride, M, out, y_stride, first, last)
        else:
            lm_head.head_bf16(isa, model.head, padded_K, planes, x_stride, M, out, y_stride, first, last)
    barrier(state, members)
    if job.settings != 0:
        scratch = job.own + member * job.own_stride + job.sampler
        for m in range(member, M, members):
            token = sampler.sample(
                job.logits + 4 * m * job.logits_stride,
                N,
                load_i64(job.histories, 8 * m),
                load_i64(job.history_lengths, 8 * m),
                job.settings + 8 * sampler.SETTINGS * m,
                scratch,
            )
            store_i64(job.sampled, 8 * m, token)
        barrier(state, members)


@entry
def row_sums(isa, rows, K, sums):
    """The sums of int8 rows [len(sums), K] at an address, which `head_int8` takes."""
    lm_head.row_sums(isa, rows, K, vec.address_of(sums), 0, len(sums))
