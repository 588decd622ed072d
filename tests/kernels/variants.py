"""The compiled variants that tests and reports go through: of each kernel, those of a full-size 2B4T model on 132 SMs
first, then every other branch (other head sizes, other activations, padding, ...).
"""

from collections.abc import Callable

from bitnet_numba.kernels import embedding as embed
from bitnet_numba.kernels.attention import decode, kv_cache, paged_decode, paged_simt, prefill
from bitnet_numba.kernels.linear import gemm, gemv, heuristics, quantize
from bitnet_numba.kernels.lm_head import gemm_mma as head_mma
from bitnet_numba.kernels.lm_head import gemm_wgmma as head_wgmma
from bitnet_numba.kernels.lm_head import gemv as head_gemv
from bitnet_numba.kernels.lm_head import split_norm
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling import batched, single

SMS = 132  # of an H200


def attention_decode(arch: int) -> list[KernelSpec]:
    """2B4T's, and padding and idle lanes, one head, a whole warp a token; each for short and long contexts."""
    shapes = [(128, 4), (100, 1), (256, 3)]
    return [decode.decode_spec(arch, head_dim, group, long) for head_dim, group in shapes for long in (False, True)]


def attention_paged_decode(arch: int) -> list[KernelSpec]:
    """2B4T's, then other head sizes and groups. None where the kernel does not fit."""
    shapes = [(128, 4, 64), (128, 4, 128), (128, 4, 256), (128, 4, 512), (64, 4, 64), (96, 1, 64), (100, 1, 256)]
    shapes += [(96, 1, 256), (128, 8, 128), (8, 5, 64)]
    if not paged_decode.fits(arch, shapes[0][0]):
        return []
    return [paged_decode.paged_decode_spec(arch, *shape) for shape in shapes]


def attention_prefill(arch: int) -> list[KernelSpec]:
    """2B4T's, and padding, halves that do not end with a step, large heads, few warps."""
    shapes = [(128, 4), (100, 1), (96, 3), (256, 3)]
    if not prefill.fits(arch, shapes[0][0]):
        return []
    return [prefill.prefill_spec(arch, head_dim, group) for head_dim, group in shapes]


def attention_paged_simt(arch: int) -> list[KernelSpec]:
    """2B4T's, and padding and idle lanes, a whole warp a token, a group in parts."""
    shapes = [(128, 4), (100, 1), (256, 3), (6, 10)]
    return [paged_simt.paged_simt_spec(arch, head_dim, group) for head_dim, group in shapes]


def attention_kv_cache(arch: int) -> list[KernelSpec]:
    """2B4T's head size, and one with padding whose halves are of odd length."""
    return [kv_cache.append_spec(arch, 128), kv_cache.append_spec(arch, 34)]


def embedding(arch: int) -> list[KernelSpec]:
    """All there are."""
    many = [embed.embed_many_spec(arch, int8, prompt) for int8 in (False, True) for prompt in (False, True)]
    single_rows = [embed.embed_spec(arch, int8) for int8 in (False, True)]
    return [*single_rows, *many, embed.finish_prompt_spec(arch), embed.advance_spec(arch)]


def lm_head_gemv(arch: int) -> list[KernelSpec]:
    """2B4T's, and rows that go in pieces."""
    return [head_gemv.spec(arch, K, int8) for K in (2560, 4096) for int8 in (False, True)]


def lm_head_gemm(arch: int) -> list[KernelSpec]:
    """2B4T's rows for every number of tokens, and rows that are padded."""
    kinds = (False, True)
    tiles = split_norm.TILES if arch >= split_norm.TENSOR_CORES else split_norm.TILES[:1]
    many = [head_mma.head_many_spec(arch, 2560, int8, t) for t in tiles for int8 in kinds]
    padded = [head_mma.head_many_spec(arch, 2080, int8, tiles[-1]) for int8 in kinds]
    return [*many, *(split_norm.norm_split_spec(arch, K, int8) for K in (2560, 2080) for int8 in kinds), *padded]


