"""Masks reach the device in the order of their rows, whoever asks for them. No device is needed."""

import threading
import time

import numpy as np
import pytest

from bitnet_numba.backends.cuda import masks as masks_module
from bitnet_numba.backends.cuda.masks import MIN_SHARED, Masks
from bitnet_numba.errors import RequestError
from bitnet_numba.kernels.runtime import driver
from bitnet_numba.kernels.runtime import memory as memory_module
from tests.backends.simulated import HostMemory, SimulatedDevice

VOCAB = 100  # not a multiple of 32


class Form:
    """Allows one token; notes which thread asks, and fails if another one asks for its group meanwhile."""

    busy: set[int] = set()
    asked_by = 0

    def __init__(self, token: int, group: int, error: str = ""):
        self.token, self.group, self.error = token, group, error

    def allowed(self, out: np.ndarray) -> None:
        assert self.group not in self.busy
        self.busy.add(self.group)
        self.asked_by = threading.get_ident()
        time.sleep(0.0005)
        self.busy.discard(self.group)
        if self.error:
            raise RequestError(self.error)
        out[:] = 0
        out[self.token // 32] = 1 << self.token % 32

    def accept(self, token: int) -> bool:
        return True


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("count", [1, MIN_SHARED, MIN_SHARED + 12])
def test_masks_of_rows(monkeypatch: pytest.MonkeyPatch, count: int, slow: bool) -> None:
    """Threads share them once some have taken long, but for few."""
    monkeypatch.setattr(masks_module, "LONG", 0.0 if slow else 1e9)
    monkeypatch.setattr(masks_module, "SLOW", 0.0)
    memory = HostMemory()
    for module in (driver, memory_module):
        monkeypatch.setattr(module, "driver_call", memory.call)
    masks, stream = Masks(SimulatedDevice(memory), 40, VOCAB), driver.Stream()
    rng = np.random.default_rng(count)
    for _ in range(3):  # more often than there are buffers
        forms = [Form(int(rng.integers(VOCAB)), i % 3, "too complex" if i == 5 else "") for i in range(count)]
        rows: list[Form | None] = [None] * 40
        places = rng.choice(40, count, replace=False).tolist()
        for place, form in zip(places, forms, strict=True):
            rows[place] = form
        failures = {row: str(error) for row, error in masks.upload(stream, rows).items()}
        assert failures == {places[i]: form.error for i, form in enumerate(forms) if form.error}
        ids = memory.array(masks.mask_ids.address, np.int32)
        bits = np.unpackbits(memory.array(masks.masks.address, np.uint8), bitorder="little").reshape(-1, 128)
        for place, form in zip(places, forms, strict=True):
            if not form.error:
                assert np.flatnonzero(bits[ids[place]]).tolist() == [form.token]
        first, *later = [form for form in rows if form is not None]
        assert first.asked_by == threading.get_ident()
        for form in later:
            assert (form.asked_by != threading.get_ident()) == (slow and count > MIN_SHARED)
        others = [{form.asked_by for form in later if form.group == group} for group in range(3)]
        assert all(len(each) <= 1 for each in others), "a group is one thread's"
    masks.close()
    assert len(memory.blocks) == 0
