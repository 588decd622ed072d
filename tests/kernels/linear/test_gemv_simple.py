"""The kernels to learn from: exact, equal to NumPy and to the fast GEMV, and plain Numba."""

import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import cuda
from numba.cuda import types

from bitnet_numba.kernels.linear import gemv as gemv_module
from bitnet_numba.kernels.linear import gemv_simple
from bitnet_numba.kernels.linear.gemv import Plan
from bitnet_numba.kernels.linear.gemv_simple import (
    four_a_word,
    four_codes_at_a_time,
    four_rows_at_a_time,
    one_code_at_a_time,
)
from bitnet_numba.kernels.runtime.compiler import compile_ptx
from bitnet_numba.packing import BLOCK_ROWS, pack_ternary
from tests.kernels.harness import ARCHITECTURES, ROOT, needs_gpu, simulated
from tests.kernels.linear.test_gemv import int8_sums

MAX_LINES = 40  # of a kernel
POISON = -7777777


def check_simple(N: int, K: int, threads: int, num_sms: int, seed: int) -> None:
    """NumPy == each simple kernel == the fast GEMV."""
    rng = np.random.default_rng(seed)
    w = rng.integers(-1, 2, (N, K)).astype(np.int8)
    q = rng.integers(-128, 128, K).astype(np.int8)
    expected = w.astype(np.int32) @ q.astype(np.int32)
    words, q_bytes, q_words = (cuda.to_device(array) for array in (pack_ternary(w), q, four_a_word(q)))
    a_thread_a_row, a_block_a_row_block = -(-N // threads), -(-N // BLOCK_ROWS)
    for kernel, blocks, activations in (
        (one_code_at_a_time, a_thread_a_row, q_bytes),
        (four_codes_at_a_time, a_thread_a_row, q_words),
        (four_rows_at_a_time, a_block_a_row_block, q_words),
    ):
        out = cuda.to_device(np.full(N, POISON, np.int32))
        kernel[blocks, threads](words, activations, out)
        assert np.array_equal(out.copy_to_host(), expected), kernel.py_func.__name__
    assert np.array_equal(int8_sums(w, q, num_sms), expected), "gemv"


@simulated
@settings(max_examples=8)
@example(N=17, K=33, threads=16, seed=0)
@given(N=st.integers(1, 40), K=st.integers(1, 150), threads=st.sampled_from([16, 32, 48]), seed=st.integers(0, 2**32))
def test_simulated_simple_kernels(N: int, K: int, threads: int, seed: int) -> None:
    from tests.kernels import simulator

    simulator.install()  # the order of threads between barriers is shuffled: a missing one shows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemv_module, "plan", lambda rows, *_: Plan(1, 1, -(-rows // (2 * BLOCK_ROWS)), 2))
        check_simple(N, K, threads, 1, seed)


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*Grid size")  # Numba warns of small grids
@settings(max_examples=25)
@given(
    N=st.integers(1, 3000),
    K=st.integers(1, 3000),
    threads=st.sampled_from([16, 32, 48, 256]),
    seed=st.integers(0, 2**32),
)
def test_simple_kernels_on_gpu(N: int, K: int, threads: int, seed: int) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device

    check_simple(N, K, threads, usable_device().num_sms, seed)


def test_the_example_runs_in_numbas_own_simulator() -> None:
    """As a reader would run it: the docstring's code, without the tests' scheduler."""
    text = gemv_simple.__doc__ or ""
    code = textwrap.dedent(re.findall(r"(?:^    .*\n|^\n)*^    assert .*\n", text, re.M)[-1])
    assert code.strip().startswith("import numpy as np")
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


KERNELS: list[tuple[Any, Any, int, int]] = [  # kernel, dtype of q, its least numbers of dp4a and of 16-byte loads
    (one_code_at_a_time, types.int8, 0, 0),
    (four_codes_at_a_time, types.int32, 8, 0),
    (four_rows_at_a_time, types.int32, 20, 2),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "q", "dp4a", "wide_loads"), KERNELS)
def test_simple_kernels_compile(kernel: Any, q: Any, dp4a: int, wide_loads: int, arch: int) -> None:
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("the simulator compiles nothing")
    words, activations = types.Array(types.int32, 1, "C"), types.Array(q, 1, "C")
    ptx = compile_ptx(kernel, (words, activations, words), arch, 128)
    assert len(re.findall(r"\bdp4a\.", ptx)) >= dp4a
    assert len(re.findall(r"\bld\.global\S*\.v4\.", ptx)) >= wide_loads
    assert ".local" not in ptx


def test_simple_kernels_are_short() -> None:
    for kernel, *_ in KERNELS:
        code = kernel.py_func.__code__
        last = max(line for _, _, line in code.co_lines() if line)
        assert last - code.co_firstlineno + 1 <= MAX_LINES, kernel.py_func.__name__
