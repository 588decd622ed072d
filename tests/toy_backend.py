"""A backend without a model: its logits are a pure function of the tokens so far, and it counts what it computes."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.config import ModelConfig
from bitnet_numba.engine import Engine
from bitnet_numba.sampling import SamplingParams, sample
from bitnet_numba.tokenizer import Tokenizer
from tests.conftest import GOLDEN

VOCAB = 2000
TOKENIZER = Tokenizer.open(GOLDEN / "tokenizer", VOCAB)
CONFIG = ModelConfig(VOCAB, 64, 64, 1, 1, 1, 64, 4096, 1e-5, 1e4, "relu2", sub_norms=True, tied=True)


class ToyBackend:
    """`script`: the tokens that every answer repeats; without one, tokens are chosen from the logits.

    `ahead`: by how many steps `ids` runs ahead of the tokens handed out, as with a backend that works asynchronously.
    """

    name = "toy"

    def __init__(self, script: Sequence[int] = (), ahead: int = 0):
        self.script = list(script)
        self.ahead = ahead
        self.prefilled: list[int] = []  # tokens computed for each prompt
        self.fail_after: int | None = None  # tokens of an answer before a step fails
        self.open_contexts = 0

    def new_context(self, capacity: int) -> "ToyContext":
        self.open_contexts += 1
        return ToyContext(self, capacity)

    def memory(self) -> dict[str, int]:
        return {"weights": 123}


class ToyContext:
    def __init__(self, backend: ToyBackend, capacity: int):
        self.backend = backend
        self.capacity = capacity
        self.ids: list[int] = []

    def truncate(self, length: int) -> None:
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot cut {len(self.ids)} tokens to {length}")
        del self.ids[length:]

    def feed(self, ids: Sequence[int]) -> None:
        assert 1 <= len(ids) <= self.capacity - len(self.ids), "the engine fed more than fits, or nothing"
        assert all(type(i) is int for i in ids)
        self.ids += ids

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        start = len(self.ids)
        self.feed(ids)
        return np.stack([toy_logits(self.ids[: i + 1]) for i in range(start, len(self.ids))])

    def decode(self, ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        assert params.seed is not None
        self.backend.prefilled.append(len(ids))
        self.feed(ids)
        chosen: list[int] = []
        room = self.capacity - len(self.ids)
        for given in range(room + 1):
            while len(chosen) <= min(given + self.backend.ahead, room):
                if chosen:
                    self.feed(chosen[-1:])
                if script := self.backend.script:
                    chosen.append(script[len(chosen) % len(script)])
                else:
                    chosen.append(sample(toy_logits(self.ids), self.ids, params))
            if given == self.backend.fail_after:
                raise ValueError("a step failed")
            yield chosen[given]

    def close(self) -> None:
        self.backend.open_contexts -= 1


def toy_logits(ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits after some tokens, float32 [VOCAB]: random, but the same for the same tokens."""
    rng = np.random.default_rng([len(ids), *ids[-3:]])
    return (rng.normal(size=VOCAB) * 2).astype(np.float32)


def toy_engine(script: Sequence[int] = (), context: int = 256, ahead: int = 0) -> tuple[Engine, ToyBackend]:
    """An engine over a toy backend, with the golden tokenizer."""
    backend = ToyBackend(script, ahead)
    return Engine(backend, TOKENIZER, CONFIG, context), backend


def tokens_of(text: str) -> list[int]:
    """The ids of a text, without bos."""
    return TOKENIZER.encode(text, add_bos=False)
