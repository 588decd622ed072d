"""The LM head of many tokens: two launches, the final RMSNorm and the product with every row of the embedding table.

    split_norm     norm(h) -> x, in the order in which the product reads it; on tensor cores as two bfloat16 terms, or
                   as three int8 terms
    product        logits[m, n] = sum_k norm(h[m])[k] * w[n, k]   (* scale[n] for int8 rows)

Which kernel is the product depends on the card and on the table alone, never on the number of tokens, so that a token's
logits have the same bits whatever else is in the batch:

    sm_90, bfloat16, int8     gemm_wgmma
    sm_80 and later           gemm_mma
    before                    gemm_simt, with norm(h) in float32
"""

from typing import Any

from bitnet_numba.kernels.lm_head import gemm_mma, gemm_simt, gemm_wgmma, split_norm
from bitnet_numba.kernels.lm_head.parts import check_columns
from bitnet_numba.kernels.lm_head.split_norm import Layout, group_size_argument, padded_tokens, x_words
from bitnet_numba.kernels.operands import EmbeddingTable, Norm, RowDtype, checked
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.kernels.runtime.spec import ArchSpec


def layout_for(arch: int, dtype: RowDtype) -> Layout:
    """Which kernel multiplies, and so which layout x has; `dtype`: of the table's rows."""
    if arch == gemm_wgmma.ARCH and dtype in gemm_wgmma.LAYOUTS:
        return gemm_wgmma.LAYOUTS[dtype]
    return "mma" if arch >= gemm_mma.MIN_ARCH else "simt"


def split_words(device: ArchSpec, table: EmbeddingTable, num_tokens: int) -> int:
    """int32 words of the scratch array `split` that `lm_head_gemm` takes for up to so many tokens."""
    return x_words(layout_for(device.arch, table.dtype), num_tokens, table.columns, table.dtype)


def lm_head_gemm(
    device: Device,
    table: EmbeddingTable,
    h: DeviceArray,
    norm: Norm,
    split: DeviceArray,
    logits: DeviceArray,
    num_tokens: int,
    *,
    use_pdl: bool = True,
) -> list[Launch]:
    """The two launches, in order, that compute the logits of `num_tokens` tokens.

    h float32 [num_tokens, columns]; norm.weight float32 [columns]; split int32 [split_words(...)], scratch; logits
    float32 [num_tokens, vocab_size]. Raises ValueError in one line unless there is a token, columns are a multiple of
    32, rows are not ternary, and the operands have these types and at least these sizes.
    """
    K, num_rows, dtype, arch = table.columns, table.vocab_size, table.dtype, device.arch
    if num_tokens < 1:
        raise ValueError(f"lm_head_gemm: at least one token is needed, not {num_tokens}")
    check_columns(K)
    problem = f"an LM head of {num_rows} rows of {K} and {num_tokens} tokens"
    rows, scale, h, weight, split, logits = checked(
        "lm_head_gemm",
        problem,
        **table.sizes(),
        h=(h, num_tokens * K, "float32"),
        norm=(norm.weight, K, "float32"),
        split=(split, split_words(device, table, num_tokens), "int32"),
        logits=(logits, num_tokens * num_rows, "float32"),
    )
    layout = layout_for(arch, dtype)
    arguments: tuple[Any, ...] = (h, weight, norm.eps, split, num_tokens, group_size_argument(layout, num_tokens))
    normed = device.launch(
        split_norm.spec(arch, K, layout, dtype), padded_tokens(layout, num_tokens), arguments, use_pdl
    )
    if layout in gemm_wgmma.LAYOUTS.values():
        tile = gemm_wgmma.plan(num_tokens, dtype)
        of_rows, of_x = gemm_wgmma.map_boxes(tile, num_rows, num_tokens, K)
        maps = device.tensor_map(rows, of_rows), device.tensor_map(split, of_x)
        spec, grid = gemm_wgmma.spec(arch, tile), gemm_wgmma.grid(device.num_sms, tile, num_rows, num_tokens)
        of_int8 = (scale, split) if dtype == "int8" else (None, None)
        ints, k_iters = gemm_wgmma.row_ints(tile, K), gemm_wgmma.num_k_iters(tile, K)
        arguments = (*maps, *of_int8, logits, num_rows, num_tokens, k_iters, ints)
    else:
        arguments = (rows, scale, split, logits, num_rows, num_tokens)
        if layout == "mma":
            spec = gemm_mma.spec(arch, K, dtype, gemm_mma.token_tiles(num_tokens))
            grid = gemm_mma.grid(device.num_sms, num_tokens)
        else:
            spec, grid = gemm_simt.spec(arch, K, dtype), gemm_simt.grid(device.num_sms, num_tokens)
    return [normed, device.launch(spec, grid, arguments, use_pdl)]
