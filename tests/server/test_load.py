"""Many requests, clients that leave, a backend that fails, and the server's end."""

import asyncio
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.sequence import Update
from bitnet_numba.server.engine_loop import QUIET
from bitnet_numba.server.service import ENCODERS
from tests.engine.toy_backend import ToyBackend, ToyBatch, tokens_of, toy_engine
from tests.server.helpers import Running, read_events, serving
from tests.server.slow_model import CHAT, HEAD, SLOW, body, free, slow_engine
from tests.server.soak import Connection


def test_all_of_a_crowd_are_answered() -> None:
    def load() -> Engine:
        return toy_engine(tokens_of(" fox"))[0]

    with serving(load, max_sequences=4, max_waiting=8) as running:

        async def ask(number: int) -> bytes:
            content = json.dumps(body(max_tokens=5, stream=number % 2 == 0)).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
            answer = await reader.read()
            writer.close()
            return answer

        async def crowd() -> list[bytes]:
            return await asyncio.gather(*[ask(number) for number in range(400)])

        answers = asyncio.run(asyncio.wait_for(crowd(), 60))
        ok = [answer for answer in answers if answer.startswith(b"HTTP/1.1 200")]
        refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 429")]
        assert len(ok) + len(refused) == 400 and len(ok) >= 12 and refused
        assert all(b'"code":"queue_full"' in answer and b"retry-after: " in answer for answer in refused)
        assert all(answer.endswith((b"data: [DONE]\n\n\r\n0\r\n\r\n", b"}}}")) for answer in ok)
        assert free(running)
        assert running.post(CHAT, body(max_tokens=5)).status_code == 200


def test_more_answers_than_may_run_and_wait_are_refused_for_good(slow: tuple[Running, ToyBackend]) -> None:
    """With status 400, not with 429, after which clients ask again and again."""
    running, _ = slow
    for path, field, content in (
        (CHAT, "n", body(n=5)),
        ("/v1/completions", "prompt", {"prompt": ["a"] * 5}),
        ("/v1/completions", "n", {"prompt": ["a", "b"], "n": 3}),
    ):
        response = running.post(path, content)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, field, "invalid_value")
        assert error["message"].startswith("a request may have at most 4 answers, not ")
    assert running.post(CHAT, body(n=4, max_tokens=1)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [0, 2])  # answers that run already, so that this one waits
def test_who_leaves_frees_the_place(slow: tuple[Running, ToyBackend], stream: bool, before: int) -> None:
    running, backend = slow

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=60, trust_env=False) as client:
            tasks = [
                asyncio.create_task(client.post(CHAT, json=body(max_tokens=3000, stream=stream)))
                for _ in range(before + 1)
            ]
            while running.service.open < before + 1 or running.service.running < min(before + 1, 2):
                await asyncio.sleep(0.005)
            tasks[-1].cancel()
            while running.service.open > before:
                await asyncio.sleep(0.005)
            for task in tasks:
                task.cancel()

    asyncio.run(asyncio.wait_for(leave(), 10))
    running.wait_until(lambda: free(running))
    steps = len(backend.batches[-1].log)
    time.sleep(10 * SLOW)
    assert len(backend.batches[-1].log) == steps, "it goes on"


def test_a_stream_ends_when_nobody_reads(slow: tuple[Running, ToyBackend]) -> None:
    running, _ = slow
    with running.client.stream("POST", CHAT, json=body(max_tokens=3000, stream=True)) as response:
        pieces = response.iter_text()  # which would close the connection if nobody held it
        next(pieces)
        running.wait_until(lambda: running.service.running == 1)
    running.wait_until(lambda: free(running))


def test_answers_have_a_deadline() -> None:
    with serving(lambda: slow_engine([]), answer_timeout=0.4) as running:
        response = running.post(CHAT, body(max_tokens=3000))
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        events = running.events(CHAT, body(max_tokens=3000))
        assert events[-1]["error"]["code"] == "timeout" and "[DONE]" not in events
        running.wait_until(lambda: free(running))


