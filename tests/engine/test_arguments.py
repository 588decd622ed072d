"""Whatever the arguments of a public call, a wrong one is told in one short line that names it, and nothing is lost."""

import asyncio
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet_numba as bn
from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import BitNetError, RequestError
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.sampling_params import MAX_STOP_TOKENS
from tests.engine.toy_backend import VOCAB, tokens_of, toy_engine

HUGE = 10**400  # JSON can write it; no float holds it
LONG = 10**5000  # Python does not even print it
LARGE_TEXT = "\x1b[2J" + "x" * 10**5


class Broken:
    """An object of which nothing can be said."""

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __index__(self) -> int:
        raise ValueError

    __hash__ = None  # type: ignore[assignment]


ODD = [b"x", [1], {"a": 1}, {1}, 1j, object(), Broken(), np.array([1, 2]), np.array(1), np.bool_(True), True, len]
NUMBERS = [*ODD, None, "x", "0.5", LARGE_TEXT, math.nan, math.inf, -math.inf, -1, HUGE, -HUGE, LONG, Decimal("0.5")]
NUMBERS += [np.float64("nan"), np.float32("inf"), [0.5], Fraction(-1, 3)]
INTEGERS = [
    *ODD,
    "x",
    "5",
    LARGE_TEXT,
    1.5,
    1.0,
    np.float32(1),
    -1,
    -HUGE,
    math.nan,
    math.inf,
    Fraction(3, 1),
    Decimal(3),
]
COUNTS = [*INTEGERS, 0, np.int64(0)]
STOPS = [
    *ODD,
    "",
    5,
    1.5,
    ["a", ""],
    ["a", 5],
    ["a", None],
    [b"a"],
    {"a": 1},
    [["a"]],
    range(3),
    Broken(),
    memoryview(b"a"),
]
PARAMS = [*ODD, "greedy", 0.5, LARGE_TEXT, SamplingParams]
PROMPTS = [b"x", 5, 1.5, True, None, 1j, {1}, {"role": "user", "content": "x"}, object(), Broken(), len, np.array(5)]
PROMPTS += [np.array([0.5]), np.array([[5, 6]]), np.array(["a"]), memoryview(b"ab"), bytearray(b"ab"), iter([5])]
PROMPTS += [
    "",
    [],
    (),
    np.array([], int),
    ["a", "b"],
    ("a",),
    [[5]],
    [5, "a"],
    [5, True],
    [5, 1.5],
    [5, None],
    [Broken()],
]
PROMPTS += [[VOCAB], [-1], [HUGE], [LONG], [-LONG], [np.int64(VOCAB)], [LARGE_TEXT], [{"role": "user"}], [{}], [{1: 2}]]
PROMPTS += [[{"role": "user", "content": "x"}, "y"], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}]]
PROMPTS += [
    [{"role": "user", "content": "x", "token_ids": ids}] for ids in (5, "x", [0.5], [VOCAB], [LONG], {1: 2}, b"x")
]

CHATS = [*(p for p in PROMPTS if not isinstance(p, dict)), {"role": "user", "content": "x"}, [5], "", None]
# Longer than memory, or than any list may be: refused before they are read to their end.
ENDLESS = [range(10**12), range(10**30), itertools.count()]
STOPS += ENDLESS
PROMPTS += ENDLESS

