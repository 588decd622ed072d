"""Conversations with functions that the model may call, as templates take them and as plain text for those that do not.

As in OpenAI's interface: `tools` are [{"type": "function", "function": {"name", "description", "parameters"}}, ...]; an
assistant's message may have "tool_calls" [{"id", "function": {"name", "arguments": JSON text}}, ...], and a message of
role "tool" is the result of the call that its "tool_call_id" names.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_numba.errors import RequestError
from bitnet_numba.text.chat_template import ChatTemplate, Message, text_of, without_surrogates

Tools = Sequence[Mapping[str, Any]]
TAG = "tool_call"  # where a template names it, calls stand between <tool_call> and </tool_call>

ADVICE = (
    "You can call these functions:\n{tools}\n"
    'To call one, answer with nothing but a line of JSON: {{"name": NAME, "arguments": {{ARGUMENT: VALUE}}}}'
)


def call_text(name: str, arguments: str) -> str:
    """A call as the model writes it: a line of JSON."""
    return f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'


def for_template(
    messages: Sequence[Message], tools: Tools | None, template: ChatTemplate
) -> tuple[Sequence[Message], Any]:
    """Messages and tools as a template takes them. Raises RequestError for calls that are not in OpenAI's form."""
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        return messages, None  # refused by whoever reads them
    if template.takes_tools:
        return [_with_objects(message) for message in messages], _plain_json(tools)
    return _described(_spelled_out(messages, template.knows_role("tool")), tools), None


def _with_objects(message: Message) -> Message:
    """A message whose calls have their arguments as objects: templates write them as JSON themselves."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {"name": name, "arguments": _as_object(arguments)}}
        for call, name, arguments in _calls_of(message)
    ]
    return {**message, "tool_calls": calls}


def _as_object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments  # an answer that was cut, as it is


def _spelled_out(messages: Sequence[Message], knows_results: bool) -> list[Message]:
    """Calls as the text of answers; results as users' messages, those of one answer together."""
    spelled: list[Message] = []
    names: dict[str, str] = {}  # of functions, by the ids of their calls
    results: list[str] = []  # of the message that is last in `spelled`
    for message in messages:
        if message.get("role") == "tool" and not knows_results:
            name = names.get(str(message.get("tool_call_id")), "The function")
            results.append(f"{name} returned: {_content_text(message)}")
            if len(results) > 1:
                spelled.pop()
            spelled.append({"role": "user", "content": "\n".join(results)})
            continue
        results = []
        if message.get("role") == "assistant" and message.get("tool_calls"):
            calls = _calls_of(message)
            names |= {str(call.get("id")): name for call, name, _ in calls}
            lines = [_content_text(message), *(call_text(name, arguments) for _, name, arguments in calls)]
            message = {"role": "assistant", "content": "\n".join(filter(None, lines))}
        spelled.append(message)
    return spelled


def _described(messages: list[Message], tools: Tools | None) -> list[Message]:
    """The messages with the functions' description in the system's."""
    if not tools:
        return messages
    lines = [json.dumps(tool.get("function"), ensure_ascii=False) for tool in _plain_json(tools)]
    text = ADVICE.format(tools="\n".join(lines))
    if messages and messages[0].get("role") == "system":
        return [{**messages[0], "content": f"{_content_text(messages[0])}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _calls_of(message: Message) -> list[tuple[Mapping[str, Any], str, str]]:
    """Each call of an answer, its function's name and its arguments."""
    try:
        found = [(call, call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        if all(isinstance(call, Mapping) and isinstance(name + text, str) for call, name, text in found):
            return found
    except (TypeError, KeyError):
        pass
    raise RequestError("tool_calls must be calls of functions, each with a name and arguments, which are JSON's text")


def _content_text(message: Message) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise RequestError("the content of a message must be a string or a list of text parts")
    return "\n".join(text_of(part, "a message") for part in content)


def _plain_json(tools: Tools | None) -> Any:
    """Tools as a template gets them, without lone surrogates."""
    try:
        return json.loads(json.dumps(without_surrogates(tools))) if tools else None
    except (TypeError, ValueError, RecursionError):
        raise RequestError("tools hold something that JSON cannot") from None
