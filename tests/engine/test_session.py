"""Sessions over a toy backend: what is computed, and what is kept."""

import gc
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.engine.session import common_prefix
from bitnet_numba.errors import (
    RequestError,
)
from bitnet_numba.sampling import SamplingParams
from tests.engine.toy_backend import TOKENIZER, tokens_of, toy_engine
from tests.strategies import some_ids

EOT = 1999
HI = [{"role": "user", "content": "Hi."}]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_a_turn_computes_only_its_new_tokens(ahead: int) -> None:
    answer = tokens_of("Hello")  # after "Assistant: " an encoder would join the space: the ids must be kept
    llm, backend = toy_engine([*answer, EOT], context=4096, ahead=ahead)
    talk = Conversation(llm, SamplingParams(), system="Be kind.")
    turn = tokens_of("<|eot_id|>User: And then?<|eot_id|>Assistant: ")
    for i in range(20):
        assert "".join(talk.ask("And then?")) == "Hello"
        assert talk.last is not None
        stats = talk.last.stats
        assert stats.prompt_tokens - stats.reused_tokens == backend.prefilled[-1]
        if i:
            assert backend.prefilled[-1] == len(turn)
    assert talk.session.held > 20 * len(turn)


@given(st.lists(st.tuples(some_ids, st.integers(1, 6)), min_size=1, max_size=6), st.integers(0, 3), st.data())
def test_a_session_says_what_a_fresh_one_would(
    turns: list[tuple[list[int], int]], ahead: int, data: st.DataObject
) -> None:
    llm, backend = toy_engine(ahead=ahead)
    session = llm.session()
    held: list[int] = []
    for ids, count in turns:
        kept = data.draw(st.integers(0, len(held)))  # continue, go back some way, or start over
        prompt = [*held[:kept], *ids]
        completion = session.generate(prompt, SamplingParams(0.9, seed=3), max_new_tokens=count)
        reused = completion.stats.reused_tokens
        assert backend.prefilled[-1] == len(prompt) - reused
        # Whatever was given or said before is found again; of an answer, the last token may not have been computed.
        assert reused >= min(kept, len(held) - 1, len(prompt) - 1)
        fresh = llm.generate(prompt, max_new_tokens=count, temperature=0.9, seed=3)
        assert completion.token_ids == fresh.token_ids and completion.text == fresh.text
        held = [*prompt, *completion.token_ids]
        assert session.held <= len(held)


def test_the_same_prompt_again_computes_one_token() -> None:
    llm, backend = toy_engine()
    with llm.session() as session:
        first = session.generate(HI, max_new_tokens=5)
        assert session.generate(HI, max_new_tokens=5).token_ids == first.token_ids
        assert backend.prefilled[-1] == 1
        session.clear()
        session.generate(HI, max_new_tokens=5)
        assert backend.prefilled[-1] == backend.prefilled[0]
        assert backend.open_contexts == 2 - 1
    assert backend.open_contexts == 0


def test_closing_a_stream_keeps_what_was_shown() -> None:
    llm, backend = toy_engine(tokens_of("one two three four five"))
    session = llm.session()
    stream = session.stream("x")
    shown = next(stream) + next(stream)
    with pytest.raises(RequestError, match="still answering"):
        session.stream("y")
    stream.close()
    assert stream.completion is not None
    assert (stream.completion.text, stream.completion.finish_reason) == (shown, "interrupted")
    assert TOKENIZER.decode(stream.completion.token_ids) == shown
    session.generate([*TOKENIZER.encode("x"), *stream.completion.token_ids, 7], max_new_tokens=1)
    assert backend.prefilled[-1] <= 2  # the token that was not fed yet, and the new one


def test_an_abandoned_stream_frees_its_session() -> None:
    llm, _ = toy_engine()
    session = llm.session()
    next(session.stream("x"))  # dropped at once
    gc.collect()
    assert session.generate("y", max_new_tokens=1).stats.generated_tokens == 1


def test_a_step_that_fails_leaves_a_usable_session() -> None:
    llm, backend = toy_engine()
    session = llm.session()
    good = session.generate("x", max_new_tokens=4).token_ids
    backend.fail_after = 2
    with pytest.raises(ValueError, match="a step failed"):
        session.generate("x", max_new_tokens=4)
    assert session.held == 0
    backend.fail_after = None
    assert session.generate("x", max_new_tokens=4).token_ids == good


def test_streams_of_one_engine_do_not_disturb_each_other() -> None:
    llm, backend = toy_engine()
    alone = [llm.generate(text, max_new_tokens=8).text for text in ("x", "y")]
    assert backend.open_contexts == 1  # one context serves all that come one after the other
    first, second = llm.stream("x", max_new_tokens=8), llm.stream("y", max_new_tokens=8)
    pairs = list(itertools.zip_longest(first, second, fillvalue=""))
    assert ["".join(pieces) for pieces in zip(*pairs, strict=True)] == alone
    assert backend.open_contexts == 2


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == len(a) or n == len(b) or a[n] != b[n])


def test_streams_that_never_begin_take_no_context() -> None:
    llm, backend = toy_engine()
    streams = [llm.stream("x") for _ in range(20)]
    assert backend.open_contexts == 0
    streams[0].close()
    with pytest.raises(RequestError, match="closed before it generated anything"):
        streams[0].result()
    next(streams[1])
    assert backend.open_contexts == 1
    del streams
    gc.collect()
    llm.generate("x", max_new_tokens=1)
    assert backend.open_contexts == 1


def test_a_closed_session_says_so() -> None:
    llm, backend = toy_engine()
    session = llm.session()
    waiting = session.stream("x")
    running = session.stream("y")
    next(running)
    with pytest.raises(RequestError, match="still answering"):
        next(waiting)
    session.close()  # the running stream goes on
    assert next(running) and backend.open_contexts == 1
    running.close()
    assert backend.open_contexts == 0 and session.held == 0
    session.close()
    session.clear()
    with pytest.raises(RequestError, match="session is closed"):
        session.generate("x")
