"""tools/convert.py: what it writes, what it refuses, and that it never leaves half a checkpoint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.huggingface import HuggingFaceCheckpoint
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.checkpoint.safetensors_file import TensorFile, TensorSpec, write_tensors
from bitnet_numba.errors import BitNetError, CheckpointError
from bitnet_numba.packing import pack_ternary
from bitnet_numba.quantize import ternarize
from bitnet_numba.text.tokenizer import Tokenizer
from tests.conftest import edit_config, mutate, rewrite
from tests.strategies import byte_edits
from tools.convert import main
from tools.make_checkpoint import PRESETS, make_checkpoint


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder to damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


def change_tensor(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None], dtype: str = "") -> None:
    """Replaces one tensor of model.safetensors by `change(tensor)`, or removes it for None."""

    def replace(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
        new, spec = change(arrays.pop(name)), specs.pop(name)
        if new is not None:
            arrays[name], specs[name] = new, TensorSpec(dtype or spec.dtype, new.shape)

    rewrite(folder / "model.safetensors", replace)


def test_tensors(source: Path, tmp_path: Path) -> None:
    """Words, scales, norms and rows are what the source's tensors say, segment by segment."""
    convert(source, tmp_path / "out")
    packed, file = open_packed(tmp_path / "out"), TensorFile(source / "model.safetensors")
    parts = [
        ternarize(to_float32(file.read(f"model.layers.1.self_attn.{p}.weight"))) for p in ("q_proj", "k_proj", "v_proj")
    ]
    assert np.array_equal(packed.tensor("layers.1.qkv.words"), pack_ternary(np.concatenate([t for t, _ in parts])))
    assert packed.tensor("layers.1.qkv.scales").tolist() == [m for _, m in parts]
    assert len({float(m) for _, m in parts}) == 3, "distinct scales, or a mix-up would not show"
    assert np.array_equal(packed.tensor("embed.weight"), file.read("model.embed_tokens.weight"))
    norm = to_float32(file.read("model.layers.1.mlp.ffn_sub_norm.weight"))
    assert np.array_equal(packed.tensor("layers.1.ffn_sub_norm.weight"), norm)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_masters(dtype: str, tmp_path: Path) -> None:
    """fp16 and fp32 masters, in three shards: embedding and head stay as they are, or become bfloat16."""
    make_checkpoint(tmp_path / "source", PRESETS["tiny-1bitllm"][1], "online", seed=1, dtype=dtype, shards=3)
    convert(tmp_path / "source", tmp_path / "out")
    packed, source = open_packed(tmp_path / "out"), HuggingFaceCheckpoint(tmp_path / "source")
    linear = source.take_linear("model.layers.0.self_attn.o_proj", 192, 192, False)
    assert np.array_equal(packed.ternary("layers.0.o.words", 192, 192), linear.t)
    embedding = source.take_floats("model.embed_tokens.weight", (2002, 192))
    assert packed.embed == packed.head == {"fp16": "f16", "fp32": "f32"}[dtype]
    assert np.array_equal(packed.tensor("embed.weight"), embedding)
    convert(tmp_path / "source", tmp_path / "bf16", head="bf16")
    rounded = to_float32(np.asarray(open_packed(tmp_path / "bf16").tensor("embed.weight")))
    assert np.abs(rounded - embedding).max() <= np.abs(embedding).max() * 2.0**-8
    assert (np.abs(rounded - embedding) <= np.abs(embedding) * 2.0**-8).all()


def test_three_forms_agree(tmp_path: Path) -> None:
    """One model stored as master, as absmean-packed and as 1/absmean-packed converts to the same words and scales."""
    _, raw = PRESETS["tiny"]
    make_checkpoint(tmp_path / "offline", raw, "offline", seed=2)
    file = TensorFile(tmp_path / "offline" / "model.safetensors")
    plan, arrays = dict(file.specs), {name: file.read(name) for name in file.specs}
    for name in [name for name in plan if name.endswith("weight_scale")]:
        # Powers of two have exact reciprocals in bfloat16.
        power = np.float32(2.0 ** -(4 + len(name) % 3))
        arrays[name] = (np.array([power]).view(np.uint32) >> 16).astype(np.uint16)
    with open(tmp_path / "offline" / "model.safetensors", "wb") as out:
        write_tensors(out, plan, arrays.items(), {})
    shutil.copytree(tmp_path / "offline", tmp_path / "divide")
    for name in [name for name in plan if name.endswith("weight_scale")]:
        arrays[name] = ((1 / to_float32(arrays[name])).view(np.uint32) >> 16).astype(np.uint16)
    with open(tmp_path / "divide" / "model.safetensors", "wb") as out:
        write_tensors(out, plan, arrays.items(), {})
    edit_config(tmp_path / "divide", quantization_config={"quant_method": "bitnet"})
    convert(tmp_path / "offline", tmp_path / "a")
    convert(tmp_path / "divide", tmp_path / "b")
    one, other = (TensorFile(tmp_path / which / "model.safetensors") for which in "ab")
    for name in one.specs:
        assert np.array_equal(one.read(name), other.read(name)), name


