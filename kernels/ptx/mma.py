"""Machine instructions of the tensor cores and what feeds them: asynchronous copies, matrices from shared memory.

Each has a plain-Python stand-in for the simulator; the conventions are those of `intrinsics`.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from bitnet_numba.kernels.ptx.base import SIMULATED, WARP, device_function, instruction, int32
from bitnet_numba.kernels.ptx.cp_async import cp_async_16
from bitnet_numba.kernels.ptx.math import bf16_high, bf16_low, float_to_bits

# ---- Matrices from shared memory ------------------------------------------------------------------------------------

# Matrices of 8 x 8 bfloat16 from shared memory. The place of a row is a 32-bit address, `shared_address`; under
# the simulator it is an offset in bytes, so the array comes along.

if SIMULATED:

    def shared_address(p: Any, i: Any) -> Any:
        """The place of element i of a shared array of 32-bit elements, int32, for the functions below."""
        return int32(4 * int(i))

    def _matrices(p: Any, at: Any) -> np.ndarray:
        rows = threading.current_thread().gather_in_warp(int(at) // 4)  # type: ignore[attr-defined]
        words = np.array([[int(p[row + k]) & 0xFFFFFFFF for k in range(4)] for row in rows], np.uint32)
        return words.view(np.uint16).reshape(4, 8, 8)  # [matrix, row, column]

    def ldmatrix_x4(p: Any, at: Any) -> tuple:
        """Four 8 x 8 matrices of bfloat16, int32 x 4: lane 8 i + r gives the place of row r of matrix i (16 bytes, a
        multiple of 16), and receives of each matrix row lane // 4, columns 2 (lane % 4) and the next. sm_75."""
        g, c = divmod(threading.current_thread().thread_id % WARP, 4)  # type: ignore[attr-defined]
        return tuple(int32(int(m[g, 2 * c]) | int(m[g, 2 * c + 1]) << 16) for m in _matrices(p, at))

    def ldmatrix_x4_trans(p: Any, at: Any) -> tuple:
        """The same, but each lane receives column lane // 4, rows 2 (lane % 4) and the next. sm_75."""
        g, c = divmod(threading.current_thread().thread_id % WARP, 4)  # type: ignore[attr-defined]
        return tuple(int32(int(m[2 * c, g]) | int(m[2 * c + 1, g]) << 16) for m in _matrices(p, at))

    def cp_async_16_at(to: Any, at: Any, source: Any, j: Any, size: Any) -> None:
        """`cp_async_16` to the place `at` of a shared array; of the 16 bytes the first `size` are copied, 0 or 16, and
        the others zero: with 0 the source is not read. The address must lie in it all the same, since a memory
        checker may look at nothing else. sm_80."""
        if not 0 <= int(j) <= source.size - 4:
            raise IndexError(f"a copy from elements {int(j)} .. {int(j) + 3} of {source.size}")
        cp_async_16(to, int(at) // 4, source, j, size)

else:

    @instruction("{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }", "r", "p")
    def _shared_address(p: Any, i: Any) -> Any: ...

    @device_function
    def shared_address(p: Any, i: Any) -> Any:
        return _shared_address(p, i)

    @instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "r", effects=True)
    def _ldmatrix_x4(at: Any) -> Any: ...

    @instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "r", effects=True)
    def _ldmatrix_x4_trans(at: Any) -> Any: ...

    @instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "", "rpr", effects=True)
    def _cp_async_16_at(at: Any, source: Any, j: Any, size: Any) -> Any: ...

    @device_function
    def ldmatrix_x4(p: Any, at: Any) -> Any:
        return _ldmatrix_x4(at)

    @device_function
    def ldmatrix_x4_trans(p: Any, at: Any) -> Any:
        return _ldmatrix_x4_trans(at)

    @device_function
    def cp_async_16_at(to: Any, at: Any, source: Any, j: Any, size: Any) -> None:
        _cp_async_16_at(at, source, j, size)


# ---- Matrix products ------------------------------------------------------------------------------------------------


@instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff")
def pack_bf16x2(low: Any, high: Any) -> Any:
    """Two float32 rounded to bfloat16, ties to even, as a word. sm_80."""

    def rounded(x: Any) -> int:
        bits = int(float_to_bits(x))
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if x == x else 0x7FFF

    return int32(rounded(high) << 16 | rounded(low))


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    "ffff",
    "rrrrrrffff",
)
def mma_bf16(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
    """The warp's C [16, 8] += A [16, 16] . B [16, 8], bfloat16 in, float32 sums; returns c0 .. c3. sm_80.

    With g = lane // 4, c = lane % 4, a lane holds of A rows g (a0, a2) and g + 8 (a1, a3), columns 2c, 2c + 1 (a0, a1)
    and 2c + 8, 2c + 9 (a2, a3); of B column g, rows 2c, 2c + 1 (b0) and 2c + 8, 2c + 9 (b1); of C rows g (c0, c1) and
    g + 8 (c2, c3), columns 2c and 2c + 1.
    """
    thread: Any = threading.current_thread()
    lanes = thread.gather_in_warp((a0, a1, a2, a3, b0, b1))
    words = np.array(lanes, np.int64).astype(np.uint32)  # [32, 6]
    halves = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], -1).view(np.float32)  # [32, 6, 2]
    quads = halves.reshape(8, 4, 6, 2)
    a = np.empty((16, 16), np.float64)  # [row, k]
    b = np.empty((16, 8), np.float64)  # [k, column]
    for c in range(4):
        for half in range(2):
            a[:8, 2 * c + half], a[8:, 2 * c + half] = quads[:, c, 0, half], quads[:, c, 1, half]
            a[:8, 2 * c + 8 + half], a[8:, 2 * c + 8 + half] = quads[:, c, 2, half], quads[:, c, 3, half]
            b[2 * c + half], b[2 * c + 8 + half] = quads[:, c, 4, half], quads[:, c, 5, half]
    g, c = divmod(thread.thread_id % WARP, 4)
    rows = a[[g, g, g + 8, g + 8]] * b[:, [2 * c, 2 * c + 1] * 2].T
    return tuple(np.float32(np.float64(start) + row.sum()) for start, row in zip((c0, c1, c2, c3), rows, strict=True))


