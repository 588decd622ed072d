"""An answer in the making: sampled tokens in, text out, and how it ends. The same for one sequence and for batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from bitnet_numba.text.stop_strings import StopStrings
from bitnet_numba.text.tokenizer import StreamDecoder, Tokenizer

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
    full; "interrupted" the stream was closed, or the request cancelled, early.
    token_ids: without the stop token. Where a stop string cuts a token in two, text goes on to the cut and the ids end
    before it; otherwise text is exactly their decoding.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats


class Answer:
    """Takes tokens until `reason` says how the answer ends; then `finish` has the rest of its text.

    Without that, whether there is a reason or not, the answer was interrupted. Its clock starts when it is made.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], limit: int | None):
        """stops: texts before which the answer ends. limit: the most tokens; None for no limit."""
        self.reason: FinishReason | None = None
        self._stop_ids = tokenizer.stop_ids
        self._decoder, self._matcher = StreamDecoder(tokenizer), StopStrings(stops)
        self._limit = limit
        self._finished = False
        self._ids: list[int] = []  # all tokens but the one that stops
        # Characters after so many tokens, where a token and a character end together.
        self._ends: list[int | None] = [0]
        self._decoded = 0  # characters
        self._shown: list[str] = []
        self._begun = self._first = self._last = perf_counter()
        self._count = 0  # tokens, the one that ends the answer included

    def push(self, token: int) -> str:
        """One more token; returns the text that is now safe to show, which may be none."""
        self._last = perf_counter()
        if self._count == 0:
            self._first = self._last
        self._count += 1
        if token in self._stop_ids:
            self.reason = "stop"
            return ""
        self._ids.append(token)
        piece = self._decoder.push(token)
        self._decoded += len(piece)
        self._ends.append(None if self._decoder.pending else self._decoded)
        safe = self._matcher.push(piece)
        if safe:
            self._shown.append(safe)
        if self._matcher.found:
            self.reason = "stop"
        elif len(self._ids) == self._limit:
            self.reason = "length"
        return safe

    def finish(self) -> str:
        """Text that was held back, now that nothing follows it; may be none."""
        self._finished = True
        rest = "" if self._matcher.found else self._matcher.push(self._decoder.finish()) + self._matcher.finish()
        if rest:
            self._shown.append(rest)
        return rest

    def completion(self, prompt_tokens: int, reused_tokens: int, memory: dict[str, int]) -> Completion:
        """The answer. Of an interrupted one, text that was held back and the tokens it is part of are left out."""
        text, ids = "".join(self._shown), self._ids
        reason: FinishReason = self.reason if self.reason and self._finished else "interrupted"
        if self._matcher.found or reason == "interrupted":
            ids = ids[: max(count for count, end in enumerate(self._ends) if end is not None and end <= len(text))]
        seconds = self._first - self._begun, self._last - self._first
        return Completion(text, ids, reason, Stats(prompt_tokens, reused_tokens, self._count, *seconds, memory))
