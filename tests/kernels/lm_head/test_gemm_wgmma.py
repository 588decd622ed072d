"""The LM head of many tokens on sm_90 with bfloat16 rows: two terms and float32 sums by warpgroups.

Tolerance: that of test_gemm.py, whose terms and whose sums of 16 products at a time these are.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.lm_head import gemm_wgmma as kernel
from bitnet_numba.kernels.lm_head import split_norm
from bitnet_numba.kernels.lm_head.gemm import layout_for, lm_head_gemm, split_words
from bitnet_numba.kernels.lm_head.gemm_wgmma import ARCH
from bitnet_numba.kernels.operands import EmbeddingTable, Norm, RowDtype
from bitnet_numba.kernels.runtime.spec import ArchSpec
from tests.kernels.harness import Out, arch, assert_close, mapped, needs_gpu, run, simulated, why_no_gpu
from tests.kernels.lm_head.test_gemm import EPS, normed, tolerance
from tests.kernels.variants import lm_head_gemm_wgmma
from tools.make_checkpoint import PRESETS

VOCABULARY, HIDDEN = 128256, 2560  # of 2B4T
only_there = pytest.mark.skipif(not why_no_gpu() and arch() != ARCH, reason=f"this kernel is sm_{ARCH}'s alone")


def inputs(rng: np.random.Generator, rows: int, tokens: int, K: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h, norm, weights: float32 [tokens, K] of odd sizes, float32 [K], bfloat16 bits [rows, K]."""
    h = (rng.standard_normal((tokens, K)) * 10.0 ** rng.uniform(-3, 3, (tokens, 1))).astype(np.float32)
    weight = from_float32(rng.standard_normal((rows, K), np.float32))
    return h, rng.standard_normal(K).astype(np.float32), weight


