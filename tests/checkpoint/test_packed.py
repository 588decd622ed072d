"""Safetensors files and packed checkpoints: cross-checked with the safetensors library, damaged in every way."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.packed import open_packed, packed_plan
from bitnet_numba.checkpoint.safetensors_file import DTYPES, TensorFile, TensorSpec, write_tensors
from bitnet_numba.errors import BitNetError, CheckpointError, ConfigError
from bitnet_numba.reference.model import Cache, Model
from tests.conftest import edit_config, mutate, rewrite
from tests.strategies import byte_edits


@pytest.fixture
def packed(tiny_packed: Path, tmp_path: Path) -> Path:
    """A packed checkpoint to damage."""
    return Path(shutil.copytree(tiny_packed, tmp_path / "model"))


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
plans = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__"),
    st.builds(TensorSpec, st.sampled_from([d for d in DTYPES if d != "BF16"]), shapes),
    max_size=5,
)


@given(plans, st.integers(0, 99))
def test_the_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, TensorSpec], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(0, 9, spec.shape).astype(DTYPES[spec.dtype]) for name, spec in plan.items()}
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    with open(path, "wb") as file:
        write_tensors(file, plan, arrays.items(), {"format": "np"})
    read = load_file(path)
    assert set(read) == set(arrays)
    ours = TensorFile(path)
    for name, array in arrays.items():
        assert np.array_equal(read[name], array) and read[name].dtype == array.dtype
        assert np.array_equal(ours.read(name), array) and np.array_equal(ours.map(name), array)
        assert ours.specs[name] == plan[name]


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array(5.0, np.float32)}
    save_file(arrays, tmp_path / "x.safetensors", {"format": "np"})
    file = TensorFile(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert np.array_equal(file.read(name), array) and file.read(name).shape == array.shape


@pytest.mark.parametrize("name", ["layers.1.gate_up.scales", "embed.scale"])
@pytest.mark.parametrize("value", [0.0, -1.5])
def test_scales_that_are_not_positive_are_named(tiny_source: Path, tmp_path: Path, name: str, value: float) -> None:
    convert(tiny_source, tmp_path / "int8", head="int8")
    file = open_packed(tmp_path / "int8").file
    with open(tmp_path / "int8" / "model.safetensors", "r+b") as damaged:
        damaged.seek(file._offsets[name] + 4)
        damaged.write(np.float32(value).tobytes())
    with pytest.raises(CheckpointError, match=f"{name} holds a scale that is not positive"):
        open_packed(tmp_path / "int8")


def test_maps_are_read_only(packed: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        open_packed(packed).tensor("norm.weight")[0] = 1


def test_tensors_share_one_descriptor(packed: Path) -> None:
    """A model has hundreds of tensors, and some systems allow 256 open files."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("open descriptors cannot be counted on this system")
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = open_packed(packed)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    assert len(tensors) > 20 and len(os.listdir("/proc/self/fd")) <= before + 3
    for name, tensor in tensors.items():
        assert np.array_equal(tensor, checkpoint.file.read(name)) and tensor.dtype == checkpoint.file.read(name).dtype


def test_a_file_that_becomes_shorter_is_told(packed: Path) -> None:
    """Reading what is gone would end the process."""
    checkpoint = open_packed(packed)
    path = packed / "model.safetensors"
    last = max(checkpoint.names, key=lambda name: checkpoint.file._offsets[name])
    for size in (path.stat().st_size - 1, 5000):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=f"tensor {last} is truncated"):
            checkpoint.tensor(last)


@pytest.mark.parametrize("given_", [{}, {"a": np.zeros(3)}, {"b": np.zeros(2)}, {"a": np.zeros(2), "b": np.zeros(1)}])
def test_writer_refuses_other_tensors(given_: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="expected|is missing"):
        write_tensors(io.BytesIO(), {"a": TensorSpec("F64", (2,))}, given_.items(), {})


def test_opens(packed: Path) -> None:
    checkpoint = open_packed(packed)
    assert checkpoint.head == "bf16" and checkpoint.config.hidden_size == 256
    assert checkpoint.names == list(packed_plan(checkpoint.config, "bf16", "bf16"))
    assert checkpoint.nbytes() < (packed / "model.safetensors").stat().st_size
    assert checkpoint.ternary("layers.0.o.words", 256, 256).shape == (256, 256)


