"""The load client of tools/bench.py counts what the server does, and compares it with the engine."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import DEMO
from tests.server.helpers import Running
from tools.bench import main
from tools.benchmarks import serve_engine
from tools.benchmarks.serve_load import Answered, Load, comparison, figures, percentile


@pytest.mark.parametrize("load", [["--clients", "1,3"], ["--rate", "200"]])
def test_figures(server: Running, load: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--requests", "6", "--prompt", "5", "--answer", "9", "--json", str(file)]
    assert main(["serve", "--url", server.url, *load, *sizes]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert len(runs) == (2 if "--clients" in load else 1)
    for run in runs:
        found = run["server"]
        assert found["refused"] == 0 and found["tokens/s"] == pytest.approx(9 * found["requests/s"])
        assert 0 < found["first_p50_ms"] <= found["first_p99_ms"] and 0 <= found["between_p50_ms"]
        assert found["cores"] is None and run["engine"] is None, "of a server that was not started here"
    assert capsys.readouterr().out.count("\n| ") == len(runs)


def test_server_and_engine_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder without a tokenizer, too: prompts are token ids."""
    folder, file = tmp_path / "model", tmp_path / "figures.json"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("tokenizer*", "*template*"))
    sizes = ["--clients", "2", "--requests", "4", "--prompt", "5", "--answer", "20", "--starts", "1"]
    options = ["--server-option=--backend=cpu", "--server-option=--threads=1", "--json", str(file)]
    assert main(["serve", str(folder), *sizes, *options]) == 0
    found = json.loads(file.read_text())
    (run,) = found["runs"]
    for who in ("server", "engine"):
        assert run[who]["refused"] == 0 and run[who]["tokens/s"] == pytest.approx(20 * run[who]["requests/s"])
        assert run[who]["cpu_us_per_token"] > 0
        assert found["starts"][who]["ready_s"] > 0.1 and found["starts"][who]["ready_MB"] > 20
    assert run["comparison"]["share_of_tokens/s"] == run["server"]["tokens/s"] / run["engine"]["tokens/s"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in DEMO.iterdir() if "token" not in path.name and "template" not in path.name
    )
    assert "| server against engine |" in capsys.readouterr().out


@pytest.mark.parametrize("clients", [2, None])
def test_engine_answers_the_same_requests(clients: int | None, built_in: Engine, server: Running) -> None:
    """Sampled as the server samples them, in order, each once."""
    load = Load(clients, 1000.0, 5, 4, 6, seed=3)
    added: list[Any] = []
    with built_in.scheduler(2) as scheduler:
        add = scheduler.add
        scheduler.add = lambda prompt, params: added.append((prompt, params)) or add(prompt, params)  # type: ignore
        answers = serve_engine.run(built_in, scheduler, load)
    assert [answer.tokens for answer in answers] == [6] * 5 and all(0 < a.first <= a.last for a in answers)
    assert [prompt for prompt, _ in added] == [body["prompt"] for body in load.bodies()]
    for body, (prompt, params) in zip(load.bodies(), added, strict=True):
        response = server.post("/v1/completions", body).json()
        assert response["choices"][0]["text"] == built_in.generate(prompt, params).text


def test_comparison_and_percentiles() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    assert [percentile(values, share) for share in (0, 25, 50, 99, 100)] == [1.0, 1.0, 2.0, 4.0, 4.0]
    assert percentile([], 50) is None and percentile([math.nan], 50) is None
    engine = figures([Answered(200, 0.5, 1.5, 11), Answered(200, 0.5, 1.5, 11)], 2.0, 1.0)
    server = figures([Answered(200, 0.75, 1.75, 11), Answered(429)], 2.0, 1.0)
    assert (engine["tokens/s"], engine["between_p50_ms"], server["refused"]) == (11.0, 100.0, 1)
    compared = comparison(server, engine)
    assert compared["share_of_tokens/s"] == 0.5 and compared["added_first_p50_ms"] == 250.0
    assert compared["cpu_ratio"] == 2.0
    assert comparison(figures([], 1.0, None), engine)["cpu_ratio"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--url", "http://x", "model"], "leave out the model"),
        (["model", "--random"], "either a model or --random"),
        (["--answer", "0"], "--answer must be 1 or more"),
        (["--clients", "1,0"], "must be 1 or more"),
        (["--rate", "inf"], "--rate must be a positive number"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
