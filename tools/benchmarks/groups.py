"""What `tools/bench.py groups` measures: products with group scales beside those with one scale, at Bonsai's sizes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bitnet_numba.kernels.linear.gemm import gemm
from bitnet_numba.kernels.linear.gemm_groups import gemm_groups
from bitnet_numba.kernels.linear.gemv import gemv
from bitnet_numba.kernels.linear.gemv_groups import gemv_groups
from bitnet_numba.kernels.linear.operands import GroupedActivations, GroupedLinear, PackedLinear, QuantizedActivations
from bitnet_numba.kernels.operands import Norm
from bitnet_numba.kernels.runtime.device import Device, usable_device
from bitnet_numba.kernels.runtime.driver import Stream
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceView
from bitnet_numba.packing import packed_scales, packed_words
from tools.benchmarks.inputs import random_words
from tools.benchmarks.timing import cold_copies, graph_us

SHAPES = [  # N, K and epilogue: qkv, o, gate and up, down of Bonsai 8B and of 1.7B
    (6144, 4096, "store"), (4096, 4096, "residual"), (24576, 4096, "gated"), (4096, 12288, "residual"),
    (4096, 2048, "store"), (2048, 2048, "residual"), (12288, 2048, "gated"), (2048, 6144, "residual"),
]  # fmt: skip
TOKENS = (1, 8, 32, 128, 512, 2048)
L2_BYTES = 50 << 20  # of an H200, for dry runs


class Case(NamedTuple):
    """A product's launches, each with another matrix: with one scale, and with group scales."""

    N: int
    K: int
    M: int
    one: list[Launch]
    groups: list[Launch]


def cases(device: Device, l2_bytes: int = L2_BYTES) -> Iterator[Case]:
    """Every product of SHAPES and TOKENS. Its arrays live until the next shape's."""
    words = random_words(max(packed_words(N, K) for N, K, _ in SHAPES))
    for N, K, epilogue in SHAPES:
        size, scales_size = packed_words(N, K), packed_scales(N, K)
        copies = cold_copies(4 * size, l2_bytes)
        all_words, all_scales = device.empty(size * copies, np.int32), device.empty(scales_size * copies, np.float16)
        scale, scales = device.array(np.full(2, 0.02, np.float32)), np.full(scales_size, 0.02, np.float16)
        segments = (N // 2, N // 2) if epilogue == "gated" else (N,)
        one, groups = [], []
        for i in range(copies):
            own = DeviceView(all_words.address + 4 * i * size, size, np.int32)
            own_scales = DeviceView(all_scales.address + 2 * i * scales_size, scales_size, np.float16)
            if all_words.address:  # not in a dry run
                own.write(words[:size])
                own_scales.write(scales)
            one.append(PackedLinear(own, scale, segments, K))
            groups.append(GroupedLinear(own, own_scales, segments, K))
        norm = Norm(device.array(np.ones(K, np.float32)), 1e-5) if epilogue != "residual" else None
        most = max(TOKENS)
        x, out = (
            device.array(np.random.default_rng(3).standard_normal(K, np.float32)),
            device.zeros(most * N, "float32"),
        )
        q, grouped = QuantizedActivations.empty(device, most, K), GroupedActivations.empty(device, most, K)
        kind = {"epilogue": epilogue, "activation": "silu"}
        for M in TOKENS:
            if M == 1:
                yield Case(
                    N, K, M,
                    [gemv(device, linear, x, out, norm=norm, **kind) for linear in one],  # type: ignore[arg-type]
                    [gemv_groups(device, linear, x, out, norm=norm, **kind) for linear in groups],  # type: ignore[arg-type]
                )  # fmt: skip
                continue
            count = device.array(np.array([M], np.int32))
            yield Case(
                N, K, M,
                [gemm(device, linear, q, count, out, M, **kind) for linear in one],  # type: ignore[arg-type]
                [gemm_groups(device, linear, grouped, count, out, M, **kind) for linear in groups],  # type: ignore[arg-type]
            )  # fmt: skip


def measure_groups() -> list[dict[str, Any]]:
    """Microseconds of each product, cold L2, in a graph where each starts while the one before still runs."""
    device, stream = usable_device(), Stream()
    return [
        {
            "N": case.N,
            "K": case.K,
            "M": case.M,
            "one_us": graph_us(stream, case.one) / len(case.one),
            "groups_us": graph_us(stream, case.groups) / len(case.groups),
        }
        for case in cases(device, device.l2_bytes)
    ]
