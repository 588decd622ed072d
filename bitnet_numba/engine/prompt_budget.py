"""How many tokens of prompts a round computes, so that running answers do not wait long for them."""

from bitnet_numba.backends.protocol import CallTimes

STALL = 5e-3  # seconds a round that running answers wait for prompts; where a step takes longer, as long as that
# A call of a whole budget that took this share of the time allowed: is too long; is so short that twice the tokens fit.
TOO_LONG, SHORT = 1.2, 0.55


class PromptBudget:
    """Follows the time that calls take: half the tokens when one took too long, twice as many when there is time.

    Where even the smallest part of a prompt takes longer than is allowed, as on most CPUs, a round computes that.
    """

    def __init__(self, chunk: int | None, call_tokens: int, least: int):
        """chunk: so many tokens always; None: as many as there is time for, from `least` to `call_tokens`.

        least: as what the smallest part of a prompt counts, see `Batch.granularity`.
        """
        self._chunk, self._call_tokens, self._least = chunk, call_tokens, least
        self._tokens = max(least, call_tokens // 4)

    def tokens(self, answers_run: bool) -> int:
        """Tokens for the next round."""
        if self._chunk is not None:
            return self._chunk
        return self._tokens if answers_run else self._call_tokens

    def note(self, times: CallTimes) -> None:
        """Learns from the last calls that are known, which may be the same as before."""
        tokens, allowed = self._tokens, max(STALL, times.step_seconds)
        unused = tokens - times.prefill_tokens
        if unused < 0:  # a call of an earlier budget, or made when no answer ran
            return
        if times.prefill_seconds > TOO_LONG * allowed:
            self._tokens = max(self._least, tokens // 2)
        elif unused < min(self._least, tokens // 2 + 1) and times.prefill_seconds < SHORT * allowed:
            self._tokens = max(tokens, min(2 * tokens, self._call_tokens))
