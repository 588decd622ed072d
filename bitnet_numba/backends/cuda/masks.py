"""Masks of the tokens that may come next in answers of a given form: asked for on the host, read by `edit_logits`.

    device   forward pass of step n     | edits, sampler | forward pass of step n + 1 | edits, ...
    host      token n - 1, its masks ──> upload ─┘        token n, its masks ──> upload ─┘

The forward pass needs only the token, which is on the device; so a step with masks is two graphs, and the host looks at
the token before, and asks for the masks, while the first of them runs.
"""

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bitnet_numba.backends.protocol import Constraint
from bitnet_numba.errors import RequestError
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.driver import Event, Stream
from bitnet_numba.kernels.runtime.memory import PinnedArray

MAX_WORKERS = 8  # threads that ask for a step's masks
MIN_SHARED = 8  # of them: most take 20 us, some a millisecond; fewer are left to one thread
BUFFERS = 2  # of page-locked memory: one is filled while the other may still be read


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_WORKERS, "bitnet-numba-masks")


class Masks:
    """A step's masks on the device, and where they come from."""

    def __init__(self, device: Device, rows: int, vocab_size: int):
        """rows: most at a time."""
        self._rows, self._words = rows, -(-vocab_size // 32)
        self.masks = device.zeros(rows * self._words, np.int32)
        self.mask_ids = device.zeros(rows, np.int32)  # which of them each row has
        self._buffers: list[tuple[PinnedArray, Event]] = []
        self._next = 0

    def upload(self, stream: Stream, constraints: Sequence[Constraint | None]) -> dict[int, str]:
        """Enqueues the masks of a step's rows; returns the rows whose constraints cannot be followed, with the
        reasons."""
        if not self._buffers:
            size = self._rows * (self._words + 1)
            self._buffers = [(PinnedArray(size, np.uint32), Event(timing=False)) for _ in range(BUFFERS)]
        buffer, read = self._buffers[self._next]
        self._next = (self._next + 1) % BUFFERS
        read.wait()
        masks = buffer.host[self._rows :].reshape(self._rows, self._words)
        wanted = [(row, constraint) for row, constraint in enumerate(constraints) if constraint is not None]
        groups: dict[int, list[int]] = {}
        buffer.host[: len(constraints)] = 0
        for i, (row, constraint) in enumerate(wanted):
            buffer.host[row] = i
            groups.setdefault(constraint.group, []).append(i)

        def fill(places: Iterable[int]) -> dict[int, str]:
            failures: dict[int, str] = {}
            for i in places:
                row, constraint = wanted[i]
                try:
                    constraint.allowed(masks[i])
                except RequestError as error:
                    failures[row] = str(error)
            return failures

        failures: dict[int, str] = {}
        shares = groups.values() if len(wanted) >= MIN_SHARED else [range(len(wanted))]
        for found in map(fill, shares) if len(shares) == 1 else _pool().map(fill, shares):
            failures |= found
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
