"""GGUF files as models: files of bitnet.cpp and llama.cpp against the Hugging Face folders that they were made of, and
small written ones for what these do not have."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.gguf import GgufCheckpoint, unpermute
from bitnet_numba.checkpoint.gguf_types import BF16, F16, F32, I2_S
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.config import ModelConfig
from bitnet_numba.config_rope import RopeScaling
from bitnet_numba.reference.model import Cache, Model
from bitnet_numba.text.tokenizer import Tokenizer
from tests.conftest import GOLDEN
from tests.gguf_writer import HIDDEN, LAYERS, LINEARS, VOCAB, Tensors, floats, i2s, set_keys, small_model, write
from tools.convert import main

FOLDER = GOLDEN / "gguf"
RECORDED: dict[str, Any] = json.loads((FOLDER / "recorded.json").read_text())
FILES = ("bitnet-silu-tq1_0", "bitnet-relu2-i2_s", "llama-tq2_0")


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
    assert scaling("three", llama__rope__scaling__factor=4.0) == RopeScaling("linear", 4.0), "linear by default"
    assert scaling("four", llama__rope__scale_linear=2.5) == RopeScaling("linear", 2.5)
    assert scaling("five", llama__rope__scaling__type="none", llama__rope__scaling__factor=4.0) is None

    def ones(metadata: dict[str, Any], tensors: Tensors) -> None:
        tensors["rope_freqs.weight"] = (F32, (16,), floats(np.ones(16)))

    checkpoint = GgufCheckpoint(write(tmp_path / "ones", change=ones))
    assert checkpoint.config.rope_scaling is None


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
    monkeypatch.setattr("bitnet_numba.checkpoint.rows.ROWS_AT_A_TIME", 100)
    t = np.random.default_rng(1).integers(-1, 2, (VOCAB, HIDDEN))
    path = write(
        tmp_path / "m.gguf",
        change=lambda metadata, tensors: tensors.update({"token_embd.weight": (I2_S, t.shape, i2s(t, 0.5))}),
    )
    convert(path, tmp_path / "out")
    assert np.array_equal(to_float32(np.asarray(open_packed(tmp_path / "out").tensor("embed.weight"))), t * 0.5)


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
