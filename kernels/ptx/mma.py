"""Tensor cores from registers (`mma`), and `ldmatrix`, which loads their operands from shared memory.

How a matrix lies in a warp's registers is in the docstrings, with g = lane // 4 and c = lane % 4 throughout.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bitnet_numba.kernels.ptx.base import WARP, instruction, int32, simulated_thread


def _lane() -> tuple[int, int]:
    """g and c of the running thread."""
    return divmod(simulated_thread().thread_id % WARP, 4)


def _registers(lanes: list[tuple]) -> np.ndarray:
    """The warp's words, little-endian uint32 [g, c, register]."""
    return np.array([[int(x) & 0xFFFFFFFF for x in lane] for lane in lanes]).astype("<u4").reshape(8, 4, -1)


def _own(product: np.ndarray) -> np.ndarray:
    """The four elements of a product [16, 8] that the running thread holds."""
    g, c = _lane()
    return product[[g, g, g + 8, g + 8], [2 * c, 2 * c + 1] * 2]


# ---- Matrices from shared memory -----------------------------------------------------------------------------------


def _matrices(array: Any, address: Any) -> np.ndarray:
    """The four matrices that a warp's addresses name, uint16 [matrix, row, column]."""
    rows = simulated_thread().gather_in_warp(int(address) // 4)
    words = np.array([[int(array[row + k]) & 0xFFFFFFFF for k in range(4)] for row in rows], np.uint32)
    return words.view(np.uint16).reshape(4, 8, 8)


@instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "sr", effects=True)
def ldmatrix_x4(array: Any, address: Any) -> tuple:
    """Four 8 x 8 matrices of bfloat16, int32 x 4: lane 8 i + r passes the address of row r of matrix i (16 bytes, a
    multiple of 16), and receives row g, columns 2c and 2c + 1, of each matrix. sm_75."""
    g, c = _lane()
    return tuple(int32(int(m[g, 2 * c]) | int(m[g, 2 * c + 1]) << 16) for m in _matrices(array, address))


@instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "sr", effects=True)
def ldmatrix_x4_trans(array: Any, address: Any) -> tuple:
    """The same, but each lane receives column g, rows 2c and 2c + 1. sm_75."""
    g, c = _lane()
    return tuple(int32(int(m[2 * c, g]) | int(m[2 * c + 1, g]) << 16) for m in _matrices(array, address))


# ---- Products of bfloat16 and float16 ------------------------------------------------------------------------------

_MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@instruction(
    f"{_MMA_BF16} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};",
    "ffff",
    "rrrrrrffff",
)
def mma_bf16(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
    """The warp's C [16, 8] += A [16, 16] . B [16, 8], bfloat16 in, float32 sums; returns c0 .. c3. sm_80.

    A lane holds
        of A    rows g (a0, a2) and g + 8 (a1, a3), columns 2c, 2c + 1 (a0, a1) and 2c + 8, 2c + 9 (a2, a3),
        of B    column g, rows 2c, 2c + 1 (b0) and 2c + 8, 2c + 9 (b1),
        of C    rows g (c0, c1) and g + 8 (c2, c3), columns 2c (c0, c2) and 2c + 1 (c1, c3).
    """
    product = simulated_thread().once_in_warp((a0, a1, a2, a3, b0, b1), _product_bf16)
    return tuple(np.float32(np.float64(start) + x) for start, x in zip((c0, c1, c2, c3), _own(product), strict=True))


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
    "ffff",
    "rrrrrrffff",
)
def mma_f16(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
    """`mma_bf16` of float16. sm_80."""
    product = simulated_thread().once_in_warp((a0, a1, a2, a3, b0, b1), _product_f16)
    return tuple(np.float32(np.float64(start) + x) for start, x in zip((c0, c1, c2, c3), _own(product), strict=True))


def _product_bf16(lanes: list[tuple]) -> np.ndarray:
    """float64 [16, 8]: what the lanes' operands of `mma_bf16` give."""
    words = _registers(lanes)
    return _product(np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], -1).view(np.float32))


def _product_f16(lanes: list[tuple]) -> np.ndarray:
    """The same of `mma_f16`."""
    words = np.ascontiguousarray(_registers(lanes))
    return _product(words.view(np.float16).reshape(*words.shape, 2).astype(np.float32))


