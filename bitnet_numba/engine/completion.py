"""Completions: sampled tokens in, text and finish reason out. The same for one sequence and for batches."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

from bitnet_numba.errors import shown
from bitnet_numba.text.stop_strings import StopStrings
from bitnet_numba.text.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "context", "timeout", "interrupted"]


@dataclass(frozen=True, repr=False)
class Stats:
    """What one answer took. Times are wall-clock time, including the caller's own work between tokens."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt: already in the cache, not computed again
    generated_tokens: int  # including the stop token
    prefill_seconds: float  # time to the first token
    decode_seconds: float  # from the first token to the last
    memory: dict[str, int]  # bytes by purpose, see `Backend.memory`

    @property
    def prefill_tokens_per_second(self) -> float:
        """New prompt tokens over the time to the first token; 0 if no token was generated."""
        new = self.prompt_tokens - self.reused_tokens
        return new / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed, without the first token, which prefill produces; 0 for fewer than two tokens."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def __repr__(self) -> str:
        prompt, generated = f"{self.prompt_tokens} prompt tokens", f"{self.generated_tokens} generated"
        return f"<Stats: {prompt}, {generated}, {self.tokens_per_second:.1f} tokens/s>"


@dataclass(frozen=True, repr=False)
class Completion:
    """A finished answer.

    finish_reason: "stop": a stop token or stop string was generated; "length": max_new_tokens was reached; "context":
    the context is full; "timeout": a scheduler's request had no more time; "interrupted": the stream was closed or the
    request cancelled.
    token_ids: without the stop token. If a stop string begins inside a token, `text` ends inside that token and the
    ids end before it; otherwise `text` is exactly their decoding.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats

    def to_dict(self) -> dict[str, Any]:
        """All fields, those of `stats` as a dictionary, of types that `json.dumps` takes."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<Completion: {shown(self.text)}, {len(self.token_ids)} tokens, {self.finish_reason}>"


class CompletionBuilder:
    """Builds a completion: `push` tokens until `reason` is set, then call `finish` for the rest of the text.

    A completion that is taken before `finish` counts as interrupted. Timing starts at construction.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), max_new_tokens: int | None = None):
        """stop: strings before which the answer ends. max_new_tokens: None for no limit."""
        self.reason: FinishReason | None = None  # why generation ends; None while it goes on
        self._stop_ids = tokenizer.stop_ids | tokenizer.special_stops(stop)
        self._decoder, self._matcher = StreamDecoder(tokenizer), StopStrings(stop)
        self._max_new_tokens = max_new_tokens
        self._finished = False
        self._ids: list[int] = []  # without the stop token
        # By number of tokens: the number of characters decoded so far; None if the last character is unfinished.
        self._ends: list[int | None] = [0]
        self._decoded = 0  # characters
        self._shown: list[str] = []
        self._started_at = self._first_at = self._last_at = perf_counter()
        self._count = 0  # tokens, including the stop token

    def push(self, token: int) -> str:
        """Adds a token; returns the text that can be shown now, which may be empty."""
        self._last_at = perf_counter()
        if self._count == 0:
            self._first_at = self._last_at
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
        elif len(self._ids) == self._max_new_tokens:
            self.reason = "length"
        return safe

    def finish(self) -> str:
        """The text that was held back as the possible start of a stop string; may be empty."""
        self._finished = True
        rest = "" if self._matcher.found else self._matcher.push(self._decoder.finish()) + self._matcher.finish()
        if rest:
            self._shown.append(rest)
        return rest

    def completion(self, prompt_tokens: int, reused_tokens: int, memory: dict[str, int]) -> Completion:
        """The completion so far. An interrupted one leaves out held-back text and the tokens it belongs to."""
        text, ids = "".join(self._shown), self._ids
        reason: FinishReason = self.reason if self.reason and self._finished else "interrupted"
        if self._matcher.found or reason == "interrupted":
            ids = ids[: max(count for count, end in enumerate(self._ends) if end is not None and end <= len(text))]
        seconds = self._first_at - self._started_at, self._last_at - self._first_at
        return Completion(text, ids, reason, Stats(prompt_tokens, reused_tokens, self._count, *seconds, memory))
