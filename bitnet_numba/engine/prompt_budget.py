"""How many tokens of prompts a round computes, so that running answers do not wait long for them."""

from collections.abc import Sequence

from bitnet_numba.backends.protocol import CallTimes

STALL = 5e-3  # seconds a round that running answers wait for prompts; where a step takes longer, as long as that
TOO_LONG = 1.2  # a call that took this share of the time allowed


class PromptBudget:
    """Follows the time that calls take: fewer tokens when one took too long, more when there is time.

    Where even the smallest part of a prompt takes longer than is allowed, as on most CPUs, a round computes that.
    """

    def __init__(self, chunk: int | None, call_tokens: int, sizes: Sequence[int]):
        """chunk: so many tokens always; None: as many of `sizes`, see `Batch.round_tokens`, as there is time for, and
        `call_tokens` where no answer runs."""
        self._chunk, self._call_tokens, self._sizes = chunk, call_tokens, sizes
        self._noted = 0, 0.0
        self._at = max(i for i, size in enumerate(sizes) if i == 0 or size <= call_tokens // 4)

    def tokens(self, answers_run: bool) -> int:
        """Tokens for the next round."""
        if self._chunk is not None:
            return self._chunk
        return self._sizes[self._at] if answers_run else self._call_tokens

    def note(self, times: CallTimes) -> None:
        """Learns from the last calls that are known, which may be the same as before."""
        measured = times.prefill_tokens, times.prefill_seconds
        if measured == self._noted:
            return
        self._noted = measured
        tokens, allowed = self._sizes[self._at], max(STALL, times.step_seconds)
        unused = tokens - times.prefill_tokens
        if unused < 0:  # a call of an earlier budget, or made when no answer ran
            return
        if times.prefill_seconds > TOO_LONG * allowed:
            self._at = max(0, self._at - 1)
        elif unused < min(self._sizes[0], tokens // 2 + 1) and self._at < len(self._sizes) - 1:
            if times.prefill_seconds / tokens * self._sizes[self._at + 1] < allowed:
                self._at += 1
