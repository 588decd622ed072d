"""The head for many tokens: final RMSNorm and the product with each row of the vocabulary, on tensor cores or without.

Tolerance. With e = 2^-24, relative to sum|x w|: an instruction adds 16 products and the sum so far, aligned to the
largest and cut after 24 bits or more, so it is off by at most 17 e; there are K / 8 of them, two terms for 16 columns.
1 / rms is off by (K / 2 + 3) * e, from its own sum; the two terms leave out 2^-17; six more roundings. Without tensor
cores there are K roundings instead of 17 / 8 K, and no terms.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.kernels.lm_head import gemm_mma as kernel
from bitnet_numba.kernels.lm_head import split_norm
from bitnet_numba.kernels.lm_head.split_norm import TENSOR_CORES, padded_tokens, split_words, tiles_of
from bitnet_numba.kernels.runtime.compiler import compile_ptx
from bitnet_numba.kernels.runtime.spec import KernelSpec
from tests.kernels.harness import Out, arch, assert_close, needs_gpu, run, simulated
from tests.kernels.variants import lm_head_gemm

EPS = np.float32(1e-5)


def weights(
    rng: np.random.Generator, rows: int, K: int, int8: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Stored rows as words, their scales, and what they stand for, float64 [rows, K]."""
    if int8:
        stored = rng.integers(-128, 128, (rows, K)).astype(np.int8)
        scale = rng.uniform(0.001, 3, rows).astype(np.float32)
        return stored.reshape(-1).view(np.int32), scale, stored.astype(np.float64) * scale[:, None]
    bits = from_float32(rng.standard_normal((rows, K)).astype(np.float32))
    return bits.reshape(-1).view(np.int32), None, to_float32(bits).astype(np.float64)