def test_who_waits_too_long_is_told() -> None:
    with serving(lambda: slow_engine([]), max_sequences=1, queue_timeout=0.1) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.post, CHAT, body(max_tokens=300))
        running.wait_until(lambda: running.service.running == 1)
        response = running.post(CHAT, body(max_tokens=5))
        assert response.status_code == 503 and response.json()["error"]["code"] == "queue_timeout"
        assert response.headers["retry-after"] and first.result().status_code == 200


def test_priority_and_keys_share_the_slots() -> None:
    """The first answer waits within a step until all have been asked for; from then on, steps alone decide."""
    keys, go_on = ("key-a", "key-b"), threading.Event()
    names = {200: "long", 5: "later", 6: "first", 7: "other key"}  # by the number of tokens

    def held_engine() -> Engine:
        engine, backend = toy_engine(tokens_of(" fox"), context=4096)
        choose = backend.choose

        def held(*arguments: Any) -> int:
            assert go_on.wait(30)
            return choose(*arguments)

        backend.choose = held  # type: ignore[method-assign]
        return engine

    with (
        serving(held_engine, max_sequences=2, max_per_key=1, api_keys=keys) as running,
        ThreadPoolExecutor(4) as pool,
    ):
        ended: list[str] = []
        engine_loop = running.service._engine_loop
        assert engine_loop is not None
        deliver = engine_loop._deliver

        def note_ends(updates: list[Update], *arguments: Any) -> None:
            ended.extend(names[u.completion.stats.generated_tokens] for u in updates if u.completion is not None)
            deliver(updates, *arguments)

        engine_loop._deliver = note_ends  # type: ignore[method-assign]
        jobs = []
        for asked, (key, tokens, priority) in enumerate(((0, 200, 0), (0, 5, 0), (0, 6, -1), (1, 7, 0)), 1):
            headers = {"authorization": f"Bearer {keys[key]}"}
            jobs.append(pool.submit(running.post, CHAT, body(max_tokens=tokens, priority=priority), headers=headers))
            running.wait_until(
                lambda others=asked - 1: (engine_loop.running, engine_loop._scheduler.waiting) == (1, others)
            )
        go_on.set()
        assert [job.result(30).status_code for job in jobs] == [200] * 4
        assert ended == ["other key", "long", "first", "later"]


def test_a_backend_that_fails_ends_what_is_open_and_nothing_else(slow: tuple[Running, ToyBackend]) -> None:
    running, backend = slow
    backend.fail_after = 5
    response = running.post(CHAT, body(max_tokens=50))
    assert response.status_code == 503 and "a step failed" in response.json()["error"]["message"]
    backend.fail_after = 40
    events = running.events(CHAT, body(max_tokens=50))
    assert events[-1]["error"]["code"] == "engine_failed" and len(events) > 2
    backend.fail_after = None
    assert running.post(CHAT, body(max_tokens=5)).status_code == 200
    assert free(running) and running.client.get("/health").status_code == 200


def test_a_request_that_fails_ends_alone(slow: tuple[Running, ToyBackend]) -> None:
    running, backend = slow
    backend.bad_token = tokens_of("#")[0]
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(running.post, "/v1/completions", {"prompt": "#", "max_tokens": 9, "temperature": 0})
        good = pool.submit(running.post, "/v1/completions", {"prompt": "an owl", "max_tokens": 9, "temperature": 0})
        assert (bad.result().status_code, good.result().status_code) == (500, 200)


def test_a_step_that_hangs_is_told() -> None:
    backends: list[ToyBackend] = []
    with serving(lambda: slow_engine(backends), hang_timeout=0.2) as running, ThreadPoolExecutor(1) as pool:
        assert running.post(CHAT, body(max_tokens=50)).status_code == 200
        time.sleep(0.3)
        assert running.client.get("/health").status_code == 200, "it has nothing to do"
        goes_on, choose = threading.Event(), backends[0].choose

        def hang(*arguments: Any) -> int:
            goes_on.wait(10)
            return choose(*arguments)

        backends[0].choose = hang  # type: ignore[method-assign]
        answer = pool.submit(running.post, CHAT, body(max_tokens=5))
        running.wait_until(lambda: running.client.get("/health").json()["status"] == "hanging")
        goes_on.set()
        assert answer.result().status_code == 200 and running.client.get("/health").status_code == 200