def test_scaled_bias(tmp_path: Path) -> None:
    """offline scales the bias with the product; the other forms do not."""
    for form in ("offline", "bitlinear"):
        folder = tmp_path / form
        make_checkpoint(folder, PRESETS["tiny-llama"][1] | {"attention_bias": True}, form, seed=2)
        convert(folder, tmp_path / f"{form}-out")
        file, name = TensorFile(folder / "model.safetensors"), "model.layers.0.self_attn.o_proj"
        scale = to_float32(file.read(f"{name}.weight_scale"))[0] if form == "offline" else 1
        bias = open_packed(tmp_path / f"{form}-out").tensor("layers.0.o.bias")
        assert np.array_equal(bias, to_float32(file.read(f"{name}.bias")) * scale)


def test_int8_head(source: Path, tmp_path: Path) -> None:
    """Each row within half a step of its source, the largest value at 127."""
    convert(source, tmp_path / "out", head="int8")
    packed = open_packed(tmp_path / "out")
    rows, scale = packed.tensor("embed.weight"), packed.tensor("embed.scale")
    exact = to_float32(TensorFile(source / "model.safetensors").read("model.embed_tokens.weight"))
    assert (np.abs(rows).max(axis=1) == 127).all()
    assert (np.abs(rows * scale[:, None] - exact) <= scale[:, None] * 0.5001).all()


def test_int8_head_of_empty_rows(source: Path, tmp_path: Path) -> None:
    def empty(embedding: np.ndarray) -> np.ndarray:
        embedding[3] = 0
        embedding[4] = 1  # the least denormal bfloat16
        return embedding

    change_tensor(source, "model.embed_tokens.weight", empty)
    convert(source, tmp_path / "out", head="int8")
    packed = open_packed(tmp_path / "out")
    assert not packed.tensor("embed.weight")[3:5].any()


def test_tied_head_stored_twice(source: Path, tmp_path: Path) -> None:
    """A redundant equal copy is fine, a different one is not."""

    def repeat(arrays: dict[str, np.ndarray], specs: dict[str, TensorSpec]) -> None:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
        specs["lm_head.weight"] = specs["model.embed_tokens.weight"]

    rewrite(source / "model.safetensors", repeat)
    convert(source, tmp_path / "out")
    change_tensor(source, "lm_head.weight", lambda a: a + np.uint16(1))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert(source, tmp_path / "out2")


