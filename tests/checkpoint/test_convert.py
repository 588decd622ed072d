"""tools/convert.py: what it writes, what it refuses, and that it never leaves half a checkpoint."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.checkpoint.huggingface import HuggingFaceCheckpoint
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.checkpoint.safetensors_file import TensorFile, TensorSpec, write_tensors
from bitnet_numba.errors import BitNetError, CheckpointError
from bitnet_numba.packing import pack_ternary
from bitnet_numba.quantize import ternarize
from tests.conftest import edit_config, mutate, rewrite
from tests.strategies import byte_edits
from tools.convert import convert, main
from tools.make_checkpoint import PRESETS, make_checkpoint

TOOL = Path(__file__).parent.parent.parent / "tools" / "convert.py"


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
    """fp16 and fp32 masters, in three shards."""
    make_checkpoint(tmp_path / "source", PRESETS["tiny-1bitllm"][1], "online", seed=1, dtype=dtype, shards=3)
    convert(tmp_path / "source", tmp_path / "out")
    packed, source = open_packed(tmp_path / "out"), HuggingFaceCheckpoint(tmp_path / "source")
    linear = source.take_linear("model.layers.0.self_attn.o_proj", 192, 192, False)
    assert np.array_equal(packed.ternary("layers.0.o.words", 192, 192), linear.t)
    embedding = source.take_floats("model.embed_tokens.weight", (2002, 192))
    rounded = to_float32(np.asarray(packed.tensor("embed.weight")))
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


def test_report(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"{len(TensorFile(source / 'model.safetensors').specs)} tensors" in out
    assert "q_proj 3" in out, "about a third of ternarised normal weights is zero"
    assert f"written to {tmp_path / 'out'}" in out


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
        (lambda f: edit_config(f, clip_qkv=8), "'clip_qkv' = 8 is not supported"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            "is not a safetensors file name",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "b.safetensors is missing",
        ),
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
    with pytest.raises(BitNetError, match="has 2045 tokens, but the model has embeddings for 2000"):
        convert(source, tmp_path / "out")


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
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match="also holds notes.md"):
        convert(source, tmp_path / "out", force=True)
    (tmp_path / "out" / "notes.md").unlink()
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "out"], "SRC must be a folder, or a hub id"),
        (["https://example.org/owner/name", "out"], "SRC must be a folder, or a hub id"),
        (["source", ""], "DST must be a folder"),
    ],
)
def test_odd_names(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_failed_force_keeps_the_old_checkpoint(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    change_tensor(source, Q, set_first(0x7F80))
    with pytest.raises(CheckpointError, match="NaN"):
        convert(source, tmp_path / "out", force=True)
    assert open_packed(tmp_path / "out").head == "bf16"


def test_unwritable_target(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(source), str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err


def run_tool(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_disk_full(source: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the write fails in the middle of the tensors."""
    done = run_tool(
        source,
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("convert: cannot write") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and {path.name for path in tmp_path.iterdir()} == {"source"}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL as the converter works: DST is not there, or whole; and the next run clears up and succeeds."""
    make_checkpoint(tmp_path / "source", PRESETS["tiny"][1] | {"num_hidden_layers": 24}, "online")
    seen_partial = False
    for delay in (0.0, 0.01, 0.03, 0.1):
        child = subprocess.Popen(
            [sys.executable, TOOL, tmp_path / "source", tmp_path / "out"], stdout=subprocess.DEVNULL
        )
        while child.poll() is None and not any(tmp_path.glob(".out*")):
            time.sleep(0.001)
        time.sleep(delay)
        child.kill()
        child.wait()
        seen_partial |= any(tmp_path.glob(".out*"))
        if (tmp_path / "out").exists():
            open_packed(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
    assert seen_partial, "no kill came in the middle of a conversion"
    assert run_tool(tmp_path / "source", tmp_path / "out").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def cache_as_downloaded(source: Path, cache: Path, name: str) -> None:
    """Lays a folder out as huggingface_hub's cache holds a downloaded repository."""
    repository = cache / ("models--" + name.replace("/", "--"))
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(source, repository / "snapshots" / revision)


def test_hub_id_from_the_cache(source: Path, tmp_path: Path) -> None:
    cache_as_downloaded(source, tmp_path / "cache", "someone/tiny-bitnet")
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run_tool("someone/tiny-bitnet", tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert open_packed(tmp_path / "out").config.hidden_size == 256
    done = run_tool("someone/other", tmp_path / "out2", env=env)
    assert done.returncode == 2 and "could not be downloaded" in done.stderr and done.stderr.count("\n") == 1
    done = run_tool("someone/tiny-bitnet", tmp_path / "out2", "--revision", "v9", env=env)
    assert done.returncode == 2 and "could not be downloaded" in done.stderr


def test_revision_needs_a_hub_id(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "out"), "--revision", "main"]) == 2
    assert "--revision needs a hub id" in capsys.readouterr().err


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
        assert "\n" not in str(error) and not (folder / "out").exists()
    else:
        open_packed(folder / "out")
    finally:
        shutil.rmtree(folder)
