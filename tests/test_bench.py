"""The benchmark's ladder from a plain loop to the GEMV, as far as a dry run goes: what is launched, and the table."""

from typing import Any

import numpy as np
import pytest

from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.memory import DeviceView
from bitnet_numba.packing import BLOCK_ROWS, packed_words
from tools.benchmarks import kernels
from tools.benchmarks.table import ladder_table

COPIES, US = 3, 2.5


class FakeStream:
    handle = 0

    def synchronize(self) -> None:
        pass


def test_ladder_launches_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step covers every row of every matrix, each launch with another matrix; the table has a line for each."""
    device = DryRunDevice(90, 132)
    device.l2_bytes = 0  # type: ignore[attr-defined]
    simple: list[tuple[Any, ...]] = []

    def numba_launches(device: Any, kernel: Any, blocks: int, threads: int, *matrix: Any) -> list[Any]:
        simple.append((kernel, blocks, threads, *matrix[1:3]))
        return [lambda handle: None] * matrix[-1]

    monkeypatch.setattr(kernels, "numba_launches", numba_launches)
    monkeypatch.setattr(kernels, "graph_us", lambda stream, launches: US * len(launches))
    monkeypatch.setattr(kernels, "cold_copies", lambda nbytes, l2_bytes: COPIES)
    monkeypatch.setattr(kernels, "random_words", lambda count: np.broadcast_to(np.int32(0), count))
    rungs = kernels.measure_ladder(device, FakeStream())  # type: ignore[arg-type]

    assert [(rung["N"], rung["K"]) for rung in rungs] == kernels.SHAPES_2B4T
    for kernel, blocks, threads, N, _ in simple:
        assert blocks * (BLOCK_ROWS if kernel is kernels.four_rows_at_a_time else threads) >= N
    steps = [name for name, *_ in kernels.LADDER] + [kernels.FAST, kernels.FAST_PDL]
    assert all(rung["us"] == dict.fromkeys(steps, US) for rung in rungs)
    lines = [line for line in ladder_table({"ladder": rungs, "bandwidth_GB/s": 4000.0}) if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {step}" for step in [*steps, "only reading the weights"]
    ]
    assert lines[2].endswith(" | 2.50 (1769) |")  # 2560 x 6912: 4.4 MB in 2.5 us
    assert ladder_table({"products": []}) == []  # figures of earlier versions


def test_ladder_gives_each_launch_of_the_gemv_another_matrix() -> None:
    N, K = 48, 64
    nbytes = 4 * packed_words(N, K)
    launches = kernels.gemv_launches(
        DryRunDevice(90, 132), DeviceView(4096, COPIES * nbytes // 4, np.int32), N, K, COPIES, use_pdl=False
    )
    assert [launch.arguments[0].address for launch in launches] == [4096 + i * nbytes for i in range(COPIES)]
