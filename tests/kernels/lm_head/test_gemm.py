"""The LM head of many tokens: the final RMSNorm and the product, on tensor cores (`gemm_mma`) or without (`gemm_simt`),
and the launcher that chooses.

Tolerance. With e = 2^-24, relative to sum|x w|: an instruction adds 16 products and the sum so far, aligned to the
largest and cut after 24 bits or more, so it is off by at most 17 e; there are K / 8 of them, two terms for 16 columns.
1 / rms is off by (K / 2 + 3) * e, from its own sum; the two terms leave out 2^-17; six more roundings. Rows of float16
and float32 are two terms, too: these leave out nothing, or 2^-17; there are 3 K / 16 instructions, and the product of
the low terms that is not made is at most 2^-16. Without tensor cores there are K roundings instead, and no terms.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.lm_head import gemm_mma, gemm_simt, split_norm
from bitnet_numba.kernels.lm_head.gemm import layout_for, lm_head_gemm, split_words
from bitnet_numba.kernels.lm_head.split_norm import group_size_argument, padded_tokens, x_words
from bitnet_numba.kernels.operands import ROW_DTYPES as DTYPES_IN_MEMORY
from bitnet_numba.kernels.operands import EmbeddingTable, Norm, RowDtype
from bitnet_numba.kernels.runtime.compiler import compile_ptx
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import ArchSpec, KernelSpec
from tests.kernels.harness import Out, arch, assert_close, needs_gpu, run, simulated
from tests.kernels.lm_head.rows import random_rows
from tests.kernels.variants import ROW_DTYPES

EPS = np.float32(1e-5)


def normed(h: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """What the LM head multiplies, float64."""
    wide = h.astype(np.float64)
    return norm * (wide / np.sqrt(np.mean(wide * wide, axis=1, keepdims=True) + np.float64(EPS)))


def tolerance(K: int, dtype: RowDtype = "bf16") -> float:
    """Of tensor cores, relative to sum|x w|: see above."""
    left_out = {"bf16": 1, "int8": 1, "f16": 1 + 2, "f32": 1 + 1 + 2}[dtype] * 2.0**-17
    instructions = K / 8 if dtype in ("bf16", "int8") else 3 * K / 16
    return (17 * instructions + K / 2 + 9) * 2.0**-24 + left_out


def launch(
    specs: tuple[KernelSpec, KernelSpec],
    target: int,
    h: np.ndarray,
    norm: np.ndarray,
    dtype: RowDtype,
    rows: np.ndarray,
    scale: np.ndarray | None,
    blocks: int,
) -> np.ndarray:
    """Logits [tokens, rows] by the two kernels, built for architecture `target`."""
    (num_tokens, K), num_rows = h.shape, len(rows)
    norm_spec, product_spec = specs
    layout = layout_for(target, "f16")  # of the kernels tested here, on sm_90 too
    x = Out(x_words(layout, num_tokens, K, dtype), np.int32)
    arguments = [h, norm, EPS, x, num_tokens, group_size_argument(layout, num_tokens)]
    run(norm_spec, padded_tokens(layout, num_tokens), arguments)
    logits = Out(num_tokens * num_rows, np.float32)
    groups = (gemm_mma if layout == "mma" else gemm_simt).grid(1, num_tokens)[1]
    words = rows.reshape(-1).view(np.int32)
    run(product_spec, (blocks, groups), [words, scale, x.array.copy(), logits, num_rows, num_tokens])
    return logits.array.reshape(num_tokens, num_rows)


def make_specs(
    target: int,
    K: int,
    dtype: RowDtype,
    num_tokens: int,
    plan: tuple[int, ...] = (),
    norm_threads: int = split_norm.THREADS,
) -> tuple[KernelSpec, KernelSpec]:
    """The two variants; `plan`: what follows the required arguments of `gemm_mma.spec` or `gemm_simt.spec`."""
    layout = layout_for(target, "f16")
    norm = split_norm.spec(target, K, layout, dtype, norm_threads)
    if layout == "simt":
        return norm, gemm_simt.spec(target, K, dtype, *plan)
    return norm, gemm_mma.spec(target, K, dtype, gemm_mma.token_tiles(num_tokens), *plan)


def check_lm_head(
    K: int,
    num_rows: int,
    num_tokens: int,
    dtype: RowDtype,
    seed: int,
    blocks: int,
    target: int,
    plan: tuple[int, ...] = (),
) -> None:
    """Logits of random rows and tokens against float64; `plan` as of `make_specs`."""
    rng = np.random.default_rng(seed)
    h = (rng.standard_normal((num_tokens, K)) * 10.0 ** rng.uniform(-3, 3, (num_tokens, 1))).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    rows, scale, w = random_rows(rng, num_rows, K, dtype)
    x = normed(h, norm)
    specs = make_specs(target, K, dtype, num_tokens, plan, 64 if plan else split_norm.THREADS)
    logits = launch(specs, target, h, norm, dtype, rows, scale, blocks)
    bound = tolerance(K, dtype) if target >= gemm_mma.MIN_ARCH else (1.5 * K + 9) * 2.0**-24
    assert_close(logits, x @ w.T, bound * (np.abs(x) @ np.abs(w).T), specs[1].name)


def check_company(
    K: int, num_rows: int, counts: list[int], dtype: RowDtype, seed: int, blocks: int, threads: int
) -> None:
    """A token's logits are the same bits whatever the number of tokens in its launch."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((max(counts), K)).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    rows, scale, _ = random_rows(rng, num_rows, K, dtype)
    most = None
    for num_tokens in sorted(counts, reverse=True):
        specs = make_specs(arch(), K, dtype, num_tokens, (min(threads, 256),), threads)
        logits = launch(specs, arch(), h[:num_tokens], norm, dtype, rows, scale, blocks)
        most = logits if most is None else most
        assert logits.tobytes() == most[:num_tokens].tobytes(), f"{num_tokens} tokens: other bits than {max(counts)}"


