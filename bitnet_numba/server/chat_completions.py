"""POST /v1/chat/completions."""

import json
import time
from collections.abc import Sequence
from typing import Any

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Request
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.server.errors import ApiError
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.generation import FINISH_REASONS, read_prompts, respond, usage
from bitnet_numba.server.sampling_fields import number_of_choices, sampling_params
from bitnet_numba.server.schemas import ChatBody, ChatMessage
from bitnet_numba.server.service import Service
from bitnet_numba.text.tokenizer import Tokenizer

# OpenAI's newer name of the system role; templates know the older one.
ROLE_NAMES = {"developer": "system"}


async def chat_completions(service: Service, exchange: Exchange, body: ChatBody) -> None:
    """Answers a conversation."""
    body.refuse_unsupported()
    engine = service.engine
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs", code="invalid_value")
    params, n = sampling_params(body, engine), number_of_choices(body)
    id, model = f"chatcmpl-{exchange.request_id}", service.check_model(body.model)
    form = ChatForm(id, model, body.with_usage, engine.tokenizer)

    def make() -> list[Request]:
        return read_prompts(engine, [as_messages(body.messages, engine.tokenizer)], params, n)

    await respond(service, exchange, body, make, n, form, "messages")


def as_messages(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Messages as the engine takes them.

    An answer is encoded by itself, as the model generated it, and not together with the space that a template may write
    before it: so the next turn of a conversation finds the pages of this one in the cache.
    """
    read = []
    for number, message in enumerate(messages, 1):
        given = {key: value for key, value in message.model_dump().items() if value is not None}
        given.pop("token_ids", None)  # not the model's own: a client cannot know them
        content = message.content
        if isinstance(content, list) and len(content) == 1 and isinstance(content[0].get("text"), str):
            content = content[0]["text"] if content[0].get("type", "text") == "text" else content
        given |= {"role": ROLE_NAMES.get(message.role, message.role), "content": content}
        if message.role == "assistant" and isinstance(content, str) and number < len(messages):
            given["token_ids"] = tokenizer.encode(content, add_bos=False)
        read.append(given)
    return read


class ChatForm:
    """Answers as chat completions and their chunks. What chunks have in common is written once."""

    def __init__(self, id: str, model: str, with_usage: bool, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._base = {"id": id, "created": int(time.time()), "model": model}
        self._with_usage = with_usage
        head = json.dumps({**self._base, "object": "chat.completion.chunk"})[:-1]
        # With usage asked for, every chunk but the last has it as null.
        self._tail = ', "usage": null}\n\n' if with_usage else "}\n\n"
        self._head = f"data: {head}, "

    def whole(self, requests: Sequence[Request], completions: Sequence[Completion], n: int) -> dict[str, Any]:
        """A chat.completion."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": self._logprobs(completion.logprobs),
                "finish_reason": FINISH_REASONS[completion.finish_reason],
            }
            for index, completion in enumerate(completions)
        ]
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": usage(completions, n)}

    def opening(self, index: int) -> str:
        """The role comes first."""
        return self._chunk(index, '{"role": "assistant", "content": ""}')

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> str:
        """More content."""
        delta = f'{{"content": {json.dumps(text)}}}'
        return self._chunk(index, delta, json.dumps(self._logprobs(logprobs)) if logprobs else "null")

    def finish(self, index: int, completion: Completion) -> str:
        """The finish reason, alone."""
        return self._chunk(index, "{}", reason=f'"{FINISH_REASONS[completion.finish_reason]}"')

    def closing(self, completions: Sequence[Completion], n: int) -> str:
        """The usage if it was asked for, and the end."""
        last = f'{self._head}"choices": [], "usage": {json.dumps(usage(completions, n))}}}\n\n'
        return (last if self._with_usage else "") + "data: [DONE]\n\n"

    def _chunk(self, index: int, delta: str, logprobs: str = "null", reason: str = "null") -> str:
        choice = f'{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {reason}}}'
        return f'{self._head}"choices": [{choice}]{self._tail}'

    def _logprobs(self, found: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        content = [
            {**self._token(token, logprob), "top_logprobs": [self._token(*other) for other in top]}
            for token, logprob, top in found
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token], skip_special=False)
        return {"token": text, "logprob": logprob, "bytes": list(self._tokenizer.token_bytes(token))}
