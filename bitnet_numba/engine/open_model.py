"""A loaded model: what it is, its scores and vectors, and the sessions and schedulers that are open on it."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import Backend, Context
from bitnet_numba.config import ModelConfig
from bitnet_numba.engine.asynchronous import AsyncWorker
from bitnet_numba.engine.embedding import GENERATES_NOTHING, batches, embedding_ids, unit_vectors
from bitnet_numba.engine.request import MODEL_CLOSED, as_integer, check_ids, is_list, positive_integer
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.engine.scoring import MAX_WINDOW, Score, score_windows
from bitnet_numba.engine.session import Session, finite_arithmetic
from bitnet_numba.engine.shared import SharedBackend
from bitnet_numba.errors import RequestError, shown
from bitnet_numba.sampling_params import MAX_LOGPROBS, SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.10 has none of its own

User = TypeVar("User", Session, Scheduler)


class OpenModel:
    """What an `Engine` has and gives without answering prompts itself."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        config: ModelConfig,
        context: int,
        sampling: SamplingParams | None = None,
    ):
        self.config = config  # sizes and options of the model
        self.sampling = sampling  # what its generation_config.json recommends, the default of `chat`; None: nothing
        self.tokenizer = tokenizer  # text <-> token ids, and chat templates
        self.context = context  # tokens of prompt and answer together
        self._backend = SharedBackend(backend)
        self._lock = threading.RLock()  # guards the rest
        self._closed = False
        self._async_worker = AsyncWorker()
        self._open: weakref.WeakSet[Session | Scheduler] = weakref.WeakSet()  # to be closed with the engine

    def __enter__(self) -> "Self":
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.backend}, context {self.context}{', closed' if self._closed else ''}>"

    @property
    def backend(self) -> str:
        """The backend in use: "cuda", "cpu" or "reference"."""
        return self._backend.name

    def close(self) -> None:
        """Closes sessions and schedulers and frees their memory; streams under way go on to their end.

        Answers of `agenerate` and `astream` end with RequestError, which later calls raise, too. The weights are freed
        when nothing refers to the engine any more.
        """
        with self._lock:
            self._closed = True
            opened = list(self._open)
            self._open.clear()
        for user in opened:
            user.close()
        self._backend.free_idle(for_good=True)

    def memory(self) -> dict[str, int]:
        """Memory in use, in bytes by purpose, such as {"weights": ..., "kv_cache": ...}; on a GPU, the device's."""
        self._check_open()
        return self._backend.memory()

    def logits(self, token_ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """The logits after each token of a text, computed in a new context: float32 [T, vocab].

        token_ids: [T] integers, as `tokenizer.encode` gives them.

        Raises RequestError for an empty list, ids outside the vocabulary or more than the model's context holds, and
        BackendError if a number is not finite.
        """
        self._check_generates()
        most = self.config.max_context
        if is_list(token_ids) and len(token_ids) > most:
            raise RequestError(f"{len(token_ids)} tokens do not fit the model's context of {most}")
        ids = check_ids(token_ids, self.config.vocab_size)
        context = self._backend.new_context(len(ids))
        try:
            with finite_arithmetic():
                logits = context.logits(ids)
                if not np.isfinite(logits).all():
                    raise ValueError("logits hold NaN or infinity")
                return logits
        finally:
            context.close()

    def score(
        self,
        text: str | Sequence[int],
        top: int = 0,
        *,
        window: int | None = None,
        stride: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Score:
        """How likely the model finds a text, or token ids: the log probability of each token, and the perplexity.

        top: how many of the most likely tokens each comes with, up to 20.
        window: tokens that are looked at together; None: as many as the context holds, at most 2048.
        stride: by how many tokens one window begins after another; None: half a window. So every token after the first
            window is given at least window - stride tokens before it.
        progress: called now and then with the number of tokens done and of all.

        Takes memory for one window, however long the text. Raises RequestError for fewer than two tokens and for other
        arguments that are wrong, and BackendError if a number is not finite.
        """
        self._check_generates()
        count = as_integer(top)
        if count is None or not 0 <= count <= MAX_LOGPROBS:
            raise RequestError(f"top must be between 0 and {MAX_LOGPROBS}, not {shown(top)}")
        if not isinstance(text, str) and not is_list(text):
            raise RequestError(f"score takes a text or token ids, not {shown(text)}")
        ids = check_ids(self.tokenizer.encode(text) if isinstance(text, str) else text, self.config.vocab_size)
        if len(ids) < 2:
            raise RequestError("one token alone cannot be scored: each is, given those before it")
        window = positive_integer("window", min(self.context, MAX_WINDOW) if window is None else window, self.context)
        if window < 2:
            raise RequestError("window must be at least 2")
        stride = positive_integer("stride", window // 2 if stride is None else stride, window - 1)
        context = self._backend.new_context(min(window, len(ids)))
        try:
            with finite_arithmetic():
                return Score(ids, score_windows(context, ids, count, window, stride, progress))
        finally:
            context.close()

    def embed(
        self, texts: Sequence[str] | Sequence[Sequence[int]], dimensions: int | None = None, *, prompt: str = ""
    ) -> NDArray[np.float32]:
        """What texts mean, as vectors of length 1, of an embedding model: float32 [n, dimensions].

        texts: a list of texts, or of lists of token ids, which are taken as they are; texts get the token
            <|endoftext|> at their end, where the model sums them up.
        dimensions: only so many of the first, scaled to length 1 again; None: all, which are `config.hidden_size`.
        prompt: stands before each text: what the model was trained with for queries, such as "query: "; documents have
            none.

        The dot product of two vectors is how alike their texts are, at most 1. CUDA computes many texts at a time, and
        still no vector depends on the other texts. Raises RequestError for other models and wrong arguments,
        ContextFull for a text that does not fit the context, and BackendError if a number is not finite.
        """
        self._check_open()
        ids = embedding_ids(self.tokenizer, self.config, self.context, texts, prompt)
        size = self.config.hidden_size
        dimensions = size if dimensions is None else positive_integer("dimensions", dimensions, size)
        hidden = np.empty((len(ids), size), np.float32)
        with finite_arithmetic():
            for together in batches(ids):
                hidden[together] = self._backend.last_hidden(ids[together])
            return unit_vectors(hidden, dimensions)

    def session(self) -> Session:
        """A context for a conversation: each turn computes only what is new in its prompt."""
        self._check_generates()
        return self._remember(self._new_session(self._backend.take_context(self.context)))

    def scheduler(
        self,
        max_sequences: int = 64,
        tokens: int | None = None,
        prefill_chunk: int | None = None,
        max_waiting: int | None = None,
        max_per_tenant: int | None = None,
    ) -> Scheduler:
        """Continuous batching: requests can be added and cancelled at any time. Arguments as for `Scheduler`.

        On a GPU, its memory is kept for the next batch, unless that is over a quarter of the GPU's, or is needed
        otherwise; `close` frees it.
        """
        self._check_generates()
        self._backend.free_idle()  # the batch may need their memory
        scheduler = Scheduler(
            self._backend, self.tokenizer, self.config.vocab_size, self.context, max_sequences, tokens, prefill_chunk,
            max_waiting, max_per_tenant,
        )  # fmt: skip
        return self._remember(scheduler)

    def _new_session(self, context: Context | None = None) -> Session:
        size = self.config.vocab_size
        return Session(self._backend, self.tokenizer, size, self.context, self._backend.take_context, context)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(MODEL_CLOSED)

    def _check_generates(self) -> None:
        """Raises RequestError if the model is closed, or is an embedding model."""
        self._check_open()
        if self.config.embeds:
            raise RequestError(GENERATES_NOTHING)

    def _remember(self, user: User) -> User:
        """Notes a session or scheduler, so that it is closed with the engine."""
        with self._lock:
            if not self._closed:
                self._open.add(user)
                return user
        user.close()  # another thread has closed the engine meanwhile
        raise RequestError(MODEL_CLOSED)
