"""Embeddings: against what transformers computed, the arguments of `embed`, the command and the server."""

import base64
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bitnet_numba as bn
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.checkpoint.safetensors_file import TensorSpec, write_tensors
from bitnet_numba.cli.embed import run
from bitnet_numba.config import GROUPS
from bitnet_numba.engine.embedding import batches
from bitnet_numba.quantize import ternarize
from tests.conftest import GOLDEN
from tests.server.helpers import serving

FORMS = {"embedding": "embedding/i2_s.gguf", "embedding-gemma": "embedding-gemma"}
PROMPTS = range(4)


def packed_model(form: str, folder: Path) -> Path:
    """The model of one of FORMS."""
    convert(GOLDEN / FORMS[form], folder / "packed")
    return folder / "packed"


def check_golden(engine: bn.Engine, form: str) -> None:
    """Compares with transformers: cosines of 0.9999 and more on average. Without flips they are 1 to float32's
    precision. An int8 value that lies at a border and is rounded the other way turns a vector by about 0.01, whose
    cosine is 0.99995; where three of a text's 100,000 are, it may be 0.9998. Keys and values in bfloat16 would leave
    0.9994."""
    with np.load(GOLDEN / form / "golden.npz") as golden:
        found = engine.embed([golden[f"prompt_{i}"].tolist() for i in PROMPTS])
        assert found.shape == (4, 256) and found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
        cosines = [vector @ golden[f"embedding_{i}"] for i, vector in zip(PROMPTS, found, strict=True)]
        assert np.mean(cosines) > 0.9999 and min(cosines) > 0.9998


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model("embedding", tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def packed_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model("embedding-gemma", tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def llm(packed: Path) -> Iterator[bn.Engine]:
    with bn.load(packed, backend="cpu", threads=1) as engine:
        yield engine


@pytest.mark.golden
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_vectors_are_those_of_transformers(packed: Path, packed_gemma: Path, form: str, backend: str) -> None:
    with bn.load(packed if form == "embedding" else packed_gemma, backend=backend) as engine:
        check_golden(engine, form)


def test_texts_end_with_the_token_that_sums_them_up(llm: bn.Engine) -> None:
    end = llm.tokenizer.encode("<|endoftext|>")
    ids = [[*llm.tokenizer.encode(text), *end] for text in ("query: a fox", "query: ")]
    assert np.array_equal(llm.embed(["a fox", ""], prompt="query: "), llm.embed(ids))


def test_dimensions_are_the_first_at_length_1(llm: bn.Engine) -> None:
    whole, few = llm.embed(["a fox"]), llm.embed(["a fox"], 8)
    np.testing.assert_allclose(few, whole[:, :8] / np.linalg.norm(whole[:, :8]), rtol=1e-5)
    assert llm.embed([]).shape == (0, 256)


def test_wrong_arguments(llm: bn.Engine) -> None:
    for texts, message in (
        ("a fox", "embed takes a list of texts"),
        ([3], "text 0: it must be a text or a list of token ids, not 3"),
        (["a", [300]], "text 1: token id 300 is not in the vocabulary"),
        ([[]], "text 0: the prompt is empty"),
    ):
        with pytest.raises(bn.RequestError, match=message):
            llm.embed(texts)  # type: ignore[arg-type]
    with pytest.raises(bn.ContextFull, match="text 0: it has 257 tokens, but the context holds 256"):
        llm.embed([[1] * 257])
    for dimensions in (0, 257, 1.5):
        with pytest.raises(bn.RequestError, match="dimensions must be"):
            llm.embed(["a"], dimensions)  # type: ignore[arg-type]


def test_an_embedding_model_generates_nothing(llm: bn.Engine) -> None:
    for call in (llm.generate, llm.chat, llm.stream, llm.score, lambda text: llm.logits([1]), lambda _: llm.session()):
        with pytest.raises(bn.RequestError, match="embedding model, which generates nothing"):
            call("a fox")
    with bn.load(backend="reference") as other, pytest.raises(bn.RequestError, match="no embedding model"):
        other.embed(["a fox"])


def test_a_folder_of_masters(packed: Path, tmp_path: Path) -> None:
    """Names have no `model.` there, and norms are beside their linears."""
    raw = json.loads((packed / "config.json").read_text())
    del raw["bitnet_numba"], raw["quantization_config"], raw["tie_word_embeddings"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(packed / name, source)
    config = open_packed(packed).config
    shapes = {"embed_tokens": (config.vocab_size, config.hidden_size), "norm": (config.hidden_size,)}
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{name}": (256,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"layers.{i}.self_attn.{name}": (64,) for name in ("q_norm", "k_norm")}
        for group, modules in GROUPS.items():
            segments, K = config.group_shape(group)
            for module, N in zip(modules, segments, strict=True):
                shapes |= {f"layers.{i}.{module}": (N, K), f"layers.{i}.{module}.norm": (K,)}
    rng = np.random.default_rng(1)
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    with open(source / "model.safetensors", "wb") as file:
        write_tensors(file, {name: TensorSpec("F32", of.shape) for name, of in tensors.items()}, tensors.items(), {})
    convert(source, tmp_path / "packed")
    found = open_packed(tmp_path / "packed")
    assert found.config.embeds and found.config.linear_norm and found.config.tied
    assert found.config.linear_norm_eps == config.rms_norm_eps == config.linear_norm_eps
    t, m = ternarize(tensors["layers.1.mlp.up_proj.weight"])
    assert np.array_equal(found.ternary("layers.1.gate_up.words", 512, 256)[256:], t)
    assert found.tensor("layers.1.gate_up.scales")[1] == m
    assert np.array_equal(found.tensor("layers.1.qkv.norms")[2], tensors["layers.1.self_attn.v_proj.norm.weight"])


def test_the_command(
    packed: Path, llm: bn.Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a fox\n\nthe owl\n")))
    options = ["--backend", "cpu", "--threads", "1", "--dimensions", "4"]
    assert run([str(packed), *options, "--prompt", "query: "]) == 0
    out, err = capsys.readouterr()
    expected = llm.embed(["a fox", "", "the owl"], 4, prompt="query: ")
    assert [json.loads(line) for line in out.splitlines()] == expected.tolist() and err == ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n" + b"a" * 9999)))
    assert run([str(packed), *options]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "line 2 is too long: " in err and err.count("\n") == 1


def test_the_server(packed: Path, llm: bn.Engine) -> None:
    with serving(lambda: bn.load(packed, backend="cpu", threads=1)) as server:
        body = {"input": ["a fox", "the owl"], "dimensions": 16}
        content = server.post("/v1/embeddings", body).json()
        expected = llm.embed(["a fox", "the owl"], 16)
        assert [each["embedding"] for each in content["data"]] == expected.tolist()
        assert content["usage"]["prompt_tokens"] == content["usage"]["total_tokens"] > 4
        one = server.post("/v1/embeddings", {"input": "a fox", "dimensions": 16, "encoding_format": "base64"}).json()
        assert base64.b64decode(one["data"][0]["embedding"]) == expected[0].astype("<f4").tobytes()
        for wrong, message in (
            ({"input": "a", "dimensions": 0}, "dimensions must be between 1 and 256"),
            ({"input": [[300]]}, "text 0: token id 300 is not in the vocabulary of 300"),
            ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ):
            response = server.post("/v1/embeddings", wrong)
            assert response.status_code == 400 and message in response.json()["error"]["message"]
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 400 and "/v1/embeddings" in response.json()["error"]["message"]
        assert server.client.get("/health").json()["status"] == "ok"
        (found,) = server.client.get("/v1/models").json()["data"]
        assert found["dimensions"] == 256 and "sampling" not in found


def test_a_server_of_another_model_refuses() -> None:
    with serving(lambda: bn.load(backend="reference")) as server:
        (found,) = server.client.get("/v1/models").json()["data"]
        assert "sampling" in found and "dimensions" not in found
        response = server.post("/v1/embeddings", {"input": "a"})
        assert response.status_code == 400 and "no embedding model" in response.json()["error"]["message"]


def test_which_texts_are_computed_together() -> None:
    texts = [[1] * count for count in (1500, 500, 49, 2048, 5000, 1, 2)]
    parts = list(batches(texts))
    assert [list(range(7))[part] for part in parts] == [[0, 1], [2], [3], [4], [5, 6]]
    assert list(batches([])) == []
