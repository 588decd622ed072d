"""The compiled variants that tests and reports go through: of each kernel, those of a full-size 2B4T model on 132 SMs
first, then every other branch (other head sizes, other activations, padding, ...).
"""

from collections.abc import Callable

from bitnet_numba.kernels import embedding as embed
from bitnet_numba.kernels.attention import (
    decode,
    expand,
    head_norm,
    kv_cache,
    paged_decode,
    paged_simt,
    prefill,
    prefill_wgmma,
    rotate_heads,
    text_attention,
)
from bitnet_numba.kernels.attention.kv_dtype import HALVES, KV_DTYPES, KVDtype
from bitnet_numba.kernels.linear import (
    gated,
    gemm,
    gemm_few,
    gemm_groups,
    gemv,
    gemv_groups,
    heuristics,
    quantize,
    quantize_groups,
    row_norm,
)
from bitnet_numba.kernels.lm_head import gemm_mma, gemm_simt, gemm_wgmma, split_norm
from bitnet_numba.kernels.lm_head import gemv as head_gemv
from bitnet_numba.kernels.operands import RowDtype
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.kernels.sampling import batched, edits, logprobs, single

SMS = 132  # of an H200
ROW_DTYPES: tuple[RowDtype, ...] = ("bf16", "int8", "f16", "f32")  # of LM heads


def attention_decode(arch: int) -> list[KernelSpec]:
    """2B4T's, and padding and idle lanes, one head, a whole warp a token; each for short and long contexts."""
    shapes: list[tuple[int, int, KVDtype]] = [
        (128, 4, "float16"), (128, 4, "bfloat16"), (100, 1, "float16"), (100, 1, "bfloat16"), (256, 3, "float16"),
    ]  # fmt: skip
    return [decode.decode_spec(arch, *shape, long, dtype) for *shape, dtype in shapes for long in (False, True)]


def attention_paged_decode(arch: int) -> list[KernelSpec]:
    """2B4T's, then other head sizes and groups. None where the kernel does not fit."""
    shapes = [(128, 4, 64), (128, 4, 128), (128, 4, 256), (128, 4, 512), (64, 4, 64), (96, 1, 64), (100, 1, 256)]
    shapes += [(96, 1, 256), (128, 8, 128), (8, 5, 64)]
    if not paged_decode.fits(arch, shapes[0][0]):
        return []
    dtypes: tuple[KVDtype, ...] = (*HALVES, "float8")
    clustered = [(128, 4, 128), (100, 1, 128)] if arch == paged_decode.CLUSTER_ARCH else []
    return [
        *(paged_decode.paged_decode_spec(arch, *shape, dtype) for shape in shapes for dtype in dtypes),
        *(
            paged_decode.paged_decode_spec(arch, *shape, dtype, cluster=paged_decode.CLUSTER)
            for shape in clustered
            for dtype in dtypes
        ),
    ]


def attention_prefill(arch: int) -> list[KernelSpec]:
    """2B4T's, and padding, halves that do not end with a step, large heads, few warps."""
    shapes = [(128, 4), (100, 1), (96, 3), (256, 3)]
    if not prefill.fits(arch, shapes[0][0]):
        return []
    return [prefill.prefill_spec(arch, *shape, dtype) for shape in shapes for dtype in HALVES]


def attention_prefill_wgmma(arch: int) -> list[KernelSpec]:
    """2B4T's, and halves that are odd, padding, one panel; one, two, eight heads a block."""
    shapes = [(128, 4), (100, 1), (18, 2), (64, 8)]
    if not prefill_wgmma.fits(arch, shapes[0][0]):
        return []
    return [prefill_wgmma.prefill_wgmma_spec(arch, *shape, dtype) for shape in shapes for dtype in HALVES]


def attention_paged_simt(arch: int) -> list[KernelSpec]:
    """2B4T's, and padding and idle lanes, a whole warp a token, a group in parts."""
    shapes = [(128, 4), (100, 1), (256, 3), (6, 10)]
    return [paged_simt.paged_simt_spec(arch, *shape, dtype) for shape in shapes for dtype in KV_DTYPES]


