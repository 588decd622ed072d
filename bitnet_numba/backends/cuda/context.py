"""TODO docstring."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.cuda.decode import Step
from bitnet_numba.backends.cuda.forward import LMHead, Prefill
from bitnet_numba.backends.cuda.state import SequenceState, pages_of
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.decode import LONG_CONTEXT
from bitnet_numba.kernels.runtime.driver import Graph
from bitnet_numba.kernels.runtime.memory import PinnedArray
from bitnet_numba.kernels.sampling import parts
from bitnet_numba.sampling import SamplingParams

if TYPE_CHECKING:
    from bitnet_numba.backends.cuda.backend import CudaBackend

RING = 64  # tokens that the host may be behind
STEPS_AHEAD = 2  # steps in flight while the host deals with a token
MAX_SCORED = 128  # tokens whose logits are computed at a time


class CudaContext:
    """One sequence. Passes of its prompts and its steps are captured when they are first needed, and replayed."""

    def __init__(self, backend: "CudaBackend", capacity: int):
        self.capacity = capacity
        self.ids: list[int] = []
        self._backend, self._stream = backend, backend.stream
        self._state = SequenceState(backend.config, capacity)
        self._ring = PinnedArray(RING, np.int64)
        self._step = Step(backend.config, backend.weights, backend.flow, self._state, self._ring, backend.device)
        self._prompts = Prefill(backend.model, self._state, backend.flow.h)
        self._graphs: dict[tuple[str, bool], Graph] = {}

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot cut a context of {len(self.ids)} tokens to {length}")
        self._backend.device.activate()
        if length < len(self.ids):
            del self.ids[length:]
            # Bits of the tokens that stay: a token that was cut may have been there before as well.
            self._state.seen.write(self._state.seen_bits(self.ids))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits at each of them, float32 [T, vocab]."""
        self._start(ids)
        result = np.empty((len(ids), self._backend.config.vocab_size), np.float32)
        if len(ids) == 1:
            self._replay("score", len(self.ids))
            self._stream.synchronize()
            self._backend.flow.logits.read_into(result)
        else:
            head = LMHead(self._backend.model, min(len(ids), MAX_SCORED))
            for start in range(0, len(ids), MAX_SCORED):
                part = result[start : start + MAX_SCORED]
                self._prompts.feed(0, len(part))
                for launch in head.launches(len(part)):
                    launch(self._stream.handle)
                self._stream.synchronize()
                head.logits.read_into(part)
            head.close()
        self.ids += ids
        return result

    def decode(self, ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Appends tokens (at least one), then yields sampled tokens, one a step, until the context is full."""
        self._start(ids)
        self._state.settings.write(parts.pack_settings(params))
        if len(ids) == 1:
            self._replay("decode", len(self.ids))
        else:
            self._prompts.feed(0, len(ids), keep_last=True)
            self._replay("choose", len(self.ids))
        self.ids += ids
        known = launched = len(self.ids)  # tokens fed for certain; positions whose step is under way or done
        try:
            while True:
                # The steps after this one are queued before its token is read: the device never waits for the host.
                while launched < min(self.capacity, known + STEPS_AHEAD):
                    self._replay("decode", launched)
                    launched += 1
                token = self._token(known)
                yield token
                if known == self.capacity:
                    return
                self.ids.append(token)
                known += 1
        finally:
            self._backend.device.activate()
            self._stream.synchronize()
            # What was fed ahead stays in the cache until it is cut or overwritten.
            for position in range(known, launched):
                self.ids.append(self._token(position))

    def close(self) -> None:
        """Frees the cache and the captured steps."""
        self._backend.device.activate()
        self._stream.synchronize()
        for graph in self._graphs.values():
            graph.close()
        self._prompts.close()
        self._state.close()
        self._ring.close()
        self._backend.release(pages_of(self.capacity))

    def _start(self, ids: Sequence[int]) -> None:
        """Stores tokens where the steps read them, and the position of the first."""
        if not 1 <= len(ids) <= self.capacity - len(self.ids):
            raise ValueError(f"{len(ids)} tokens do not fit {self.capacity - len(self.ids)} free places")
        self._backend.device.activate()
        self._state.tokens.write(np.asarray(ids, np.int32), len(self.ids))
        self._ring.host[:] = -1  # an earlier answer's entries may be for the same positions
        self._state.position.write(np.array([len(self.ids)], np.int32))

    def _replay(self, kind: str, position: int) -> None:
        """Enqueues the step of a kind (a method of Step) that feeds the token at a position."""
        key = kind, position >= LONG_CONTEXT
        if key not in self._graphs:
            self._graphs[key] = self._stream.capture(getattr(self._step, kind)(key[1]))
        self._graphs[key].replay(self._stream)

    def _token(self, position: int) -> int:
        """The token chosen for a position, once the device has written it to the ring."""
        ring, place = self._ring.host, position % RING
        while True:
            entry = int(ring[place])
            if entry >> 32 == position:
                break
            if self._stream.idle() and int(ring[place]) >> 32 != position:
                raise BackendError("a decode step ended without a token")
        token = entry & 0xFFFFFFFF
        if token >> 31:
            raise ValueError("logits hold NaN")
        return token
