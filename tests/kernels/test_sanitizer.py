"""compute-sanitizer watches each kernel once (each_kernel.py): no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.kernels.harness import ROOT, needs_gpu

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@needs_gpu
@pytest.mark.long
@pytest.mark.skipif(not os.path.exists(SANITIZER), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_each_kernel(tool: str) -> None:
    program = [sys.executable, "-m", "tests.kernels.each_kernel", tool]
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "1", *program]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "each kernel ran" in done.stdout
