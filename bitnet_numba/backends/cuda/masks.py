"""Masks of the tokens that may come next in answers of a given form: asked for on the host, read by `edit_logits`.

    device   forward pass of step n     | edits, sampler | forward pass of step n + 1 | edits, ...
    host      token n - 1, its masks ──> upload ─┘        token n, its masks ──> upload ─┘

The forward pass needs only the token, which is on the device; so a step with masks is two graphs, and the host looks at
the token before, and asks for the masks, while the first of them runs.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from bitnet_numba.backends.protocol import Constraint
from bitnet_numba.errors import RequestError
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.driver import Event, Stream
from bitnet_numba.kernels.runtime.memory import PinnedArray

MAX_WORKERS = 8  # threads that ask for a step's masks, if they take long
# Seconds of some masks, and of one of them on average, from which on threads share what is left, if it is not few. Most
# masks take 10 us, for which threads would wait for each other longer; in the middle of a pattern it is a millisecond.
LONG, SLOW, MIN_SHARED = 1e-3, 60e-6, 4
BUFFERS = 2  # of page-locked memory: one is filled while the other may still be read


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_WORKERS, "bitnet-numba-masks")


def _share(work: Callable[[int], None], items: Iterable[tuple[int, int]]) -> None:
    """Does work on items, given with their groups, in threads: each group in one."""
    groups: dict[int, list[int]] = {}
    for group, item in items:
        groups.setdefault(group, []).append(item)

    def work_on(items: Iterable[int]) -> None:
        for item in items:
            work(item)

    list(_pool().map(work_on, groups.values()))


class Masks:
    """A step's masks on the device, and where they come from."""

    def __init__(self, device: Device, rows: int, vocab_size: int):
        """rows: most at a time."""
        self._rows, self._words = rows, -(-vocab_size // 32)
        self.masks = device.zeros(rows * self._words, np.int32)
        self.mask_ids = device.zeros(rows, np.int32)  # which of them each row has
        self._buffers: list[tuple[PinnedArray, Event]] = []
        self._next = 0

    def upload(self, stream: Stream, constraints: Sequence[Constraint | None]) -> dict[int, RequestError]:
        """Enqueues the masks of a step's rows; returns the rows whose constraints cannot be followed, and why."""
        if not self._buffers:
            size = self._rows * (self._words + 1)
            self._buffers = [(PinnedArray(size, np.uint32), Event(timing=False)) for _ in range(BUFFERS)]
        buffer, read = self._buffers[self._next]
        self._next = (self._next + 1) % BUFFERS
        read.wait()
        masks = buffer.host[self._rows :].reshape(self._rows, self._words)
        wanted = [(row, constraint) for row, constraint in enumerate(constraints) if constraint is not None]
        buffer.host[: len(constraints)] = 0
        buffer.host[[row for row, _ in wanted]] = np.arange(len(wanted))
        failures: dict[int, RequestError] = {}

        def ask(i: int) -> None:
            row, constraint = wanted[i]
            try:
                constraint.allowed(masks[i])
            except RequestError as error:
                failures[row] = error

        began = perf_counter()
        for i in range(len(wanted)):
            ask(i)
            if perf_counter() - began > max(LONG, SLOW * (i + 1)) and len(wanted) - 1 - i >= MIN_SHARED:
                _share(ask, [(constraint.group, i) for i, (_, constraint) in enumerate(wanted)][i + 1 :])
                break
        stream.upload(self.mask_ids.address, buffer, 4 * len(constraints))
        if wanted:
            stream.upload(self.masks.address, buffer, 4 * len(wanted) * self._words, 4 * self._rows)
        read.record(stream)
        return failures

    def close(self) -> None:
        """Frees the memory."""
        self.masks.close()
        self.mask_ids.close()
        for buffer, _ in self._buffers:
            buffer.close()