def attention_kv_cache(arch: int) -> list[KernelSpec]:
    """2B4T's head size, and one with padding whose halves are of odd length."""
    return [kv_cache.append_spec(arch, head_dim, dtype) for head_dim in (128, 34) for dtype in KV_DTYPES]


def attention_expand(arch: int) -> list[KernelSpec]:
    """2B4T's head size, and one with padding."""
    return [expand.expand_spec(arch, head_dim) for head_dim in (128, 100)]


def attention_head_norm(arch: int) -> list[KernelSpec]:
    """Bonsai's head size, and one that is no whole number of warps."""
    return [head_norm.head_norm_spec(arch, 128), head_norm.head_norm_spec(arch, 100)]


def attention_rotate_heads(arch: int) -> list[KernelSpec]:
    """BitNet-embedding-0.6b's, and without a norm."""
    return [rotate_heads.rotate_heads_spec(arch, 128), rotate_heads.rotate_heads_spec(arch, 100, False)]


def attention_text_attention(arch: int) -> list[KernelSpec]:
    """BitNet-embedding-0.6b's and 270m's, and one head, padding."""
    return [text_attention.text_attention_spec(arch, *shape) for shape in ((128, 2), (256, 4), (100, 1))]


def embedding(arch: int) -> list[KernelSpec]:
    """All there are."""
    many = [embed.embed_tokens_spec(arch, kind, prompt) for kind in embed.ELEMENTS for prompt in (False, True)]
    single_rows = [embed.embed_token_spec(arch, kind) for kind in embed.ELEMENTS]
    return [*single_rows, *many, embed.gather_last_spec(arch), embed.advance_spec(arch), embed.scale_spec(arch)]


def lm_head_gemv(arch: int) -> list[KernelSpec]:
    """2B4T's, and rows that go in pieces."""
    return [head_gemv.spec(arch, K, dtype) for K in (2560, 4096) for dtype in ROW_DTYPES]


def lm_head_gemm(arch: int) -> list[KernelSpec]:
    """2B4T's rows for every number of tokens, and rows that are padded."""
    layout: split_norm.Layout = "mma" if arch >= gemm_mma.MIN_ARCH else "simt"
    norms = [split_norm.spec(arch, K, layout, dtype) for K in (2560, 2080) for dtype in ROW_DTYPES]
    if layout == "simt":
        return [*(gemm_simt.spec(arch, K, dtype) for K in (2560, 2080) for dtype in ROW_DTYPES), *norms]
    products = [gemm_mma.spec(arch, 2560, dtype, tiles) for tiles in gemm_mma.TOKEN_TILES for dtype in ROW_DTYPES]
    return [*products, *norms, *(gemm_mma.spec(arch, 2080, dtype, gemm_mma.MAX_TOKEN_TILES) for dtype in ROW_DTYPES)]


def lm_head_gemm_wgmma(arch: int) -> list[KernelSpec]:
    """One for every number of tokens, and the norm before it."""
    if arch != gemm_wgmma.ARCH:
        return []
    found = []
    for dtype, layout in gemm_wgmma.LAYOUTS.items():
        several = (240, 336) if dtype == "bf16" else ()  # in groups of 120 and 112
        tiles = [gemm_wgmma.plan(tokens, dtype) for tokens in (*several, *reversed(split_norm.GROUP_TOKENS[layout]))]
        found += [*(gemm_wgmma.spec(arch, tile) for tile in tiles), split_norm.spec(arch, 2560, layout, dtype)]
    return found


def linear_quantize(arch: int) -> list[KernelSpec]:
    """Rows of 2B4T, of the longest kind, and every other branch."""
    choices = [(2560, True), (6912, True), (6912, False), (2560, False), (101, True), (quantize.MAX_COLUMNS, True)]
    return [quantize.quantize_spec(arch, K, norm) for K, norm in choices]