def launch(
    h: np.ndarray,
    norm: np.ndarray,
    weight: np.ndarray,
    blocks: int,
    tile: kernel.Tile | None = None,
    threads: int = split_norm.THREADS,
) -> np.ndarray:
    """Logits [tokens, rows] by the two kernels; `tile`: with fewer rows and stages than the plan's."""
    (num_tokens, K), num_rows = h.shape, len(weight)
    plan = kernel.plan(num_tokens)
    tile = tile._replace(tokens=plan.tokens) if tile else plan
    padded = split_norm.padded_tokens("wgmma", num_tokens)
    x = Out(split_norm.x_words("wgmma", num_tokens, K, "bf16"), np.int32)
    run(split_norm.spec(ARCH, K, "wgmma", "bf16", threads), padded, [h, norm, EPS, x, num_tokens, tile.tokens])
    logits = Out(num_tokens * num_rows, np.float32)
    of_weight, of_x = kernel.map_boxes(tile, num_rows, num_tokens, K)
    (weights, _on_device), (terms, _too) = mapped(weight, of_weight), mapped(x.array.copy(), of_x)
    grid = (blocks, padded // tile.tokens)
    run(kernel.spec(ARCH, tile), grid, [weights, terms, logits, num_rows, num_tokens, kernel.num_k_iters(K)])
    return logits.array.reshape(num_tokens, num_rows)


def check_lm_head_wgmma(
    K: int,
    rows: int,
    tokens: int,
    blocks: int,
    seed: int,
    tile: kernel.Tile | None = None,
    threads: int = split_norm.THREADS,
) -> None:
    """Logits of random rows and tokens against float64."""
    h, norm, weight = inputs(np.random.default_rng(seed), rows, tokens, K)
    x, w = normed(h, norm), to_float32(weight).astype(np.float64)
    logits = launch(h, norm, weight, blocks, tile, threads)
    assert_close(logits, x @ w.T, tolerance(K) * (np.abs(x) @ np.abs(w).T), f"{tokens} tokens, {rows} x {K}")


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
    h, norm, weight = inputs(np.random.default_rng(seed), rows, max(counts), K)
    most = launch(h, norm, weight, blocks, tile, threads)
    for tokens in counts:
        logits = launch(h[:tokens], norm, weight, blocks, tile, threads)
        assert logits.tobytes() == most[:tokens].tobytes(), f"{tokens} tokens: other bits than {max(counts)}"


SMALL = st.sampled_from([kernel.Tile(8, 1, 1, 2), kernel.Tile(8, 1, 2, 3), kernel.Tile(8, 2, 1, 5)])


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
    check_lm_head_wgmma(K, rows, tokens, 1 + seed % 2, seed, tile, 64)


@simulated
@settings(max_examples=2)
@given(tile=SMALL, seed=st.integers(0, 2**32 - 1))
def test_simulated_company(tile: kernel.Tile, seed: int) -> None:
    check_company(96, 70, [1, 11], 1, seed, tile, 64)


@simulated
def test_simulated_groups() -> None:
    """More tokens than a group has."""
    check_lm_head_wgmma(32, 17, 130, 1, 1, kernel.Tile(8, 1, 1, 2), 32)


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
    check_lm_head_wgmma(K, rows, tokens, blocks, seed)


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
    """h of 200 tokens, norm, 2B4T's rows."""
    return inputs(np.random.default_rng(0), VOCABULARY, 200, HIDDEN)


@needs_gpu
@only_there
@pytest.mark.parametrize("tokens", [1, 8, 17, 64, 128, 200])
def test_full_size_on_gpu(tokens: int, full_size: Any) -> None:
    h, norm, weight = full_size
    logits = launch(h[:tokens], norm, weight, 132)
    assert np.isfinite(logits).all()
    chosen = np.random.default_rng(tokens).choice(VOCABULARY, 1000, replace=False)
    chosen[:4] = 0, 255, 256, VOCABULARY - 1
    x, w = normed(h[:tokens], norm), to_float32(weight[chosen]).astype(np.float64)
    bound = tolerance(HIDDEN) * (np.abs(x) @ np.abs(w).T)
    assert_close(logits[:, chosen], x @ w.T, bound, f"{tokens} tokens of the whole vocabulary")


@needs_gpu
@only_there
def test_launcher_on_gpu() -> None:
    """Launches that overlap give the same bits as those alone."""
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream

    device, stream = usable_device(), Stream()
    num_rows, num_tokens, K = 5000, 40, 2560
    h, norm, weight = inputs(np.random.default_rng(5), num_rows, num_tokens, K)
    table = EmbeddingTable(device.array(weight), None, num_rows, K, "bf16")
    split = device.empty(split_words(device, table, num_tokens), np.int32)
    logits = device.empty(num_tokens * num_rows, np.float32)
    on_device = device.array(h), Norm(device.array(norm), float(EPS))
    launches = lm_head_gemm(device, table, *on_device, split, logits, num_tokens)
    for _ in range(3):
        for each in launches:
            each(stream.handle)
    stream.synchronize()
    assert np.array_equal(logits.read().reshape(num_tokens, num_rows), launch(h, norm, weight, 132))


def test_plan() -> None:
    sizes = [1, 8, 9, 16, 17, 33, 65, 128, 129, 2000]
    assert [kernel.plan(tokens).tokens for tokens in sizes] == [8, 8, 16, 16, 32, 64, 128, 128, 128, 128]
    assert [split_norm.padded_tokens("wgmma", tokens) for tokens in sizes[-4:]] == [128, 128, 256, 2048]
    for tokens in sizes:
        tile = kernel.plan(tokens)
        assert tile.stages >= 3 and tile.rows == 256
        weights, x = kernel.map_boxes(tile, 1000, tokens, 96)
        assert max(weights.box[0], x.box[0]) <= 256  # rows of a TMA load
    assert kernel.num_k_iters(2560) == 40 and kernel.num_k_iters(2592) == 41


def test_serves_one_architecture() -> None:
    chosen = [layout_for(target, dtype) for target, dtype in ((90, "bf16"), (90, "int8"), (90, "f16"), (100, "bf16"))]
    assert chosen == ["wgmma", "mma", "mma", "mma"]
    assert lm_head_gemm_wgmma(80) == [] and len(lm_head_gemm_wgmma(90)) == 6


@pytest.mark.parametrize("tile", [(24, 2, 2, 3), (128, 2, 2, 4), (128, 3, 2, 2), (8, 2, 2, 1)])
def test_refuses_tiles(tile: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="lm_head_wgmma: no kernel for"):
        kernel.spec(90, kernel.Tile(*tile))


def test_batches_have_its_variants_compiled() -> None:
    from bitnet_numba.backends.cuda.warmup import Needs
    from bitnet_numba.backends.cuda.weights import RowFormats

    config = ModelConfig.from_hf(PRESETS["2b-4t"][1] | {"quantization_config": {"quant_method": "bitnet"}})
    cases: list[tuple[int, RowDtype, bool]] = [
        (90, "bf16", True),
        (90, "int8", False),
        (90, "f16", False),
        (80, "bf16", False),
    ]
    for arch_, dtype, expected in cases:
        needs = Needs(config, RowFormats(dtype, dtype), ArchSpec(arch_, 132), 200)
        names = {spec.name for spec in needs.specs()}
        taken = {kernel.spec(90, kernel.plan(rows)).name for rows in (1, 16, 32, 64, 128, 200)}
        taken |= {split_norm.spec(90, config.hidden_size, "wgmma", "bf16").name}
        assert taken <= names if expected else not taken & names
        assert any(name.startswith("lm_head_mma") for name in names) != expected
