"""Clients that people use, against the built-in model. Those that are not installed are skipped, but by
`make slow-test`, which installs them."""

import asyncio
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import DEMO
from tests.server.helpers import Running

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

# What others' code warns of is not ours to mend.
foreign = pytest.mark.filterwarnings("ignore")
STORY = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]


def test_openai_chats(client: openai.OpenAI) -> None:
    chats = client.chat.completions
    whole = chats.create(model="bitnet-demo", messages=STORY, seed=1, max_tokens=40, logprobs=True, top_logprobs=2)
    stream = chats.create(
        model="bitnet-demo",
        messages=STORY,
        seed=1,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.content[0].top_logprobs) == 2


def test_openai_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="bitnet-demo", messages=STORY, seed=1) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content and final.choices[0].finish_reason == "stop"


def test_openai_texts_and_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bitnet-demo", "gpt-4o-mini"]
    assert client.models.retrieve("bitnet-demo").owned_by == "bitnet_numba"
    answer = client.completions.create(model="bitnet-demo", prompt=["Once", "The fox"], n=2, max_tokens=5)
    assert len(answer.choices) == 4 and answer.usage.completion_tokens == 20


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="bitnet-demo", messages=STORY, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-17", messages=STORY)
    with pytest.raises(openai.BadRequestError, match="tools.0.type"):
        client.chat.completions.create(model="bitnet-demo", messages=STORY, tools=[{"type": "custom"}])


def test_openai_stream_that_is_left(client: openai.OpenAI, server: Running) -> None:
    stream = client.chat.completions.create(
        model="bitnet-demo", messages=STORY, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.wait_until(lambda: server.service.open == 0)


@pytest.fixture
def event_loop() -> Iterator[None]:
    """One that is closed after the test: Python's garbage collector would complain of it in a later one."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@foreign
@pytest.mark.usefixtures("event_loop")
def test_litellm(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    litellm = pytest.importorskip("litellm")
    options = {"model": "openai/bitnet-demo", "api_base": f"{server.url}/v1", "api_key": "none", "messages": STORY}
    whole = litellm.completion(**options, seed=1, max_tokens=20)
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in litellm.completion(**options, seed=1, max_tokens=20, stream=True)
    ]
    assert "".join(pieces) == whole.choices[0].message.content


@foreign
def test_langchain(server: Running) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model="bitnet-demo", base_url=f"{server.url}/v1", api_key="none", seed=1, max_tokens=20, temperature=0.5
    )
    whole = model.invoke("Tell me a story about a fox and a lantern.")
    assert whole.content == "".join(chunk.text for chunk in model.stream("Tell me a story about a fox and a lantern."))
    assert whole.usage_metadata["output_tokens"] == 20


@foreign
def test_llm(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    llm = pytest.importorskip("llm")
    entry = f"- model_id: demo\n  model_name: bitnet-demo\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    model = llm.get_model("demo")
    answers = [
        model.prompt("Hello!", key="none", seed=1, max_tokens=8, stream=stream).text() for stream in (True, False)
    ]
    assert answers[0] == answers[1] != ""


@foreign
def test_lm_eval(server: Running, built_in: Engine) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="bitnet-demo",
        tokenizer=str(DEMO),
        tokenizer_backend="huggingface",
    )
    pairs = [("Once upon a time", ", there was a fox"), ("The fox", " lived in a wood.")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, continuation), (logprob, greedy) in zip(pairs, model.loglikelihood(requests), strict=True):
        ids = model.tok_encode(context) + model.tok_encode(continuation)
        assert ids == built_in.tokenizer.encode(context + continuation, add_bos=False)
        new = len(model.tok_encode(continuation))
        scored = built_in.generate(ids, max_new_tokens=1, prompt_logprobs=1).prompt_logprobs[-new:]
        assert logprob == pytest.approx(sum(token.logprob for token in scored), abs=1e-3)
        assert greedy == all(token.top[0][0] == token.token_id for token in scored)
    (text,) = model.generate_until([Instance("generate_until", {}, ("Once upon a time", {"max_gen_toks": 8}), 0)])
    assert text == built_in.generate(model.tok_encode("Once upon a time"), max_new_tokens=8).text


@foreign
def test_schemathesis(server: Running) -> None:
    """Whatever fits the document, or nearly does, is answered as the document says."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    schema.config.update(base_url=server.url)
    checked = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=15, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def every_case_is_answered(case: Any) -> None:
            if isinstance(case.body, dict) and case.path.endswith("completions"):
                case.body = {**case.body, "max_tokens": 2, "max_completion_tokens": 2, "n": 1, "stream": False}
            # The document says nothing of ranges, nor of what the model's own chat template takes.
            refused = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
            case.call_and_validate(headers={"authorization": "Bearer none"}, excluded_checks=refused)

        every_case_is_answered()
        checked.append(operation.label)
    assert "POST /v1/chat/completions" in checked and len(checked) >= 7


@pytest.mark.slow
def test_no_client_is_left_out(tmp_path: Path) -> None:
    """In an environment of its own, lest all other tests run with the versions that these clients ask for."""
    root = Path(__file__).parent.parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["serve"], *extras["clients"], *extras["test"]]
    wanted = [each for each in wanted if not each.startswith(("bitnet-numba", "nvidia-"))]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    python, report = tmp_path / "fresh" / "bin" / "python", tmp_path / "report.xml"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *wanted], check=True, env=env)
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}", __file__]
    done = subprocess.run(tests, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = ElementTree.parse(report).getroot()[0].attrib
    assert results["skipped"] == "0" and int(results["tests"]) >= 10, done.stdout
