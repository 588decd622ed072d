"""Launches fit the cards in CARDS, which no test here can run on, and leave no part of them idle."""

from functools import cache
from typing import Any

import pytest

from bitnet_numba.backends.cuda import warmup
from bitnet_numba.backends.cuda.weights import RowFormats
from bitnet_numba.config import GROUPS
from bitnet_numba.kernels.attention import paged_decode
from bitnet_numba.kernels.linear.heuristics import choose_group_tile, choose_tile
from bitnet_numba.kernels.lm_head import gemm_mma
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.spec import KernelSpec, sm_memory
from tests.kernels.cards import CARDS, MODELS, SMS, STATIC_BYTES, launches, model_config, static_bytes
from tests.kernels.harness import needs_gpu

NEWER = {103: 100, 110: 100, 121: 120, 130: 120}  # architectures without a card here or anywhere: whose SMs they have


@cache
def misfit(spec: KernelSpec, arch: int) -> str | None:
    """What of a kernel an SM has not got; None if it fits."""
    sm, static = SMS[arch], static_bytes(spec)
    shared, blocks = static + spec.dynamic_shared, 1 if spec.one_per_sm else spec.blocks_per_sm
    if static > STATIC_BYTES or shared > 1024 * sm.block_shared:
        return f"{static} + {spec.dynamic_shared} bytes of shared memory"
    if blocks * (shared + sm.reserved) > 1024 * sm.shared:
        return f"{blocks} blocks of {shared} bytes of shared memory"
    if blocks > sm.blocks or blocks * spec.threads > sm.threads:
        return f"{blocks} blocks of {spec.threads} threads"
    return "clusters" if spec.cluster > 1 and arch < 90 else None


@pytest.mark.parametrize("name", CARDS)
def test_launches_fit_the_card(name: str) -> None:
    card = CARDS[name]
    for model in MODELS:
        for spec, (x, y) in launches(model, card.arch, card.num_sms):
            what = f"{model}: {spec.name}, grid {x} x {y}"
            if (reason := misfit(spec, card.arch)) is not None:
                raise AssertionError(f"{what}: {reason}")
            assert 1 <= x < 1 << 31 and 1 <= y < 1 << 16, what
            assert "wgmma" not in spec.name or card.arch == 90, what
            if spec.name.startswith("sample["):  # its blocks wait for each other: one an SM is always resident
                assert x <= card.num_sms, what


