"""The recorded numbers hold with the matrix products of other CPUs, too.

OpenBLAS has a kernel for each family of CPUs, and NumPy's wheels bring it with all of them: forcing another one, and
another number of threads, gives sums in another order on the same machine.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NEEDS = {  # OpenBLAS's name of the kernel, and the flags of /proc/cpuinfo without which it would crash
    "Haswell": {"avx2", "fma"},
    "SkylakeX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
}
CHILD = "-m pytest -q -s -p no:xdist -p no:cacheprovider -m golden tests/reference tests/demo tests/test_quantize.py"


def cpu_flags() -> set[str]:
    """What Linux says that an x86 CPU has; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


# `make test` itself runs with one thread of this machine's kernel.
@pytest.mark.parametrize("kernel, threads", [("Haswell", "1"), ("SkylakeX", "2")])
def test_recorded_numbers_hold(kernel: str, threads: str) -> None:
    if missing := NEEDS[kernel] - cpu_flags():
        pytest.skip(f"this machine's CPU has no {', '.join(sorted(missing))}")
    # At 2 it says on standard error which kernel it took.
    forced = {"OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": threads, "OPENBLAS_VERBOSE": "2"}
    command = [sys.executable, *CHILD.split()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | forced, capture_output=True, text=True, timeout=600)
    if "Core: " not in done.stderr:
        pytest.skip("NumPy's matrix products are not OpenBLAS's")
    assert f"Core: {kernel}" in done.stderr
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
