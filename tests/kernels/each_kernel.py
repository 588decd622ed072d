"""Launches each kernel once on small inputs and checks what it gives: the program that compute-sanitizer watches."""

import sys

import numpy as np

from bitnet_numba.kernels import embedding as embed
from bitnet_numba.kernels.attention.decode import decode_grid, decode_spec
from bitnet_numba.kernels.attention.kv_dtype import KV_DTYPES
from bitnet_numba.kernels.attention.paged_decode import fits
from bitnet_numba.kernels.attention.parts import HeadShape
from bitnet_numba.kernels.attention.prefill import fits as prefill_fits
from bitnet_numba.kernels.attention.prefill import prefill_spec
from bitnet_numba.kernels.linear import quantize, quantize_groups
from bitnet_numba.kernels.linear.gemm_few import MIN_ARCH as MIN_FEW_ARCH
from bitnet_numba.kernels.linear.gemm_few import Plan
from bitnet_numba.kernels.linear.gemm_wgmma import ARCH as WGMMA_ARCH
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.sampling import batched, single
from bitnet_numba.sampling import SamplingParams
from tests.kernels.attention.test_decode import check_decode
from tests.kernels.attention.test_expand import check_expand
from tests.kernels.attention.test_head_norm import check_head_norm
from tests.kernels.attention.test_kv_cache import check_append
from tests.kernels.attention.test_paged_decode import check_paged_decode
from tests.kernels.attention.test_paged_simt import check_paged_simt
from tests.kernels.attention.test_prefill import check_prefill
from tests.kernels.attention.test_prefill_wgmma import check_prefill_wgmma
from tests.kernels.attention.test_rotate_heads import check_rotate_heads
from tests.kernels.attention.test_text_attention import check_text_attention
from tests.kernels.harness import arch
from tests.kernels.linear.test_gated import check_gate
from tests.kernels.linear.test_gemm import check_gemm
from tests.kernels.linear.test_gemm_few import check_gemm_few
from tests.kernels.linear.test_gemm_groups import check_gemm_groups
from tests.kernels.linear.test_gemv import check_gemv, segments_of
from tests.kernels.linear.test_gemv_groups import check_gemv_groups
from tests.kernels.linear.test_quantize import check_quantize
from tests.kernels.linear.test_quantize_groups import check_quantize_groups
from tests.kernels.linear.test_row_norm import check_row_norm
from tests.kernels.lm_head.test_gemm import check_lm_head
from tests.kernels.lm_head.test_gemm_wgmma import check_lm_head_wgmma
from tests.kernels.lm_head.test_gemv import check_lm_head_gemv
from tests.kernels.sampling.test_sampling import choose, choose_batch
from tests.kernels.test_embedding import (
    check_advance,
    check_embed_token,
    check_embed_tokens,
    check_gather_last,
    check_scale,
)
from tests.kernels.variants import ROW_DTYPES


