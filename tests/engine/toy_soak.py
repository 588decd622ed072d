"""A toy backend that is quick enough for a million events: its tokens are a plain function of those before them."""

from collections.abc import Sequence

from bitnet_numba.engine.completion import Completion, CompletionBuilder
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.request import Request
from bitnet_numba.sampling_params import SamplingParams
from tests.engine.soak import Soak
from tests.engine.toy_backend import CONFIG, TOKENIZER, ToyBackend

CONTEXT, TOKENS, EOT = 96, 112, 1999


class QuickBackend(ToyBackend):
    """`failing`: the next step fails."""

    failing = False

    def choose(self, ids: Sequence[int], prompt: int, params: SamplingParams, stepped: Sequence[bool]) -> int:
        if self.failing:
            self.failing = False
            raise ValueError("a step failed")
        return next_token(ids, params)


def next_token(ids: Sequence[int], params: SamplingParams) -> int:
    assert params.seed is not None
    mixed = (len(ids) * 7919 + ids[-1] * 104729 + sum(ids[-8:]) * 31 + params.seed * (params.temperature > 0)) % 1900
    return EOT if mixed % 31 == 0 else mixed


def alone(request: Request) -> Completion:
    """The completion of a request, without any backend."""
    builder, ids = CompletionBuilder(TOKENIZER, request), list(request.ids)
    while builder.reason is None:
        token = next_token(ids, request.params)
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
