"""GGUF files as models: files of bitnet.cpp and llama.cpp against the Hugging Face folders that they were made of, and
small written ones for what these do not have."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.gguf import GgufCheckpoint, unpermute
from bitnet_numba.checkpoint.gguf_types import BF16, F16, F32, I2_S
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.config import ModelConfig, RopeScaling
from bitnet_numba.errors import BitNetError, CheckpointError, ConfigError
from bitnet_numba.reference.model import Cache, Model
from bitnet_numba.text.tokenizer import Tokenizer
from tests.conftest import GOLDEN, mutate
from tests.gguf_writer import gguf
from tests.strategies import byte_edits
from tools.convert import main

FOLDER = GOLDEN / "gguf"
RECORDED: dict[str, Any] = json.loads((FOLDER / "recorded.json").read_text())
FILES = ("bitnet-silu-tq1_0", "bitnet-relu2-i2_s", "llama-tq2_0")
Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]


@pytest.fixture(scope="module", params=FILES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PackedCheckpoint]:
    folder = tmp_path_factory.mktemp("gguf") / request.param
    convert(FOLDER / f"{request.param}.gguf", folder)
    return request.param, open_packed(folder)


def test_the_config_is_that_of_the_folder(converted: tuple[str, PackedCheckpoint]) -> None:
    name, packed = converted
    expected = ModelConfig.from_hf(RECORDED[name]["config"])
    assert replace(packed.config, weight_format="online") == replace(expected, weight_format="online")


def test_the_weights_are_those_of_the_folder(converted: tuple[str, PackedCheckpoint]) -> None:
    """Every code and every norm is the same; scales are, too, except that TQ1_0 and TQ2_0 keep them as float16."""
    name, packed = converted
    recorded = RECORDED[name]
    for tensor, digest in (recorded["words"] | recorded["norms"]).items():
        assert hashlib.sha256(np.ascontiguousarray(packed.tensor(tensor)).tobytes()).hexdigest() == digest, tensor
    for tensor, scales in recorded["scales"].items():
        expected = np.array(scales, np.float32)
        if name.endswith("i2_s"):
            assert np.array_equal(packed.tensor(tensor), expected), tensor
        else:
            assert np.abs(packed.tensor(tensor) / expected - 1).max() < 2.0**-11, tensor


@pytest.mark.golden
def test_logits(converted: tuple[str, PackedCheckpoint]) -> None:
    """Against transformers with the folder: float32, so within the flips of int8 that rounding makes of other scales
    (float16), embeddings (bfloat16) or, in the last file, of the loss of Q4_K and Q6_K itself."""
    name, packed = converted
    model = Model(packed)
    most, rms = (0.9, 0.2) if name == "llama-tq2_0" else (0.3, 0.05)
    with np.load(FOLDER / "golden.npz") as golden:
        for prompt in (1, 3):
            ids, expected = golden[f"{name}/prompt_{prompt}"], golden[f"{name}/logits_{prompt}"]
            logits = model.logits(model.forward(ids.astype(np.int64), Cache(model.config, len(ids))))
            error = (logits - expected) / expected.std()
            assert np.abs(error).max() < most and np.sqrt((error**2).mean()) < rms


def test_token_ids(converted: tuple[str, PackedCheckpoint]) -> None:
    name, packed = converted
    tokenizer = Tokenizer.open(packed.folder)
    for case in RECORDED[name].get("tokens", ()):  # two of the files have some
        assert tokenizer.encode(case["text"]) == case["hf_special"], case["text"]
        if "<" not in case["text"]:  # sentencepiece puts a space behind special tokens
            assert tokenizer.decode(case["hf_special"]) == case["text"]


def test_ends_and_chats(converted: tuple[str, PackedCheckpoint]) -> None:
    name, packed = converted
    tokenizer = Tokenizer.open(packed.folder)
    ids = {"bitnet-silu-tq1_0": (1, {2}), "bitnet-relu2-i2_s": (301, {302, 303}), "llama-tq2_0": (317, {318, 319})}[
        name
    ]
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (ids[0], frozenset(ids[1]))
    assert tokenizer.has_chat_template == (name != "bitnet-silu-tq1_0")
    if tokenizer.has_chat_template:
        chat = [{"role": "user", "content": "<|eot_id|> hi"}]
        assert tokenizer.apply_chat_template(chat) == "User: <|eot_id|> hi<|eot_id|>Assistant: "
        assert tokenizer.encode_chat(chat).count(max(ids[1])) == 1, "no message ends its turn itself"


HIDDEN, LAYERS, HEADS, KV, FFN, VOCAB = 128, 2, 4, 2, 256, 260
LINEARS = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def floats(values: Any) -> bytes:
    return np.asarray(values, "<f4").tobytes()


def i2s(t: np.ndarray, scale: float) -> bytes:
    """Type I2_S, as on x86."""
    runs = (t + 1).astype(np.uint8).reshape(-1, 4, 32)
    return (runs[:, 0] << 6 | runs[:, 1] << 4 | runs[:, 2] << 2 | runs[:, 3]).tobytes() + floats([scale] + [0] * 7)


def small_model(architecture: str = "llama") -> tuple[dict[str, Any], Tensors, dict[str, np.ndarray]]:
    """Metadata and tensors of a small file, and the ternary weights in it."""
    rng = np.random.default_rng(5)
    letters = [chr(c) for c in range(0x21, 0x7F)] + [chr(c) for c in range(0x100, 0x100 + VOCAB - 96)]
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": FFN,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*letters, "<|begin|>", "<|end|>"],
        "tokenizer.ggml.token_type": np.array([1] * (VOCAB - 2) + [3, 3], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": VOCAB - 2,
        "tokenizer.ggml.eos_token_id": VOCAB - 1,
    }
    metadata["tokenizer.ggml.tokens"][-4] = "ab"
    tensors: Tensors = {
        "token_embd.weight": (F32, (VOCAB, HIDDEN), floats(rng.integers(-9, 9, (VOCAB, HIDDEN)))),
        "output_norm.weight": (F32, (HIDDEN,), floats(rng.uniform(0.5, 2, HIDDEN))),
    }
    weights = {}
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = (F32, (HIDDEN,), floats(rng.uniform(0.5, 2, HIDDEN)))
        if architecture != "llama":
            for name, size in (("attn_sub_norm", HIDDEN), ("ffn_sub_norm", FFN)):
                tensors[f"blk.{i}.{name}.weight"] = (F32, (size,), floats(rng.uniform(0.5, 2, size)))
        for k, (name, shape) in enumerate(LINEARS.items()):
            t = rng.integers(-1, 2, shape)
            weights[f"blk.{i}.{name}"] = t
            tensors[f"blk.{i}.{name}.weight"] = (I2_S, shape, i2s(t, 0.01 * (1 + k + 10 * i)))
    return metadata, tensors, weights


Change = Callable[[dict[str, Any], Tensors], None]


def write(path: Path, architecture: str = "llama", change: Change | None = None) -> Path:
    """A small file, after `change` has edited its metadata and tensors in place."""
    metadata, tensors, _ = small_model(architecture)
    if change is not None:
        change(metadata, tensors)
    path.write_bytes(gguf(metadata, tensors))
    return path


def set_keys(**keys: Any) -> Change:
    """A change of keys; two underscores stand for a point."""
    return lambda metadata, tensors: metadata.update({key.replace("__", "."): of for key, of in keys.items()})


@pytest.mark.parametrize("architecture", ["llama", "bitnet", "bitnet-b1.58", "bitnet-25"])
def test_architectures(tmp_path: Path, architecture: str) -> None:
    checkpoint = GgufCheckpoint(write(tmp_path / "m.gguf", architecture))
    config = checkpoint.config
    assert config.activation == ("relu2" if architecture in ("bitnet-b1.58", "bitnet-25") else "silu")
    assert config.sub_norms == (architecture != "llama") and config.tied and config.rope_theta == 10000
    assert (config.head_dim, config.rms_norm_eps, config.max_context) == (32, 1e-5, 512)
    t = small_model(architecture)[2]["blk.1.attn_k"]
    linear = checkpoint.take_linear("model.layers.1.self_attn.k_proj", 64, 128, False)
    assert linear.m == np.float32(0.12)
    if architecture == "llama":
        half = np.arange(64).reshape(2, 2, 16).swapaxes(1, 2).reshape(-1)  # how llama.cpp's converter orders rows
        assert np.array_equal(linear.t[half], t) and not np.array_equal(linear.t, t)
    else:
        assert np.array_equal(linear.t, t)


def test_rows_of_a_head_are_unpermuted_as_described() -> None:
    assert unpermute(np.array([0, 2, 1, 3, 4, 6, 5, 7]), 2).tolist() == list(range(8))


@pytest.mark.parametrize("kind", [F32, F16, BF16])
def test_ternary_weights_as_floats_and_a_scale_beside_them(tmp_path: Path, kind: int) -> None:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        t = small_model()[2]["blk.0.attn_v"].astype("<f4")
        data = (t * np.float32(1 if kind == F16 else 0.5)).astype("<f2" if kind == F16 else "<f4")
        content = (data.view(np.uint32) >> 16).astype("<u2").tobytes() if kind == BF16 else data.tobytes()
        tensors["blk.0.attn_v.weight"] = (kind, t.shape, content)
        if kind == F16:
            tensors["blk.0.attn_v.scale"] = (F32, (1,), floats([0.5]))

    convert(write(tmp_path / "m.gguf", change=change), tmp_path / "out")
    packed = open_packed(tmp_path / "out")
    rows = packed.ternary("layers.0.qkv.words", 256, 128)[192:]
    assert np.array_equal(rows, small_model()[2]["blk.0.attn_v"])
    assert packed.tensor("layers.0.qkv.scales")[2] == 0.5


def test_biases_are_permuted_like_their_rows(tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        for i in range(LAYERS):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                size = LINEARS[name][0]
                tensors[f"blk.{i}.{name}.bias"] = (F32, (size,), floats(np.arange(size)))

    convert(write(tmp_path / "m.gguf", change=change), tmp_path / "out")
    packed = open_packed(tmp_path / "out")
    bias = np.asarray(packed.tensor("layers.0.qkv.bias"))
    assert bias[:4].tolist() == [0, 2, 4, 6] and bias[16:18].tolist() == [1, 3] and bias[32] == 32
    assert np.array_equal(bias[192:], np.arange(64)) and not packed.config.mlp_bias


def llama3_divisors(factor: float, theta: float) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    divisors = []
    for exponent in np.arange(0, 32, 2) / 32:
        wavelength = 2 * np.pi * theta**exponent
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scaling_of_llama3_is_found_in_its_divisors(tmp_path: Path, factor: float) -> None:
    def change(metadata: dict[str, Any], tensors: Tensors) -> None:
        metadata["llama.rope.freq_base"] = 500000.0
        tensors["rope_freqs.weight"] = (F32, (16,), floats(llama3_divisors(factor, 500000.0)))

    convert(write(tmp_path / "m.gguf", change=change), tmp_path / "out")
    assert open_packed(tmp_path / "out").config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


def test_rope_scaling_otherwise(tmp_path: Path) -> None:
    def scaling(name: str, **keys: Any) -> RopeScaling | None:
        return GgufCheckpoint(write(tmp_path / name, change=set_keys(**keys))).config.rope_scaling

    assert scaling("one", llama__rope__scaling__type="linear", llama__rope__scaling__factor=1.0) is None
    linear = scaling("two", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert linear == RopeScaling("linear", 4.0)

    def ones(metadata: dict[str, Any], tensors: Tensors) -> None:
        tensors["rope_freqs.weight"] = (F32, (16,), floats(np.ones(16)))

    checkpoint = GgufCheckpoint(write(tmp_path / "ones", change=ones))
    assert checkpoint.config.rope_scaling is None


def drop(name: str) -> Change:
    return lambda metadata, tensors: (metadata if name in metadata else tensors).pop(name)  # type: ignore[func-returns-value]


def retype(name: str, kind: int) -> Change:
    return lambda metadata, tensors: tensors.update({name: (kind, tensors[name][1], tensors[name][2])})


REFUSED: dict[str, tuple[Change, str]] = {
    "another architecture": (set_keys(general__architecture="qwen3"), "architecture 'qwen3' is not supported"),
    "no architecture": (drop("general.architecture"), "architecture null is not supported"),
    "an adapter": (set_keys(general__type="adapter"), "holds no model: general.type = 'adapter'"),
    "rotated weights": (
        set_keys(prism__hadamard__block_size=512),
        r"weights are rotated \(prism.hadamard.block_size\)",
    ),
    "a missing key": (drop("llama.block_count"), "llama: block_count is missing"),
    "a key of another type": (set_keys(llama__block_count="two"), "block_count must be an integer, not 'two'"),
    "many layers": (set_keys(llama__block_count=4000), "too few tensors for 4000 layers"),
    "heads": (set_keys(llama__attention__head_count=7), "128 rows of blk.0.attn_q.weight do not fit 7 heads"),
    "no heads": (set_keys(llama__attention__head_count=0), "do not fit 0 heads"),
    "other heads": (set_keys(llama__attention__key_length=64), "key_length = 64 is not supported, since heads have 32"),
    "partial rotation": (set_keys(llama__rope__dimension_count=16), "dimension_count = 16 is not supported"),
    "yarn": (set_keys(llama__rope__scaling__type="yarn"), "rope.scaling.type = 'yarn' is not supported"),
    "experts": (set_keys(llama__expert_count=8), "expert_count = 8 is not supported"),
    "scaled logits": (set_keys(llama__logit_scale=0.5), "logit_scale = 0.5 is not supported"),
    "a window": (set_keys(llama__attention__sliding_window=100), "sliding_window = 100 is not supported"),
    "layers that differ": (
        set_keys(llama__feed_forward_length=np.array([256, 128], np.uint32)),
        "feed_forward_length differs from layer to layer",
    ),
    "other rotary factors": (
        lambda metadata, tensors: tensors.update({"rope_freqs.weight": (F32, (16,), floats(np.arange(1, 17)))}),
        "rotary factors in rope_freqs.weight are not those of a Llama 3 model",
    ),
    "a missing tensor": (drop("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
    "no embedding": (drop("token_embd.weight"), "tensor token_embd.weight is missing"),
    "an unexpected tensor": (
        lambda metadata, tensors: tensors.update({"blk.0.\x1b.weight": (F32, (1,), floats([1]))}),
        r"unexpected tensor blk.0.\\x1b.weight",
    ),
    "a shape": (
        lambda metadata, tensors: tensors.update({"output_norm.weight": (F32, (64,), floats(np.ones(64)))}),
        r"output_norm.weight has shape \[64\], expected \[128\]",
    ),
    "Q2_0": (retype("blk.0.attn_q.weight", 42), "type Q2_0, .*: one scale for each group of columns"),
    "PTQ1_0": (retype("blk.0.attn_q.weight", 143), "type PTQ1_0, .*: one scale for each group of columns"),
    "IQ2_BN": (retype("blk.0.attn_q.weight", 135), "type IQ2_BN, .*: one scale for each row"),
    "TL1": (retype("blk.0.attn_q.weight", 38), "type TL1, .*: its tiles depend"),
    "TL2": (retype("blk.0.attn_q.weight", 39), "type TL2 or MXFP4, .*: its tiles depend"),
    "an unknown type": (retype("token_embd.weight", 999), "token_embd.weight has type type 999"),
    "no BitNet model": (
        lambda metadata, tensors: tensors.update({"blk.0.attn_q.weight": (8, (128, 128), bytes(128 * 4 * 34))}),
        "blk.0.attn_q.weight has type Q8_0, so this is no BitNet model",
    ),
    "not a number": (
        lambda metadata, tensors: tensors.update({"output_norm.weight": (F32, (128,), floats([np.nan] * 128))}),
        "output_norm.weight holds NaN or infinity",
    ),
    "not a number in the embedding": (
        lambda metadata, tensors: tensors.update({"token_embd.weight": (F32, (260, 128), floats([np.nan] * 33280))}),
        "token_embd.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    change, reason = REFUSED[case]
    path = write(tmp_path / "m.gguf", change=change)
    with pytest.raises((CheckpointError, ConfigError), match=reason) as caught:
        convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_notes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", change=set_keys(llama__mood="\x1b[1m", llama__nothing=0, other__key=1))
    assert convert(path, tmp_path / "out").notes == ["unknown keys, without effect here: llama.mood = '\\x1b[1m'"]


def test_int8_rows(tmp_path: Path) -> None:
    convert(write(tmp_path / "m.gguf"), tmp_path / "out", head="int8")
    packed = open_packed(tmp_path / "out")
    values = np.frombuffer(small_model()[1]["token_embd.weight"][2], "<f4").reshape(VOCAB, HIDDEN)
    read = packed.tensor("embed.weight") * np.asarray(packed.tensor("embed.scale"))[:, None]
    assert np.abs(read - values).max() <= np.abs(values).max() / 254 + 1e-6


def test_an_embedding_of_type_i2s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet_numba.checkpoint.convert.ROWS_AT_A_TIME", 100)
    t = np.random.default_rng(1).integers(-1, 2, (VOCAB, HIDDEN))
    path = write(
        tmp_path / "m.gguf",
        change=lambda metadata, tensors: tensors.update({"token_embd.weight": (I2_S, t.shape, i2s(t, 0.5))}),
    )
    convert(path, tmp_path / "out")
    assert np.array_equal(to_float32(np.asarray(open_packed(tmp_path / "out").tensor("embed.weight"))), t * 0.5)


def split(folder: Path, count: int, **changes: Any) -> list[Path]:
    """A small model in several files."""
    metadata, tensors, _ = small_model()
    names, paths = list(tensors), []
    for i in range(count):
        keys = {"split.no": np.uint16(i), "split.count": np.uint16(count), "split.tensors.count": len(names)} | changes
        part = {name: tensors[name] for name in names[i::count]}
        paths.append(folder / f"m-{i + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(gguf(metadata | keys if i == 0 else keys, part))
    return paths


def test_split_files(tmp_path: Path) -> None:
    convert(write(tmp_path / "whole.gguf"), tmp_path / "whole")
    paths = split(tmp_path, 3)
    for i in (0, 2):  # whichever is named
        convert(paths[i], tmp_path / f"from-{i}")
        one, other = open_packed(tmp_path / "whole"), open_packed(tmp_path / f"from-{i}")
        assert all(np.array_equal(one.tensor(name), other.tensor(name)) for name in one.names)


def test_split_files_that_do_not_belong_together(tmp_path: Path) -> None:
    def refused(reason: str, path: Path) -> None:
        with pytest.raises(CheckpointError, match=reason) as caught:
            GgufCheckpoint(path)
        assert "\n" not in str(caught.value)

    first, second, third = split(tmp_path, 3)
    third.unlink()
    refused("m-00003-of-00003.gguf does not exist", first)
    third.write_bytes(second.read_bytes())
    refused("m-00003-of-00003.gguf is not file 3 of 3, as its name says", first)
    _, tensors, _ = small_model()
    keys = {"split.no": np.uint16(2), "split.count": np.uint16(3)}
    third.write_bytes(gguf(keys, {}))
    refused(r"the 3 files hold 14 tensors, not 20", first)
    split(tmp_path, 3, **{"split.tensors.count": 21})
    third.write_bytes(gguf(keys, dict(list(tensors.items())[1::3])))
    refused("tensor .* is in m-00002-of-00003.gguf and in m-00003-of-00003.gguf", first)
    first.rename(tmp_path / "renamed.gguf")
    refused("renamed.gguf is one of 3 files, but not named like NAME-00001-of-00003.gguf", tmp_path / "renamed.gguf")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "m.gguf"))
    assert main([path, str(tmp_path / "out")]) == 0
    assert main([path, str(tmp_path / "arm"), "--i2s-layout", "arm"]) == 0
    one, other = open_packed(tmp_path / "out"), open_packed(tmp_path / "arm")
    assert not np.array_equal(one.tensor("layers.0.o.words"), other.tensor("layers.0.o.words"))
    capsys.readouterr()
    assert main([str(FOLDER / "llama-tq2_0.gguf"), str(tmp_path / "no"), "--i2s-layout", "arm"]) == 2
    assert "has no tensors of type I2_S" in capsys.readouterr().err
    assert main([str(tmp_path / "out"), str(tmp_path / "no"), "--i2s-layout", "x86"]) == 2
    assert "for GGUF files only" in capsys.readouterr().err
    assert main([str(tmp_path / "none.gguf"), str(tmp_path / "no")]) == 2
    assert "none.gguf does not exist" in capsys.readouterr().err
    (tmp_path / "m.gguf").rename(tmp_path / "sha256-0")  # as ollama keeps them
    assert main([str(tmp_path / "sha256-0"), str(tmp_path / "blob")]) == 0


SMALL = gguf(*small_model()[:2])


@given(edits=byte_edits(3))
def test_any_damage_is_an_error_or_another_model(
    edits: list[tuple[float, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(mutate(SMALL, edits, SMALL.index(b"tokenizer.ggml.model")))
    try:
        GgufCheckpoint(path)
    except BitNetError as error:
        assert "\n" not in str(error)
