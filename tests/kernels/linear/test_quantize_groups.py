"""RMSNorm and quantisation of rows by groups of 128 columns.

Contract: q and steps equal, bit for bit, those of the definition (`quantize_groups`) with the mean of squares
rounded once from float64, whatever the number of threads; the reference's own mean differs as in test_quantize.py.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear.operands import GroupedActivations
from bitnet_numba.kernels.linear.quantize_groups import quantize_groups, quantize_groups_spec
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.packing import num_groups
from bitnet_numba.quantize import SECOND_STEP, quantize_groups_twice
from tests.kernels.harness import HarnessDevice, Out, arch, needs_gpu, run, simulated
from tests.kernels.linear.test_gemm_groups import packed_activations

ONE = np.float32(1)


def check_quantize_groups(
    spec: KernelSpec, tokens: int, K: int, norm: bool, seed: int, scale: float, planes: int = 1
) -> None:
    """Compares one launch with the definition."""
    rng = np.random.default_rng(seed)
    stride = -(-tokens // 4) * 4
    x = (rng.standard_normal((tokens, K)) * scale * 10.0 ** rng.integers(-3, 3, (tokens, K))).astype(np.float32)
    x[0, : K // 2] = 0
    weight = rng.uniform(-2, 2, K).astype(np.float32)
    q, steps = Out(tokens * (-(-K // 32) * 8), np.int32), Out(num_groups(K) * stride, np.float32)
    second = [Out(q.array.size, np.int32), Out(steps.array.size, np.float32)] if planes == 2 else [None, None]
    run(spec, tokens, [x, weight, np.float32(1e-5), q, steps, stride, *second])
    if norm:
        mean = np.mean((x * x).astype(np.float64), axis=-1, keepdims=True).astype(np.float32)
        x = weight * (x * (ONE / np.sqrt(mean + np.float32(1e-5))))
    expected_q, expected_steps = packed_activations(x)
    assert q.array.view(np.int8).tobytes() == expected_q.tobytes()
    got = steps.array.reshape(expected_steps.shape)[:, :tokens]
    assert got.tobytes() == expected_steps[:, :tokens].tobytes()
    if planes == 2:
        rest, rest_steps = (each.array for each in second)
        padded = rest.view(np.int8).reshape(tokens, -1)
        assert np.array_equal(padded[:, :K], quantize_groups_twice(x)[1]) and not padded[:, K:].any()
        got = rest_steps.reshape(expected_steps.shape)[:, :tokens]
        assert got.tobytes() == (expected_steps[:, :tokens] * SECOND_STEP).tobytes()


shapes = {
    "norm": st.booleans(),
    "planes": st.sampled_from([1, 2]),
    "seed": st.integers(0, 2**32 - 1),
    "scale": st.sampled_from([1e-9, 0.01, 1.0, 300.0]),
}


@simulated
@settings(max_examples=12)
@given(tokens=st.integers(1, 3), quads=st.integers(1, 130), warps=st.integers(1, 3), **shapes)
def test_simulated_quantize_groups(
    tokens: int, quads: int, warps: int, norm: bool, seed: int, scale: float, planes: int
) -> None:
    K = 4 * quads
    check_quantize_groups(quantize_groups_spec(arch(), K, norm, warps, planes), tokens, K, norm, seed, scale, planes)


@needs_gpu
@settings(max_examples=20)
@given(tokens=st.integers(1, 64), K=st.sampled_from([4, 100, 2048, 4096, 12288, 28672]), **shapes)
def test_quantize_groups_on_gpu(tokens: int, K: int, norm: bool, seed: int, scale: float, planes: int) -> None:
    check_quantize_groups(quantize_groups_spec(arch(), K, norm, 0, planes), tokens, K, norm, seed, scale, planes)


@simulated
def test_simulated_nan() -> None:
    """A group that holds NaN gets a step that is NaN; those beside it get what they get without."""
    x = np.ones((2, 300), np.float32)
    x[1, 130] = np.nan
    q, steps = Out(2 * 80, np.int32), Out(3 * 4, np.float32)
    run(quantize_groups_spec(arch(), 300, False, 1), 2, [x, x, np.float32(0), q, steps, 4, None, None])
    assert np.isnan(steps.array.reshape(3, 4)[:, :2]).tolist() == [[False, False], [False, True], [False, False]]


@simulated
def test_simulated_launch() -> None:
    """The arguments that the launcher makes."""
    rng, device, K = np.random.default_rng(100), HarnessDevice(2), 132
    x = rng.standard_normal((3, K)).astype(np.float32)
    q, steps = Out(3 * 40, np.int32), Out(2 * 4, np.float32)
    q_view = device.operand(q)
    q_view.size, q_view.dtype = 3 * 160, np.dtype(np.int8)
    quantize_groups(device, device.operand(x), GroupedActivations(q_view, device.operand(steps)), 3, K)
    device.run(1)
    expected_q, expected_steps = packed_activations(x)
    assert q.array.view(np.int8).tobytes() == expected_q.tobytes()
    assert np.array_equal(steps.array.reshape(2, 4)[:, :3], expected_steps[:, :3])


@pytest.mark.parametrize("K", [0, 30, 28676])
def test_refuses_row_sizes(K: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of 4, not {K}"):
        quantize_groups_spec(90, K)


@pytest.mark.parametrize("name", ["q", "steps", "x", "norm"])
def test_launcher_refuses_each_operand(name: str) -> None:
    """One element too few, and a dtype that the kernel does not take."""
    device = DryRunDevice(90, 132)
    out = GroupedActivations.empty(device, 3, 2560)
    arrays = {**vars(out), "x": device.empty(3 * 2560, np.float32), "norm": device.empty(2560, np.float32)}
    size, dtype = arrays[name].size, arrays[name].dtype
    for array, problem in (
        (device.empty(size - 1, dtype), f"holds {size - 1} elements"),
        (device.empty(size, np.float64), "must be .*, not float64"),
    ):
        given = {**arrays, name: array}
        with pytest.raises(ValueError, match=f"quantize_groups: {name} {problem}"):
            quantize_groups(
                device, given["x"], GroupedActivations(given["q"], given["steps"]), 3, 2560,
                norm=Norm(given["norm"], 1e-5),
            )  # fmt: skip
    with pytest.raises(ValueError, match="at least one is needed"):
        quantize_groups(device, arrays["x"], out, 0, 2560)