def main(tool: str) -> None:
    """Every kernel, in the branches that a step takes, under one of the sanitizer's tools."""
    for prologue, epilogue in (("int8", "acc"), ("quantize", "residual"), ("norm", "store"), ("norm", "gated")):
        for rows, num_sms in ((96, 3), (224, 1)):  # warps that share rows; two rounds
            segments = segments_of(rows, epilogue == "gated")
            check_gemv(segments, 300, num_sms, prologue, epilogue, "relu2", True, 1)
        check_gemv_groups(segments_of(96, epilogue == "gated"), 900, 1, prologue == "norm", "store", "relu2", True, 1)
    for norm in (False, True):
        check_quantize_groups(quantize_groups.quantize_groups_spec(arch(), 900, norm), 3, 900, norm, 5, 1.0)
    check_head_norm(HeadShape(4, 2, 100), 3, 6)
    check_rotate_heads(3, 100, [5, 20], True, 6)
    for shape in (HeadShape(4, 2, 64), HeadShape(4, 1, 256)):
        check_text_attention(shape, [5, 70], 50, 6)
    for add in (False, True):
        check_row_norm(3, 900, add, 6)
    check_gate("gelu", 300, 6)
    for tokens in (7, 19):
        check_gemm_groups(tokens, 128, 900, "gated", "silu", True, 8, tokens - 2)
    few, many, dp4a = Tile(8, 2, 1, 2, 3, 0), Tile(16, 2, 2, 2, 2, 3), Tile(8, 2, 1, 2, 0, 0, scheme="dp4a")
    for tile in (few, many, dp4a):
        check_gemm(19, 128, 300, tile, "gated", "silu", True, 8, 17)
    check_gemm(19, 100, 300, many, "residual", "relu2", True, 9)
    if arch() >= MIN_FEW_ARCH:
        for epilogue in ("gated", "residual"):
            check_gemm_few(segments_of(96, epilogue == "gated"), 300, Plan(2, 8, 3), 3, 2, epilogue, "relu2", True, 22)
    if arch() == WGMMA_ARCH and tool == "memcheck":  # racecheck knows nothing of mbarriers
        check_gemm_groups(70, 128, 900, "gated", "silu", True, 8, 68)
        check_gemm(70, 128, 300, Tile(64, 1, 8, 1, 0, 4, 1, "wgmma"), "gated", "relu2", False, 18, 65)
        for tokens in (7, 100):
            check_lm_head_wgmma("bf16", 320, 700, tokens, 2, 19)
            check_lm_head_wgmma("int8", 320, 700, tokens, 2, 19)
        for shape in ((64, 4, 2), (100, 1, 1)):
            check_prefill_wgmma(shape, 70, 140, 148, True, 20)
    for row_format in embed.ELEMENTS:
        check_embed_token(embed.embed_token_spec(arch(), row_format), 256, row_format, 40, 64, 3)
        for prompt in (False, True):
            spec = embed.embed_tokens_spec(arch(), row_format, prompt)
            check_embed_tokens(spec, 256, row_format, prompt, 5, 40, 300, 10)
    for dtype in ROW_DTYPES:
        check_lm_head_gemv(320, 50, dtype, 512, 10, 2, 2)
        for tokens in (7, 100):
            check_lm_head(320, 50, tokens, dtype, 11, 2, arch())
        check_lm_head(320, 50, 9, dtype, 12, 2, 75)
    check_scale(embed.scale_spec(arch()), 256, 300)
    check_advance(embed.advance_spec(arch()), 7)
    check_gather_last(embed.gather_last_spec(arch()), 256, 5, 3, 300, 13)
    for long in (False, True):
        spec = decode_spec(arch(), 64, 4, long)
        grid = (3, decode_grid(1, HeadShape(8, 2, 64), long)[1])
        check_decode(spec, grid, 2, 4, 64, 150, 200, 32, 4)
    if fits(arch(), 64):
        check_paged_decode((64, 4, 2), [300, 0, 65, 1100], 64, 3, other=(256, 1))
        check_paged_decode((64, 4, 2), [300, 0, 65, 1100], 64, 3, other=(256, 1), dtype="float8")
    check_expand(100, 2, 70, 2, 3, 21)
    for kv_dtype in KV_DTYPES:
        check_append(100, 4, 2, 9, 3, 150, 14, kv_dtype)
        check_paged_simt((64, 4, 2), 4, 2, 150, 15, kv_dtype)
    if prefill_fits(arch(), 64):
        for shape in ((64, 4, 2), (100, 1, 1), (256, 3, 1)):
            spec = prefill_spec(arch(), *shape[:2])
            check_prefill(spec, 4, shape, 70, 40, 48, True, 16)
    for K in (320, 101):
        check_quantize(quantize.quantize_spec(arch(), K), 3, K, True, 5, 1.0)
    logits = np.random.default_rng(6).standard_normal(300).astype(np.float32)
    for params in (SamplingParams(), SamplingParams(0.8, 0.9, 20, 0.01, 1.2, 7)):
        choose(logits, [1, 2, 3], params, single.spec(arch()), 2, repeat=1)
        choose_batch([(logits, [1, 2, 3], params), None], batched.spec(arch()), repeat=1)
    print("each kernel ran")


if __name__ == "__main__":
    main(sys.argv[1])
