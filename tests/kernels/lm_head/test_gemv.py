"""The head: final RMSNorm and one row of weights per token of the vocabulary.

Tolerance. With e = 2^-24: a logit is a sum of K products in float32, in any order, so it is off by at most
K * e * sum|x w|; 1 / rms is off by (K / 2 + 3) * e, from its own sum; three more roundings make K * 1.5 + 8 in all.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.kernels.lm_head.gemv import THREADS, spec
from tests.kernels.harness import Out, arch, assert_close, needs_gpu, run, simulated

EPS = np.float32(1e-5)


def check_head(K: int, rows: int, int8: bool, threads: int, most_loads: int, grid: int, seed: int) -> None:
    """Logits of random rows, of either kind, against float64."""
    rng = np.random.default_rng(seed)
    h = (rng.standard_normal(K) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    if int8:
        stored, scale = (
            rng.integers(-128, 128, (rows, K)).astype(np.int8),
            rng.uniform(0.001, 3, rows).astype(np.float32),
        )
        w = stored.astype(np.float64) * scale[:, None]
    else:
        stored, scale = from_float32(rng.standard_normal((rows, K)).astype(np.float32)), None
        w = to_float32(stored).astype(np.float64)
    wide = h.astype(np.float64)
    x = norm * (wide / np.sqrt(np.mean(wide * wide) + np.float64(EPS)))
    logits = Out(rows, np.float32)
    kernel = spec(arch(), K, int8, threads, most_loads)
    run(kernel, grid, [stored.reshape(-1).view(np.int32), scale, h, norm, EPS, logits, rows])
    assert_close(logits.array, w @ x, (1.5 * K + 8) * 2.0**-24 * (np.abs(w) @ np.abs(x)), kernel.name)


@simulated
@settings(max_examples=8)
@given(
    K=st.integers(1, 20).map(lambda blocks: 32 * blocks),
    rows=st.integers(1, 9),
    int8=st.booleans(),
    most_loads=st.integers(1, 3),
    grid=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_head(K: int, rows: int, int8: bool, most_loads: int, grid: int, seed: int) -> None:
    check_head(K, rows, int8, 64, most_loads, grid, seed)


@needs_gpu
@settings(max_examples=12)
@given(
    K=st.sampled_from([32, 384, 2560, 3200, 4096, 5120]),
    rows=st.integers(1, 20000),
    int8=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_head_on_gpu(K: int, rows: int, int8: bool, seed: int) -> None:
    check_head(K, rows, int8, THREADS, 10, 132, seed)


@pytest.mark.parametrize("K", [0, 16, 2561])
def test_refuses_columns(K: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 32 columns, not {K}"):
        spec(90, K, False)
