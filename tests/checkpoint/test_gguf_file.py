"""The container of GGUF files: what is read, and that no damaged file costs more than one clear line."""

import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.checkpoint import gguf_file
from bitnet_numba.checkpoint.gguf_file import GgufFile, Numbers, TensorInfo
from bitnet_numba.checkpoint.gguf_types import F32, TQ2_0, kind_and_nbytes
from bitnet_numba.errors import CheckpointError
from tests.conftest import mutate
from tests.gguf_writer import gguf, info, string, value, whole
from tests.strategies import byte_edits

HUGE = 1 << 63


def open_bytes(folder: Path, data: bytes) -> GgufFile:
    (folder / "model.gguf").write_bytes(data)
    return GgufFile(folder / "model.gguf", kind_and_nbytes)


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


GOOD = gguf({"a": 1}, {"t": (F32, (2, 3), floats(1, 2, 3, 4, 5, 6))})


@pytest.mark.parametrize("version", [2, 3])
def test_everything_is_read(tmp_path: Path, version: int) -> None:
    scalars = {
        "u8": np.uint8(250),
        "i8": np.int8(-3),
        "u16": np.uint16(60000),
        "i16": np.int16(-300),
        "u32": np.uint32(4_000_000_000),
        "i32": np.int32(-70_000),
        "f32": np.float32(0.1),
        "bool": True,
        "u64": np.uint64(HUGE + 1),
        "i64": np.int64(-HUGE),
        "f64": np.float64(0.1),
    }
    others = {"text": "grün ▁", "none": "", "texts": ["a", "", "é"], "numbers": np.array([1.5, -2], np.float32)}
    tensors = {
        "first": (F32, (2, 3), floats(1, 2, 3, 4, 5, 6)),
        "unknown": (99, (5, 7), b"x" * 17),
        "last": (F32, (1,), floats(7)),
    }
    data = gguf(scalars | others | {"general.alignment": 64}, tensors, version, alignment=64)
    file = open_bytes(tmp_path, data[:-60])  # the last tensor may lack its padding
    for key, of in scalars.items():
        read = file.metadata[key]
        assert read == (of if isinstance(of, bool) else of.item())
        assert type(read) is type(of if isinstance(of, bool) else of.item())
    assert {key: file.metadata[key] for key in ("text", "none", "texts")} == {k: others[k] for k in list(others)[:3]}
    numbers = file.metadata["numbers"]
    assert isinstance(numbers, Numbers) and numbers.values.tolist() == [1.5, -2]
    assert list(file.tensors) == ["first", "unknown", "last"]
    assert file.tensors["first"].shape == (2, 3) and file.tensors["unknown"].nbytes is None
    assert file.read("first").tobytes() == floats(1, 2, 3, 4, 5, 6)
    assert file.read("first", 4, 8).tobytes() == floats(2, 3)
    assert file.read("last").tobytes() == floats(7)


def test_tensors_in_any_order(tmp_path: Path) -> None:
    infos = info("b", (1,), F32, 32) + info("a", (1,), F32, 0)
    file = open_bytes(tmp_path, whole(b"", infos, floats(1) + bytes(28) + floats(2), 0, 2))
    assert file.read("a").tobytes() == floats(1) and file.read("b").tobytes() == floats(2)


