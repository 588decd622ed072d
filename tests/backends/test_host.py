"""HostContext with the reference model, and HostBatch against it: the same tokens and the same numbers, bit for bit."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet_numba as bn
from bitnet_numba.backends import host
from bitnet_numba.backends.cpu.backend import CpuPool, cpu_backend
from bitnet_numba.backends.host import HostBackend
from bitnet_numba.backends.host_batch import HostBatch
from bitnet_numba.backends.host_model import PAGE_SIZE, SequenceCache
from bitnet_numba.backends.protocol import NO_TOKEN, Batch
from bitnet_numba.backends.reference import ContiguousCache, ReferencePool, reference_backend
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.engine.batch_runner import BatchRunner
from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import BackendError
from bitnet_numba.reference.model import Rows
from bitnet_numba.sampling import SamplingParams
from tests.engine.toy_backend import TOKENIZER

GREEDY = SamplingParams(seed=0)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, tiny_packed: Path) -> Iterator[HostBackend]:
    make = reference_backend if request.param == "reference" else partial(cpu_backend, threads=2)
    backend = make(open_packed(tiny_packed))
    yield backend
    backend.model.close()


@pytest.fixture(scope="module")
def demo() -> Engine:
    return bn.load(None, backend="reference")


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 500, length).tolist()


def alone(backend: HostBackend, ids: list[int], params: SamplingParams, count: int) -> list[int]:
    decoding = backend.new_context(len(ids) + count).decode(ids, params)
    return [next(decoding) for _ in range(count)]


def test_backend_decodes_greedily(tiny_packed: Path) -> None:
    """Each token is the best of the logits after those before it, and truncation makes the context forget. Compared are
    the same forward calls, which agree to the bit."""
    backend = reference_backend(open_packed(tiny_packed))
    context, other = backend.new_context(40), backend.new_context(40)
    prompt = [5, 6, 7]
    tokens = list(islice(context.decode(prompt, SamplingParams()), 6))
    assert context.ids == prompt + tokens[:-1]
    fed = [prompt, *([token] for token in tokens[:-1])]
    assert [int(other.logits(ids)[-1].argmax()) for ids in fed] == tokens
    fresh = backend.new_context(40)
    fresh.logits(prompt)
    again = []
    for one in (context, fresh):
        one.truncate(2)
        assert one.ids == prompt[:2]
        again.append(list(islice(one.decode([9, 8], SamplingParams()), 6)))
    assert again[0] == again[1]


def test_backend_fills_its_context(tiny_packed: Path) -> None:
    context = reference_backend(open_packed(tiny_packed)).new_context(8)
    tokens = list(context.decode([1, 2, 3], SamplingParams(temperature=1.0, seed=1)))
    assert len(tokens) == 6 and len(context.ids) == 8
    with pytest.raises(ValueError, match="1 tokens do not fit: 8 of 8 are in use"):
        context.logits([1])
    with pytest.raises(ValueError, match="cannot truncate"):
        context.truncate(9)


def test_memory_is_reported(tiny_packed: Path) -> None:
    packed = open_packed(tiny_packed)
    weights = reference_backend(packed).memory()["weights"]
    config = packed.config
    linears = sum(sum(rows) * K for rows, K in map(config.group_shape, ("qkv", "o", "gate_up", "down")))
    assert weights == config.num_layers * linears + 2 * config.vocab_size * config.hidden_size


lengths = st.sampled_from([1, 2, 40, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE, 150])


@given(st.lists(st.tuples(lengths, st.integers(0, 2), st.floats(0, 1.5)), min_size=1, max_size=4), st.data())
@settings(max_examples=15)
def test_in_company_as_alone(backend: HostBackend, asked: list[tuple[int, int, float]], data: st.DataObject) -> None:
    """Prompts in any order and in pieces of any pages, slots and pages in any order, others stepping in between."""
    batch = backend.new_batch(len(asked), 200)
    slots = data.draw(st.permutations(range(len(asked))))
    pages = data.draw(st.permutations(range(batch.num_pages)))
    got: dict[int, list[int]] = {slot: [] for slot in slots}
    rest = {}
    for slot, (length, seed, temperature) in zip(slots, asked, strict=True):
        own, pages = pages[:3], pages[3:]
        batch.start(slot, prompt_of(length, seed), SamplingParams(temperature, seed=seed), own, 0)
        rest[slot] = length
    while rest:
        chosen = data.draw(st.lists(st.sampled_from(sorted(rest)), min_size=1, unique=True))
        parts = [(slot, min(rest[slot], PAGE_SIZE * data.draw(st.integers(1, 3)))) for slot in chosen]
        batch.prefill(parts)
        for slot, count in parts:
            rest[slot] -= count
        if any(rest[slot] == 0 for slot in chosen):
            collect(batch, got)
        rest = {slot: count for slot, count in rest.items() if count}
        if ready := [slot for slot in slots if 1 <= len(got[slot]) < 5]:
            batch.step(data.draw(st.permutations(ready)))
            collect(batch, got)
    for slot, (length, seed, temperature) in zip(slots, asked, strict=True):
        params = SamplingParams(temperature, seed=seed)
        assert got[slot] == alone(backend, prompt_of(length, seed), params, len(got[slot]))


def collect(batch: Batch, got: dict[int, list[int]]) -> None:
    for slot, token in batch.collect():
        got[slot].append(token)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, PAGE_SIZE), st.integers(0, 99))
@settings(max_examples=10)
def test_paged_equals_contiguous(backend: HostBackend, calls: list[int], last: int, seed: int) -> None:
    """Hidden states, keys and values, however a prompt is divided at the ends of pages."""
    model, config = backend.model, backend.model.config
    ids = prompt_of(PAGE_SIZE * sum(calls) + last, seed)
    pages = np.random.default_rng(seed).permutation(12)[: sum(calls) + 1]
    pool = model.new_pool(12)
    paged, whole = pool.cache(pages.tolist(), 0), model.new_cache(len(ids))
    expected = model.forward(ids, whole)
    hidden = [model.forward(part.tolist(), paged) for part in np.split(np.array(ids), np.cumsum(calls) * PAGE_SIZE)]
    np.testing.assert_array_equal(np.concatenate(hidden), expected)
    if isinstance(pool, ReferencePool) and isinstance(whole, ContiguousCache):
        held = pool.values[pages].transpose(1, 2, 0, 3, 4, 5).reshape(config.num_layers, 2, -1, *pool.values.shape[4:])
        np.testing.assert_array_equal(held[:, :, : len(ids)], whole.values)


@given(st.integers(0, 2), st.integers(1, 150), st.integers(1, 40), st.floats(0, 1.5), st.integers(0, 9))
@settings(max_examples=6)
def test_taken_up_again_as_if_never_stopped(
    backend: HostBackend, shared: int, length: int, done: int, temperature: float, seed: int
) -> None:
    """Of an answer, some tokens are known and some pages are still there: the rest is the same as before."""
    prompt, params = prompt_of(length, seed), SamplingParams(temperature, seed=seed, repetition_penalty=1.2)
    batch = backend.new_batch(2, 300)
    held = -(-length // PAGE_SIZE)
    batch.start(0, prompt, params, range(held), 0)
    batch.prefill([(0, length)])
    got: dict[int, list[int]] = {0: [], 1: []}
    for fed in range(length, length + done + 2):
        if fed == held * PAGE_SIZE:
            batch.extend(0, [held])
            held += 1
        batch.step([0])
    for _ in range(done + 3):
        collect(batch, got)
    known = [*prompt, *got[0][:done]]
    computed = min(shared, (len(known) - 1) // PAGE_SIZE) * PAGE_SIZE
    if not batch.uniform:  # steps again, from the end of the prompt or of the pages
        known = known[: max(length, computed + 1)]
    answered = len(known) - length
    batch.start(1, known, params, [*range(computed // PAGE_SIZE), 7, 8, 9], computed, length)
    if batch.uniform or answered == 0:
        batch.prefill([(1, len(known) - computed)])
    else:
        batch.step([1])
    for _ in range(2):
        batch.step([1])
    for _ in range(3):
        collect(batch, got)
    assert got[1] == got[0][answered : answered + 3]


def pages_0_and_1(batch: HostBatch) -> np.ndarray:
    """The bytes of keys and values there."""
    pool = batch._pool
    if isinstance(pool, ReferencePool):
        return pool.values[:2]
    assert isinstance(pool, CpuPool)
    start = pool.address - pool.memory.ctypes.data
    return pool.memory[start : start + 2 * pool._page_bytes]


def test_a_shared_beginning_is_read_and_not_computed_again(backend: HostBackend) -> None:
    beginning = prompt_of(2 * PAGE_SIZE, 1)
    batch = backend.new_batch(2, 300)
    assert isinstance(batch, HostBatch)
    first, second = [*beginning, 5, 6], [*beginning, 7]
    batch.start(0, first, GREEDY, [0, 1, 2], 0)
    batch.prefill([(0, len(first))])
    shared = pages_0_and_1(batch).copy()
    batch.start(1, second, GREEDY, [0, 1, 3], 2 * PAGE_SIZE)
    fed: list[int] = []
    forward = backend.model.forward
    backend.model.forward = lambda ids, cache: fed.append(len(ids)) or forward(ids, cache)  # type: ignore
    try:
        batch.prefill([(1, 1)])
    finally:
        backend.model.forward = forward  # type: ignore[method-assign]
    assert fed == [1]
    got: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(5):
        batch.step([1, 0])
    for _ in range(7):
        collect(batch, got)
    assert got == {0: alone(backend, first, GREEDY, 6), 1: alone(backend, second, GREEDY, 6)}
    np.testing.assert_array_equal(pages_0_and_1(batch), shared)


def test_numbers_that_are_not_finite_stay_with_their_sequence(tiny_packed: Path) -> None:
    """Embeddings of one token are made infinite; a prompt that shares the page with it fails, one that does not is
    answered, also where it shares pages computed before."""
    backend = reference_backend(open_packed(tiny_packed))
    bad, stored = 77, np.array(backend.model.model.embedding.stored)
    stored[bad] = 0x7F80  # infinity in bfloat16
    backend.model.model.embedding = Rows(stored, None)  # the head keeps its own
    good = [i for i in prompt_of(2 * PAGE_SIZE, 3) if i != bad] + [5] * 9
    broken = [*good[:PAGE_SIZE], bad, *good[PAGE_SIZE + 1 : PAGE_SIZE + 80]]
    batch = backend.new_batch(3, 200)
    for slot, ids, pages, computed in (
        (0, broken, [0, 1, 2], 0),
        (1, good[:100], [0, 3], PAGE_SIZE),
        (2, broken, [0, 1, 4], 2 * PAGE_SIZE),
    ):
        batch.start(slot, ids, GREEDY, pages, computed)
        batch.prefill([(slot, len(ids) - computed)])
    batch.step([2, 1, 0])
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(4):
        collect(batch, got)
    assert got[0] == got[2] == [NO_TOKEN] * 2
    assert got[1] == alone(backend, good[:100], GREEDY, 2)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 1.5 GiB"), "memory ran out (Unable to allocate 1.5 GiB)"),
        (OverflowError("int too\nlarge"), "int too large"),
        (ValueError("logits hold NaN"), "the model's weights produce numbers that are not finite: logits hold NaN"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_one_sequence_raises_ends_it_alone(
    backend: HostBackend, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """In the sampler, and amid a prompt of several parts, for which the reason is kept to its end."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate((9, 2 * PAGE_SIZE + 5, 40))]
    want = [alone(backend, prompt, SamplingParams(1.0, seed=7), 6) for prompt in prompts]

    def sample_or_fail(
        hidden: np.ndarray, histories: list, params: list[SamplingParams], lengths: list, *others: Any
    ) -> list[int]:
        if any(own.seed == 8 for own in params):
            raise error
        return sample(hidden, histories, params, lengths, *others)

    def forward_or_fail(ids: list[int], cache: SequenceCache) -> np.ndarray:
        if ids[0] == prompts[1][0]:
            raise error
        return forward(ids, cache)

    forward, sample = backend.model.forward, backend.model.sample
    for name, function, seed in (("sample", sample_or_fail, 8), ("forward", forward_or_fail, 7)):
        with monkeypatch.context() as patch:
            patch.setattr(backend.model, name, function)
            scheduler = Engine(backend, TOKENIZER, backend.model.config, 400).scheduler(prefill_chunk=PAGE_SIZE)
            for i, prompt in enumerate(prompts):
                scheduler.add(prompt, SamplingParams(1.0, seed=seed if i == 1 else 7), max_new_tokens=6)
            updates = []
            while scheduler.busy:
                updates += scheduler.step()
        ended = {update.request: update.completion for update in updates if update.completion}
        assert {number: completion.token_ids for number, completion in ended.items()} == {0: want[0], 2: want[2]}
        assert [str(update.error) for update in updates if update.request == 1] == [message]


