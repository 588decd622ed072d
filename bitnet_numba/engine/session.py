"""One sequence: from prompts to streams of text. The KV cache is kept, so the next turn computes only what is new."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitnet_numba.backends.protocol import NOT_FINITE, Backend, Context
from bitnet_numba.engine.completion import Completion, CompletionBuilder
from bitnet_numba.engine.request import Prompt, Request, read_params, read_request
from bitnet_numba.errors import BackendError, RequestError
from bitnet_numba.sampling_params import SamplingOverrides, SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none of its own

BUSY = "this session is still answering: close its stream or use another session"


class Stream(Iterator[str]):
    """An iterator over pieces of text as they are generated; `completion` is set when it ends.

    Several threads may use it: each piece goes to one of them, and `close` waits for the piece that is under way.
    """

    def __init__(self, pieces: Generator[str, None, None], result: list[Completion]):
        self._pieces = pieces
        self._result = result  # filled by `pieces`, which has no reference to this object: dropping it ends the answer
        self._lock = threading.RLock()  # reentrant: a signal handler that calls in here is refused, and does not hang

    @property
    def completion(self) -> Completion | None:
        """The answer once it has ended; None before that."""
        return self._result[0] if self._result else None

    def __repr__(self) -> str:
        return f"<Stream: {'under way' if self.completion is None else self.completion.finish_reason}>"

    def __next__(self) -> str:
        with self._lock:
            self._check_idle()
            return next(self._pieces)

    def close(self) -> None:
        """Stops generating; what has been yielded stays in the context."""
        with self._lock:
            self._check_idle()
            self._pieces.close()

    def result(self) -> Completion:
        """Generates to the end and returns the whole answer. Raises RequestError if the stream was closed before it
        began."""
        for _ in self:
            pass
        if self.completion is None:
            raise RequestError("this stream was closed before it generated anything: there is no answer")
        return self.completion

    def _check_idle(self) -> None:
        if inspect.getgeneratorstate(self._pieces) == inspect.GEN_RUNNING:
            raise RequestError("this stream is in the middle of a step")


class Session:
    """A context for a conversation: a prompt is computed only from where it differs from the tokens in the context.

    It gives one answer at a time; a second one, from whichever thread, is refused while the first is under way.
    """

    pauses = False  # whether streams yield "" between the parts of a long prompt, where closing one loses nothing

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        vocab_size: int,
        capacity: int,
        new_context: Callable[[int], Context],
        context: Context | None = None,
    ):
        """context: an empty one; None: `new_context` makes one of the capacity when the first answer starts."""
        self._backend = backend
        self._new_context = new_context
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._capacity = capacity
        self._held_context = context
        self._lock = threading.RLock()  # guards the next two, and the context while no answer is under way
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<Session: {'closed' if self._closed else f'{self.held} of {self.capacity} tokens'}>"

    @property
    def capacity(self) -> int:
        """Size of the context in tokens: prompt and answer together."""
        return self._capacity

    @property
    def held(self) -> int:
        """Number of tokens in the context."""
        context = self._held_context
        return 0 if context is None else len(context.ids)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def clear(self) -> None:
        """Empties the context. Raises RequestError while an answer is under way."""
        with self._lock:
            if self._busy:
                raise RequestError(BUSY)
            if self._held_context is not None:
                self._held_context.truncate(0)

    def close(self) -> None:
        """Closes the session and frees its context, after the running stream, if any, has ended."""
        with self._lock:
            self._closed = True
            if not self._busy and (context := self.release()) is not None:
                context.close()

    def _context(self) -> Context:
        if self._held_context is None:
            self._held_context = self._new_context(self._capacity)
        return self._held_context

    def release(self) -> Context | None:
        """Closes the session without freeing its context, and hands that to the caller."""
        with self._lock:
            self._closed = True
            context, self._held_context = self._held_context, None
            return context

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: "Unpack[SamplingOverrides]"
    ) -> Completion:
        """The whole answer; arguments and errors as for `stream`."""
        return self._stream("generate", prompt, params, overrides).result()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: "Unpack[SamplingOverrides]"
    ) -> Stream:
        """Streams the answer to a prompt, which must contain the whole conversation so far.

        params, overrides: as for `Engine.stream`.

        Raises RequestError or ContextFull immediately if the request is invalid.
        """
        return self._stream("stream", prompt, params, overrides)

    def _stream(
        self, method: str, prompt: Prompt, params: SamplingParams | None, overrides: Mapping[str, object]
    ) -> Stream:
        self._check_free()
        checked = read_params(method, params, overrides)
        several = "use generate_batch of the model"
        request = read_request(self._tokenizer, self._vocab_size, self.capacity, prompt, checked, several)
        return self.stream_request(request)

    def stream_request(self, request: Request, ended: Callable[[], None] = lambda: None) -> Stream:
        """Streams the answer to a request that `read_request` made for this capacity.

        ended: called once when a stream that was started has ended.
        """
        self._check_free()
        result: list[Completion] = []
        return Stream(self._run(request, result, ended), result)

    def _check_free(self) -> None:
        if self._closed:
            raise RequestError("this session is closed")
        if self._busy:
            raise RequestError(BUSY)

    def _run(self, request: Request, result: list[Completion], ended: Callable[[], None]) -> Generator[str, None, None]:
        with self._lock:
            self._check_free()  # again: another stream may have started in the meantime
            context = self._context()
            self._busy = True
        ids, params = request.ids, request.params
        # At least the last token is computed: the first new token is sampled from its logits.
        reused = common_prefix(context.ids, ids[:-1]) if params.prompt_logprobs is None else 0
        builder = CompletionBuilder(self._tokenizer, request)
        try:
            context.truncate(reused)
            if params.prompt_logprobs is not None:
                with finite_arithmetic():
                    scored = context.score(ids, params.prompt_logprobs) if len(ids) > 1 else []
                builder.prompt_logprobs = [None, *scored]
            elif self.pauses:
                yield from prefill_in_parts(context, ids)
            tokens = context.decode(ids[len(context.ids) :], params, request.constraint())
            try:
                for token in finite_steps(tokens):
                    logprobs = None if params.logprobs is None else [context.logprobs()]
                    if piece := builder.push(token, logprobs):
                        yield piece
                    if builder.reason:
                        break
                else:
                    builder.reason = "context"
            finally:
                tokens.close()  # type: ignore[attr-defined]
            if rest := builder.finish():
                yield rest
        except GeneratorExit:
            pass  # the stream was closed
        except BaseException:
            context.truncate(0)  # an interrupted step leaves the cache in an unknown state
            raise
        finally:
            try:
                completion = builder.completion(len(ids), reused, self._backend.memory())
                context.truncate(min(len(context.ids), len(ids) + len(completion.token_ids)))
                result.append(completion)
            finally:
                self._end()
                ended()

    def _end(self) -> None:
        """Ends an answer; if the session was closed meanwhile, frees its context now."""
        with self._lock:
            self._busy = False
            if self._closed:
                self.close()


PART = 128  # tokens of a prompt between pauses


def prefill_in_parts(context: Context, ids: Sequence[int]) -> Iterator[str]:
    """Appends a long prompt to a context, all but its last part; yields "" after each part."""
    while len(ids) - len(context.ids) > PART:
        end = (len(context.ids) // PART + 1) * PART
        steps = context.decode(ids[len(context.ids) : end], SamplingParams(seed=0))
        next(finite_steps(steps))  # a token that nobody needs
        steps.close()  # type: ignore[attr-defined]
        context.truncate(end)
        yield ""


@contextlib.contextmanager
def finite_arithmetic() -> Iterator[None]:
    """Turns NaN and infinity, which damaged weights produce, into one BackendError."""
    with np.errstate(all="ignore"):  # the error replaces NumPy's warnings
        try:
            yield
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            raise BackendError(f"{NOT_FINITE}: {error}") from None


def finite_steps(tokens: Iterator[int]) -> Iterator[int]:
    """The tokens, each computed under `finite_arithmetic`; the caller's code between them is not."""
    while True:
        with finite_arithmetic():
            token = next(tokens, None)
        if token is None:
            return
        yield token


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    shared = min(len(a), len(b))
    return next((i for i in range(shared) if a[i] != b[i]), shared)
