"""The GEMM with group scales, by its launcher.

Contract: every bit but silu's is the reference's, for every number of tokens, tile and ragged sizes (silu: 2^-21, as in
test_gemm.py): sums of a group are exact, and the groups' products are added one by one, from the first on.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.linear import gemm_groups as module
from bitnet_numba.kernels.linear.gemm_groups import gemm_groups, launch_sizes, spec
from bitnet_numba.kernels.linear.heuristics import MIN_ARCH, choose_group_tile
from bitnet_numba.kernels.linear.operands import GroupedActivations, GroupedLinear
from bitnet_numba.kernels.linear.tile import Tile
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.packing import num_groups, pack_scales, pack_ternary, packed_scales, packed_words
from bitnet_numba.quantize import quantize_groups
from bitnet_numba.reference.model import GroupedLinear as ReferenceLinear
from bitnet_numba.reference.model import relu2, silu
from tests.kernels.harness import HarnessDevice, Out, arch, assert_close, needs_gpu, simulated
from tests.kernels.linear.test_gemv_groups import SHAPES, random_grouped


def packed_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `quantize_groups` gives for rows [M, K], as in `GroupedActivations`."""
    M, K = x.shape
    q, d = quantize_groups(x)
    padded = np.zeros((M, -(-K // 32) * 32), np.int8)
    padded[:, :K] = q
    steps = np.full((num_groups(K), -(-M // 4) * 4), np.nan, np.float32)  # what pads is not looked at
    steps[:, :M] = d.T
    return padded, steps


def check_gemm_groups(
    M: int, N: int, K: int, epilogue: str, activation: str, bias: bool, seed: int, count: int | None = None,
    num_sms: int = 132,
) -> None:  # fmt: skip
    """One product of random weights, `count` of M tokens real, against the reference."""
    rng = np.random.default_rng(seed)
    gated, count = epilogue == "gated", M if count is None else count
    w, scales = random_grouped(rng, N, K)
    x = rng.standard_normal((M, K)).astype(np.float32) * np.float32(10.0) ** rng.integers(-2, 1, (M, 1))
    x = x.astype(np.float32) / np.float32(K)  # the simulator's exp refuses to overflow
    b = rng.standard_normal(N).astype(np.float32) if bias else None
    y = ReferenceLinear(w, scales.astype(np.float32), b)(x)
    rows = N // 2 if gated else N
    old = rng.standard_normal((M, rows)).astype(np.float32)
    expected, bound = y, np.float64(0)
    if gated:
        activate = relu2 if activation == "relu2" else silu
        expected = activate(y[:, :rows]) * y[:, rows:]
        bound = 2.0**-21 * np.abs(expected.astype(np.float64)) if activation == "silu" else bound
    elif epilogue == "residual":
        expected = old + y

    device = HarnessDevice(num_sms)
    linear = GroupedLinear(
        device.operand(pack_ternary(w)), device.operand(pack_scales(scales)), (N // 2, N // 2) if gated else (N,), K,
        device.operand(b),
    )  # fmt: skip
    q, steps = packed_activations(x)
    out = Out(M * rows, np.float32, old if epilogue == "residual" else None)
    gemm_groups(
        device, linear, GroupedActivations(device.operand(q), device.operand(steps)),
        device.operand(np.array([count], np.int32)), device.operand(out), M, epilogue=epilogue, activation=activation,
    )  # fmt: skip
    name = device.run()
    result = out.array.reshape(M, rows)
    if count:
        assert_close(result[:count], expected[:count], np.broadcast_to(bound, expected.shape)[:count], name)


KINDS = st.sampled_from([("store", "relu2"), ("residual", "relu2"), ("gated", "relu2"), ("gated", "silu")])
DP4A = Tile(8, 2, 1, 2, 0, 0, scheme="dp4a")
KEPT_APART, IN_REGISTERS = Tile(8, 2, 1, 3, 2, 3), Tile(16, 2, 2, 1, 1, 2)
WGMMA, WGMMA_PAIR = Tile(32, 1, 8, 1, 0, 3, scheme="wgmma"), Tile(8, 1, 4, 1, 2, 3, scheme="wgmma")
WGMMA_APART = Tile(16, 1, 4, 2, 0, 2, scheme="wgmma")


@simulated
@settings(max_examples=4)
@example(M=9, N=64, K=600, kind=("gated", "relu2"), bias=True, tile=DP4A, short=1, seed=1, old_card=False)
@example(M=9, N=64, K=700, kind=("gated", "relu2"), bias=True, tile=KEPT_APART, short=1, seed=2, old_card=False)
@example(M=17, N=70, K=420, kind=("residual", "relu2"), bias=True, tile=IN_REGISTERS, short=3, seed=3, old_card=True)
@example(M=37, N=160, K=700, kind=("gated", "silu"), bias=True, tile=WGMMA, short=3, seed=4, old_card=False)
@example(M=13, N=96, K=900, kind=("gated", "relu2"), bias=True, tile=WGMMA_PAIR, short=3, seed=5, old_card=False)
@example(M=13, N=70, K=1024, kind=("residual", "relu2"), bias=True, tile=WGMMA_PAIR, short=3, seed=6, old_card=False)
@example(M=9, N=64, K=350, kind=("store", "relu2"), bias=False, tile=WGMMA_PAIR, short=1, seed=8, old_card=False)
@example(M=21, N=96, K=900, kind=("gated", "silu"), bias=True, tile=WGMMA_APART, short=3, seed=7, old_card=False)
@given(
    M=st.integers(1, 20),
    N=st.integers(1, 70),
    K=st.integers(1, 700),
    kind=KINDS,
    bias=st.booleans(),
    tile=st.builds(
        Tile,
        st.sampled_from([8, 16]),
        st.sampled_from([2, 4]),
        st.integers(1, 2),
        st.integers(1, 3),
        st.integers(1, 2),
        st.integers(2, 3),
    )
    | st.just(DP4A),
    short=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
    old_card=st.booleans(),
)
def test_simulated_gemm_groups(
    M: int, N: int, K: int, kind: tuple[str, str], bias: bool, tile: Tile, short: int, seed: int, old_card: bool
) -> None:
    if kind[0] == "gated":
        N = -(-N // 32) * 32
    if tile.scheme == "dp4a":
        tile = tile._replace(row_blocks=2 if kind[0] == "gated" else 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose_group_tile", lambda *_: tile)
        if old_card:  # copies through registers
            patch.setattr(module, "spec", lambda _, *others: spec(75, *others))
        check_gemm_groups(M, N, K, *kind, bias, seed, max(0, M - short))


@pytest.mark.parametrize("arch_", [61, 75, 80, 90, 120])
@pytest.mark.parametrize(("N", "K", "gated"), SHAPES)
def test_tiles_cover_every_row_token_and_group(N: int, K: int, gated: bool, arch_: int) -> None:
    for M in (1, 2, 7, 8, 9, 33, 64, 500, 1024, 4096):
        for num_sms in (1, 46, 132):
            tile = choose_group_tile(M, N, K, arch_, num_sms, gated)
            (x, y), (*_, groups, k_iters, row_blocks, up_offset) = launch_sizes(tile, M, N, K, gated)
            assert (tile.scheme == "dp4a") == (arch_ < MIN_ARCH)
            assert x * tile.tokens >= M > (x - 1) * tile.tokens
            each = tile.rows // 16 // (2 if gated else 1)
            assert y * each >= row_blocks > (y - 1) * each
            assert row_blocks * 16 * (2 if gated else 1) >= N and up_offset == (row_blocks if gated else 0)
            assert groups == num_groups(K) and k_iters * tile.k_warps >= groups > (k_iters - 1) * tile.k_warps
            shared = spec(arch_, tile, "gated" if gated else "store").shared
            # What a CTA can have; all resident ones together on sm_90.
            assert shared <= (64 if arch_ == 75 else 227 if arch_ == 90 else 99) * 1024
            assert arch_ != 90 or tile.ctas_per_sm * (shared + 1024) <= 228 * 1024


def test_tiles_that_cannot_be_are_refused() -> None:
    for tile, epilogue in ((Tile(8, 3, 1, 2, 2, 2), "gated"), (Tile(12, 2, 1, 2, 2, 2), "store"),
                           (Tile(8, 2, 1, 2, 2, 1), "store")):  # fmt: skip
        with pytest.raises(ValueError, match="no GEMM with group scales is made of"):
            spec(90, tile, epilogue)
    for tile in (WGMMA._replace(tokens=24), WGMMA._replace(tokens=160), WGMMA._replace(stages=1),
                 WGMMA._replace(k_warps=3), WGMMA._replace(row_warps=6), WGMMA._replace(reg_stages=1),
                 WGMMA_PAIR._replace(tokens=16, k_warps=2)):  # fmt: skip
        with pytest.raises(ValueError, match="no wgmma GEMM with group scales is made of"):
            spec(90, tile, "gated")


@needs_gpu
@pytest.mark.parametrize("M", [1, 8, 13, 32, 64, 100, 300])
@pytest.mark.parametrize(
    ("N", "K", "gated"), [(4096, 4096, True), (2048, 12288, False), (1152, 384, False), (33, 100, False)]
)
def test_gemm_groups_on_gpu(N: int, K: int, gated: bool, M: int) -> None:
    check_gemm_groups(M, N, K, "gated" if gated else "residual", "relu2", True, M, max(1, M - 3))


@needs_gpu
@settings(max_examples=25)
@given(
    M=st.integers(1, 400),
    N=st.integers(1, 1000),
    K=st.integers(1, 3000),
    kind=KINDS,
    bias=st.booleans(),
    built_for=st.sampled_from([0, 0, 80, 75, 61]),
    short=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_on_gpu(
    M: int, N: int, K: int, kind: tuple[str, str], bias: bool, built_for: int, short: int, seed: int
) -> None:
    if kind[0] == "gated":
        N = -(-N // 32) * 32
    tile = choose_group_tile(M, N, K, built_for or arch(), 132, kind[0] == "gated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose_group_tile", lambda *_: tile)
        patch.setattr(module, "spec", lambda _, *others: spec(built_for or arch(), *others))
        check_gemm_groups(M, N, K, *kind, bias, seed, max(1, M - short))


@pytest.mark.parametrize("name", ["words", "scales", "bias", "q", "steps", "count", "out"])
def test_launcher_refuses_each_operand(name: str) -> None:
    """One element too few, and a dtype that no kernel takes."""
    device, M, N, K = DryRunDevice(90, 132), 37, 3840, 2560
    linear = GroupedLinear(
        device.empty(packed_words(N, K), np.int32), device.empty(packed_scales(N, K), np.float16), (N,), K,
        device.empty(N, np.float32),
    )  # fmt: skip
    x = GroupedActivations.empty(device, M, K)
    arrays: dict[str, Any] = {"count": device.empty(1, np.int32), "out": device.empty(M * N, np.float32)}
    gemm_groups(device, linear, x, arrays["count"], arrays["out"], M)
    right = {**vars(linear), **vars(x), **arrays}[name]
    for array, problem in (
        (device.empty(right.size - 1, right.dtype), f"holds {right.size - 1} elements"),
        (device.empty(right.size, np.float64), "must be .*, not float64"),
    ):
        linear_, x_ = (replace(v, **{name: array}) if name in vars(v) else v for v in (linear, x))
        given = {**arrays, name: array}
        with pytest.raises(ValueError, match=f"gemm_groups: {name} {problem}"):
            gemm_groups(device, linear_, x_, given["count"], given["out"], M)
    with pytest.raises(ValueError, match="needs at least one token, not 0"):
        gemm_groups(device, linear, x, arrays["count"], arrays["out"], 0)
    with pytest.raises(ValueError, match="no epilogue 'acc', only store, residual, gated"):
        gemm_groups(device, linear, x, arrays["count"], arrays["out"], M, epilogue="acc")
    with pytest.raises(ValueError, match=r"gemm_groups: \(3840,\) are no gate and up rows"):
        gemm_groups(device, linear, x, arrays["count"], arrays["out"], M, epilogue="gated")
