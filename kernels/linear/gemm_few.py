"""The W2A8 product of 1 to 8 tokens on tensor cores, each weight read once, straight to registers.

    y[m, n] = (sum_k q[m, k] * w[n, k]) * scale[segment of n] / s[m]  (+ bias[n])

Between gemv.py, whose `dp4a` take as long again for every token, and the GEMMs, whose tiles of 64 rows leave most SMs
without a block: as of the GEMV, there is a block for every SM, all its weights are in registers before `pdl_wait`, and
a few tokens of short rows (`heuristics.FUSED`) are normed and quantised here. Others come quantised (quantize.py).
A token's row has the same bits whatever the number of tokens, and the same as by quantize.py and a GEMM.

Work split (U units, P warps):

    block b    units b, b + grid, ...: U row-blocks, or pairs of them for "gated" (gate and up rows), all tokens
    warp w     all units of the block, panels w, w + P, ... of 64 columns:
        columns      0    64   128   192
        warp 0       |====|    |====|    ...      (P = 2)
        warp 1       |    |====|    |====...
    So a warp alone needs its columns of the activations: those that come quantised go straight to its registers.
    The warps' sums meet in shared memory.

How a panel lies in a warp's registers is drawn in gemm_mma.py: 8 bytes of words a lane and row-block, 16 bytes of q of
token g = lane / 4 (of the last token, where there are fewer than eight: their columns of the product are not read).

    norm, as in quantize.py    sum of squares in float64 | barrier | the mean is rounded once, n = w * (x / rms)
                               max |n|                   | barrier | s, q into shared memory | barrier

A row's squares are added up in the order of quantize.py: a warp has of each token what warps w, w + P, ... have there.

Phases of the kernel with barriers or stores of results stay in its body.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.linear.epilogue import EPILOGUES, make_epilogue
from bitnet_numba.kernels.linear.gemm_mma import FRAGMENT, PANEL, PANEL_INTS
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations, check_segments
from bitnet_numba.kernels.linear.quantize import row_threads
from bitnet_numba.kernels.operands import Norm, checked
from bitnet_numba.kernels.ptx.base import SHARED_ALIGN, WARP, device_function, float32, float64, int32, uint32
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_BITS, CODE_MASK, padded_shape
from bitnet_numba.quantize import EPSILON, INT8_MAX

MIN_ARCH = 75  # mma of 8-bit integers
MAX_TOKENS = 8  # of one mma
WARPS = 8  # of a block, as of the GEMV's
MAX_REGISTERS = 112  # of a thread for weights and sums: the rest is for what comes and goes
EXTRA_REGISTERS = 28  # of a thread, about, beside weights, sums and activations
NORM_REGISTERS = 40  # instead, where these are normed
REGISTERS = 65536  # of an SM
MAX_BLOCKS_PER_SM = 4  # of launches that overlap
MAX_AHEAD = 8  # panels of q that a warp loads at once
ROUNDER = float32(1.5 * 2**23)  # added to a small number, leaves it rounded, half to even, in the low bits
ALL_ONES = 0x01010101  # four bytes of 1: dp4a with it adds up four activations
MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign


class Plan(NamedTuple):
    """How a product is split: what `make_gemm_few` is specialised to, and the grid."""

    units: int  # row-blocks (pairs for "gated") of a block
    warps: int  # of a block: a multiple of 4, so that a thread's results are all of one token and place
    grid: int  # blocks


def plan(rows: int, K: int, num_sms: int, gated: bool = False, cluster: int = 1) -> Plan | None:
    """One block an SM, in whole clusters; None if its weights do not fit the registers."""
    halves = 2 if gated else 1
    unit_count = -(-rows // (BLOCK_ROWS * halves))
    clusters = max(1, min(-(-unit_count // cluster), num_sms // cluster))
    units = -(-unit_count // (clusters * cluster))
    panels = -(-K // PANEL)
    if units * halves * (2 * -(-panels // WARPS) + 4) > MAX_REGISTERS:
        return None
    return Plan(units, WARPS, clusters * cluster)


def make_gemm_few(
    arch: int,
    K: int,
    split: Plan,
    tokens: int,
    prologue: str = "int8",
    epilogue: str = "store",
    activation: str = "relu2",
    cluster: int = 1,
) -> Callable[..., None]:
    """The kernel for K columns and up to `tokens` tokens, 1 to 8 (with "int8" the same for all).

    prologue: "int8": q, s and sum(q) are given; "quantize": x, float32, is quantised here; "norm": after an RMSNorm,
    by a cluster together. Epilogues as of `make_epilogue`. Raises ValueError unless the number of warps is a multiple
    of 4, and that of tokens one of the cluster.
    """
    load, wait, trigger = ptx.stream_load2(arch), ptx.pdl_wait(arch), ptx.pdl_trigger(arch)
    multiply, warp_max, warp_add = ptx.mma_s8(arch), ptx.warp_max_int(arch), ptx.redux_sum_int(arch)
    GATED, RESIDUAL, ACC = epilogue == "gated", epilogue == "residual", epilogue == "acc"
    NORM, INT8 = prologue == "norm", prologue == "int8"
    finish = make_epilogue(epilogue, activation)
    UNITS, P, T = split.units, split.warps, tokens
    HALVES = 2 if GATED else 1
    R = UNITS * HALVES  # row-blocks of a block
    KP = padded_shape(1, K)[1]
    EACH = -(-KP // (PANEL * P))  # panels of a warp
    EXACT = KP == EACH * P * PANEL  # no panel lies beyond the row, not even in part
    AHEAD = min(EACH, MAX_AHEAD)
    W_REGS, ACC_REGS, B_REGS = 2 * EACH * R, 4 * R, 4 * AHEAD
    STRIDE = KP // 4  # of a token's q, in int32 words
    # Rows are normed in shares: share v is what warp v of quantize.py has of a row.
    ROW_THREADS = row_threads(K)
    SHARES, ROUNDS = ROW_THREADS // WARP, -(-K // (4 * ROW_THREADS))
    X_REGS = 4 * ROUNDS  # of a share
    TURNS = -(-SHARES // P)  # shares of a warp, of each token
    CLUSTER, OWN = cluster, T // cluster  # tokens that a block norms
    N_REGS, ALL_X_REGS = TURNS * X_REGS, OWN * TURNS * X_REGS
    MAXIMA = 1 if INT8 else OWN * P
    STATS = 1 if INT8 else T * P
    SCALES = 1 if INT8 else T
    SQUARES = OWN * SHARES if NORM else 1
    PANEL_Q = T * PANEL_INTS  # int32 words of a panel's q
    Q_WORDS = 1 if INT8 else P * EACH * PANEL_Q
    WRITTEN = ROUNDS * ROW_THREADS  # pieces of a row of q that shares write
    MISSING = max(0, STRIDE - WRITTEN)  # of the padding
    WARP_INTS = R * FRAGMENT  # sums of a warp
    SUMS = P * WARP_INTS
    THREADS = P * WARP
    RESULTS = UNITS * FRAGMENT
    OUT_ROUNDS = -(-RESULTS // THREADS)
    COLUMNS, MASK = K, np.int32(CODE_MASK)
    if THREADS % FRAGMENT or not 1 <= T <= MAX_TOKENS or T % CLUSTER or INT8 and CLUSTER > 1:
        raise ValueError(f"no product of {T} tokens is made of {split}")
    ZERO, ONE, MIN_ABSMAX, Q_MAX = float32(0), float32(1), float32(EPSILON), float32(INT8_MAX)

    @device_function
    def load_words(w_r, words, warp, lane_rd, lane_column, first, grid, unit_count, up_offset):
        """All weights of this warp; zeros where there are none."""
        for r in range(R):
            unit = int32(first + r // HALVES * grid)
            row_rd = int32(int32(unit + r % HALVES * up_offset) * KP + lane_rd)
            for j in range(EACH):
                n = 2 * (j * R + r)
                column = int32((warp + j * P) * PANEL + lane_column)
                w_r[n] = w_r[n + 1] = int32(0)
                if unit < unit_count and (EXACT or column < KP):
                    w_r[n], w_r[n + 1] = load(words, row_rd + column)

    @device_function
    def load_q(b_r, q, q_rd, panel, column, slot):
        """A panel's q of token g; zeros beyond the last column."""
        n = 4 * slot
        b_r[n] = b_r[n + 1] = b_r[n + 2] = b_r[n + 3] = int32(0)
        if EXACT or column < KP:
            b_r[n], b_r[n + 1], b_r[n + 2], b_r[n + 3] = ptx.load4(q, q_rd + panel * PANEL_INTS)

    @device_function
    def multiply_panel(acc_r, w_r, j, b0, b1, b2, b3):
        """Adds the products of a warp's j-th panel with all its row-blocks."""
        for r in range(R):
            c0, c1, c2, c3 = acc_r[4 * r], acc_r[4 * r + 1], acc_r[4 * r + 2], acc_r[4 * r + 3]
            w0, w1 = w_r[2 * (j * R + r)], w_r[2 * (j * R + r) + 1]
            for p in range(2):
                low, high = 2 * CODE_BITS * p, 2 * CODE_BITS * p + CODE_BITS
                a0, a2 = (w0 >> low) & MASK, (w0 >> high) & MASK
                a1, a3 = (w1 >> low) & MASK, (w1 >> high) & MASK
                x0, x1 = (b2, b3) if p else (b0, b1)
                c0, c1, c2, c3 = multiply(a0, a1, a2, a3, x0, x1, c0, c1, c2, c3)
            acc_r[4 * r], acc_r[4 * r + 1], acc_r[4 * r + 2], acc_r[4 * r + 3] = c0, c1, c2, c3

    @device_function
    def load_share(r, at, array, start, share, lane):
        """A share of a row into registers; zeros beyond the last column."""
        for n in range(ROUNDS):
            i, column = at + 4 * n, int32((share * WARP + lane + n * ROW_THREADS) * 4)
            r[i] = r[i + 1] = r[i + 2] = r[i + 3] = ZERO
            if share < SHARES and column < COLUMNS:
                r[i], r[i + 1], r[i + 2], r[i + 3] = ptx.load4(array, start + column)

    @device_function
    def share_word(array, at, word):
        """Stores a word in the shared array of each block of the cluster."""
        if CLUSTER == 1:
            array[at] = word
        else:
            for rank in range(CLUSTER):
                ptx.cluster_store(array, ptx.shared_address(array, at), rank, word)

    @device_function
    def quantise(q_s, x_r, at, s, token, share, lane, q_sum):
        """A share as int8 to shared memory; returns q_sum and the sum of this thread's."""
        for n in range(ROUNDS):
            i, piece = at + 4 * n, int32(share * WARP + lane + n * ROW_THREADS)
            # No clamp: |x| * s is at most 127 (1 + 2^-22), which rounds to 127.
            q0 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[i], s), ROUNDER))
            q1 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[i + 1], s), ROUNDER))
            q2 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[i + 2], s), ROUNDER))
            q3 = ptx.float_to_bits(ptx.add_rn(ptx.mul_rn(x_r[i + 3], s), ROUNDER))
            word = int32(ptx.byte_permute(ptx.byte_permute(q0, q1, 0x40), ptx.byte_permute(q2, q3, 0x40), 0x5410))
            q_sum = ptx.dp4a(word, ALL_ONES, q_sum)
            if share < SHARES and piece < STRIDE:
                share_word(q_s, int32((piece // PANEL_INTS) * PANEL_Q + token * PANEL_INTS + piece % PANEL_INTS), word)
        return q_sum

    def gemm_few(
        words, x, norm, eps, x_scale, x_q_sum, count, scales, bias, out, M, rows, unit_count, up_offset, bound1, bound2
    ):  # fmt: skip
        sum_s = ptx.pointer(cuda.shared.array(SUMS, int32, SHARED_ALIGN))
        q_s = ptx.pointer(cuda.shared.array(Q_WORDS, int32, SHARED_ALIGN))
        square_s = ptx.pointer(cuda.shared.array(SQUARES, float64))
        max_s = ptx.pointer(cuda.shared.array(MAXIMA, int32))
        s_s = ptx.pointer(cuda.shared.array(SCALES, int32))  # as bits
        q_sum_s = ptx.pointer(cuda.shared.array(STATS, int32))
        w_r = cuda.local.array(W_REGS, int32)
        b_r = cuda.local.array(B_REGS, int32)
        acc_r = cuda.local.array(ACC_REGS, int32)
        x_r = cuda.local.array(ALL_X_REGS, float32)
        n_r = cuda.local.array(N_REGS, float32)
        old_r = cuda.local.array(OUT_ROUNDS, float32)

        tid = int32(cuda.threadIdx.x)
        warp, lane = tid >> 5, tid & 31
        g, i = lane >> 2, lane & 3
        first, grid = int32(cuda.blockIdx.y), int32(cuda.gridDim.y)
        first_token = int32(first % CLUSTER * OWN) if CLUSTER > 1 else int32(0)  # that this block norms
        limit = min(int32(M), int32(count[0]))  # no kernel writes it: it may be read before the wait

        if CLUSTER > 1:
            ptx.cluster_arrive()  # this block has begun: others may store here

        # 1. This block's weights, and the norm's; what results need of their rows.
        lane_rd = int32((g >> 2) * 16 + (i & 1) * 8 + (g & 3) * 2)
        lane_column = int32((i >> 1) * BLOCK_COLS)
        load_words(w_r, words, warp, lane_rd, lane_column, first, grid, unit_count, up_offset)
        if NORM:
            for a in range(TURNS):
                load_share(n_r, a * X_REGS, norm, int32(0), int32(warp + a * P), lane)
        for n in range(ACC_REGS):
            acc_r[n] = int32(0)
        m0 = m1 = m2 = ZERO
        if not ACC:
            m0 = scales[0]
            m1 = scales[1] if bound1 < rows or GATED else ZERO
            m2 = scales[2] if bound2 < rows else ZERO
        # Element e of a unit's sums: row and token as a fragment has them.
        element = int32(tid % FRAGMENT)
        e_lane, e_k = element >> 2, element & 3
        e_row = int32((e_lane >> 4) * 8 + (e_lane >> 2 & 3) * 2 + (e_k >> 1))
        token = int32((e_lane & 3) * 2 + (e_k & 1))
        trigger()
        wait()
        if limit <= 0:
            return

        # 2. Activations as int8, their scales and sums.
        token_s, token_q_sum = ZERO, int32(0)
        lane_token = min(lane, int32(OWN - 1))
        if INT8:
            q_rd = int32(min(g, int32(limit - 1)) * STRIDE + i * 4)
            for j in range(AHEAD):
                load_q(b_r, x, q_rd, int32(warp + j * P), int32((warp + j * P) * PANEL + lane_column), j)
            if token < limit:
                token_s, token_q_sum = x_scale[token], x_q_sum[token]
        else:
            for t in range(OWN):
                start = int32(min(int32(first_token + t), int32(limit - 1)) * COLUMNS)
                for a in range(TURNS):
                    load_share(x_r, t * N_REGS + a * X_REGS, x, start, int32(warp + a * P), lane)
        for n in range(OUT_ROUNDS):
            old_r[n] = ZERO
            if RESIDUAL:
                unit = int32(first + (tid + n * THREADS) // FRAGMENT * grid)
                row = int32(unit * BLOCK_ROWS + e_row)
                if unit < unit_count and row < rows and token < limit:
                    old_r[n] = out[token * rows + row]
        if NORM:
            for t in range(OWN):
                for a in range(TURNS):
                    squares = float64(0)
                    for n in range(X_REGS):
                        value = x_r[t * N_REGS + a * X_REGS + n]
                        squares += float64(ptx.mul_rn(value, value))
                    for step in range(5):
                        squares += ptx.shuffle_xor(squares, 1 << step)
                    if lane == 0 and warp + a * P < SHARES:
                        square_s[t * SHARES + warp + a * P] = squares
            cuda.syncthreads()
            # A token's divisions and its root depend on each other: lanes do them for all tokens at once.
            squares = float64(0)
            for n in range(SHARES):
                squares += square_s[lane_token * SHARES + n]
            mean = float32(squares / float64(COLUMNS))
            inverses = ptx.div_rn(ONE, ptx.sqrt_rn(ptx.add_rn(mean, eps)))
            for t in range(OWN):
                inverse = ptx.shuffle(inverses, t)
                for n in range(N_REGS):
                    x_r[t * N_REGS + n] = ptx.mul_rn(n_r[n], ptx.mul_rn(x_r[t * N_REGS + n], inverse))
        if not INT8:
            for t in range(OWN):
                # As bits, which order |v| as the numbers do and put NaN above all: a maximum of floats would drop it.
                most = int32(0)
                for n in range(N_REGS):
                    most = max(most, int32(ptx.float_to_bits(x_r[t * N_REGS + n]) & MAGNITUDE))
                most = warp_max(most)
                if lane == 0:
                    max_s[t * P + warp] = most
            cuda.syncthreads()
            most = int32(0)
            for n in range(P):
                most = max(most, max_s[lane_token * P + n])
            largest = ptx.bits_to_float(uint32(most))
            all_s = ptx.mul_rn(ptx.div_rn(ONE, MIN_ABSMAX if largest < MIN_ABSMAX else largest), Q_MAX)
            if CLUSTER > 1:
                ptx.cluster_wait()
            if warp == 0 and lane < OWN:
                share_word(s_s, int32(first_token + lane), int32(ptx.float_to_bits(all_s)))
            for t in range(OWN):
                s, q_sum = ptx.shuffle(all_s, t), int32(0)
                for a in range(TURNS):
                    q_sum = quantise(
                        q_s, x_r, t * N_REGS + a * X_REGS, s, int32(first_token + t), int32(warp + a * P), lane, q_sum
                    )
                q_sum = warp_add(q_sum)
                if lane == 0:
                    share_word(q_sum_s, int32((first_token + t) * P + warp), q_sum)
            if MISSING > 0 and tid < T * MISSING:
                piece = int32(WRITTEN + tid % MISSING)
                q_s[(piece // PANEL_INTS) * PANEL_Q + tid // MISSING * PANEL_INTS + piece % PANEL_INTS] = int32(0)
            if CLUSTER > 1:
                ptx.cluster_arrive()
                ptx.cluster_wait()
            else:
                cuda.syncthreads()

        # 3. Products.
        if not INT8:
            q_rd = int32(min(g, int32(T - 1)) * PANEL_INTS + i * 4)
        for j in range(EACH):
            if INT8:
                n = 4 * (j % AHEAD)
                multiply_panel(acc_r, w_r, j, b_r[n], b_r[n + 1], b_r[n + 2], b_r[n + 3])
                if j + AHEAD < EACH:
                    panel = int32(warp + (j + AHEAD) * P)
                    load_q(b_r, x, q_rd, panel, int32(panel * PANEL + lane_column), j % AHEAD)
            else:
                b0, b1, b2, b3 = ptx.load4(q_s, int32(warp + j * P) * PANEL_Q + q_rd)
                multiply_panel(acc_r, w_r, j, b0, b1, b2, b3)

        # 4. The warps' sums meet, and leave.
        for r in range(R):
            at = warp * WARP_INTS + r * FRAGMENT + lane * 4
            ptx.store4(sum_s, at, acc_r[4 * r], acc_r[4 * r + 1], acc_r[4 * r + 2], acc_r[4 * r + 3])
        cuda.syncthreads()
        if not INT8 and token < T:
            token_s = ptx.bits_to_float(uint32(s_s[token]))
            for n in range(P):
                token_q_sum += q_sum_s[token * P + n]
        for n in range(OUT_ROUNDS):
            slot = int32((tid + n * THREADS) // FRAGMENT)
            unit = int32(first + slot * grid)
            row = int32(unit * BLOCK_ROWS + e_row)
            if slot < UNITS and unit < unit_count and row < rows and token < limit:
                c = e = int32(0)
                at = int32(slot * (HALVES * FRAGMENT) + element)
                for k in range(P):
                    c = int32(c + sum_s[at + k * WARP_INTS])
                    if GATED:
                        e = int32(e + sum_s[at + (k * WARP_INTS + FRAGMENT)])
                m_row = m0 if row < bound1 else (m1 if row < bound2 else m2)
                y = finish(c, e, token_q_sum, m_row, m1, token_s, bias, row, rows, old_r[n])
                out[token * rows + row] = y

    return gemm_few


@cache
def gemm_few_spec(
    arch: int,
    K: int,
    split: Plan,
    tokens: int,
    prologue: str = "int8",
    epilogue: str = "store",
    activation: str = "relu2",
    bias: bool = False,
    spread: bool = False,
    cluster: int = 1,
) -> KernelSpec:
    """The compiled variant for a plan; spread and cluster: see `gemm_few`."""
    int8, gated = prologue == "int8", epilogue == "gated"
    f32, i32 = types.CPointer(types.float32), types.CPointer(types.int32)
    signature = (
        i32,  # words
        i32 if int8 else f32,  # x
        f32 if prologue == "norm" else types.none,  # norm
        types.float32,  # eps
        *((f32, i32) if int8 else (types.none, types.none)),  # x_scale, x_q_sum
        i32,  # count
        f32,  # scales
        f32 if bias else types.none,  # bias
        i32 if epilogue == "acc" else f32,  # out
        *(types.int32,) * 6,  # M, rows, unit_count, up_offset, bound1, bound2
    )
    kind = f"gated {activation}" if gated else epilogue
    panels = -(-K // (PANEL * split.warps))
    row_blocks = split.units * (2 if gated else 1)
    activations = 4 * min(panels, MAX_AHEAD) if int8 else 4 * -(-panels // 2) * (tokens // cluster + 1)
    registers = 2 * panels * row_blocks + 4 * row_blocks + activations + (EXTRA_REGISTERS if int8 else NORM_REGISTERS)
    threads = split.warps * WARP
    blocks = max(1, min(MAX_BLOCKS_PER_SM, REGISTERS // (threads * registers)))
    return KernelSpec(
        name=f"gemm_few[{K} {tokens} {prologue} {kind} {'bias ' if bias else ''}{split.units} {split.warps} {cluster}]",
        kernel=make_gemm_few(arch, K, split, tokens, prologue, epilogue, activation, cluster),
        signature=signature,
        threads=threads,
        blocks_per_sm=blocks,
        one_per_sm=spread and blocks > 1,
        cluster=cluster,
    )


def gemm_few(
    device: Device,
    linear: PackedLinear,
    x: Any,
    count: Any,
    out: Any,
    num_tokens: int,
    *,
    norm: Norm | None = None,
    epilogue: str = "store",
    activation: str = "relu2",
    spread: bool = True,
    cluster: int = 1,
    use_pdl: bool = True,
) -> Launch:
    """The launch of a product with 1 to 8 tokens' activations.

    x: QuantizedActivations; or float32 [num_tokens, K], which is normed if there is a norm, and quantised. count, out
    and epilogues as of `gemm`. spread: as of `gemv`. cluster: blocks that share norms
    and quantisation. Raises ValueError for operands that do not fit, or a matrix too
    large.
    """
    N, K, gated, int8 = linear.N, linear.K, epilogue == "gated", isinstance(x, QuantizedActivations)
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"gemm_few: 1 to {MAX_TOKENS} tokens, not {num_tokens}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"gemm_few: no epilogue {epilogue!r}, only {', '.join(EPILOGUES)}")
    if int8 and norm is not None:
        raise ValueError("gemm_few: the norm comes before quantisation, and x is quantised")
    if not int8 and K % 4:
        raise ValueError(f"gemm_few: floats come in rows of a multiple of 4 columns, not {K}")
    check_segments("gemm_few", linear.segments, gated)
    split = plan(N, K, device.num_sms, gated, cluster)
    if split is None:
        raise ValueError(f"gemm_few: a block cannot hold its share of a {N} x {K} product")
    rows = N // 2 if gated else N
    weight = norm.weight if norm is not None else None
    inputs = x.sizes(num_tokens, K) if int8 else {"x": (x, num_tokens * K, "float32"), "norm": (weight, K, "float32")}
    words, scales, bias, count, out, *operands = checked(
        "gemm_few",
        f"a {N} x {K} product of {num_tokens} tokens",
        **linear.sizes(),
        count=(count, 1, "int32"),
        out=(out, num_tokens * rows, "int32" if epilogue == "acc" else "float32"),
        **inputs,
    )
    x, weight, x_scale, x_q_sum = (operands[0], None, *operands[1:]) if int8 else (*operands, None, None)
    prologue = "int8" if int8 else "quantize" if norm is None else "norm"
    made_for = MAX_TOKENS if int8 else num_tokens
    spec = gemm_few_spec(
        device.arch, K, split, made_for, prologue, epilogue, activation, bias is not None, spread, cluster
    )
    unit_count = -(-rows // BLOCK_ROWS)
    arguments = (
        words, x, weight, norm.eps if norm is not None else 0.0, x_scale, x_q_sum, count, scales, bias, out,
        num_tokens, rows, unit_count, unit_count if gated else 0, *(*linear.segment_ends, N, N)[:2],
    )  # fmt: skip
    return device.launch(spec, (1, split.grid), arguments, use_pdl)
