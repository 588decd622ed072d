"""Prompts in passes and batches on the GPU: against the reference, and against themselves cut otherwise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet_numba
from bitnet_numba.backends.protocol import NO_TOKEN, Batch
from bitnet_numba.backends.reference import reference_backend
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.engine.loading import DEMO
from bitnet_numba.errors import BackendError
from bitnet_numba.sampling import SamplingParams
from tests.backends.test_cuda import GREEDY, check_close, one_by_one, random_ids
from tests.checkpoint.test_group_scales import FOLDER as GROUPS
from tests.kernels.harness import needs_gpu
from tools.make_checkpoint import PRESETS, make_checkpoint


def backend_of(checkpoint: PackedCheckpoint) -> Any:
    from bitnet_numba.backends.cuda.backend import CudaBackend

    return CudaBackend(checkpoint)


def params_of(seed: int) -> SamplingParams:
    """Greedy for even seeds, else all of sampling."""
    return GREEDY if seed % 2 == 0 else SamplingParams(1.0, 0.95, 50, 0.01, 1.1, seed)


def answer(
    batch: Batch, prompts: dict[int, list[int]], count: int, pages: dict[int, list[int]]
) -> dict[int, list[int]]:
    """The first `count` tokens of each slot's answer, all decoding together, a step ahead of what is collected."""
    tokens: dict[int, list[int]] = {slot: [] for slot in prompts}
    for slot, ids in prompts.items():
        batch.start(slot, ids, params_of(len(ids)), pages[slot], 0)
    batch.prefill([(slot, len(ids)) for slot, ids in prompts.items()])
    for _ in range(count - 1):
        batch.step(list(prompts))
        collect(batch, tokens, 1)
    collect(batch, tokens, 1)
    return tokens


def collect(batch: Batch, tokens: dict[int, list[int]], calls: int) -> None:
    """Adds the results of so many calls to each slot's tokens."""
    for _ in range(calls):
        for slot, token in batch.collect():
            tokens[slot].append(token)


