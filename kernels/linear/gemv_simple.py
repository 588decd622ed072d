"""The W2A8 matrix-vector product, three times: `@cuda.jit` kernels to read and to learn from. gemv.py is the fast one.

    out[n] = sum_k q[k] * w[n, k]        w: N x K weights of -1, 0, +1, two bits each; q: the token's K int8 activations

The sums are exact integers. One multiplication a row is left for y: with x = q / s (absmax quantisation) and a matrix
w * m, that is y[n] = out[n] * m / s.

A weight is stored as its code, w + 2, and sixteen codes are an int32 word: the words of an N x K matrix are N * K / 4
bytes, an eighth of float16. All of them are read for each token, and used once. So the least time is what reading them
takes (2560 x 2560: 1.6 MB, 0.4 us at the 4 TB/s of an H200); each kernel comes closer to it than the one before.

    kernel                a thread owns                    weights come in        PTX instructions for 16 weights
    one_code_at_a_time    a row                            4 bytes, 16 times      1,100, most of them for indices
    four_codes_at_a_time  a row                            4 bytes                79, of which 8 dp4a
    four_rows_at_a_time   4 rows, 16 columns in every 64+  16 bytes               22, of which 5 dp4a

1. `one_code_at_a_time` is the definition. Pair p of a word's bits holds column 4 * (p % 4) + p // 4 of its 16 columns
   (packing.py draws why: see 2), so column c is in pair 4 * (c % 4) + c // 4.

2. `four_codes_at_a_time`: `dp4a(a, b, acc)` multiplies four int8 of a with four of b and adds all to acc, in one
   instruction. The codes lie so that one shift and one mask make them its operand:

       (word >> 2 * i) & 0x03030303  ->  the codes of columns 4i, 4i + 1, 4i + 2, 4i + 3, a byte each

   The offset of the codes comes off once per row: sum(q * w) = sum(q * code) - 2 * sum(q).

3. `four_rows_at_a_time`: memory is fast only if many bytes are asked for at once, and a thread a row is too little:
   2,560 threads on a GPU that can run 270,000, each waiting for 4 bytes. The words of 16 rows lie side by side (a
   row-block), so here a block of threads owns a row-block and reads it in pieces of 16 bytes, the widest load there is:

       words of the row-block    0..3  4..7  8..11  ...  28..31 | 32..35  ...      32 words: 16 rows x 32 columns
       thread                    0     1     2      ...  7      | 8       ...      and on to the last one, then again

       words 4j .. 4j + 3 of 32, j = thread % 8:      j = 0   rows 0-3,  columns 0-15      4   rows  8-11, columns  0-15
                                                          1   rows 4-7,  columns 0-15      5   rows 12-15, columns  0-15
                                                          2   rows 0-3,  columns 16-31     6   rows  8-11, columns 16-31
                                                          3   rows 4-7,  columns 16-31     7   rows 12-15, columns 16-31

   One load of 16 activations now serves 64 weights. A thread keeps the sums of its four rows in registers; at the end
   they meet in shared memory. Integers may be added in any order, so the result is the same every time.

   A warp a row-block (32 threads) is the plainest split; with 64 to 256, more loads are under way at once.

    import numpy as np
    from numba import cuda
    from bitnet_numba.kernels.linear.gemv_simple import *
    from bitnet_numba.packing import pack_ternary

    rng = np.random.default_rng(0)
    w = rng.integers(-1, 2, (50, 100)).astype(np.int8)      # N x K; any sizes
    q = rng.integers(-127, 128, 100).astype(np.int8)
    words = cuda.to_device(pack_ternary(w))
    codes_of_q = cuda.to_device(q)
    words_of_q = cuda.to_device(four_a_word(q))
    out = cuda.device_array(50, np.int32)
    one_code_at_a_time[2, 32](words, codes_of_q, out)       # blocks * threads >= N
    four_codes_at_a_time[2, 32](words, words_of_q, out)
    four_rows_at_a_time[4, 32](words, words_of_q, out)      # a block for each 16 rows; threads: a multiple of 16
    assert (out.copy_to_host() == w.astype(np.int32) @ q).all()

This runs on any NVIDIA GPU from sm_61 on, and without one under NUMBA_ENABLE_CUDASIM=1.

gemv.py goes on from 3: it quantises x itself, keeps a block's weights in registers and asks for all of them before the
kernel ahead of it has ended, has exactly as many blocks as the GPU has SMs, and needs two instructions
for four weights.
"""

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function, int32
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, CODE_BITS, CODE_MASK, CODE_OFFSET, WORD_CODES

__all__ = ["four_a_word", "four_codes_at_a_time", "four_rows_at_a_time", "one_code_at_a_time"]

BLOCK_WORDS = BLOCK_ROWS * BLOCK_COLS // WORD_CODES  # 32
ONE_CODE = (1 << CODE_BITS) - 1
ALL_ONES = 0x01010101  # four int8 of 1: dp4a with it adds up four activations


