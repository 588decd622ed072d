"""agenerate and astream: the same answers as without asyncio, many at once, and none goes on after its cancellation."""

import asyncio
import gc
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitnet_numba.engine import request_queue
from bitnet_numba.engine.asynchronous import AsyncStream
from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import BackendError, ContextFull, RequestError
from bitnet_numba.sampling import SamplingParams
from tests.engine.toy_backend import ToyBackend, tokens_of, toy_engine, toy_logits

HI = [{"role": "user", "content": "Hi."}]


def steps_of(backend: ToyBackend) -> int:
    return sum(batch.log.count("step") for batch in backend.batches)


def nothing_is_left(llm: Engine, backend: ToyBackend) -> bool:
    """Whether no request runs and no batch is open, once the worker has done what it was asked to."""
    worker = llm._async_worker
    worker._executor.submit(lambda: None).result(60)
    return all(batch.closed for batch in backend.batches) and not worker._answers and worker._scheduler is None


class Gate:
    """Logits that can be held up: `reached` is set when one is asked for, which then waits for `opened`."""

    def __init__(self, backend: ToyBackend, after: int):
        self.after, self.calls = after, 0
        self.reached, self.opened = threading.Event(), threading.Event()
        backend.logits = self

    def __call__(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.calls += 1
        if self.calls > self.after:
            self.reached.set()
            assert self.opened.wait(60)
        return toy_logits(ids)


def test_answers_are_those_without_asyncio() -> None:
    llm, backend = toy_engine()
    asked: list[tuple[Any, dict[str, Any]]] = [
        ([5], {"max_new_tokens": 9}),
        (HI, {"temperature": 0.9, "seed": 3, "max_new_tokens": 12}),
        ("Once", {"temperature": 0.9, "seed": 4, "max_new_tokens": 12, "stop": "e"}),
    ]
    want = [llm.generate(prompt, **options) for prompt, options in asked]

    async def joined(prompt: Any, options: dict[str, Any]) -> tuple[str, AsyncStream]:
        stream = llm.astream(prompt, SamplingParams(**options))
        pieces = [piece async for piece in stream]
        assert "" not in pieces
        return "".join(pieces), stream

    async def main() -> None:
        together = await asyncio.gather(*(llm.agenerate(prompt, **options) for prompt, options in asked))
        assert [(c.text, c.token_ids, c.finish_reason) for c in together] == [
            (c.text, c.token_ids, c.finish_reason) for c in want
        ]
        for (prompt, options), expected in zip(asked, want, strict=True):
            assert (await llm.agenerate(prompt, SamplingParams(**options))).text == expected.text
            text, stream = await joined(prompt, options)
            assert stream.completion is not None and text == stream.completion.text == expected.text
            assert (await stream.result()).text == text and repr(stream) == f"<AsyncStream: {expected.finish_reason}>"

    asyncio.run(main())
    asyncio.run(main())  # another loop
    assert nothing_is_left(llm, backend)


def test_many_at_once_are_computed_together() -> None:
    llm, backend = toy_engine()
    want = [llm.generate([i], temperature=0.9, seed=i, max_new_tokens=4).text for i in range(80)]

    gate = Gate(backend, after=0)

    async def main() -> None:
        asked = (llm.agenerate([i], temperature=0.9, seed=i, max_new_tokens=4) for i in range(80))
        tasks = [asyncio.create_task(each) for each in asked]
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        gate.opened.set()  # by now, all tasks have asked
        assert [answer.text for answer in await asyncio.gather(*tasks)] == want

    asyncio.run(main())
    assert len(backend.batches) == 1 and steps_of(backend) < 80  # more than run at once, in far fewer than 320 steps
    assert nothing_is_left(llm, backend)


def test_the_loop_goes_on_during_a_step() -> None:
    llm, backend = toy_engine()
    gate = Gate(backend, after=2)

    async def main() -> None:
        task = asyncio.create_task(llm.agenerate([5], max_new_tokens=5))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        gate.opened.set()  # the step waits for the loop: if the loop waited for the step, neither would end
        assert len((await task).token_ids) == 5

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("others", [0, 3])
def test_a_cancelled_task_ends_its_answer_within_a_step(others: int) -> None:
    llm, backend = toy_engine(context=4096)
    gate = Gate(backend, after=20)
    stream = llm.astream([5], max_new_tokens=None)  # held, so that it is not the garbage collector who ends it

    async def main() -> None:
        task = asyncio.create_task(stream.result())
        rest = [asyncio.create_task(llm.agenerate([6 + i], max_new_tokens=40)) for i in range(others)]
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        for other in rest:
            assert (await other).finish_reason == "length"

    asyncio.run(asyncio.wait_for(main(), 60))
    assert nothing_is_left(llm, backend)
    assert stream.completion is not None and stream.completion.finish_reason == "interrupted"
    # The step under way ends, and one may have been enqueued ahead of it; the others may have started later.
    assert len(backend.batches) == 1 and steps_of(backend) <= (22 if not others else 80)


def test_a_closed_stream_keeps_what_was_generated() -> None:
    llm, backend = toy_engine(tokens_of("one two three four five"))

    async def main() -> None:
        stream = llm.astream([5])
        shown = await anext(stream) + await anext(stream)
        assert repr(stream) == "<AsyncStream: under way>"
        await stream.aclose()
        assert stream.completion is not None and stream.completion.finish_reason == "interrupted"
        assert stream.completion.text.startswith(shown)
        assert [piece async for piece in stream] == []
        await stream.aclose()
        unused = llm.astream([5])
        await unused.aclose()
        with pytest.raises(RequestError, match="closed before it generated anything"):
            await unused.result()

    asyncio.run(main())
    assert nothing_is_left(llm, backend)


def test_a_stream_that_nobody_holds_ends() -> None:
    llm, backend = toy_engine(tokens_of("a"), context=4096)

    async def main() -> None:
        async for _ in llm.astream([5], max_new_tokens=None):
            break
        gc.collect()
        await asyncio.sleep(0)
        assert await asyncio.to_thread(nothing_is_left, llm, backend)

    asyncio.run(main())
    assert steps_of(backend) < 10


def test_a_stream_that_outlives_its_loop_ends_with_the_next_request() -> None:
    llm, backend = toy_engine(tokens_of("a"), context=4096)

    async def begin() -> AsyncStream:
        stream = llm.astream([5], max_new_tokens=None)
        await anext(stream)
        return stream

    stream: AsyncStream | None = asyncio.run(begin())
    del stream
    gc.collect()
    assert asyncio.run(llm.agenerate([6], max_new_tokens=3)).text == "aaa"
    assert nothing_is_left(llm, backend) and steps_of(backend) < 15


def test_one_task_at_a_time_waits_for_a_stream() -> None:
    llm, backend = toy_engine()
    gate = Gate(backend, after=2)

    async def main() -> None:
        stream = llm.astream([5], max_new_tokens=5)
        task = asyncio.create_task(stream.result())
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        with pytest.raises(RequestError, match="another task is waiting for this stream"):
            await anext(stream)
        gate.opened.set()
        assert len((await task).token_ids) == 5  # the mistake of one costs the other nothing

    asyncio.run(asyncio.wait_for(main(), 60))


def test_mistakes_and_failures_are_each_tasks_own() -> None:
    llm, backend = toy_engine()
    backend.bad_token = 1234
    want = llm.generate([5], max_new_tokens=9).text

    async def main() -> None:
        good, bad, long, empty = await asyncio.gather(
            llm.agenerate([5], max_new_tokens=9),
            llm.agenerate([1234]),
            llm.agenerate([5] * 257),
            llm.agenerate(""),
            return_exceptions=True,
        )
        assert not isinstance(good, BaseException) and good.text == want
        assert isinstance(bad, BackendError) and "numbers that are not finite" in str(bad)
        assert isinstance(long, ContextFull) and isinstance(empty, RequestError)
        with pytest.raises(RequestError, match="agenerate has no option max_token"):
            await llm.agenerate([5], max_token=5)  # type: ignore[call-arg]
        backend.fail_after = 2
        failed = await asyncio.gather(llm.agenerate([5]), llm.agenerate([6]), return_exceptions=True)
        assert [str(error) for error in failed] == ["a step failed"] * 2
        backend.fail_after = None
        assert (await llm.agenerate([5], max_new_tokens=9)).text == want

    asyncio.run(main())
    assert nothing_is_left(llm, backend)


def test_deadlines_end_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = toy_engine(context=4096)
    gate = Gate(backend, after=5)
    now = [0.0]
    monkeypatch.setattr(request_queue, "monotonic", lambda: now[0])

    async def main() -> None:
        task = asyncio.create_task(llm.agenerate([5], max_new_tokens=None, timeout=3))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        now[0] = 4.0
        gate.opened.set()
        completion = await task
        assert completion.finish_reason == "timeout" and 3 <= len(completion.token_ids) <= 6
        with pytest.raises(RequestError, match="timeout must be a number of seconds"):
            llm.astream([5], timeout=-1)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert nothing_is_left(llm, backend)


def test_closing_the_model_ends_answers_under_way() -> None:
    llm, backend = toy_engine(tokens_of("a"), context=4096)

    async def main() -> None:
        stream, unused = llm.astream([5], max_new_tokens=None), llm.astream([5])
        await anext(stream)
        await asyncio.to_thread(llm.close)
        for each in (stream, unused):
            with pytest.raises(RequestError, match="this model is closed"):
                async for _ in each:
                    pass
        with pytest.raises(RequestError, match="this model is closed"):
            await llm.agenerate([5])

    asyncio.run(asyncio.wait_for(main(), 60))
    assert nothing_is_left(llm, backend)
