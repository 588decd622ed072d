"""The instructions of the kernels: inline PTX, each with an emulation in plain Python. Used as `ptx.mul_rn(a, b)`.

Here are all of them, flat. Types, constants and how instructions are made are in `ptx.base`; constants of TMA and of
wgmma in `ptx.tma` and `ptx.wgmma`.
"""

# ruff: noqa: F401 - re-exports
from bitnet_numba.kernels.ptx.base import (
    no_unroll,
)
from bitnet_numba.kernels.ptx.cp_async import (
    cp_async_16,
    cp_async_16_at,
    cp_async_commit,
    cp_async_wait,
)
from bitnet_numba.kernels.ptx.math import (
    add_rn,
    bf16_high,
    bf16_low,
    bits_to_float,
    byte_permute,
    clamp,
    div_rn,
    dp4a,
    dp4a_us,
    e4m3_high,
    e4m3_low,
    exp2_approx,
    f16_high,
    f16_low,
    float_to_bits,
    fma_bf16x2,
    fma_rn,
    int_to_float,
    join_bf16,
    join_f16,
    mul_hi,
    mul_lo,
    mul_rn,
    pack_bf16x2,
    pack_f16x2,
    rcp_approx,
    rcp_rn,
    round_to_int,
    rsqrt_approx,
    split_bf16x2,
    sqrt_rn,
    to_bf16,
    udiv,
    widen_positive,
)
from bitnet_numba.kernels.ptx.memory import (
    atomic_add_f32,
    atomic_add_release,
    atomic_add_wide,
    atomic_fetch_add,
    atomic_fetch_add_ordered,
    atomic_max_wide,
    atomic_or,
    load2,
    load2_f32,
    load2_l2,
    load4,
    load_acquire,
    pointer,
    prefetch_l2,
    shared_address,
    store2,
    store2_f32,
    store4,
    stream_load,
    stream_load2,
    threadfence,
)
from bitnet_numba.kernels.ptx.mma import (
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_bf16,
    mma_bf16_split,
    mma_bf16_split_both,
    mma_f16,
    mma_s8,
)
from bitnet_numba.kernels.ptx.pdl import (
    pdl_trigger,
    pdl_wait,
)
from bitnet_numba.kernels.ptx.tma import (
    cluster_arrive,
    cluster_load,
    cluster_store4_f32,
    cluster_store_f32,
    cluster_wait,
    fence_proxy_async,
    mbarrier_arrive_warp,
    mbarrier_expect_tx,
    mbarrier_init,
    mbarrier_init_warps,
    mbarrier_spin,
    mbarrier_wait,
    prefetch_tensor_map,
    tma_load_2d,
    tma_load_3d,
)
from bitnet_numba.kernels.ptx.warp import (
    redux_sum_int,
    shuffle,
    shuffle_xor,
    warp_max,
    warp_max_int,
    warp_sum,
    warp_sum_int,
)
from bitnet_numba.kernels.ptx.wgmma import (
    load_row_pair,
    shifted_codes,
    shifted_weights,
    wgmma_bf16_split,
    wgmma_s8,
    wgmma_s8_pair,
    wgmma_s8_shared,
)
from bitnet_numba.kernels.ptx.wgmma_attention import (
    warpgroup_barrier,
    wgmma_scores,
    wgmma_values,
)