KEY = string("k")
DAMAGE = {
    "nothing": (b"", "is truncated"),
    "another format": (b"PK\3\4" + bytes(100), "does not start with GGUF"),
    "version 1": (b"GGUF\1\0\0\0" + bytes(32), "version 1 is not supported"),
    "version 4": (b"GGUF\4\0\0\0" + bytes(32), "version 4 is not supported"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(32), "is big-endian"),
    "many keys": (whole(b"", b"", b"", HUGE, 0), "too short for 9223372036854775808 keys"),
    "many tensors": (whole(b"", b"", b"", 0, HUGE + 5), "too short for 0 keys and 9223372036854775813 tensors"),
    "long key": (whole(struct.pack("<Q", HUGE) + bytes(64), b"", b"", 1, 0), "a length in its header is wrong"),
    "key over the limit": (whole(string(b"k" * 70_000) + value(1), b"", b"", 1, 0), "a key has 70,000 bytes"),
    "long string": (whole(KEY + struct.pack("<IQ", 8, HUGE) + bytes(64), b"", b"", 1, 0), "a length in its header"),
    "long array": (whole(KEY + struct.pack("<IIQ", 9, 4, HUGE) + bytes(64), b"", b"", 1, 0), "a length in its header"),
    "long array of strings": (
        whole(KEY + struct.pack("<IIQ", 9, 8, HUGE) + bytes(64), b"", b"", 1, 0),
        "a length in its header",
    ),
    "deep arrays": (whole(KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, b"", b"", 1, 0), "k is an arr"),
    "unknown type": (whole(KEY + struct.pack("<I", 13) + bytes(64), b"", b"", 1, 0), "k has the unknown type 13"),
    "unknown element": (whole(KEY + struct.pack("<IIQ", 9, 99, 0) + bytes(64), b"", b"", 1, 0), "unsupported type 99"),
    "not UTF-8": (whole(KEY + struct.pack("<I", 8) + string(b"\xff"), b"", b"", 1, 0), "k is not UTF-8"),
    "surrogates": (whole(string(b"\xed\xa0\x80") + value(1), b"", b"", 1, 0), "a key is not UTF-8"),
    "a key twice": (gguf([("a\x1b", 1), ("a\x1b", 1)], {}), r"key a\\x1b stands twice"),
    "a tensor twice": (whole(b"", info("t", (1,), F32, 0) * 2, bytes(8), 0, 2), "tensor t stands twice"),
    "overlap": (
        whole(b"", info("t", (16,), F32, 0) + info("u", (1,), F32, 32), bytes(64), 0, 2),
        "tensors t and u overlap",
    ),
    "end": (GOOD[:-24], "tensor t ends after the end of the file"),
    "offset": (whole(b"", info("t", (1,), F32, HUGE), bytes(64), 0, 1), "tensor t ends after the end"),
    "misaligned": (whole(b"", info("t", (1,), F32, 4), bytes(64), 0, 1), "t is not aligned to 32 bytes"),
    "many dimensions": (whole(b"", info("t", (1,) * 5, F32, 0), bytes(64), 0, 1), "t has 5 dimensions"),
    "very many dimensions": (whole(b"", info("t", (1,), F32, 0)[:9] + b"\xff" * 60, bytes(8), 0, 1), "4294967295 dim"),
    "no elements": (whole(b"", info("t", (0, 4), F32, 0), bytes(64), 0, 1), "t has 0 elements"),
    "many elements": (whole(b"", info("t", (HUGE, HUGE), F32, 0), bytes(64), 0, 1), "t has 85070"),
    "columns": (whole(b"", info("t", (4, 100), TQ2_0, 0), bytes(640), 0, 1), "TQ2_0 has 100 columns, not a multiple"),
    "no dimensions": (whole(b"", info("t", (), TQ2_0, 0), bytes(640), 0, 1), "TQ2_0 has 1 columns, not a multiple"),
    "alignment 0": (gguf({"general.alignment": 0}, {}), "general.alignment is not a power of two"),
    "alignment 24": (gguf({"general.alignment": 24}, {}), "general.alignment is not a power of two"),
    "alignment text": (gguf({"general.alignment": "32"}, {}), "general.alignment is not a power of two"),
    "alignment true": (gguf({"general.alignment": True}, {}), "general.alignment is not a power of two"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n" + bytes(80), "Git LFS pointer"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(tmp_path: Path, case: str) -> None:
    data, reason = DAMAGE[case]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=reason) as caught:
            open_bytes(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and "model.gguf" in str(caught.value) and len(str(caught.value)) < 600


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    for size in range(len(GOOD) - 8):  # the last 8 bytes are padding
        with pytest.raises(CheckpointError, match="truncated|too short"):
            open_bytes(tmp_path, GOOD[:size])
    open_bytes(tmp_path, GOOD[:-8])


def test_a_string_bomb_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of zeros is an array of very many empty strings."""
    monkeypatch.setattr(gguf_file, "_MAX_ITEMS", 10_000)
    start = whole(KEY + struct.pack("<IIQ", 9, 8, 12_000_000), b"", b"", 1, 0, alignment=1)
    (tmp_path / "model.gguf").write_bytes(start)
    os.truncate(tmp_path / "model.gguf", 1 << 31)
    before = time.process_time()
    with pytest.raises(CheckpointError, match="header has more than 10,000 parts"):
        GgufFile(tmp_path / "model.gguf", kind_and_nbytes)
    assert time.process_time() - before < 10


def test_a_header_of_gigabytes_is_refused(tmp_path: Path) -> None:
    start = whole(KEY + struct.pack("<IIQ", 9, 0, 1 << 30), b"", b"", 1, 0, alignment=1)
    (tmp_path / "model.gguf").write_bytes(start)
    os.truncate(tmp_path / "model.gguf", 1 << 31)
    with pytest.raises(CheckpointError, match="header is larger than 100 MB"):
        GgufFile(tmp_path / "model.gguf", kind_and_nbytes)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model.gguf does not exist"):
        GgufFile(tmp_path / "model.gguf", kind_and_nbytes)
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: it is not a regular file"):
        GgufFile(tmp_path / "model.gguf", kind_and_nbytes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_does_not_hold_it_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="cannot be read: it is not a regular file"):
        GgufFile(tmp_path / "model.gguf", kind_and_nbytes)


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, GOOD)
    os.truncate(tmp_path / "model.gguf", len(GOOD) - 20)
    with pytest.raises(CheckpointError, match="tensor t is truncated"):
        file.read("t")


def test_another_file_in_its_place(tmp_path: Path) -> None:
    file = open_bytes(tmp_path, GOOD)
    (tmp_path / "other").write_bytes(bytes(len(GOOD)))
    (tmp_path / "other").replace(tmp_path / "model.gguf")
    assert file.read("t").tobytes() == floats(1, 2, 3, 4, 5, 6)


ALL_KINDS = gguf(
    {"a": 1, "s": "text", "l": ["x", "yz"], "n": np.arange(3, dtype=np.float64), "b": True},
    {"t": (F32, (2, 3), floats(1, 2, 3, 4, 5, 6)), "u": (TQ2_0, (1, 256), bytes(66)), "v": (142, (128,), bytes(34))},
)


@given(edits=byte_edits(4), cut=st.floats(0, 1))
def test_any_damage_is_an_error_or_another_file(
    edits: list[tuple[float, bytes]], cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    data = mutate(ALL_KINDS, edits, len(ALL_KINDS))
    path.write_bytes(data[: int(len(data) * min(1, 2 * cut))])
    try:
        file = GgufFile(path, kind_and_nbytes)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    for name, found in file.tensors.items():
        assert isinstance(found, TensorInfo)
        if found.nbytes is not None:
            assert len(file.read(name)) == found.nbytes