def linear_row_norm(arch: int) -> list[KernelSpec]:
    """BitNet-embedding-0.6b's, and 270m's behind a sub-layer."""
    return [row_norm.row_norm_spec(arch, 1024), row_norm.row_norm_spec(arch, 640, True)]


def linear_gated(arch: int) -> list[KernelSpec]:
    """Each activation."""
    return [gated.gate_spec(arch, activation) for activation in ("silu", "gelu", "relu2")]


def linear_gemv(arch: int) -> list[KernelSpec]:
    """A 2B4T step's, and no norm, silu, biases, rounds, padding."""
    few, pair = gemv.plan(3840, 2560, SMS), gemv.plan(13824, 2560, SMS, gated=True)
    return [
        gemv.gemv_spec(arch, 2560, few),
        gemv.gemv_spec(arch, 2560, gemv.plan(2560, 2560, SMS), "norm", "residual"),
        gemv.gemv_spec(arch, 2560, pair, "norm", "gated"),
        gemv.gemv_spec(arch, 6912, gemv.plan(2560, 6912, SMS), "norm", "residual"),
        gemv.gemv_spec(arch, 2560, few, "exact norm"),
        gemv.gemv_spec(arch, 2560, pair, "exact norm", "gated"),
        gemv.gemv_spec(arch, 6912, gemv.plan(2560, 6912, SMS), "exact norm", "residual"),
        gemv.gemv_spec(arch, 8640, gemv.plan(3200, 8640, SMS), "quantize", "residual", bias=True),
        gemv.gemv_spec(arch, 4096, gemv.plan(28672, 4096, SMS, gated=True), "norm", "gated", "silu", bias=True),
        gemv.gemv_spec(arch, 2560, few, "int8", "acc"),
        gemv.gemv_spec(arch, 27648, gemv.plan(5120, 27648, SMS), "int8", "store"),
        gemv.gemv_spec(arch, 72, gemv.plan(40, 72, SMS), "int8", "store", bias=True),
    ]


def linear_gemm(arch: int) -> list[KernelSpec]:
    """2B4T's for every size of pass, and every other branch."""
    kinds = [(3840, 2560, "store"), (2560, 2560, "residual"), (13824, 2560, "gated"), (2560, 6912, "residual")]
    found = {
        (heuristics.choose_tile(M, N, K, arch, SMS, epilogue == "gated"), epilogue): None
        for M in (256, 8, 16, 32, 64, 128, 416, 512, 1024, 2048, 3072)
        for N, K, epilogue in kinds
    }
    if arch == heuristics.WGMMA_ARCH:
        found |= {
            (tile, "store"): None
            for m in (*heuristics.WGMMA_TILES, *heuristics.WGMMA_LARGE_TILES)
            if (tile := heuristics.with_all_stages(m.tile, 2560))
        }
    few = heuristics.choose_tile(8, 512, 512, arch, SMS, True)
    many = heuristics.choose_tile(256, 512, 512, arch, SMS, True)
    return [gemm.spec(arch, tile, epilogue) for tile, epilogue in found] + [
        gemm.spec(arch, few, "acc"),
        gemm.spec(arch, few, "gated", "silu", True),
        gemm.spec(arch, many, "store", bias=True),
        gemm.spec(arch, many, "gated", "silu", True),
    ]


def linear_gemm_few(arch: int) -> list[KernelSpec]:
    """2B4T's, and sums, silu, biases, padding. Where it was measured, alone."""
    if arch != heuristics.FEW_ARCH:
        return []
    kinds = [(3840, 2560, "store"), (2560, 2560, "residual"), (13824, 2560, "gated"), (2560, 6912, "residual")]
    splits = [(K, gemm_few.plan(N, K, SMS, epilogue == "gated"), epilogue) for N, K, epilogue in kinds]
    one, pair = gemm_few.Plan(1, 8, 3), gemm_few.Plan(2, 8, 3)
    return [
        *(gemm_few.gemm_few_spec(arch, K, split, epilogue) for K, split, epilogue in splits if split is not None),
        gemm_few.gemm_few_spec(arch, 2560, one, "acc"),
        gemm_few.gemm_few_spec(arch, 72, one, "store", bias=True),
        gemm_few.gemm_few_spec(arch, 2048, pair, "gated", "silu", True),
    ]


