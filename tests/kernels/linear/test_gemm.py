"""The W2A8 GEMM.

Contract: int32 sums are exact, for every number of tokens and ragged sizes. Everything after them is a single float32
operation at a time, in the order of the GEMV and of the reference: compared with `==`, but for silu,
whose exponential is good to 2 ulp, each of the three operations after it adding half of one: 2^-21 relative.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear.gemm import gemm, launch_sizes, map_boxes, spec
from bitnet_numba.kernels.linear.heuristics import MIN_ARCH, choose_tile
from bitnet_numba.kernels.linear.operands import PackedLinear, QuantizedActivations
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.runtime.device import Device, DryRunDevice
from bitnet_numba.packing import pack_ternary
from bitnet_numba.reference.model import relu2, silu
from tests.kernels.harness import HarnessDevice, Out, arch, assert_close, mapped, needs_gpu, run, simulated


def check_gemm(
    M: int, N: int, K: int, tile: Tile, epilogue: str, activation: str, bias: bool, seed: int,
    count: int | None = None, built_for: int = 0,
) -> None:  # fmt: skip
    """One product of random ternary weights, N rows in three segments of odd scales, `count` of M tokens real."""
    rng = np.random.default_rng(seed)
    gated, acc_only = epilogue == "gated", epilogue == "acc"
    count = M if count is None else count
    padded_K = -(-K // 32) * 32
    w = rng.integers(-1, 2, (N, K)).astype(np.int8)
    q = np.zeros((M, padded_K), np.int8)
    q[:, :K] = rng.integers(-127, 128, (M, K))
    s = (rng.uniform(0.5, 2, M) * 10.0 ** rng.integers(-3, 4, M)).astype(np.float32)
    if activation == "silu":
        s = s * np.float32(K) + np.float32(3 * K)  # the simulator's exp refuses to overflow
    rows = N // 2 if gated else N
    bounds = (rows, N) if gated else (N // 3, N // 3 + 5)
    scales = np.array([0.0137, 1.71, 0.29], np.float32)
    segments = np.searchsorted(bounds, np.arange(N), side="right")
    b = rng.standard_normal(N).astype(np.float32) if bias else None
    # Sums of up to K * 127 are exact in float64, which NumPy multiplies much faster than integers.
    acc = (q[:, :K].astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32)
    y = acc.astype(np.float32) * scales[segments] / s[:, None]
    if b is not None:
        y = y + b
    old = rng.standard_normal((M, rows)).astype(np.float32)
    expected, bound = y, np.float64(0)
    if gated:
        activate = relu2 if activation == "relu2" else silu
        expected = activate(y[:, :rows]) * y[:, rows:]
        bound = 2.0**-21 * np.abs(expected.astype(np.float64)) if activation == "silu" else bound
    elif epilogue == "residual":
        expected = old + y

    out = Out(M * rows, np.int32) if acc_only else Out(M * rows, np.float32, old if epilogue == "residual" else None)
    before = out.array.reshape(M, rows).copy()
    kernel = spec(built_for or arch(), tile, epilogue, activation, bias)
    q_sum = q.sum(axis=1, dtype=np.int32)
    grid, sizes = launch_sizes(tile, M, N, K, bounds, gated)
    assert sizes[-2:] == bounds
    words: Any = pack_ternary(w)
    activations: Any = q.view(np.int32)
    if tile.scheme == "wgmma":
        of_words, of_q = map_boxes(tile, M, N, K, gated)
        beyond = rng.integers(-127, 128, -padded_K % 128).astype(np.int8)  # read with the last token, to no effect
        activations = np.concatenate([q.reshape(-1), beyond]).view(np.int32)
        (words, _on_device), (activations, _too) = mapped(words, of_words), mapped(activations, of_q)
    arguments = [words, activations, s, q_sum, np.array([count], np.int32), scales, b, out, *sizes]
    run(kernel, grid, arguments)
    result = out.array.reshape(M, rows)
    wanted = acc if acc_only else expected
    if count:
        assert_close(result[:count], wanted[:count], np.broadcast_to(bound, wanted.shape)[:count], kernel.name)
    beyond = -(-count // tile.tokens) * tile.tokens
    assert result[beyond:].tobytes() == before[beyond:].tobytes(), f"{kernel.name}: wrote tokens that are not there"


KINDS = st.sampled_from(
    [("acc", "relu2"), ("store", "relu2"), ("residual", "relu2"), ("gated", "relu2"), ("gated", "silu")]
)


GROUP = Tile(16, 1, 4, 1, 0, 2, scheme="wgmma")
PAIRS = Tile(16, 1, 8, 1, 0, 3, scheme="wgmma")
SPLIT = Tile(24, 1, 4, 2, 0, 3, scheme="wgmma")
CLUSTER = Tile(16, 1, 4, 2, 0, 2, scheme="wgmma", cluster=3, refill=False)
CLUSTER_PAIRS = Tile(8, 1, 4, 1, 0, 1, scheme="wgmma", cluster=2, refill=False)
DP4A = Tile(8, 1, 1, 2, 0, 0, scheme="dp4a")


@simulated
@settings(max_examples=4)
@example(M=9, N=64, K=300, kind=("gated", "relu2"), bias=True, tile=DP4A, short=1, seed=4)
@example(M=11, N=40, K=290, kind=("acc", "relu2"), bias=False, tile=Tile(8, 2, 1, 2, 2, 2), short=0, seed=1)
@example(M=9, N=70, K=200, kind=("residual", "relu2"), bias=True, tile=Tile(16, 1, 2, 1, 3, 0), short=3, seed=2)
@example(M=5, N=64, K=160, kind=("gated", "silu"), bias=True, tile=Tile(8, 2, 1, 2, 1, 3), short=0, seed=3)
@example(M=35, N=70, K=160, kind=("residual", "relu2"), bias=True, tile=GROUP, short=1, seed=5)
@example(M=20, N=96, K=290, kind=("gated", "relu2"), bias=False, tile=PAIRS, short=3, seed=6)
@example(M=30, N=70, K=330, kind=("residual", "relu2"), bias=True, tile=SPLIT, short=2, seed=7)
@example(M=21, N=70, K=700, kind=("residual", "relu2"), bias=True, tile=CLUSTER, short=1, seed=8)
@example(M=9, N=96, K=200, kind=("gated", "relu2"), bias=True, tile=CLUSTER_PAIRS, short=2, seed=9)
@example(M=9, N=96, K=200, kind=("gated", "relu2"), bias=True, tile=CLUSTER_PAIRS, short=9, seed=10)
@given(
    M=st.integers(1, 20),
    N=st.integers(1, 70),
    K=st.integers(1, 300),
    kind=KINDS,
    bias=st.booleans(),
    tile=st.builds(
        Tile,
        st.sampled_from([8, 16]),
        st.sampled_from([2, 4]),
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 3),
        st.sampled_from([0, 2, 3]),
        st.just(1),
        st.just("mma"),
        st.just(1),
        st.just(True),
    )
    | st.sampled_from([DP4A, GROUP]),
    short=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_gemm(
    M: int, N: int, K: int, kind: tuple[str, str], bias: bool, tile: Tile, short: int, seed: int
) -> None:
    if kind[0] == "gated":
        N = -(-N // 32) * 32
    if tile.scheme == "dp4a":
        tile = tile._replace(row_blocks=2 if kind[0] == "gated" else 1)
    check_gemm(M, N, K, tile, *kind, bias, seed, max(0, M - short))


SHAPES = [(2560, 2560, False), (3840, 2560, False), (13824, 2560, True), (2560, 6912, False), (17280, 3200, True),
          (3200, 8640, False), (4096, 14336, False), (16, 32, False), (33, 31, False), (64, 160, True)]  # fmt: skip


@pytest.mark.parametrize("arch_", [61, 75, 80, 90, 120])
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_tiles_cover_every_row_and_token(N: int, K: int, gated: bool, arch_: int) -> None:
    for M in (1, 2, 7, 8, 9, 33, 64, 500, 1024, 4096):
        for num_sms in (1, 46, 132):
            tile = choose_tile(M, N, K, arch_, num_sms, gated)
            (x, y), (*_, k_iters, row_blocks, up_offset, _, _) = launch_sizes(tile, M, N, K, (N,), gated)
            assert (tile.scheme == "dp4a") == (arch_ < MIN_ARCH)
            assert x * tile.tokens >= M > (x - 1) * tile.tokens
            each = tile.rows // 16 // (2 if gated else 1)
            y //= tile.cluster
            assert y * each >= row_blocks > (y - 1) * each
            assert row_blocks * 16 * (2 if gated else 1) >= N and up_offset == (row_blocks if gated else 0)
            assert k_iters * tile.k_warps * tile.cluster * (64 if tile.scheme == "mma" else 128) >= K
            assert tile.refill or k_iters <= tile.stages
            assert tile.threads <= 1024


def test_tiles_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="no GEMM is made of"):
        spec(90, Tile(8, 3, 1, 2, 2, 0), "gated")
    with pytest.raises(ValueError, match="no GEMM is made of"):
        spec(90, Tile(12, 2, 1, 2, 2, 0))
    with pytest.raises(ValueError, match="no GEMM is made of"):
        spec(90, Tile(128, 2, 2, 4, 2, 3))
    with pytest.raises(ValueError, match="no wgmma GEMM is made of"):
        spec(90, GROUP._replace(row_warps=2))
    with pytest.raises(ValueError, match="no wgmma GEMM is made of"):
        spec(90, GROUP._replace(tokens=40))
    with pytest.raises(ValueError, match="no wgmma GEMM is made of"):
        spec(90, Tile(192, 1, 8, 1, 0, 8, 1, "wgmma"))


@needs_gpu
@pytest.mark.parametrize("M", [1, 8, 13, 32, 100, 416, 512, 1024])
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_full_size_on_gpu(N: int, K: int, gated: bool, M: int) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device

    tile = choose_tile(M, N, K, arch(), usable_device().num_sms, gated)
    check_gemm(M, N, K, tile, "gated" if gated else "acc", "relu2", False, M)


@needs_gpu
@settings(max_examples=40)
@given(
    M=st.integers(1, 1024),
    N=st.integers(1, 3000),
    K=st.integers(1, 3000),
    kind=KINDS,
    bias=st.booleans(),
    built_for=st.sampled_from([0, 0, 0, 80, 75, 61]),
    num_sms=st.sampled_from([1, 46, 132]),
    short=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_on_gpu(
    M: int,
    N: int,
    K: int,
    kind: tuple[str, str],
    bias: bool,
    built_for: int,
    num_sms: int,
    short: int,
    seed: int,
) -> None:
    gated = kind[0] == "gated"
    if gated:
        N = -(-N // 32) * 32
    tile = choose_tile(M, N, K, built_for or arch(), num_sms, gated)
    check_gemm(M, N, K, tile, *kind, bias, seed, max(1, M - short), built_for)


def operands(device: Device, M: int, N: int, K: int, segments: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    """A packed linear, activations, their number and an output, of arbitrary contents."""
    rng = np.random.default_rng(5)
    words = device.array(pack_ternary(rng.integers(-1, 2, (N, K)).astype(np.int8)))
    q = rng.integers(-127, 128, (M, K)).astype(np.int8)
    scales = device.array(np.array([0.7, 0.011, 3.3], np.float32))
    x = QuantizedActivations(
        device.array(q),
        device.array(rng.uniform(0.1, 9, M).astype(np.float32)),
        device.array(q.sum(axis=1, dtype=np.int32)),
    )
    linear = PackedLinear(words, scales, segments, K)
    return linear, x, device.array(np.array([M], np.int32)), device.empty(M * N, np.float32)


def test_launcher_refuses_what_does_not_fit() -> None:
    device = DryRunDevice(90, 132)
    M, N, K = 37, 3840, 2560
    linear, x, count, out = operands(device, M, N, K, (2560, 640, 640))
    assert gemm(device, linear, x, count, out, M).spec.name.startswith("gemm[sm_90 store")
    with pytest.raises(ValueError, match=r"gemm: q holds \d+ elements, a 3840 x 2560 product of 38 tokens takes 97280"):
        gemm(device, linear, x, count, out, 38)
    with pytest.raises(ValueError, match=r"gemm: \(2560, 1280\) are no gate and up rows"):
        gemm(device, replace(linear, segments=(2560, 1280)), x, count, out, M, epilogue="gated")
    with pytest.raises(ValueError, match="gemm: no epilogue 'add'"):
        gemm(device, linear, x, count, out, M, epilogue="add")
    with pytest.raises(ValueError, match="gemm: out must be int32, not float32"):
        gemm(device, linear, x, count, out, M, epilogue="acc")
    with pytest.raises(ValueError, match="gemm: words holds"):
        gemm(device, replace(linear, K=2592), x, count, out, M)
    with pytest.raises(ValueError, match="gemm: bias must be float32, not int8"):
        gemm(device, replace(linear, bias=x.q), x, count, out, M)
    with pytest.raises(ValueError, match="needs at least one token, not 0"):
        gemm(device, linear, x, count, out, 0)
    with pytest.raises(ValueError, match="gemm: rows come in 1 to 3 segments"):
        gemm(device, replace(linear, segments=(960,) * 4), x, count, out, M)


@pytest.mark.parametrize("name", ["words", "scales", "bias", "q", "scale", "q_sum", "count", "out"])
def test_launcher_refuses_each_operand(name: str) -> None:
    """One element too few, and a dtype that no kernel takes."""
    device = DryRunDevice(90, 132)
    M, N, K = 37, 3840, 2560
    linear, x, count, out = operands(device, M, N, K, (2560, 640, 640))
    linear = replace(linear, scales=device.empty(3, np.float32), bias=device.empty(N, np.float32))
    arrays = {"count": count, "out": out}
    right = {**vars(linear), **vars(x), **arrays}[name]
    gemm(device, linear, x, count, out, M)
    for array, problem in (
        (device.empty(right.size - 1, right.dtype), f"holds {right.size - 1} elements"),
        (device.empty(right.size, np.float64), "must be .*, not float64"),
    ):
        changed = {
            part: replace(value, **{name: array}) if name in vars(value) else value
            for part, value in (("linear", linear), ("x", x))
        }
        given = {**arrays, name: array}
        with pytest.raises(ValueError, match=f"gemm: {name} {problem}"):
            gemm(device, changed["linear"], changed["x"], given["count"], given["out"], M)


@simulated
@pytest.mark.parametrize("epilogue", ["acc", "store", "residual", "gated"])
def test_simulated_launch(epilogue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments that the launcher makes, for a tile of each kernel; two of nine tokens are not real."""
    rng = np.random.default_rng(11)
    M, count, K, gated = 9, 7, 200, epilogue == "gated"
    segments = (32, 32) if gated else (24, 5, 9)
    N = sum(segments)
    w, q = rng.integers(-1, 2, (N, K)).astype(np.int8), np.zeros((M, 224), np.int8)
    q[:, :K] = rng.integers(-127, 128, (M, K))
    s, bias = rng.uniform(0.5, 2, M).astype(np.float32), rng.standard_normal(N).astype(np.float32)
    scales = np.array([0.0137, 1.71, 0.29], np.float32)[: len(segments)]
    acc = q[:, :K].astype(np.int32) @ w.T.astype(np.int32)
    y = acc.astype(np.float32) * np.repeat(scales, segments) / s[:, None] + bias
    rows = N // 2 if gated else N
    old = rng.standard_normal((M, rows)).astype(np.float32)
    expected = relu2(y[:, :rows]) * y[:, rows:] if gated else {"acc": acc, "store": y, "residual": old + y}[epilogue]
    for tile in (PAIRS, Tile(8, 2, 1, 2, 2, 2), DP4A._replace(row_blocks=2 if gated else 1)):
        monkeypatch.setattr("bitnet_numba.kernels.linear.gemm.choose_tile", lambda *_, tile=tile: tile)
        device = HarnessDevice(2)
        out = Out(M * rows, np.int32) if epilogue == "acc" else Out(M * rows, np.float32, old)
        words, *of_linear = (device.operand(a) for a in (pack_ternary(w), scales))
        linear = PackedLinear(words, *of_linear, segments, K, device.operand(bias))
        read = np.append(q.reshape(-1), np.full(32, 99, np.int8))  # with the last token, to no effect
        x = QuantizedActivations(*(device.operand(a) for a in (read, s, q.sum(axis=1, dtype=np.int32))))
        real = device.operand(np.array([count], np.int32))
        gemm(device, linear, x, real, device.operand(out), M, epilogue=epilogue)
        name = device.run(1)
        assert_close(out.array.reshape(M, rows)[:count], expected[:count], 0, name)


@needs_gpu
def test_a_row_equals_the_gemv_on_gpu() -> None:
    """To the bit, by the public launchers."""
    from bitnet_numba.kernels.linear.gemv import gemv
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream
    from bitnet_numba.kernels.runtime.memory import DeviceView

    device, stream = usable_device(), Stream()
    M, N, K = 37, 3840, 2560
    linear, x, count, out = operands(device, M, N, K, (2560, 640, 640))
    row = device.empty(N, np.float32)
    gemm(device, linear, x, count, out, M)(stream.handle)
    stream.synchronize()
    for m in (0, 8, 36):
        one = QuantizedActivations(
            DeviceView(x.q.address + m * K, K, np.int8),
            DeviceView(x.scale.address + 4 * m, 1, np.float32),
            DeviceView(x.q_sum.address + 4 * m, 1, np.int32),
        )
        gemv(device, linear, one, row)(stream.handle)
        stream.synchronize()
        assert np.array_equal(out.read().reshape(M, N)[m], row.read())
