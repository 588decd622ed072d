"""Engine, a loaded model, answers prompts: alone, as a stream, together, or in a scheduler."""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import Backend, Context
from bitnet_numba.config import ModelConfig
from bitnet_numba.engine.asynchronous import AsyncStream, AsyncWorker, results
from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.embedding import GENERATES_NOTHING, embedding_ids, unit_vectors
from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import (
    MODEL_CLOSED,
    Prompt,
    Request,
    as_integer,
    check_ids,
    check_names,
    is_list,
    positive_integer,
    read_params,
    read_request,
)
from bitnet_numba.engine.scheduler import MAX_SEQUENCES, PREFILL_CHUNK, Scheduler
from bitnet_numba.engine.scoring import MAX_WINDOW, Score, score_windows
from bitnet_numba.engine.session import Session, Stream, finite_arithmetic
from bitnet_numba.engine.shared import SharedBackend
from bitnet_numba.errors import BitNetError, RequestError, shown
from bitnet_numba.sampling_params import MAX_LOGPROBS, SamplingOverrides, SamplingParams
from bitnet_numba.text.chat_template import Message
from bitnet_numba.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none of its own

ALL_PROMPTS = 1 << 40  # prompt tokens a round of `generate_batch`: nobody waits for the next piece of an answer there

User = TypeVar("User", Session, Scheduler)


