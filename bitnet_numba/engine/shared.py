"""A backend that threads may share: its calls run one at a time, and memory that runs out is one clear error.

Contexts and batches share their backend's buffers and stream, so the engine makes every call through here. Answers that
are under way at the same time, in one thread or in several, take turns token by token.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import Backend, Batch, CallTimes, Constraint, Context, Embedder
from bitnet_numba.errors import BackendError, BitNetError, one_line
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams

MAX_IDLE = 2  # contexts kept for streams to come: they are expensive to create, but hold memory


class SharedBackend:
    """A backend behind a lock, see `protocol.Backend`. Every call may also raise BackendError for lack of memory."""

    def __init__(self, backend: Backend):
        self.name = backend.name
        self._inner = backend
        # Reentrant: the garbage collector may close a context amid a call of the same thread.
        self._lock = threading.RLock()
        self._loaded_in = self._locked_in = os.getpid()
        self._idle: list[Context] = []  # of streams that have ended
        self._max_idle = MAX_IDLE

    @property
    def left_behind(self) -> bool:
        """Whether this process is a fork of the one that loaded the model, and the backend does not work in it."""
        return os.getpid() != self._loaded_in and self.name not in ("reference", "cpu")

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Keeps other threads out; raises BackendError for MemoryError, and if `left_behind`."""
        if self.left_behind:
            raise BackendError(
                f"this model was loaded before os.fork, and {self.name} does not work in the child process: load the "
                "model there, or start processes by the method spawn"
            )
        if os.getpid() != self._locked_in:  # a thread of the parent may have held the lock when it was copied
            self._lock, self._locked_in = threading.RLock(), os.getpid()
        with self._lock:
            try:
                yield
            except MemoryError as error:
                raise BackendError(
                    f"memory ran out ({one_line(error)}): a smaller context, or fewer tokens at a time, take less"
                ) from None

    def clean_up(self, work: Callable[[], object]) -> None:
        """Runs what frees or forgets something in its turn, or not at all if `left_behind`: that is the parent's."""
        if not self.left_behind:
            with self.turn():
                work()

    def new_context(self, capacity: int) -> "SharedContext":
        """An empty context."""
        with self.turn():
            try:
                context = self._inner.new_context(capacity)
            except (BackendError, MemoryError):
                if not self._idle:
                    raise
                self.free_idle()  # their memory may be what is missing
                context = self._inner.new_context(capacity)
            return SharedContext(self, context)

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> "SharedBatch":
        """An empty batch."""
        with self.turn():
            return SharedBatch(self, self._inner.new_batch(max_sequences, capacity, tokens))

    def last_hidden(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The final hidden states of the last tokens of texts, see `protocol.Embedder`."""
        with self.turn():
            if not isinstance(self._inner, Embedder):
                raise BackendError(f"the backend {self.name} cannot run embedding models")
            return self._inner.last_hidden(texts)

    def take_context(self, capacity: int) -> Context:
        """An empty context: one that was given back, if there is one, otherwise a new one."""
        with self.turn():
            if not self._idle or self._idle[-1].capacity != capacity:
                return self.new_context(capacity)
            context = self._idle.pop()
            context.truncate(0)
            return context

    def give_back(self, context: Context) -> None:
        """Keeps a context for `take_context`, or frees it if there are enough."""

        def keep() -> None:
            if len(self._idle) < self._max_idle:
                self._idle.append(context)
            else:
                context.close()

        self.clean_up(keep)

    def free_idle(self, for_good: bool = False) -> None:
        """Frees the contexts that were given back; `for_good`: and those that will be, and what the backend keeps."""

        def free() -> None:
            self._max_idle = 0 if for_good else self._max_idle
            while self._idle:
                self._idle.pop().close()
            if for_good:
                self._inner.free_idle()

        self.clean_up(free)

    def memory(self) -> dict[str, int]:
        """Memory in use."""
        return self._inner.memory()


class _Closing:
    """Closes once: when told to, or when it is garbage collected."""

    def __init__(self, backend: SharedBackend, inner: Context | Batch):
        self._backend, self._to_close = backend, inner
        self._closed = False

    def close(self) -> None:
        """Frees its memory."""
        if not self._closed:
            self._closed = True
            self._backend.clean_up(self._to_close.close)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


class SharedContext(_Closing):
    """A context behind its backend's lock, see `protocol.Context`."""

    def __init__(self, backend: SharedBackend, inner: Context):
        super().__init__(backend, inner)
        self._inner = inner
        self.capacity = inner.capacity

    @property
    def ids(self) -> list[int]:
        """The tokens in the cache."""
        return self._inner.ids

    def truncate(self, length: int) -> None:
        """Removes all tokens from position `length` on."""
        self._backend.clean_up(lambda: self._inner.truncate(length))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits at each of them, float32 [T, vocab]."""
        with self._backend.turn():
            return self._inner.logits(ids)

    def decode(self, ids: Sequence[int], params: SamplingParams, constraint: Constraint | None = None) -> Iterator[int]:
        """Appends tokens, then yields sampled tokens; other threads get their turns between them."""
        tokens = self._inner.decode(ids, params, constraint)
        try:
            while True:
                with self._backend.turn():
                    token = next(tokens, None)
                if token is None:
                    return
                yield token
        finally:
            self._backend.clean_up(tokens.close)  # type: ignore[attr-defined]

    def logprobs(self) -> TokenLogprob:
        """Of the token that `decode` has yielded last."""
        with self._backend.turn():
            return self._inner.logprobs()

    def score(self, ids: Sequence[int], top: int, first: int = 1) -> list[TokenLogprob]:
        """Appends all tokens but the last, and returns log probabilities of ids[first:]."""
        with self._backend.turn():
            return self._inner.score(ids, top, first)


class SharedBatch(_Closing):
    """A batch behind its backend's lock, see `protocol.Batch`."""

    def __init__(self, backend: SharedBackend, inner: Batch):
        super().__init__(backend, inner)
        self._inner = inner
        self.page_size, self.num_pages, self.uniform = inner.page_size, inner.num_pages, inner.uniform
        self.max_sequences, self.capacity = inner.max_sequences, inner.capacity
        self.call_tokens, self.granularity, self.part_tokens = inner.call_tokens, inner.granularity, inner.part_tokens
        self.round_tokens = inner.round_tokens
        self.asynchronous = inner.asynchronous

    def start(
        self,
        slot: int,
        ids: Sequence[int],
        params: SamplingParams,
        pages: Sequence[int],
        computed: int,
        prompt_length: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Starts a sequence in a slot."""
        with self._backend.turn():
            self._inner.start(slot, ids, params, pages, computed, prompt_length, constraint)

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        """Adds pages to a sequence."""
        with self._backend.turn():
            self._inner.extend(slot, pages)

    def prefill(self, parts: Sequence[tuple[int, int]]) -> None:
        """Computes the next tokens of several prompts."""
        with self._backend.turn():
            self._inner.prefill(parts)

    def step(self, slots: Sequence[int]) -> None:
        """Samples one more token for each sequence."""
        with self._backend.turn():
            self._inner.step(slots)

    def collect(self) -> list[tuple[int, int]]:
        """Waits for the oldest uncollected call with results."""
        with self._backend.turn():
            return self._inner.collect()

    def logprobs(self) -> Sequence[TokenLogprob | None]:
        """Of the tokens that the last `collect` returned."""
        with self._backend.turn():
            return self._inner.logprobs()

    def prompt_logprobs(self, slot: int) -> list[TokenLogprob]:
        """Of all tokens of a prompt but the first."""
        with self._backend.turn():
            return self._inner.prompt_logprobs(slot)

    def times(self) -> CallTimes:
        """What is known of the time that calls take."""
        with self._backend.turn():
            return self._inner.times()

    def prepare(self) -> bool:
        """Does some of what calls to come would do when they are first made; False if nothing is left to do."""
        with self._backend.turn():
            return self._inner.prepare()

    def failure(self, slot: int) -> BitNetError:
        """Why a sequence got NO_TOKEN."""
        with self._backend.turn():
            return self._inner.failure(slot)
