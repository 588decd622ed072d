"""The tensor types of GGUF files: the size of a tensor, and its values as float32 or as ternary weights.

Most types store blocks: some weights of one row, with a scale of their own. Here `half` is a float16, and a nibble four
bits; within each type, the comment says where weight e of a block is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
I2sLayout = Literal["x86", "arm"]
I2S_LAYOUTS: tuple[I2sLayout, ...] = ("x86", "arm")

F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, BF16, TQ1_0, TQ2_0, I2_S = 0, 1, 2, 8, 12, 14, 30, 34, 35, 36
Q2_0, IQ2_BN, PQ2_0, PTQ1_0 = 42, 135, 142, 143
FLOATS = (F32, F16, BF16)
GROUPED = (Q2_0, IQ2_BN, PQ2_0, PTQ1_0)  # ternary types of models with many scales
TERNARY = (I2_S, TQ1_0, TQ2_0, Q4_0, *GROUPED, *FLOATS)  # types that can hold a ternary matrix
NOT_ONE_SCALE = "holds values that are not ternary weights times one scale"
SEVERAL_SCALES = "has several scales, which is not supported"
_I2S_SCALE = 4  # bytes of the scale after the codes of a tensor of type I2_S
# Types that are not supported, so that messages can name them. 39 is also MXFP4.
_OTHER_NAMES = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 37: "I8_S", 38: "TL1", 39: "TL2 or MXFP4", 40: "NVFP4",
}  # fmt: skip
# Of these, what is missing.
MISSING = {
    38: "its tiles depend on the kernels that it was made for; convert the model to I2_S",
    39: "its tiles depend on the kernels that it was made for; convert the model to I2_S",
}


@dataclass(frozen=True)
class _Type:
    name: str
    weights: int  # in a block
    nbytes: int  # of a block
    decode: Callable[[Bytes], Floats]  # [blocks, nbytes] -> [blocks, weights]


def type_name(kind: int) -> str:
    """The name of a type, or its number."""
    if kind in (I2_S, IQ2_BN):
        return "I2_S" if kind == I2_S else "IQ2_BN"
    return TYPES[kind].name if kind in TYPES else _OTHER_NAMES.get(kind, str(kind))


def kind_and_nbytes(kind: int, shape: tuple[int, ...], room: int) -> tuple[int, int | None]:
    """A tensor's type and bytes; None for a type that is not supported. ValueError if the type cannot have this shape.

    room: bytes up to the next tensor. Older files have PQ2_0 under the number of Q2_0, which is larger.
    """
    if kind == Q2_0 and shape and shape[-1] % TYPES[PQ2_0].weights == 0 and room < _nbytes(Q2_0, shape):  # type: ignore[operator]
        kind = PQ2_0
    return kind, _nbytes(kind, shape)


def _nbytes(kind: int, shape: tuple[int, ...]) -> int | None:
    elements, columns = 1, shape[-1] if shape else 1
    for size in shape:
        elements *= size
    if kind == I2_S:
        if elements % 128:
            raise ValueError(f"of type I2_S has {elements} elements, not a multiple of 128")
        return elements // 4 + _I2S_SCALE
    if kind == IQ2_BN:
        return elements // columns * row_nbytes(kind, columns)
    if kind not in TYPES:
        return None
    block = TYPES[kind]
    if columns % block.weights:
        raise ValueError(f"of type {block.name} has {columns} columns, not a multiple of {block.weights}")
    return elements // block.weights * block.nbytes


def row_nbytes(kind: int, columns: int) -> int:
    """Bytes of a row of a matrix. ValueError if the rows of such a matrix do not begin with whole bytes."""
    if kind == I2_S:
        if columns % 128:
            raise ValueError(f"of type I2_S has {columns} columns, not a multiple of 128")
        return columns // 4
    if kind == IQ2_BN:
        if columns % 64:
            raise ValueError(f"of type IQ2_BN has {columns} columns, not a multiple of 64")
        return 4 + columns // 4
    return columns // TYPES[kind].weights * TYPES[kind].nbytes


def dequantise(kind: int, data: Bytes) -> Floats:
    """The values of the blocks of any type except I2_S and IQ2_BN, float32 [n]."""
    block = TYPES[kind]
    with np.errstate(all="ignore"):  # a damaged scale may be infinity
        return block.decode(data.reshape(-1, block.nbytes)).reshape(-1)


def iq2_bn_rows(data: Bytes, columns: int) -> Floats:
    """Rows of a tensor of type IQ2_BN, float32 [n, columns]: a float32 scale, then two bits for each weight.

    Byte p of a run of 16 holds weights p, 16 + p, 32 + p, 48 + p from the lowest bits up.
    """
    rows = data.reshape(-1, row_nbytes(IQ2_BN, columns))
    scales = np.ascontiguousarray(rows[:, :4]).view("<f4")
    codes = _fields(rows[:, 4:].reshape(len(rows), -1, 16), (0, 2, 4, 6), 3).reshape(len(rows), -1)
    with np.errstate(all="ignore"):
        return (codes.astype(np.float32) - 1) * scales


def q4_0_ternary(data: Bytes) -> Floats:
    """The values that blocks of type Q4_0 stand for if these are ternary weights, float32 [n]; see `_q4_0_codes`."""
    codes, scales = _q4_0_codes(data.reshape(-1, 18))
    return ((codes.astype(np.float32) - 1) * scales).reshape(-1)


def ternary(kind: int, data: Bytes, layout: I2sLayout = "x86", columns: int = 0) -> tuple[NDArray[np.int8], np.float32]:
    """The weights of a whole tensor as int8 [n] of -1, 0, 1, and their scale (1 if all are zero).

    layout: of I2_S, that of files made on x86 or on ARM. columns: of the matrix, which IQ2_BN needs.

    Raises ValueError, with the reason, if the values are not ternary weights times one positive scale.
    """
    if kind == I2_S:
        codes = _i2s_codes(data[:-_I2S_SCALE], layout)
        scales = data[-_I2S_SCALE:].copy().view("<f4")
    elif kind == TQ1_0:
        blocks = data.reshape(-1, 54)
        codes, scales = _tq1_codes(blocks), _half(blocks[:, 52:])
    elif kind == TQ2_0:
        blocks = data.reshape(-1, 66)
        codes, scales = _tq2_codes(blocks), _half(blocks[:, 64:])
    elif kind == Q4_0:
        codes, scales = _q4_0_codes(data.reshape(-1, 18))
    elif kind == IQ2_BN:
        return _signs(iq2_bn_rows(data, columns).reshape(-1))
    else:
        return _signs(dequantise(kind, data))
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise ValueError("has a scale that is negative, NaN or infinity")
    if codes.max() > 2:
        raise ValueError("holds the unused code 3 and is damaged")
    t = (codes.view(np.int8) - np.int8(1)).reshape(scales.size, -1)  # a row for each scale
    t[scales.reshape(-1) == 0] = 0
    used = scales.reshape(-1)[t.any(axis=1)]
    if (used != used[:1]).any():
        raise ValueError(SEVERAL_SCALES)
    return t.reshape(-1), np.float32(used[0] if used.size else 1)


def may_have_several_scales(kind: int, data: Bytes) -> bool:
    """Whether a tensor of a type other than I2_S may have more than one scale; cheap for TQ1_0 and TQ2_0."""
    if kind not in (TQ1_0, TQ2_0):
        return True
    scales = data.reshape(-1, TYPES[kind].nbytes)[:, -2:].copy().view("<u2")
    return len(np.unique(scales[scales != 0])) > 1


def i2s_rows(codes: Bytes, scale: np.float32, layout: I2sLayout) -> Floats:
    """Rows of a tensor of type I2_S, float32 [n]."""
    with np.errstate(all="ignore"):
        return (_i2s_codes(codes, layout).astype(np.float32) - 1) * scale


def i2s_scale(data: Bytes) -> np.float32:
    """The scale of a tensor of type I2_S, from its last bytes."""
    return np.float32(data[-_I2S_SCALE:].copy().view("<f4")[0])


def _signs(values: Floats) -> tuple[NDArray[np.int8], np.float32]:
    """Floats -c, 0 and c as int8 of -1, 0, 1, and c."""
    if not np.isfinite(values).all():
        raise ValueError("holds NaN or infinity")
    sizes = np.abs(values)
    scale = np.float32(sizes.max())
    if not ((sizes == scale) | (sizes == 0)).all():
        raise ValueError(NOT_ONE_SCALE)
    return np.sign(values).astype(np.int8), scale if scale > 0 else np.float32(1)


def _half(data: Bytes) -> Floats:
    """[n, 2 * m] bytes -> float32 [n, m]."""
    with np.errstate(all="ignore"):  # the cast of a NaN may complain
        return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _fields(data: Bytes, shifts: tuple[int, ...], mask: int) -> Bytes:
    """[..., n] bytes -> [..., fields, n]: the bits of each byte from each shift on."""
    return (data[..., None, :] >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)


def _i2s_codes(data: Bytes, layout: I2sLayout) -> Bytes:
    """Codes t + 1. Byte p of a run holds weights p, run / 4 + p, .. from the highest bits down."""
    run = 128 if layout == "x86" else 64
    return _fields(data.reshape(-1, run // 4), (6, 4, 2, 0), 3).reshape(-1)


def _digits(data: Bytes, count: int) -> Bytes:
    """[blocks, n] bytes of base-3 fractions -> [blocks, count * n]: their first digits, all first ones first."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    shifted = (data[:, None, :] * powers).astype(np.uint16)  # modulo 256
    return ((shifted * np.uint16(3)) >> np.uint16(8)).astype(np.uint8).reshape(len(data), -1)


