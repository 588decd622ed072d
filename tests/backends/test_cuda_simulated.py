"""The whole decode step without a GPU: the backend's own host code over the simulator.

What is checked is what single-kernel tests cannot see: which buffer goes where, in which order, and that a context
survives cuts. The model is tiny, since a simulated step takes seconds.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from tests.backends.simulated import CONFIG, idle_backend, simulated_backend
from tests.kernels.harness import simulated

# How far logits may be from the reference's, in units of their standard deviation: an activation may flip.
SPREADS: dict[KVDtype, float] = {"float16": 0.2, "bfloat16": 0.3, "float8": 1.0, "float32": 0.2}


def test_a_context_that_was_refused_takes_no_memory(monkeypatch: pytest.MonkeyPatch, tiny_packed: Path) -> None:
    """The driver may refuse what seemed to fit. No launch runs."""
    from bitnet_numba.checkpoint.packed import open_packed

    cuda = idle_backend(monkeypatch, open_packed(tiny_packed))
    memory = cuda.device.memory
    memory.fails_after = 2
    with pytest.raises(BackendError, match="OUT_OF_MEMORY"):
        cuda.new_context(16)
    assert cuda.memory()["kv_cache"] == 0
    memory.fails_after = None
    context = cuda.new_context(16)
    assert cuda.memory()["kv_cache"] > 0
    context.close()
    assert cuda.memory()["kv_cache"] == 0


def logits_of_two_tokens(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Any, kv_dtype: KVDtype = DEFAULT
) -> tuple[Any, np.ndarray, np.ndarray]:
    """A simulated context that has two tokens; its logits, float32 [2, vocab], and those of the reference."""
    from bitnet_numba.backends.reference import reference_backend

    context = simulated_backend(monkeypatch, checkpoint, kv_dtype).new_context(16)
    expected = reference_backend(checkpoint).new_context(16).logits([5, 250])
    logits = context.logits([5, 250])
    # Only the first token's cache is read, so rounding of keys and values stays small.
    assert np.abs(logits - expected).max() < SPREADS[kv_dtype] * expected.std()
    return context, logits, expected


@simulated
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8", "float32"])
def test_simulated_types_of_keys_and_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kv_dtype: KVDtype) -> None:
    """A prompt's pass, a step, and a batch's step, which gives the token that the context gives."""
    from bitnet_numba.checkpoint.convert import convert
    from bitnet_numba.checkpoint.packed import open_packed
    from bitnet_numba.kernels.attention import paged_decode
    from bitnet_numba.kernels.sampling import batched
    from bitnet_numba.sampling import SamplingParams
    from tools.make_checkpoint import PRESETS, make_checkpoint

    spec, config = PRESETS["tiny"]
    make_checkpoint(tmp_path / "source", config | CONFIG, spec, seed=2)
    convert(tmp_path / "source", tmp_path / "packed", head="bf16")
    monkeypatch.setattr(paged_decode, "threads_for", lambda *arguments: 64)
    monkeypatch.setattr(batched, "spec", partial(batched.spec, threads=64))
    context, _, expected = logits_of_two_tokens(monkeypatch, open_packed(tmp_path / "packed"), kv_dtype)
    context.truncate(1)
    step = context.logits([250])
    assert np.abs(step - expected[1]).max() < SPREADS[kv_dtype] * expected.std()
    backend = simulated_backend(monkeypatch, open_packed(tmp_path / "packed"), kv_dtype)
    batch = backend.new_batch(1, 16)
    batch.start(0, [5], SamplingParams(), [0], 0)
    batch.prefill([(0, 1)])
    ((_, first),) = batch.collect()
    batch.step([0])
    ((_, second),) = batch.collect()
    batch.close()
    context.truncate(0)
    steps = context.decode([5], SamplingParams())
    assert [next(steps), next(steps)] == [first, second]
    steps.close()


@simulated
def test_simulated_values_that_float16_cannot_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make every logit NaN, in a model without a norm before the product after attention, too."""
    from bitnet_numba.checkpoint.packed import open_packed
    from bitnet_numba.sampling import SamplingParams
    from tests.backends.test_cuda import make_large_attention

    make_large_attention(tmp_path / "packed", "tiny-llama", "v_proj", CONFIG)
    context = simulated_backend(monkeypatch, open_packed(tmp_path / "packed"), "float16").new_context(16)
    assert np.isnan(context.logits([5, 6])).all()
    context.truncate(0)
    assert np.isnan(context.logits([5])).all()
    context.truncate(0)
    steps = context.decode([5], SamplingParams())
    with pytest.raises(ValueError, match="beyond 65504, the largest float16: kv_dtype bfloat16 holds it"):
        next(steps)
    steps.close()


