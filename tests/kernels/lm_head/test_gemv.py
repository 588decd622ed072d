"""The LM head of one token: final RMSNorm and one row of weights per token of the vocabulary.

Tolerance. With e = 2^-24: a logit is a sum of K products in float32, in any order, so it is off by at most
K * e * sum|x w|; 1 / rms is off by (K / 2 + 3) * e, from its own sum; three more roundings make K * 1.5 + 8 in all.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.lm_head.gemv import MAX_LOADS, THREADS, lm_head_gemv, spec
from bitnet_numba.kernels.operands import EmbeddingTable, Norm, RowDtype
from bitnet_numba.kernels.runtime.device import DryRunDevice
from tests.kernels.harness import Out, arch, assert_close, needs_gpu, run, simulated
from tests.kernels.lm_head.rows import random_rows
from tests.kernels.variants import ROW_DTYPES

EPS = np.float32(1e-5)


def check_lm_head_gemv(K: int, rows: int, dtype: RowDtype, threads: int, max_loads: int, grid: int, seed: int) -> None:
    """Logits of random rows against float64."""
    rng = np.random.default_rng(seed)
    h = (rng.standard_normal(K) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    stored, scale, w = random_rows(rng, rows, K, dtype)
    wide = h.astype(np.float64)
    x = norm * (wide / np.sqrt(np.mean(wide * wide) + np.float64(EPS)))
    logits = Out(rows, np.float32)
    kernel = spec(arch(), K, dtype, threads, max_loads)
    run(kernel, grid, [stored.reshape(-1).view(np.int32), scale, h, norm, EPS, logits, rows])
    assert_close(logits.array, w @ x, (1.5 * K + 8) * 2.0**-24 * (np.abs(w) @ np.abs(x)), kernel.name)


@simulated
@pytest.mark.parametrize("dtype", ROW_DTYPES)
@settings(max_examples=3)
@given(
    K=st.integers(1, 20).map(lambda blocks: 32 * blocks),
    rows=st.integers(1, 9),
    max_loads=st.integers(1, 3),
    grid=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_gemv(K: int, rows: int, dtype: RowDtype, max_loads: int, grid: int, seed: int) -> None:
    check_lm_head_gemv(K, rows, dtype, 64, max_loads, grid, seed)


@needs_gpu
@settings(max_examples=12)
@given(
    K=st.sampled_from([32, 384, 2560, 3200, 4096, 5120]),
    rows=st.integers(1, 20000),
    dtype=st.sampled_from(ROW_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_gemv_on_gpu(K: int, rows: int, dtype: RowDtype, seed: int) -> None:
    check_lm_head_gemv(K, rows, dtype, THREADS, MAX_LOADS, 132, seed)


@pytest.mark.parametrize("K", [0, 16, 2561])
def test_refuses_columns(K: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 32 columns, not {K}"):
        spec(90, K, "bf16")


def test_launcher_refuses_operands() -> None:
    device = DryRunDevice(90, 132)
    rows, scale = device.empty(90 * 64, np.int8), device.empty(90, np.float32)
    table = EmbeddingTable(rows, scale, 90, 64, "int8")
    h, norm, logits = (
        device.empty(64, np.float32),
        Norm(device.empty(64, np.float32), 1e-5),
        device.empty(90, np.float32),
    )
    assert lm_head_gemv(device, table, h, norm, logits).name == spec(90, 64, "int8").name
    for arguments, message in (
        (
            (table, device.empty(63, np.float32), norm, logits),
            "h holds 63 elements, an LM head of 90 rows of 64 takes 64",
        ),
        ((table, h, Norm(device.empty(63, np.float32), 1e-5), logits), "norm holds 63 elements"),
        ((table, h, norm, device.empty(89, np.float32)), "logits holds 89 elements"),
        ((table, h, norm, device.empty(90, np.int32)), "logits must be float32, not int32"),
        ((EmbeddingTable(rows, None, 90, 64, "bf16"), h, norm, logits), "rows must be uint16, not int8"),
        (
            (EmbeddingTable(rows, device.empty(89, np.float32), 90, 64, "int8"), h, norm, logits),
            "scale holds 89 elements",
        ),
    ):
        with pytest.raises(ValueError, match=f"lm_head_gemv: {message}"):
            lm_head_gemv(device, *arguments)
