"""Hugging Face folders as people have them: odd keys, tensors stored twice, once or unpacked, buffers of old files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.checkpoint import huggingface
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.huggingface import EMBEDDING, LM_HEAD, HuggingFaceCheckpoint
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.checkpoint.safetensors_file import TensorFile, TensorSpec
from bitnet_numba.errors import BitNetError, CheckpointError
from bitnet_numba.reference.model import Cache, Model
from tests.conftest import edit_config, rewrite
from tools.convert import main
from tools.make_checkpoint import PRESETS, make_checkpoint

Arrays = dict[str, np.ndarray]
Specs = dict[str, TensorSpec]


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A tied Hugging Face folder with bfloat16 master weights, to change."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


def same_tensors(one: Path, other: Path) -> bool:
    a, b = TensorFile(one / "model.safetensors"), TensorFile(other / "model.safetensors")
    return a.specs == b.specs and all(np.array_equal(a.read(name), b.read(name)) for name in a.specs)


def add_raw(folder: Path, name: str, dtype: str, shape: list[int], nbytes: int) -> None:
    """Adds a tensor of zeros to model.safetensors, of any type."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8:size]), len(data) - size
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[size:] + bytes(nbytes))


def test_published_keys_convert_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The keys beside the sizes in the config.json of Falcon3-1.58bit, Falcon-E and Llama3-8B-1.58."""
    _, raw = PRESETS["tiny-llama"]
    make_checkpoint(tmp_path / "source", raw, "bitlinear", seed=1)
    edit_config(
        tmp_path / "source",
        is_bitnet_config=True,
        activation="swiglu",
        rope_interleaved=False,
        pretraining_tp=1,
        task_specific_params={"text-generation": {"max_length": 50}},
        quantization_config={"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet", "bits": 2},
    )
    assert main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    assert "note:" not in capsys.readouterr().out


def test_unknown_keys_stand_in_the_report(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(source, mood=":warning: [red]\x1b[1m")
    assert main([str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "note: config.json: unknown keys, without effect here: mood = ':warning: [red]\\x1b[1m'\n" in out
    open_packed(tmp_path / "out")


def test_a_tied_model_may_store_only_the_head(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "as-usual")

    def rename(arrays: Arrays, specs: Specs) -> None:
        arrays[LM_HEAD], specs[LM_HEAD] = arrays.pop(EMBEDDING), specs.pop(EMBEDDING)

    rewrite(source / "model.safetensors", rename)
    convert(source, tmp_path / "out")
    assert same_tensors(tmp_path / "out", tmp_path / "as-usual")
    edit_config(source, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="tensor model.embed_tokens.weight is missing"):
        convert(source, tmp_path / "untied")


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_a_tied_head_of_equal_values_in_any_type(
    source: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "_ROWS_AT_A_TIME", 500)

    def repeat(arrays: Arrays, specs: Specs, change: float = 0) -> None:
        arrays[EMBEDDING] = from_float32(to_float32(arrays[EMBEDDING]).astype(np.float16).astype(np.float32))
        arrays[EMBEDDING] &= np.uint16(0xFFF0)  # few digits, so that float16 holds them, too
        values = to_float32(arrays[EMBEDDING])
        values[-1, -1] += np.float32(change)
        head = {"BF16": from_float32(values), "F32": values, "F16": values.astype(np.float16)}[dtype]
        arrays[LM_HEAD], specs[LM_HEAD] = head, TensorSpec(dtype, head.shape)

    rewrite(source / "model.safetensors", repeat)
    convert(source, tmp_path / "out")
    rewrite(source / "model.safetensors", lambda arrays, specs: repeat(arrays, specs, change=1))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert(source, tmp_path / "out2")


@pytest.mark.parametrize("kind", ["rows", "columns", "integers"])
def test_a_tied_head_of_another_shape(source: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "_ROWS_AT_A_TIME", 500)

    def add(arrays: Arrays, specs: Specs) -> None:
        embedding = arrays[EMBEDDING]
        head = {"rows": embedding[:1000], "columns": embedding[:, :-1], "integers": embedding.astype(np.int32)}[kind]
        arrays[LM_HEAD] = np.ascontiguousarray(head)
        specs[LM_HEAD] = TensorSpec("I32" if kind == "integers" else "BF16", head.shape)

    rewrite(source / "model.safetensors", add)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert(source, tmp_path / "out")


def test_a_stale_index_is_not_read(source: Path, tmp_path: Path) -> None:
    """As in transformers, model.safetensors comes first."""
    convert(source, tmp_path / "as-usual")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    convert(source, tmp_path / "out")
    assert same_tensors(tmp_path / "out", tmp_path / "as-usual")


def unpack(arrays: Arrays, specs: Specs, size: float = 1) -> None:
    """Replaces packed weights by floats: -size, 0 and size."""
    for name in [name for name, spec in specs.items() if spec.dtype == "U8"]:
        codes = np.concatenate([arrays[name] >> np.uint8(2 * plane) & np.uint8(3) for plane in range(4)])
        arrays[name] = from_float32((codes.astype(np.float32) - 1) * np.float32(size))
        specs[name] = TensorSpec("BF16", arrays[name].shape)


@pytest.fixture
def offline(tmp_path: Path) -> Path:
    """A folder with packed weights, absmean scales and biases."""
    _, raw = PRESETS["tiny-llama"]
    make_checkpoint(tmp_path / "offline", raw | {"attention_bias": True}, "offline", seed=4)
    return tmp_path / "offline"


def test_offline_weights_unpacked_to_floats(offline: Path, tmp_path: Path) -> None:
    convert(offline, tmp_path / "packed")
    rewrite(offline / "model.safetensors", unpack)
    convert(offline, tmp_path / "floats")
    assert same_tensors(tmp_path / "packed", tmp_path / "floats")


def test_offline_floats_of_one_size(offline: Path, tmp_path: Path) -> None:
    """The size multiplies the scale of the weights, but not that of the bias."""
    convert(offline, tmp_path / "packed")
    rewrite(offline / "model.safetensors", lambda arrays, specs: unpack(arrays, specs, size=0.25))
    convert(offline, tmp_path / "floats")
    one, other = open_packed(tmp_path / "packed"), open_packed(tmp_path / "floats")
    for group in ("qkv", "o", "gate_up", "down"):
        scales = one.tensor(f"layers.1.{group}.scales") * np.float32(0.25)
        assert np.array_equal(other.tensor(f"layers.1.{group}.scales"), scales)
        assert np.array_equal(other.tensor(f"layers.1.{group}.words"), one.tensor(f"layers.1.{group}.words"))
    assert np.array_equal(other.tensor("layers.1.o.bias"), one.tensor("layers.1.o.bias"))


def test_offline_floats_that_are_not_ternary(offline: Path, tmp_path: Path) -> None:
    def spoil(arrays: Arrays, specs: Specs) -> None:
        unpack(arrays, specs)
        arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = 0x3F00  # a half

    rewrite(offline / "model.safetensors", spoil)
    with pytest.raises(CheckpointError, match="up_proj.weight holds floats that are not ternary"):
        convert(offline, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_what_bfloat16_loses_is_reported(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet_numba.checkpoint.rows.ROWS_AT_A_TIME", 500)
    _, raw = PRESETS["tiny-1bitllm"]
    make_checkpoint(tmp_path / "source", raw, "online", seed=1, dtype=dtype)
    report = convert(tmp_path / "source", tmp_path / "out", head="bf16")
    exact = HuggingFaceCheckpoint(tmp_path / "source").take_floats(EMBEDDING, (2002, 192)).astype(np.float64)
    kept = to_float32(np.asarray(open_packed(tmp_path / "out").tensor("embed.weight")))
    changed, rms = (kept != exact).mean(), np.sqrt(((kept - exact) ** 2).sum() / (exact**2).sum())
    assert report.notes == [
        f"{EMBEDDING}: kept as bfloat16, which rounds {changed:.1%} of the values; rms error {rms:.2%}"
    ]
    assert changed > 0.8 and 0.001 < rms < 0.003
    assert convert(tmp_path / "source", tmp_path / "int8", head="int8").notes == []
    assert convert(tmp_path / "source", tmp_path / "as-it-is").notes == []
    assert np.array_equal(open_packed(tmp_path / "as-it-is").tensor("embed.weight"), exact.astype(np.float32))


def test_what_linears_lose_that_are_not_quantised(tmp_path: Path) -> None:
    _, raw = PRESETS["tiny-1bitllm"]
    quantization = {"quantization_config": {"modules_to_not_convert": ["lm_head", "down_proj"]}}
    make_checkpoint(tmp_path / "source", raw | quantization, "online", seed=1, dtype="fp32")
    notes = convert(tmp_path / "source", tmp_path / "out").notes
    assert len(notes) == 1 and notes[0].startswith("linears that are not quantised: kept as bfloat16, which rounds ")


def test_nothing_is_lost_of_bfloat16(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "out").notes == []

    def widen(arrays: Arrays, specs: Specs) -> None:
        arrays[EMBEDDING] = to_float32(arrays[EMBEDDING])
        specs[EMBEDDING] = TensorSpec("F32", arrays[EMBEDDING].shape)

    rewrite(source / "model.safetensors", widen)
    assert convert(source, tmp_path / "wide").notes == []


def test_values_beyond_bfloat16(source: Path, tmp_path: Path) -> None:
    def grow(arrays: Arrays, specs: Specs) -> None:
        arrays[EMBEDDING] = to_float32(arrays[EMBEDDING])
        arrays[EMBEDDING][5, 6] = np.finfo(np.float32).max
        specs[EMBEDDING] = TensorSpec("F32", arrays[EMBEDDING].shape)

    rewrite(source / "model.safetensors", grow)
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight: 3.40\d+e\+38 is too large for bfloat16"):
        convert(source, tmp_path / "out", head="bf16")


TYPES = [("I64", 8), ("I16", 2), ("BOOL", 1), ("F8_E4M3", 1), ("U16", 2), ("F64", 8)]


@pytest.mark.parametrize(("dtype", "size"), TYPES)
def test_buffers_of_old_files_are_ignored(source: Path, tmp_path: Path, dtype: str, size: int) -> None:
    convert(source, tmp_path / "as-usual")
    for name in (
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.embed_positions.position_ids",
        "position_ids",
        "model.layers.0.self_attn.masked_bias",
        "model.causal_mask",
    ):
        add_raw(source, name, dtype, [3], 3 * size)
    convert(source, tmp_path / "out")
    assert same_tensors(tmp_path / "out", tmp_path / "as-usual")


@pytest.mark.parametrize(("dtype", "size"), TYPES)
def test_other_tensors_of_odd_types_are_named(source: Path, tmp_path: Path, dtype: str, size: int) -> None:
    add_raw(source, "model.layers.0.mystery\x1b", dtype, [3], 3 * size)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.mystery\\x1b") as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value) and (dtype == "F64" or f"has dtype {dtype}" in str(caught.value))


def test_more_layers_than_tensors(source: Path, tmp_path: Path) -> None:
    edit_config(source, num_hidden_layers=4096)
    with pytest.raises(CheckpointError, match="too few tensors for 4096 layers"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("depth", [150, 960, 3000, 100_000])
def test_nested_config(source: Path, tmp_path: Path, depth: int) -> None:
    """Converted, or refused in one line."""
    text = (source / "config.json").read_text().rstrip().removesuffix("}")
    (source / "config.json").write_text(text + ', "mood": ' + "[" * depth + "]" * depth + "}")
    try:
        convert(source, tmp_path / "out")
    except BitNetError as error:
        assert "\n" not in str(error) and not (tmp_path / "out").exists()
    else:
        open_packed(tmp_path / "out")


def test_config_that_could_be_read_but_not_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of Python read deeper JSON than they write."""
    raw, nested = json.loads((source / "config.json").read_text()), []
    for _ in range(20_000):
        nested = [nested]
    monkeypatch.setattr(huggingface, "read_config", lambda folder: raw | {"mood": nested})
    with pytest.raises(CheckpointError, match="config.json is nested too deeply"):
        HuggingFaceCheckpoint(source)


def test_defaults_of_the_class_reach_the_logits(source: Path, tmp_path: Path) -> None:
    """A folder without hidden_act, rope_theta and rms_norm_eps is the folder with the values of its class."""
    convert(source, tmp_path / "explicit")
    raw = json.loads((source / "config.json").read_text())
    for key in ("hidden_act", "rope_theta", "rms_norm_eps"):
        del raw[key]
    (source / "config.json").write_text(json.dumps(raw))
    convert(source, tmp_path / "absent")
    models = [Model(open_packed(tmp_path / name)) for name in ("explicit", "absent")]
    one, other = (m.logits(m.forward(np.arange(5), Cache(m.config, 5))) for m in models)
    assert np.array_equal(one, other)
