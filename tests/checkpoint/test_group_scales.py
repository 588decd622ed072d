"""Models with a scale for each row and 128 columns: files of other programs against what transformers computes of the
folders that they were made of, in floats and in int8; folders of floats, and of MLX."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.checkpoint import gguf_types as types
from bitnet_numba.checkpoint.convert import GROUPS_FOUND, convert
from bitnet_numba.checkpoint.gguf_file import GgufFile
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.checkpoint.safetensors_file import TensorFile, TensorSpec, write_tensors
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import CheckpointError
from bitnet_numba.quantize import quantize_groups
from bitnet_numba.reference import model as reference
from bitnet_numba.reference.model import Cache, Model
from bitnet_numba.text.tokenizer import Tokenizer
from tests.conftest import GOLDEN
from tests.gguf_writer import Tensors, small_model, write

FOLDER = GOLDEN / "groups"
RECORDED: dict[str, Any] = json.loads((FOLDER / "recorded.json").read_text())
FILES = {"qwen3-q2_0.gguf": "qwen3", "qwen3-ptq1_0.gguf": "qwen3", "trilm-tq1_0.gguf": "trilm"}
SOURCES = FILES | {"qwen3-tied": "qwen3-tied"}


@pytest.fixture(scope="module", params=SOURCES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PackedCheckpoint]:
    folder = tmp_path_factory.mktemp("groups") / request.param
    convert(FOLDER / request.param, folder)
    return SOURCES[request.param], open_packed(folder)


def sha256(values: np.ndarray) -> str:
    """As recorded: of float32 values, with 0 in place of -0."""
    return hashlib.sha256(np.where(values == 0, np.float32(0), values).astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("name", FILES)
def test_values_of_every_tensor(name: str) -> None:
    file, recorded = GgufFile(FOLDER / name, types.kind_and_nbytes), RECORDED[name.removesuffix(".gguf")]
    assert file.tensors.keys() == recorded.keys()
    for tensor, info in file.tensors.items():
        assert sha256(types.dequantise(info.type, file.read(tensor))) == recorded[tensor], tensor


def test_values_of_iq2_bn() -> None:
    with np.load(FOLDER / "golden.npz") as golden:
        data = golden["iq2_bn"]
    assert sha256(types.iq2_bn_rows(data, 512)) == RECORDED["iq2_bn"]
    t, scale = types.ternary(types.IQ2_BN, data, columns=512)
    assert sha256(t * scale) == RECORDED["iq2_bn"]


def test_the_config_is_that_of_the_folder(converted: tuple[str, PackedCheckpoint]) -> None:
    name, packed = converted
    expected = ModelConfig.from_hf(RECORDED[name]["config"])
    assert expected.group_scales
    assert replace(packed.config, weight_format="floats") == expected
    assert packed.embed == packed.head == ("f16" if name == "trilm" else "ternary")


def with_planes(packed: PackedCheckpoint, planes: int) -> PackedCheckpoint:
    """The checkpoint with so many int8 planes of activations."""
    return replace(packed, config=replace(packed.config, activation_planes=planes))


def errors(name: str, packed: PackedCheckpoint) -> list[tuple[float, float]]:
    """Largest and rms distance of the logits of each prompt from transformers', in their spread."""
    model, found = Model(packed), []
    with np.load(FOLDER / "golden.npz") as golden:
        for prompt in (1, 3):
            ids, expected = golden[f"{name}/prompt_{prompt}"], golden[f"{name}/logits_{prompt}"]
            logits = model.logits(model.forward(ids.astype(np.int64), Cache(model.config, len(ids))))
            error = (logits - expected) / expected.std()
            found.append((float(np.abs(error).max()), float(np.sqrt((error**2).mean()))))
    return found


