"""OpenAI's newer interface, by its own client and as raw JSON."""

import json

import openai
import pytest
from openai.types.responses import Response

from tests.server.helpers import Running

PATH = "/v1/responses"
TEXT = "Tell me a story about a fox and a lantern."
BODY = {"input": TEXT, "seed": 3, "max_output_tokens": 40, "temperature": 0.8}


def chat_text(server: Running, messages: list) -> str:
    """What the older interface answers."""
    body = {"messages": messages, "seed": 3, "max_tokens": 40, "temperature": 0.8}
    return server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]


def test_a_response_is_the_chats_answer(server: Running) -> None:
    answer = Response.model_validate(server.post(PATH, BODY).json())
    assert answer.output_text == chat_text(server, [{"role": "user", "content": TEXT}])
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 40 and answer.temperature == 0.8


def test_messages_and_instructions(server: Running) -> None:
    turns = [("user", "Hello!"), ("assistant", "Hello!"), ("user", TEXT)]
    parts = [
        {"role": role, "content": [{"type": "output_text" if role == "assistant" else "input_text", "text": text}]}
        for role, text in turns
    ]
    plain = [{"type": "message", "role": role, "content": text} for role, text in turns]
    expected = chat_text(
        server, [{"role": "system", "content": "Be brief."}, *[{"role": r, "content": t} for r, t in turns]]
    )
    for given in (parts, plain):
        answer = server.post(PATH, {**BODY, "input": given, "instructions": "Be brief."})
        assert Response.model_validate(answer.json()).output_text == expected


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="bitnet-demo", input=TEXT, extra_body={"seed": 3})
    events = list(client.responses.create(model="bitnet-demo", input=TEXT, extra_body={"seed": 3}, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and len(deltas) > 2
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text and events[-1].response.usage == whole.usage
    with client.responses.stream(model="bitnet-demo", input=TEXT, extra_body={"seed": 3}) as stream:
        assert stream.get_final_response().output_text == whole.output_text


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"truncation": "sometimes"}, "truncation"),
    ],
)
def test_what_is_refused(server: Running, fields: dict, param: str) -> None:
    response = server.post(PATH, {**BODY, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"].startswith(param)


def test_long_conversations_lose_their_beginning_if_that_is_asked(server: Running) -> None:
    turns = [
        {"role": role, "content": f"{number} " + "fox " * 120} for number in range(12) for role in ("user", "assistant")
    ]
    long = {**BODY, "input": [*turns, {"role": "user", "content": TEXT}]}
    assert server.post(PATH, long).json()["error"]["code"] == "context_length_exceeded"
    answer = server.post(PATH, {**long, "truncation": "auto"}).json()
    dropped = answer["usage"]["input_tokens_details"]["dropped_messages"]
    assert 0 < dropped < 24 and dropped % 2 == 0 and answer["truncation"] == "auto"
    chat = {"messages": long["input"], "max_tokens": 40, "truncation": "auto"}
    usage = server.post("/v1/chat/completions", chat).json()["usage"]
    assert usage["prompt_tokens_details"]["dropped_messages"] == dropped and json.dumps(usage)
