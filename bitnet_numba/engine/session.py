"""One live sequence: from a prompt to text, token by token, keeping what has been computed for the next turn."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from bitnet_numba.backends.protocol import Backend, Context
from bitnet_numba.engine.completion import Answer, Completion
from bitnet_numba.engine.request import Prompt, Request, read_request
from bitnet_numba.errors import BackendError, RequestError
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer


class Stream(Iterator[str]):
    """Pieces of an answer's text as they are made; then `completion` tells the rest."""

    def __init__(self, pieces: Generator[str, None, None], result: list[Completion]):
        self._pieces = pieces
        self._result = result  # filled by `pieces`, which does not hold this object: dropping it ends the answer

    @property
    def completion(self) -> Completion | None:
        """The answer, once it has ended; None before."""
        return self._result[0] if self._result else None

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the answer here; what has been shown of it stays in the context."""
        self._pieces.close()

    def result(self) -> Completion:
        """Runs to the end and returns the whole answer."""
        for _ in self:
            pass
        if self.completion is None:
            raise RequestError("this stream was closed before its first piece: there is no answer")
        return self.completion


class Session:
    """A context that a conversation extends: a prompt is computed only from where it departs from what is held."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        vocab_size: int,
        capacity: int,
        new_context: Callable[[int], Context] | None = None,
    ):
        """new_context: makes the context when the first answer begins; None makes the backend's own, at once."""
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
        """Tokens that fit, prompt and answer together."""
        return self._capacity

    @property
    def held(self) -> int:
        """Tokens in the context now."""
        return len(self._held_context.ids) if self._held_context is not None else 0

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def clear(self) -> None:
        """Forgets everything."""
        if self._held_context is not None:
            self._held_context.truncate(0)

    def close(self) -> None:
        """Frees the context's memory, once a stream that is running has ended; the session cannot be used again."""
        self._closed = True
        if self._held_context is not None and not self._busy:
            self._held_context.close()
            self._held_context = None

    def _context(self) -> Context:
        if self._held_context is None:
            self._held_context = self._new_context(self._capacity)
        return self._held_context

    def release(self) -> Context | None:
        """Closes the session, but not its context, which is the caller's now."""
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
        """Starts an answer to a prompt, which must hold everything that was said before.

        params: how tokens are chosen; None is greedy.
        max_new_tokens: None goes on until the model stops or the context is full.
        stop: texts before which the answer ends.
        ended: called once when a stream that was begun has ended.

        Raises RequestError or ContextFull, at once, for what cannot be done.
        """
        self._check_free()
        request = read_request(self._tokenizer, self._vocab_size, self.capacity, prompt, params, max_new_tokens, stop)
        result: list[Completion] = []
        return Stream(self._run(request, result, ended), result)

    def _check_free(self) -> None:
        if self._closed:
            raise RequestError("this session is closed")
        if self._busy:
            raise RequestError("this session is still answering: close its stream or use another session")

    def _run(
        self,
        request: Request,
        result: list[Completion],
        ended: Callable[[], None],
    ) -> Generator[str, None, None]:
        self._check_free()  # again: the stream may have waited before it was begun
        context, ids = self._context(), request.ids
        # At least the last token is fed again: its logits choose the first new one.
        reused = common_prefix(context.ids, ids[:-1])
        answer = Answer(self._tokenizer, request.stops, request.limit)
        self._busy = True
        try:
            context.truncate(reused)
            tokens = context.decode(ids[reused:], request.params)
            try:
                for token in finite_steps(tokens):
                    if piece := answer.push(token):
                        yield piece
                    if answer.reason:
                        break
                else:
                    answer.reason = "context"
            finally:
                tokens.close()  # type: ignore[attr-defined]
            if rest := answer.finish():
                yield rest
        except GeneratorExit:
            pass  # the caller has had enough
        except BaseException:
            context.truncate(0)  # a step that was cut short may have left anything behind
            raise
        finally:
            self._busy = False
            completion = answer.completion(len(ids), reused, self._backend.memory())
            context.truncate(min(len(context.ids), len(ids) + len(completion.token_ids)))
            result.append(completion)
            ended()
            if self._closed:
                self.close()


@contextlib.contextmanager
def finite_arithmetic() -> Iterator[None]:
    """Turns arithmetic that leaves the finite numbers, as damaged weights make it, into one BackendError."""
    with np.errstate(all="ignore"):  # the error says all that NumPy's warnings would
        try:
            yield
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            raise BackendError(f"the model's weights make numbers that are not finite: {error}") from None


def finite_steps(tokens: Iterator[int]) -> Iterator[int]:
    """The tokens, each of them made under `finite_arithmetic`; the caller's own work is not."""
    while True:
        with finite_arithmetic():
            token = next(tokens, None)
        if token is None:
            return
        yield token


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    shared = min(len(a), len(b))
    return next((i for i in range(shared) if a[i] != b[i]), shared)
