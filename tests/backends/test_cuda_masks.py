"""Masks reach the device in the order of their rows, whoever asks for them. No device is needed."""

import threading
import time

import numpy as np
import pytest

from bitnet_numba.backends.cuda.masks import MIN_SHARED, Masks
from bitnet_numba.errors import RequestError
from bitnet_numba.kernels.runtime import driver
from bitnet_numba.kernels.runtime import memory as memory_module
from tests.backends.test_cuda_simulated import HostMemory, SimulatedDevice

VOCAB = 100  # not a multiple of 32


class Form:
    """Allows one token; notes which thread asks, and fails if another one asks for its group meanwhile."""

    asked: dict[int, set[int]] = {}
    busy: set[int] = set()

    def __init__(self, token: int, group: int, error: str = ""):
        self.token, self.group, self.error = token, group, error

    def allowed(self, out: np.ndarray) -> None:
        assert self.group not in self.busy
        self.busy.add(self.group)
        self.asked.setdefault(self.group, set()).add(threading.get_ident())
        time.sleep(0.002)
        self.busy.discard(self.group)
        if self.error:
            raise RequestError(self.error)
        out[:] = 0
        out[self.token // 32] = 1 << self.token % 32

    def accept(self, token: int) -> bool:
        return True


@pytest.mark.parametrize("count", [1, MIN_SHARED - 1, MIN_SHARED + 12])
def test_masks_of_rows(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    memory = HostMemory()
    for module in (driver, memory_module):
        monkeypatch.setattr(module, "driver_call", memory.call)
    masks, stream = Masks(SimulatedDevice(memory), 40, VOCAB), driver.Stream()
    rng = np.random.default_rng(count)
    for _ in range(3):  # more often than there are buffers
        monkeypatch.setattr(Form, "asked", {})
        forms = [Form(int(rng.integers(VOCAB)), i % 3, "too complex" if i == 5 else "") for i in range(count)]
        rows: list[Form | None] = [None] * 40
        places = rng.choice(40, count, replace=False).tolist()
        for place, form in zip(places, forms, strict=True):
            rows[place] = form
        failures = masks.upload(stream, rows)
        assert failures == {places[i]: form.error for i, form in enumerate(forms) if form.error}
        ids = memory.array(masks.mask_ids.address, np.int32)
        bits = np.unpackbits(memory.array(masks.masks.address, np.uint8), bitorder="little").reshape(-1, 128)
        for place, form in zip(places, forms, strict=True):
            if not form.error:
                assert np.flatnonzero(bits[ids[place]]).tolist() == [form.token]
        threads = set().union(*Form.asked.values())
        own = {threading.get_ident()}
        assert threads == own if count < MIN_SHARED else not threads & own
        assert all(len(each) == 1 for each in Form.asked.values()), "a group is one thread's"
    masks.close()
    assert len(memory.blocks) == 0