def test_a_backend_that_cannot_be_used_any_more() -> None:
    engine, backend = toy_engine(tokens_of(" fox"))
    with serving(lambda: engine) as running:
        backend.fail_after = 2
        backend.new_batch = None  # type: ignore[assignment, method-assign]
        assert running.post(CHAT, body(max_tokens=9)).status_code == 503
        running.wait_until(lambda: running.service.status == "failed")
        assert running.client.get("/health").json()["status"] == "failed"
        assert running.post(CHAT, body(max_tokens=9)).status_code == 503


def test_health_tells_that_the_model_is_being_loaded() -> None:
    loaded = threading.Event()

    def load() -> Engine:
        assert loaded.wait(10)
        return toy_engine(tokens_of(" fox"))[0]

    with serving(load, wait=False) as running:
        assert running.client.get("/health").status_code == 503
        for response in (running.post(CHAT, body()), running.client.get("/v1/models")):
            assert response.status_code == 503 and response.headers["retry-after"]
        loaded.set()
        running.wait_until(lambda: running.client.get("/health").status_code == 200)


def test_health_answers_at_full_load(server: Running) -> None:
    """All slots of the CPU backend are taken and as many wait, streamed and not: half of the answers within 100 ms."""
    slots = server.service.settings.max_sequences
    content = {"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True}
    seconds = []

    async def load() -> None:
        connections = [Connection("127.0.0.1", server.port) for _ in range(2 * slots)]
        tasks = [
            asyncio.create_task(connection.ask("POST", "/v1/completions", {**content, "stream": number % 2 == 0}))
            for number, connection in enumerate(connections)
        ]
        while server.service.running < slots or server.service.open < 2 * slots:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(measure)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in connections:
            await connection.close()

    def measure() -> None:
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            for _ in range(21):
                began = time.perf_counter()
                assert client.get("/health").status_code == 200
                seconds.append(time.perf_counter() - began)
                assert server.service.running == slots, "the load has ended"
                time.sleep(0.02)

    asyncio.run(asyncio.wait_for(load(), 120))
    server.wait_until(lambda: free(server))
    assert sorted(seconds)[len(seconds) // 2] < 0.1, seconds


def test_health_needs_no_turn_of_the_engine(slow: tuple[Running, ToyBackend]) -> None:
    """Nor of the threads that encode prompts: it is answered while all of them stand still."""
    running, backend = slow
    go_on, choose = threading.Event(), backend.choose
    held = threading.Barrier(2 + ENCODERS)

    def hold(*arguments: Any) -> int:
        held.wait(10)
        assert go_on.wait(30)
        return choose(*arguments)

    def encode() -> None:
        held.wait(10)
        assert go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        backend.choose = hold  # type: ignore[method-assign]
        answer = pool.submit(running.post, CHAT, body(max_tokens=1))
        running.wait_until(lambda: running.service.running == 1)
        for _ in range(ENCODERS):
            running.service._encoders.submit(encode)
        held.wait(10)
        seconds = []
        try:
            for _ in range(101):
                began = time.perf_counter()
                assert running.client.get("/health").json()["status"] == "ok"
                seconds.append(time.perf_counter() - began)
            assert running.client.get("/metrics").status_code == running.client.get("/v1/models").status_code == 200
            assert not answer.done()
        finally:
            go_on.set()
        assert answer.result(30).status_code == 200
    assert sorted(seconds)[len(seconds) // 2] < 0.1, seconds


def test_draining_finishes_what_is_open(slow: tuple[Running, ToyBackend]) -> None:
    running, _ = slow
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.post, CHAT, body(max_tokens=100))
        running.wait_until(lambda: running.service.running == 1)
        running.server.handle_exit(signal.SIGTERM, None)
        assert running.client.get("/health").status_code == 503
        late = running.post(CHAT, body(max_tokens=5))
        assert late.status_code == 503 and late.headers["retry-after"]
        assert answer.result().json()["usage"]["completion_tokens"] == 100
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_draining_takes_no_longer_than_it_may() -> None:
    with serving(lambda: slow_engine([]), drain_timeout=0.1) as running, ThreadPoolExecutor(1) as pool:
        events = pool.submit(running.events, CHAT, body(max_tokens=3000))
        running.wait_until(lambda: running.service.running == 1)
        time.sleep(0.05)
        running.server.handle_exit(signal.SIGTERM, None)
        assert "shutting down" in events.result(10)[-1]["error"]["message"]
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_a_mistake_in_the_engines_thread_leaves_nobody_waiting(slow: tuple[Running, ToyBackend]) -> None:
    running, _ = slow
    loop = running.service._engine_loop
    assert loop is not None
    loop._deliver = None  # type: ignore[assignment, method-assign]
    response = running.post(CHAT, body(max_tokens=50))
    assert response.status_code == 503 and running.client.get("/health").json()["status"] == "failed"
    assert running.post(CHAT, body(max_tokens=50)).json()["error"]["code"] == "engine_failed"


def test_rounds_are_prepared_while_nobody_asks() -> None:
    """And a request that comes meanwhile, or soon after an answer, does not wait for all of that."""
    backends: list[ToyBackend] = []
    entered, go_on = threading.Event(), threading.Event()

    def load() -> Engine:
        engine, backend = toy_engine(tokens_of(" fox"), context=256)
        backend.to_prepare = 1000
        backends.append(backend)
        return engine

    prepared_at: list[float] = []

    def prepare(self: ToyBatch) -> bool:
        prepared_at.append(time.monotonic())
        self.to_prepare -= 1
        if self.to_prepare == 990:
            entered.set()
            assert go_on.wait(30)
        return self.to_prepare >= 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyBatch, "prepare", prepare)
        with serving(load) as running, ThreadPoolExecutor(1) as pool:
            assert entered.wait(30)
            response = pool.submit(running.post, CHAT, body(max_tokens=3))
            engine_loop = running.service._engine_loop
            assert engine_loop is not None
            running.wait_until(lambda: engine_loop._scheduler.waiting == 1)
            (batch,) = backends[0].batches
            steps_left: list[tuple[int, float]] = []
            step = batch.step
            patch.setattr(
                batch, "step", lambda slots: (steps_left.append((batch.to_prepare, time.monotonic())), step(slots))
            )
            go_on.set()
            assert response.result(30).status_code == 200
            running.wait_until(lambda: batch.to_prepare == -1)
    assert {left for left, _ in steps_left} == {990}
    last_step = steps_left[-1][1]
    assert min(at for at in prepared_at if at > last_step) >= last_step + QUIET


def test_streams_are_coalesced() -> None:
    for coalesce, most, least in ((0.1, 8, 2), (0.0, 1000, 40)):
        with serving(lambda: slow_engine([]), coalesce=coalesce) as running:
            events = running.events(CHAT, body(max_tokens=100))
            assert least <= len(events) - 3 <= most, len(events)  # less role, finish and [DONE]


def test_the_metrics_count(slow: tuple[Running, ToyBackend]) -> None:
    running, _ = slow
    running.events(CHAT, body(max_tokens=7))
    lines = running.client.get("/metrics").text.splitlines()
    assert "bitnet_numba_generated_tokens_total 7.0" in lines and "bitnet_numba_answers_running 0.0" in lines
    assert 'bitnet_numba_requests_total{path="/v1/chat/completions",status="200"} 1.0' in lines


def test_read_events() -> None:
    assert read_events('data: {"a": 1}\n\ndata: [DONE]\n\n') == [{"a": 1}, "[DONE]"]