@pytest.mark.parametrize("name", CARDS)
def test_products_leave_no_sms_idle(name: str) -> None:
    """A vector meets a block on every SM, or as many as there are row-blocks. Of matrices there are at least half as
    many CTAs as SMs, or as squares of 64 rows and tokens: an H200 had no use for more."""
    card = CARDS[name]
    for model in MODELS:
        config = model_config(model)
        choose = choose_group_tile if config.group_scales else choose_tile
        for group in GROUPS:
            segments, K = config.group_shape(group)
            N, gated = sum(segments), group == "gate_up"
            for M in (1 << i for i in range(1, 12)):
                tile = choose(M, N, K, card.arch, card.num_sms, gated)
                ctas = -(-M // tile.tokens) * -(-N // tile.rows) * tile.cluster
                wanted = min(card.num_sms, -(-M // 64) * -(-N // 64))
                assert 2 * ctas >= wanted, f"{model}, {group}, {M} tokens: {ctas} CTAs of {tile}"
        vectors = [(spec, grid) for spec, grid in launches(model, card.arch, card.num_sms) if "gemv" in spec.name]
        least = min(sum(config.group_shape(group)[0]) // 32 for group in GROUPS)
        assert vectors and all(x >= min(card.num_sms, least) for _, (x, _) in vectors)


@pytest.mark.parametrize("arch", NEWER)
def test_architectures_that_nobody_knows_yet_get_kernels_that_later_cards_run(arch: int) -> None:
    for model in MODELS:
        for spec, _ in launches(model, arch, 100):
            assert "wgmma" not in spec.name and spec.cluster == 1, f"{model}: {spec.name}"
            assert misfit(spec, NEWER[arch]) is None, f"{model}: {spec.name}: {misfit(spec, NEWER[arch])}"


@pytest.mark.parametrize("model", ["2b-4t", "falcon3-7b", "bonsai-1.7b"])
def test_a_launch_that_is_made_again_has_the_same_spec(model: str) -> None:
    """Launching finds a kernel by its spec's identity and keeps the spec: new ones would never be freed."""
    made: list[KernelSpec] = []

    class Device(DryRunDevice):
        def launch(self, spec: KernelSpec, grid: Any, arguments: Any, use_pdl: bool = True) -> Launch:
            made.append(spec)
            return super().launch(spec, grid, arguments, use_pdl)

    needs = warmup.Needs(model_config(model), RowFormats(MODELS[model], MODELS[model]), CARDS["H200"], 64, both=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "DryRunDevice", Device)
        needs.specs()
        known = set(map(id, made))
        needs.specs()
    assert len(known) > 30 and [spec.name for spec in made if id(spec) not in known] == []


def test_memory_of_an_sm_is_that_of_the_guide() -> None:
    assert {arch: sm_memory(arch).shared for arch in SMS} == {arch: 1024 * sm.shared for arch, sm in SMS.items()}
    assert sm_memory(130) == sm_memory(86)


@needs_gpu
def test_memory_of_an_sm_is_that_of_the_card() -> None:
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import driver_call, enum_member

    attribute = enum_member("CUdevice_attribute", "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
    device = driver_call("cuDeviceGet", 0)
    assert sm_memory(usable_device().arch).shared <= driver_call("cuDeviceGetAttribute", attribute, device)


# What was measured on an H200 stays what it is there, whatever other cards get: of 2B4T's qkv, o, gate_up and down, by
# tokens, (tokens, row_warps, k_warps, stages, ctas_per_sm, cluster) of each tile.
H200_TILES = {
    8: [(8, 4, 4, 5, 1, 1), (8, 4, 4, 5, 1, 1), (8, 4, 2, 10, 2, 1), (8, 4, 4, 7, 1, 2)],
    16: [(16, 4, 4, 5, 1, 1), (16, 4, 4, 5, 1, 1), (16, 4, 2, 10, 2, 1), (16, 4, 4, 7, 1, 2)],
    32: [(32, 4, 2, 10, 1, 1), (16, 4, 4, 5, 1, 1), (32, 8, 2, 10, 1, 1), (32, 4, 4, 7, 1, 2)],
    64: [(32, 4, 2, 10, 1, 1), (32, 4, 2, 10, 1, 1), (64, 8, 2, 4, 1, 1), (64, 4, 4, 3, 1, 2)],
    128: [(64, 4, 2, 6, 1, 1), (64, 4, 2, 6, 1, 1), (128, 8, 1, 6, 1, 1), (64, 4, 4, 5, 1, 1)],
    256: [(128, 4, 2, 5, 1, 1), (96, 4, 2, 6, 1, 1), (256, 8, 1, 5, 1, 1), (128, 4, 2, 5, 1, 1)],
    416: [(128, 8, 1, 6, 1, 1), (144, 4, 2, 5, 1, 1), (208, 8, 1, 5, 1, 1), (144, 4, 2, 5, 1, 1)],
    512: [(128, 8, 1, 6, 1, 1), (192, 4, 2, 4, 1, 1), (256, 8, 1, 5, 1, 1), (192, 4, 2, 4, 1, 1)],
    1024: [(256, 8, 1, 5, 1, 1), (176, 8, 1, 6, 1, 1), (96, 8, 1, 6, 2, 1), (176, 8, 1, 6, 1, 1)],
    2048: [(256, 8, 1, 5, 1, 1), (160, 8, 1, 6, 1, 1), (256, 8, 1, 5, 1, 1), (160, 8, 1, 6, 1, 1)],
    3072: [(240, 8, 1, 5, 1, 1), (240, 8, 1, 5, 1, 1), (256, 8, 1, 5, 1, 1), (96, 8, 1, 6, 2, 1)],
}


def test_an_h200_gets_what_was_measured_there() -> None:
    config, card = model_config("2b-4t"), CARDS["H200"]
    shapes = {group: config.group_shape(group) for group in GROUPS}
    for M, expected in H200_TILES.items():
        tiles = [
            choose_tile(M, sum(segments), K, card.arch, card.num_sms, group == "gate_up")
            for group, (segments, K) in shapes.items()
        ]
        assert [(t.tokens, t.row_warps, t.k_warps, t.stages, t.ctas_per_sm, t.cluster) for t in tiles] == expected
    sizes = {blocks: paged_decode.threads_for(90, 128, blocks, 132) for blocks in (132, 133, 264, 265, 396, 397, 5000)}
    assert sizes == {132: 512, 133: 256, 264: 256, 265: 128, 396: 128, 397: 64, 5000: 64}
    # x of 16 tokens of 2B4T stays in L1 there; 25 % are the 64 KB that the head's buffers take.
    head = gemm_mma.spec(90, 2560, "int8", 1)
    assert (head.threads, head.carveout) == (512, 25) and static_bytes(head) < 1024


def test_smaller_sms_get_less_at_a_time() -> None:
    """Of batched attention's blocks two fit the shared memory, whatever their threads: the larger, then. The LM head's
    x of 16 tokens does not fit L1."""
    sizes = {blocks: paged_decode.threads_for(89, 128, blocks, 128) for blocks in (128, 129, 256, 5000)}
    assert sizes == {128: 512, 129: 256, 256: 256, 5000: 256}
    assert paged_decode.threads_for(89, 64, 5000, 128) == 64
    for arch in (80, 89, 120):
        head = gemm_mma.spec(arch, 2560, "int8", 1)
        assert 64 * 1024 <= head.carveout * sm_memory(arch).l1 / 100 and 32 * 1024 < static_bytes(head) <= STATIC_BYTES


def test_shared_memory_of_batched_attention_is_what_the_launcher_counts_on() -> None:
    for head_dim, group in ((128, 4), (100, 1), (64, 4), (8, 5)):
        declared = static_bytes(paged_decode.paged_decode_spec(90, head_dim, group, 64))
        assert declared <= paged_decode.shared_bytes(head_dim) <= declared + 1024
