"""How likely a model finds a text: the log probability of each token given those before it, and the perplexity.

A text longer than a window is scored in windows that overlap:

    tokens   0 ......................................... N
    window 1 [ scored ..................... ]
    window 2           [ context | scored . ]                 each begins `stride` tokens after the one before,
    window 3                     [ context | scored . ]       and scores what none before it has

So every token but the very first is scored once, and those after the first window with at least window - stride tokens
before them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_numba.backends.protocol import Context
from bitnet_numba.sampling import TokenLogprob

MAX_WINDOW = 2048  # tokens, unless a caller says otherwise: far more changes a perplexity little


@dataclass(frozen=True, repr=False)
class Score:
    """What a text was scored as.

    logprobs: of each of token_ids, given those before it (see `scoring` for how many); None for the first.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]

    @property
    def logprob(self) -> float:
        """The log probability of the whole text: the sum over its tokens but the first."""
        return math.fsum(each.logprob for each in self.logprobs if each is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log probability of the tokens but the first; infinite beyond what a float holds."""
        try:
            return math.exp(-self.logprob / (len(self.token_ids) - 1))
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, Any]:
        """All of it, of types that `json.dumps` takes."""
        logprobs = [None if each is None else each._asdict() for each in self.logprobs]
        values = {"token_ids": self.token_ids, "logprobs": logprobs}
        return values | {"logprob": self.logprob, "perplexity": self.perplexity}

    def __repr__(self) -> str:
        return f"<Score: {len(self.token_ids)} tokens, perplexity {self.perplexity:.4g}>"


def score_windows(
    context: Context,
    ids: Sequence[int],
    top: int,
    window: int,
    stride: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenLogprob | None]:
    """Log probabilities of ids, at least two, in windows of up to `window` tokens; None for the first.

    context: whatever it holds is forgotten; its capacity is at least `window`. 1 <= stride < window. progress: called
    after each window with the number of tokens done and of all.
    """
    result: list[TokenLogprob | None] = [None]
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        context.truncate(0)
        result += context.score(ids[begin:end], top, len(result) - begin)
        if progress is not None:
            progress(end, len(ids))
        if end == len(ids):
            break
    return result
