"""Embedding models on CUDA: what transformers computed, many texts in passes, and the whole pass in the simulator."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bitnet_numba as bn
from bitnet_numba.backends.cuda import embedder
from bitnet_numba.backends.cuda.embedder import plan_texts
from bitnet_numba.checkpoint.packed import open_packed
from tests.backends.simulated import SimulatedDevice, idle_device, simulate
from tests.engine.test_embedding import FORMS, check_golden, packed_model
from tests.kernels.harness import needs_gpu, simulated

SIZES = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 48,
    "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, packed_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(3, 290, length).tolist() for length in (1, 16, 17, 130, 5, 250, 31, 32, 33)]


@pytest.fixture
def llm(model: tuple[str, Path]) -> Iterator[bn.Engine]:
    with bn.load(model[1], backend="cuda") as engine:
        yield engine


@needs_gpu
@pytest.mark.golden
def test_vectors_are_those_of_transformers(model: tuple[str, Path], llm: bn.Engine) -> None:
    assert llm.backend == "cuda"
    check_golden(llm, model[0])


@needs_gpu
def test_vectors_are_the_cpus(model: tuple[str, Path], llm: bn.Engine, texts: list[list[int]]) -> None:
    """But for int8 values that are rounded the other way, see `check_golden`."""
    with bn.load(model[1], backend="cpu") as other:
        assert (llm.embed(texts) * other.embed(texts)).sum(axis=1).min() > 0.9995


@needs_gpu
def test_a_vector_does_not_depend_on_other_texts(llm: bn.Engine, texts: list[list[int]]) -> None:
    together = llm.embed(texts)
    assert np.array_equal(together, np.concatenate([llm.embed([ids]) for ids in texts]))
    assert np.array_equal(together[::-1], llm.embed(texts[::-1]))


@needs_gpu
def test_buffers_grow(model: tuple[str, Path], texts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = embedder.CudaEmbedder(open_packed(model[1]))
    expected, before = backend.last_hidden(texts), backend.memory()["activations"]
    monkeypatch.setattr(embedder, "MAX_ROWS", 64)
    backend = embedder.CudaEmbedder(open_packed(model[1]))
    least = backend.memory()["activations"]
    assert np.array_equal(backend.last_hidden(texts), expected)
    assert least < backend.memory()["activations"] < before
    with pytest.raises(bn.BackendError, match="an embedding model generates nothing"):
        backend.new_context(16)
    monkeypatch.setattr(backend._device, "memory_info", lambda: (0, 0))
    with pytest.raises(bn.BackendError, match=r"a text of up to 512 tokens takes 0\.\d\d GB"):
        backend.last_hidden([[1] * 300])
    assert np.array_equal(backend.last_hidden(texts), expected)


def test_what_could_not_grow_is_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the larger buffers memory ends, though the device said that it would do; without any launches."""
    checkpoint = open_packed(packed_model("embedding", tmp_path))
    device = idle_device(monkeypatch)
    memory = device.memory
    monkeypatch.setattr(embedder, "usable_device", lambda: device)
    monkeypatch.setattr(embedder, "load_specs", lambda *arguments, **options: None)
    monkeypatch.setattr(embedder, "MAX_ROWS", 32)
    backend = embedder.CudaEmbedder(checkpoint)
    before = backend.memory()["activations"]
    few, many = [[5, 6, 7]], [[5] * 100]
    backend.last_hidden(few)
    for allocations in range(4):
        memory.fails_after = allocations
        with pytest.raises(bn.BackendError, match="OUT_OF_MEMORY"):
            backend.last_hidden(many)
        assert backend.memory()["activations"] == 0
        if allocations == 1:
            with pytest.raises(bn.BackendError, match="OUT_OF_MEMORY"):
                backend.last_hidden(few)
        memory.fails_after = None
        backend.last_hidden(few)
        assert backend.memory()["activations"] == before
    backend.last_hidden(many)
    assert backend.memory()["activations"] > before


def test_plans() -> None:
    texts = [[1] * 5, [2] * 20, [3] * 40, [4] * 100, [5] * 3]
    passes = list(plan_texts(texts, 64))
    assert [len(each.tokens) for each in passes] == [36, 40, 100, 3]
    assert [each.ends for each in passes] == [[(0, 4), (1, 35)], [(2, 39)], [(3, 99)], [(4, 2)]]
    first = passes[0]
    assert first.text_starts.tolist() == [0] * 5 + [-1] * 11 + [16] * 20
    assert first.tokens.tolist() == [1] * 5 + [0] * 11 + [2] * 20
    assert list(plan_texts([], 64)) == []


@simulated
@pytest.mark.parametrize("name", ["embedding-0.6b", "embedding-270m"])
def test_simulated_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Two texts in one pass of a small model, as the reference has them; Gemma's has a window of two tokens."""
    from bitnet_numba.backends.reference import reference_backend
    from bitnet_numba.checkpoint.convert import convert
    from tools.make_checkpoint import PRESETS, make_checkpoint

    weight_format, config = PRESETS[name]
    sizes = {"num_hidden_layers": 1} | ({"sliding_window": 2, "query_pre_attn_scalar": 32} if "270m" in name else {})
    make_checkpoint(tmp_path / "source", config | SIZES | sizes, weight_format, seed=2)
    convert(tmp_path / "source", tmp_path / "packed")
    checkpoint = open_packed(tmp_path / "packed")
    memory = simulate(monkeypatch)
    monkeypatch.setattr(embedder, "usable_device", lambda: SimulatedDevice(memory))
    monkeypatch.setattr(embedder, "load_specs", lambda *arguments, **options: None)
    monkeypatch.setattr(embedder, "MAX_ROWS", 32)
    texts = [[5, 250, 7, 9], [7]]
    found = embedder.CudaEmbedder(checkpoint).last_hidden(texts)
    expected = reference_backend(checkpoint).last_hidden(texts)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())  # int8 may be rounded otherwise