def linear_quantize_groups(arch: int) -> list[KernelSpec]:
    """Rows of Bonsai 8B, of the longest kind, and the other branches."""
    choices = [(4096, True), (12288, False), (100, True), (quantize.MAX_COLUMNS, True)]
    specs = [quantize_groups.quantize_groups_spec(arch, K, norm) for K, norm in choices]
    return [*specs, quantize_groups.quantize_groups_spec(arch, 4096, True, planes=2)]


def linear_gemv_groups(arch: int) -> list[KernelSpec]:
    """A step's of Bonsai 8B and 1.7B, the longest rows, and without tensor cores."""
    shapes = [
        (6144, 4096, True, "store", "silu"), (4096, 4096, False, "residual", "silu"),
        (24576, 4096, True, "gated", "silu"), (4096, 12288, False, "residual", "silu"),
        (4096, 2048, True, "store", "silu"), (12288, 2048, True, "gated", "silu"),
        (2048, 6144, False, "residual", "silu"), (4096, gemv_groups.MAX_COLUMNS, False, "residual", "silu"),
        (256, 8192, True, "gated", "relu2"),
    ]  # fmt: skip
    return [
        gemv_groups.gemv_groups_spec(
            arch, K, gemv_groups.plan(N, K, SMS, epilogue == "gated"), norm, epilogue, activation, bias=N == 256
        )
        for N, K, norm, epilogue, activation in shapes
    ]


def linear_gemm_groups(arch: int) -> list[KernelSpec]:
    """Bonsai 8B's for every size of pass, on sm_90 whatever may be chosen for others, and without tensor cores."""
    found = {
        (heuristics.choose_group_tile(M, N, K, arch, SMS, epilogue == "gated"), epilogue): None
        for M in (256, 8, 16, 32, 64, 128, 512, 2048)
        for N, K, epilogue in ((4096, 12288, "residual"), (24576, 4096, "gated"), (6144, 4096, "store"))
    }
    if arch == heuristics.WGMMA_ARCH:
        found |= {(m.tile, kind): None for kind in ("gated", "store") for m in heuristics.group_tiles(kind == "gated")}
    old = heuristics.choose_group_tile(8, 4096, 4096, 61, SMS, True)
    return [gemm_groups.spec(arch, tile, epilogue, "silu", epilogue == "store") for tile, epilogue in found] + [
        gemm_groups.spec(arch, old, "gated", "silu", True)
    ]


def sampling(arch: int) -> list[KernelSpec]:
    """Both samplers, and what comes before and after."""
    return [single.spec(arch), batched.spec(arch), edits.spec(arch), logprobs.spec(arch)]


GROUPS: dict[str, Callable[[int], list[KernelSpec]]] = {
    list_variants.__name__: list_variants
    for list_variants in (
        attention_decode, attention_paged_decode, attention_prefill, attention_prefill_wgmma,
        attention_paged_simt, attention_kv_cache, attention_expand, attention_head_norm,
        attention_rotate_heads, attention_text_attention, embedding, lm_head_gemv, lm_head_gemm, lm_head_gemm_wgmma,
        linear_row_norm, linear_gated, linear_quantize, linear_gemv, linear_gemm, linear_gemm_few,
        linear_quantize_groups,
        linear_gemv_groups, linear_gemm_groups, sampling,
    )
}  # fmt: skip


def variants(arch: int) -> list[KernelSpec]:
    """All of them for an architecture."""
    return [spec for list_variants in GROUPS.values() for spec in list_variants(arch)]
