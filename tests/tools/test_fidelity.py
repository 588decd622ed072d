"""The comparison of backends with a truth: figures are of the logits that it is given, and float32 is closer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import fidelity

TOOL = Path(fidelity.__file__)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=500)


def test_errors_are_in_units_of_the_prompts_spread() -> None:
    rng = np.random.default_rng(1)
    truth = [rng.normal(0, spread, (3, 50)).astype(np.float32) for spread in (1.0, 8.0)]
    off = [expected + np.float32(0.5) * expected.std() for expected in truth]
    off[1][2, 7] += 100 * truth[1].std()
    rows = fidelity.measure(truth, [[0, 1, 2], [3, 4, 5]], lambda ids: off[ids[0] // 3])
    assert rows[0]["rms"] == pytest.approx(0.5, rel=1e-5) and rows[0]["same best token"] == 1
    assert rows[1]["largest"] == pytest.approx(100.5, rel=1e-5) and rows[1]["same best token"] == pytest.approx(2 / 3)


def test_backends_beside_the_reference(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    which = "--backends", "cpu,reference", "--tokens", "1,5"
    done = run("--preset", "tiny", "--truth", "reference", *which, "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert len(done.stdout.splitlines()) == 2 + len(rows) == 2 + 3 * 3
    worst = {}
    for row in rows:
        kind = row["model"], row["keys and values"]
        worst[kind] = max(worst.get(kind, 0), row["rms"])
    assert worst["reference", "float32"] < 1e-4 and worst["cpu", "float32"] < 0.05  # a flip now and then
    assert 0.0 < worst["cpu", "bfloat16"] < 0.2


def test_mistakes_are_one_line() -> None:
    for arguments in (["--tokens", "0"], ["--tokens", "x"], ["--backends", "gpu"], ["nowhere", "--truth", "reference"]):
        done = run(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr
