"""Conversations longer than the context: which messages go, and that the rest is the template's text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.engine.overflow import roll
from bitnet_numba.errors import ContextFull
from bitnet_numba.text.chat_template import Message
from tests.engine.toy_backend import TOKENIZER, toy_engine


def message(role: str, size: int) -> dict[str, str]:
    return {"role": role, "content": "a" * size}


def encode(messages: list[Message]) -> list[int]:
    """A token for each character, and two for each message."""
    return [0] * sum(len(m["content"]) + 2 for m in messages)


sizes = st.integers(0, 12)
exchanges = st.lists(st.tuples(sizes, st.lists(sizes, min_size=1, max_size=2)), max_size=8)


@given(st.lists(sizes, max_size=2), exchanges, sizes, st.integers(1, 120), st.one_of(st.none(), st.integers(1, 90)))
def test_as_few_as_possible_go(
    system: list[int], past: list[tuple[int, list[int]]], question: int, capacity: int, max_new_tokens: int | None
) -> None:
    """As trying one after the other would find."""
    head = [message("system", size) for size in system]
    groups = [[message("user", asked), *(message("assistant", size) for size in said)] for asked, said in past]
    groups.append([message("user", question)])
    room = capacity - min(capacity // 4 if max_new_tokens is None else max_new_tokens, capacity // 2)
    for dropped in range(len(groups)):
        left = [*head, *(m for group in groups[dropped:] for m in group)]
        if len(encode(left)) <= room:
            break
    everything = [*head, *(m for group in groups for m in group)]

    def encode_within(messages: Any) -> list[int]:
        ids = encode(messages)
        if len(ids) > capacity:
            raise ContextFull("too long")
        return ids

    if len(encode(left)) > capacity:
        with pytest.raises(ContextFull):
            roll(everything, encode_within, capacity, max_new_tokens)
        return
    ids, count = roll(everything, encode_within, capacity, max_new_tokens)
    assert ids == encode(left) and count == sum(map(len, groups[:dropped])) == len(everything) - len(left)


def talk(turns: int) -> list[dict[str, str]]:
    said = [{"role": "system", "content": "Be brief."}]
    for i in range(turns):
        said += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]
    return [*said, {"role": "user", "content": "And now?"}]


def test_a_long_conversation_goes_on() -> None:
    llm, _ = toy_engine(context=128)
    messages = talk(40)
    with pytest.raises(ContextFull):
        llm.generate(messages, max_new_tokens=20)
    completion = llm.generate(messages, max_new_tokens=20, overflow="roll")
    dropped = completion.dropped_messages
    assert dropped % 2 == 0 and 0 < dropped < 80
    rest = [messages[0], *messages[1 + dropped :]]
    assert completion.stats.prompt_tokens == len(TOKENIZER.encode_chat(rest)) <= 108
    one_more = [messages[0], *messages[dropped - 1 :]]
    assert len(TOKENIZER.encode_chat(one_more)) > 108
    same = llm.generate(rest, max_new_tokens=20, overflow="roll")
    assert same.dropped_messages == 0 and same.text == completion.text
    assert completion.to_dict()["dropped_messages"] == dropped
    # All ways to ask
    assert llm.chat(messages, max_new_tokens=20, overflow="roll").dropped_messages == dropped
    assert llm.session().generate(messages, max_new_tokens=20, overflow="roll").dropped_messages == dropped
    (batched,) = llm.generate_batch([messages], max_new_tokens=20, overflow="roll")
    assert (batched.text, batched.dropped_messages) == (completion.text, dropped)


def test_what_cannot_be_made_shorter_is_refused() -> None:
    llm, _ = toy_engine(context=64)
    for prompt in (talk(0)[:1] + [{"role": "user", "content": "word " * 100}], "word " * 100, [5] * 100):
        with pytest.raises(ContextFull):
            llm.generate(prompt, overflow="roll")


def test_a_long_question_keeps_the_room_that_is_left() -> None:
    llm, _ = toy_engine(context=64)
    messages = [*talk(3)[:-1], {"role": "user", "content": "word " * 20}]
    completion = llm.generate(messages, max_new_tokens=50, overflow="roll")
    assert completion.dropped_messages == 6 and completion.stats.prompt_tokens > 40