def four_a_word(q: NDArray[np.int8]) -> NDArray[np.int32]:
    """int8 [K] as int32 words of four, padded with zeros as the weights are: int32 [K rounded up to 32, over 4]."""
    padded = np.zeros(-(-len(q) // BLOCK_COLS) * BLOCK_COLS, np.int8)
    padded[: len(q)] = q
    return padded.view(np.int32)


@device_function
def word_index(n, k, K):
    """Which word holds row n, column k of a matrix of K columns (drawn in packing.py)."""
    column_blocks = (K + BLOCK_COLS - 1) // BLOCK_COLS
    block = n // BLOCK_ROWS * column_blocks + k // BLOCK_COLS
    row, column = n % BLOCK_ROWS, k % BLOCK_COLS
    return block * BLOCK_WORDS + row // 8 * 16 + column // WORD_CODES * 8 + row % 8


@device_function
def dot16(word, x0, x1, x2, x3, acc):
    """acc + sixteen codes times sixteen activations: x0 holds columns 0-3, x1 4-7, x2 8-11, x3 12-15."""
    acc = ptx.dp4a(word & CODE_MASK, x0, acc)
    acc = ptx.dp4a((word >> CODE_BITS) & CODE_MASK, x1, acc)
    acc = ptx.dp4a((word >> 2 * CODE_BITS) & CODE_MASK, x2, acc)
    return ptx.dp4a((word >> 3 * CODE_BITS) & CODE_MASK, x3, acc)


@device_function
def sum16(x0, x1, x2, x3, acc):
    """acc + sixteen activations."""
    return ptx.dp4a(ALL_ONES, x0, ptx.dp4a(ALL_ONES, x1, ptx.dp4a(ALL_ONES, x2, ptx.dp4a(ALL_ONES, x3, acc))))


@cuda.jit
def one_code_at_a_time(words, q, out):
    """A thread a row. words int32 [packed_words(N, K)]; q int8 [K]; out int32 [N]."""
    n = cuda.grid(1)
    if n < out.shape[0]:
        acc = 0
        for k in range(q.shape[0]):
            c = k % WORD_CODES
            pair = 4 * (c % 4) + c // 4
            code = (words[word_index(n, k, q.shape[0])] >> CODE_BITS * pair) & ONE_CODE
            acc += (code - CODE_OFFSET) * q[k]
        out[n] = acc


@cuda.jit
def four_codes_at_a_time(words, q, out):
    """A thread a row, a word at a time. words int32 [packed_words(N, K)]; q int32, `four_a_word`; out int32 [N]."""
    n = cuda.grid(1)
    if n < out.shape[0]:
        acc = q_sum = int32(0)
        for i in range(0, q.shape[0], 4):  # four words of q: sixteen columns
            x0, x1, x2, x3 = q[i], q[i + 1], q[i + 2], q[i + 3]
            acc = dot16(words[word_index(n, 4 * i, 4 * q.shape[0])], x0, x1, x2, x3, acc)
            q_sum = sum16(x0, x1, x2, x3, q_sum)
        out[n] = acc - CODE_OFFSET * q_sum


@cuda.jit
def four_rows_at_a_time(words, q, out):
    """A block 16 rows, a thread four words at a time. words int32 [packed_words(N, K)]; q int32, `four_a_word`;
    out int32 [N]. Blocks of a multiple of 16 threads, one for each 16 rows."""
    sums = cuda.shared.array(BLOCK_ROWS, int32)
    thread = cuda.threadIdx.x
    if thread < BLOCK_ROWS:
        sums[thread] = 0
    cuda.syncthreads()

    row_block_words = 4 * q.shape[0]  # 16 rows of 4 * q.shape[0] columns, 16 codes a word
    acc0 = acc1 = acc2 = acc3 = q_sum = int32(0)
    for i in range(4 * thread, row_block_words, 4 * cuda.blockDim.x):
        w0, w1, w2, w3 = ptx.load4(words, cuda.blockIdx.x * row_block_words + i)  # one 16-byte load
        x0, x1, x2, x3 = ptx.load4(q, i // BLOCK_WORDS * 8 + i % 16 // 8 * 4)  # the 16 columns of all four
        acc0, acc1 = dot16(w0, x0, x1, x2, x3, acc0), dot16(w1, x0, x1, x2, x3, acc1)
        acc2, acc3 = dot16(w2, x0, x1, x2, x3, acc2), dot16(w3, x0, x1, x2, x3, acc3)
        q_sum = sum16(x0, x1, x2, x3, q_sum)

    row = thread % 8 // 4 * 8 + thread % 2 * 4
    cuda.atomic.add(sums, row, acc0 - CODE_OFFSET * q_sum)  # each thread takes off its own columns' share
    cuda.atomic.add(sums, row + 1, acc1 - CODE_OFFSET * q_sum)
    cuda.atomic.add(sums, row + 2, acc2 - CODE_OFFSET * q_sum)
    cuda.atomic.add(sums, row + 3, acc3 - CODE_OFFSET * q_sum)
    cuda.syncthreads()
    n = cuda.blockIdx.x * BLOCK_ROWS + thread
    if thread < BLOCK_ROWS and n < out.shape[0]:
        out[n] = sums[thread]
