"""Functions that the model may call in /v1/responses, by OpenAI's client and as raw JSON."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall

from bitnet_numba.server.responses import list_messages
from bitnet_numba.server.schemas import ResponseBody
from tests.engine.toy_backend import toy_engine
from tests.server.helpers import Running, serving

PATH, CHAT = "/v1/responses", "/v1/chat/completions"
ASK = "What is the weather in Rome?"
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", **WEATHER, "strict": True}, {"type": "function", "name": "now"}]
BODY: dict[str, Any] = {"input": ASK, "tools": TOOLS, "seed": 3, "temperature": 1, "max_output_tokens": 120}
ONE = {"type": "function", "name": "get_weather"}


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    """A model whose answers have no form of their own."""
    with serving(lambda: toy_engine(context=1024)[0], models=("bitnet-demo",)) as running:
        yield running


def calls(response: Response) -> list[tuple[str, str]]:
    """Names and arguments, of an answer that is nothing but calls."""
    assert response.output and response.output_text == ""
    found = []
    for item in response.output:
        assert isinstance(item, ResponseFunctionToolCall) and item.call_id.startswith("call_")
        found.append((item.name, item.arguments))
    return found


@pytest.mark.parametrize("choice", ["required", ONE])
def test_calls_are_those_of_a_chat(server: Running, toy: Running, choice: Any) -> None:
    for running in (server, toy):
        for seed in range(3):
            fields = {"seed": seed, "parallel_tool_calls": seed == 0, "temperature": 1}
            answer = running.post(PATH, {**BODY, **fields, "tool_choice": choice}).json()
            response = Response.model_validate(answer)
            tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in TOOLS]
            chat_choice = choice if choice == "required" else {"type": "function", "function": {"name": choice["name"]}}
            chat = {"messages": [{"role": "user", "content": ASK}], "tools": tools, "tool_choice": chat_choice}
            (same,) = running.post(CHAT, {**chat, **fields, "max_tokens": 120}).json()["choices"]
            expected = [(c["function"]["name"], c["function"]["arguments"]) for c in same["message"]["tool_calls"]]
            assert calls(response) == expected
            complete = same["finish_reason"] == "tool_calls"
            assert response.status == ("completed" if complete else "incomplete") == response.output[-1].status
            assert response.parallel_tool_calls == (seed == 0) and answer["tool_choice"] == choice


def test_a_stream_of_calls_is_the_whole_answer_in_pieces(server: Running, toy: Running) -> None:
    counts = set()
    for running in (server, toy):
        for seed in range(4):
            # One of them never stops, so that it has many calls.
            bias = {str(token): -100 for token in running.service.engine.tokenizer.stop_ids} if seed == 3 else {}
            extra = {"seed": seed, "logit_bias": bias}
            body = {**BODY, "tool_choice": "required", "max_output_tokens": 400, **extra}
            whole = Response.model_validate(running.post(PATH, body).json())
            fields = {"tools": TOOLS, "tool_choice": "required", "temperature": 1, "max_output_tokens": 400}
            with (
                openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
                client.responses.stream(model="bitnet-demo", input=ASK, extra_body=extra, **fields) as stream,
            ):
                events = list(stream)
                final = events[-1].response
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert calls(final) == calls(whole) and final.usage == whole.usage and final.status == whole.status
            counts.add(len(final.output))
            for number, item in enumerate(final.output):
                own = [event for event in events if getattr(event, "output_index", None) == number]
                kinds = [event.type.removeprefix("response.") for event in own]
                assert kinds[0] == "output_item.added" and kinds[-2:] == [
                    "function_call_arguments.done", "output_item.done",
                ]  # fmt: skip
                deltas = [event.delta for event in own if event.type == "response.function_call_arguments.delta"]
                assert "".join(deltas) == item.arguments == own[-2].arguments and len(kinds) == 3 + len(deltas)
                assert (own[0].item.name, own[0].item.call_id) == (item.name, item.call_id)
                assert own[0].item.arguments == "" and own[-1].item.status == item.status
    assert min(counts) == 1 < max(counts)


def test_a_model_that_may_call_or_not(server: Running) -> None:
    text = Response.model_validate(server.post(PATH, BODY).json())
    assert text.output_text and text.output[0].type == "message" and text.status == "completed"
    events = server.client.post(PATH, json={**BODY, "stream": True}).text.split("\n\n")[:-1]
    data = [json.loads(event.split("\ndata: ")[1]) for event in events]
    assert (
        "".join(event["delta"] for event in data if event["type"] == "response.output_text.delta") == text.output_text
    )
    assert data[-1]["response"]["output"][0]["content"] == [part.model_dump() for part in text.output[0].content]
    none = server.post(PATH, {**BODY, "tool_choice": "none"}).json()
    assert none["output"][0]["content"] == server.post(PATH, {**BODY, "tools": []}).json()["output"][0]["content"]
    brace = server.post("/tokenize", {"prompt": "{", "add_special_tokens": False}).json()["tokens"]
    cut = server.post(PATH, {**BODY, "logit_bias": {str(brace[0]): 100}, "max_output_tokens": 1}).json()
    assert cut["status"] == "incomplete" and cut["output"][0]["type"] == "message", "a call whose name was not written"


@pytest.mark.parametrize("tokens", [1, 3, 5, 8])
def test_a_stream_that_is_cut_before_a_name_has_the_text_of_the_whole_answer(toy: Running, tokens: int) -> None:
    body = {**BODY, "tool_choice": "required", "max_output_tokens": tokens}
    (item,) = toy.post(PATH, body).json()["output"]
    text = item["content"][0]["text"]
    assert text and '{"name": "get_weather", "arguments": '.startswith(text)
    events = toy.client.post(PATH, json={**body, "stream": True}).text.split("\n\n")[:-1]
    data = [json.loads(event.split("\ndata: ")[1]) for event in events]
    assert "".join(event["delta"] for event in data if event["type"] == "response.output_text.delta") == text


def test_openais_client_goes_on_with_the_results(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="bitnet-demo", input=ASK, tools=TOOLS, tool_choice=ONE)
    (call,) = answer.output
    turns = [{"role": "user", "content": ASK}, call, {
        "type": "function_call_output", "call_id": call.call_id, "output": "Rain."
    }]  # fmt: skip
    last = client.responses.create(model="bitnet-demo", input=turns, tools=TOOLS, tool_choice="none")
    assert last.output_text
    messages = [
        {"role": "user", "content": ASK},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        ]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "Rain."},
    ]  # fmt: skip
    chat = client.chat.completions.create(model="bitnet-demo", messages=messages)
    assert chat.usage.prompt_tokens == last.usage.input_tokens


def test_calls_and_results_become_messages() -> None:
    call = {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "Noon."}]}
    items = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Wait."}, call, {**call, "call_id": "b"},
        result, {**result, "call_id": "b", "output": "One."}, call,
    ]  # fmt: skip
    messages = list_messages(ResponseBody.model_validate({"input": items, "instructions": "Be brief."}))
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert messages[2].content == "Wait." and [c.id for c in messages[2].tool_calls or ()] == ["a", "b"]
    assert messages[3].content == [{"type": "text", "text": "Noon."}] and messages[4].content == "One."
    assert [message.model_dump().get("tool_call_id") for message in messages[3:5]] == ["a", "b"]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "two words"}]}, "tools.0.name"),
        ({"tools": [*TOOLS, TOOLS[1]]}, "tools.2.name"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "x"}}]}, "tools.0.parameters"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input.0.arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input.0.output"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image"}]}]},
            "input.0.output",
        ),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),  # and nothing else
        ({"input": [{"type": "file_search_call", "id": "a"}]}, "input.0"),
    ],
)
def test_what_is_refused(server: Running, fields: dict[str, Any], param: str) -> None:
    response = server.post(PATH, {**BODY, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param), response.text
