"""Calls of functions in an answer are read the same whole and in any pieces."""

import json

from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.server.tool_calls import CallReader, ObjectEnd
from bitnet_numba.text.tool_messages import call_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('{}[]"\\\\\n,: a', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('}"a', max_size=3), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text("ab{", max_size=3), VALUES, max_size=3).map(json.dumps)
TAGS = st.sampled_from([("", ""), ("<tool_call>\n", "\n</tool_call>")])


def read(reader: CallReader, pieces: list[str]) -> tuple[str, dict[int, list[str]]]:
    """The text, and each call's name and arguments."""
    text, calls = "", dict[int, list[str]]()
    for piece in pieces:
        more, parts = reader.push(piece)
        text += more
        for part in parts:
            if part.name is not None:
                calls[part.number] = [part.name, ""]
            calls[part.number][1] += part.arguments
    return text + reader.finish(), calls


def cut(text: str, places: list[int]) -> list[str]:
    """A text in pieces."""
    ends = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@given(
    calls=st.lists(st.tuples(st.sampled_from(["f", "get-a_1"]), ARGUMENTS), min_size=1, max_size=3),
    tags=TAGS,
    space=st.sampled_from(["", " ", "\n"]),
    places=st.lists(st.integers(0, 500), max_size=8),
)
def test_calls(calls: list, tags: tuple[str, str], space: str, places: list[int]) -> None:
    text = space + "\n".join(tags[0] + call_text(name, arguments) + tags[1] for name, arguments in calls)
    found = {number: [name, arguments] for number, (name, arguments) in enumerate(calls)}
    reader = CallReader(tags)
    assert read(reader, cut(text, places)) == ("", found) and reader.has_calls
    assert read(CallReader(tags), [text]) == ("", found)


@given(text=st.sampled_from(["", " ", "\n\n{", "Hi", "<tool", "<", " <b>", "a {"]), places=st.lists(st.integers(0, 9)))
def test_texts(text: str, places: list[int]) -> None:
    reader = CallReader(("<tool_call>\n", "\n</tool_call>"))
    assert read(reader, cut(text, places)) == (text, {}) and not reader.has_calls
    assert read(CallReader(("", "")), cut(text, places)) == (text, {})


@given(arguments=ARGUMENTS, rest=st.text(max_size=3))
def test_the_end_of_an_object(arguments: str, rest: str) -> None:
    assert ObjectEnd().find(arguments + rest) == len(arguments)
    assert ObjectEnd().find(arguments[:-1]) is None
