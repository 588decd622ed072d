"""The CUDA backend behind the engine's interface (see `bitnet_numba.backend`): weights, contexts, captured steps."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.checkpoint import PackedCheckpoint
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels import sampler
from bitnet_numba.kernels.attention import LONG_CONTEXT
from bitnet_numba.kernels.batch import MOST_SEQUENCES, CudaBatch, fixed_bytes
from bitnet_numba.kernels.decode import Activations, Step
from bitnet_numba.kernels.device import Graph, PinnedArray, Stream, Uploads, usable_device
from bitnet_numba.kernels.first_start import load_forms
from bitnet_numba.kernels.kv_cache import PAGE
from bitnet_numba.kernels.rows import MOST_ROWS, Model, Prompts, RowActivations, RowHead
from bitnet_numba.kernels.sequences import Sequences, page_bytes, pages_of
from bitnet_numba.kernels.weights import Weights, why_unsupported
from bitnet_numba.sampling import SamplingParams

RING = 64  # tokens that the host may be behind
STEPS_AHEAD = 2  # steps in flight while the host deals with a token
MOST_SCORED = 128  # tokens whose logits are computed at a time
RESERVE = 64 << 20  # bytes of device memory left to the driver: graphs, kernels
BATCH_RESERVE = 4 * RESERVE  # a batch may come to have dozens of graphs


def why_unusable() -> str | None:
    """Why CUDA cannot be used here, in a few words; None if it can."""
    try:
        usable_device()
    except BackendError as error:
        return str(error)
    return None


class CudaBackend:
    """A model on one NVIDIA GPU."""

    name = "cuda"

    def __init__(self, checkpoint: PackedCheckpoint):
        """Compiles what is not cached, with a progress line, and uploads the weights. Raises BackendError."""
        reason = why_unsupported(checkpoint)
        if reason is not None:
            raise BackendError(f"CUDA cannot run this model: {reason}")
        self.device = usable_device()
        self.device.activate()
        self.config = checkpoint.config
        int8_rows = checkpoint.head == "int8"
        load_forms(self.config, int8_rows, self.device)
        self.stream = Stream()
        self.flow = Activations(self.config, self.device)
        rows = RowActivations(self.config, self.device, MOST_ROWS)
        free, _ = self.device.memory_info()
        self.weights = Weights(checkpoint, self.stream, free - RESERVE)
        self.model = Model(self.config, self.weights, self.device, self.stream, Uploads(self.stream), rows)
        self._kv_cache = 0

    def new_context(self, capacity: int) -> "CudaContext":
        """An empty context for up to `capacity` tokens. Raises BackendError when memory does not suffice."""
        self.device.activate()
        needed = pages_of(capacity) * page_bytes(self.config)
        free, _ = self.device.memory_info()
        if needed > free - RESERVE:
            fits = max(0, (free - RESERVE) // page_bytes(self.config) * PAGE)
            raise BackendError(
                f"a context of {capacity} tokens takes {needed / 1e9:.2f} GB of device memory and {free / 1e9:.2f} GB "
                f"are free: --context {fits} would fit"
            )
        self._kv_cache += needed
        return CudaContext(self, capacity)

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> CudaBatch:
        """Room for sequences that decode together. Raises BackendError when memory does not suffice."""
        if max_sequences > MOST_SEQUENCES:
            raise BackendError(f"at most {MOST_SEQUENCES} sequences decode together on CUDA, not {max_sequences}")
        self.device.activate()
        free, _ = self.device.memory_info()
        free -= BATCH_RESERVE + fixed_bytes(self.config, max_sequences, capacity)
        fit, least = max(0, free // page_bytes(self.config)), pages_of(capacity)
        pages = max(least, min(max_sequences * least, fit)) if tokens is None else pages_of(tokens)
        if pages > fit:
            needed = pages * page_bytes(self.config) / 1e9
            raise BackendError(
                f"a batch of {pages * PAGE} tokens takes {needed:.2f} GB of device memory and "
                f"{max(0, free) / 1e9:.2f} GB are free: {fit * PAGE} tokens would fit"
            )
        int8_rows = self.weights["embed.weight"].dtype == np.int8
        load_forms(self.config, int8_rows, self.device, max_sequences)
        self._kv_cache += pages * page_bytes(self.config)
        return CudaBatch(self.model, max_sequences, capacity, pages, self.release)

    def memory(self) -> dict[str, int]:
        """Bytes of device memory in use by purpose."""
        activations = self.flow.nbytes() + self.model.flow.nbytes()
        return {"weights": self.weights.nbytes, "kv_cache": self._kv_cache, "activations": activations}

    def release(self, pages: int) -> None:
        """The memory of so many pages has been freed."""
        self._kv_cache -= pages * page_bytes(self.config)


class CudaContext:
    """One sequence. Passes of its prompts and its steps are captured when they are first needed, and replayed."""

    def __init__(self, backend: CudaBackend, capacity: int):
        self.capacity = capacity
        self.ids: list[int] = []
        self._backend, self._stream = backend, backend.stream
        self._state = Sequences(backend.config, capacity)
        self._ring = PinnedArray(RING, np.int64)
        self._step = Step(backend.config, backend.weights, backend.flow, self._state, self._ring, backend.device)
        self._prompts = Prompts(backend.model, self._state, backend.flow.h)
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
            head = RowHead(self._backend.model, min(len(ids), MOST_SCORED))
            for start in range(0, len(ids), MOST_SCORED):
                part = result[start : start + MOST_SCORED]
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
        self._state.settings.write(sampler.settings(params))
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
