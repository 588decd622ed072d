"""Tensor types of GGUF files, against the hashes of what ggml makes of tensors that other programs wrote."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from bitnet_numba.checkpoint import gguf_types as types
from bitnet_numba.checkpoint.gguf_file import GgufFile
from bitnet_numba.checkpoint.gguf_types import F16, F32, I2_S, Q4_0, Q8_0, TQ1_0, TQ2_0, dequantise, ternary
from tests.conftest import GOLDEN

FOLDER = GOLDEN / "gguf"
FILES = ("bitnet-silu-tq1_0", "bitnet-relu2-i2_s", "llama-tq2_0")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "recorded.json").read_text()))


def sha256(values: np.ndarray) -> str:
    """As recorded: of float32 values, with 0 in place of -0."""
    return hashlib.sha256(np.where(values == 0, np.float32(0), values).astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("name", FILES)
def test_values_of_every_tensor(name: str, recorded: dict[str, Any]) -> None:
    """F32, F16, Q4_K, Q6_K, I2_S, TQ1_0, TQ2_0; ternary tensors both as floats and as weights and a scale."""
    file = GgufFile(FOLDER / f"{name}.gguf", types.kind_and_nbytes)
    assert file.tensors.keys() == recorded[name]["tensors"].keys()
    kinds = set()
    for tensor, info in file.tensors.items():
        data, kind = file.read(tensor), types.type_name(info.type)
        if info.type in (I2_S, TQ1_0, TQ2_0):
            t, scale = ternary(info.type, data)
            assert sha256(t * scale) == recorded[name]["tensors"][tensor], (tensor, kind)
        if info.type == I2_S:
            values = types.i2s_rows(data[: info.shape[0] * types.row_nbytes(I2_S, info.shape[1])], scale, "x86")
        else:
            values = dequantise(info.type, data)
        assert sha256(values) == recorded[name]["tensors"][tensor], (tensor, kind)
        kinds.add(kind)
    assert len(kinds) >= 3


@pytest.mark.parametrize("kind", [Q4_0, Q8_0])
def test_values_of_other_blocks(kind: int, recorded: dict[str, Any]) -> None:
    with np.load(FOLDER / "golden.npz") as golden:
        assert sha256(dequantise(kind, golden[f"blocks/{kind}"])) == recorded["blocks"][str(kind)]


def q4_0(weights: np.ndarray) -> np.ndarray:
    """Blocks of type Q4_0 as llama.cpp rounds them."""
    blocks = b""
    for row in weights.reshape(-1, 32):
        d = row[np.abs(row).argmax()] / -8
        q = np.minimum(15, np.floor(row / (d or 1) + 8.5)).astype(np.uint8)
        blocks += np.float16(d).tobytes() + (q[:16] | q[16:] << 4).tobytes()
    return np.frombuffer(blocks, np.uint8)


def test_ternary_weights_in_q4_0(recorded: dict[str, Any]) -> None:
    """Where 256 does not divide the columns, llama.cpp writes this type, which cannot hold both signs of a scale."""
    t = np.random.default_rng(2).integers(-1, 2, 32 * 50)
    t[32:64] = 0
    found, scale = ternary(Q4_0, q4_0(t * 0.0625))
    assert np.array_equal(found, t) and scale == np.float32(0.0625)
    with np.load(FOLDER / "golden.npz") as golden:  # a file of llama.cpp: a scale for each group, so block by block
        blocks = golden["blocks/2"].reshape(-1, 18)
    signs = np.concatenate([ternary(Q4_0, block)[0] for block in blocks])
    assert hashlib.sha256(signs.tobytes()).hexdigest() == recorded["blocks"]["2_signs"]
    with pytest.raises(ValueError, match="several scales"):
        ternary(Q4_0, blocks)
    with pytest.raises(ValueError, match="not ternary weights"):
        ternary(Q4_0, q4_0(np.linspace(-1, 1, 32)))


def test_bfloat16() -> None:
    bits = np.array([0x3F80, 0xC010, 0x0001], "<u2").view(np.uint8)
    assert dequantise(types.BF16, bits).tolist() == [1.0, -2.25, 2.0**-133]


def test_the_layout_of_arm() -> None:
    """Runs of 64 weights: byte p holds p, 16 + p, 32 + p and 48 + p, the first in the highest bits."""
    codes = np.random.default_rng(3).integers(0, 3, 256, np.uint8)
    data = np.zeros(64 + 4, np.uint8)
    data[64:] = np.array([0.125], "<f4").view(np.uint8)
    for e, code in enumerate(codes):
        run, at = divmod(e, 64)
        data[16 * run + at % 16] |= code << (6 - 2 * (at // 16))
    t, scale = ternary(I2_S, data, "arm")
    assert np.array_equal(t, codes.astype(np.int8) - 1) and scale == np.float32(0.125)
    assert not np.array_equal(ternary(I2_S, data)[0], t)


def test_ternary_weights_as_floats() -> None:
    values = np.array([0.3, -0.3, 0, 0.3, -0.0], np.float16)
    t, scale = ternary(F16, values.view(np.uint8))
    assert t.tolist() == [1, -1, 0, 1, 0] and scale == np.float32(np.float16(0.3))
    t, scale = ternary(F32, np.zeros(4, "<f4").view(np.uint8))
    assert t.tolist() == [0] * 4 and scale == 1


def tq2_blocks(*blocks: tuple[float, int]) -> np.ndarray:
    """TQ2_0 blocks of a scale, and a byte of codes that is repeated."""
    rows = [np.full(64, byte, np.uint8).tobytes() + np.float16(d).tobytes() for d, byte in blocks]
    return np.frombuffer(b"".join(rows), np.uint8)


def test_blocks_of_zeros_have_no_scale() -> None:
    zeros, mixed = 0b01010101, 0b10000101  # codes 1 1 1 1, and 1 1 0 2 from the lowest bits up
    blocks = tq2_blocks((0, zeros), (0.5, mixed), (0.75, zeros), (0, mixed))
    t, scale = ternary(TQ2_0, blocks)
    assert scale == 0.5 and np.array_equal(t * scale, dequantise(TQ2_0, blocks))


@pytest.mark.parametrize(
    "kind, data, reason",
    [
        (TQ2_0, tq2_blocks((0.5, 0b10), (0.25, 0b10)), "has several scales"),
        (TQ2_0, tq2_blocks((0.5, 0b11)), "unused code 3"),
        (TQ2_0, tq2_blocks((-0.5, 0b10)), "negative"),
        (TQ2_0, tq2_blocks((float("nan"), 0b10)), "NaN"),
        (Q4_0, np.frombuffer(b"\x00\x7e" + bytes(16), np.uint8), "NaN"),
        (I2_S, np.append(np.full(32, 0b11, np.uint8), np.array([1], "<f4").view(np.uint8)), "unused code 3"),
        (I2_S, np.append(np.zeros(32, np.uint8), np.array([np.inf], "<f4").view(np.uint8)), "infinity"),
        (I2_S, np.append(np.zeros(32, np.uint8), np.array([-1], "<f4").view(np.uint8)), "negative"),
        (F32, np.array([1, -1, 0.5], "<f4").view(np.uint8), "not ternary weights times one scale"),
        (F32, np.array([1, -1, np.nan], "<f4").view(np.uint8), "NaN"),
    ],
)
def test_what_is_not_ternary_with_one_scale(kind: int, data: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ternary(kind, data)
