"""POST /v1/chat/completions."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.request import Request
from bitnet_numba.errors import TokenizerError
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.errors import ApiError
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.generation import FINISH_REASONS, closing_events, read_prompts, respond, usage
from bitnet_numba.server.response_format import constrained, gives_form, read_format
from bitnet_numba.server.sampling_fields import number_of_choices, sampling_params, with_thinking
from bitnet_numba.server.schemas import ChatBody, ChatMessage, ResponseFormat, TextFormat
from bitnet_numba.server.service import Fields, Service
from bitnet_numba.server.tool_calls import CallPart, CallReader, tool_call, tool_call_delta
from bitnet_numba.server.tools import read_tools, uses_tools
from bitnet_numba.text.thoughts import ThoughtReader, read_thought
from bitnet_numba.text.tokenizer import Tokenizer

# OpenAI's newer name of the system role; templates know the older one.
ROLE_NAMES = {"developer": "system"}


async def chat_completions(service: Service, exchange: Exchange, body: ChatBody) -> None:
    """Answers a conversation."""
    body.refuse_unsupported()
    engine = service.engine
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs", code="invalid_value")
    params, n = with_thinking(sampling_params(body, engine), body.thinking(), engine), number_of_choices(body)
    id, model = f"chatcmpl-{exchange.request_id}", service.check_model(body.model)
    formed = "response_format" if gives_form(body.response_format) else None
    tags = call_tags(engine, "messages") if uses_tools(body, formed) else None
    new_thoughts: Callable[[], ThoughtReader | None] = partial(new_reader, engine, params, body.messages)
    if must_have_form(body.response_format, body.tool_choice):
        new_thoughts = no_thoughts
    form = ChatForm(id, model, body.with_usage, engine.tokenizer, tags, new_thoughts)

    def make() -> list[Request]:
        messages = as_messages(body.messages, engine.tokenizer)
        thoughts = new_thoughts()  # here, for the first one asks the template, which is another process
        if tags is None:
            form_of = constrained(engine, params, read_format(body.response_format), "response_format")
            return read_prompts(engine, [messages], form_of, n)
        use = read_tools(body, tags, thoughts)
        return read_prompts(engine, [messages], constrained(engine, params, use.grammar, "tools"), n, use.described)

    fields = Fields("messages", body.limit()[0], form="tools" if tags is not None else formed)
    await respond(service, exchange, body, make, n, form, fields)


def must_have_form(format: ResponseFormat | TextFormat | None, tool_choice: object) -> bool:
    """Whether the answer has a form from its first character on, which leaves no room for a thought."""
    return gives_form(format) or tool_choice not in (None, "none", "auto")


def new_reader(engine: Engine, params: SamplingParams, messages: Sequence[ChatMessage]) -> ThoughtReader | None:
    """What tells the thought of an answer to a conversation apart; None if the model marks no thoughts."""
    last = messages[-1]
    begun = last.content if last.role == "assistant" else None
    if isinstance(begun, list):
        begun = "".join(str(part.get("text", "")) for part in begun)
    return engine.tokenizer.thoughts(params.thinking, begun)


def no_thoughts() -> None:
    """No reader, for answers that have no thought."""


def call_tags(engine: Engine, param: str) -> tuple[str, str]:
    """What stands before and after a call in the model's answers. Raises ApiError, of `param`, if it cannot chat."""
    try:
        return engine.tokenizer.call_tags
    except TokenizerError as error:
        raise ApiError(400, str(error), param=param, code="invalid_value") from None


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

    def __init__(
        self,
        id: str,
        model: str,
        with_usage: bool,
        tokenizer: Tokenizer,
        tags: tuple[str, str] | None = None,
        new_thoughts: Callable[[], ThoughtReader | None] = lambda: None,
    ):
        """tags: what stands before and after a call of a function; None: answers are texts. new_thoughts: makes what
        tells the thought of an answer apart, or None."""
        self._tokenizer, self._tags, self._new_thoughts = tokenizer, tags, new_thoughts
        self._thoughts: dict[int, ThoughtReader | None] = {}  # of each answer that is streamed
        self._readers: dict[int, CallReader] = {}  # of each answer that is streamed
        self._base = {"id": id, "created": int(time.time()), "model": model}
        self._with_usage = with_usage
        head = json.dumps({**self._base, "object": "chat.completion.chunk"})[:-1]
        # With usage asked for, every chunk but the last has it as null.
        self._tail = ', "usage": null}\n\n' if with_usage else "}\n\n"
        self._head = f"data: {head}, "

    def whole(self, requests: Sequence[Request], completions: Sequence[Completion], n: int) -> dict[str, Any]:
        """A chat.completion."""
        messages = [self._message(completion.text) for completion in completions]
        choices = [
            {
                "index": index,
                "message": message,
                "logprobs": self._logprobs(completion.logprobs),
                "finish_reason": _finish_reason(completion, "tool_calls" in message),
            }
            for index, (message, completion) in enumerate(zip(messages, completions, strict=True))
        ]
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": usage(completions, n)}

    def opening(self, index: int, request: Request, prompt_logprobs: Sequence[TokenLogprob | None]) -> str:
        """The role comes first."""
        self._thoughts[index] = self._new_thoughts()
        if self._tags is not None:
            self._readers[index] = CallReader(self._tags)
            return self._chunk(index, '{"role": "assistant", "content": null}')
        return self._chunk(index, '{"role": "assistant", "content": ""}')

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> str:
        """More content, or more of calls."""
        found = json.dumps(self._logprobs(logprobs)) if logprobs else "null"
        thoughts = self._thoughts[index]
        if thoughts is None and self._tags is None:
            return self._chunk(index, f'{{"content": {json.dumps(text)}}}', found)
        thought, text = ("", text) if thoughts is None else thoughts.push(text)
        delta = self._delta(index, thought, text)
        return self._chunk(index, json.dumps(delta), found) if delta or logprobs else ""

    def _delta(self, index: int, thought: str, text: str) -> dict[str, Any]:
        """More of a thought, of content, or of calls."""
        delta: dict[str, Any] = {"reasoning_content": thought} if thought else {}
        parts: Sequence[CallPart] = ()
        if self._tags is not None:
            text, parts = self._readers[index].push(text)
        if text:
            delta["content"] = text
        if parts:
            delta["tool_calls"] = [tool_call_delta(part) for part in parts]
        return delta

    def finish(self, index: int, completion: Completion) -> str:
        """The finish reason, alone."""
        thoughts, has_calls = self._thoughts[index], False
        delta = {} if thoughts is None else self._delta(index, *thoughts.finish())
        if self._tags is not None:
            reader = self._readers[index]
            rest, has_calls = delta.get("content", "") + reader.finish(), reader.has_calls
            delta |= {"content": rest} if rest else {}
        last = self._chunk(index, json.dumps(delta)) if delta else ""
        return last + self._chunk(index, "{}", reason=f'"{_finish_reason(completion, has_calls)}"')

    def closing(self, completions: Sequence[Completion], n: int) -> str:
        """The usage if it was asked for, and the end."""
        return closing_events(self._head, usage(completions, n) if self._with_usage else None)

    def _chunk(self, index: int, delta: str, logprobs: str = "null", reason: str = "null") -> str:
        choice = f'{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {reason}}}'
        return f'{self._head}"choices": [{choice}]{self._tail}'

    def _message(self, text: str) -> dict[str, Any]:
        """An answer as a message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        thoughts = self._new_thoughts()
        if thoughts is not None:
            thought, text = read_thought(thoughts, text)
            message |= {"content": text, "reasoning_content": thought or None}
        if self._tags is None:
            return message
        reader = CallReader(self._tags)
        content, parts = reader.push(text)
        content += reader.finish()
        if parts:
            return {**message, "content": None, "tool_calls": [tool_call(part) for part in parts]}
        return {**message, "content": content or None}

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


def _finish_reason(completion: Completion, has_calls: bool) -> str:
    reason = FINISH_REASONS[completion.finish_reason]
    return "tool_calls" if has_calls and reason == "stop" else reason