FIELDS = {
    "max_new_tokens": COUNTS,
    "temperature": NUMBERS,
    "top_p": [*NUMBERS, 0, 1.01],
    "top_k": INTEGERS,
    "min_p": [*NUMBERS, 1.01],
    "repetition_penalty": [*NUMBERS, 0, 1e300],
    "seed": [*INTEGERS, 1 << 64, LONG],
    "stop": STOPS,
    "overflow": [*ODD, None, "", "Roll", "rolling", ["roll"], 1],
    "thinking": [*(value for value in ODD if value is not True), "", "on", 0, 1, [True]],
}
# All calls check the fields in one place, so one call is tried with every value, and the others with a few.
FEW = {name: [object(), *values[-2:]] for name, values in FIELDS.items()}
REQUEST = {"prompt": PROMPTS, "params": PARAMS, **FEW}
SCHEDULER = {
    "max_sequences": [*COUNTS, HUGE, LONG],
    "tokens": [*COUNTS, HUGE, LONG],
    "prefill_chunk": COUNTS,
    "max_waiting": COUNTS,
    "max_per_tenant": COUNTS,
}
BATCH = {
    "prompts": [
        "x",
        b"x",
        5,
        None,
        True,
        {1},
        {"a": 1},
        object(),
        Broken(),
        iter(["x"]),
        np.array([5, 6]),
        LARGE_TEXT,
        *ENDLESS,
    ],
    "params": [*PARAMS, *ENDLESS, [None, None], [5], [Broken()], [None] * 100],
    **FEW,
    "max_sequences": [*COUNTS, None, HUGE, LONG],
}
# Public calls: how to make one with some arguments, good values for what must be given, and bad values for everything.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]] = {
    "generate": (lambda llm, **given: llm.generate(**given), {"prompt": [5]}, REQUEST | FIELDS),
    "stream": (lambda llm, **given: llm.stream(**given), {"prompt": [5]}, REQUEST),
    "session.generate": (lambda llm, **given: llm.session().generate(**given), {"prompt": [5]}, REQUEST),
    "session.stream": (lambda llm, **given: llm.session().stream(**given), {"prompt": [5]}, REQUEST),
    "generate_batch": (lambda llm, **given: llm.generate_batch(**given), {"prompts": [[5]]}, BATCH),
    "no prompts": (
        lambda llm, **given: llm.generate_batch([], **given),
        {},
        {k: BATCH[k] for k in BATCH if k != "prompts"},
    ),
    "prompt of a batch": (lambda llm, prompt: llm.generate_batch([[5], prompt]), {}, {"prompt": PROMPTS}),
    "scheduler": (lambda llm, **given: llm.scheduler(**given), {}, SCHEDULER),
    "add": (lambda llm, **given: llm.scheduler(1).add(**given), {"prompt": [5]}, REQUEST),
    "add_request": (
        lambda llm, request: llm.scheduler(1).add_request(request),
        {},
        {"request": [*ODD, None, "x", [5]]},
    ),
    "cancel": (
        lambda llm, request: llm.scheduler(1).cancel(request),
        {},
        {"request": [*ODD, None, "x", 1.5, [1], math.nan]},
    ),
    "logits": (
        lambda llm, token_ids: llm.logits(token_ids),
        {},
        {"token_ids": [*(p for p in PROMPTS if not (isinstance(p, list) and p and isinstance(p[0], dict))), "x"]},
    ),
    "chat": (lambda llm, **given: llm.chat(**given), {"messages": "x"}, {"messages": CHATS, "params": PARAMS, **FEW}),
    "agenerate": (
        lambda llm, **given: asyncio.run(llm.agenerate(**given)),
        {"prompt": [5]},
        REQUEST,
    ),
    "SamplingParams": (lambda llm, **given: SamplingParams(**given), {}, FIELDS),
}
# A message may speak of what an argument is made of.
OTHER_NAMES = {
    "params": "params|sampling parameters",
    "prompt": "prompt|token id|message",
    "prompts": "prompt",
    "token_ids": "tokens? |prompt",
    "stop": "stop",
    "messages": "prompt|token id|message",
}


def refuse(call: Callable[[], object], names: str, value: object) -> None:
    with pytest.raises(RequestError, match=names) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 250, message
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("call", "argument"), [(call, argument) for call, (_, _, bad) in CALLS.items() for argument in bad]
)
def test_every_argument_of_every_call_is_checked(call: str, argument: str) -> None:
    llm, backend = toy_engine()
    make, needed, bad = CALLS[call]
    for value in bad[argument]:
        refuse(lambda v=value: make(llm, **needed | {argument: v}), OTHER_NAMES.get(argument, argument), value)
    assert backend.prefilled == [] and all(batch.log == [] for batch in backend.batches)  # nothing was computed
    assert llm.generate("x", max_new_tokens=1).finish_reason == "length"


