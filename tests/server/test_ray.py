"""Two replicas of Ray Serve on the CPU: one is killed, one is stopped, and nothing but its own streams is lost; all are
replaced, and nothing is lost; a conversation keeps its replica."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitnet_numba.errors import RequestError
from tests.server.helpers import free_port, read_events

with warnings.catch_warnings():  # of Ray's own code
    warnings.simplefilter("ignore")
    ray = pytest.importorskip("ray")
    from ray import serve

    from bitnet_numba.server.ray import app
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parent.parent.parent
NAME = "bitnet-test"
LONG = {"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Two replicas of the built-in model."""
    port = free_port()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would tell its makers of every start
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}}
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "bitnet_numba.server.ray_proxy:middleware"
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=100 << 20, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"options": "--threads 1", "replicas": "2"}), name=NAME, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[int]:
    """Their processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(f"ray::ServeReplica:{NAME}".encode()):
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def stream(url: str, body: dict[str, Any] = LONG) -> bool:
    """Whether a long answer was complete; if not, its last event must be an error."""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=90, trust_env=False) as response:
        events = read_events("".join(response.iter_text()))
    if response.status_code == 503:
        return False
    assert events[-1] == "[DONE]" or events[-1]["error"]["code"] == "replica_lost"
    return events[-1] == "[DONE]"


def wait_for_two(url: str) -> None:
    """Until there are two replicas again, and both answer."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        time.sleep(0.5)
        if len(replicas()) == 2 and all(
            httpx.get(f"{url}/health", trust_env=False).status_code == 200 for _ in range(8)
        ):
            return
    raise AssertionError("the replica was not replaced")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_that_ends_takes_only_its_own_streams_along(url: str, number: int) -> None:
    wait_for_two(url)
    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(stream, url) for _ in range(12)]
        time.sleep(1.5)
        victim = replicas()[0]
        os.kill(victim, number)
        began = time.monotonic()
        whole = pool.submit(httpx.post, f"{url}/v1/completions", json={**LONG, "stream": False}, timeout=90)
        complete = [job.result() for job in streams]
    assert whole.result().status_code in (200, 503)
    assert 0 < complete.count(True) < 12 and time.monotonic() - began < 60
    wait_for_two(url)
    assert victim not in replicas() and stream(url)


def test_a_conversation_finds_its_cache(url: str) -> None:
    wait_for_two(url)

    def cached(prompt: str, session: str) -> int:
        body = {"prompt": f"{prompt} met an owl. " * 12, "max_tokens": 1}
        headers = {"x-session-id": session}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    names = [f"fox{number}" for number in range(10)]
    assert not any([cached(name, name) for name in names])
    assert all(cached(name, name) for name in names for _ in range(2))
    assert not all(cached(names[0], name) for name in names), "all sessions have the same replica"


def test_an_update_breaks_no_stream(url: str) -> None:
    wait_for_two(url)
    before = replicas()
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, url) for _ in range(6)]
        time.sleep(0.5)
        update = pool.submit(serve.run, app({"options": "--threads 1 --max-waiting 200", "replicas": "2"}), name=NAME)
        short = [stream(url, {**LONG, "max_tokens": 5})]
        assert not any(job.done() for job in streams), "they are too short for this test"
        while not update.done():
            short.append(stream(url, {**LONG, "max_tokens": 5}))
        assert all(job.result() for job in streams) and all(short)
        update.result()
    wait_for_two(url)
    assert not set(before) & set(replicas()) and len(short) > 3


def test_answers_are_those_of_one_server(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "seed": 1}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        answers = [client.post("/v1/chat/completions", json=body).json() for _ in range(8)]
    texts = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1


def test_wrong_arguments() -> None:
    with pytest.raises(RequestError, match="unknown argument model"):
        app({"model": "2b4t"})
