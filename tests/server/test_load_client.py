"""The load client of tools/bench.py counts what the server does."""

import json
import math
from pathlib import Path

import pytest

from tests.server.helpers import Running
from tools.bench import main
from tools.benchmarks.serve import percentile


@pytest.mark.parametrize("load", [["--clients", "1,3"], ["--rate", "200"]])
def test_figures(server: Running, load: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--requests", "6", "--prompt", "5", "--answer", "9", "--json", str(file)]
    assert main(["serve", "--url", server.url, *load, *sizes]) == 0
    runs = json.loads(file.read_text())
    assert len(runs) == (2 if "--clients" in load else 1)
    for run in runs:
        assert run["refused"] == 0 and run["tokens/s"] == pytest.approx(9 * run["requests/s"])
        assert 0 < run["first_p50_ms"] <= run["first_p99_ms"] and 0 <= run["between_p50_ms"] <= run["between_p99_ms"]
    assert capsys.readouterr().out.count("\n| ") == len(runs)


def test_percentiles() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    assert [percentile(values, share) for share in (0, 25, 50, 99, 100)] == [1.0, 1.0, 2.0, 4.0, 4.0]
    assert math.isnan(percentile([], 50))
