"""POST /v1/completions: texts, or token ids, that the model continues."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Request
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.server.errors import ApiError
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.generation import FINISH_REASONS, closing_events, read_prompts, respond, usage
from bitnet_numba.server.response_format import constrained, gives_form, read_format
from bitnet_numba.server.sampling_fields import number_of_choices, sampling_params
from bitnet_numba.server.schemas import CompletionBody
from bitnet_numba.server.service import Fields, Service
from bitnet_numba.text.stream_decoder import StreamDecoder
from bitnet_numba.text.tokenizer import Tokenizer


async def completions(service: Service, exchange: Exchange, body: CompletionBody) -> None:
    """Continues one prompt or several."""
    body.refuse_unsupported()
    engine = service.engine
    n, echo = number_of_choices(body), bool(body.echo)
    prompt_only = body.max_tokens == 0
    if prompt_only:
        if not echo or body.min_tokens:
            reason = "max_tokens may be 0 only with echo, and without min_tokens"
            raise ApiError(400, reason, param="max_tokens", code="invalid_value")
        body = body.model_copy(update={"max_tokens": 1})  # the engine generates one at least; it is left out
    params = sampling_params(body, engine)
    if echo:
        params = replace(params, prompt_logprobs=params.logprobs)
    prompts = list_prompts(body.prompt)
    id, model = f"cmpl-{exchange.request_id}", service.check_model(body.model)
    form = CompletionForm(id, model, body.with_usage, engine.tokenizer, prompts if echo else None, n)
    count = len(prompts) * n

    def make() -> list[Request]:
        grammar = read_format(body.response_format)
        return read_prompts(engine, prompts, constrained(engine, params, grammar, "response_format"), n)

    formed = "response_format" if gives_form(body.response_format) else None
    fields = Fields("prompt", "max_tokens", "n" if len(prompts) <= service.settings.most_choices else "prompt", formed)
    await respond(service, exchange, body, make, count, form, fields, prompt_only)


def list_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a request, which may be one text, one list of token ids, or a list of either."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        return cast(list[str | list[int]], prompt)
    return [cast(str | list[int], prompt)]


class CompletionForm:
    """Answers as text completions and their chunks. What chunks have in common is written once."""

    def __init__(
        self,
        id: str,
        model: str,
        with_usage: bool,
        tokenizer: Tokenizer,
        echo: Sequence[str | list[int]] | None,
        n: int,
    ):
        """echo: the prompts, each of which stands before its `n` answers; None: none does."""
        self._base = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._with_usage, self._tokenizer, self._echo, self._n = with_usage, tokenizer, echo, n
        self._head = f"data: {json.dumps(self._base)[:-1]}, "
        self._tail = ', "usage": null}\n\n' if with_usage else "}\n\n"
        self._places: dict[int, TextPlaces] = {}  # of each answer

    def whole(self, requests: Sequence[Request], completions: Sequence[Completion], n: int) -> dict[str, Any]:
        """A text_completion."""
        choices = []
        for index, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            found: list[TokenLogprob | None] = [*(completion.prompt_logprobs or ()), *(completion.logprobs or ())]
            logprobs = None if completion.logprobs is None else self._logprobs(index, found, request.ids[0])
            reason = FINISH_REASONS[completion.finish_reason]
            text = self._prompt(index) + completion.text
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
        return {**self._base, "choices": choices, "usage": usage(completions, n)}

    def opening(self, index: int, request: Request, prompt_logprobs: Sequence[TokenLogprob | None]) -> str:
        """The prompt, if it is echoed."""
        if self._echo is None:
            return ""
        found = json.dumps(self._logprobs(index, prompt_logprobs, request.ids[0])) if prompt_logprobs else "null"
        return self._chunk(index, json.dumps(self._prompt(index)), found)

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> str:
        """More text."""
        found = json.dumps(self._logprobs(index, logprobs)) if logprobs else "null"
        return self._chunk(index, json.dumps(text), found)

    def finish(self, index: int, completion: Completion) -> str:
        """The finish reason, alone."""
        return self._chunk(index, '""', reason=f'"{FINISH_REASONS[completion.finish_reason]}"')

    def closing(self, completions: Sequence[Completion], n: int) -> str:
        """The usage if it was asked for, and the end."""
        return closing_events(self._head, usage(completions, n) if self._with_usage else None)

    def _chunk(self, index: int, text: str, logprobs: str = "null", reason: str = "null") -> str:
        choice = f'{{"index": {index}, "text": {text}, "logprobs": {logprobs}, "finish_reason": {reason}}}'
        return f'{self._head}"choices": [{choice}]{self._tail}'

    def _prompt(self, index: int) -> str:
        if self._echo is None:
            return ""
        prompt = self._echo[index // self._n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _logprobs(self, index: int, found: Sequence[TokenLogprob | None], first: int = 0) -> dict[str, Any]:
        """Log probabilities in OpenAI's older form. first: the token of the one that is None: nothing precedes it."""
        places = self._places.setdefault(index, TextPlaces(self._tokenizer))
        tokens = [first if entry is None else entry.token_id for entry in found]
        tops = [
            None if entry is None else {self._token(token): logprob for token, logprob in entry.top}
            | {self._token(entry.token_id): entry.logprob}
            for entry in found
        ]  # fmt: skip
        return {
            "tokens": [self._token(token) for token in tokens],
            "token_logprobs": [None if entry is None else entry.logprob for entry in found],
            "top_logprobs": tops,
            "text_offset": [places.next(token) for token in tokens],
        }

    def _token(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)


class TextPlaces:
    """Where in a text each of its tokens begins."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder, self._length = StreamDecoder(tokenizer), 0

    def next(self, token: int) -> int:
        """The number of characters before this token, which follows the last one."""
        start = self._length
        self._length += len(self._decoder.push(token))
        return start