@needs_gpu
def test_prompts_cut_anyhow_give_the_same_bits(demo: PackedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet_numba.backends.cuda import context as cuda_context
    from bitnet_numba.backends.cuda import prompts

    ids = random_ids(demo, 300, 1)
    whole = backend_of(demo).new_context(300).logits(ids)
    monkeypatch.setattr(cuda_context, "MAX_SCORED", 23)
    monkeypatch.setattr(prompts, "MAX_TOKENS", 32)
    cut = backend_of(demo).new_context(300)
    rng, start, parts = np.random.default_rng(2), 0, []
    while start < len(ids):
        count = int(rng.integers(2, 60))
        if start + count >= len(ids) - 1:
            count = len(ids) - start
        parts.append(cut.logits(ids[start : start + count]))
        start += count
    assert np.concatenate(parts).tobytes() == whole.tobytes()


@needs_gpu
def test_a_prompt_agrees_with_its_tokens_one_by_one(demo: PackedCheckpoint) -> None:
    ids = random_ids(demo, 200, 3)
    context = backend_of(demo).new_context(200)
    together = context.logits(ids)
    context.truncate(0)
    check_close(together, one_by_one(context, ids), 0.8, 0.12)


@needs_gpu
def test_company_changes_nothing(demo: PackedCheckpoint) -> None:
    """The same tokens alone and in company, whatever the slot, the pages and the neighbours."""
    backend, rng = backend_of(demo), np.random.default_rng(4)
    prompts = {slot: random_ids(demo, int(rng.integers(1, 150)), slot) for slot in range(23)}
    batch = backend.new_batch(23, 300)
    deck = rng.permutation(batch.num_pages).tolist()
    pages = {slot: [deck.pop() for _ in range(4)] for slot in prompts}
    together = answer(batch, prompts, 60, pages)
    batch.close()
    for slot in (0, 1, 7, 22):
        alone = backend.new_batch(1, 300)
        assert answer(alone, {0: prompts[slot]}, 60, {0: [3, 1, 0, 2]})[0] == together[slot]
        alone.close()


@needs_gpu
def test_a_batch_that_was_prepared_answers_as_any(demo: PackedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """It captures nothing more, and knows how long its calls take."""
    from bitnet_numba.kernels.runtime.driver import Stream

    prompts = {slot: random_ids(demo, 20 + 30 * slot, slot) for slot in range(3)}
    pages = {slot: list(range(5 * slot, 5 * slot + 5)) for slot in prompts}
    plain = backend_of(demo).new_batch(3, 300)
    expected = answer(plain, prompts, 20, pages)
    batch = backend_of(demo).new_batch(3, 300)
    assert batch.times() == (0, 0.0, 0.0)
    while batch.prepare():
        pass
    monkeypatch.setattr(Stream, "capture", lambda self, launches: pytest.fail("captured again"))
    assert answer(batch, prompts, 20, pages) == expected
    times = batch.times()
    unit = batch.granularity
    assert times.prefill_tokens == sum(-(-count // unit) * unit for count in (20, 50, 80))
    assert 0 < times.prefill_seconds < 1 and 0 < times.step_seconds < 1
    batch.close()
    plain.close()


@needs_gpu
def test_hundreds_of_sequences_answer_as_one_does(demo: PackedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 256, whose steps are no powers of two; some contexts are shared out among two blocks. Nothing is
    captured that was not prepared."""
    from bitnet_numba.kernels.runtime.driver import Stream

    size, capacity, asked = 330, 700, (0, 1, 200, 329)
    prompts = {slot: random_ids(demo, 600 if slot % 50 == 1 else 1 + slot % 60, slot) for slot in range(size)}
    alone = backend_of(demo).new_batch(1, capacity)
    expected = {slot: answer(alone, {0: prompts[slot]}, 9, {0: list(range(10))})[0] for slot in asked}
    alone.close()
    batch = backend_of(demo).new_batch(size, capacity)
    while batch.prepare():
        pass
    monkeypatch.setattr(Stream, "capture", lambda self, launches: pytest.fail("captured again"))
    together = answer(batch, prompts, 9, {slot: list(range(10 * slot, 10 * slot + 10)) for slot in range(size)})
    assert {slot: together[slot] for slot in asked} == expected
    batch.close()


@needs_gpu
@pytest.mark.long
def test_company_changes_nothing_with_group_scales(tmp_path: Path) -> None:
    """Batches of every size of tile, against one sequence alone."""
    convert(GROUPS / "qwen3-q2_0.gguf", tmp_path / "packed", head="bf16")
    backend = backend_of(open_packed(tmp_path / "packed"))
    prompts = {slot: np.random.default_rng(slot).integers(0, 260, 3 + slot % 7).tolist() for slot in range(70)}
    alone = backend.new_batch(1, 64)
    expected = {slot: answer(alone, {0: prompts[slot]}, 12, {0: [0]})[0] for slot in (0, 1, 6)}
    alone.close()
    for size in (7, 16, 30, 64, 70):
        batch = backend.new_batch(size, 64)
        together = answer(batch, {s: prompts[s] for s in range(size)}, 12, {s: [size - 1 - s] for s in range(size)})
        batch.close()
        for slot, tokens in expected.items():
            assert together[slot] == tokens, (size, slot)


@needs_gpu
def test_a_shared_beginning_is_computed_once(demo: PackedCheckpoint) -> None:
    backend = backend_of(demo)
    batch = backend.new_batch(2, 300)
    ids = random_ids(demo, 150, 5)
    expected = answer(batch, {0: ids}, 20, {0: [4, 2, 0, 7]})[0]
    batch.start(1, ids, params_of(len(ids)), [4, 2, 1, 3], 128)
    batch.prefill([(1, 22)])
    tokens: dict[int, list[int]] = {1: []}
    collect(batch, tokens, 1)
    for _ in range(19):
        batch.step([1])
        collect(batch, tokens, 1)
    assert tokens[1] == expected
    batch.close()


@needs_gpu
def test_numbers_that_are_none_stay_with_their_sequence(demo: PackedCheckpoint) -> None:
    """NaN in one sequence's cache ends that one; its pages serve another afterwards."""
    from bitnet_numba.kernels.runtime.memory import DeviceView

    backend = backend_of(demo)
    batch = backend.new_batch(2, 200)
    prompts = {0: random_ids(demo, 70, 6), 1: random_ids(demo, 71, 7)}
    pages = {0: [0, 2, 4], 1: [1, 3, 5]}
    expected = answer(batch, prompts, 10, pages)
    for slot, ids in prompts.items():
        batch.start(slot, ids, params_of(len(ids)), pages[slot], 0)
        batch.prefill([(slot, len(ids))])
        batch.collect()
    backend.stream.synchronize()
    state = batch._state
    keys = state.layer_cache(0).keys
    for page in pages[0]:
        whole = DeviceView(keys.address + 4 * page * state.page_words, state.page_words, np.int32)
        whole.write(np.full(state.page_words, -1, np.int32))
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(9):
        batch.step([0, 1])
        collect(batch, tokens, 1)
    assert tokens[0][0] == NO_TOKEN
    assert tokens[1] == expected[1][1:]
    assert answer(batch, prompts, 10, {0: pages[1], 1: pages[0]}) == expected
    batch.close()


@needs_gpu
def test_batches_agree_with_the_reference(tmp_path: Path) -> None:
    """Each token is the reference's choice given those before it, or as good as; for a model of other sizes, too."""
    spec, config = PRESETS["tiny-llama"]
    make_checkpoint(tmp_path / "source", config | {"head_dim": 256, "attention_bias": True}, spec, seed=8)
    convert(tmp_path / "source", tmp_path / "packed", head="int8")
    for checkpoint in (open_packed(DEMO), open_packed(tmp_path / "packed")):
        batch = backend_of(checkpoint).new_batch(3, 120)
        prompts = {slot: random_ids(checkpoint, 10 * (slot + 1), slot) for slot in range(3)}
        for slot, tokens in answer(batch, prompts, 24, {slot: [2 * slot, 2 * slot + 1] for slot in range(3)}).items():
            ids = prompts[slot]
            logits = reference_backend(checkpoint).new_context(120).logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
            behind = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
            assert (behind <= 0.3 * logits.std(axis=1)).mean() > 0.9, (slot, behind / logits.std(axis=1))
        batch.close()


@needs_gpu
def test_generate_batch_of_the_built_in_model() -> None:
    llm = bitnet_numba.load(None)
    assert llm.backend == "cuda"
    chats = [[{"role": "user", "content": f"Tell me a story about a {who}."}] for who in ("fox", "dog", "cat", "owl")]
    params = [SamplingParams(0.8, seed=seed) if seed else GREEDY for seed in range(4)]
    together = llm.generate_batch(chats, params, max_new_tokens=80)
    for chat, one, done in zip(chats, params, together, strict=True):
        assert llm.generate_batch([chat], one, max_new_tokens=80)[0].text == done.text
        assert done.token_ids


@needs_gpu
def test_answers_do_not_depend_on_preemptions() -> None:
    """With few pages, most are taken from those that came last: each still gets the answer that it gets with many."""
    llm = bitnet_numba.load(None)
    assert llm.backend == "cuda"
    chats = [[{"role": "user", "content": f"Tell me a story about a {who}."}] for who in ("fox", "dog", "cat", "owl")]
    answers = []
    for tokens in (None, llm.context):
        with llm.scheduler(4, tokens) as scheduler:
            for seed, chat in enumerate(chats):
                scheduler.add(chat, temperature=0.8, seed=seed, max_new_tokens=llm.context - 64, ignore_eos=True)
            ended = {}
            while scheduler.busy:
                ended |= {update.request: update.completion for update in scheduler.step() if update.completion}
            assert scheduler._runner.pool.free == scheduler._runner.pool.num_pages
            answers.append({number: completion.token_ids for number, completion in ended.items()})
    assert answers[0] == answers[1] and len(answers[0]) == 4


@needs_gpu
def test_too_large_a_batch_says_what_would_fit(demo: PackedCheckpoint) -> None:
    backend = backend_of(demo)
    with pytest.raises(BackendError, match=r"takes .* GB of device memory and .* GB are free: \d+ tokens would fit"):
        backend.new_batch(4, 1000, 1 << 40)
    with pytest.raises(BackendError, match="at most 512 sequences"):
        backend.new_batch(513, 1000)


@needs_gpu
@pytest.mark.alone
def test_a_batch_gives_its_memory_back(demo: PackedCheckpoint) -> None:
    backend = backend_of(demo)
    for turn in range(4):
        batch = backend.new_batch(8, 200)
        answer(
            batch,
            {slot: [1, 2, 3] for slot in range(8)},
            5,
            {slot: list(range(slot * 4, slot * 4 + 4)) for slot in range(8)},
        )
        batch.close()
        if turn == 1:
            free, kept = backend.device.memory_info()[0], backend.memory()["kv_cache"]
    assert backend.memory()["kv_cache"] == kept, "the last batch's is kept for the next"
    assert backend.device.memory_info()[0] >= free - (4 << 20)
    backend.free_idle()
    assert backend.memory()["kv_cache"] == 0
    assert backend.device.memory_info()[0] >= free + kept
