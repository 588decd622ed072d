"""Several threads, several engines, forks, many open streams, too little memory: safe, or refused in one line."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import bitnet_numba as bn
from bitnet_numba.engine.session import Stream
from bitnet_numba.engine.shared import MAX_IDLE
from bitnet_numba.errors import BackendError, RequestError
from bitnet_numba.sampling import SamplingParams
from tests.engine.toy_backend import ToyBackend, ToyContext, tokens_of, toy_engine

PARAMS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "seed": 3}


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Runs work(0) .. work(count - 1), all at the same time; raises what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(i: int) -> None:
        start.wait()
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def watch_for_company(backend: ToyBackend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the toy's steps slow; the list says when one of them was not alone."""
    inside = threading.Lock()
    company: list[str] = []
    choose = backend.choose

    def slow(*arguments: Any) -> int:
        if not inside.acquire(blocking=False):
            company.append("two steps at a time")
            return choose(*arguments)
        try:
            time.sleep(0.0005)
            return choose(*arguments)
        finally:
            inside.release()

    monkeypatch.setattr(backend, "choose", slow)
    return company


def test_threads_take_turns_and_get_their_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = toy_engine()
    want = [llm.generate([i], **PARAMS).token_ids for i in range(6)]
    company = watch_for_company(backend, monkeypatch)

    def ask(i: int) -> None:
        assert llm.generate([i], **PARAMS).token_ids == want[i]
        assert llm.generate_batch([[i]], SamplingParams(0.9, seed=3), max_new_tokens=12)[0].token_ids == want[i]
        with llm.session() as session:
            assert session.generate([i], SamplingParams(0.9, seed=3), max_new_tokens=12).token_ids == want[i]
        assert llm.logits([i]).shape[0] == 1

    in_threads(6, ask)
    assert company == []


