"""What the endpoints that generate have in common: sampling parameters, prompts, whole answers and streams."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.request import Prompt, Request, read_request
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.answers import Answers
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.sampling_fields import number_of_choices
from bitnet_numba.server.schemas import SamplingBody
from bitnet_numba.server.service import Fields, Service
from bitnet_numba.text.tool_messages import Tools

# Why an answer ended -> OpenAI's finish_reason.
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}


def read_prompts(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, n: int, tools: Tools | None = None
) -> list[Request]:
    """`n` requests for each prompt, whose seeds count upwards. tools: functions that the answers may call."""
    vocab, several = engine.config.vocab_size, "give a list of prompts"
    requests = []
    for prompt in prompts:
        requests += read_request(engine.tokenizer, vocab, engine.context, prompt, params, several, tools).several(n)
    return requests


def usage(completions: Sequence[Completion], n: int) -> dict[str, Any]:
    """OpenAI's count of tokens; a prompt counts once, however many answers it has."""
    prompt = sum(completion.stats.prompt_tokens for completion in completions[::n])
    details = {"cached_tokens": sum(completion.stats.reused_tokens for completion in completions[::n])}
    dropped = completions[0].dropped_messages
    if dropped:  # by truncation
        details["dropped_messages"] = dropped
    generated = sum(completion.stats.generated_tokens for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": details,
    }


def closing_events(head: str, used: dict[str, Any] | None) -> str:
    """How a stream ends: with a chunk of no choices that has the usage, if it was asked for, and the end.

    head: a chunk up to its choices.
    """
    last = "" if used is None else f'{head}"choices": [], "usage": {json.dumps(used)}}}\n\n'
    return last + "data: [DONE]\n\n"


class Form(Protocol):
    """The form of an endpoint's answers."""

    def whole(self, requests: Sequence[Request], completions: Sequence[Completion], n: int) -> dict[str, Any]:
        """The content of a response that is not streamed."""

    def opening(self, index: int, request: Request, prompt_logprobs: Sequence[TokenLogprob | None]) -> str:
        """The events with which an answer begins; may be empty. prompt_logprobs: none unless they are asked for."""

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> str:
        """The event of new text, or of new tokens that have no text yet."""

    def finish(self, index: int, completion: Completion) -> str:
        """The event of an answer's end."""

    def closing(self, completions: Sequence[Completion], n: int) -> str:
        """The events after all answers."""


async def respond(
    service: Service,
    exchange: Exchange,
    body: SamplingBody,
    make: Callable[[], list[Request]],
    count: int,
    form: Form,
    fields: Fields,
    prompt_only: bool = False,
) -> None:
    """Generates `count` answers and sends them, whole or as a stream. `make` as for `Service.answering`. prompt_only:
    only what is told of the prompts is wanted."""
    n, priority, salt = number_of_choices(body), body.priority or 0, body.cache_salt or ""
    began = time.perf_counter()
    async with service.answering(exchange, count, make, fields, priority, salt, not body.stream) as answers:
        answers.prompt_only = prompt_only
        if body.stream:
            completions = await _stream(service, exchange, answers, n, form, began)
        else:
            completions = await answers.completions()
            await exchange.json(form.whole(answers.requests, completions, n))
    seconds = time.perf_counter() - began
    for completion in completions:
        service.metrics.answered(completion.stats, seconds)
    exchange.note_usage(usage(completions, n))


async def _stream(
    service: Service, exchange: Exchange, answers: Answers, n: int, form: Form, began: float
) -> list[Completion]:
    count = len(answers.requests)
    done: dict[int, Completion] = {}
    changes = await answers.changes()  # an answer that fails at once is an error with a status of its own
    service.metrics.first_text(time.perf_counter() - began)
    await exchange.start_events()
    events, opened = [], set[int]()
    while True:
        for index, (text, logprobs, prompt_logprobs, completion) in changes.items():
            if index not in opened:
                events.append(form.opening(index, answers.requests[index], prompt_logprobs))
                opened.add(index)
            if text or logprobs:
                events.append(form.text(index, text, logprobs))
            if completion is not None:
                events.append(form.finish(index, completion))
                done[index] = completion
        if answers.ended:
            break
        if events:
            await exchange.event("".join(events).encode("utf-8"))
        events, changes = [], await answers.changes()
    completions = [done[index] for index in range(count)]
    events.append(form.closing(completions, n))
    await exchange.event("".join(events).encode("utf-8"))
    await exchange.end_events()
    return completions
