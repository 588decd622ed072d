"""The W2A8 matrix product of many tokens.

Contract: int32 sums are exact, for every number of tokens and ragged sizes. Everything after them is a single float32
operation at a time, in the order of the matrix-vector product and of the reference: compared with `==`, but for silu,
whose exponential is good to 2 ulp, each of the three operations after it adding half of one: 2^-21 relative.
"""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.w2a8_matmul import Tile, form
from bitnet_numba.packing import BLOCK_ROWS, pack_ternary
from bitnet_numba.reference.model import relu2, silu
from tests.kernel_harness import Out, arch, assert_close, needs_gpu, run, run_simulated


def check_matmul(
    M: int, N: int, K: int, tile: Tile, epilogue: str, activation: str, bias: bool, seed: int, count: int | None = None
) -> None:
    """One product of random ternary weights, N rows in three segments of odd scales, `count` of M tokens real."""
    rng = np.random.default_rng(seed)
    gated, acc_only = epilogue == "gated", epilogue == "acc"
    count = M if count is None else count
    padded_K = -(-K // 32) * 32
    w = rng.integers(-1, 2, (N, K)).astype(np.int8)
    q = np.zeros((M, padded_K), np.int8)
    q[:, :K] = rng.integers(-127, 128, (M, K))
    s = (rng.uniform(0.5, 2, M) * 10.0 ** rng.integers(-3, 4, M)).astype(np.float32)
    if activation == "silu":
        s = s * np.float32(K) + np.float32(3 * K)  # the simulator's exp refuses to overflow
    rows = N // 2 if gated else N
    bounds = (rows, N) if gated else (N // 3, N // 3 + 5)
    scales = np.array([0.0137, 1.71, 0.29], np.float32)
    segments = np.searchsorted(bounds, np.arange(N), side="right")
    b = rng.standard_normal(N).astype(np.float32) if bias else None
    # Sums of up to K * 127 are exact in float64, which NumPy multiplies much faster than integers.
    acc = (q[:, :K].astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32)
    y = acc.astype(np.float32) * scales[segments] / s[:, None]
    if b is not None:
        y = y + b
    old = rng.standard_normal((M, rows)).astype(np.float32)
    expected, bound = y, np.float64(0)
    if gated:
        activate = relu2 if activation == "relu2" else silu
        expected = activate(y[:, :rows]) * y[:, rows:]
        bound = 2.0**-21 * np.abs(expected.astype(np.float64)) if activation == "silu" else bound
    elif epilogue == "residual":
        expected = old + y

    out = Out(M * rows, np.int32) if acc_only else Out(M * rows, np.float32, old if epilogue == "residual" else None)
    before = out.array.reshape(M, rows).copy()
    kernel = form(arch(), tile, epilogue, activation, bias)
    blocks = -(-rows // BLOCK_ROWS)
    units = tile.rows // BLOCK_ROWS // (2 if gated else 1)
    turns = -(-padded_K // (64 * tile.k_warps))
    total = q.sum(axis=1, dtype=np.int32)
    sizes = (M, rows, padded_K, turns, blocks, blocks if gated else 0, *bounds)
    arguments = [pack_ternary(w), q.view(np.int32), s, total, np.array([count], np.int32), scales, b, out, *sizes]
    run(kernel, (-(-M // tile.tokens), -(-blocks // units)), arguments)
    result = out.array.reshape(M, rows)
    wanted = acc if acc_only else expected
    assert_close(result[:count], wanted[:count], np.broadcast_to(bound, wanted.shape)[:count], kernel.name)
    beyond = -(-count // tile.tokens) * tile.tokens
    assert result[beyond:].tobytes() == before[beyond:].tobytes(), f"{kernel.name}: wrote tokens that are not there"


KINDS = st.sampled_from(
    [("acc", "relu2"), ("store", "relu2"), ("residual", "relu2"), ("gated", "relu2"), ("gated", "silu")]
)


@settings(max_examples=8)
@example(M=11, N=40, K=290, kind=("acc", "relu2"), bias=False, tile=Tile(8, 2, 1, 2, 2, 2), short=0, seed=1)
@example(M=9, N=70, K=200, kind=("residual", "relu2"), bias=True, tile=Tile(16, 1, 2, 1, 3, 0), short=3, seed=2)
@example(M=5, N=64, K=160, kind=("gated", "silu"), bias=True, tile=Tile(8, 2, 1, 2, 1, 3), short=0, seed=3)
@given(
    M=st.integers(1, 20),
    N=st.integers(1, 70),
    K=st.integers(1, 300),
    kind=KINDS,
    bias=st.booleans(),
    tile=st.builds(
        Tile,
        st.sampled_from([8, 16]),
        st.sampled_from([2, 4]),
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 3),
        st.sampled_from([0, 2, 3]),
    ),
    short=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def simulate_matmul(
    M: int, N: int, K: int, kind: tuple[str, str], bias: bool, tile: Tile, short: int, seed: int
) -> None:
    if kind[0] == "gated":
        N = -(-N // 32) * 32
    check_matmul(M, N, K, tile, *kind, bias, seed, max(1, M - short))


def test_simulated() -> None:
    run_simulated(__file__)
