"""How many tokens of prompts a round computes, so that running answers do not wait long for them."""

from bitnet_numba.backends.protocol import CallTimes

STALL = 5e-3  # seconds a round that running answers wait for prompts; where a step takes longer, as long as that
# A call of a whole budget that took this share of the time allowed: is too long; is so short that twice the tokens fit.
TOO_LONG, SHORT = 1.2, 0.55


class PromptBudget:
    """Follows the time that calls take: half the tokens when one took too long, twice as many (but at most a call's)
    when there is time.

    Where even the smallest part of a prompt takes longer than is allowed, as on most CPUs, a round computes that.
    """

    def __init__(self, chunk: int | None, call_tokens: int, least: int):
        """chunk: so many tokens always; None: as many as there is time for, from `least` to `call_tokens`.

        least: as what the smallest part of a prompt counts, see `Batch.granularity`.
        """
        self._chunk, self._least = chunk, least
        self._sizes = [least]
        while self._sizes[-1] < call_tokens:
            self._sizes.append(min(2 * self._sizes[-1], call_tokens))
        self._at = max(i for i, size in enumerate(self._sizes) if i == 0 or size <= call_tokens // 4)

    def tokens(self, answers_run: bool) -> int:
        """Tokens for the next round."""
        if self._chunk is not None:
            return self._chunk
        return self._sizes[self._at if answers_run else -1]

    def note(self, times: CallTimes) -> None:
        """Learns from the last calls that are known, which may be the same as before."""
        tokens, allowed = self._sizes[self._at], max(STALL, times.step_seconds)
        unused = tokens - times.prefill_tokens
        if unused < 0:  # a call of an earlier budget, or made when no answer ran
            return
        if times.prefill_seconds > TOO_LONG * allowed:
            self._at = max(0, self._at - 1)
        elif unused < min(self._least, tokens // 2 + 1) and times.prefill_seconds < SHORT * allowed:
            self._at = min(self._at + 1, len(self._sizes) - 1)
