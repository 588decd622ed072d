"""The instruction set of the kernels: inline PTX with a plain-Python twin each, used as `ptx.mul_rn(a, b)`.

`base` says how they are made and what all kernels agree on.
"""

from bitnet_numba.kernels.ptx.base import (
    no_unroll as no_unroll,
)
from bitnet_numba.kernels.ptx.cp_async import (
    cp_async_16 as cp_async_16,
)
from bitnet_numba.kernels.ptx.cp_async import (
    cp_async_commit as cp_async_commit,
)
from bitnet_numba.kernels.ptx.cp_async import (
    cp_async_wait as cp_async_wait,
)
from bitnet_numba.kernels.ptx.math import (
    add_rn as add_rn,
)
from bitnet_numba.kernels.ptx.math import (
    bf16_high as bf16_high,
)
from bitnet_numba.kernels.ptx.math import (
    bf16_low as bf16_low,
)
from bitnet_numba.kernels.ptx.math import (
    bits_to_float as bits_to_float,
)
from bitnet_numba.kernels.ptx.math import (
    byte_permute as byte_permute,
)
from bitnet_numba.kernels.ptx.math import (
    div_rn as div_rn,
)
from bitnet_numba.kernels.ptx.math import (
    dp4a as dp4a,
)
from bitnet_numba.kernels.ptx.math import (
    dp4a_us as dp4a_us,
)
from bitnet_numba.kernels.ptx.math import (
    exp2_approx as exp2_approx,
)
from bitnet_numba.kernels.ptx.math import (
    float_to_bits as float_to_bits,
)
from bitnet_numba.kernels.ptx.math import (
    int_to_float as int_to_float,
)
from bitnet_numba.kernels.ptx.math import (
    join_bf16 as join_bf16,
)
from bitnet_numba.kernels.ptx.math import (
    mul_hi as mul_hi,
)
from bitnet_numba.kernels.ptx.math import (
    mul_lo as mul_lo,
)
from bitnet_numba.kernels.ptx.math import (
    mul_rn as mul_rn,
)
from bitnet_numba.kernels.ptx.math import (
    rcp_approx as rcp_approx,
)
from bitnet_numba.kernels.ptx.math import (
    rcp_rn as rcp_rn,
)
from bitnet_numba.kernels.ptx.math import (
    round_to_int as round_to_int,
)
from bitnet_numba.kernels.ptx.math import (
    rsqrt_approx as rsqrt_approx,
)
from bitnet_numba.kernels.ptx.math import (
    sqrt_rn as sqrt_rn,
)
from bitnet_numba.kernels.ptx.math import (
    to_bf16 as to_bf16,
)
from bitnet_numba.kernels.ptx.math import (
    udiv as udiv,
)
from bitnet_numba.kernels.ptx.memory import (
    atomic_add_release as atomic_add_release,
)
from bitnet_numba.kernels.ptx.memory import (
    atomic_add_wide as atomic_add_wide,
)
from bitnet_numba.kernels.ptx.memory import (
    atomic_fetch_add as atomic_fetch_add,
)
from bitnet_numba.kernels.ptx.memory import (
    atomic_fetch_add_ordered as atomic_fetch_add_ordered,
)
from bitnet_numba.kernels.ptx.memory import (
    atomic_max_wide as atomic_max_wide,
)
from bitnet_numba.kernels.ptx.memory import (
    atomic_or as atomic_or,
)
from bitnet_numba.kernels.ptx.memory import (
    load2_f32 as load2_f32,
)
from bitnet_numba.kernels.ptx.memory import (
    load2_l2 as load2_l2,
)
from bitnet_numba.kernels.ptx.memory import (
    load4 as load4,
)
from bitnet_numba.kernels.ptx.memory import (
    load_acquire as load_acquire,
)
from bitnet_numba.kernels.ptx.memory import (
    pointer as pointer,
)
from bitnet_numba.kernels.ptx.memory import (
    prefetch_l2 as prefetch_l2,
)
from bitnet_numba.kernels.ptx.memory import (
    store2 as store2,
)
from bitnet_numba.kernels.ptx.memory import (
    store2_f32 as store2_f32,
)
from bitnet_numba.kernels.ptx.memory import (
    store4 as store4,
)
from bitnet_numba.kernels.ptx.memory import (
    stream_load as stream_load,
)
from bitnet_numba.kernels.ptx.memory import (
    stream_load2 as stream_load2,
)
from bitnet_numba.kernels.ptx.memory import (
    threadfence as threadfence,
)
from bitnet_numba.kernels.ptx.mma import (
    cp_async_16_at as cp_async_16_at,
)
from bitnet_numba.kernels.ptx.mma import (
    fma_bf16x2 as fma_bf16x2,
)
from bitnet_numba.kernels.ptx.mma import (
    ldmatrix_x4 as ldmatrix_x4,
)
from bitnet_numba.kernels.ptx.mma import (
    ldmatrix_x4_trans as ldmatrix_x4_trans,
)
from bitnet_numba.kernels.ptx.mma import (
    mma_bf16 as mma_bf16,
)
from bitnet_numba.kernels.ptx.mma import (
    mma_bf16_split as mma_bf16_split,
)
from bitnet_numba.kernels.ptx.mma import (
    mma_s8 as mma_s8,
)
from bitnet_numba.kernels.ptx.mma import (
    pack_bf16x2 as pack_bf16x2,
)
from bitnet_numba.kernels.ptx.mma import (
    shared_address as shared_address,
)
from bitnet_numba.kernels.ptx.pdl import (
    pdl_trigger as pdl_trigger,
)
from bitnet_numba.kernels.ptx.pdl import (
    pdl_wait as pdl_wait,
)
from bitnet_numba.kernels.ptx.tma import (
    PANEL_ALIGN as PANEL_ALIGN,
)
from bitnet_numba.kernels.ptx.tma import (
    SPAN_INTS as SPAN_INTS,
)
from bitnet_numba.kernels.ptx.tma import (
    SimulatedTensorMap as SimulatedTensorMap,
)
from bitnet_numba.kernels.ptx.tma import (
    cluster_arrive as cluster_arrive,
)
from bitnet_numba.kernels.ptx.tma import (
    cluster_load as cluster_load,
)
from bitnet_numba.kernels.ptx.tma import (
    cluster_wait as cluster_wait,
)
from bitnet_numba.kernels.ptx.tma import (
    load_row_pair as load_row_pair,
)
from bitnet_numba.kernels.ptx.tma import (
    mbarrier_expect_tx as mbarrier_expect_tx,
)
from bitnet_numba.kernels.ptx.tma import (
    mbarrier_init as mbarrier_init,
)
from bitnet_numba.kernels.ptx.tma import (
    mbarrier_wait as mbarrier_wait,
)
from bitnet_numba.kernels.ptx.tma import (
    prefetch_tensor_map as prefetch_tensor_map,
)
from bitnet_numba.kernels.ptx.tma import (
    tma_load_2d as tma_load_2d,
)
from bitnet_numba.kernels.ptx.warp import (
    shuffle as shuffle,
)
from bitnet_numba.kernels.ptx.warp import (
    shuffle_xor as shuffle_xor,
)
from bitnet_numba.kernels.ptx.warp import (
    warp_max as warp_max,
)
from bitnet_numba.kernels.ptx.warp import (
    warp_sum as warp_sum,
)
from bitnet_numba.kernels.ptx.warp import (
    warp_sum_int as warp_sum_int,
)
from bitnet_numba.kernels.ptx.wgmma import (
    TILE_BYTES as TILE_BYTES,
)
from bitnet_numba.kernels.ptx.wgmma import (
    shifted_codes as shifted_codes,
)
from bitnet_numba.kernels.ptx.wgmma import (
    wgmma_bf16_split as wgmma_bf16_split,
)
from bitnet_numba.kernels.ptx.wgmma import (
    wgmma_s8 as wgmma_s8,
)
