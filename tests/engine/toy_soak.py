"""A toy backend that is quick enough for a million events: its tokens are a plain function of those before them."""

from collections.abc import Sequence

import numpy as np

from bitnet_numba.backends.host_model import mask_of
from bitnet_numba.backends.protocol import Constraint
from bitnet_numba.engine.completion import Completion, CompletionBuilder
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.request import Request
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams
from tests.engine.soak import Soak
from tests.engine.toy_backend import CONFIG, TOKENIZER, VOCAB, ToyBackend

CONTEXT, TOKENS, EOT = 96, 112, 1999


class QuickBackend(ToyBackend):
    """`failing`: the next step fails."""

    failing = False

    def choose(
        self,
        ids: Sequence[int],
        prompt: int,
        params: SamplingParams,
        stepped: Sequence[bool],
        constraint: Constraint | None = None,
    ) -> int:
        if self.failing:
            self.failing = False
            raise ValueError("a step failed")
        return next_token(ids, params, constraint)

    def logprob(self, ids: Sequence[int], params: SamplingParams) -> TokenLogprob | None:
        """Of each token, its place."""
        return None if params.logprobs is None else TokenLogprob(ids[-1], -float(len(ids)), [])


def next_token(ids: Sequence[int], params: SamplingParams, constraint: Constraint | None) -> int:
    assert params.seed is not None
    mixed = (len(ids) * 7919 + ids[-1] * 104729 + sum(ids[-8:]) * 31 + params.seed * (params.temperature > 0)) % 1900
    if constraint is None:
        return EOT if mixed % 31 == 0 else mixed
    allowed = np.flatnonzero(np.unpackbits(mask_of(constraint, VOCAB).view(np.uint8), bitorder="little"))
    token = int(allowed[mixed % len(allowed)])
    assert constraint.accept(token)
    return token


def alone(request: Request) -> Completion:
    """The completion of a request, without any backend."""
    builder, ids, constraint = CompletionBuilder(TOKENIZER, request), list(request.ids), request.constraint()
    while builder.reason is None:
        token = next_token(ids, request.params, constraint)
        builder.push(token)
        if builder.reason is None and len(ids) == CONTEXT:
            builder.reason = "context"
        ids.append(token)
    builder.finish()
    return builder.completion(len(request.ids), 0, {})


def toy_soak(seed: int = 0) -> Soak:
    """A soak of the toy."""
    backend = QuickBackend()

    def fail() -> None:
        backend.failing = True

    return Soak(Engine(backend, TOKENIZER, CONFIG, CONTEXT), TOKENS, alone, fail, seed)
