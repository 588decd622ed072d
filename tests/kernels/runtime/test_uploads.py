"""Small uploads and tensor maps in device memory, with a driver that makes copies as late as it may."""

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.runtime import memory, tensor_map
from bitnet_numba.kernels.runtime.memory import DeviceView, Uploads


class LateStream:
    """Copies are made when somebody waits for them."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, int, int]] = []  # target, source, bytes
        self.enqueued = self.done = 0
        self.left: list[int] = []  # copies still to be made, after each wait

    def upload(self, address: int, source: Any, nbytes: int, start: int = 0) -> None:
        self.pending.append((address, source.host.ctypes.data + start, nbytes))
        self.enqueued += 1

    def run_to(self, count: int) -> None:
        for target, source, nbytes in self.pending[self.done : count]:
            ctypes.memmove(target, source, nbytes)
        self.done = max(self.done, count)
        self.left.append(self.enqueued - self.done)


class LateEvent:
    def __init__(self, timing: bool):
        assert not timing

    def record(self, stream: LateStream) -> None:
        self.stream, self.count = stream, stream.enqueued

    def wait(self) -> None:
        if hasattr(self, "stream"):
            self.stream.run_to(self.count)


class FakeDriver:
    """Allocations of host memory, and copies at once."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def __call__(self, name: str, *arguments: Any) -> Any:
        if name in ("cuMemHostAlloc", "cuMemAlloc"):
            self.blocks.append(np.zeros(arguments[0] + 256, np.uint8))
            return self.blocks[-1].ctypes.data + -self.blocks[-1].ctypes.data % 256
        if name == "cuMemHostGetDevicePointer":
            return arguments[0]
        if name == "cuMemcpyHtoD":
            ctypes.memmove(*arguments)
        return 0


@settings(max_examples=50)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_what_is_written_arrives_however_late_copies_are_made(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "driver_call", FakeDriver())
        patch.setattr(memory, "Event", LateEvent)
        stream = LateStream()
        uploads = Uploads(stream, size=128)  # type: ignore[arg-type]
        target = np.zeros(sum(sizes), np.int64)
        array = DeviceView(target.ctypes.data, target.size, np.int64)
        start = 0
        for size in sizes:
            uploads.write(array, np.arange(start, start + size), start)
            start += size
        # At a turn, the copies of the piece just filled need not have been made; it holds at least one of them.
        assert all(left > 0 for left in stream.left)
        stream.run_to(stream.enqueued)
        assert target.tolist() == list(range(target.size))
        with pytest.raises(ValueError, match="136 bytes do not fit a piece of 128"):
            uploads.write(DeviceView(target.ctypes.data, 99, np.int64), np.arange(17))


def test_tensor_maps_share_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(memory, "driver_call", driver)
    monkeypatch.setattr(tensor_map, "_slabs", [])
    monkeypatch.setattr(tensor_map, "_num_maps", 0)
    maps = [tensor_map._store(np.full(16, i, np.uint64)) for i in range(2 * tensor_map.SLAB_MAPS)]
    assert len(driver.blocks) == len(tensor_map._slabs) == 2
    addresses = [stored.address for stored in maps]
    assert len(set(addresses)) == len(maps) and all(address % 128 == 0 for address in addresses)
    words = [np.frombuffer((ctypes.c_byte * 128).from_address(address), np.uint64) for address in addresses]
    assert [set(own.tolist()) for own in words] == [{i} for i in range(len(maps))]
