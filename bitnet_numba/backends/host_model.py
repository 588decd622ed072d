"""What a model on the host is to `host.py`, and how its logits become tokens."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.protocol import NO_TOKEN, Constraint
from bitnet_numba.config import ModelConfig
from bitnet_numba.sampling import TokenLogprob, token_logprobs
from bitnet_numba.sampling_params import SamplingParams

PAGE_SIZE = 64  # tokens

BAD_LOGITS = "logits hold NaN or infinity"

Floats = NDArray[np.float32]


class SequenceCache(Protocol):
    """Keys and values of one sequence."""

    length: int  # tokens; a smaller number forgets those from there on

    def append_nan(self, count: int) -> None:
        """Appends tokens whose keys and values are NaN in all layers."""

    def extend(self, pages: Sequence[int]) -> None:
        """Adds pages, if it is one of a `PagePool`."""


C = TypeVar("C", bound=SequenceCache)
C_co = TypeVar("C_co", bound=SequenceCache, covariant=True)


class PagePool(Protocol[C_co]):
    """Keys and values of many sequences, in pages of PAGE_SIZE tokens."""

    def cache(self, pages: Sequence[int], computed: int) -> C_co:
        """The cache of a sequence in these pages, of which `computed` leading tokens are there already."""


class HostModel(Protocol[C]):
    """What this backend needs of a model.

    A token's numbers must depend on the tokens before it alone: not on other sequences in a call, nor on how they were
    divided into calls, at ends of pages or, if it is `uniform`, anywhere. Numbers that are not finite become NaN, in
    the cache too, and are no error.
    """

    config: ModelConfig
    uniform: bool  # see `protocol.Batch`

    def new_cache(self, capacity: int) -> C:
        """The cache of one sequence of up to `capacity` tokens. Raises MemoryError."""

    def new_pool(self, num_pages: int) -> PagePool[C]:
        """Pages for many sequences. Raises MemoryError."""

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""

    def scratch_bytes(self, pages: int) -> int:
        """About what computing takes beside the cache, in bytes, for contexts of so many pages."""

    def forward(self, ids: Sequence[int], cache: C) -> Floats:
        """Appends tokens to a cache; their final hidden states, float32 [M, hidden]."""

    def step(self, ids: Sequence[int], caches: Sequence[C]) -> Floats:
        """Appends one token to each of several caches; their final hidden states, float32 [B, hidden]."""

    def logits(self, hidden: Floats) -> Floats:
        """Logits of the next token: float32 [M, hidden] -> [M, vocab]."""

    def sample(
        self,
        hidden: Floats,
        histories: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        prompt_lengths: Sequence[int],
        logits: Floats | None = None,
        masks: Sequence[NDArray[np.uint32] | None] | None = None,
    ) -> list[int]:
        """`sampling.sample` of the next token of each sequence [B, hidden]; NO_TOKEN where logits are NaN.

        logits: float32 [B, vocab], which gets the model's logits, if it is given. masks: see `sampling.sample`.
        """

    def nbytes(self) -> int:
        """Bytes of all weights."""

    def close(self) -> None:
        """Ends what the model runs beside the caller."""


def sample_rows(
    model: HostModel[C],
    hidden: Floats,
    histories: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    prompt_lengths: Sequence[int],
    constraints: Sequence[Constraint | None],
) -> list[tuple[int, TokenLogprob | None]]:
    """The next token of each sequence, and its log probability if it is asked for."""
    vocab = model.config.vocab_size
    masks = [None if constraint is None else mask_of(constraint, vocab) for constraint in constraints]
    logits = None
    if any(own.logprobs is not None for own in params):
        logits = np.empty((len(hidden), vocab), np.float32)
    tokens = model.sample(hidden, histories, params, prompt_lengths, logits, masks)
    for constraint, token in zip(constraints, tokens, strict=True):
        if constraint is not None and token != NO_TOKEN:
            constraint.accept(token)
    if logits is None:
        return [(token, None) for token in tokens]
    return [
        (token, None if own.logprobs is None or token == NO_TOKEN else token_logprobs(row, [token], own.logprobs)[0])
        for row, token, own in zip(logits[:, None], tokens, params, strict=True)
    ]


def mask_of(constraint: Constraint, vocab: int) -> NDArray[np.uint32]:
    """The tokens that a constraint allows next, see `sampling.sample`."""
    mask = np.empty(-(-vocab // 32), np.uint32)
    constraint.allowed(mask)
    return mask


def finite(logits: Floats) -> Floats:
    """The logits. Raises ValueError if they hold NaN or infinity."""
    if not np.isfinite(logits).all():
        raise ValueError(BAD_LOGITS)
    return logits
