"""One sequence: from prompts to streams of text. The KV cache is kept, so the next turn computes only what is new."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from bitnet_numba.backends.protocol import Backend, Context
from bitnet_numba.engine.completion import Completion, CompletionBuilder
from bitnet_numba.engine.request import Prompt, Request, read_options, read_request
from bitnet_numba.errors import BackendError, RequestError
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer


class Stream(Iterator[str]):
    """An iterator over pieces of text as they are generated; `completion` is set when it ends."""

    def __init__(self, pieces: Generator[str, None, None], result: list[Completion]):
        self._pieces = pieces
        self._result = result  # filled by `pieces`, which has no reference to this object: dropping it ends the answer

    @property
    def completion(self) -> Completion | None:
        """The answer once it has ended; None before that."""
        return self._result[0] if self._result else None

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stops generating; what has been yielded stays in the context."""
        self._pieces.close()

    def result(self) -> Completion:
        """Generates to the end and returns the whole answer."""
        for _ in self:
            pass
        if self.completion is None:
            raise RequestError("this stream was closed before it generated anything: there is no answer")
        return self.completion


class Session:
    """A context for a conversation: a prompt is computed only from where it differs from the tokens in the context."""

    pauses = False  # whether streams yield "" between the parts of a long prompt, where closing one loses nothing

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        vocab_size: int,
        capacity: int,
        new_context: Callable[[int], Context] | None = None,
    ):
        """new_context: called for the context when the first answer starts; None: `backend.new_context`, at once."""
        self._backend = backend
        self._new_context = new_context or backend.new_context
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._capacity = capacity
        self._held_context = backend.new_context(capacity) if new_context is None else None
        self._busy = False
        self._closed = False

    @property
    def capacity(self) -> int:
        """Size of the context in tokens: prompt and answer together."""
        return self._capacity

    @property
    def held(self) -> int:
        """Number of tokens in the context."""
        return len(self._held_context.ids) if self._held_context is not None else 0

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def clear(self) -> None:
        """Empties the context."""
        if self._held_context is not None:
            self._held_context.truncate(0)

    def close(self) -> None:
        """Closes the session and frees its context, after the running stream, if any, has ended."""
        self._closed = True
        if self._held_context is not None and not self._busy:
            self._held_context.close()
            self._held_context = None

    def _context(self) -> Context:
        if self._held_context is None:
            self._held_context = self._new_context(self._capacity)
        return self._held_context

    def release(self) -> Context | None:
        """Closes the session without freeing its context, and hands that to the caller."""
        self._closed = True
        context, self._held_context = self._held_context, None
        return context

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """The whole answer; arguments and errors as for `stream`."""
        return self.stream(prompt, params, max_new_tokens, stop).result()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ended: Callable[[], None] = lambda: None,
    ) -> Stream:
        """Streams the answer to a prompt, which must contain the whole conversation so far.

        params: how tokens are sampled; None is greedy.
        max_new_tokens: None generates until the model stops or the context is full.
        stop: one string or several; the answer ends before the first to appear.
        ended: called once when a stream that was started has ended.

        Raises RequestError or ContextFull immediately if the request is invalid.
        """
        self._check_free()
        options = read_options(params, max_new_tokens, stop)
        request = read_request(self._tokenizer, self._vocab_size, self.capacity, prompt, options)
        result: list[Completion] = []
        return Stream(self._run(request, result, ended), result)

    def _check_free(self) -> None:
        if self._closed:
            raise RequestError("this session is closed")
        if self._busy:
            raise RequestError("this session is still answering: close its stream or use another session")

    def _run(self, request: Request, result: list[Completion], ended: Callable[[], None]) -> Generator[str, None, None]:
        self._check_free()  # again: another stream may have started in the meantime
        context, ids, options = self._context(), request.ids, request.options
        # At least the last token is computed: the first new token is sampled from its logits.
        reused = common_prefix(context.ids, ids[:-1])
        builder = CompletionBuilder(self._tokenizer, options.stop, options.max_new_tokens)
        self._busy = True
        try:
            context.truncate(reused)
            if self.pauses:
                yield from prefill_in_parts(context, ids)
            tokens = context.decode(ids[len(context.ids) :], options.params)
            try:
                for token in finite_steps(tokens):
                    if piece := builder.push(token):
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
            self._busy = False
            completion = builder.completion(len(ids), reused, self._backend.memory())
            context.truncate(min(len(context.ids), len(ids) + len(completion.token_ids)))
            result.append(completion)
            ended()
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
            raise BackendError(f"the model's weights produce numbers that are not finite: {error}") from None


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
