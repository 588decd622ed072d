"""The LM head of many tokens on sm_90 by warpgroups: bfloat16 rows with two terms of x and float32 sums, int8 rows with
three terms and int32 sums.

Tolerance. bfloat16: that of test_gemm.py, whose terms and whose sums of 16 products at a time these are. int8: a column
of x is off by 3/4 unit, and by 1 / rms, which is off by (K / 2 + 3) * e, with e = 2^-24; the sum is exact; three more
roundings, and the norm's six.
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
from tests.kernels.lm_head.rows import random_rows
from tests.kernels.lm_head.test_gemm import EPS, normed, tolerance
from tests.kernels.variants import lm_head_gemm_wgmma
from tools.make_checkpoint import PRESETS

VOCABULARY, HIDDEN = 128256, 2560  # of 2B4T
only_there = pytest.mark.skipif(not why_no_gpu() and arch() != ARCH, reason=f"this kernel is sm_{ARCH}'s alone")


DTYPES: tuple[RowDtype, ...] = ("bf16", "int8")
Inputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]


def inputs(rng: np.random.Generator, dtype: RowDtype, rows: int, tokens: int, K: int) -> Inputs:
    """h float32 [tokens, K] of odd sizes, norm float32 [K]; rows, their scales and what they stand for, as of
    `random_rows`."""
    h = (rng.standard_normal((tokens, K)) * 10.0 ** rng.uniform(-3, 3, (tokens, 1))).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    return h, norm, *random_rows(rng, rows, K, dtype)


def allowed(x: np.ndarray, w: np.ndarray, dtype: RowDtype) -> np.ndarray:
    """The largest errors of logits: see above."""
    K = x.shape[1]
    magnitudes = np.abs(x) @ np.abs(w).T
    if dtype == "bf16":
        return tolerance(K) * magnitudes
    units = np.abs(x).max(axis=1) / float(split_norm.LARGEST)
    return (K / 2 + 13) * 2.0**-24 * magnitudes + np.outer(0.75 * units, np.abs(w).sum(axis=1))


def launch(
    h: np.ndarray,
    norm: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray | None,
    blocks: int,
    tile: kernel.Tile | None = None,
    threads: int = split_norm.THREADS,
) -> np.ndarray:
    """Logits [tokens, rows] by the two kernels; `tile`: with fewer rows and stages than the plan's."""
    dtype: RowDtype = "bf16" if scale is None else "int8"
    (num_tokens, K), num_rows, layout = h.shape, len(weight), kernel.LAYOUTS[dtype]
    plan = kernel.plan(num_tokens, dtype)
    tile = tile._replace(tokens=plan.tokens, dtype=dtype) if tile else plan
    padded = split_norm.padded_tokens(layout, num_tokens)
    x = Out(split_norm.x_words(layout, num_tokens, K, dtype), np.int32)
    run(split_norm.spec(ARCH, K, layout, dtype, threads), padded, [h, norm, EPS, x, num_tokens, tile.tokens])
    logits = Out(num_tokens * num_rows, np.float32)
    of_weight, of_x = kernel.map_boxes(tile, num_rows, num_tokens, K)
    terms = x.array.copy()
    (weights, _on_device), (mapped_terms, _too) = mapped(weight, of_weight), mapped(terms[: of_x.size], of_x)
    of_int8 = [None, None] if scale is None else [scale, terms]
    sizes = [num_rows, num_tokens, kernel.num_k_iters(tile, K), kernel.row_ints(tile, K)]
    run(kernel.spec(ARCH, tile), (blocks, padded // tile.tokens), [weights, mapped_terms, *of_int8, logits, *sizes])
    return logits.array.reshape(num_tokens, num_rows)


def check_lm_head_wgmma(
    dtype: RowDtype,
    K: int,
    rows: int,
    tokens: int,
    blocks: int,
    seed: int,
    tile: kernel.Tile | None = None,
    threads: int = split_norm.THREADS,
) -> None:
    """Logits of random rows and tokens against float64."""
    h, norm, weight, scale, w = inputs(np.random.default_rng(seed), dtype, rows, tokens, K)
    x = normed(h, norm)
    logits = launch(h, norm, weight, scale, blocks, tile, threads)
    assert_close(logits, x @ w.T, allowed(x, w, dtype), f"{tokens} tokens, {rows} x {K} of {dtype}")


def check_company(
    dtype: RowDtype,
    K: int,
    rows: int,
    counts: list[int],
    blocks: int,
    seed: int,
    tile: kernel.Tile | None = None,
    threads: int = split_norm.THREADS,
) -> None:
    """A token's logits are the same bits whatever the number of tokens in its launch."""
    h, norm, weight, scale, _ = inputs(np.random.default_rng(seed), dtype, rows, max(counts), K)
    most = launch(h, norm, weight, scale, blocks, tile, threads)
    for tokens in counts:
        logits = launch(h[:tokens], norm, weight, scale, blocks, tile, threads)
        assert logits.tobytes() == most[:tokens].tobytes(), f"{tokens} tokens: other bits than {max(counts)}"


SMALL = st.sampled_from([kernel.Tile(8, 1, 1, 2), kernel.Tile(8, 1, 2, 3), kernel.Tile(8, 2, 1, 5)])


@simulated
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=4)
@given(
    K=st.sampled_from([32, 64, 160, 288]),
    rows=st.integers(1, 300),
    tokens=st.sampled_from([1, 3, 8, 9, 16]),
    tile=SMALL,
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_wgmma(dtype: RowDtype, K: int, rows: int, tokens: int, tile: kernel.Tile, seed: int) -> None:
    check_lm_head_wgmma(dtype, K, rows, tokens, 1 + seed % 2, seed, tile, 64)


@simulated
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=2)
@given(tile=SMALL, seed=st.integers(0, 2**32 - 1))
def test_simulated_company(dtype: RowDtype, tile: kernel.Tile, seed: int) -> None:
    check_company(dtype, 96, 70, [1, 11], 1, seed, tile, 64)


@simulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_simulated_groups(dtype: RowDtype) -> None:
    """More tokens than a group has."""
    check_lm_head_wgmma(dtype, 32, 17, 130, 1, 1, kernel.Tile(8, 1, 1, 2), 32)


@needs_gpu
@only_there
@settings(max_examples=24)
@given(
    K=st.sampled_from([32, 384, 2080, 2560, 4096]),
    rows=st.integers(1, 9000),
    tokens=st.sampled_from([1, 2, 8, 16, 23, 32, 64, 100, 128, 300, 416]),
    blocks=st.sampled_from([3, 132]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_wgmma_on_gpu(dtype: RowDtype, K: int, rows: int, tokens: int, blocks: int, seed: int) -> None:
    check_lm_head_wgmma(dtype, K, rows, tokens, blocks, seed)


@needs_gpu
@only_there
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=4)
@given(
    K=st.sampled_from([384, 2560]),
    rows=st.integers(1, 9000),
    blocks=st.sampled_from([5, 132]),
    seed=st.integers(0, 2**32 - 1),
)
def test_company_on_gpu(dtype: RowDtype, K: int, rows: int, blocks: int, seed: int) -> None:
    check_company(dtype, K, rows, [1, 8, 16, 17, 33, 65, 128, 200, 300, 416], blocks, seed)


@pytest.fixture(scope="module", params=DTYPES)
def full_size(request: Any) -> Any:
    """Row dtype, h of 200 tokens, norm, as many rows as 2B4T has, and their scales."""
    rng, dtype = np.random.default_rng(0), request.param
    h, norm, *_ = inputs(rng, dtype, 1, 200, HIDDEN)
    if dtype == "bf16":
        return dtype, h, norm, from_float32(rng.standard_normal((VOCABULARY, HIDDEN), np.float32)), None
    rows = rng.integers(-128, 128, (VOCABULARY, HIDDEN), np.int8)
    return dtype, h, norm, rows, rng.uniform(0.001, 3, VOCABULARY).astype(np.float32)


@needs_gpu
@only_there
@pytest.mark.parametrize("tokens", [1, 8, 17, 64, 128, 200])
def test_full_size_on_gpu(tokens: int, full_size: Any) -> None:
    dtype, h, norm, weight, scale = full_size
    logits = launch(h[:tokens], norm, weight, scale, 132)
    assert np.isfinite(logits).all()
    chosen = np.random.default_rng(tokens).choice(VOCABULARY, 1000, replace=False)
    chosen[:4] = 0, 255, 256, VOCABULARY - 1
    x, few = normed(h[:tokens], norm), weight[chosen]
    w = to_float32(few).astype(np.float64) if scale is None else few.astype(np.float64) * scale[chosen, None]
    assert_close(logits[:, chosen], x @ w.T, allowed(x, w, dtype), f"{tokens} tokens of the whole vocabulary")


@needs_gpu
@only_there
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [40, 130])
def test_launcher_on_gpu(dtype: RowDtype, num_tokens: int) -> None:
    """Launches that overlap give the same bits as those alone."""
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream

    device, stream = usable_device(), Stream()
    num_rows, K = 5000, 2560
    h, norm, weight, scale, _ = inputs(np.random.default_rng(5), dtype, num_rows, num_tokens, K)
    on_card = None if scale is None else device.array(scale)
    table = EmbeddingTable(device.array(weight), on_card, num_rows, K, dtype)
    split = device.empty(split_words(device, table, num_tokens), np.int32)
    logits = device.empty(num_tokens * num_rows, np.float32)
    on_device = device.array(h), Norm(device.array(norm), float(EPS))
    launches = lm_head_gemm(device, table, *on_device, split, logits, num_tokens)
    for _ in range(3):
        for each in launches:
            each(stream.handle)
    stream.synchronize()
    assert np.array_equal(logits.read().reshape(num_tokens, num_rows), launch(h, norm, weight, scale, 132))


def terms_of(h: np.ndarray, norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x for int8 rows: whole numbers int64 [tokens, K] and units float32 [tokens]."""
    num_tokens, K = h.shape
    layout: split_norm.Layout = "wgmma int8"
    group, padded = split_norm.group_tokens(layout, num_tokens), split_norm.padded_tokens(layout, num_tokens)
    x = Out(split_norm.x_words("wgmma int8", num_tokens, K, "int8"), np.int32)
    run(split_norm.spec(arch(), K, "wgmma int8", "int8", 64), padded, [h, norm, EPS, x, num_tokens, group])
    terms = x.array[:-padded].view(np.int8).reshape(padded // group, 3, group, K).astype(np.int64)
    whole = 65536 * terms[:, 0] + 256 * terms[:, 1] + terms[:, 2]
    return whole.reshape(padded, K)[:num_tokens], x.array[-padded:].view(np.float32)[:num_tokens]


def check_terms(K: int, tokens: int, seed: int) -> None:
    """Three int8 terms are the normed activations but for 3/4 of a unit, and the rounding of the norm."""
    h, norm, *_ = inputs(np.random.default_rng(seed), "int8", 1, tokens, K)
    norm[:2] = 1e4, -1e-4  # one column is far larger than the others
    whole, units = terms_of(h, norm)
    x = normed(h, norm)
    bound = 0.75 * units[:, None] + (K / 2 + 9) * 2.0**-24 * np.abs(x)
    assert_close(whole * units[:, None].astype(np.float64), x, bound, f"{tokens} tokens of {K}")
    assert np.abs(whole).max(axis=1).tolist() == [int(split_norm.LARGEST)] * tokens


def check_odd_terms() -> None:
    """Zeros, numbers so small that their unit would be a denormal one, NaN and infinity."""
    h = np.ones((5, 32), np.float32)
    norm = np.full(32, 1, np.float32)
    h[0], h[2, 3], h[3, 3] = 0, np.nan, np.inf
    whole, units = terms_of(h, norm)
    assert (whole[0] == 0).all() and (whole[1] == int(split_norm.LARGEST)).all()
    assert np.isnan(units[2:4]).all() and np.isfinite(units[[0, 1, 4]]).all()
    whole, units = terms_of(h, np.full(32, 1e-36, np.float32))
    assert np.abs(whole[[0, 1, 4]]).max() < 100 and units[1] == units[4] > 2.0**-126


@simulated
@settings(max_examples=4)
@given(K=st.sampled_from([32, 96, 288]), tokens=st.sampled_from([1, 9, 70]), seed=st.integers(0, 2**32 - 1))
def test_simulated_terms(K: int, tokens: int, seed: int) -> None:
    check_terms(K, tokens, seed)


@simulated
def test_simulated_odd_terms() -> None:
    check_odd_terms()


@needs_gpu
@settings(max_examples=8)
@given(K=st.sampled_from([32, 96, 2560]), tokens=st.sampled_from([1, 9, 70, 200]), seed=st.integers(0, 2**32 - 1))
def test_terms_on_gpu(K: int, tokens: int, seed: int) -> None:
    check_terms(K, tokens, seed)


@needs_gpu
def test_odd_terms_on_gpu() -> None:
    check_odd_terms()


def test_plan() -> None:
    sizes = [1, 8, 9, 16, 17, 33, 65, 128, 129, 2000]
    assert [kernel.plan(tokens, "bf16").tokens for tokens in sizes] == [8, 8, 16, 16, 32, 64, 128, 128, 72, 128]
    assert [kernel.plan(tokens, "int8").tokens for tokens in sizes] == [8, 8, 16, 16, 32, 64, 64, 64, 64, 64]
    assert [split_norm.padded_tokens("wgmma", tokens) for tokens in sizes[-4:]] == [128, 128, 144, 2048]
    # Several groups are as small as they can be.
    assert [kernel.plan(tokens, "bf16").tokens for tokens in (200, 256, 257, 400, 416, 512)] == [
        104,
        128,
        88,
        104,
        104,
        128,
    ]
    assert [split_norm.padded_tokens("wgmma int8", tokens) for tokens in sizes[-4:]] == [128, 128, 192, 2048]
    for dtype in DTYPES:
        for tokens in sizes:
            tile = kernel.plan(tokens, dtype)
            assert tile.stages >= 3 and tile.rows == 256
            weights, x = kernel.map_boxes(tile, 1000, tokens, 96)
            assert max(weights.box[0], x.box[0]) <= 256  # rows of a TMA load
            assert weights.shape[1] == x.shape[1] == kernel.row_ints(tile, 96) == {"bf16": 48, "int8": 24}[dtype]
    assert [kernel.num_k_iters(kernel.plan(1, "bf16"), K) for K in (2560, 2592)] == [40, 41]
    assert [kernel.num_k_iters(kernel.plan(1, "int8"), K) for K in (2560, 2592)] == [20, 21]


def test_grid() -> None:
    """Groups of tokens run side by side."""
    few, many = kernel.plan(8, "int8"), kernel.plan(2048, "int8")
    assert [kernel.grid(132, few, VOCABULARY, 8), kernel.grid(132, many, VOCABULARY, 2048)] == [(132, 1), (4, 32)]
    assert [kernel.grid(132, many, VOCABULARY, tokens) for tokens in (128, 129)] == [(66, 2), (44, 3)]
    assert kernel.grid(20, many, VOCABULARY, 2048) == (1, 32) and kernel.grid(132, few, 300, 8) == (2, 1)
    assert kernel.grid(132, kernel.plan(200, "bf16"), VOCABULARY, 200) == (66, 2)
    assert kernel.grid(132, kernel.plan(416, "bf16"), VOCABULARY, 416) == (33, 4)


def test_serves_one_architecture() -> None:
    chosen = [layout_for(target, dtype) for target, dtype in ((90, "bf16"), (90, "int8"), (90, "f16"), (100, "bf16"))]
    assert chosen == ["wgmma", "wgmma int8", "mma", "mma"]
    assert layout_for(100, "int8") == layout_for(80, "int8") == "mma"
    assert lm_head_gemm_wgmma(80) == [] and len(lm_head_gemm_wgmma(90)) == 13


@pytest.mark.parametrize(
    "tile",
    [
        (20, 2, 2, 3),
        (136, 2, 2, 2),
        (24, 2, 2, 3, "int8"),
        (128, 2, 2, 4),
        (128, 3, 2, 2),
        (8, 2, 2, 1),
        (128, 2, 2, 2, "int8"),
        (64, 2, 2, 5, "int8"),
    ],
)
def test_refuses_tiles(tile: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="lm_head_wgmma: no kernel for"):
        kernel.spec(90, kernel.Tile(*tile))


def test_refuses_columns_whose_sums_overflow() -> None:
    most = split_norm.MAX_INT8_COLUMNS // 32 * 32
    assert most * 128 * 128 < 2**31 <= (most + 32) * 128 * 128
    split_norm.spec(ARCH, most, "wgmma int8", "int8")
    with pytest.raises(ValueError, match=f"can have 131071 columns, not {most + 32}"):
        split_norm.spec(ARCH, most + 32, "wgmma int8", "int8")


def test_batches_have_its_variants_compiled() -> None:
    from bitnet_numba.backends.cuda.warmup import Needs
    from bitnet_numba.backends.cuda.weights import RowFormats

    config = ModelConfig.from_hf(PRESETS["2b-4t"][1] | {"quantization_config": {"quant_method": "bitnet"}})
    cases: list[tuple[int, RowDtype, bool]] = [
        (90, "bf16", True),
        (90, "int8", True),
        (90, "f16", False),
        (80, "bf16", False),
        (80, "int8", False),
    ]
    for arch_, dtype, expected in cases:
        needs = Needs(config, RowFormats(dtype, dtype), ArchSpec(arch_, 132), 200)
        names = {spec.name for spec in needs.specs()}
        if expected:
            taken = {kernel.spec(90, kernel.plan(rows, dtype)).name for rows in (1, 16, 32, 64, 128, 256)}
            taken |= {split_norm.spec(90, config.hidden_size, kernel.LAYOUTS[dtype], dtype).name}
            assert {name for name in names if name.startswith(("lm_head_wgmma", "split_norm"))} == taken
        assert any(name.startswith("lm_head_wgmma") for name in names) == expected
        assert any(name.startswith("lm_head_mma") for name in names) != expected
