"""Completions: sampled tokens in, text and finish reason out. The same for one sequence and for batches."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.engine.request import Request
from bitnet_numba.errors import shown
from bitnet_numba.logprobs import LogprobList, ReadWhenAsked
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.text.stop_strings import StopStrings
from bitnet_numba.text.stream_decoder import StreamDecoder
from bitnet_numba.text.tokenizer import Tokenizer

KEPT_BACK = 48  # tokens of a quiet answer whose text is made together
FinishReason = Literal["stop", "length", "context", "timeout", "interrupted"]


@dataclass(frozen=True, repr=False)
class Stats:
    """What one answer took. Times are wall-clock time, including the caller's own work between tokens."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt: already in the cache, not computed again
    generated_tokens: int  # including the stop token
    prefill_seconds: float  # time to the first token
    decode_seconds: float  # from the first token to the last
    memory: dict[str, int]  # bytes by purpose, as `Engine.memory` has it

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
    logprobs: of each of token_ids; None unless SamplingParams.logprobs asks for them.
    prompt_logprobs: of each token of the prompt, None for the first; None unless prompt_logprobs asks for them.
    dropped_messages: how many messages were left out of the prompt (see `SamplingParams.overflow`): the oldest ones
    after the system message.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats
    logprobs: ReadWhenAsked = ReadWhenAsked()  # list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    dropped_messages: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All fields, those of `stats` and of log probabilities as dictionaries, of types that `json.dumps` takes."""
        values = asdict(self)
        for name in ("logprobs", "prompt_logprobs"):
            given = getattr(self, name)
            if given is not None:
                values[name] = [None if each is None else each._asdict() for each in given]
        return values

    def __repr__(self) -> str:
        return f"<Completion: {shown(self.text)}, {len(self.token_ids)} tokens, {self.finish_reason}>"


