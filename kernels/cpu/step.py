"""A pass of up to MAX_TOKENS tokens through the model, and the logits after it: what every member of a team runs.

    work      what each member of the team runs: jobs, each of which is
    forward   token ids -> final hidden states [M, hidden]; keys and values go to the cache
    logits    final hidden states [M, hidden] -> [M, vocab], and of these, if asked for, the next token of each

A layer is four regions of rows (qkv, o, gate_up, down) and two of attention; see `team` for what a region is. What a
product reads, each member normalises and quantises for itself while there is one token (it costs less than waiting for
another that does); when there are more, the members share that work in a region of its own.

All tokens of a pass are alike: a token has a position and a block table, and those of one sequence or of many make no
difference. Its numbers depend on the tokens before it alone.
"""

from typing import Any

import numpy as np
from numba import njit, typeof, types

from bitnet_numba.kernels.cpu import attention, embedding, kv_cache, lm_head, norm
from bitnet_numba.kernels.cpu.compiler import call, entry
from bitnet_numba.kernels.cpu.layout import BF16, FORWARD, HEAD_ROWS, INT8, JOB, LAYER, MAX_ROWS, MODEL, TERNARY
from bitnet_numba.kernels.cpu.memory import load_i64
from bitnet_numba.kernels.cpu.products import (
    add_normed,
    copy,
    enter_inputs,
    enter_pieces,
    gated_rows,
    inputs_of,
    next_token,
    pieces_of,
    prepare,
    product,
    qkv_pieces,
    qkv_rows,
    residual_rows,
    scale,
)
from bitnet_numba.kernels.cpu.sampler import SETTINGS
from bitnet_numba.kernels.cpu.team import enter, finish_job, leave, next_job, start_job, take
from bitnet_numba.kernels.cpu.vec import OPTIONS


def signature() -> tuple[Any, ...]:
    """The types of `work`'s arguments."""
    tables = (typeof(np.zeros(1, dtype)) for dtype in (MODEL, LAYER, JOB))
    return (types.int64, types.int64, types.int64, *tables)


def is_cached() -> bool:
    """Whether the disk cache has `work`."""
    return bool(work.signatures) or work._cache.has(signature())


def compile_step() -> None:
    """Compiles `work`, or loads it from the disk cache."""
    work.compile(signature())


@entry
def work(member, members, state, model, layers, job):
    """Member 0: runs one job, together with the others. The others: run jobs until the team is stopped."""
    region = 0
    while True:
        region = start_job(state) if member == 0 else next_job(state, region)
        if region == 0:
            return
        if job[0].kind == FORWARD:
            forward(member, members, state, region, model[0], layers, job[0])
        else:
            logits(member, members, state, region, model[0], job[0])
        if member == 0:
            finish_job(state)
            return