class Engine:
    """A loaded model. Created by `load`.

    Any thread may call it. Answers under way at the same time take turns, token by token; `scheduler` and
    `generate_batch` compute them together, which is faster. After os.fork, only the reference works in the child, and
    only where NumPy does (as on Linux).
    """

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

    def __enter__(self) -> "Engine":
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Engine: {self.backend}, context {self.context}{', closed' if self._closed else ''}>"

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

        The dot product of two vectors is how alike their texts are, at most 1. One text at a time is computed, so the
        vectors do not depend on each other. Raises RequestError for other models and wrong arguments, ContextFull for
        a text that does not fit the context, and BackendError if a number is not finite.
        """
        self._check_open()
        ids = embedding_ids(self.tokenizer, self.config, self.context, texts, prompt)
        size = self.config.hidden_size
        dimensions = size if dimensions is None else positive_integer("dimensions", dimensions, size)
        hidden = np.empty((len(ids), size), np.float32)
        with finite_arithmetic():
            for row, own in zip(hidden, ids, strict=True):
                row[:] = self._backend.last_hidden(own)
            return unit_vectors(hidden, dimensions)

    def session(self) -> Session:
        """A context for a conversation: each turn computes only what is new in its prompt."""
        self._check_generates()
        return self._remember(self._new_session(self._backend.take_context(self.context)))

    @overload
    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, n: int, **overrides: "Unpack[SamplingOverrides]"
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion | list[Completion]:
        """The answer to a prompt; arguments and errors as for `stream`.

        n: gives a list of so many answers, which are computed together; the first is the one without `n`, and each
        later one has the next seed. Their prompt is computed once, but for its last page.
        """
        check_names("generate", overrides, ["n"])
        return self._answers(prompt, read_params("generate", params, overrides), n)

    def _answers(self, prompt: Prompt, params: SamplingParams, n: int | None) -> Completion | list[Completion]:
        """The answer to a prompt, or with `n` a list of so many."""
        if n is None:
            return self._stream(prompt, params).result()
        count = positive_integer("n", n, MAX_SEQUENCES)
        self._check_generates()
        request = read_request(self.tokenizer, self.config.vocab_size, self.context, prompt, params)
        return self._answer_together(request.several(count))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: "Unpack[SamplingOverrides]"
    ) -> Stream:
        """The answer to a prompt, in pieces of text as they are generated.

        prompt: a text to continue, token ids, or chat messages [{"role": "user", "content": "..."}, ...].
        params: how it is generated; None: the defaults of SamplingParams, which are greedy.
        overrides: fields of SamplingParams by name, which go before `params`: temperature=0.8, max_new_tokens=50.

        Raises RequestError or ContextFull immediately if the request is invalid. Nothing is cached between prompts, so
        an answer depends on its arguments alone; use `session` for conversations.
        """
        return self._stream(prompt, read_params("stream", params, overrides))

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        n: int,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[Completion]: ...

    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion | list[Completion]:
        """The answer to a user's message, or to a conversation, as the model's maker recommends to generate it.

        messages: a text, which becomes one message of the user, or messages as for `stream`.
        params: None: `self.sampling`, what the model's folder recommends; if it recommends nothing, greedy.
        n: gives a list of so many answers, as for `generate`.

        Otherwise as `generate`. `stream(messages, llm.sampling)` gives the same answer in pieces.
        """
        check_names("chat", overrides, ["n"])
        checked = read_params("chat", params, overrides, self.sampling)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}] if messages else ""
        elif not is_list(messages) or (len(messages) and not isinstance(messages[0], Mapping)):
            raise RequestError(f"chat answers one text or one list of messages, not {shown(messages)}")
        return self._answers(messages, checked, n)

    @overload
    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion: ...

    @overload
    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[Completion]: ...

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion | list[Completion]:
        """`generate` for asyncio; see `astream`."""
        check_names("agenerate", overrides, ["n"])
        checked = read_params("agenerate", params, overrides)
        options = QueueOptions(priority, "", cache_salt, queue_timeout, timeout)
        several = "call agenerate for each"
        if n is None:
            return await self._astream(prompt, checked, options, several, quiet=True).result()
        each = checked.several(positive_integer("n", n, MAX_SEQUENCES))
        return await results([self._astream(prompt, own, options, several, quiet=True) for own in each])

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> AsyncStream:
        """`stream` for asyncio: `async for piece in llm.astream(prompt): ...`.

        priority, cache_salt, queue_timeout, timeout: see `QueueOptions`; the times count from the first piece that is
        asked for.

        A worker thread computes, so the event loop is never held up. Requests under way at the same time share one
        scheduler (see `scheduler`), which has memory only while there are any. A task that is cancelled ends its
        answer after the step under way. Invalid parameters raise immediately, an invalid prompt at the first piece.
        """
        checked = read_params("astream", params, overrides)
        options = QueueOptions(priority, "", cache_salt, queue_timeout, timeout)
        return self._astream(prompt, checked, options, "call astream for each")

    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        n: None = None,
        max_sequences: int = 64,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[Completion]: ...

    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        n: int,
        max_sequences: int = 64,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[list[Completion]]: ...

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        n: int | None = None,
        max_sequences: int = 64,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[Completion] | list[list[Completion]]:
        """The answers to several prompts, in the order of the prompts, computed as a batch.

        params: for all prompts, or a list with one for each; None is greedy. `overrides` go before all of them.
        n: gives a list of so many answers to each prompt, as for `generate`.
        max_sequences: how many run at once; the others wait.

        Raises RequestError or ContextFull, naming the prompt's index, before anything is computed; BackendError if
        memory is insufficient or a prompt produces numbers that are not finite.
        """
        self._check_generates()
        method = "generate_batch"
        check_names(method, overrides, ["n", "max_sequences"])
        count = 1 if n is None else positive_integer("n", n, MAX_SEQUENCES)
        if not is_list(prompts) or isinstance(prompts, np.ndarray):
            raise RequestError(f"prompts must be a list of prompts, not {shown(prompts)}")
        max_sequences = positive_integer("max_sequences", max_sequences, MAX_SEQUENCES)
        # Here, so that a mistake is not put down to the first prompt, and an iterator of stop strings is read once.
        checked = read_params(method, None, overrides)
        same = {name: getattr(checked, name) for name in overrides}
        if isinstance(params, SamplingParams) or params is None:
            each: Iterable[SamplingParams | None] = itertools.repeat(read_params(method, params, same), len(prompts))
        elif not is_list(params):
            raise RequestError(f"params must be SamplingParams or a list of them, not {shown(params)}")
        elif len(params) != len(prompts):
            raise RequestError(f"there are {len(prompts)} prompts but {len(params)} sampling parameters")
        else:
            each = params
        requests: list[Request] = []
        vocab, several = self.config.vocab_size, "list each by itself"
        last: SamplingParams | None = None
        for i, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            with _naming_prompt(i):
                if own is None or own is not last:  # mostly they are one and the same
                    last, checked = own, read_params(method, own, same)
                requests += read_request(self.tokenizer, vocab, self.context, prompt, checked, several).several(count)
        answers = self._answer_together(requests, max_sequences, count) if requests else []
        return answers if n is None else [answers[i : i + count] for i in range(0, len(answers), count)]

    def _answer_together(
        self, requests: Sequence[Request], max_sequences: int = 64, of_each: int | None = None
    ) -> list[Completion]:
        """The answers to several requests, up to `max_sequences` at once. of_each: so many are of one prompt, which
        errors name by its place; None: all are."""
        completions: dict[int, Completion] = {}
        of_each = of_each or len(requests)
        with self.scheduler(min(max_sequences, len(requests)), prefill_chunk=ALL_PROMPTS) as scheduler:
            ids = []
            for i, request in enumerate(requests):
                with _naming_prompt(i // of_each):
                    ids.append(scheduler.add_request(request, quiet=True))
            while scheduler.busy:
                for update in scheduler.step():
                    if update.error is not None:
                        with _naming_prompt(ids.index(update.request) // of_each):
                            raise update.error
                    if update.completion is not None:
                        completions[update.request] = update.completion
        return [completions[i] for i in ids]

    def scheduler(
        self,
        max_sequences: int = 64,
        tokens: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
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

    def _stream(self, prompt: Prompt, params: SamplingParams) -> Stream:
        self._check_generates()
        request = read_request(self.tokenizer, self.config.vocab_size, self.context, prompt, params)
        session = self._remember(self._new_session())

        def ended() -> None:
            context = session.release()
            if context is not None:
                self._backend.give_back(context)

        return session.stream_request(request, ended)

    def _astream(
        self, prompt: Prompt, params: SamplingParams, options: QueueOptions, several: str, quiet: bool = False
    ) -> AsyncStream:
        self._check_generates()

        def read() -> Request:
            self._check_generates()
            return read_request(self.tokenizer, self.config.vocab_size, self.context, prompt, params, several)

        return AsyncStream(self._async_worker, self.scheduler, read, options, quiet)

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


@contextlib.contextmanager
def _naming_prompt(index: int) -> Iterator[None]:
    try:
        yield
    except BitNetError as error:
        raise type(error)(f"prompt {index}: {error}") from None