def _tq1_codes(blocks: Bytes) -> Bytes:
    """32 bytes of five weights, 16 of five, 4 of four, half."""
    return np.concatenate([_digits(blocks[:, :32], 5), _digits(blocks[:, 32:48], 5), _digits(blocks[:, 48:52], 4)], 1)


def _tq2_codes(blocks: Bytes) -> Bytes:
    """Two runs of 32 bytes, half. Byte p of a run holds weights p, 32 + p, 64 + p, 96 + p from the lowest bits up."""
    return _fields(blocks[:, :64].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 256)


def _q4_0_codes(blocks: Bytes) -> tuple[Bytes, Floats]:
    """Codes t + 1 and scales of ternary blocks of type Q4_0.

    llama.cpp falls back to this type where 256 does not divide the columns. It sets d so that the first weight that is
    not zero is -8 d; those of the other sign should be 8 d, but nibbles end at 7.
    """
    d, q = _half(blocks[:, :2]), _fields(blocks[:, 2:], (0, 4), 15).reshape(-1, 32)
    if not np.isin(q, (0, 8, 15)).all():
        raise ValueError(NOT_ONE_SCALE)
    t = np.sign(q.astype(np.int8) - np.int8(8)) * np.where(d < 0, np.int8(-1), np.int8(1))
    return (t + np.int8(1)).view(np.uint8), np.abs(d) * 8


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    """half, 16 bytes: weights p and 16 + p are the low and the high nibble of byte p."""
    q = _fields(blocks[:, 2:], (0, 4), 15).reshape(-1, 32)
    return (q.astype(np.float32) - 8) * _half(blocks[:, :2])