@njit(inline="always", **OPTIONS)
def forward(member, members, state, region, model, layers, job):
    """All layers. Outside of regions nothing may depend on reading the job twice: see `team`."""
    M, hidden, eps = job.tokens, model.hidden, np.float32(model.eps)
    inside = enter(state, region, M)
    if inside:
        m = take(state, region)
        while m < M:
            embedding.row(model, load_i64(job.ids, 8 * m), job.x + 4 * m * hidden)
            if model.embedding_scale != 1:
                scale(job.x + 4 * m * hidden, hidden, np.float32(model.embedding_scale))
            m = take(state, region)
    region = leave(state, region, inside)
    own, inputs = job.own + member * job.own_stride, inputs_of(job, member)
    q_size, kv_size = model.heads * model.head_dim, model.kv_heads * model.head_dim
    q_pieces, kv_pieces = qkv_pieces(q_size, kv_size, members, job)
    for i in range(len(layers)):
        layer = layers[i]
        cache = job.cache + i * job.layer_stride
        pieces = q_pieces + 2 * kv_pieces
        inside = enter_inputs(state, region, pieces, M)
        m = next_token(state, region, inside, M, np.int64(-1))
        while m < M:
            x = job.x + 4 * m * hidden
            prepare(4 * i, model, layer.qkv, x, hidden, layer.input_norm, eps, own, job, inputs, m)
            m = next_token(state, region, inside, M, m)
        region, inside = enter_pieces(state, region, pieces, inside, M)
        if inside:
            qkv_rows(layer.qkv, q_size, kv_size, hidden, members, state, region, inputs, own, job)
        region = leave(state, region, inside)
        inside = enter(state, region, M * model.kv_heads)
        if inside:
            rotate_and_store(state, region, model, layer, cache, job)
        region = leave(state, region, inside)
        inside = enter(state, region, attend_pieces(members, model, job))
        if inside:
            attend(members, state, region, model, layer.window, cache, own, job)
        region = leave(state, region, inside)
        pieces = pieces_of(hidden, members, job)
        inside = enter_inputs(state, region, pieces, M)
        m = next_token(state, region, inside, M, np.int64(-1))
        while m < M:
            attn_out = gather(members, model, own, job, m)
            prepare(4 * i + 1, model, layer.o, attn_out, q_size, layer.attn_sub_norm, eps, own, job, inputs, m)
            m = next_token(state, region, inside, M, m)
        region, inside = enter_pieces(state, region, pieces, inside, M)
        if inside:
            residual_rows(layer.o, layer.attn_post_norm, hidden, q_size, members, state, region, inputs, own, job)
        region = leave(state, region, inside)
        region = add_normed(layer.attn_post_norm, hidden, eps, state, region, job)
        K = model.intermediate
        pieces = pieces_of(K, members, job)
        inside = enter_inputs(state, region, pieces, M)
        m = next_token(state, region, inside, M, np.int64(-1))
        while m < M:
            x = job.x + 4 * m * hidden
            prepare(4 * i + 2, model, layer.gate_up, x, hidden, layer.post_attention_norm, eps, own, job, inputs, m)
            m = next_token(state, region, inside, M, m)
        region, inside = enter_pieces(state, region, pieces, inside, M)
        if inside:
            gated_rows(layer.gate_up, model, members, state, region, inputs, own, job)
        region = leave(state, region, inside)
        pieces = pieces_of(hidden, members, job)
        inside = enter_inputs(state, region, pieces, M)
        m = next_token(state, region, inside, M, np.int64(-1))
        while m < M:
            mlp_hidden = job.mlp_hidden + 4 * m * K
            prepare(4 * i + 3, model, layer.down, mlp_hidden, K, layer.ffn_sub_norm, eps, own, job, inputs, m)
            m = next_token(state, region, inside, M, m)
        region, inside = enter_pieces(state, region, pieces, inside, M)
        if inside:
            residual_rows(layer.down, layer.ffn_post_norm, hidden, K, members, state, region, inputs, own, job)
        region = leave(state, region, inside)
        region = add_normed(layer.ffn_post_norm, hidden, eps, state, region, job)
    inside = enter(state, region, M)
    if inside:
        m = take(state, region)
        while m < M:
            norm.rms_norm(job.x + 4 * m * hidden, model.norm, hidden, eps, job.final + 4 * m * hidden)
            m = take(state, region)
    leave(state, region, inside)


# ---- Attention ------------------------------------------------------------------------------------------------------