def test_threads_on_the_built_in_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """And two engines in one process."""
    one, two = bn.load(backend="reference"), bn.load(backend="reference")
    prompts = ["Once upon a time", "What can you do?"]
    want = [one.generate(prompt, max_new_tokens=5).token_ids for prompt in prompts]

    def ask(i: int) -> None:
        assert (one if i % 2 else two).generate(prompts[i // 2], max_new_tokens=5).token_ids == want[i // 2]

    in_threads(4, ask)


def test_one_stream_read_by_two_threads_gives_each_piece_once() -> None:
    llm, _ = toy_engine()
    want = llm.generate([5], max_new_tokens=100).text
    stream = llm.stream([5], max_new_tokens=100)
    pieces: list[str] = []
    in_threads(4, lambda i: pieces.extend(stream))
    assert sorted("".join(pieces)) == sorted(want)
    assert stream.completion is not None and stream.completion.text == want


def test_a_stream_closed_by_another_thread_ends_after_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = toy_engine(tokens_of("a"))
    watch_for_company(backend, monkeypatch)
    for _ in range(5):
        stream = llm.stream([5])
        next(stream)
        in_threads(2, lambda i, stream=stream: stream.close() if i else [None for _ in stream])  # type: ignore[misc]
        assert stream.completion is not None
        assert stream.completion.finish_reason in ("interrupted", "context")


def test_a_stream_that_calls_itself_is_refused() -> None:
    """As a signal handler can: waiting for the step would wait for ever."""

    def pieces() -> Iterator[str]:
        with pytest.raises(RequestError, match="in the middle of a step"):
            next(stream)
        with pytest.raises(RequestError, match="in the middle of a step"):
            stream.close()
        yield "a"

    stream = Stream(pieces(), [])  # type: ignore[arg-type]
    assert next(stream) == "a"


def test_a_session_gives_one_answer_at_a_time() -> None:
    llm, _ = toy_engine()
    session = llm.session()
    want = llm.generate([5], **PARAMS).token_ids
    answers: list[list[int]] = []
    refused: list[str] = []

    def ask(i: int) -> None:
        for _ in range(10):
            try:
                answers.append(session.generate([5], SamplingParams(0.9, seed=3), max_new_tokens=12).token_ids)
            except RequestError as error:
                refused.append(str(error))

    in_threads(4, ask)
    assert answers and all(ids == want for ids in answers) and len(answers) + len(refused) == 40
    assert all("still answering" in line for line in refused)
    stream = session.stream([5])
    next(stream)
    with pytest.raises(RequestError, match="still answering"):
        session.clear()
    stream.close()
    session.clear()
    assert session.held == 0


def test_a_step_during_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = toy_engine(tokens_of("a"))
    scheduler = llm.scheduler()
    scheduler.add([5], max_new_tokens=2)
    inside, leave = threading.Event(), threading.Event()
    choose = backend.choose

    def wait(*arguments: Any) -> int:
        inside.set()
        assert leave.wait(60)
        return choose(*arguments)

    monkeypatch.setattr(backend, "choose", wait)

    def work(i: int) -> None:
        if i:
            scheduler.step()
        else:
            assert inside.wait(60)
            with pytest.raises(RequestError, match="another thread steps this scheduler"):
                scheduler.step()
            leave.set()

    in_threads(2, work)
    assert scheduler.running == 1


def test_one_thread_runs_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = toy_engine()
    scheduler = llm.scheduler()
    company = watch_for_company(backend, monkeypatch)
    want = llm.generate([5], **PARAMS).text
    number = scheduler.add([5], SamplingParams(0.9, seed=3), max_new_tokens=12)
    texts: list[str] = []
    refused: list[str] = []

    def run(i: int) -> None:
        while scheduler.busy:
            try:
                texts.extend(u.completion.text for u in scheduler.step() if u.completion and u.request == number)
            except RequestError as error:
                refused.append(str(error))
                time.sleep(0.0002)

    in_threads(3, run)
    assert texts == [want] and company == []
    assert all("another thread steps this scheduler" in line for line in refused)


def test_a_scheduler_closed_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = toy_engine(tokens_of("a"))
    watch_for_company(backend, monkeypatch)
    scheduler = llm.scheduler()
    scheduler.add([5])

    def work(i: int) -> None:
        try:
            if i:
                while backend.batches[0].log.count("step") < 3:
                    time.sleep(0.001)
                scheduler.close()
            while True:
                scheduler.step()
        except RequestError as error:
            assert "close" in str(error)

    in_threads(2, work)
    assert backend.batches[0].closed and not scheduler.busy
    for call in (scheduler.step, lambda: scheduler.add([5])):
        with pytest.raises(RequestError, match="this scheduler is closed"):
            call()


# Contexts


def test_contexts_of_many_streams_are_freed() -> None:
    llm, backend = toy_engine(tokens_of("a"))
    streams = [llm.stream([5]) for _ in range(200)]
    for stream in streams:
        next(stream)
    assert backend.open_contexts == 200
    for stream in streams[:100]:
        stream.close()
    assert backend.open_contexts == 100 + MAX_IDLE
    del streams, stream
    gc.collect()
    assert backend.open_contexts == MAX_IDLE
    scheduler = llm.scheduler()  # a batch may need their memory
    assert backend.open_contexts == 0 and not backend.batches[0].closed
    del scheduler
    gc.collect()
    assert backend.batches[0].closed
    llm.session()
    gc.collect()
    assert backend.open_contexts == 0


def test_a_session_takes_an_idle_context() -> None:
    llm, backend = toy_engine()
    llm.generate([5], max_new_tokens=3)
    session = llm.session()
    assert backend.open_contexts == 1 and session.held == 0


def test_idle_contexts_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = toy_engine()
    llm.generate([5], max_new_tokens=3)
    make = backend.new_context

    def make_one(capacity: int) -> ToyContext:
        if backend.open_contexts:
            raise BackendError("there is memory for one context")
        return make(capacity)

    monkeypatch.setattr(backend, "new_context", make_one)
    assert llm.logits([5, 6]).shape[0] == 2 and backend.open_contexts == 0
    session = llm.session()
    with pytest.raises(BackendError, match="memory for one"):
        llm.logits([5])
    session.close()


# Memory


def test_memory_that_runs_out_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, backend = toy_engine()

    def out_of_memory(*arguments: object) -> Any:
        raise MemoryError("Unable to allocate 1.5 GiB")

    monkeypatch.setattr(backend, "new_batch", out_of_memory)
    monkeypatch.setattr(ToyContext, "feed", out_of_memory)
    session = llm.session()
    calls: list[Callable[[], object]] = [lambda: llm.generate([5]), lambda: session.generate([5]), llm.scheduler]
    for call in [*calls, lambda: llm.logits([5]), lambda: llm.generate_batch([[5]])]:
        with pytest.raises(BackendError, match=r"^memory ran out \(Unable to allocate 1.5 GiB\): a smaller context"):
            call()
    monkeypatch.undo()
    assert session.generate([5], max_new_tokens=2).finish_reason == "length"  # still of use


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory as a whole")
def test_with_too_little_memory_a_smaller_context_is_named() -> None:
    code = """
    import re, resource
    import bitnet_numba as bn
    from bitnet_numba.errors import BitNetError

    def leave(megabytes):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))

    def refused(call):
        try:
            call()
        except BitNetError as error:
            return str(error)

    llm = bn.load(backend="reference")
    leave(2)
    assert re.search("memory ran out while|not enough memory", refused(lambda: bn.load(backend="reference")))
    assert "no context would fit" in refused(lambda: llm.generate("x", max_new_tokens=3))
    leave(75)
    three = {"max_new_tokens": 3}
    for call in (llm.session, lambda: llm.generate("x", **three), lambda: list(llm.stream("x", **three))):
        line = refused(call)
        fits = re.search(r"a context of 1024 tokens takes 0.0\\d GB of memory.*: --context (\\d+) would fit", line)
    assert re.search(r"a batch of 65536 tokens takes .* GB of memory.*: \\d+ tokens would fit", refused(llm.scheduler))
    llm.context = int(fits[1])
    assert 0 < llm.context < 1024 and llm.context % 64 == 0
    assert llm.generate([5] * (llm.context - 9)).stats.generated_tokens
    """
    # OpenBLAS makes itself at home at the first product; with one thread, so that its buffers are few.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, env=environment)


# Forks


def in_child(work: Callable[[], object]) -> str:
    """What `work` returned, or the error that it raised, in a fork of this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # the child must not come back into pytest
        try:
            signal.alarm(60)  # nor wait for ever
            os.write(writer, repr(work()).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


# On macOS, NumPy's matrix products may not survive a fork.
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="needs a system whose libraries can be forked")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_the_reference_works_in_a_forked_child(tiny_packed: Path) -> None:
    llm = bn.load(tiny_packed, backend="reference", context=64)
    want = llm.generate([5], max_new_tokens=5).token_ids
    asyncio.run(llm.agenerate([5], max_new_tokens=5))  # leaves a thread behind, which the child will not have
    stream = llm.stream([5], max_new_tokens=5)
    next(stream)
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with llm._backend.turn():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=stay)
    thread.start()  # the child will find the lock taken by a thread that it does not have
    inside.wait(60)

    def work() -> object:
        there = asyncio.run(llm.agenerate([5], max_new_tokens=5))
        return llm.generate([5], max_new_tokens=5).token_ids, stream.result().token_ids, there.token_ids, llm.close()

    forked = in_child(work)
    leave.set()
    thread.join()
    assert forked == repr((want, want, want, None))
    assert stream.result().token_ids == want and llm.generate([5], max_new_tokens=5).token_ids == want


def raise_(error: BaseException | None) -> None:
    assert error is not None
    raise error


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_other_backends_are_refused_in_a_forked_child() -> None:
    llm, backend = toy_engine()
    session, scheduler, stream = llm.session(), llm.scheduler(), llm.stream([5], max_new_tokens=5)
    scheduler.add([5])
    next(stream)
    calls: Sequence[Callable[[], object]] = [
        lambda: llm.generate([5], max_new_tokens=5),
        lambda: llm.logits([5]),
        lambda: session.generate([5]),
        lambda: next(stream),
        llm.session,
        llm.scheduler,
        lambda: raise_(scheduler.step()[0].error),
    ]
    for call in calls:
        said = in_child(call)
        assert said.startswith("BackendError: this model was loaded before os.fork, and toy does not work in the child")
        assert "\n" not in said
    assert in_child(lambda: (session.close(), scheduler.close(), stream.close(), llm.close())) == repr((None,) * 4)
    assert stream.result().finish_reason == "length" and backend.open_contexts == 2