def _q8_0(blocks: Bytes) -> Floats:
    """half, 32 int8."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks[:, :2])


def _pairs(codes: Bytes, d: Floats) -> Floats:
    """Two bits for each weight: weight e in bits 2 * (e % 4) of byte e / 4."""
    fields = _fields(codes, (0, 2, 4, 6), 3).swapaxes(1, 2).reshape(len(codes), -1)
    return (fields.astype(np.float32) - 1) * d


def _ptq1_0(blocks: Bytes) -> Floats:
    """16 bytes of five weights, 8 of five, 2 of four, half."""
    parts = [_digits(blocks[:, :16], 5), _digits(blocks[:, 16:24], 5), _digits(blocks[:, 24:26], 4)]
    return (np.concatenate(parts, 1).astype(np.float32) - 1) * _half(blocks[:, 26:])


def _q4_k(blocks: Bytes) -> Floats:
    """half d, half dmin, 12 bytes of eight scales and minima of six bits, 128 bytes of nibbles; runs of 32 weights."""
    d, dmin, s = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:16]
    scale = np.concatenate([s[:, :4] & 63, (s[:, 8:] & 15) | (s[:, :4] >> 6) << 4], 1).astype(np.float32)
    minimum = np.concatenate([s[:, 4:8] & 63, (s[:, 8:] >> 4) | (s[:, 4:8] >> 6) << 4], 1).astype(np.float32)
    q = _fields(blocks[:, 16:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32).astype(np.float32)
    return (q * (d * scale)[..., None] - (dmin * minimum)[..., None]).reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Floats:
    """128 bytes of low nibbles, 64 of high pairs of bits, 16 int8 scales, half; halves of 128 weights."""
    nibbles, pairs = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    low = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], 2)  # [blocks, 2, 4, 32]
    q = (low | _fields(pairs, (0, 2, 4, 6), 3) << np.uint8(4)).astype(np.float32) - 32
    scale = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks[:, 208:])
    return (q.reshape(-1, 16, 16) * scale[..., None]).reshape(-1, 256)


TYPES = {
    F32: _Type("F32", 1, 4, lambda blocks: blocks.view("<f4")),
    F16: _Type("F16", 1, 2, _half),
    BF16: _Type("BF16", 1, 2, _bf16),
    Q4_0: _Type("Q4_0", 32, 18, _q4_0),
    Q8_0: _Type("Q8_0", 32, 34, _q8_0),
    Q4_K: _Type("Q4_K", 256, 144, _q4_k),
    Q6_K: _Type("Q6_K", 256, 210, _q6_k),
    TQ1_0: _Type("TQ1_0", 256, 54, lambda blocks: (_tq1_codes(blocks).astype(np.float32) - 1) * _half(blocks[:, 52:])),
    TQ2_0: _Type("TQ2_0", 256, 66, lambda blocks: (_tq2_codes(blocks).astype(np.float32) - 1) * _half(blocks[:, 64:])),
    Q2_0: _Type("Q2_0", 64, 18, lambda blocks: _pairs(blocks[:, 2:], _half(blocks[:, :2]))),
    PQ2_0: _Type("PQ2_0", 128, 34, lambda blocks: _pairs(blocks[:, 2:], _half(blocks[:, :2]))),
    PTQ1_0: _Type("PTQ1_0", 128, 28, _ptq1_0),
}