@simulated
def test_simulated_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bitnet_numba.checkpoint.convert import convert
    from bitnet_numba.checkpoint.packed import open_packed
    from bitnet_numba.sampling import SamplingParams, sample
    from tools.make_checkpoint import PRESETS, make_checkpoint

    spec, config = PRESETS["tiny"]
    make_checkpoint(tmp_path / "source", config | CONFIG, spec, seed=2)
    convert(tmp_path / "source", tmp_path / "packed", head="int8")
    checkpoint = open_packed(tmp_path / "packed")
    context, logits, _ = logits_of_two_tokens(monkeypatch, checkpoint)

    context.truncate(1)
    params = SamplingParams(repetition_penalty=1.5)
    steps = context.decode([250], params)
    token = next(steps)
    steps.close()
    assert token == sample(logits[-1], [5, 250], params)
    assert context.ids == [5, 250, token]


@simulated
@pytest.mark.parametrize(
    ("file", "head", "planes"),
    [
        ("qwen3-q2_0.gguf", "bf16", 1),
        ("qwen3-q2_0.gguf", "source", 1),
        ("trilm-tq1_0.gguf", "bf16", 1),
        ("qwen3-q2_0.gguf", "source", 2),
    ],
)
def test_simulated_group_scales(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, head: Any, planes: int
) -> None:
    """A prompt's pass, a step and a batch of models with group scales; in Qwen3's block queries and keys are normed."""
    from dataclasses import replace

    from bitnet_numba.checkpoint.convert import convert
    from bitnet_numba.checkpoint.packed import open_packed
    from tests.conftest import GOLDEN

    convert(GOLDEN / "groups" / file, tmp_path / "packed", head=head)
    checkpoint = open_packed(tmp_path / "packed")
    assert checkpoint.embed == ("ternary" if head == "source" else "bf16")
    checkpoint = replace(
        checkpoint, config=replace(checkpoint.config, num_layers=1, max_context=16, activation_planes=planes)
    )
    context, _, expected = logits_of_two_tokens(monkeypatch, checkpoint)
    context.truncate(1)
    assert np.abs(context.logits([250]) - expected[1]).max() < (0.2 if planes == 1 else 0.01) * expected.std()


@simulated
def test_simulated_numbers_beyond_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scores of attention that overflow, in a model without sub-norms, whose sums of squares would show it: no
    token comes of them, alone, after a prompt or in a batch."""
    from bitnet_numba.backends.protocol import NO_TOKEN
    from bitnet_numba.backends.reference import reference_backend
    from bitnet_numba.checkpoint.convert import convert
    from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
    from bitnet_numba.kernels.attention import paged_decode
    from bitnet_numba.kernels.sampling import batched
    from bitnet_numba.sampling import SamplingParams
    from tools.make_checkpoint import PRESETS, make_checkpoint

    tensor = PackedCheckpoint.tensor

    def spoilt(self: PackedCheckpoint, name: str) -> np.ndarray:
        values = tensor(self, name)
        return values * np.float32(1e25) if name.endswith("input_norm.weight") else values

    spec, config = PRESETS["tiny-llama"]
    make_checkpoint(tmp_path / "source", config | CONFIG, spec, seed=4)
    convert(tmp_path / "source", tmp_path / "packed", head="bf16")
    checkpoint = open_packed(tmp_path / "packed")
    monkeypatch.setattr(PackedCheckpoint, "tensor", spoilt)
    with np.errstate(all="ignore"):
        expected = reference_backend(checkpoint).new_context(16).logits([5, 250])
    assert np.isnan(expected).all()
    backend = simulated_backend(monkeypatch, checkpoint)
    monkeypatch.setattr(paged_decode, "threads_for", lambda *arguments: 64)
    monkeypatch.setattr(batched, "spec", partial(batched.spec, threads=64))
    for ids in ([5], [5, 250]):
        context = backend.new_context(16)
        assert np.isnan(context.logits(ids)).all()
        context.truncate(0)
        with pytest.raises(ValueError, match="logits hold NaN or infinity"):
            next(context.decode(ids, SamplingParams()))
    batch = backend.new_batch(1, 16)
    batch.start(0, [5, 250], SamplingParams(), [0], 0)
    batch.prefill([(0, 2)])
    assert batch.collect() == [(0, NO_TOKEN)]
    error = batch.failure(0)
    assert isinstance(error, BackendError) and "NaN or infinity" in str(error)


@simulated
def test_simulated_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two sequences, whose pages are in arbitrary order, get the tokens that each would get alone."""
    from bitnet_numba.checkpoint.convert import convert
    from bitnet_numba.checkpoint.packed import open_packed
    from bitnet_numba.kernels.attention import paged_decode
    from bitnet_numba.kernels.sampling import batched, single
    from bitnet_numba.sampling import SamplingParams
    from tools.make_checkpoint import PRESETS, make_checkpoint

    spec, config = PRESETS["tiny"]
    make_checkpoint(tmp_path / "source", config | CONFIG, spec, seed=3)
    convert(tmp_path / "source", tmp_path / "packed", head="bf16")
    backend = simulated_backend(monkeypatch, open_packed(tmp_path / "packed"))
    monkeypatch.setattr(paged_decode, "threads_for", lambda *arguments: 64)
    monkeypatch.setattr(batched, "spec", partial(batched.spec, threads=64))
    params = SamplingParams(0.8, seed=5)
    tokens = []
    for prompts, pages in (([[5, 250], [7]], [[1], [0]]), ([[7]], [[0]])):
        batch = backend.new_batch(len(prompts), 16)
        for slot, ids in enumerate(prompts):
            batch.start(slot, ids, params, pages[slot], 0)
        batch.prefill([(slot, len(ids)) for slot, ids in enumerate(prompts)])
        batch.step(list(range(len(prompts))))
        tokens.append([batch.collect() for _ in range(2)])
        if len(prompts) == 1:  # taken up again with the token that is known of the answer, which a step feeds
            ((_, answer),), ((_, second),) = tokens[-1]
            batch.start(0, [7, answer], params, pages[0], 1, 1)
            batch.step([0])
            assert batch.collect() == [(0, second)]
        batch.close()
    batch = backend.new_batch(1, 130)
    batch.start(0, [5], params, [2], 0)
    batch.extend(0, [0])
    batch.extend(0, [1])
    assert batch._state.block_table.read().tolist()[:3] == [2, 0, 1]
    with pytest.raises(ValueError, match="slot 0 has 3 pages: 1 more are beyond its capacity"):
        batch.extend(0, [3])
    batch.close()
    together, alone = tokens
    assert [results[1] for results in together] == [(1, results[0][1]) for results in alone]

    for max_blocks in (1, 0):  # 0: as on a card of too few SMs for a sampler of one sequence
        monkeypatch.setattr(single, "MAX_BLOCKS", max_blocks)
        context = backend.new_context(16)
        steps = context.decode([5, 250], params)
        assert [next(steps), next(steps)] == [results[0][1] for results in together]
        steps.close()