def normed(h: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """What the head multiplies, float64."""
    wide = h.astype(np.float64)
    return norm * (wide / np.sqrt(np.mean(wide * wide, axis=1, keepdims=True) + np.float64(EPS)))


def tolerance(K: int) -> float:
    """Of tensor cores, relative to sum|x w|: see above."""
    return (17 / 8 * K + K / 2 + 9) * 2.0**-24 + 2.0**-17


def launch(
    specs: tuple[KernelSpec, KernelSpec],
    target: int,
    h: np.ndarray,
    norm: np.ndarray,
    stored: np.ndarray,
    scale: np.ndarray | None,
    rows: int,
    blocks: int,
) -> np.ndarray:
    """Logits [tokens, rows] by the two kernels, built for architecture `target`."""
    tokens, K = h.shape
    norm_spec, head_spec = specs
    groups = kernel.head_many_grid(target, 1, tokens)[1]
    x = Out(split_words(tokens, K), np.int32)
    run(norm_spec, padded_tokens(target, tokens), [h, norm, EPS, x, tokens, tiles_of(tokens)])
    logits = Out(tokens * rows, np.float32)
    run(head_spec, (blocks, groups), [stored, scale, x.array.copy(), logits, rows, tokens])
    return logits.array.reshape(tokens, rows)


def check_head_many(
    K: int, rows: int, tokens: int, int8: bool, seed: int, blocks: int, target: int, plan: tuple[int, ...] = ()
) -> None:
    """Logits of random rows and tokens against float64; `plan`: threads, row_tiles, chunk_units, ahead."""
    rng = np.random.default_rng(seed)
    h = (rng.standard_normal((tokens, K)) * 10.0 ** rng.uniform(-3, 3, (tokens, 1))).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    stored, scale, w = weights(rng, rows, K, int8)
    x = normed(h, norm)
    norm_threads = (64,) if plan else ()
    specs = (
        split_norm.norm_split_spec(target, K, int8, *norm_threads),
        kernel.head_many_spec(target, K, int8, tiles_of(tokens), *plan),
    )
    logits = launch(specs, target, h, norm, stored, scale, rows, blocks)
    bound = tolerance(K)
    if target < TENSOR_CORES:
        bound = (1.5 * K + 9) * 2.0**-24
    assert_close(logits, x @ w.T, bound * (np.abs(x) @ np.abs(w).T), specs[1].name)


def check_company(K: int, rows: int, counts: list[int], int8: bool, seed: int, blocks: int, threads: int) -> None:
    """A token's logits are the same bits whatever the number of tokens in its launch."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((max(counts), K)).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    stored, scale, _ = weights(rng, rows, K, int8)
    most = None
    for tokens in sorted(counts, reverse=True):
        specs = (
            split_norm.norm_split_spec(arch(), K, int8, threads),
            kernel.head_many_spec(arch(), K, int8, tiles_of(tokens), min(threads, 256)),
        )
        logits = launch(specs, arch(), h[:tokens], norm, stored, scale, rows, blocks)
        most = logits if most is None else most
        assert logits.tobytes() == most[:tokens].tobytes(), f"{tokens} tokens: other bits than {max(counts)}"


@simulated
@settings(max_examples=6)
@given(
    K=st.sampled_from([32, 64, 160, 288, 320]),
    rows=st.integers(1, 40),
    tokens=st.sampled_from([1, 3, 9, 16, 17, 30]),
    int8=st.booleans(),
    plan=st.sampled_from([(32, 1, 0, 4), (64, 1, 1, 2), (32, 2, 2, 4), (32, 4, 4, 2), (32, 2, 8, 4), (64, 1, 4, 8)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_head_many(K: int, rows: int, tokens: int, int8: bool, plan: tuple[int, ...], seed: int) -> None:
    check_head_many(K, rows, tokens, int8, seed, 1 + seed % 2, arch(), plan)


@simulated
@settings(max_examples=4)
@given(
    K=st.sampled_from([32, 160, 576]),
    rows=st.integers(1, 9),
    tokens=st.sampled_from([1, 8, 11]),
    int8=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_without_tensor_cores(K: int, rows: int, tokens: int, int8: bool, seed: int) -> None:
    check_head_many(K, rows, tokens, int8, seed, 2, 75, (64,))


@simulated
@settings(max_examples=2)
@given(int8=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_simulated_company(int8: bool, seed: int) -> None:
    check_company(64, 9, [1, 17], int8, seed, 1, 32)


@needs_gpu
@settings(max_examples=16)
@given(
    K=st.sampled_from([32, 384, 2080, 2560, 4096]),
    rows=st.integers(1, 9000),
    tokens=st.sampled_from([1, 2, 8, 16, 23, 32, 64, 100, 128, 300]),
    int8=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_head_many_on_gpu(K: int, rows: int, tokens: int, int8: bool, seed: int) -> None:
    check_head_many(K, rows, tokens, int8, seed, 132, arch())


@needs_gpu
@settings(max_examples=6)
@given(rows=st.integers(1, 3000), tokens=st.integers(1, 20), int8=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_without_tensor_cores_on_gpu(rows: int, tokens: int, int8: bool, seed: int) -> None:
    check_head_many(2560, rows, tokens, int8, seed, 60, 75)


@needs_gpu
@settings(max_examples=6)
@given(K=st.sampled_from([384, 2560]), rows=st.integers(1, 9000), int8=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_company_on_gpu(K: int, rows: int, int8: bool, seed: int) -> None:
    check_company(K, rows, [1, 8, 16, 17, 33, 65, 128, 200], int8, seed, 132, split_norm.NORM_THREADS)


def test_numbers_of_tokens() -> None:
    assert [tiles_of(tokens) for tokens in (1, 16, 17, 32, 64, 65, 128, 129)] == [1, 1, 2, 2, 4, 8, 8, 8]
    assert split_words(129, 32) == 256 * 512


def test_tensor_cores_from_sm_80_on() -> None:
    for target, expected in ((75, {"head_rows", "norm_rows"}), (80, {"head_many", "norm_split"})):
        assert {spec.name.split("[")[0] for spec in lm_head_gemm(target)} == expected
    spec = kernel.head_many_spec(80, 2560, False, 8)
    ptx = compile_ptx(spec.kernel, spec.signature, 80, spec.threads, spec.blocks_per_sm)
    products = 4 * 8 * 4 * 2  # row tiles, token tiles, instructions of a unit, units in flight
    assert ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == products


@pytest.mark.parametrize("K", [0, 16, 2561])
def test_refuses_columns(K: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 32 columns, not {K}"):
        kernel.head_many_spec(90, K, False, 1)
    with pytest.raises(ValueError, match=f"multiple of 32 columns, not {K}"):
        split_norm.norm_split_spec(90, K, False)
