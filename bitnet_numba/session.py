"""One live sequence: from a prompt to text, token by token, keeping what has been computed for the next turn."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

from bitnet_numba.backend import Backend, Context
from bitnet_numba.errors import BackendError, RequestError
from bitnet_numba.prompts import Prompt, encode_prompt, whole_number
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.stop_strings import StopStrings
from bitnet_numba.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Stats:
    """What one answer took. Times are wall-clock, the caller's own work between tokens included."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the context and not computed again
    generated_tokens: int  # the one that ended the answer included
    prefill_seconds: float  # until the first token was there
    decode_seconds: float  # from the first token to the last
    memory: dict[str, int]  # bytes by purpose, as the backend counts them

    @property
    def prefill_tokens_per_second(self) -> float:
        """New prompt tokens over the time to the first token; 0 if there was none."""
        new = self.prompt_tokens - self.reused_tokens
        return new / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the first token left out since prefill makes it; 0 for fewer than two tokens."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """An answer.

    finish_reason: "stop" a stop token or stop string came; "length" max_new_tokens were made; "context" the context is
    full; "interrupted" the stream was closed early.
    token_ids: without the stop token. Where a stop string cuts a token in two, text goes on to the cut and the ids end
    before it; otherwise text is exactly their decoding.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats


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

    def give_back(self) -> Context | None:
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
        if max_new_tokens is not None:
            limit = whole_number(max_new_tokens)
            if limit is None or limit < 1:
                raise RequestError(f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens!r}")
            max_new_tokens = limit
        stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise RequestError("a stop string must be a text that is not empty")
        ids = encode_prompt(self._tokenizer, prompt, self._vocab_size, self.capacity)
        if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
            stops += self._tokenizer.chat_stop
        params = (params or SamplingParams()).with_seed()
        result: list[Completion] = []
        return Stream(self._run(ids, params, max_new_tokens, stops, result, ended), result)

    def _check_free(self) -> None:
        if self._closed:
            raise RequestError("this session is closed")
        if self._busy:
            raise RequestError("this session is still answering: close its stream or use another session")

    def _run(
        self,
        ids: list[int],
        params: SamplingParams,
        limit: int | None,
        stops: Sequence[str],
        result: list[Completion],
        ended: Callable[[], None],
    ) -> Generator[str, None, None]:
        self._check_free()  # again: the stream may have waited before it was begun
        context = self._context()
        # At least the last token is fed again: its logits choose the first new one.
        reused = common_prefix(context.ids, ids[:-1])
        decoder, matcher = StreamDecoder(self._tokenizer), StopStrings(stops)
        answer: list[int] = []
        borders = [(0, 0)]  # (tokens, characters) where a token and a character end together
        decoded = 0
        shown: list[str] = []
        times = [perf_counter()]
        reason: FinishReason = "interrupted"
        self._busy = True
        try:
            context.truncate(reused)
            tokens = context.decode(ids[reused:], params)
            try:
                for token in finite_steps(tokens):
                    times.append(perf_counter())
                    if token in self._tokenizer.stop_ids:
                        reason = "stop"
                        break
                    answer.append(token)
                    piece = decoder.push(token)
                    decoded += len(piece)
                    if not decoder.pending:
                        borders.append((len(answer), decoded))
                    if safe := matcher.push(piece):
                        shown.append(safe)
                        yield safe
                    if matcher.found:
                        reason = "stop"
                        break
                    if len(answer) == limit:
                        reason = "length"
                        break
                else:
                    reason = "context"
            finally:
                tokens.close()  # type: ignore[attr-defined]
            if not matcher.found and (rest := matcher.push(decoder.finish()) + matcher.finish()):
                shown.append(rest)
                yield rest
        except GeneratorExit:
            pass  # the caller has had enough
        except BaseException:
            context.truncate(0)  # a step that was cut short may have left anything behind
            raise
        finally:
            self._busy = False
            text = "".join(shown)
            if matcher.found or reason == "interrupted":
                answer = answer[: max(count for count, length in borders if length <= len(text))]
            context.truncate(min(len(context.ids), len(ids) + len(answer)))
            result.append(Completion(text, answer, reason, self._stats(len(ids), reused, times)))
            ended()
            if self._closed:
                self.close()

    def _stats(self, prompt: int, reused: int, times: list[float]) -> Stats:
        first = times[min(1, len(times) - 1)]
        return Stats(prompt, reused, len(times) - 1, first - times[0], times[-1] - first, self._backend.memory())


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
