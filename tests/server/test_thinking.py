"""Thinking models over HTTP: the switch, and thoughts as reasoning_content."""

from collections.abc import Iterator

import pytest

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
    begun = [
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