@pytest.mark.parametrize("argument", ["path", "backend", "context"])
def test_every_argument_of_load_is_checked(tiny_packed: Path, argument: str) -> None:
    good = {"path": tiny_packed, "backend": "reference", "context": 9}
    bad: dict[str, list[Any]] = {
        "path": [*ODD, "", "a\0b", 5, iter("x")],
        "backend": [*ODD, None, 5, np.array(["cuda"])],
        "context": [*COUNTS, HUGE, LONG],
    }
    for value in bad[argument]:
        refuse(lambda v=value: bn.load(**good | {argument: v}), argument, value)
    # Names of no folder, however odd, and of no backend.
    for path in (
        "x" * 300,
        "x/" * 3000,
        "\ud800",
        "\x1b[2J",
        "/dev/null",
        "/proc/self/mem",
        tiny_packed / "config.json",
    ):
        with pytest.raises(BitNetError) as caught:
            bn.load(path, backend="reference")
        assert "\n" not in str(caught.value)
    for name in ("tpu", "", "CUDA", LARGE_TEXT):
        with pytest.raises(BitNetError, match="there is no backend '.*choose one of auto, cuda") as caught:
            bn.load(tiny_packed, backend=name)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_a_list_of_texts_is_told_where_to_go() -> None:
    llm, _ = toy_engine()
    calls: dict[Callable[[Any], object], str] = {
        llm.generate: "use generate_batch;",
        llm.stream: "use generate_batch;",
        llm.session().generate: "use generate_batch of the model;",
        llm.scheduler(1).add: "add each of them;",
        lambda prompts: asyncio.run(llm.agenerate(prompts)): "call agenerate for each;",
        lambda prompts: llm.generate_batch([prompts]): "list each by itself;",
    }
    for call, advice in calls.items():
        for prompts in (["a", "b"], ("a",), [[5], [6]], [[{"role": "user", "content": "x"}]], np.array(["a", "b"])):
            with pytest.raises(RequestError, match=f"for several prompts, {advice}"):
                call(prompts)


