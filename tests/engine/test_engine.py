"""Engine and sessions over a toy backend and over the reference: endings, stop strings, streaming, reuse, bad input."""

import gc
import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import bitnet_numba as bn
from bitnet_numba.backends.reference import reference_backend
from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed, packed_plan
from bitnet_numba.checkpoint.safetensors_file import write_tensors
from bitnet_numba.engine import loading
from bitnet_numba.engine.session import common_prefix
from bitnet_numba.errors import (
    BackendError,
    BitNetError,
    CheckpointError,
    ContextFull,
    RequestError,
    TokenizerError,
)
from bitnet_numba.sampling import SamplingParams, read_sampling, sample
from bitnet_numba.text import tokenizer_files
from bitnet_numba.text.stop_strings import StopStrings
from bitnet_numba.text.tokenizer import StreamDecoder, Tokenizer
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


# Sessions: what is computed, and what is kept


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


# Loading, and the reference backend


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is limited on Linux")
def test_a_tokenizer_that_ends_its_process_is_refused(
    tiny_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder that somebody else converted: one that makes a text so long that it takes all memory there is."""
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer_files, "_TRIAL", tokenizer_files._TRIAL.replace("1 << 32", "1 << 30"))  # bytes
    folder = Path(shutil.copytree(tiny_packed, tmp_path / "model"))
    bn.load(folder, backend="reference").close()
    raw = json.loads((folder / "tokenizer.json").read_text())
    longer = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 100_000}
    raw["normalizer"] = {"type": "Sequence", "normalizers": [longer, longer]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    for _ in range(2):
        with pytest.raises(bn.TokenizerError, match=r"tokenizer.json is damaged: .*exit code -6") as caught:
            bn.load(folder, backend="reference")
        assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1, "only what has passed is noted"


def test_a_converted_folder_answers(tiny_packed: Path) -> None:
    llm = bn.load(tiny_packed, backend="reference", context=64)
    assert llm.backend == "reference" and llm.context == 64
    ids = llm.tokenizer.encode("hello there")
    np.testing.assert_array_equal(
        llm.logits(ids), reference_backend(open_packed(tiny_packed)).new_context(len(ids)).logits(ids)
    )
    greedy = llm.generate("hello there", max_new_tokens=4)
    assert greedy.token_ids[0] == int(llm.logits(ids)[-1].argmax())
    assert "".join(llm.stream("hello there", max_new_tokens=4)) == greedy.text
    full = llm.generate("hello there", temperature=1.0, seed=1)
    assert full.finish_reason in ("stop", "context")
    assert llm.memory()["weights"] > 0


@pytest.mark.parametrize("reason", ["CUDA cannot be used: no NVIDIA driver", "CUDA cannot run this model: too wide"])
def test_without_cuda_auto_says_why_and_goes_on(
    tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    def refuse(checkpoint: PackedCheckpoint, kv_dtype: str | None) -> NoReturn:
        raise BackendError(reason)

    monkeypatch.setattr(loading, "_open_cuda", refuse)
    monkeypatch.setattr(loading, "_has_nvidia_driver", lambda: True)
    with caplog.at_level(logging.WARNING, "bitnet_numba"):
        assert bn.load(tiny_packed).backend == "cpu"
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(reason)
    with pytest.raises(BackendError, match=reason):
        bn.load(tiny_packed, backend="cuda")


def test_without_an_nvidia_gpu_auto_takes_the_cpu(
    tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "_has_nvidia_driver", lambda: False)
    with caplog.at_level(logging.WARNING, "bitnet_numba"):
        assert bn.load(tiny_packed).backend == "cpu"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ({}, None),
        ({"eos_token_id": 1, "max_length": 9}, None),
        (
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
                "min_p": 0.01,
                "repetition_penalty": 1.1,
            },
            SamplingParams(0.7, 0.8, 20, 0.01, 1.1),
        ),
        ({"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}, SamplingParams(repetition_penalty=1.1)),
        ({"do_sample": None, "top_k": 5}, SamplingParams()),
        ({"do_sample": False}, SamplingParams()),
        ({"do_sample": True}, SamplingParams(1.0)),
        ({"do_sample": True, "top_p": 0.5, "top_k": None}, SamplingParams(1.0, 0.5)),
        ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.2}, SamplingParams(repetition_penalty=1.2)),
    ],
    ids=str,
)
def test_sampling_that_a_model_asks_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: dict[str, Any], wanted: SamplingParams | None
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    assert read_sampling(tmp_path) == wanted and caplog.messages == []


@pytest.mark.parametrize(
    ("text", "wanted", "key"),
    [
        ('{"do_sample": true, "temperature": 0.7, "top_p": 3}', SamplingParams(0.7), "top_p"),
        ('{"do_sample": true, "temperature": 1%s}' % ("0" * 400), SamplingParams(1.0), "temperature"),  # noqa: UP031
        ('{"do_sample": true, "min_p": NaN}', SamplingParams(1.0), "min_p"),
        ('{"do_sample": "yes", "temperature": 0.7}', SamplingParams(), "do_sample"),
        ('{"do_sample": 1}', None, "do_sample"),
        ('{"top_k": "\\u001b[2J"}', None, "top_k"),
        ("[]", None, "JSON object"),
        ("{", None, "readable JSON"),
    ],
)
def test_a_damaged_recommendation_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, wanted: SamplingParams | None, key: str
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    assert read_sampling(tmp_path) == wanted
    (line,) = caplog.messages
    assert line.startswith(str(path)) and key in line and line.endswith("; ignored")
    assert line.isprintable() and len(line) < len(str(path)) + 200


def test_without_the_cuda_packages(tiny_packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain install has Numba's own shell of numba.cuda; the kernels must not be imported on it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bn.load(tiny_packed).backend == "cpu"
    with pytest.raises(BackendError, match="packages are not installed"):
        bn.load(tiny_packed, backend="cuda")


def dlopen_failed() -> NoReturn:
    try:
        raise OSError("libllvmlite.so: failed to map segment from shared object")
    except OSError:
        raise OSError("Could not find/load shared object file; this could mean " + "this or that " * 20)  # noqa: B904


def error_without_exception() -> NoReturn:
    raise SystemError("error return without exception set")


def version_mismatch() -> NoReturn:
    raise ImportError("Numba needs NumPy 2.3 or less.\nGot NumPy 2.9.")


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        (dlopen_failed, "libllvmlite.so: failed to map segment from shared object; memory may be too short"),
        (error_without_exception, "error return without exception set; memory may be too short"),
        (version_mismatch, "Numba needs NumPy 2.3 or less. Got NumPy 2.9."),
    ],
)
def test_a_numba_that_fails_is_told_in_one_line(
    tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], NoReturn], told: str
) -> None:
    monkeypatch.setattr("bitnet_numba.backends.cpu.backend.cpu_backend", lambda *_: fail())
    monkeypatch.setattr(loading, "_open_cuda", lambda *_: fail())
    monkeypatch.setattr(loading, "_has_nvidia_driver", lambda: False)
    for backend, what in (
        ("cpu", "the CPU backend cannot start"),
        ("auto", "the CPU"),
        ("cuda", "CUDA cannot be used"),
    ):
        with pytest.raises(BackendError) as caught:
            bn.load(tiny_packed, backend=backend)
        assert str(caught.value).startswith(what) and str(caught.value).endswith(f": {told}")
    assert bn.load(tiny_packed, backend="reference").backend == "reference"


def test_without_numba_the_reference_runs(tiny_packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_has_nvidia_driver", lambda: False)
    monkeypatch.delitem(sys.modules, "bitnet_numba.backends.cpu.backend", raising=False)
    monkeypatch.setitem(sys.modules, "bitnet_numba.backends.cpu.backend", None)  # which importing it refuses
    with pytest.raises(BackendError, match=r"^the CPU backend cannot start: "):
        bn.load(tiny_packed)
    assert bn.load(tiny_packed, backend="reference").generate([5], max_new_tokens=2).token_ids


def test_loading_mistakes(
    tiny_packed: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="no backend 'tpu': choose one of auto, cuda, cpu, reference"):
        bn.load(tiny_packed, backend="tpu")
    with pytest.raises(CheckpointError, match=r"not a packed checkpoint.*bitnet-numba convert"):
        bn.load(tiny_source, backend="reference")
    with pytest.raises(CheckpointError, match="does not exist"):
        bn.load(tmp_path / "nowhere", backend="reference")
    assert bn.load(tiny_packed, backend="reference", context=np.int64(7)).context == 7  # type: ignore[arg-type]
    for context in (0, -1, 10**9, 2.5, True):
        with pytest.raises(RequestError, match="context must be between 1 and"):
            bn.load(tiny_packed, backend="reference", context=context)  # type: ignore[arg-type]
    monkeypatch.setattr(loading, "DEMO", tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no built-in model"):
        bn.load()
    folder = Path(shutil.copytree(tiny_packed, tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        bn.load(folder, backend="reference")


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, bitnet_numba as bn; heavy = {'numpy', 'tokenizers', 'jinja2', 'numba'} & set(sys.modules);"
        "assert not heavy, heavy; assert bn.packing.pack_ternary; assert issubclass(bn.BitNetError, Exception);"
        "assert all(hasattr(bn, name) for name in bn.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_public_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        bn.nonsense  # noqa: B018
    assert issubclass(bn.errors.RequestError, BitNetError)


def test_what_keys_and_values_are_held_as(tiny_packed: Path) -> None:
    ids = [5, 6, 7, 8]
    with bn.load(tiny_packed, "reference", kv_dtype="float32") as llm:
        expected = llm.logits(ids)
    errors = {}
    for kv_dtype in ("bfloat16", "float32"):
        with bn.load(tiny_packed, "cpu", kv_dtype=kv_dtype) as llm:
            errors[kv_dtype] = np.sqrt(np.mean((llm.logits(ids) - expected) ** 2)) / expected.std()
    assert errors["float32"] < 0.02 and 1e-3 < errors["bfloat16"] < 0.2  # rounding shows; a flip may
    for backend, kv_dtype, says in (
        ("cpu", "float16", "the backend cpu holds keys and values as bfloat16 or float32, not as float16"),
        ("reference", "bfloat16", "the backend reference holds keys and values as float32, not as bfloat16"),
        ("auto", "int4", "kv_dtype must be one of float16, bfloat16, float8, float32, not 'int4'"),
        ("auto", 16, "kv_dtype must be one of .*, not 16"),
    ):
        with pytest.raises(RequestError, match=says):
            bn.load(tiny_packed, backend, kv_dtype=kv_dtype)  # type: ignore[arg-type]


def test_what_linears_read(tiny_packed: Path) -> None:
    with bn.load(tiny_packed, "reference", activations="int8") as llm:
        assert llm.config.activation_planes == 1
    for activations, says in (
        ("int8x2", "activations int8x2 are for models with group scales; this one was trained with int8"),
        ("int4", "activations must be one of int8, int8x2, not 'int4'"),
        (8, "activations must be one of .*, not 8"),
    ):
        with pytest.raises(RequestError, match=says):
            bn.load(tiny_packed, "reference", activations=activations)  # type: ignore[arg-type]