_MMA_SMALL = "mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32"
_MMA_S8 = {
    80: "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    # Four of eight rows and sixteen columns each: their operands' registers are the larger one's, one by one.
    75: "{ .reg .s32 s<4>; "
    f"{_MMA_SMALL} {{s0, s1}}, {{$4}}, {{$8}}, {{$10, $11}}; {_MMA_SMALL} {{s2, s3}}, {{$5}}, {{$8}}, {{$12, $13}}; "
    f"{_MMA_SMALL} {{s0, s1}}, {{$6}}, {{$9}}, {{s0, s1}}; {_MMA_SMALL} {{s2, s3}}, {{$7}}, {{$9}}, {{s2, s3}}; "
    "mov.b32 $0, s0; mov.b32 $1, s1; mov.b32 $2, s2; mov.b32 $3, s3; }",
}


def _mma_s8(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
    thread: Any = threading.current_thread()
    lanes = np.array([[int(x) & 0xFFFFFFFF for x in lane] for lane in thread.gather_in_warp((a0, a1, a2, a3, b0, b1))])
    quads = lanes.astype("<u4").view(np.uint8).reshape(8, 4, 6, 4)  # [g, c, register, byte]
    a = np.empty((16, 32), np.int64)  # [row, k]
    b = np.empty((32, 8), np.int64)  # [k, column]
    for half in range(2):
        a[:8, 16 * half :][:, :16] = quads[:, :, 2 * half].reshape(8, 16)
        a[8:, 16 * half :][:, :16] = quads[:, :, 2 * half + 1].reshape(8, 16)
        b[16 * half :][:16] = quads[:, :, 4 + half].view(np.int8).reshape(8, 16).T
    g, c = divmod(thread.thread_id % WARP, 4)
    sums = (a[[g, g, g + 8, g + 8]] * b[:, [2 * c, 2 * c + 1] * 2].T).sum(axis=1)
    return tuple(int32(int(start) + int(more)) for start, more in zip((c0, c1, c2, c3), sums, strict=True))


_MMA_OF = {least: instruction(ptx, "rrrr", "rrrrrrrrrr")(_mma_s8) for least, ptx in _MMA_S8.items()}


def mma_s8(arch: int) -> Callable:
    """`mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)`: the warp's C [16, 8] += A [16, 32] . B [32, 8], uint8 . int8,
    int32 sums; returns c0 .. c3. sm_75 (there in four parts).

    With g = lane // 4, c = lane % 4, a lane holds of A rows g (a0, a2) and g + 8 (a1, a3), columns 4c .. 4c + 3 (a0,
    a1) and 4c + 16 .. 4c + 19 (a2, a3); of B column g, rows 4c .. 4c + 3 (b0) and 4c + 16 .. 4c + 19 (b1); of C rows
    g (c0, c1) and g + 8 (c2, c3), columns 2c and 2c + 1.
    """
    return _MMA_OF[max(least for least in _MMA_OF if least <= max(arch, 75))]


_MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@instruction(
    "{ .reg .f32 s<4>; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$4, $5, $6, $7}}, {{$20, $21}}, {{$24, $25, $26, $27}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$8, $9, $10, $11}}, {{$20, $21}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$12, $13, $14, $15}}, {{$22, $23}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{$0, $1, $2, $3}}, {{$16, $17, $18, $19}}, {{$22, $23}}, {{s0, s1, s2, s3}}; }}",
    "ffff",
    "r" * 20 + "ffff",
)
def mma_bf16_split(
    h0: Any, h1: Any, h2: Any, h3: Any, l0: Any, l1: Any, l2: Any, l3: Any,
    h4: Any, h5: Any, h6: Any, h7: Any, l4: Any, l5: Any, l6: Any, l7: Any,
    b0: Any, b1: Any, b2: Any, b3: Any, c0: Any, c1: Any, c2: Any, c3: Any,
) -> tuple:  # fmt: skip
    """`mma_bf16` over 32 columns with A a sum of two terms: h and l 0 .. 3 with b0, b1, then 4 .. 7 with b2, b3. sm_80.

    One for the compiler, which weighs how much a loop holds before it unrolls it.
    """
    c0, c1, c2, c3 = mma_bf16(h0, h1, h2, h3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(l0, l1, l2, l3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(h4, h5, h6, h7, b2, b3, c0, c1, c2, c3)
    return mma_bf16(l4, l5, l6, l7, b2, b3, c0, c1, c2, c3)


@instruction("fma.rn.bf16x2 $0, $1, $2, $3;", "r", "rrr")
def fma_bf16x2(a: Any, b: Any, c: Any) -> Any:
    """a * b + c for two bfloat16 in each word, one rounding. sm_80."""
    low = bf16_low(a) * np.float64(bf16_low(b)) + bf16_low(c)
    high = bf16_high(a) * np.float64(bf16_high(b)) + bf16_high(c)
    return pack_bf16x2(np.float32(low), np.float32(high))