def _product(quads: np.ndarray) -> np.ndarray:
    """float64 [16, 8] of the lanes' numbers [g, c, register, 2]."""
    a = np.empty((16, 16), np.float64)  # [row, k]
    b = np.empty((16, 8), np.float64)  # [k, column]
    for c in range(4):
        for half in range(2):
            a[:8, 2 * c + half], a[8:, 2 * c + half] = quads[:, c, 0, half], quads[:, c, 1, half]
            a[:8, 2 * c + 8 + half], a[8:, 2 * c + 8 + half] = quads[:, c, 2, half], quads[:, c, 3, half]
            b[2 * c + half], b[2 * c + 8 + half] = quads[:, c, 4, half], quads[:, c, 5, half]
    with np.errstate(invalid="ignore"):  # infinities times zeros
        return (a[:, None] * b.T).sum(axis=-1)


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
    """Four `mma_bf16`: C += (H + L) . B over 32 columns, A a sum of two bfloat16 terms. h and l 0 .. 3 go with b0, b1;
    4 .. 7 with b2, b3. sm_80.

    To the compiler this is one instruction: it unrolls loops by how many they have.
    """
    c0, c1, c2, c3 = mma_bf16(h0, h1, h2, h3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(l0, l1, l2, l3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(h4, h5, h6, h7, b2, b3, c0, c1, c2, c3)
    return mma_bf16(l4, l5, l6, l7, b2, b3, c0, c1, c2, c3)


@instruction(
    "{ .reg .f32 s<4>; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$4, $5, $6, $7}}, {{$20, $21}}, {{$28, $29, $30, $31}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$8, $9, $10, $11}}, {{$20, $21}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$4, $5, $6, $7}}, {{$24, $25}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$12, $13, $14, $15}}, {{$22, $23}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{s0, s1, s2, s3}}, {{$16, $17, $18, $19}}, {{$22, $23}}, {{s0, s1, s2, s3}}; "
    f"{_MMA_BF16} {{$0, $1, $2, $3}}, {{$12, $13, $14, $15}}, {{$26, $27}}, {{s0, s1, s2, s3}}; }}",
    "ffff",
    "r" * 24 + "ffff",
)
def mma_bf16_split_both(
    h0: Any, h1: Any, h2: Any, h3: Any, l0: Any, l1: Any, l2: Any, l3: Any,
    h4: Any, h5: Any, h6: Any, h7: Any, l4: Any, l5: Any, l6: Any, l7: Any,
    b0: Any, b1: Any, b2: Any, b3: Any, r0: Any, r1: Any, r2: Any, r3: Any, c0: Any, c1: Any, c2: Any, c3: Any,
) -> tuple:  # fmt: skip
    """Six `mma_bf16`: as `mma_bf16_split`, and B a sum of two terms, too: C += H . B + L . B + H . R. What is left out,
    L . R, is at most 2^-16 of the product. sm_80."""
    c0, c1, c2, c3 = mma_bf16(h0, h1, h2, h3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(l0, l1, l2, l3, b0, b1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(h0, h1, h2, h3, r0, r1, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(h4, h5, h6, h7, b2, b3, c0, c1, c2, c3)
    c0, c1, c2, c3 = mma_bf16(l4, l5, l6, l7, b2, b3, c0, c1, c2, c3)
    return mma_bf16(h4, h5, h6, h7, r2, r3, c0, c1, c2, c3)


# ---- Products of bytes ---------------------------------------------------------------------------------------------


def _mma_s8_ptx(left: str) -> dict[int, str]:
    """The instruction by the first architecture that has it; left: the type of the left operand's bytes."""
    small = f"mma.sync.aligned.m8n8k16.row.col.s32.{left}.s8.s32"
    return {
        80: f"mma.sync.aligned.m16n8k32.row.col.s32.{left}.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        # Four products of m8n8k16: each of their operands is one register of the larger product's.
        75: "{ .reg .s32 s<4>; "
        f"{small} {{s0, s1}}, {{$4}}, {{$8}}, {{$10, $11}}; {small} {{s2, s3}}, {{$5}}, {{$8}}, {{$12, $13}}; "
        f"{small} {{s0, s1}}, {{$6}}, {{$9}}, {{s0, s1}}; {small} {{s2, s3}}, {{$7}}, {{$9}}, {{s2, s3}}; "
        "mov.b32 $0, s0; mov.b32 $1, s1; mov.b32 $2, s2; mov.b32 $3, s3; }",
    }


def _product_s8(lanes: list[tuple], left: Any) -> np.ndarray:
    """int64 [16, 8]: what the lanes' operands of `mma_s8` give; left: the dtype of the left operand's bytes."""
    quads = _registers(lanes).view(np.uint8).reshape(8, 4, 6, 4)  # [g, c, register, byte]
    a = np.empty((16, 32), np.int64)  # [row, k]
    b = np.empty((32, 8), np.int64)  # [k, column]
    for half in range(2):
        a[:8, 16 * half :][:, :16] = quads[:, :, 2 * half].view(left).reshape(8, 16)
        a[8:, 16 * half :][:, :16] = quads[:, :, 2 * half + 1].view(left).reshape(8, 16)
        b[16 * half :][:16] = quads[:, :, 4 + half].view(np.int8).reshape(8, 16).T
    return a @ b


def _mma_s8(left: Any) -> Callable:
    def mma(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple:
        product = simulated_thread().once_in_warp(
            (a0, a1, a2, a3, b0, b1), lambda lanes: _product_s8(lanes, left)
        )  # fmt: skip
        return tuple(int32(int(start) + int(x)) for start, x in zip((c0, c1, c2, c3), _own(product), strict=True))

    return mma


_MMA_S8 = {
    signed: {
        first: instruction(ptx, "rrrr", "rrrrrrrrrr")(_mma_s8(np.int8 if signed else np.uint8))
        for first, ptx in _mma_s8_ptx("s8" if signed else "u8").items()
    }
    for signed in (False, True)
}


def mma_s8(arch: int, signed: bool = False) -> Callable:
    """`mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)`: the warp's C [16, 8] += A [16, 32] . B [32, 8], uint8 (with
    `signed` int8) . int8, int32 sums; returns c0 .. c3. sm_75 (there as four m8n8k16).

    A lane holds
        of A    rows g (a0, a2) and g + 8 (a1, a3), columns 4c .. 4c + 3 (a0, a1) and 4c + 16 .. 4c + 19 (a2, a3),
        of B    column g, rows 4c .. 4c + 3 (b0) and 4c + 16 .. 4c + 19 (b1),
        of C    rows g (c0, c1) and g + 8 (c2, c3), columns 2c (c0, c2) and 2c + 1 (c1, c3).
    """
    return _MMA_S8[signed][max(first for first in _MMA_S8[signed] if first <= max(arch, 75))]