@pytest.mark.golden
def test_logits_without_rounding(converted: tuple[str, PackedCheckpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """With activations as they are, what is left is float32 rounding: weights, scales and architecture are right."""
    monkeypatch.setattr(
        reference, "quantize_groups", lambda x: (x, np.ones((len(x), -(-x.shape[1] // 128)), np.float32))
    )
    for largest, _ in errors(*converted):
        assert largest < 1e-4


@pytest.mark.golden
@pytest.mark.parametrize(("planes", "most", "most_rms"), [(1, 0.5, 0.05), (2, 0.005, 0.0005)])
def test_logits(
    converted: tuple[str, PackedCheckpoint],
    planes: int,
    most: float,
    most_rms: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What int8 activations change, in models that were not trained with them: not more than the sum of the squares of
    what each product is expected to be off by (docs/models.md). Seen: 0.29 and rms 0.03; 0.0008 and 0.0001."""
    name, packed = converted
    noise: list[float] = []
    monkeypatch.setattr(reference.GroupedLinear, "__call__", noted(reference.GroupedLinear.__call__, planes, noise))
    found = errors(name, with_planes(packed, planes))
    for (largest, rms), expected in zip(found, np.split(np.array(noise), len(found)), strict=True):
        assert largest < most and rms < most_rms
        assert rms < np.sqrt((expected**2).sum()) + 1e-5  # of float32


def noted(product: Any, planes: int, noise: list[float]) -> Any:
    """A product that checks how far it is from that of floats, and notes its expected error, rms of its own rms."""

    def checked(self: reference.GroupedLinear, x: np.ndarray) -> np.ndarray:
        y, K = product(self, x), self.t.shape[1]
        step = quantize_groups(x)[1].astype(np.float64) / (1 if planes == 1 else 254)
        m = self.m.astype(np.float64)
        exact = x.astype(np.float64) @ (self.t * np.repeat(m, 128, axis=1)[:, :K]).T
        counts = np.add.reduceat(np.abs(self.t).astype(np.float64), np.arange(0, K, 128), axis=1)
        error, spread = np.abs(y - exact), np.sqrt((exact**2).mean())
        assert (error <= (step / 2) @ (m * counts).T + 1e-5 * spread).all()  # a value is off by half a step at most
        expected = np.sqrt(((step**2 / 12) @ (m * m * counts).T).mean())  # and evenly distributed up to that
        assert np.sqrt((error**2).mean()) < 1.5 * expected + 1e-6 * spread
        noise.append(expected / spread)
        return y

    return checked


def test_token_ids(converted: tuple[str, PackedCheckpoint]) -> None:
    name, packed = converted
    tokenizer = Tokenizer.open(packed.folder)
    assert len(RECORDED[name]["tokens"]) == 9
    for case in RECORDED[name]["tokens"]:
        assert tokenizer.encode(case["text"]) == case["hf_special"], case["text"]


def write_floats(source: Path, folder: Path, dtype: str) -> dict[str, np.ndarray]:
    """The model of the MLX folder as a folder of floats, as transformers reads it; returns its tensors."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(RECORDED["qwen3-tied"]["config"]))
    file, arrays = TensorFile(source / "model.safetensors"), {}
    for name in file.specs:
        module = name.removesuffix(".weight")
        if file.specs[name].dtype == "U32":
            codes = (file.read(name)[:, :, None] >> np.arange(0, 32, 2, dtype=np.uint32)) & 3
            scales = np.repeat(file.read(f"{module}.scales").astype(np.float32), 128, axis=1)
            arrays[name] = (codes.reshape(len(codes), -1).astype(np.float32) - 1) * scales
        elif name.endswith(".weight"):
            arrays[name] = file.read(name).astype(np.float32)
    write_folder(folder, arrays, dtype)
    return arrays


def write_folder(folder: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    stored = {name: array.astype("<f2" if dtype == "F16" else "<f4") for name, array in arrays.items()}
    plan = {name: TensorSpec(dtype, array.shape) for name, array in stored.items()}
    with open(folder / "model.safetensors", "wb") as file:
        write_tensors(file, plan, stored.items(), {})


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_a_folder_of_floats(tmp_path: Path, dtype: str) -> None:
    """Weights that are found to be ternary: the same words and scales as of the same model in another format."""
    write_floats(FOLDER / "qwen3-tied", tmp_path / "source", dtype)
    assert convert(tmp_path / "source", tmp_path / "floats").notes == [GROUPS_FOUND]
    convert(FOLDER / "qwen3-tied", tmp_path / "mlx")
    floats, mlx = open_packed(tmp_path / "floats"), open_packed(tmp_path / "mlx")
    assert floats.names == mlx.names
    for name in floats.names:
        assert np.array_equal(floats.tensor(name), mlx.tensor(name)), name


def test_one_value_that_is_not_ternary(tmp_path: Path) -> None:
    arrays = write_floats(FOLDER / "qwen3-tied", tmp_path / "source", "F16")
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name][300, 130] = np.abs(arrays[name][300, 128:]).max() / 2
    write_folder(tmp_path / "source", arrays, "F16")
    with pytest.raises(CheckpointError, match=f"tensor {name} is not ternary weights times a scale for each row"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_ternary_stay_floats(tmp_path: Path) -> None:
    arrays = write_floats(FOLDER / "qwen3-tied", tmp_path / "source", "F16")
    arrays["model.embed_tokens.weight"][7, 7] = 0.3
    write_folder(tmp_path / "source", arrays, "F16")
    convert(tmp_path / "source", tmp_path / "out")
    packed = open_packed(tmp_path / "out")
    assert packed.embed == packed.head == "f16"
    assert np.array_equal(packed.tensor("embed.weight"), arrays["model.embed_tokens.weight"].astype(np.float16))


@pytest.mark.parametrize(
    ("scale", "note"), [(0.3, "model.layers.0.mlp.up_proj.weight: scales: kept as float16"), (0.25, "")]
)
def test_scales_that_float16_rounds(tmp_path: Path, scale: float, note: str) -> None:
    arrays = write_floats(FOLDER / "qwen3-tied", tmp_path / "source", "F32")
    name = "model.layers.0.mlp.up_proj.weight"
    arrays[name] = np.sign(arrays[name]) * np.float32(scale)
    write_folder(tmp_path / "source", arrays, "F32")
    notes = convert(tmp_path / "source", tmp_path / "out").notes
    assert len(notes) == bool(note) + 1 and all(found.startswith(note) for found in notes[:-1])


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_scales_beyond_float16(tmp_path: Path, scale: float) -> None:
    arrays = write_floats(FOLDER / "qwen3-tied", tmp_path / "source", "F32")
    arrays["model.layers.0.mlp.up_proj.weight"] *= np.float32(scale)
    write_folder(tmp_path / "source", arrays, "F32")
    with pytest.raises(CheckpointError, match="up_proj.weight has a scale that is out of the range of float16"):
        convert(tmp_path / "source", tmp_path / "out")


def test_repacked_files_are_told_from_the_model(tmp_path: Path) -> None:
    note, _ = convert(FOLDER / "trilm-tq1_0.gguf", tmp_path / "out").notes
    assert note.startswith("TQ1_0 has one scale for 256 columns")


def test_older_files_have_128_weights_in_a_block_of_q2_0(tmp_path: Path) -> None:
    shape = (256, 256)
    assert types.kind_and_nbytes(types.Q2_0, shape, 256 * 4 * 18) == (types.Q2_0, 256 * 4 * 18)
    assert types.kind_and_nbytes(types.Q2_0, shape, 256 * 2 * 34) == (types.PQ2_0, 256 * 2 * 34)
    assert types.kind_and_nbytes(types.Q2_0, shape, 256 * 2 * 34 + 31) == (types.PQ2_0, 256 * 2 * 34)


@pytest.mark.parametrize("kind", [types.F16, types.F32, types.IQ2_BN])
def test_a_scale_for_each_row_in_other_types(tmp_path: Path, kind: int) -> None:
    """Rows of q move to where transformers has them, and their scales with them."""
    t = small_model()[2]["blk.0.attn_q"]
    scales = np.arange(1, 129, dtype=np.float32)[:, None] / 64

    def change(_: dict[str, Any], tensors: Tensors) -> None:
        if kind == types.IQ2_BN:
            runs = (t + 1).astype(np.uint8).reshape(128, 2, 4, 16)
            codes = runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6
            data = np.concatenate([scales.view(np.uint8), codes.reshape(128, -1)], axis=1).tobytes()
        else:
            data = (t * scales).astype("<f2" if kind == types.F16 else "<f4").tobytes()
        tensors["blk.0.attn_q.weight"] = (kind, t.shape, data)

    convert(write(tmp_path / "m.gguf", change=change), tmp_path / "out")
    packed = open_packed(tmp_path / "out")
    order = np.arange(128).reshape(4, 16, 2).swapaxes(1, 2).reshape(-1)
    assert packed.config.group_scales
    assert np.array_equal(packed.ternary("layers.0.qkv.words", 256, 128)[:128], t[order])
    assert np.array_equal(packed.group_scales("layers.0.qkv.scales", 256, 128)[:128], scales[order])


def edit_packed(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["bitnet_numba"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))


def test_formats_of_rows_that_a_folder_cannot_have(tmp_path: Path, tiny_packed: Path) -> None:
    shutil.copytree(tiny_packed, tmp_path / "packed")
    edit_packed(tmp_path / "packed", format=1)  # of older versions: one format for both
    assert open_packed(tmp_path / "packed").embed == "bf16"
    for changes, reason in (
        ({"format": 2, "embed": "ternary", "head": "ternary"}, "only models with group scales have ternary rows"),
        ({"embed": "f64"}, "a packed format that this version does not support"),
        ({"embed": ["bf16"]}, "a packed format that this version does not support"),
        ({"format": 3}, "a packed format that this version does not support"),
    ):
        edit_packed(tmp_path / "packed", **changes)
        with pytest.raises(CheckpointError, match=reason):
            open_packed(tmp_path / "packed")


def test_damaged_group_scales(tmp_path: Path) -> None:
    convert(FOLDER / "qwen3-tied", tmp_path / "out")
    file = TensorFile(tmp_path / "out" / "model.safetensors")
    arrays = {name: file.read(name) for name in file.specs}
    for value in (-1, np.nan):
        arrays["layers.0.o.scales"][3] = value
        with open(tmp_path / "out" / "model.safetensors", "wb") as out:
            write_tensors(out, file.specs, arrays.items(), {})
        with pytest.raises(CheckpointError, match="layers.0.o.scales holds (NaN|a scale that is not positive)"):
            open_packed(tmp_path / "out")


PARTS = ("weight", "scales", "biases")
FACTORS = st.sampled_from([-1.0, 0.5, 3.0, float("nan")])


@given(st.sampled_from(PARTS), st.data())
@settings(max_examples=30)
def test_damaged_mlx_folders(tmp_path_factory: pytest.TempPathFactory, part: str, data: st.DataObject) -> None:
    """One tensor of a matrix is missing, or of another shape, type or value: one line that names it, and no folder."""
    folder = tmp_path_factory.mktemp("mlx")
    shutil.copytree(FOLDER / "qwen3-tied", folder / "source")
    file = TensorFile(folder / "source" / "model.safetensors")
    arrays, specs = {name: file.read(name) for name in file.specs}, dict(file.specs)
    module = data.draw(st.sampled_from(sorted(name.removesuffix(".scales") for name in specs if ".scales" in name)))
    name = f"{module}.{part}"
    damage = data.draw(st.sampled_from(["missing", "rows", "columns", "flat", "dtype", "values"]))
    if damage == "missing":
        del specs[name]
    elif damage == "dtype":
        arrays[name] = arrays[name].astype("<i4")
        specs[name] = TensorSpec("I32", specs[name].shape)
    else:
        arrays[name] = {
            "rows": lambda a: a[:-1],
            "columns": lambda a: a[:, ::2],
            "flat": lambda a: a.reshape(-1),
            # A code in each word that is 3, or scales and biases that do not belong together; NaN now and then.
            "values": lambda a: a | np.uint32(3) if part == "weight" else a * a.dtype.type(data.draw(FACTORS)),
        }[damage](arrays[name])
        specs[name] = TensorSpec(specs[name].dtype, arrays[name].shape)
    with open(folder / "source" / "model.safetensors", "wb") as out:
        write_tensors(out, specs, ((name, np.ascontiguousarray(arrays[name])) for name in specs), {})
    if damage == "values" and module.startswith("model.embed"):
        return  # rows may be any floats
    with pytest.raises(CheckpointError) as error:
        convert(folder / "source", folder / "out")
    assert module in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "out").exists()
