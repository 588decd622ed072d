"""The LM head of many tokens on sm_90 with int8 rows: bfloat16 of them and float32 sums by warpgroups.

Tolerance: that of test_gemm.py, whose terms and whose sums of 16 products at a time these are.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.lm_head import gemm_wgmma_int8 as kernel
from bitnet_numba.kernels.lm_head import split_norm
from bitnet_numba.kernels.lm_head.gemm import layout_for, lm_head_gemm, split_words
from bitnet_numba.kernels.lm_head.gemm_wgmma import ARCH, num_k_iters
from bitnet_numba.kernels.operands import EmbeddingTable, Norm
from tests.kernels.harness import Out, arch, assert_close, mapped, needs_gpu, run, simulated, why_no_gpu
from tests.kernels.lm_head.rows import random_rows
from tests.kernels.lm_head.test_gemm import EPS, normed, tolerance
from tests.kernels.variants import lm_head_gemm_wgmma_int8

VOCABULARY, HIDDEN = 128256, 2560  # of 2B4T
only_there = pytest.mark.skipif(not why_no_gpu() and arch() != ARCH, reason=f"this kernel is sm_{ARCH}'s alone")


Inputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def inputs(rng: np.random.Generator, rows: int, tokens: int, K: int) -> Inputs:
    """h float32 [tokens, K] of odd sizes, norm float32 [K]; rows int8 [rows, K], their scales float32 [rows], and what
    they stand for, float64 [rows, K]."""
    h = (rng.standard_normal((tokens, K)) * 10.0 ** rng.uniform(-3, 3, (tokens, 1))).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    weight, scale, values = random_rows(rng, rows, K, "int8")
    assert scale is not None
    return h, norm, weight, scale, values


def launch(
    h: np.ndarray,
    norm: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    blocks: int,
    tile: kernel.Tile | None = None,
    threads: int = split_norm.THREADS,
) -> np.ndarray:
    """Logits [tokens, rows] by the two kernels; `tile`: with fewer rows and stages than the plan's."""
    (num_tokens, K), num_rows = h.shape, len(weight)
    plan = kernel.plan(num_tokens)
    tile = tile._replace(tokens=plan.tokens) if tile else plan
    padded = split_norm.padded_tokens("wgmma", num_tokens)
    x = Out(split_norm.x_words("wgmma", num_tokens, K, "int8"), np.int32)
    run(split_norm.spec(ARCH, K, "wgmma", "int8", threads), padded, [h, norm, EPS, x, num_tokens, tile.tokens])
    logits = Out(num_tokens * num_rows, np.float32)
    of_weight, of_x = kernel.map_shapes(tile, num_rows, num_tokens, K)
    (weights, _on_device), (terms, _too) = mapped(weight, of_weight), mapped(x.array.copy(), of_x)
    arguments = [weights, terms, scale, logits, num_rows, num_tokens, num_k_iters(K)]
    run(kernel.spec(ARCH, tile), (blocks, padded // tile.tokens), arguments)
    return logits.array.reshape(num_tokens, num_rows)


def check_lm_head_wgmma_int8(
    K: int,
    rows: int,
    tokens: int,
    blocks: int,
    seed: int,
    tile: kernel.Tile | None = None,
    threads: int = split_norm.THREADS,
) -> None:
    """Logits of random rows and tokens against float64."""
    h, norm, weight, scale, w = inputs(np.random.default_rng(seed), rows, tokens, K)
    x = normed(h, norm)
    logits = launch(h, norm, weight, scale, blocks, tile, threads)
    assert_close(logits, x @ w.T, tolerance(K, "int8") * (np.abs(x) @ np.abs(w).T), f"{tokens} tokens, {rows} x {K}")


def check_company(
    K: int,
    rows: int,
    counts: list[int],
    blocks: int,
    seed: int,
    tile: kernel.Tile | None = None,
    threads: int = split_norm.THREADS,
) -> None:
    """A token's logits are the same bits whatever the number of tokens in its launch."""
    h, norm, weight, scale, _ = inputs(np.random.default_rng(seed), rows, max(counts), K)
    most = launch(h, norm, weight, scale, blocks, tile, threads)
    for tokens in counts:
        logits = launch(h[:tokens], norm, weight, scale, blocks, tile, threads)
        assert logits.tobytes() == most[:tokens].tobytes(), f"{tokens} tokens: other bits than {max(counts)}"


SMALL = st.sampled_from([kernel.Tile(8, 1, 2), kernel.Tile(8, 1, 5), kernel.Tile(8, 2, 3)])


@simulated
@settings(max_examples=6)
@given(
    K=st.sampled_from([32, 64, 160, 288]),
    rows=st.integers(1, 300),
    tokens=st.sampled_from([1, 3, 8, 9, 16]),
    tile=SMALL,
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_wgmma(K: int, rows: int, tokens: int, tile: kernel.Tile, seed: int) -> None:
    check_lm_head_wgmma_int8(K, rows, tokens, 1 + seed % 2, seed, tile, 64)


@simulated
@settings(max_examples=2)
@given(tile=SMALL, seed=st.integers(0, 2**32 - 1))
def test_simulated_company(tile: kernel.Tile, seed: int) -> None:
    check_company(96, 70, [1, 11], 1, seed, tile, 64)


@simulated
def test_simulated_groups() -> None:
    """More tokens than a group has."""
    check_lm_head_wgmma_int8(32, 17, 130, 1, 1, kernel.Tile(8, 1, 2), 32)


@needs_gpu
@only_there
@settings(max_examples=16)
@given(
    K=st.sampled_from([32, 384, 2080, 2560, 4096]),
    rows=st.integers(1, 9000),
    tokens=st.sampled_from([1, 2, 8, 16, 23, 32, 64, 100, 128, 300]),
    blocks=st.sampled_from([3, 132]),
    seed=st.integers(0, 2**32 - 1),
)
def test_wgmma_on_gpu(K: int, rows: int, tokens: int, blocks: int, seed: int) -> None:
    check_lm_head_wgmma_int8(K, rows, tokens, blocks, seed)


@needs_gpu
@only_there
@settings(max_examples=6)
@given(
    K=st.sampled_from([384, 2560]),
    rows=st.integers(1, 9000),
    blocks=st.sampled_from([5, 132]),
    seed=st.integers(0, 2**32 - 1),
)
def test_company_on_gpu(K: int, rows: int, blocks: int, seed: int) -> None:
    check_company(K, rows, [1, 8, 16, 17, 33, 65, 128, 200], blocks, seed)


@pytest.fixture(scope="module")
def full_size() -> Any:
    """h of 200 tokens, norm, as many rows as 2B4T has, and their scales."""
    rng = np.random.default_rng(0)
    h, norm, _, _, _ = inputs(rng, 1, 200, HIDDEN)
    rows = rng.integers(-128, 128, (VOCABULARY, HIDDEN), np.int8)
    return h, norm, rows, rng.uniform(0.001, 3, VOCABULARY).astype(np.float32)


@needs_gpu
@only_there
@pytest.mark.parametrize("tokens", [1, 8, 17, 64, 128, 200])
def test_full_size_on_gpu(tokens: int, full_size: Any) -> None:
    h, norm, weight, scale = full_size
    logits = launch(h[:tokens], norm, weight, scale, 132)
    assert np.isfinite(logits).all()
    chosen = np.random.default_rng(tokens).choice(VOCABULARY, 1000, replace=False)
    chosen[:4] = 0, 255, 256, VOCABULARY - 1
    x, w = normed(h[:tokens], norm), weight[chosen].astype(np.float64) * scale[chosen, None]
    bound = tolerance(HIDDEN, "int8") * (np.abs(x) @ np.abs(w).T)
    assert_close(logits[:, chosen], x @ w.T, bound, f"{tokens} tokens of the whole vocabulary")


@needs_gpu
@only_there
def test_launcher_on_gpu() -> None:
    """Launches that overlap give the same bits as those alone."""
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream

    device, stream = usable_device(), Stream()
    num_rows, num_tokens, K = 5000, 40, 2560
    h, norm, weight, scale, _ = inputs(np.random.default_rng(5), num_rows, num_tokens, K)
    table = EmbeddingTable(device.array(weight), device.array(scale), num_rows, K, "int8")
    split = device.empty(split_words(device, table, num_tokens), np.int32)
    logits = device.empty(num_tokens * num_rows, np.float32)
    on_device = device.array(h), Norm(device.array(norm), float(EPS))
    launches = lm_head_gemm(device, table, *on_device, split, logits, num_tokens)
    for _ in range(3):
        for each in launches:
            each(stream.handle)
    stream.synchronize()
    assert np.array_equal(logits.read().reshape(num_tokens, num_rows), launch(h, norm, weight, scale, 132))


def test_plan() -> None:
    sizes = [1, 8, 9, 16, 17, 33, 65, 128, 129, 2000]
    assert [kernel.plan(tokens).tokens for tokens in sizes] == [8, 8, 16, 16, 32, 64, 128, 128, 128, 128]
    for tokens in sizes:
        tile = kernel.plan(tokens)
        assert tile.stages >= 3
        weights, x = kernel.map_shapes(tile, 1000, tokens, 96)
        assert weights == (1000, 24, 128, 16) and x[1] == 64  # columns are padded in x, not in memory for rows
        assert x[2] <= 256  # rows of a TMA load


def test_serves_one_architecture() -> None:
    chosen = [layout_for(target, "int8") for target in (80, 89, 90, 100)]
    assert chosen == ["mma", "mma", "wgmma", "mma"]
    assert lm_head_gemm_wgmma_int8(80) == [] and len(lm_head_gemm_wgmma_int8(90)) == 6


@pytest.mark.parametrize("tile", [(24, 2, 3), (128, 2, 6), (8, 2, 1), (8, 2, 7, 2)])
def test_refuses_tiles(tile: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="lm_head_wgmma_int8: no kernel for"):
        kernel.spec(90, kernel.Tile(*tile))