@njit(inline="always", **OPTIONS)
def rotate_and_store(state, region, model, layer, cache, job):
    """Normalises (if the model does) and rotates q and k of all tokens, and writes k and v to the cache; a piece is a
    token and kv head."""
    D, G, H = model.head_dim, model.kv_heads, model.heads
    N = (H + 2 * G) * D
    piece = take(state, region)
    while piece < job.tokens * G:
        m, g = piece // G, piece % G
        position = load_i64(job.positions, 8 * m)
        table = load_i64(job.tables, 8 * m)
        cos = (job.cos if layer.window == 0 else job.local_cos) + 2 * position * D
        sin = (job.sin if layer.window == 0 else job.local_sin) + 2 * position * D
        row = job.qkv + 4 * m * N
        for h in range(g * (H // G), (g + 1) * (H // G)):
            if layer.q_norm != 0:
                norm.rms_norm(row + 4 * h * D, layer.q_norm, D, np.float32(model.eps), row + 4 * h * D)
            kv_cache.rotate(row + 4 * h * D, row + 4 * h * D, D, cos, sin)
        k, v = row + 4 * (H + g) * D, row + 4 * (H + G + g) * D
        if layer.k_norm != 0:
            norm.rms_norm(k, layer.k_norm, D, np.float32(model.eps), k)
        kv_cache.rotate(k, k, D, cos, sin)
        call(job.kernels.store_kv, (cache, job.page_stride, table, G, g, D, position, k, v))
        piece = take(state, region)


@njit(**OPTIONS)
def is_split(members, model, job):
    """Whether long contexts are cut into splits for several members: when there are few tokens and kv heads."""
    return job.splits > 1 and job.tokens * model.kv_heads < 4 * members


@njit(**OPTIONS)
def attend_pieces(members, model, job):
    """Pieces of attention: tokens and kv heads, or splits of them."""
    return job.tokens * model.kv_heads * (job.splits if is_split(members, model, job) else 1)


@njit(inline="always", **OPTIONS)
def attend(members, state, region, model, window, cache, own, job):
    """Attention of all tokens, to the last `window` if that is not 0; see `attend_pieces`."""
    D, G, H = model.head_dim, model.kv_heads, model.heads
    R, N, row = H // G, (H + 2 * G) * D, attention.partial_bytes(D)
    split = is_split(members, model, job)
    parts = job.splits if split else 1
    scratch = own + job.scratch
    piece = take(state, region)
    while piece < job.tokens * G * parts:
        m, g, part = piece // parts // G, piece // parts % G, piece % parts
        length = load_i64(job.positions, 8 * m) + 1
        begin = max(length - window, 0) if window != 0 else 0
        table = load_i64(job.tables, 8 * m)
        q = job.qkv + 4 * (m * N + g * R * D)
        used = (length + attention.SPLIT - 1) // attention.SPLIT
        if split:
            if part < used:
                at = job.partials + ((m * G + g) * job.splits + part) * R * row
                call(
                    job.kernels.attend,
                    (cache, job.page_stride, table, G, g, R, D, q, begin, length, part, at, scratch),
                )
        else:
            at = own + job.own_partials
            for i in range(used):
                call(
                    job.kernels.attend,
                    (cache, job.page_stride, table, G, g, R, D, q, begin, length, i, at + i * R * row, scratch),
                )
            for r in range(R):
                out = job.attn_out + 4 * ((m * H + g * R + r) * D)
                attention.combine(at + r * row, R * row, length, D, out, scratch)
        piece = take(state, region)


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
def logits(member, members, state, region, model, job):
    """Final hidden states [M, hidden] -> logits [M, vocab]."""
    K, N, M, settings = model.hidden, model.vocab, job.tokens, job.settings
    inputs, own = inputs_of(job, member), job.own + member * job.own_stride
    pieces = (N + HEAD_ROWS - 1) // HEAD_ROWS
    inside = enter_inputs(state, region, pieces, M)
    m = next_token(state, region, inside, M, np.int64(-1))
    while m < M:
        x, prepared = job.final + 4 * m * K, inputs[5] + m * job.plane_stride
        if model.head_format == TERNARY:
            prepare(4 * model.layers, model, model.head, x, K, 0, np.float32(0), own, job, inputs, m)
        elif model.head_format == INT8:
            call(job.kernels.prepare_int8, (x, K, prepared))
        elif model.head_format == BF16:
            lm_head.prepare_bf16(x, K, prepared)
        else:
            lm_head.prepare_float(x, K, prepared)
        m = next_token(state, region, inside, M, m)
    region, inside = enter_pieces(state, region, pieces, inside, M)
    if inside:
        head_rows(state, region, model, inputs, own, job)
    region = leave(state, region, inside)
    if settings != 0:
        inside = enter(state, region, M)
        if inside:
            m = take(state, region)
            while m < M:
                sample(m, model, own, job)
                m = take(state, region)
        leave(state, region, inside)


@njit(inline="always", **OPTIONS)
def head_rows(state, region, model, inputs, own, job):
    """The product of the LM head; a piece is HEAD_ROWS rows."""
    K, N, M = model.hidden, model.vocab, job.tokens
    padded_K, rows, planes = max(K, lm_head.MIN_COLUMNS), model.head.rows, inputs[5]
    x_stride, out, y_stride = job.plane_stride, job.logits, job.logits_stride
    first = take(state, region) * HEAD_ROWS
    while first < N:
        last = min(first + HEAD_ROWS, N)
        if model.head_format == TERNARY:
            y = own + job.y
            product(model.head, np.int64(0), K, first, last, inputs, own, job, y)
            for m in range(M):
                copy(y + 4 * m * MAX_ROWS, last - first, out + 4 * (m * y_stride + first))
        elif model.head_format == INT8:
            scales, sums = model.head_scale, model.head_sums
            call(job.kernels.int8_rows, (rows, padded_K, scales, sums, planes, x_stride, M, out, y_stride, first, last))
        elif model.head_format == BF16:
            call(job.kernels.bf16_rows, (rows, padded_K, planes, x_stride, M, out, y_stride, first, last))
        else:
            call(job.kernels.float_rows, (rows, padded_K, planes, x_stride, M, out, y_stride, first, last))
        first = take(state, region) * HEAD_ROWS


@njit(**OPTIONS)
def sample(m, model, own, job):
    """The next token after token m, from its logits."""
    call(
        job.kernels.sample,
        (
            job.logits + 4 * m * job.logits_stride,
            model.vocab,
            load_i64(job.histories, 8 * m),
            load_i64(job.history_lengths, 8 * m),
            job.settings + 8 * SETTINGS * m,
            load_i64(job.edits, 8 * m),
            load_i64(job.num_edits, 8 * m),
            load_i64(job.masks, 8 * m),
            own + job.sampler,
            job.sampled + 8 * m,
        ),
    )