class CompletionBuilder:
    """Builds a completion: `push` tokens until `reason` is set, then call `finish` for the rest of the text.

    Or `push_quietly` some or all of them: the completion is the same, and `take` returns text that was not made then.
    Or `push_plain` several of which `is_plain` is true, as many as `num_plain` tells.
    A completion that is taken before `finish` counts as interrupted.
    Timing starts at construction.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, turn: int = 0):
        """turn: another one for each of the answers that run together, so that no step has the quiet text of all to
        make."""
        params = request.params
        self._turn = turn
        self.reason: FinishReason | None = None  # why generation ends; None while it goes on
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self._stop_ids = frozenset(params.ends)
        self._min_tokens, self._dropped_messages = params.min_tokens, request.dropped_messages
        self._decoder, self._matcher = StreamDecoder(tokenizer), StopStrings(request.stop)
        # Whether a token has a byte with which a stop string begins; None without stop strings.
        self._watched = tokenizer.tokens_with(stop[0] for stop in request.stop) if request.stop else None
        self._max_new_tokens = params.max_new_tokens
        self._finished = False
        self._ids: list[int] = []  # without the stop token
        self._logprobs = None if params.logprobs is None else LogprobList()  # of `_ids`
        # By number of tokens: the number of characters decoded so far; None if the last character is unfinished.
        self._ends: list[int | None] = [0]
        self._decoded = 0  # characters
        self._shown: list[str] = []
        self._num_shown = 0  # characters
        self._num_taken = 0  # pieces of `_shown` that have been returned
        self._num_released = 0  # tokens that `released` has returned
        self._num_whole = self._num_seen = 0  # see `_tokens_shown`: shown whole, and looked at
        self._started_at = self._first_at = self._last_at = perf_counter()
        self._count = 0  # tokens, including the stop token

    def push(self, token: int, logprobs: Sequence[TokenLogprob | None] | None = None, row: int = 0) -> str:
        """Adds a token; returns the text that can be shown now and has not been returned before; it may be empty.

        logprobs: has the token's at `row`, if the request asks for it.
        """
        if not self._add(token, logprobs, row):
            return ""
        self._catch_up(len(self._ids) - 1)
        self._decode(token)
        if self.reason is None and len(self._ids) == self._max_new_tokens:
            self.reason = "length"
        return self._take()

    def push_quietly(self, token: int, logprobs: Sequence[TokenLogprob | None] | None = None, row: int = 0) -> None:
        """Adds a token whose text nobody wants yet: it is made where a stop string may begin or has begun; what is left
        by `push`, `take` or `finish`."""
        if not self._add(token, logprobs, row):
            return
        if self._watched is not None and (self._watched[token] or self._matcher.held or self._decoder.pending):
            self._catch_up(len(self._ids) - 1)
            self._decode(token)
        elif self._has_turn():  # lest the end, which others wait for, takes long
            self._catch_up(len(self._ids))
        if self.reason is None and len(self._ids) == self._max_new_tokens:
            self.reason = "length"

    @property
    def num_tokens(self) -> int:
        """Tokens so far, including the stop token."""
        return self._count

    @property
    def num_plain(self) -> int:
        """Of how many tokens to come, if each of them `is_plain`, nobody has to look at any one."""
        if self._logprobs is not None or self._watched is not None and (self._matcher.held or self._decoder.pending):
            return 0
        count = len(self._ids)
        until_turn = KEPT_BACK - (count + self._turn) % KEPT_BACK
        return min(until_turn, count + until_turn if self._max_new_tokens is None else self._max_new_tokens - count) - 1

    def is_plain(self, token: int) -> bool:
        """Whether a token neither ends the answer, nor is one in which a stop string may begin, nor NO_TOKEN."""
        return (
            token not in self._stop_ids
            and token != NO_TOKEN
            and not (self._watched is not None and self._watched[token])
        )

    def push_plain(self, tokens: Sequence[int], at: float) -> None:
        """Adds what several `push_quietly` would. at: when the last of them came, by `perf_counter`."""
        self._ids += tokens
        self._count += len(tokens)
        self._last_at = at

    def _add(self, token: int, logprobs: Sequence[TokenLogprob | None] | None, row: int) -> bool:
        """Notes a token; False if it ends the answer and is not part of it."""
        self._last_at = perf_counter()
        if self._count == 0:
            self._first_at = self._last_at
        self._count += 1
        if token in self._stop_ids:
            self.reason = "stop"
            return False
        self._ids.append(token)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs, row)
            if self._has_turn():
                self._logprobs.keep_own()
        return True

    def _has_turn(self) -> bool:
        return (len(self._ids) + self._turn) % KEPT_BACK == 0

    def take(self) -> str:
        """The text that can be shown now and has not been returned before; may be empty."""
        if not self._finished:
            self._catch_up(len(self._ids))
        return self._take()

    def _take(self) -> str:
        start, self._num_taken = self._num_taken, len(self._shown)
        return "".join(self._shown[start:])

    def _catch_up(self, count: int) -> None:
        """Makes the text of the tokens up to the first `count`, in none of which a stop string begins."""
        ids = self._ids[len(self._ends) - 1 : count]
        if not ids:
            return
        if len(ids) == 1:
            self._show(self._decoder.push(ids[0]))
            return
        before = self._decoder.state
        piece = self._decoder.push_all(ids)
        if self._decoder.pending:  # as is rare; then it matters which of them is the last with whole characters
            self._decoder.state = before
            for token in ids:
                self._show(self._decoder.push(token))
            return
        # All of it is shown, so that nobody looks at the ends of the others.
        self._ends += [None] * (len(ids) - 1)
        self._show(piece)

    def _show(self, piece: str) -> None:
        """Adds text that no stop string begins in, to the end of a token."""
        self._decoded += len(piece)
        self._ends.append(None if self._decoder.pending else self._decoded)
        self._shown.append(piece)
        self._num_shown += len(piece)

    def _decode(self, token: int) -> None:
        """Makes the text of the last token."""
        piece = self._decoder.push(token)
        self._decoded += len(piece)
        self._ends.append(None if self._decoder.pending else self._decoded)
        safe = self._matcher.push(piece) if len(self._ids) > self._min_tokens else piece
        if safe:
            self._shown.append(safe)
            self._num_shown += len(safe)
        if self._matcher.found:
            self.reason = "stop"

    def finish(self) -> str:
        """The text that was held back, as the possible start of a stop string or not made yet; may be empty."""
        self._finished = True
        self._catch_up(len(self._ids))
        rest = "" if self._matcher.found else self._matcher.push(self._decoder.finish()) + self._matcher.finish()
        self._shown.append(rest)
        self._num_shown += len(rest)
        return self._take()

    def released(self) -> tuple[list[int], Sequence[TokenLogprob]]:
        """The tokens whose text has been shown since the last call, and their log probabilities, if they were asked
        for. Together, those of all calls are the completion's."""
        start, self._num_released = self._num_released, self._tokens_shown()
        ids = self._ids[start : self._num_released]
        return ids, () if self._logprobs is None else self._logprobs[start : self._num_released]

    def _tokens_shown(self) -> int:
        """How many tokens have been shown whole."""
        end = self._ends[-1]
        if end is not None and end <= self._num_shown:  # as nearly always
            return len(self._ids)
        if self.reason and self._finished and not self._matcher.found:
            return len(self._ids)
        self._num_whole = max(self._num_whole, self._num_released)
        for count in range(max(self._num_seen, self._num_whole) + 1, len(self._ends)):
            end = self._ends[count]
            if end is not None:
                if end > self._num_shown:
                    break
                self._num_whole = count
            self._num_seen = count  # lest a long row of unfinished characters is looked at for each token
        return self._num_whole

    def completion(self, prompt_tokens: int, reused_tokens: int, memory: dict[str, int]) -> Completion:
        """The completion so far. An interrupted one leaves out held-back text and the tokens it belongs to."""
        if not self._finished:
            self._catch_up(len(self._ids))
        reason: FinishReason = self.reason if self.reason and self._finished else "interrupted"
        count = self._tokens_shown()
        logprobs = None
        if self._logprobs is not None:
            self._logprobs.keep_own()
            logprobs = self._logprobs[:count]
        seconds = self._first_at - self._started_at, self._last_at - self._first_at
        stats = Stats(prompt_tokens, reused_tokens, self._count, *seconds, memory)
        text, ids, dropped = "".join(self._shown), self._ids[:count], self._dropped_messages
        return Completion(text, ids, reason, stats, logprobs, self.prompt_logprobs, dropped)