@simulated
def test_simulated_batch_that_was_prepared_captures_nothing_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever sizes its calls have; no kernel runs here."""
    from bitnet_numba.checkpoint.convert import convert
    from bitnet_numba.checkpoint.packed import open_packed
    from bitnet_numba.kernels.runtime import driver
    from bitnet_numba.sampling import SamplingParams
    from tools.make_checkpoint import PRESETS, make_checkpoint

    spec, config = PRESETS["tiny"]
    make_checkpoint(tmp_path / "source", config | CONFIG, spec, seed=3)
    convert(tmp_path / "source", tmp_path / "packed", head="bf16")
    backend = simulated_backend(monkeypatch, open_packed(tmp_path / "packed"))
    captured = 0

    class Graph:
        def replay(self, stream: Any) -> None:
            pass

        def close(self) -> None:
            pass

    def capture(self: Any, launches: Any) -> Graph:
        nonlocal captured
        captured += 1
        return Graph()

    monkeypatch.setattr(driver.Stream, "capture", capture)
    batch = backend.new_batch(5, 1100)
    assert captured == 0
    pieces = 0
    while batch.prepare():
        pieces += 1
        assert captured == pieces, "each call captures one graph"
    # Passes over prompts of 2 to 2048 rows, 480 and 3072; for 1, 2, 4 and 8 sequences the sampler after prompts and
    # steps whose contexts take one, two or four blocks each (at most three are needed).
    assert pieces == len(range(1, 12)) + 2 + 4 * (1 + 3)
    assert not batch.prepare()

    lengths = [1, 30, 700, 1090, 64]
    for slot, length in enumerate(lengths):
        batch.start(slot, [5] * length, SamplingParams(seed=1), range(18 * slot, 18 * (slot + 1)), 0)
        batch.prefill([(slot, length)])
        batch.collect()
        batch.step(range(slot + 1))
        batch.collect()
    for slots in ([2], [3], [2, 3], [0, 1, 2, 3], [1, 3, 4]):
        batch.step(slots)
        batch.collect()
    batch.start(0, [5] * 3, SamplingParams(seed=1), [0], 0)
    batch.start(1, [5] * 9, SamplingParams(seed=1), [18], 0)
    batch.prefill([(0, 3), (1, 9)])
    batch.collect()
    assert captured == pieces
    batch.close()
