"""The parts of tools/bench.py that need a GPU, on one whose kernels do nothing: they know the backend from inside."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.packed import open_packed
from tests.backends.simulated import CONFIG, idle_backend
from tools.benchmarks import decode, many_tokens
from tools.make_checkpoint import PRESETS, make_checkpoint


@pytest.fixture(params=["tiny", "bonsai-1.7b"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of one layer; Bonsai's has a launch more in each, the norm of heads."""
    weight_format, raw = PRESETS[request.param]
    changes = CONFIG | {"max_position_embeddings": 1024, "hidden_size": 128}
    make_checkpoint(tmp_path / "source", raw | changes, weight_format, seed=2)
    convert(tmp_path / "source", tmp_path / "packed")
    return tmp_path / "packed"


def test_a_decode_step_is_measured_whole(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of a step has a name, in the order of the step."""
    context = idle_backend(monkeypatch, open_packed(packed)).new_context(64)
    for long in (False, True):
        named = decode.named_launches(context, long)
        found = [launch.name for launch in chain.from_iterable(named.values())]
        assert found == [launch.name for launch in context._steps.decode(long)]


def test_decode(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_packed(packed)
    backend = idle_backend(monkeypatch, checkpoint)
    monkeypatch.setattr(decode, "usable_device", lambda: backend.device)
    monkeypatch.setattr(decode, "CONTEXTS", (128, 640))
    monkeypatch.setattr(decode, "PROMPTS", ())  # whose answers no kernel computes
    figures = decode.measure_decode({checkpoint.head: packed}, 4000.0)[checkpoint.head]
    assert [row["context"] for row in figures["steps"]] == [128, 640]
    assert all(row["us"] == 500.0 / 60 for row in figures["steps"]), "60 steps between two events"
    assert figures["kernels_us"][640].keys() >= {"embed", *decode.LAYER, "lm_head", "sampler"}


def test_batches(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = idle_backend(monkeypatch, open_packed(packed))
    monkeypatch.setattr(many_tokens, "BATCHES", (1, 3))
    monkeypatch.setattr(many_tokens, "MIXED", [40, 300])
    monkeypatch.setattr(many_tokens, "CONTEXT", 40)
    rows = many_tokens.measure_batch(backend)
    assert [row["sequences"] for row in rows] == [1, 3] and rows[0]["device_us"] == 500.0 / (many_tokens.STEPS - 1)
    assert many_tokens.measure_mixed(backend)["contexts"] == [40, 300]


def test_products(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = idle_backend(monkeypatch, open_packed(packed)).device
    monkeypatch.setattr(many_tokens, "usable_device", lambda: device)
    monkeypatch.setattr(many_tokens, "cublas_products", lambda l2_bytes: {(64, 128, 8): 1.0})
    monkeypatch.setattr(many_tokens, "SHAPES", [(64, 128)])
    rows = many_tokens.measure_products()
    assert [row["M"] for row in rows] == list(many_tokens.TOKENS)
    assert [row["cublas_bf16_us"] for row in rows] == [1.0, None, None, None]
