"""A training in pieces, on the CPU and very small: what is left behind, and that the next piece goes on from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_numba.engine.loading import DEMO

ROOT = Path(__file__).parents[2]
SMALL = "--rows 1 --hidden 256 --layers 1 --ffn 256 --device cpu --workers 1 --report 1 --evaluate 0".split()


def trained(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/train_demo.py"), str(folder), *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_training_in_pieces(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, tmp_path)
    first = trained(tmp_path, "--steps", "4", "--piece", "0.0001")
    assert first.returncode == 0 and "--resume" in first.stdout.splitlines()[-1], first.stderr
    assert (tmp_path / "state.pt").is_file() and not (tmp_path / "training.json").exists()
    second = trained(tmp_path, "--steps", "4", "--resume")
    assert second.returncode == 0, second.stderr
    curve = json.loads((tmp_path / "training.json").read_text())["curve"]
    assert [point["step"] for point in curve] == [1, 2, 3, 4]
    assert all(point["waited"] >= 0 and point["loss"] < 9 for point in curve)
    assert not trained(tmp_path, "--steps", "4", "--resume").stdout.count("step 5")


@pytest.mark.parametrize("arguments", [(), ("--minutes", "0"), ("--steps", "4", "--piece", "0"), ("--steps", "-1")])
def test_a_length_that_is_none_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused = trained(tmp_path, *arguments)
    assert refused.returncode == 2 and "--steps" in refused.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
