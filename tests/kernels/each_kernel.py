"""Launches each kernel once on small inputs and checks what it gives: the program that compute-sanitizer watches."""

import sys

import numpy as np

from bitnet_numba.kernels import embedding as embed
from bitnet_numba.kernels.attention import decode as attention
from bitnet_numba.kernels.attention.kv_cache import append_spec
from bitnet_numba.kernels.attention.paged_decode import fits
from bitnet_numba.kernels.attention.paged_simt import attention_rows_spec
from bitnet_numba.kernels.attention.prefill import MIN_ARCH, attention_prompt_spec
from bitnet_numba.kernels.linear.gemm_wgmma import ARCH as WGMMA_ARCH
from bitnet_numba.kernels.linear.gemv import Plan
from bitnet_numba.kernels.linear.quantize import quantize_spec
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.sampling import batched as sampler_many
from bitnet_numba.kernels.sampling import single as sampler
from bitnet_numba.sampling import SamplingParams
from tests.kernels.attention.test_decode import check_attention
from tests.kernels.attention.test_kv_cache import check_append
from tests.kernels.attention.test_paged_decode import check_attention_batch
from tests.kernels.attention.test_paged_simt import check_attention_rows
from tests.kernels.attention.test_prefill import check_attention_prompt
from tests.kernels.harness import arch
from tests.kernels.linear.test_gemm import check_gemm
from tests.kernels.linear.test_gemv import check_gemv
from tests.kernels.linear.test_quantize import check_quantize
from tests.kernels.lm_head.test_gemm import check_head_many
from tests.kernels.lm_head.test_gemm_wgmma import check_head_warpgroup
from tests.kernels.lm_head.test_gemv import check_head
from tests.kernels.sampling.test_sampling import choose, choose_many
from tests.kernels.test_embedding import check_embed, check_embed_many, check_finish_prompt


def main(tool: str) -> None:
    """Every kernel, in the branches that a step takes, under one of the sanitizer's tools."""
    for prologue, epilogue in (("int8", "acc"), ("quantize", "residual"), ("norm", "store"), ("norm", "gated")):
        check_gemv(96, 300, Plan(1, 2, 2, 3), prologue, epilogue, "relu2", True, 1)
    few, many, dp4a = Tile(8, 2, 1, 2, 3, 0), Tile(16, 2, 2, 2, 2, 3), Tile(8, 2, 1, 2, 0, 0, scheme="dp4a")
    for tile in (few, many, dp4a):
        check_gemm(19, 128, 300, tile, "gated", "silu", True, 8, 17)
    check_gemm(19, 100, 300, many, "residual", "relu2", True, 9)
    if arch() == WGMMA_ARCH and tool == "memcheck":  # racecheck does not follow TMA and mbarriers
        check_gemm(70, 128, 300, Tile(64, 1, 8, 1, 0, 4, 1, "wgmma"), "gated", "relu2", False, 18, 65)
        for tokens in (7, 100):
            check_head_warpgroup(320, 700, tokens, 2, 19)
    for int8 in (False, True):
        check_head(320, 50, int8, 512, 10, 2, 2)
        check_embed(embed.embed_spec(arch(), int8), 256, int8, 40, 64, 3)
        for prompt in (False, True):
            spec = embed.embed_many_spec(arch(), int8, prompt)
            check_embed_many(spec, 256, int8, prompt, 5, 40, 300, 10)
        for tokens in (7, 100):
            check_head_many(320, 50, tokens, int8, 11, 2, arch())
        check_head_many(320, 50, 9, int8, 12, 2, 75)
    check_finish_prompt(embed.finish_prompt_spec(arch()), 256, 5, 300, 1, 13)
    for long in (False, True):
        spec = attention.attention_spec(arch(), 64, 4, long)
        grid = (3, attention.attention_grid(1, 8, 2, long)[1])
        check_attention(spec, grid, 2, 4, 64, 150, 200, 32, 4)
    if fits(arch(), 64):
        check_attention_batch((64, 4, 2), [300, 0, 65, 1100], 64, 3, other=(256, 1))
    check_append(append_spec(arch(), 100), 100, 4, 2, 9, 3, 150, 14)
    check_attention_rows(attention_rows_spec(arch(), 64, 4), (64, 4, 2), 4, 2, 150, 15)
    if arch() >= MIN_ARCH:
        for shape in ((64, 4, 2), (100, 1, 1), (256, 3, 1)):
            spec = attention_prompt_spec(arch(), *shape[:2])
            check_attention_prompt(spec, 4, shape, 70, 40, 48, True, 16)
    for K in (320, 101):
        check_quantize(quantize_spec(arch(), K), 3, K, True, 5, 1.0)
    logits = np.random.default_rng(6).standard_normal(300).astype(np.float32)
    for params in (SamplingParams(), SamplingParams(0.8, 0.9, 20, 0.01, 1.2, 7)):
        choose(logits, [1, 2, 3], params, sampler.sampler_spec(arch()), 2, repeat=1)
        choose_many([(logits, [1, 2, 3], params), None], sampler_many.sampler_many_spec(arch()), repeat=1)
    print("each kernel ran")


if __name__ == "__main__":
    main(sys.argv[1])
