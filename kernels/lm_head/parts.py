"""What the LM-head kernels share: sizes of rows, and int8 weights as floats.

int8 -> float32     b ^ 0x80 is b + 128 as uint8. As the low byte of 0x4B000000, the float32 2^23, it makes
                    2^23 + 128 + b, and one subtraction leaves b. A conversion instruction has a quarter of the rate.
int8 -> bfloat16    two at a time. The low seven bits under an exponent of 2^7 make 128 + (b & 127); from it 128 is
                    subtracted, or 256 if the sign bit is set. All of these are bfloat16 numbers, so b is exact.
"""

import numpy as np

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.operands import RowDtype
from bitnet_numba.kernels.ptx.base import device_function, float32, int32
from bitnet_numba.packing import BLOCK_COLS

WORD_COLUMNS: dict[RowDtype, int] = {"bf16": 2, "f16": 2, "f32": 1, "int8": 4}  # columns of a row in an int32

SIGNS = np.int32(-0x7F7F7F80)  # the sign bits of four int8
BIAS = 0x4B000000  # the float32 2^23, whose low bits count ones
OFFSET = np.float32(2**23 + 128)

BF16_PLUS_128, BF16_ONE = 0x43004300, 0x3F803F80  # pairs of bfloat16
BF16_MINUS_128 = int(np.uint32(0xC300C300).astype(np.int32))  # with the lowest bit of its exponent set: -256
LOW_PAIR, HIGH_PAIR = 0x4140, 0x4342  # selectors of `byte_permute`: bytes 0, 1 or 2, 3, each in half a word


@device_function
def flip_signs(word):
    """Four int8 as uint8, each 128 larger."""
    return int32(word ^ SIGNS)


@device_function
def int8_to_float(flipped, byte):
    """float32 of int8 number `byte` (a constant, 0 to 3) of a word after `flip_signs`."""
    return float32(ptx.bits_to_float(ptx.byte_permute(flipped, BIAS, 0x7540 + byte)) - OFFSET)


@device_function
def int8_pair_to_bf16(word, selector):
    """Two of a word's int8 (LOW_PAIR or HIGH_PAIR) as two bfloat16 in a word."""
    pair = int32(ptx.byte_permute(word, 0, selector))
    return ptx.fma_bf16x2(int32(pair & 0x7F007F | BF16_PLUS_128), BF16_ONE, int32(pair & 0x800080 | BF16_MINUS_128))


@device_function
def put4(registers, i, values):
    """registers[i .. i + 3] = values."""
    registers[i], registers[i + 1], registers[i + 2], registers[i + 3] = values


def load_columns(dtype: RowDtype) -> int:
    """Columns of a row of the table in 16 bytes."""
    return 4 * WORD_COLUMNS[dtype]


def check_columns(K: int) -> None:
    """Raises ValueError unless K is a multiple of 32."""
    if K < 1 or K % BLOCK_COLS:
        raise ValueError(f"LM head rows must have a multiple of {BLOCK_COLS} columns, not {K}")