@simulated
@pytest.mark.parametrize("dtype", ROW_DTYPES)
@settings(max_examples=2)
@given(
    K=st.sampled_from([32, 64, 160, 288, 320]),
    num_rows=st.integers(1, 40),
    num_tokens=st.sampled_from([1, 3, 9, 16, 17, 30]),
    plan=st.sampled_from([(32, 1, 0, 4), (64, 1, 1, 2), (32, 2, 2, 4), (32, 4, 4, 2), (32, 2, 8, 4), (64, 1, 4, 8)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_mma(
    K: int, num_rows: int, num_tokens: int, dtype: RowDtype, plan: tuple[int, ...], seed: int
) -> None:
    check_lm_head(K, num_rows, num_tokens, dtype, seed, 1 + seed % 2, arch(), plan)


@simulated
@pytest.mark.parametrize("dtype", ROW_DTYPES)
@settings(max_examples=2)
@given(
    K=st.sampled_from([32, 160, 576]),
    num_rows=st.integers(1, 9),
    num_tokens=st.sampled_from([1, 8, 11]),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_simt(K: int, num_rows: int, num_tokens: int, dtype: RowDtype, seed: int) -> None:
    check_lm_head(K, num_rows, num_tokens, dtype, seed, 2, 75, (64,))


@simulated
@settings(max_examples=2)
@given(dtype=st.sampled_from(ROW_DTYPES), seed=st.integers(0, 2**32 - 1))
def test_simulated_company(dtype: RowDtype, seed: int) -> None:
    check_company(64, 9, [1, 17], dtype, seed, 1, 32)


@needs_gpu
@settings(max_examples=16)
@given(
    K=st.sampled_from([32, 384, 2080, 2560, 4096]),
    num_rows=st.integers(1, 9000),
    num_tokens=st.sampled_from([1, 2, 8, 16, 23, 32, 64, 100, 128, 300]),
    dtype=st.sampled_from(ROW_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_mma_on_gpu(K: int, num_rows: int, num_tokens: int, dtype: RowDtype, seed: int) -> None:
    check_lm_head(K, num_rows, num_tokens, dtype, seed, 132, arch())


@needs_gpu
@settings(max_examples=6)
@given(
    num_rows=st.integers(1, 3000),
    num_tokens=st.integers(1, 20),
    dtype=st.sampled_from(ROW_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_simt_on_gpu(num_rows: int, num_tokens: int, dtype: RowDtype, seed: int) -> None:
    check_lm_head(2560, num_rows, num_tokens, dtype, seed, 60, 75)


@needs_gpu
@settings(max_examples=6)
@given(
    K=st.sampled_from([384, 2560]),
    num_rows=st.integers(1, 9000),
    dtype=st.sampled_from(ROW_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_company_on_gpu(K: int, num_rows: int, dtype: RowDtype, seed: int) -> None:
    check_company(K, num_rows, [1, 8, 16, 17, 33, 65, 128, 200], dtype, seed, 132, split_norm.THREADS)


@needs_gpu
@settings(max_examples=8)
@given(num_tokens=st.sampled_from([1, 16, 40, 130]), dtype=st.sampled_from(ROW_DTYPES), seed=st.integers(0, 2**32 - 1))
def test_launcher_on_gpu(num_tokens: int, dtype: RowDtype, seed: int) -> None:
    """Whatever kernel it chooses; the two launches overlap, the second waits for the first, and again."""
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream

    device, stream, rng, (num_rows, K) = usable_device(), Stream(), np.random.default_rng(seed), (3000, 2560)
    h = rng.standard_normal((num_tokens, K)).astype(np.float32)
    norm = rng.standard_normal(K).astype(np.float32)
    rows, scale, w = random_rows(rng, num_rows, K, dtype)
    table = EmbeddingTable(device.array(rows), None if scale is None else device.array(scale), num_rows, K, dtype)
    split = device.empty(split_words(device, table, num_tokens), np.int32)
    logits = device.empty(num_tokens * num_rows, np.float32)
    on_device = device.array(h), Norm(device.array(norm), float(EPS))
    launches = lm_head_gemm(device, table, *on_device, split, logits, num_tokens)
    for _ in range(3):
        for each in launches:
            each(stream.handle)
    stream.synchronize()
    x = normed(h, norm)
    bound = tolerance(K, dtype) * (np.abs(x) @ np.abs(w).T)
    assert_close(logits.read().reshape(num_tokens, num_rows), x @ w.T, bound, launches[1].name)


def dry_operands(device: DryRunDevice, num_tokens: int, K: int, dtype: RowDtype) -> dict[str, Any]:
    """Operands of `lm_head_gemm` that just suffice."""
    scale = device.empty(90, np.float32) if dtype == "int8" else None
    table = EmbeddingTable(device.empty(90 * K, DTYPES_IN_MEMORY[dtype]), scale, 90, K, dtype)
    return {
        "table": table,
        "h": device.empty(num_tokens * K, np.float32),
        "norm": Norm(device.empty(K, np.float32), float(EPS)),
        "split": device.empty(split_words(device, table, num_tokens), np.int32),
        "logits": device.empty(num_tokens * 90, np.float32),
        "num_tokens": num_tokens,
    }


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("target, chosen", [(75, "lm_head_simt"), (80, "lm_head_mma"), (90, ""), (120, "lm_head_mma")])
def test_choice_of_kernel(target: int, chosen: str, dtype: RowDtype) -> None:
    """It depends on the card and on the table, not on the number of tokens."""
    chosen = chosen or ("lm_head_wgmma" if dtype in ("bf16", "int8") else "lm_head_mma")
    for num_tokens in (1, 16, 17, 128, 300):
        device = DryRunDevice(target, 132)
        launches = lm_head_gemm(device, **dry_operands(device, num_tokens, 2560, dtype))
        assert [each.name.split("[")[0] for each in launches] == ["split_norm", chosen]


@pytest.mark.parametrize("target", [75, 80, 90])
@pytest.mark.parametrize("name", ["h", "split", "logits"])
def test_launcher_refuses_operands(target: int, name: str) -> None:
    device = DryRunDevice(target, 132)
    operands = dry_operands(device, 20, 64, "bf16")
    array = operands[name]
    for wrong, message in (
        (device.empty(array.size - 1, array.dtype), rf"{name} holds {array.size - 1} elements, .* takes {array.size}$"),
        (device.empty(array.size, np.float64), f"{name} must be {array.dtype}, not float64"),
    ):
        with pytest.raises(ValueError, match=f"lm_head_gemm: {message}"):
            lm_head_gemm(device, **operands | {name: wrong})


def test_launcher_refuses_tables_and_numbers() -> None:
    device = DryRunDevice(90, 132)
    operands = dry_operands(device, 4, 64, "int8")
    table = operands["table"]
    for changes, message in (
        ({"num_tokens": 0}, "at least one token is needed, not 0"),
        ({"table": EmbeddingTable(table.rows, None, 90, 64, "bf16")}, "rows must be uint16, not int8"),
        ({"table": EmbeddingTable(table.rows, table.scale, 91, 64, "int8")}, "rows holds 5760 elements"),
        ({"table": EmbeddingTable(table.rows, table.scale, 90, 48, "int8")}, "multiple of 32 columns, not 48"),
        ({"norm": Norm(device.empty(63, np.float32), 1e-5)}, "norm holds 63 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            lm_head_gemm(device, **operands | changes)


def test_sizes_of_x() -> None:
    counts = (1, 16, 17, 32, 64, 65, 128, 129)
    assert [gemm_mma.token_tiles(num_tokens) for num_tokens in counts] == [1, 1, 2, 2, 4, 8, 8, 8]
    assert x_words("mma", 129, 32, "bf16") == x_words("mma", 129, 32, "int8") == 256 * 256
    assert x_words("simt", 9, 288, "bf16") == 16 * 512 and x_words("simt", 9, 32, "int8") == 16 * 512
    assert x_words("wgmma", 129, 32, "bf16") == 144 * 2 * 32 // 2
    assert x_words("wgmma int8", 129, 32, "int8") == 192 * (3 * 32 // 4 + 1)
    for dtype in ROW_DTYPES:
        table = EmbeddingTable(None, 1 if dtype == "int8" else None, 1, 2560, dtype)
        for target in (75, 80, 90):
            sizes = [split_words(ArchSpec(target, 1), table, num_tokens) for num_tokens in range(1, 400)]
            assert sizes == sorted(sizes), "room for many tokens is not room for fewer"


def test_instructions_of_tensor_cores() -> None:
    spec = gemm_mma.spec(80, 2560, "bf16", gemm_mma.MAX_TOKEN_TILES)
    ptx = compile_ptx(spec.kernel, spec.signature, 80, spec.threads, spec.blocks_per_sm)
    products = 4 * 8 * 4 * 2  # row tiles, token tiles, instructions of a unit, units of a k_iter
    assert ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == products


@pytest.mark.parametrize("K", [0, 16, 2561])
def test_refuses_columns(K: int) -> None:
    for make in (
        lambda: gemm_mma.spec(90, K, "bf16", 1),
        lambda: gemm_simt.spec(75, K, "bf16"),
        lambda: split_norm.spec(90, K, "mma", "bf16"),
    ):
        with pytest.raises(ValueError, match=f"multiple of 32 columns, not {K}"):
            make()