def lm_head_gemm_wgmma(arch: int) -> list[KernelSpec]:
    """One for every number of tokens, and the norm before it."""
    if arch != head_wgmma.ARCH:
        return []
    tiles = [head_wgmma.plan(tokens) for tokens in reversed(head_wgmma.TOKENS)]
    return [*(head_wgmma.spec(arch, tile) for tile in tiles), head_wgmma.norm_spec(arch, 2560)]


def linear_quantize(arch: int) -> list[KernelSpec]:
    """Rows of 2B4T, of the longest kind, and every other branch."""
    choices = [(2560, True), (6912, True), (6912, False), (2560, False), (101, True), (quantize.MAX_COLUMNS, True)]
    return [quantize.norm_quant_spec(arch, K, norm) for K, norm in choices]


def linear_gemv(arch: int) -> list[KernelSpec]:
    """A 2B4T step's, and no norm, silu, biases, rounds, padding."""
    few, pair = gemv.plan(3840, 2560, SMS), gemv.plan(13824, 2560, SMS, gated=True)
    return [
        gemv.spec(arch, 2560, few),
        gemv.spec(arch, 2560, gemv.plan(2560, 2560, SMS), "norm", "residual"),
        gemv.spec(arch, 2560, pair, "norm", "gated"),
        gemv.spec(arch, 6912, gemv.plan(2560, 6912, SMS), "norm", "residual"),
        gemv.spec(arch, 8640, gemv.plan(3200, 8640, SMS), "quantize", "residual", bias=True),
        gemv.spec(arch, 4096, gemv.plan(28672, 4096, SMS, gated=True), "norm", "gated", "silu", bias=True),
        gemv.spec(arch, 2560, few, "int8", "acc"),
        gemv.spec(arch, 27648, gemv.plan(5120, 27648, SMS), "int8", "store"),
        gemv.spec(arch, 72, gemv.plan(40, 72, SMS), "int8", "store", bias=True),
    ]


def linear_gemm(arch: int) -> list[KernelSpec]:
    """2B4T's for every size of pass, and every other branch."""
    kinds = [(3840, 2560, "store"), (2560, 2560, "residual"), (13824, 2560, "gated"), (2560, 6912, "residual")]
    found = {
        (heuristics.plan(M, N, K, arch, SMS, epilogue == "gated"), epilogue): None
        for M in (256, 8, 16, 32, 64, 128, 512, 1024, 2048)
        for N, K, epilogue in kinds
    }
    if arch == heuristics.WARPGROUP_ARCH:
        found |= {
            (tile, "store"): None for tile in (heuristics._fitted(t, 2560) for t, *_ in heuristics._GROUPS) if tile
        }
    few = heuristics.plan(8, 512, 512, arch, SMS, True)
    many = heuristics.plan(256, 512, 512, arch, SMS, True)
    return [gemm.spec(arch, tile, epilogue) for tile, epilogue in found] + [
        gemm.spec(arch, few, "acc"),
        gemm.spec(arch, few, "gated", "silu", True),
        gemm.spec(arch, many, "store", bias=True),
        gemm.spec(arch, many, "gated", "silu", True),
    ]


def sampling(arch: int) -> list[KernelSpec]:
    """Both."""
    return [single.sampler_spec(arch), batched.sampler_many_spec(arch)]


GROUPS: dict[str, Callable[[int], list[KernelSpec]]] = {
    list_variants.__name__: list_variants
    for list_variants in (
        attention_decode, attention_paged_decode, attention_prefill, attention_paged_simt, attention_kv_cache,
        embedding, lm_head_gemv, lm_head_gemm, lm_head_gemm_wgmma, linear_quantize, linear_gemv, linear_gemm, sampling,
    )
}  # fmt: skip


def variants(arch: int) -> list[KernelSpec]:
    """All of them for an architecture."""
    return [spec for list_variants in GROUPS.values() for spec in list_variants(arch)]
