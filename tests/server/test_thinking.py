"""Thinking models over HTTP: the switch, and thoughts as reasoning_content or items of type reasoning."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses import Response

from bitnet_numba.server.schemas import ChatBody
from bitnet_numba.server.tools import read_tools
from bitnet_numba.text.thoughts import ThoughtReader
from tests.engine.test_thinking import ALWAYS, SWITCH, thinking_engine
from tests.engine.toy_backend import TOKENIZER, tokens_of
from tests.server.helpers import Running, serving

PATH = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi."}]}


@pytest.fixture(scope="module")
def thinker() -> Iterator[Running]:
    with serving(thinking_engine) as running:
        yield running


def joined(events: list, field: str) -> str:
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["delta"].get(field) or "" for choice in choices)


def test_thoughts_are_told_from_answers(thinker: Running) -> None:
    message = thinker.post(PATH, BODY).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm." and message["content"] == "Yes."
    events = thinker.events(PATH, BODY)
    assert joined(events, "reasoning_content") == "Hm." and joined(events, "content") == "Yes."


def test_a_thought_that_the_template_begins() -> None:
    with serving(lambda: thinking_engine(ALWAYS, "Hm.\n</think>\n\nYes.")) as running:
        message = running.post(PATH, BODY).json()["choices"][0]["message"]
        assert message["reasoning_content"] == "Hm." and message["content"] == "Yes."
        events = running.events(PATH, {**BODY, "max_tokens": 2})
        assert joined(events, "reasoning_content") and not joined(events, "content")


@pytest.mark.parametrize(
    ("template", "begun", "said", "thought", "answer"),
    [
        (ALWAYS, "Yes, ", "it is.", None, "it is."),
        (ALWAYS, [{"type": "text", "text": "Yes, "}], "it is. </think>", None, "it is. </think>"),
        (SWITCH, "<think>\nHm,", " so.</think>\n\nYes.", " so.", "Yes."),
        (SWITCH, "", "<think>Hm.</think>Yes.", "Hm.", "Yes."),
    ],
)
def test_an_answer_that_is_continued(template: str, begun: object, said: str, thought: str | None, answer: str) -> None:
    with serving(lambda: thinking_engine(template, said)) as running:
        for tools in ([], [{"type": "function", "function": {"name": "look"}}]):
            body = {"messages": [*BODY["messages"], {"role": "assistant", "content": begun}], "tools": tools}
            message = running.post(PATH, body).json()["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == (thought, answer)
            events = running.events(PATH, body)
            assert (joined(events, "reasoning_content") or None, joined(events, "content")) == (thought, answer)


def test_answers_with_functions_may_think(thinker: Running) -> None:
    function = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    body = {**BODY, "tools": [function]}
    message = thinker.post(PATH, body).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm." and message["content"] == "Yes."
    events = thinker.events(PATH, body)
    assert joined(events, "reasoning_content") == "Hm." and joined(events, "content") == "Yes."


CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
THOUGHT = "Hm, <tool_call> </thin\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        (CALL, True),
        (f"{CALL}\n{CALL}", True),
        ("Yes. <tool_call>", True),
        ("</think> <tool_call>", True),  # the thought ends where it first can
        ("<tool_call> is a tag", False),
        ("\u3000<tool_call> is a tag", False),
        (CALL.replace("look", "leap"), False),
        (CALL.replace('"x"', "1"), False),
        (CALL.replace(": {", ":{"), False),
    ],
)
def test_after_a_thought_calls_have_their_form(text: str, accepted: bool) -> None:
    """As without one: else what began like a call, and was none, would be neither content nor a call."""
    parameters = {"type": "object", "properties": {"at": {"type": "string"}}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    body = ChatBody.model_validate({**BODY, "tools": tools})
    ended, answering = ThoughtReader(True), ThoughtReader()
    ended.push("Hm.</think>")
    answering.push("So, ")
    begun = [
        (ended, ""),
        (ended, "\n\n"),
        (answering, ""),
        (None, ""),
        (ThoughtReader(), ""),
        (ThoughtReader(), f"\n<think>{THOUGHT}"),
        (ThoughtReader(True), THOUGHT),
    ]
    for reader, before in begun:
        grammar = read_tools(body, ("<tool_call>\n", "\n</tool_call>"), reader).grammar
        constraint = TOKENIZER.grammars.compile(grammar).constraint()
        assert all(map(constraint.accept, tokens_of(before)))
        if before or accepted:
            assert all(map(constraint.accept, tokens_of(text))) == accepted, before


def test_a_thought_that_has_not_ended_is_no_call() -> None:
    reader, tools = ThoughtReader(True), [{"type": "function", "function": {"name": "look"}}]
    grammar = read_tools(ChatBody.model_validate({**BODY, "tools": tools}), ("", ""), reader).grammar
    constraint = TOKENIZER.grammars.compile(grammar).constraint()
    assert all(map(constraint.accept, tokens_of('{"name": "leap"} </think> Yes.')))


def test_the_switch(thinker: Running) -> None:
    def prompt_tokens(**fields: object) -> int:
        return thinker.post(PATH, {**BODY, **fields}).json()["usage"]["prompt_tokens"]

    usual = prompt_tokens()
    assert prompt_tokens(chat_template_kwargs={"enable_thinking": False}) > usual
    for same in ({}, {"enable_thinking": True}, {"enable_thinking": None, "other": None}, None):
        assert prompt_tokens(chat_template_kwargs=same) == usual


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"enable_thinking": 1}, "chat_template_kwargs.enable_thinking must be true or false"),
        ({"thinking_budget": 5}, "chat_template_kwargs.thinking_budget: this server does not support it"),
    ],
)
def test_what_is_refused(thinker: Running, given: dict, message: str) -> None:
    response = thinker.post(PATH, {**BODY, "chat_template_kwargs": given})
    assert response.status_code == 400 and response.json()["error"]["message"] == message


def test_a_model_without_the_switch(server: Running) -> None:
    response = server.post(PATH, {**BODY, "chat_template_kwargs": {"enable_thinking": False}})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "chat_template_kwargs"
    assert "no switch for thinking" in error["message"]
    message = server.post(PATH, {**BODY, "max_tokens": 3}).json()["choices"][0]["message"]
    assert "reasoning_content" not in message


RESPONSES = "/v1/responses"
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}


def check_events(running: Running, body: dict[str, Any], whole: dict[str, Any]) -> None:
    """The events of a response, which is `whole` but for ids and time: each item is added, grows, and is done."""
    text = running.post(RESPONSES, {**body, "stream": True}).text
    events = [json.loads(event.partition("\ndata: ")[2]) for event in text.split("\n\n")[:-1]]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == f"response.{whole['status']}"
    output = events[-1]["response"]["output"]
    for item, other in zip(output, whole["output"], strict=True):
        assert {**other, **{key: item[key] for key in item if "id" in key}} == item
    details = [each["usage"]["output_tokens_details"] for each in (events[-1]["response"], whole)]
    assert details[0] == details[1]
    for index, item in enumerate(output):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added" and own[0]["item"]["type"] == item["type"]
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1]["type"] == "response.output_item.done" and own[-1]["item"] == item
        said = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        assert said == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert {event["item_id"] for event in own if "item_id" in event} <= {item["id"]}


@pytest.mark.parametrize("tools", [[], [LOOK]], ids=["text", "functions"])
@pytest.mark.parametrize(
    ("template", "said", "thought", "answer", "tokens"),
    [
        (SWITCH, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes.", "<think>\nHm.\n</think>"),
        (ALWAYS, "Hm.\n</think>\n\nYes.", "Hm.", "Yes.", "Hm.\n</think>"),
        (SWITCH, "Yes.", "", "Yes.", ""),
        (SWITCH, "<think>\n</think>\n\nYes.", "", "Yes.", ""),
        (SWITCH, "<think>\nHm.\n</think>", "Hm.", "", "<think>\nHm.\n</think>"),
    ],
)
def test_a_response_has_its_thought(
    template: str, said: str, thought: str, answer: str, tokens: str, tools: list[Any]
) -> None:
    with serving(lambda: thinking_engine(template, said)) as running:
        body = {"input": "Hi.", "tools": tools}
        whole = running.post(RESPONSES, body).json()
        Response.model_validate(whole)
        kinds = [item["type"] for item in whole["output"]]
        assert kinds == (["reasoning", "message"] if thought else ["message"])
        if thought:
            assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": thought}]
        assert whole["output"][-1]["content"][0]["text"] == answer
        assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == len(tokens_of(tokens))
        check_events(running, body, whole)


def test_a_response_that_calls_after_a_thought() -> None:
    call = '{"name": "look", "arguments": {}}'  # without the tags of templates that know functions
    with serving(lambda: thinking_engine(SWITCH, f"<think>{THOUGHT}{call}")) as running:
        body = {"input": "Hi.", "tools": [LOOK]}
        whole = running.post(RESPONSES, body).json()
        assert [item["type"] for item in whole["output"]] == ["reasoning", "function_call"]
        assert whole["output"][1]["name"] == "look"
        check_events(running, body, whole)


def test_a_response_that_is_cut_amid_its_thought(thinker: Running) -> None:
    body = {"input": "Hi.", "max_output_tokens": len(tokens_of("<think>\nH"))}
    whole = thinker.post(RESPONSES, body).json()
    (item,) = whole["output"]
    assert (item["type"], item["status"], item["content"][0]["text"]) == ("reasoning", "incomplete", "H")
    assert whole["status"] == "incomplete"
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == whole["usage"]["output_tokens"]
    check_events(thinker, body, whole)


def test_a_response_goes_back_as_input(thinker: Running) -> None:
    """Thoughts are not read again; a conversation of nothing else is none."""
    first = thinker.post(RESPONSES, {"input": "Hi."}).json()
    asked = {"role": "user", "content": "Hi."}
    turns = [asked, *first["output"], {"role": "user", "content": "And?"}]
    plain = [asked, {"role": "assistant", "content": "Yes."}, turns[-1]]
    with_thought, without = (thinker.post(RESPONSES, {"input": each}).json() for each in (turns, plain))
    assert with_thought["usage"]["input_tokens"] == without["usage"]["input_tokens"]
    response = thinker.post(RESPONSES, {"input": first["output"][:1]})
    assert response.status_code == 400 and response.json()["error"]["message"] == "input has no message"


def test_a_response_has_the_switch(thinker: Running) -> None:
    usual, without = (
        thinker.post(RESPONSES, {"input": "Hi.", "chat_template_kwargs": {"enable_thinking": thinking}}).json()
        for thinking in (None, False)
    )
    assert usual["usage"]["input_tokens"] < without["usage"]["input_tokens"]


def test_a_response_with_a_form_has_no_thought(thinker: Running) -> None:
    body = {"input": "Hi.", "text": {"format": {"type": "json_object"}}, "max_output_tokens": 3}
    assert [item["type"] for item in thinker.post(RESPONSES, body).json()["output"]] == ["message"]
