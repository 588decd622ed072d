"""Edits of logits and log probabilities on CUDA: the definition's, alone and in company; nothing where nobody asks."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet_numba
from bitnet_numba.backends.protocol import NO_TOKEN, Batch
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.errors import RequestError
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.sampling import TokenLogprob, edit, logit_edits, penalize, token_logprobs
from bitnet_numba.sampling_params import SamplingParams
from tests.backends.test_cuda import random_ids
from tests.kernels.harness import needs_gpu, simulated

PAGES = [[4, 1], [0, 3], [5, 2]]
PLAIN = SamplingParams(0.8, seed=5)
EDITED = SamplingParams(
    presence_penalty=1.5,
    frequency_penalty=-0.25,
    logit_bias={7: 2.0, 9: -100.0},
    repetition_penalty=1.1,
    stop_token_ids=[1, 2, 3],
    min_tokens=20,
    logprobs=3,
)
SCORED = SamplingParams(temperature=1.0, seed=9, top_k=30, logprobs=20, prompt_logprobs=2)


def check_answer(
    logits: np.ndarray,
    prompt: list[int],
    tokens: list[int],
    told: list[TokenLogprob | None],
    params: SamplingParams,
) -> None:
    """Tokens and records are the definition's, given the logits after each token of prompt and answer.

    The logits come from other kernels than those that sampled: they differ in their last bits and so by flips of int8
    activations, as two bfloat16 paths do (0.8 sigma at most).
    """
    ids, behind = [*prompt, *tokens], []
    for i, token in enumerate(tokens):
        row = logits[len(prompt) - 1 + i]
        if params.temperature == 0:
            before = ids[: len(prompt) + i]
            z = penalize(edit(row, *logit_edits(params, before[len(prompt) :])), before, params.repetition_penalty)
            behind.append((z.max() - z[token]) / row.std())
        record = told[i]
        assert (record is None) == (params.logprobs is None)
        if record is not None:
            check_records([record], row[None], [token], params.logprobs or 0)
    assert not behind or np.mean(np.array(behind) <= 0.3) > 0.9, behind


def check_records(records: list[TokenLogprob], logits: np.ndarray, tokens: list[int], top: int) -> None:
    """Records are those of the logits, float32 [tokens, vocab], as far as these are the same."""
    for found, wanted, row in zip(records, token_logprobs(logits, tokens, top), logits, strict=True):
        assert found.token_id == wanted.token_id and len(found.top) == top
        values = [value for _, value in found.top]
        assert values == sorted(values, reverse=True)
        expected = [wanted.logprob, *(value for _, value in wanted.top)]
        np.testing.assert_allclose([found.logprob, *values], expected, rtol=0, atol=0.8 * row.std())


def answers(
    batch: Batch,
    prompts: list[list[int]],
    params: list[SamplingParams],
    pages: list[list[int]],
    count: int,
    forms: Sequence[Any] | None = None,
) -> list[tuple[list[int], list[TokenLogprob | None], list[TokenLogprob]]]:
    """Tokens, their records and those of the prompt, of sequences that decode together."""
    slots = range(len(prompts))
    for slot in slots:
        batch.start(slot, prompts[slot], params[slot], pages[slot], 0, None, None if forms is None else forms[slot])
    batch.prefill([(slot, len(prompts[slot])) for slot in slots])
    tokens: list[list[int]] = [[] for _ in slots]
    told: list[list[TokenLogprob | None]] = [[] for _ in slots]
    of_prompts: list[list[TokenLogprob]] = [[] for _ in slots]
    for call in range(count):
        if call < count - 1:
            batch.step(list(slots))  # a step ahead of what is collected
        results = batch.collect()
        wanted = any(own.logprobs is not None for own in params)
        records = batch.logprobs() if wanted else [None] * len(results)
        for (slot, token), record in zip(results, records, strict=True):
            tokens[slot].append(token)
            told[slot].append(record)
            if call == 0 and params[slot].prompt_logprobs is not None:
                of_prompts[slot] = batch.prompt_logprobs(slot)
    return list(zip(tokens, told, of_prompts, strict=True))


def check_batch(backend: Any, prompts: list[list[int]], params: list[SamplingParams], count: int) -> None:
    """Sequences that decode together, with parameters of their own."""
    context = backend.new_context(200)
    batch = backend.new_batch(3, 200)
    together = answers(batch, prompts, params, PAGES, count)
    batch.close()
    for prompt, own, (tokens, told, of_prompt) in zip(prompts, params, together, strict=True):
        context.truncate(0)
        logits = context.logits([*prompt, *tokens[:-1]])
        check_answer(logits, prompt, tokens, told, own)
        assert (of_prompt == []) == (own.prompt_logprobs is None)
        if of_prompt:
            check_records(of_prompt, logits[: len(prompt) - 1], prompt[1:], 2)
            context.truncate(0)
            assert context.score(prompt, 2, 2) == of_prompt[1:]


def check_context(backend: Any, prompt: list[int], each: list[SamplingParams], count: int) -> None:
    """One sequence alone, by the kernels for one."""
    context, other = backend.new_context(200), backend.new_context(200)
    for params in each:
        context.truncate(0)
        other.truncate(0)
        steps = context.decode(prompt, params)
        tokens, told = [], []
        for _ in range(count):
            tokens.append(next(steps))
            told.append(None if params.logprobs is None else context.logprobs())
        steps.close()
        check_answer(other.logits([*prompt, *tokens[:-1]]), prompt, tokens, told, params)


def tiny_backend(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """A CudaBackend of a tiny model over the simulator."""
    from bitnet_numba.checkpoint.convert import convert
    from bitnet_numba.checkpoint.packed import open_packed
    from bitnet_numba.kernels.attention import paged_decode
    from bitnet_numba.kernels.sampling import batched, edits, logprobs
    from tests.backends.simulated import CONFIG, simulated_backend
    from tools.make_checkpoint import PRESETS, make_checkpoint

    spec, config = PRESETS["tiny"]
    make_checkpoint(folder / "source", config | CONFIG, spec, seed=3)
    convert(folder / "source", folder / "packed", head="bf16")
    backend = simulated_backend(monkeypatch, open_packed(folder / "packed"))
    monkeypatch.setattr(paged_decode, "threads_for", lambda *arguments: 64)
    for module in (batched, edits, logprobs):
        monkeypatch.setattr(module, "spec", partial(module.spec, threads=64))
    return backend


@simulated
def test_simulated_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = tiny_backend(monkeypatch, tmp_path)
    prompt, params = [5, 250], replace(EDITED, prompt_logprobs=2)
    batch = backend.new_batch(1, 16)
    ((tokens, told, of_prompt),) = answers(batch, [prompt], [params], [[0]], 2)
    context = backend.new_context(16)
    logits = context.logits([*prompt, tokens[0]])
    check_answer(logits, prompt, tokens, told, params)
    check_records(of_prompt, logits[:1], prompt[1:], 2)
    context.truncate(2)  # and by the kernels for one sequence
    steps = context.decode(tokens[:1], params)
    token = next(steps)
    check_answer(logits, [*prompt, tokens[0]], [token], [context.logprobs()], params)
    steps.close()


@simulated
def test_simulated_forms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = tiny_backend(monkeypatch, tmp_path)
    vocab, prompts = backend.config.vocab_size, [[5, 250], [7]]
    check_forms(backend, vocab, prompts, [[0], [1]], 2, 1.0)


@simulated
def test_simulated_form_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = tiny_backend(monkeypatch, tmp_path)
    check_form_alone(backend, backend.config.vocab_size, [5, 250], 2)


def test_nothing_is_launched_that_nobody_asks_for() -> None:
    from bitnet_numba.backends.cuda.extras import Asked, Extras
    from bitnet_numba.backends.cuda.forward import CudaModel
    from bitnet_numba.backends.cuda.state import SequenceState
    from bitnet_numba.backends.cuda.steps import BatchSteps, DecodeBuffers, DecodeSteps
    from bitnet_numba.backends.cuda.weights import RowFormats
    from bitnet_numba.checkpoint.packed import open_packed
    from bitnet_numba.engine.loading import DEMO

    config, device = open_packed(DEMO).config, DryRunDevice(90, 132)
    model = CudaModel.dry_run(config, RowFormats("int8", "int8"), device)
    batch = BatchSteps(model, SequenceState(device, config, 64, 8, pages=8))
    one = SequenceState(device, config, 64)
    single = DecodeSteps(model, DecodeBuffers(model), one, device.empty(1, np.int64))
    for steps, decode in ((batch, partial(batch.decode, 8, 8)), (single, partial(single.decode, False))):
        plain = [launch.name for launch in decode()]
        steps.extras = Extras(model, one, 8)
        assert [launch.name for launch in decode()] == plain
        *before, sampler = plain
        for asked, first, last in (
            (Asked(edits=True), ["edit_logits[1024]"], []),
            (Asked(logprobs=True), [], ["logprobs[1024]"]),
            (Asked(True, True), ["edit_logits[1024]"], ["logprobs[1024]"]),
        ):
            assert [launch.name for launch in decode(asked)] == [*before, *first, sampler, *last]


class Form:
    """A form in which tokens of different residues take turns; notes what it is told."""

    def __init__(self, vocab: int, modulus: int, answer: list[int]):
        self.tokens, self._vocab, self._modulus, self.group = list(answer), vocab, modulus, modulus

    def fits(self, place: int, token: int) -> bool:
        return token % self._modulus == place % self._modulus

    def allowed(self, out: np.ndarray) -> None:
        bits = np.zeros(32 * len(out), np.uint8)
        bits[len(self.tokens) % self._modulus : self._vocab : self._modulus] = 1
        out[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> bool:
        assert self.fits(len(self.tokens), token)
        self.tokens.append(token)
        return True


class Failing(Form):
    """One that becomes too complex after some tokens."""

    def allowed(self, out: np.ndarray) -> None:
        if len(self.tokens) == 1:
            raise RequestError("the form of the answer: too complex")
        super().allowed(out)


def check_forms(
    backend: Any, vocab: int, prompts: list[list[int]], pages: list[list[int]], count: int, top_p: float
) -> None:
    """Constrained sequences in company: each has its form, the others are as without; and started again amid an answer,
    it goes on in the same way."""
    slots = range(len(prompts))
    params = [SamplingParams((0.0, 1.0)[slot % 2], top_p=top_p, seed=slot) for slot in slots]
    forms = [None if slot == 1 else Form(vocab, 3 + 4 * slot, []) for slot in slots]
    batch = backend.new_batch(len(prompts), 200)
    plain = answers(batch, prompts, params, pages, count)
    bound = answers(batch, prompts, params, pages, count, forms)
    for (was, *_), (tokens, *_), form in zip(plain, bound, forms, strict=True):
        if form is None:
            assert tokens == was
            continue
        assert tokens != was and form.tokens[:count] == tokens and len(form.tokens) <= count + 1
        assert all(form.fits(place, token) for place, token in enumerate(tokens))
    slot, half = len(prompts) - 1, count // 2
    ids, again = [*prompts[slot], *bound[slot][0][:half]], Form(vocab, 3 + 4 * slot, bound[slot][0][:half])
    batch.start(0, ids, params[slot], pages[slot], 0, len(prompts[slot]), again)
    batch.prefill([(0, len(ids))])
    for place in range(half, count):
        ((_, token),) = batch.collect()
        assert again.fits(place, token)
        if place < count - 1:
            batch.step([0])
    failing = Failing(vocab, 2, [])
    for slot, form in ((0, failing), (1, None)):
        batch.start(slot, prompts[slot], params[slot], pages[slot], 0, None, form)
    batch.prefill([(slot, len(prompts[slot])) for slot in (0, 1)])
    seen = []
    for _ in range(3):
        batch.step([0, 1])
        seen.append(batch.collect())
        assert failing.tokens == [seen[0][0][1]]
    assert [calls[0][1] == NO_TOKEN for calls in seen] == [False, True, True]
    error = batch.failure(0)
    assert isinstance(error, RequestError) and str(error) == "the form of the answer: too complex"
    assert [calls[1][1] for calls in seen][: len(plain[1][0])] == plain[1][0][:3]
    batch.close()


def check_form_alone(backend: Any, vocab: int, prompt: list[int], count: int) -> None:
    """One constrained sequence alone, by the kernels for one, from its first token and from the last of its prompt."""
    context, params = backend.new_context(200), SamplingParams(1.0, seed=3)
    for known in (0, len(prompt) - 1):
        context.truncate(known)
        form = Form(vocab, 5, [])
        steps = context.decode(prompt[known:], params, form)
        tokens = [next(steps) for _ in range(count)]
        steps.close()
        assert form.tokens == tokens and context.ids == [*prompt, *tokens]
        assert all(form.fits(place, token) for place, token in enumerate(tokens))
    context.truncate(0)
    steps = context.decode(prompt, params, Failing(vocab, 2, []))
    with pytest.raises(RequestError, match="too complex"):
        next(steps)
    assert context.ids == prompt
    context.close()


def cuda_backend(checkpoint: PackedCheckpoint) -> Any:
    from bitnet_numba.backends.cuda.backend import CudaBackend

    return CudaBackend(checkpoint)


@needs_gpu
def test_batch_on_gpu(demo: PackedCheckpoint) -> None:
    backend, prompts = cuda_backend(demo), [random_ids(demo, length, length) for length in (30, 1, 90)]
    params = [EDITED, PLAIN, SCORED]
    check_batch(backend, prompts, params, 38)  # the longest fills its two pages
    batch = backend.new_batch(3, 200)
    together = answers(batch, prompts, params, PAGES, 38)
    for prompt, own, found in zip(prompts, params, together, strict=True):
        alone = backend.new_batch(1, 200)
        assert answers(alone, [prompt], [own], [[1, 0]], 38) == [found]
        alone.close()


@needs_gpu
def test_forms_on_gpu(demo: PackedCheckpoint) -> None:
    backend, prompts = cuda_backend(demo), [random_ids(demo, length, length) for length in (30, 1, 60)]
    vocab = demo.config.vocab_size
    check_forms(backend, vocab, prompts, PAGES, 40, 0.9)
    check_form_alone(backend, vocab, prompts[0], 30)


@needs_gpu
def test_context_on_gpu(demo: PackedCheckpoint) -> None:
    backend = cuda_backend(demo)
    for length in (1, 40):
        check_context(backend, random_ids(demo, length, length), [EDITED, PLAIN, SCORED], 40)


@needs_gpu
def test_engine_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions, schedulers and scores give what they give on the reference, but for flips."""
    llm, reference = bitnet_numba.load(), bitnet_numba.load(backend="reference")
    assert llm.backend == "cuda"
    asked = {"max_new_tokens": 40, "logprobs": 5, "prompt_logprobs": 5, "presence_penalty": 0.5, "min_tokens": 10}
    story = "This is the story of Runa, a dragon."
    one, many = llm.generate(story, **asked), llm.generate(story, **asked, n=3)
    want = reference.generate(story, **asked)
    for found in (one, *many):
        assert found.logprobs is not None and found.prompt_logprobs is not None
        assert len(found.logprobs) == len(found.token_ids) and len(found.prompt_logprobs) == found.stats.prompt_tokens
        assert want.logprobs is not None
        shared = next((i for i, (a, b) in enumerate(zip(found.token_ids, want.token_ids, strict=False)) if a != b), 10)
        for a, b in zip(found.logprobs[:shared], want.logprobs[:shared], strict=True):
            assert abs(a.logprob - b.logprob) < 0.5
    assert many[0].text == many[1].text
    text = "Once upon a time, there was a dog. " * 40
    assert llm.score(text).perplexity == pytest.approx(reference.score(text).perplexity, rel=0.05)
