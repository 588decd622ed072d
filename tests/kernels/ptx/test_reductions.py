"""The simulator's short way to a warp's reductions gives every lane what the shuffles give it."""

from importlib import import_module

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cuda, types

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.runtime.spec import KernelSpec
from tests.kernels.harness import Out, run, simulated

shuffles = import_module("bitnet_numba.kernels.ptx.warp")
FLOATS, INTS = types.CPointer(types.float32), types.CPointer(types.int32)


def reduce_both_ways(x, n, out, out_n):
    lane = cuda.threadIdx.x
    out[lane], out[lane + 32] = shuffles.warp_sum(x[lane]), ptx.warp_sum(x[lane])
    out[lane + 64], out[lane + 96] = shuffles.warp_max(x[lane]), ptx.warp_max(x[lane])
    out_n[lane], out_n[lane + 32] = shuffles.warp_sum_int(n[lane]), ptx.warp_sum_int(n[lane])
    out_n[lane + 64], out_n[lane + 96] = shuffles.warp_max(n[lane]), ptx.warp_max(n[lane])


@simulated
@settings(max_examples=20)
@given(
    x=st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, np.nan, np.inf, 1e38]), min_size=32, max_size=32),
    n=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=32, max_size=32),
)
def test_simulated_reductions(x: list[float], n: list[int]) -> None:
    spec = KernelSpec("reduce_both_ways", reduce_both_ways, (FLOATS, INTS, FLOATS, INTS), 32)
    out, out_n = Out(128, np.float32), Out(128, np.int32)
    run(spec, 1, [np.array(x, np.float32), np.array(n, np.int32), out, out_n])
    for result in (out.array, out_n.array):
        np.testing.assert_array_equal(result[:32], result[32:64])
        np.testing.assert_array_equal(result[64:96], result[96:])
