"""POST /v1/completions: texts, or token ids, that the model continues."""

import json
import time
from collections.abc import Sequence
from typing import Any, cast

from bitnet_numba.engine.completion import Completion
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.generation import (
    FINISH_REASONS,
    number_of_choices,
    read_prompts,
    respond,
    sampling_params,
    usage,
)
from bitnet_numba.server.schemas import CompletionBody
from bitnet_numba.server.service import Service

DEFAULT_MAX_TOKENS = 16  # as in OpenAI's interface


async def completions(service: Service, exchange: Exchange, body: CompletionBody) -> None:
    """Continues one prompt or several."""
    body.refuse_unsupported()
    engine = service.engine
    n = number_of_choices(body)
    params = sampling_params(body, engine, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
    prompts = list_prompts(body.prompt)
    echo = [
        prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt)
        for prompt in (prompts if body.echo else [])
        for _ in range(n)
    ]
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    form = CompletionForm(f"cmpl-{exchange.request_id}", service.check_model(body.model), with_usage, echo)
    await respond(
        service,
        exchange,
        lambda: read_prompts(engine, prompts, params, n),
        len(prompts) * n,
        n,
        form,
        bool(body.stream),
        "prompt",
    )


def list_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a request, which may be one text, one list of token ids, or a list of either."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return cast(list[str | list[int]], prompt)
    return [cast(str | list[int], prompt)]


class CompletionForm:
    """Answers as text completions and their chunks. What chunks have in common is written once."""

    def __init__(self, id: str, model: str, with_usage: bool, echo: Sequence[str]):
        """echo: the text before each answer; empty: none."""
        self._base = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._with_usage, self._echo = with_usage, echo
        self._head = f"data: {json.dumps(self._base)[:-1]}, "
        self._tail = ', "usage": null}\n\n' if with_usage else "}\n\n"

    def whole(self, completions: Sequence[Completion], n: int) -> dict[str, Any]:
        """A text_completion."""
        choices = [
            {
                "index": index,
                "text": (self._echo[index] if self._echo else "") + completion.text,
                "logprobs": None,
                "finish_reason": FINISH_REASONS[completion.finish_reason],
            }
            for index, completion in enumerate(completions)
        ]
        return {**self._base, "choices": choices, "usage": usage(completions, n)}

    def opening(self, index: int) -> str:
        """The prompt, if it is echoed."""
        return self.text(index, self._echo[index]) if self._echo else ""

    def text(self, index: int, text: str) -> str:
        """More text."""
        return self._chunk(index, json.dumps(text), "null")

    def finish(self, index: int, completion: Completion) -> str:
        """The finish reason, alone."""
        return self._chunk(index, '""', f'"{FINISH_REASONS[completion.finish_reason]}"')

    def closing(self, completions: Sequence[Completion], n: int) -> str:
        """The usage if it was asked for, and the end."""
        last = f'{self._head}"choices": [], "usage": {json.dumps(usage(completions, n))}}}\n\n'
        return (last if self._with_usage else "") + "data: [DONE]\n\n"

    def _chunk(self, index: int, text: str, reason: str) -> str:
        choice = f'{{"index": {index}, "text": {text}, "logprobs": null, "finish_reason": {reason}}}'
        return f'{self._head}"choices": [{choice}]{self._tail}'