def set_first(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return change


NORM, Q, EMBED = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def only_index(folder: Path, text: str) -> None:
    """Puts an index of shards in the place of model.safetensors."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (shutil.rmtree(f), f.mkdir()), "is not a model folder: it has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 99_999), "is not a readable safetensors file"),
        (lambda f: change_tensor(f, NORM, lambda a: None), "tensor model.norm.weight is missing"),
        (lambda f: change_tensor(f, NORM, lambda a: a[:-1]), "shape [255], expected [256]"),
        (lambda f: change_tensor(f, NORM, lambda a: a.view("i1"), "I8"), "dtype I8, expected BF16 or F16 or F32"),
        (lambda f: change_tensor(f, NORM, set_first(0x7FC0)), "tensor model.norm.weight holds NaN or infinity"),
        (lambda f: change_tensor(f, Q, set_first(0x7F80)), f"tensor {Q} holds NaN or infinity"),
        (lambda f: change_tensor(f, EMBED, set_first(0xFF80)), f"tensor {EMBED} holds NaN or infinity"),
        (lambda f: edit_config(f, num_hidden_layers=1), "unexpected tensor model.layers.1."),
        (lambda f: edit_config(f, num_hidden_layers=3), "tensor model.layers.2.input_layernorm.weight is missing"),
        (lambda f: edit_config(f, architectures=["MambaForCausalLM"]), "architectures = ['MambaForCausalLM']"),
        (lambda f: edit_config(f, clip_qkv=8), "clip_qkv = 8 is not supported"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda f: only_index(f, "{}"), "has no weight_map"),
        (lambda f: only_index(f, '{"weight_map": {"a": "../x.safetensors"}}'), "is not a safetensors file name"),
        (lambda f: only_index(f, '{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing"),
    ],
)
def test_bad_sources(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], message: str
) -> None:
    """One line on stderr, exit code 2, and nothing written."""
    spoil(source)
    assert main([str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("convert: ") and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_packed_words_with_the_unused_code(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", PRESETS["tiny"][1], "offline")
    change_tensor(tmp_path / "source", Q, set_first(0b11))
    with pytest.raises(CheckpointError, match="unused code 3"):
        convert(tmp_path / "source", tmp_path / "out")


def test_tokenizer_larger_than_the_embedding(source: Path, tmp_path: Path) -> None:
    edit_config(source, vocab_size=2000)
    change_tensor(source, EMBED, lambda a: a[:2000])
    with pytest.raises(BitNetError) as caught:
        convert(source, tmp_path / "out")
    assert str(caught.value) == f"{source}/tokenizer.json has 2045 tokens, but the model has embeddings for 2000"


def test_existing_target(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="already exists; use --force"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", head="int8", force=True)
    assert open_packed(tmp_path / "out").head == "int8"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_force_spares_other_folders(source: Path, tmp_path: Path) -> None:
    """--force replaces packed checkpoints, not somebody's documents."""
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a packed checkpoint, so --force will not replace it"):
        convert(source, tmp_path / "documents", force=True)
    with pytest.raises(CheckpointError, match="holds the source, so --force will not replace it"):
        convert(source, source, force=True)
    assert (tmp_path / "documents" / "thesis.txt").read_text() == "years of work"


def test_force_spares_the_source_and_strangers(source: Path, tmp_path: Path) -> None:
    """Neither a source that lies inside the target nor a file that no conversion wrote is lost."""
    convert(source, tmp_path / "out")
    for name, shown in (("notes.md", "notes.md"), ("a\x1b\nb", r"a\x1b\nb")):
        (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(CheckpointError) as caught:
            convert(source, tmp_path / "out", force=True)
        assert f"also holds {shown}, so" in str(caught.value)
        (tmp_path / "out" / name).unlink()
    inside = Path(shutil.copytree(source, tmp_path / "out" / "source"))
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(inside, tmp_path / "out", force=True)
    assert (inside / "config.json").exists()


def test_target_behind_a_link(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    convert(source, tmp_path / "link", head="int8", force=True)
    assert (tmp_path / "link").is_symlink() and open_packed(tmp_path / "out").head == "int8"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "link"}


def test_failed_force_keeps_the_old_checkpoint(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    change_tensor(source, Q, set_first(0x7F80))
    with pytest.raises(CheckpointError, match="NaN"):
        convert(source, tmp_path / "out", force=True)
    assert open_packed(tmp_path / "out").head == "bf16"


def test_progress(source: Path, tmp_path: Path) -> None:
    """Zero of a known total at once, then forwards in many steps, and at last all."""
    seen: list[tuple[int, int]] = []
    report = convert(source, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {report.bytes_after}
    assert seen[0][0] == 0 and seen[-1][0] == report.bytes_after
    assert seen == sorted(seen) and len(seen) > 40


def test_a_source_that_is_replaced(source: Path, tiny_source: Path, tmp_path: Path) -> None:
    def replace(done: int, total: int) -> None:
        if done and not (tmp_path / "moved").exists():
            source.rename(tmp_path / "moved")
            shutil.copytree(tiny_source, source)

    with pytest.raises(CheckpointError, match="source was replaced by another folder while it was converted"):
        convert(source, tmp_path / "out", progress=replace)
    assert set(os.listdir(tmp_path)) == {"source", "moved"}


@given(byte_edits(3), byte_edits(3))
def test_fuzzed_sources(
    tiny_source: Path,
    tmp_path_factory: pytest.TempPathFactory,
    header_edits: list[tuple[float, bytes]],
    config_edits: list[tuple[float, bytes]],
) -> None:
    """Random damage to a Hugging Face folder: converted, or the project's own error."""
    folder = tmp_path_factory.mktemp("fuzz")
    source = Path(shutil.copytree(tiny_source, folder / "source"))
    for name, changes in (("model.safetensors", header_edits), ("config.json", config_edits)):
        data = (source / name).read_bytes()
        within = 8 + int.from_bytes(data[:8], "little") + 64 if name != "config.json" else len(data)
        (source / name).write_bytes(mutate(data, changes, within))
    try:
        convert(source, folder / "out")
    except BitNetError as error:
        assert "\n" not in str(error) and ".bitnet-" not in str(error) and not (folder / "out").exists()
    else:
        open_packed(folder / "out")
    finally:
        shutil.rmtree(folder)


def test_the_default_of_several_templates_is_taken_along(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    folder = source / "additional_chat_templates"
    folder.mkdir()
    (folder / "default.jinja").write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    (folder / "other.jinja").write_text("other")
    convert(source, tmp_path / "out")
    tokenizer = Tokenizer.open(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "hello"}])) == "<hello>"
