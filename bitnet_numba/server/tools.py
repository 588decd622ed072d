"""The functions that a request lets the model call, and the grammar of the calls."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_numba.errors import RequestError
from bitnet_numba.grammar import ONE_LINE, Grammar, without_other_properties
from bitnet_numba.server.errors import ApiError, from_request_error
from bitnet_numba.server.schemas import ChatBody, FunctionTool, NamedFunction, NamedTool, ResponseBody, Tool
from bitnet_numba.text.thoughts import ThoughtReader

MAX_CALLS = 16  # of an answer
NAMED = '{"name": "'  # with what a call begins
SPACE = "/[ \\n]?/"  # before the first one
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolUse:
    """What an answer may call."""

    described: list[dict[str, Any]]  # the functions, for the prompt
    grammar: Grammar


def uses_tools(body: ChatBody | ResponseBody, form: str | None) -> bool:
    """Whether an answer may be a call. form: the field that gives answers a form, if there is one.

    Raises ApiError for a choice that does not fit the tools or the form.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice", code="invalid_value")
        return False
    if choice in (None, "auto") and form is not None:
        reason = f"{form} and tools go together only if tool_choice says which of them the answer is"
        raise ApiError(400, reason, param=form, code="unsupported_parameter")
    return choice != "none"


def read_tools(body: ChatBody | ResponseBody, tags: tuple[str, str], thoughts: ThoughtReader | None = None) -> ToolUse:
    """The tools of a body that uses some; tags: what stands before and after a call. thoughts: what will tell the
    thought of an answer apart; None where there is none.

    Raises ApiError, naming the field, for two functions of one name, a bad schema, or a choice that is none of them.
    """
    given: Sequence[Tool | FunctionTool] = body.tools or []
    tools = [_Named(f"tools.{number}", tool) for number, tool in enumerate(given)]
    choice, names = body.tool_choice, [tool.function.name for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            field = f"{tools[number].field}.name"
            raise ApiError(400, f"{field}: there are two functions {name}", param=field, code="invalid_value")
    schemas = [_schema(tool) for tool in tools]
    callable = list(zip(names, schemas, strict=True))
    most = MAX_CALLS if body.parallel_tool_calls is not False else 1
    if isinstance(choice, NamedTool | NamedFunction):
        wanted = choice.function.name if isinstance(choice, NamedTool) else choice.name
        callable, most = [pair for pair in callable if pair[0] == wanted], 1
        if not callable:
            reason = f"tool_choice: there is no function {wanted!r} in tools"
            raise ApiError(400, reason, param="tool_choice", code="invalid_value")
    described = [tool.described() for tool in tools]
    try:
        grammar = Grammar.lark(call_grammar(callable, tags, most, choice in (None, "auto"), _before(thoughts)))
    except RequestError as error:
        raise from_request_error(error, "tools") from None
    return ToolUse(described, grammar)


class _Named:
    """A function in a request, and the field that it stands in."""

    def __init__(self, field: str, tool: Tool | FunctionTool):
        if isinstance(tool, Tool):
            self.field, self.function = f"{field}.function", tool.function
        else:
            self.field, self.function = field, tool

    def described(self) -> dict[str, Any]:
        """For the prompt."""
        known = {"name", "description", "parameters"}
        function = self.function.model_dump(include=known, exclude_none=True)
        return {"type": "function", "function": {**function, "parameters": self.function.parameters or NO_PARAMETERS}}


def call_start(tags: tuple[str, str]) -> str:
    """With what an answer that is a call begins, after at most one white space; no other answer does."""
    return tags[0].strip() or "{"


def _before(thoughts: ThoughtReader | None) -> str:
    """What may stand before the first call: a thought, or a white space."""
    thought = thoughts.terminal if thoughts is not None else None
    if thoughts is None or thought is None:
        return SPACE
    return thought if thoughts.thinking else f"{SPACE} | {thought}"


def call_grammar(
    functions: Sequence[tuple[str, dict[str, Any]]],
    tags: tuple[str, str],
    most: int,
    or_text: bool,
    before: str = SPACE,
) -> str:
    """The grammar of up to `most` calls, a line each, in Lark's notation.

    functions: names and the schemas of their arguments. or_text: the answer may also be a text. before: what may stand
    before the first call where it may be one.
    """
    more = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
    lines = [f"start: call{more}", "call: HEAD rest", f"HEAD: {json.dumps(tags[0] + NAMED)}"]
    if or_text:
        lines[0] = f"start: TEXT | FIRST rest{more}"
        lines += [
            f"BEFORE: {before}",
            "FIRST: BEFORE HEAD",
            f"TEXT: /(?s:.*)/ & ~(BEFORE {json.dumps(call_start(tags))} /(?s:.*)/)",
        ]
    for number, (name, schema) in enumerate(functions):
        head, tail = json.dumps(f'{name}", "arguments": '), json.dumps("}" + tags[1])
        lines.append(f"rest_{number}: {head} arguments_{number} {tail}")
        lines.append(f"arguments_{number}: %json {json.dumps(schema)}")
    lines.append("rest: " + " | ".join(f"rest_{number}" for number in range(len(functions))))
    return "\n".join(lines)


def _schema(tool: _Named) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object in one line."""
    given, lenient = {"type": "object", **(tool.function.parameters or NO_PARAMETERS)}, not tool.function.strict
    field = f"{tool.field}.parameters"
    if given["type"] != "object":
        raise ApiError(400, f"{field} must be the schema of an object", param=field, code="invalid_value")
    try:
        Grammar.json_schema(given, lenient)
    except RequestError as error:
        raise from_request_error(error, field) from None
    return {**without_other_properties(given), "x-guidance": {**ONE_LINE, "lenient": lenient}}
