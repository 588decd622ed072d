"""Every tool explains itself, whatever of the extras is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.mark.parametrize("tool", sorted(path.name for path in TOOLS.glob("*.py") if path.name != "__init__.py"))
def test_help(tool: str) -> None:
    done = subprocess.run([sys.executable, TOOLS / tool, "--help"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")
    assert "(default: None)" not in done.stdout and "(default: False)" not in done.stdout
    assert ") (default: " not in " ".join(done.stdout.split())  # told once