def test_numbers_of_all_types_are_numbers() -> None:
    llm, _ = toy_engine()
    want = llm.generate([5], SamplingParams(0.5, 0.75, 40, 0.125, 1.5, 7, 3))
    for whole, real in ((np.int64, np.float64), (np.uint8, np.float32), (np.int16, np.float16), (int, Fraction)):
        params = SamplingParams(real(0.5), real(0.75), whole(40), real(0.125), real(1.5), whole(7), whole(3))  # type: ignore[operator]
        got = llm.generate(np.array([5], np.uint16), params)  # type: ignore[arg-type]
        assert got.token_ids == want.token_ids
    for prompt in ((5,), range(5, 6)):
        assert llm.generate(prompt, max_new_tokens=3, temperature=1, seed=1).finish_reason == "length"
    assert (
        llm.generate([5], max_new_tokens=HUGE, seed=(1 << 64) - 1, top_k=HUGE, temperature=1e300).finish_reason
        != "interrupted"
    )
    message = {"role": "user", "content": "x", "token_ids": np.array([5, 6])}
    assert llm.generate([message], max_new_tokens=3).stats.prompt_tokens > 2
    texts = [llm.generate([message | {"token_ids": ids}], max_new_tokens=3).text for ids in ([], None)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("stop", [None, (), [], set(), "zzz", ["zzz"], {"zzz"}, np.array(["zzz"])], ids=repr)
def test_stop_strings_of_all_forms(stop: Any) -> None:
    llm, _ = toy_engine()
    text = llm.generate([5], max_new_tokens=9).text
    assert llm.generate([5], max_new_tokens=9, stop=stop).text == text
    assert llm.generate_batch([[5]], max_new_tokens=9, stop=stop)[0].text == text
    if not stop:
        return
    assert llm.generate([5], max_new_tokens=9, stop=iter([text[3:6]])).text == text[: text.index(text[3:6])]
    # An iterator has its strings once; all prompts are to have them.
    both = llm.generate_batch([[5], [5]], max_new_tokens=9, stop=iter([text[3:6]]))
    assert [answer.text for answer in both] == [text[: text.index(text[3:6])]] * 2


def test_parameters_that_were_tampered_with_are_checked_again() -> None:
    class Unchecked(SamplingParams):
        def __post_init__(self) -> None:
            pass

    llm, _ = toy_engine()
    scheduler = llm.scheduler()
    for wrong in (Unchecked(temperature="hot"), Unchecked(1.0, min_p=HUGE), Unchecked(1.0, seed=-1)):  # type: ignore[arg-type]
        for call in (scheduler.add, llm.session().generate):
            with pytest.raises(RequestError, match="temperature|min_p|seed"):
                call([5], wrong)  # type: ignore[operator]
    right = replace(Unchecked(Fraction(1, 2), seed=np.int64(3)), top_k=5)  # type: ignore[arg-type]
    plain = {"temperature": 0.5, "top_k": 5, "seed": 3, "max_new_tokens": 5}
    assert llm.session().generate([5], right, max_new_tokens=5).text == llm.generate([5], **plain).text


def test_the_tokens_that_end_an_answer_have_a_limit_together() -> None:
    """Those of the caller and those of the model."""
    llm, _ = toy_engine(tokens_of("a b c"))
    few = range(MAX_STOP_TOKENS - len(llm.tokenizer.stop_ids))
    assert llm.tokenizer.stop_ids and llm.tokenizer.stop_ids.isdisjoint(range(MAX_STOP_TOKENS))
    assert llm.generate("a", max_new_tokens=2, stop_token_ids=few).finish_reason == "stop"  # by one of the first
    with pytest.raises(RequestError, match=f"stop_token_ids may be at most {MAX_STOP_TOKENS}"):
        llm.generate("a", max_new_tokens=2, stop_token_ids=range(few.stop + 1))


def test_one_mistake_does_not_end_a_scheduler() -> None:
    llm, _ = toy_engine()
    alone = llm.generate([5], max_new_tokens=20).text
    scheduler = llm.scheduler(max_sequences=2)
    scheduler.add([5], max_new_tokens=20)
    texts = []
    for prompt in PROMPTS[:15]:
        texts += [update.text for update in scheduler.step()]
        with pytest.raises(RequestError):
            scheduler.add(prompt)
        with pytest.raises(RequestError):
            scheduler.cancel([1])  # type: ignore[arg-type]
    while scheduler.busy:
        texts += [update.text for update in scheduler.step()]
    assert "".join(texts) == alone


def everything(llm: Engine) -> list[Callable[[], object]]:
    return [
        lambda: llm.generate("x"),
        lambda: llm.stream("x"),
        lambda: llm.chat("x"),
        lambda: llm.astream("x"),
        lambda: asyncio.run(llm.agenerate("x")),
        lambda: llm.generate_batch(["x"]),
        lambda: llm.generate_batch([]),
        lambda: llm.scheduler(),
        lambda: llm.session(),
        lambda: llm.logits([5]),
        lambda: llm.memory(),
        lambda: llm.__enter__(),
    ]


def test_a_closed_model_says_so() -> None:
    llm, backend = toy_engine()
    with llm as same:
        assert same is llm
        session, scheduler, stream = llm.session(), llm.scheduler(), llm.stream("x", max_new_tokens=5)
        scheduler.add("x")
        next(stream)
        llm.generate("y", max_new_tokens=1)
        assert backend.open_contexts == 3
    llm.close()  # again: nothing happens
    assert repr(llm) == "<Engine: toy, context 256, closed>"
    for call in everything(llm):
        with pytest.raises(RequestError, match="this model is closed"):
            call()
    with pytest.raises(RequestError, match="this session is closed"):
        session.generate("x")
    (update,) = scheduler.step()
    assert str(update.error) == "this scheduler is closed"
    with pytest.raises(RequestError, match="this scheduler is closed"):
        scheduler.step()
    assert backend.batches[0].closed and not scheduler.busy
    assert backend.open_contexts == 1  # the stream goes on to its end
    assert stream.result().finish_reason == "length" and backend.open_contexts == 0


def test_objects_show_themselves_in_a_few_words() -> None:
    llm, _ = toy_engine(tokens_of("a"))
    session, scheduler = llm.session(), llm.scheduler()
    scheduler.add([5])
    stream = session.stream([5], max_new_tokens=100)
    assert repr(llm) == "<Engine: toy, context 256>"
    assert repr(scheduler) == "<Scheduler: 0 running, 1 waiting>"
    assert repr(stream) == "<Stream: under way>"
    completion = stream.result()
    assert repr(stream) == "<Stream: length>"
    assert repr(session) == "<Session: 100 of 256 tokens>"
    assert repr(completion).endswith(", 100 tokens, length>") and len(repr(completion)) < 100
    assert repr(completion).isprintable()
    session.close()
    scheduler.close()
    assert repr(llm.tokenizer) == "<Tokenizer: 2,000 tokens>"
    linear = bn.PackedLinear(np.zeros(9999, np.int32), np.ones(1, np.float32), (64,), 128)
    assert repr(linear) == "PackedLinear(segments=(64,), K=128)"
    assert repr(session) == "<Session: closed>" and repr(scheduler) == "<Scheduler: closed>"