def test_answers_do_not_depend_on_preemptions(backend: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four answers that fill more pages than there are: all but the first lose theirs, and go on as they would have."""
    llm = Engine(backend, TOKENIZER, backend.model.config, 3 * PAGE_SIZE)
    asked = [(prompt_of(length, length), SamplingParams(0.9, seed=length)) for length in (50, 20, 60, 70)]
    given: list[int] = []
    leave = BatchRunner.leave
    monkeypatch.setattr(BatchRunner, "leave", lambda runner, s: given.append(s.id) or leave(runner, s))
    # Special tokens must not end an answer: all are to be long.
    options: dict[str, Any] = {"max_new_tokens": 2 * PAGE_SIZE - 10, "ignore_eos": True}
    with llm.scheduler(4, 5 * PAGE_SIZE) as scheduler:
        for prompt, params in asked:
            scheduler.add(prompt, params, **options)
        ended = {}
        while scheduler.busy:
            ended |= {update.request: update.completion for update in scheduler.step() if update.completion}
        assert scheduler._runner.pool.free == 5
    assert len(given) > 4 and given.count(0) == 1
    for number, (prompt, params) in enumerate(asked):
        assert ended[number].token_ids == llm.generate(prompt, params, **options).token_ids


def test_room_follows_what_is_asked_for(backend: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.new_batch(3, PAGE_SIZE + 1).num_pages == 6
    assert backend.new_batch(3, PAGE_SIZE + 1, PAGE_SIZE * 4 + 1).num_pages == 5
    monkeypatch.setattr("bitnet_numba.backends.host.POOL_BYTES", 4 * backend.model.page_bytes())
    assert backend.new_batch(3, PAGE_SIZE + 1).num_pages == 4
    assert backend.new_batch(3, 9 * PAGE_SIZE).num_pages == 9  # one sequence always has room

    def no_memory(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(host.np, "empty", no_memory)
    with pytest.raises(BackendError, match=r"a batch of 640 tokens takes .* GB of memory.*: 0 tokens"):
        backend.new_batch(1, 640)


def test_misuse_is_noticed(backend: HostBackend) -> None:
    batch = backend.new_batch(1, 200)
    for arguments in (
        (1, [5], [0], 0),
        (0, [5], [], 0),
        (0, [5], [batch.num_pages], 0),
        (0, [5] * 70, [0, 1], 3),
        (0, [5] * PAGE_SIZE, [0], PAGE_SIZE),
    ):
        slot, ids, pages, computed = arguments
        with pytest.raises(
            ValueError, match=r"no slot 1|does not fit in pages|must be full pages and leave at least one"
        ):
            batch.start(slot, ids, GREEDY, pages, computed)
    batch.start(0, [5] * 70, GREEDY, [0, 1], 0)
    for count in (0, 5, 71):
        with pytest.raises(ValueError, match="end neither a part nor the prompt"):
            batch.prefill([(0, count)])
    with pytest.raises(ValueError, match="prompt of slot 0 is not complete"):
        batch.step([0])
    batch.close()


STORIES = [
    [{"role": "user", "content": f"Tell me a story about {things}."}]
    for things in (
        "a fox and a lantern",
        "a dog and a kite",
        "a cat",
        "an owl and a key",
        "a mouse and a hat",
        "a bear",
    )
]


SHORT = [
    [{"role": "user", "content": text}]
    for text in ("What can you do?", "will it rain today?", "what is 23 + 4", "Write a python function")
]


@pytest.mark.parametrize(
    ("prompts", "params", "most"),
    [(SHORT, SamplingParams(), None), (STORIES, SamplingParams(0.8, seed=11), 20)],
    ids=["greedy", "seeded"],
)
def test_stories_told_together_are_those_told_alone(
    demo: Engine, prompts: list[list[dict[str, str]]], params: SamplingParams, most: int | None
) -> None:
    together = demo.generate_batch(prompts, params, max_new_tokens=most, max_sequences=3)
    for completion, prompt in zip(together, prompts, strict=True):
        single = demo.generate(prompt, params, max_new_tokens=most)
        assert (completion.text, completion.token_ids) == (single.text, single.token_ids)
        assert completion.finish_reason == single.finish_reason == ("length" if most else "stop")


def test_questions_about_one_story_share_it(demo: Engine) -> None:
    """Turns that go on from the same long story compute it once, and are answered as they would be alone."""
    story = demo.generate(STORIES[1])
    said = [*STORIES[1], {"role": "assistant", "content": story.text}]
    questions = [
        [*said, {"role": "user", "content": text}]
        for text in ("What was the name of the dog?", "Where did they go?", "What can you do?")
    ]
    together = demo.generate_batch(questions)
    assert [completion.text for completion in together] == [demo.generate(question).text for question in questions]
    reused = [completion.stats.reused_tokens for completion in together]
    assert reused[0] == 0 and reused[1] == reused[2] and reused[1] >= 2 * PAGE_SIZE
