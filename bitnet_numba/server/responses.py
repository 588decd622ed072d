"""POST /v1/responses: OpenAI's newer interface, for text and functions; nothing is kept between requests."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bitnet_numba.engine.request import Request
from bitnet_numba.grammar import Grammar
from bitnet_numba.server.chat_completions import as_messages, call_tags, must_have_form, new_reader, no_thoughts
from bitnet_numba.server.errors import ApiError, unsupported
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.generation import read_prompts, respond
from bitnet_numba.server.response_form import ResponseForm
from bitnet_numba.server.response_format import constrained, gives_form, read_schema
from bitnet_numba.server.sampling_fields import sampling_params, with_thinking
from bitnet_numba.server.schemas import CalledFunction, ChatMessage, InputItem, ResponseBody, TextFormat, ToolCall
from bitnet_numba.server.service import Fields, Service
from bitnet_numba.server.tools import read_tools, uses_tools
from bitnet_numba.text.thoughts import ThoughtReader

TEXT_PARTS = ("input_text", "output_text", "text")


async def responses(service: Service, exchange: Exchange, body: ResponseBody) -> None:
    """Answers a text or a conversation."""
    body.refuse_unsupported()
    if not all(isinstance(value, str) for value in (body.metadata or {}).values()):
        raise ApiError(400, "metadata: its values must be strings", param="metadata", code="invalid_value")
    engine = service.engine
    params, messages = with_thinking(sampling_params(body, engine), body.thinking(), engine), list_messages(body)
    format = body.text.format if body.text is not None else None
    formed = "text.format" if gives_form(format) else None
    tags = call_tags(engine, "input") if uses_tools(body, formed) else None
    new_thoughts: Callable[[], ThoughtReader | None] = partial(new_reader, engine, params, messages)
    if must_have_form(format, body.tool_choice):
        new_thoughts = no_thoughts
    model = service.check_model(body.model)
    form = ResponseForm(exchange.request_id, model, body, params, tags, engine.tokenizer, new_thoughts)

    def make() -> list[Request]:
        prompt = as_messages(messages, engine.tokenizer)
        thoughts = new_thoughts()  # here, for the first one asks the template, which is another process
        if tags is None:
            return read_prompts(engine, [prompt], constrained(engine, params, _read_format(format), "text.format"), 1)
        use = read_tools(body, tags, thoughts)
        return read_prompts(engine, [prompt], constrained(engine, params, use.grammar, "tools"), 1, use.described)

    fields = Fields("input", body.limit()[0], form="tools" if tags is not None else formed)
    await respond(service, exchange, body, make, 1, form, fields)


def _read_format(format: TextFormat | None) -> Grammar | None:
    if format is None or format.type == "text":
        return None
    return Grammar.json() if format.type == "json_object" else read_schema(format, "text.format")


def list_messages(body: ResponseBody) -> list[ChatMessage]:
    """The conversation: instructions first; calls of functions in the answer that they belong to. What the model has
    thought (items of type reasoning) is left out: templates show a model no thoughts of earlier answers.

    Raises ApiError for an item that is no message of text, no call, and no result of one.
    """
    items = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    for number, item in enumerate(items):
        field = f"input.{number}"
        if item.type == "message" and item.role is not None:
            messages.append(ChatMessage(role=item.role, content=_content(item.content, f"{field}.content")))
        elif item.type == "function_call":
            name, arguments = _given(item, "name", field), _given(item, "arguments", field)
            function = CalledFunction(name=name, arguments=arguments)
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatMessage(role="assistant"))
            answer, call = messages[-1], ToolCall(id=_given(item, "call_id", field), function=function)
            answer.tool_calls = [*(answer.tool_calls or ()), call]
        elif item.type == "function_call_output":
            call_id, result = _given(item, "call_id", field), _given(item, "output", field)
            result = _content(result, f"{field}.output")
            messages.append(ChatMessage.model_validate({"role": "tool", "content": result, "tool_call_id": call_id}))
        elif item.type != "reasoning":
            raise unsupported(field, "only messages, calls of functions, their outputs and thoughts are supported")
    if not messages:
        raise ApiError(400, "input has no message", param="input", code="invalid_value")
    return messages


def _given(item: InputItem, name: str, field: str) -> Any:
    value = getattr(item, name)
    if value is None:
        field = f"{field}.{name}"
        raise ApiError(400, f"{field} is missing", param=field, code="invalid_value")
    return value


def _content(content: str | Sequence[Mapping[str, Any]] | None, field: str) -> str | list[dict[str, Any]] | None:
    if content is None or isinstance(content, str):
        return content
    return [{"type": "text", "text": _text_of(part, field)} for part in content]


def _text_of(part: Mapping[str, Any], field: str) -> str:
    if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise unsupported(field, "only parts of text are supported")
    return str(part["text"])
