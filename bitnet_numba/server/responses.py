"""POST /v1/responses: OpenAI's newer interface, for text, without anything that is kept between requests."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Request
from bitnet_numba.grammar import Grammar
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.chat_completions import as_messages
from bitnet_numba.server.errors import ApiError, unsupported
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.generation import read_prompts, respond, usage
from bitnet_numba.server.response_format import constrained, read_schema
from bitnet_numba.server.sampling_fields import sampling_params
from bitnet_numba.server.schemas import ChatMessage, InputItem, ResponseBody, TextFormat
from bitnet_numba.server.service import Service

TEXT_PARTS = ("input_text", "output_text", "text")


async def responses(service: Service, exchange: Exchange, body: ResponseBody) -> None:
    """Answers a text or a conversation."""
    body.refuse_unsupported()
    if not all(isinstance(value, str) for value in (body.metadata or {}).values()):
        raise ApiError(400, "metadata: its values must be strings", param="metadata", code="invalid_value")
    engine = service.engine
    params, messages = sampling_params(body, engine), list_messages(body)
    form = ResponseForm(exchange.request_id, service.check_model(body.model), body, params)

    def make() -> list[Request]:
        grammar = _read_format(body.text.format) if body.text is not None else None
        constrained_params = constrained(engine, params, grammar, "text.format")
        return read_prompts(engine, [as_messages(messages, engine.tokenizer)], constrained_params, 1)

    await respond(service, exchange, body, make, 1, form, "input")


def _read_format(format: TextFormat | None) -> Grammar | None:
    if format is None or format.type == "text":
        return None
    return Grammar.json() if format.type == "json_object" else read_schema(format, "text.format")


def list_messages(body: ResponseBody) -> list[ChatMessage]:
    """The conversation: instructions first. Raises ApiError for an item that is no message of text."""
    items = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    for number, item in enumerate(items):
        if item.type != "message" or item.role is None:
            raise unsupported(f"input.{number}", "only messages are supported")
        content = item.content
        if isinstance(content, list):
            content = [{"type": "text", "text": _text_of(part, number)} for part in content]
        messages.append(ChatMessage(role=item.role, content=content))
    return messages


def _text_of(part: Mapping[str, Any], number: int) -> str:
    if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise unsupported(f"input.{number}.content", "only parts of text are supported")
    return str(part["text"])


class ResponseForm:
    """An answer as a response, or as the events of one. There is one answer, with index 0."""

    def __init__(self, request_id: str, model: str, body: ResponseBody, params: SamplingParams):
        self._item, self._number = f"msg_{request_id}", 0  # the number of the next event
        format = body.text.format if body.text is not None else None
        text_format = {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)
        self._base = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": text_format},
            "tool_choice": "auto",
            "tools": [],
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
        }

    def whole(self, requests: Sequence[Request], completions: Sequence[Completion], n: int) -> dict[str, Any]:
        """A response."""
        completion = completions[0]
        complete = completion.finish_reason == "stop"
        counts = usage(completions, n)
        return {
            **self._base,
            "status": "completed" if complete else "incomplete",
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "output": [self._message(completion.text, "completed" if complete else "incomplete")],
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }

    def opening(self, index: int, request: Request, prompt_logprobs: Sequence[TokenLogprob | None]) -> str:
        """The response, its message and the message's text begin."""
        begun = {**self._base, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        return (
            self._event("response.created", {"response": begun})
            + self._event("response.in_progress", {"response": begun})
            + self._event("response.output_item.added", {"output_index": 0, "item": self._message(None, "in_progress")})
            + self._event("response.content_part.added", {**self._place(), "part": self._part("")})
        )

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> str:
        """More text."""
        return self._event("response.output_text.delta", {**self._place(), "delta": text, "logprobs": []})

    def finish(self, index: int, completion: Completion) -> str:
        """They all end, in reverse order."""
        text = completion.text
        whole = self.whole([], [completion], 1)
        item = {"output_index": 0, "item": whole["output"][0]}
        end = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        return (
            self._event("response.output_text.done", {**self._place(), "text": text, "logprobs": []})
            + self._event("response.content_part.done", {**self._place(), "part": self._part(text)})
            + self._event("response.output_item.done", item)
            + self._event(end, {"response": whole})
        )

    def closing(self, completions: Sequence[Completion], n: int) -> str:
        """The last event has said all."""
        return ""

    def _event(self, kind: str, content: Mapping[str, Any]) -> str:
        data = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