def drop(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
    del arrays["layers.1.o.scales"], specs["layers.1.o.scales"]


def add(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
    arrays["extra"], specs["extra"] = np.zeros(1, np.float32), TensorSpec("F32", (1,))


def reshape(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
    arrays["norm.weight"], specs["norm.weight"] = np.zeros(255, np.float32), TensorSpec("F32", (255,))


def retype(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
    arrays["norm.weight"], specs["norm.weight"] = np.zeros(256, np.float16), TensorSpec("F16", (256,))


def poison(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
    arrays["layers.0.qkv.scales"][1] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "tensor layers.1.o.scales is missing"),
        (add, "unexpected tensor extra"),
        (reshape, r"tensor norm.weight is F32 [255], expected F32 [256]"),
        (retype, "tensor norm.weight is F16 [256], expected F32 [256]"),
        (poison, "tensor layers.0.qkv.scales holds NaN or infinity"),
    ],
)
def test_wrong_tensors(packed: Path, change: Callable[..., None], message: str) -> None:
    rewrite(packed / "model.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        open_packed(packed)
    assert message in str(caught.value)


def test_names_of_tensors_are_made_printable(packed: Path) -> None:
    """Neither escapes nor lines of their own reach the terminal, nor 5,000 characters."""
    name = "\x1b[31m\nconvert: done" + "x" * 5000

    def add_it(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
        arrays[name], specs[name] = np.zeros(1, np.float32), TensorSpec("F32", (1,))

    rewrite(packed / "model.safetensors", add_it)
    with pytest.raises(CheckpointError) as caught:
        open_packed(packed)
    assert r"unexpected tensor \x1b[31m\nconvert: donexxx" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_damaged_words(packed: Path) -> None:
    def damage(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
        arrays["layers.1.down.words"][7] = 0

    rewrite(packed / "model.safetensors", damage)
    with pytest.raises(CheckpointError, match="layers.1.down.words: packed words hold the unused code 0"):
        Model(open_packed(packed))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), CheckpointError, "does not exist"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, "is not a model folder: it has no config.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff{"), CheckpointError, "is not readable JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), CheckpointError, "is not readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "must hold a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), CheckpointError, "is not a readable safetensors file"),
        (lambda f: edit_config(f, bitnet_numba={"format": 2}), CheckpointError, "convert it again"),
        (
            lambda f: edit_config(f, bitnet_numba=None),
            CheckpointError,
            "is not a packed checkpoint: run",
        ),
        (lambda f: edit_config(f, num_hidden_layers=1 << 12), CheckpointError, "too few tensors"),
        (lambda f: edit_config(f, vocab_size=0), ConfigError, "vocab_size = 0"),
    ],
)
def test_spoilt_folders(packed: Path, spoil: Callable[[Path], object], error: type[Exception], message: str) -> None:
    spoil(packed)
    with pytest.raises(error) as caught:
        open_packed(packed)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_truncation_is_noticed(packed: Path) -> None:
    whole = (packed / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in [*range(0, 16), header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]:
        (packed / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
            open_packed(packed)
    (packed / "model.safetensors").write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        open_packed(packed)


@given(byte_edits(4), byte_edits(4), st.floats(0, 1))
def test_fuzzed_bytes(
    tiny_packed: Path,
    tmp_path_factory: pytest.TempPathFactory,
    header_edits: list[tuple[float, bytes]],
    config_edits: list[tuple[float, bytes]],
    kept: float,
) -> None:
    """Random damage to header, data and config: a working model or the project's own error, never anything else."""
    folder = Path(shutil.copytree(tiny_packed, tmp_path_factory.mktemp("fuzz") / "model"))
    tensors = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(tensors[:8], "little")
    tensors = mutate(tensors, header_edits, header + 64)
    config = mutate((folder / "config.json").read_bytes(), config_edits, (folder / "config.json").stat().st_size)
    (folder / "model.safetensors").write_bytes(tensors[: int(len(tensors) * kept)] if kept < 0.2 else tensors)
    (folder / "config.json").write_bytes(config)
    try:
        model = Model(open_packed(folder))
    except BitNetError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        model.forward(np.array([1, 2]), Cache(model.config, 2))
    finally:
        shutil.rmtree(folder)
