"""Functions that the model may call, over HTTP and with OpenAI's client."""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from bitnet_numba.server.schemas import ChatBody
from bitnet_numba.server.tools import read_tools
from tests.engine.toy_backend import toy_engine
from tests.server.helpers import Running, serving

PATH = "/v1/chat/completions"
CITY = {"type": "string", "enum": ["Paris", "Rome"]}
WEATHER = {
    "name": "get_weather",
    "description": "The weather <|eot_id|> of a city",
    "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, {"name": "now"})]
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]
BODY: dict[str, Any] = {"messages": ASK, "tools": TOOLS, "seed": 3, "temperature": 1, "max_tokens": 120}


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    """A model whose answers have no form of their own."""
    with serving(lambda: toy_engine(context=1024)[0]) as running:
        yield running


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and arguments, which must be as the functions say."""
    found = []
    for call in choice["message"].get("tool_calls", []):
        arguments = json.loads(call["function"]["arguments"])
        weather = call["function"]["name"] == "get_weather"
        assert arguments in ({"city": "Paris"}, {"city": "Rome"}) if weather else arguments == {}
        found.append((call["function"]["name"], arguments))
    return found


def streamed(events: list) -> dict[str, Any]:
    """A stream's first choice, put together as clients do."""
    chunks = [ChatCompletionChunk.model_validate(event) for event in events if event != "[DONE]"]
    content, calls, reason = None, list[dict[str, Any]](), None
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        if choice.delta.content is not None:
            content = (content or "") + choice.delta.content
        for part in choice.delta.tool_calls or []:
            if part.id is not None:
                assert part.index == len(calls) and part.type == "function"
                calls.append({"id": part.id, "function": {"name": part.function.name, "arguments": ""}})
            calls[part.index]["function"]["arguments"] += part.function.arguments
        reason = choice.finish_reason or reason
    message = {"content": content} | ({"tool_calls": calls} if calls else {})
    return {"message": message, "finish_reason": reason}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_are_as_the_functions_say_and_streams_equal_whole(server: Running, toy: Running, choice: Any) -> None:
    for running in (server, toy):
        for seed in range(3):
            body = {**BODY, "tool_choice": choice, "seed": seed, "parallel_tool_calls": seed == 0}
            answer = running.post(PATH, body).json()
            ChatCompletion.model_validate(answer)
            (whole,) = answer["choices"]
            assert whole["message"]["content"] is None and whole["finish_reason"] in ("tool_calls", "length")
            stream = streamed(running.events(PATH, body))
            if whole["finish_reason"] == "length":
                continue
            found = calls_of(whole)
            assert found and found == calls_of(stream) and stream["finish_reason"] == "tool_calls"
            assert len(found) == 1 or (seed == 0 and choice == "required")
            assert choice == "required" or found[0][0] == "get_weather"


def test_a_model_that_may_call_or_not(server: Running) -> None:
    whole = server.post(PATH, BODY).json()["choices"][0]
    stream = streamed(server.events(PATH, BODY))
    assert whole["message"]["content"] == stream["message"]["content"] and whole["finish_reason"] == "stop"
    assert "tool_calls" not in whole["message"]
    brace = server.post("/tokenize", {"prompt": "{", "add_special_tokens": False}).json()["tokens"]
    bias = {**BODY, "logit_bias": {str(brace[0]): 100}, "max_tokens": 4}
    assert server.post(PATH, bias).json()["choices"][0]["message"]["content"] is None  # a call has begun


def test_several_choices_with_logprobs(server: Running) -> None:
    body = {**BODY, "tool_choice": "required", "n": 2, "logprobs": True, "parallel_tool_calls": False}
    whole = server.post(PATH, body).json()["choices"]
    events = server.events(PATH, body)[:-1]
    for index, choice in enumerate(whole):
        own = [{"choices": [c for c in event["choices"] if c["index"] == index]} for event in events]
        chunks = [{**event, **mine} for event, mine in zip(events, own, strict=True)]
        assert calls_of(streamed(chunks)) == calls_of(choice)
        found = [c["logprobs"]["content"] for event in own for c in event["choices"] if c["logprobs"]]
        assert sum(found, []) == choice["logprobs"]["content"]


def test_none_is_as_without_tools(server: Running) -> None:
    without = server.post(PATH, {**BODY, "tools": None}).json()
    for same in ({"tool_choice": "none"}, {"tools": []}):
        answer = server.post(PATH, {**BODY, **same}).json()
        assert answer["choices"] == without["choices"] and answer["usage"] == without["usage"]


def test_openais_client_goes_on_with_the_results(client: openai.OpenAI) -> None:
    class Weather(pydantic.BaseModel):
        """The weather of a city."""

        city: str = pydantic.Field(max_length=5)

    tools = [openai.pydantic_function_tool(Weather)]
    options: dict[str, Any] = {"model": "bitnet-demo", "tools": tools, "tool_choice": "required", "seed": 1}
    options["parallel_tool_calls"] = False
    answer = client.chat.completions.parse(messages=ASK, **options).choices[0].message
    call = answer.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(messages=ASK, **options) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.content is None and final.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments
    turns = [*ASK, answer.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    last = client.chat.completions.create(messages=turns, model="bitnet-demo", tools=tools, seed=1)
    assert last.choices[0].finish_reason == "stop" and last.choices[0].message.content


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools.0.function.name"),
        ({"tools": [*TOOLS, TOOLS[1]]}, "tools.2.function.name"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]}, "tools.0"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}, "strict": True}}]},
            "tools.0.function.parameters",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}]}]}, "messages.0.tool_calls.0"),
    ],
)
def test_what_is_refused(server: Running, fields: dict[str, Any], param: str) -> None:
    response = server.post(PATH, {**BODY, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_calls_between_tags() -> None:
    body = ChatBody(messages=ASK, tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False)
    form = read_tools(body, ("<tool_call>\n", "\n</tool_call>")).grammar
    text = toy_engine()[0].generate("x", grammar=form, max_new_tokens=200).text
    assert re.fullmatch(
        r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "(Paris|Rome)"\}\}\n</tool_call>', text
    )
