"""The engine over a toy backend and over the reference: endings, stop strings, streaming, bad input."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import bitnet_numba as bn
from bitnet_numba.checkpoint.packed import open_packed, packed_plan
from bitnet_numba.checkpoint.safetensors_file import write_tensors
from bitnet_numba.errors import (
    BackendError,
    ContextFull,
    RequestError,
)
from bitnet_numba.sampling import SamplingParams, sample
from bitnet_numba.text.stop_strings import StopStrings
from bitnet_numba.text.stream_decoder import StreamDecoder
from bitnet_numba.text.tokenizer import Tokenizer
from tests.engine.toy_backend import TOKENIZER, VOCAB, tokens_of, toy_engine, toy_logits
from tests.strategies import sampling, some_ids

EOT = 1999
HI = [{"role": "user", "content": "Hi."}]


# What is generated


@given(some_ids, sampling, st.integers(1, 20), st.sampled_from([0, 1, 3]))
def test_generation_is_the_sampler_over_the_logits(
    ids: list[int], params: SamplingParams, count: int, ahead: int
) -> None:
    llm, _ = toy_engine(ahead=ahead)
    completion = llm.generate(ids, params, max_new_tokens=count)
    history = list(ids)
    for _ in range(count):
        history.append(sample(toy_logits(history), history, params, len(ids)))
        if history[-1] in TOKENIZER.stop_ids:
            break
    stopped = history[-1] in TOKENIZER.stop_ids
    assert completion.token_ids == history[len(ids) : -1 if stopped else None]
    assert completion.finish_reason == ("stop" if stopped else "length")
    assert completion.text == TOKENIZER.decode(completion.token_ids)
    assert completion.stats.generated_tokens == len(history) - len(ids)
    assert completion.stats.prompt_tokens == len(ids) and completion.stats.reused_tokens == 0


@given(some_ids, sampling)
def test_streaming_joins_to_the_generated_text(ids: list[int], params: SamplingParams) -> None:
    llm, _ = toy_engine()
    whole = llm.generate(ids, params, max_new_tokens=12)
    stream = llm.stream(ids, params, max_new_tokens=12)
    assert stream.completion is None
    pieces = list(stream)
    assert stream.completion is not None
    assert "".join(pieces) == whole.text == stream.completion.text
    assert stream.completion.token_ids == whole.token_ids
    assert "" not in pieces


def test_the_same_seed_gives_the_same_tokens_and_none_a_fresh_one() -> None:
    llm, _ = toy_engine()
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0}
    assert llm.generate("x", seed=5, **options).token_ids == llm.generate("x", seed=5, **options).token_ids
    assert llm.generate("x", seed=5, **options).token_ids != llm.generate("x", seed=6, **options).token_ids
    assert llm.generate("x", **options).token_ids != llm.generate("x", **options).token_ids


def test_streams_never_hold_half_a_character() -> None:
    text = "na\u00efve \U0001f642\U0001f680 \u4e2d\u6587"
    script = [i for character in text for i in tokens_of(character)]
    assert len(script) > len(text)
    llm, _ = toy_engine([*script, EOT])
    pieces = list(llm.stream("x"))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_that_stays_unfinished_shows_at_the_end() -> None:
    half = tokens_of("\U0001f642")[:1]
    llm, _ = toy_engine([*tokens_of("ab"), *half, EOT])
    assert llm.generate("x").text == "ab\ufffd" == TOKENIZER.decode([*tokens_of("ab"), *half])


# How answers end


def test_stop_tokens_end_an_answer_and_are_not_part_of_it() -> None:
    llm, _ = toy_engine([*tokens_of("Fine."), EOT, *tokens_of("never")])
    completion = llm.generate(HI)
    assert (completion.text, completion.finish_reason) == ("Fine.", "stop")
    assert completion.token_ids == tokens_of("Fine.")


@given(st.integers(1, 12), st.integers(0, 14), st.sampled_from([0, 2, 5]))
def test_a_full_context_ends_an_answer(prompt: int, room: int, ahead: int) -> None:
    llm, _ = toy_engine(tokens_of("a"), context=prompt + room, ahead=ahead)
    completion = llm.generate([5] * prompt)
    # The last token is sampled from a full context; it need not fit in.
    assert len(completion.token_ids) == room + 1
    assert completion.finish_reason == "context"


def test_length_is_told_from_context() -> None:
    llm, _ = toy_engine(tokens_of("a"), context=20)
    assert llm.generate([5] * 10, max_new_tokens=11).finish_reason == "length"
    assert llm.generate([5] * 10, max_new_tokens=12).finish_reason == "context"
    with pytest.raises(ContextFull, match="the prompt has 21 tokens, but the context holds 20"):
        llm.generate([5] * 21)


def cut_before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The specification: read character by character until a stop string is complete; the longest then goes."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.lists(st.text(alphabet="ab\n", max_size=5), max_size=8), stop_lists)
def test_stop_strings_cut_the_same_however_the_text_is_divided(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    expected, found = cut_before_stop("".join(pieces), stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert expected.startswith(shown)  # nothing is shown that has to be taken back
        if matcher.found:
            break
    assert matcher.found == found
    assert shown + matcher.finish() == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\nUser:"])
    assert [matcher.push(piece) for piece in ("a", "b\n", "\nUs", "e", "!", "c")] == ["a", "b", "\n", "", "\nUse!", "c"]


@given(st.lists(st.integers(0, 1989), min_size=1, max_size=15), st.data())
def test_stop_strings_across_token_borders(script: list[int], data: st.DataObject) -> None:
    text = TOKENIZER.decode(script)
    start = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[start : start + data.draw(st.integers(1, 8))] or "absent"
    llm, _ = toy_engine([*script, EOT])
    completion = llm.generate("x", stop=stop)
    expected, _ = cut_before_stop(text, [stop])
    assert completion.text == expected == "".join(llm.stream("x", stop=[stop]))
    assert completion.finish_reason == "stop"
    # The ids are as many as lie wholly before the cut; where they end, so does a character.
    ids = completion.token_ids
    assert ids == script[: len(ids)] and expected.startswith(TOKENIZER.decode(ids))
    for count in range(len(ids) + 1, len(script) + 1):
        decoder = StreamDecoder(TOKENIZER)
        longer = "".join([decoder.push(i) for i in script[:count]])
        assert decoder.pending or not expected.startswith(longer)


def test_a_model_without_a_template_stops_where_it_plays_the_user() -> None:
    tokenizer = Tokenizer(TOKENIZER._backend, add_bos=True, named_tokens={"eos_token": "<|eot_id|>"})
    llm, _ = toy_engine([*tokens_of(" Fine.\nUser: And you?"), EOT])
    llm.tokenizer = tokenizer
    assert llm.generate(HI).text == " Fine."
    assert llm.generate("Hi.").text == " Fine.\nUser: And you?"


# Bad input


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([VOCAB], "token id 2000 is not in the vocabulary of 2000"),
        ([-1], "token id -1"),
        ([1.5], "must be integers"),
        ([5, "x"], "must be integers"),
        ([{"role": "user"}], "role and a content"),
        ({"role": "user", "content": "Hi."}, "a prompt must be a string"),
        (None, "a prompt must be a string"),
        (5, "a prompt must be a string"),
        (b"Hi.", "a prompt must be a string"),
        ([5, True], "must be integers"),
        (np.array([[5, 6]]), "for several prompts, use generate_batch"),
        (np.array([0.5]), "must be integers"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_used(prompt: Any, message: str) -> None:
    llm, backend = toy_engine()
    for call in (llm.generate, llm.stream, llm.session().generate):
        with pytest.raises(RequestError, match=message):
            call(prompt)
    assert backend.prefilled == []
    assert llm.generate("x", max_new_tokens=1).finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [3]},
        {"stop": b"ab"},
        {"stop": 5},
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"seed": -1},
    ],
    ids=str,
)
def test_options_that_cannot_be_used(options: dict[str, Any]) -> None:
    llm, _ = toy_engine()
    with pytest.raises(RequestError):
        llm.generate("x", **options)


def test_logits_are_teacher_forced_and_checked() -> None:
    llm, backend = toy_engine(context=4)
    logits = llm.logits(np.arange(6))  # the context of conversations does not limit this
    assert logits.shape == (6, VOCAB) and backend.open_contexts == 0
    np.testing.assert_array_equal(logits[2], toy_logits([0, 1, 2]))
    for ids in ([], [VOCAB], [0] * 4097, 5, None, "x", b"x", [True], np.ones((2, 2), int), {1: 2}):
        with pytest.raises(RequestError):
            llm.logits(ids)  # type: ignore[arg-type]


def test_numpy_integers_are_integers() -> None:
    llm, _ = toy_engine()
    want = llm.generate([5, 6], max_new_tokens=3).token_ids
    assert llm.generate(np.array([5, 6], np.int32), max_new_tokens=np.int64(3)).token_ids == want  # type: ignore[arg-type]


def test_weights_that_leave_the_finite_numbers_are_told_in_one_line(tiny_packed: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("norm.weight", "layers.0.qkv.scales", "layers.0.down.scales")):
        folder = Path(shutil.copytree(tiny_packed, tmp_path / str(i)))
        with safe_open(folder / "model.safetensors", "np") as file:
            metadata = file.metadata()
        checkpoint = open_packed(folder)
        tensors = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}
        tensors[name][:] = 3e38
        plan = packed_plan(checkpoint.config, checkpoint.embed, checkpoint.head)
        with open(tmp_path / "changed", "wb") as out:
            write_tensors(out, plan, tensors.items(), metadata)
        (tmp_path / "changed").replace(folder / "model.safetensors")
        llm = bn.load(folder, backend="reference")  # warnings of NumPy's would be errors here
        for call in (
            lambda llm=llm: llm.generate("hello there"),
            lambda llm=llm: llm.generate("hello there", temperature=1.0, min_p=0.1, seed=1),
            lambda llm=llm: llm.generate_batch(["hello there"], bn.SamplingParams(1.0, min_p=0.1)),
            lambda llm=llm: llm.logits([5, 6]),
        ):
            with pytest.raises(BackendError, match="numbers that are not finite") as caught:
                call()
            assert "\n" not in str(caught.value)
