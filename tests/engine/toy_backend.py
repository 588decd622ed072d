"""A backend without a model: its logits are a pure function of the tokens so far, and it counts what it computes."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.host_model import mask_of
from bitnet_numba.backends.protocol import NO_TOKEN, NOT_FINITE, CallTimes, Constraint, doubled
from bitnet_numba.config import ModelConfig
from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import BackendError, BitNetError
from bitnet_numba.sampling import TokenLogprob, sample, token_logprobs
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer
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
        self.logits: Callable[[Sequence[int]], NDArray[np.float32]] = toy_logits
        self.page_size = 4
        self.call_tokens, self.granularity, self.part_tokens, self.asynchronous = 1920, 1, 4, True
        self.to_prepare = 0  # calls of a batch's `prepare` that find something to do
        self.uniform = True  # False: what follows a token depends on which tokens were computed as a prompt
        self.bad_token: int | None = None  # in a batch, sequences that hold it have logits of NaN
        self.batches: list[ToyBatch] = []  # all that were ever made

    def new_context(self, capacity: int) -> "ToyContext":
        self.open_contexts += 1
        return ToyContext(self, capacity)

    def new_batch(self, max_sequences: int, capacity: int, tokens: int | None = None) -> "ToyBatch":
        pages = -(-(tokens or max_sequences * capacity) // self.page_size)
        self.batches.append(ToyBatch(self, max_sequences, capacity, pages))
        return self.batches[-1]

    def choose(
        self,
        ids: Sequence[int],
        prompt: int,
        params: SamplingParams,
        stepped: Sequence[bool],
        constraint: Constraint | None = None,
    ) -> int:
        """The token after `ids`, of which the first `prompt` are the prompt. stepped: which were computed by steps."""
        if self.script:
            return self.script[(len(ids) - prompt) % len(self.script)]
        logits = self.logits(ids)
        if not self.uniform:
            logits = np.roll(logits, hash(tuple(stepped)) % 7)
        token = sample(logits, ids, params, prompt, None if constraint is None else mask_of(constraint, VOCAB))
        if constraint is not None:
            assert constraint.accept(token)
        return token

    def logprob(self, ids: Sequence[int], params: SamplingParams) -> TokenLogprob | None:
        """Of the last of `ids`, if the parameters ask for it."""
        if params.logprobs is None or ids[-1] == NO_TOKEN:
            return None
        return self.score(ids, len(ids) - 1, params.logprobs)[0]

    def score(self, ids: Sequence[int], start: int, top: int) -> list[TokenLogprob]:
        """Of ids[start:], each given those before it."""
        rows = np.stack([self.logits(ids[:i]) for i in range(start, len(ids))])
        return token_logprobs(rows, ids[start:], top)

    def free_idle(self) -> None:
        pass

    def memory(self) -> dict[str, int]:
        return {"weights": 123}


class ToyContext:
    def __init__(self, backend: ToyBackend, capacity: int):
        self.backend = backend
        self.capacity = capacity
        self.ids: list[int] = []
        self.last: TokenLogprob | None = None

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

    def decode(self, ids: Sequence[int], params: SamplingParams, constraint: Constraint | None = None) -> Iterator[int]:
        assert params.seed is not None
        self.backend.prefilled.append(len(ids))
        self.feed(ids)
        prompt = list(self.ids)
        chosen: list[int] = []
        room = self.capacity - len(self.ids)
        for given in range(room + 1):
            while len(chosen) <= min(given + self.backend.ahead, room):
                if chosen:
                    self.feed(chosen[-1:])
                length = len(self.ids) - len(chosen)
                stepped = [False] * length + [True] * len(chosen)
                chosen.append(self.backend.choose(self.ids, length, params, stepped, constraint))
            if given == self.backend.fail_after:
                raise ValueError("a step failed")
            self.last = self.backend.logprob([*prompt, *chosen[: given + 1]], params)
            yield chosen[given]

    def logprobs(self) -> TokenLogprob:
        assert self.last is not None
        return self.last

    def score(self, ids: Sequence[int], top: int, first: int = 1) -> list[TokenLogprob]:
        assert 1 <= first < len(ids)
        start = len(self.ids)
        self.backend.prefilled.append(len(ids) - 1)
        self.feed(ids[:-1])
        return self.backend.score([*self.ids, ids[-1]], start + first, top)

    def close(self) -> None:
        self.backend.open_contexts -= 1


@dataclass
class ToySequence:
    ids: list[int]
    prompt: int  # tokens
    given: int  # tokens at the start: the prompt, and what there was of the answer
    params: SamplingParams
    constraint: Constraint | None
    pages: list[int]
    fed: int
    ready: bool  # to be stepped


class ToyBatch:
    """Writes down in its pages which token each place holds, and checks all that the protocol asks of the caller."""

    def __init__(self, backend: ToyBackend, max_sequences: int, capacity: int, num_pages: int):
        self.backend = backend
        self.page_size, self.uniform = backend.page_size, backend.uniform
        self.call_tokens, self.granularity = backend.call_tokens, backend.granularity
        self.part_tokens, self.asynchronous = backend.part_tokens, backend.asynchronous
        self.round_tokens = doubled(max(self.part_tokens, self.granularity), self.call_tokens)
        self.call_times = CallTimes()
        self.to_prepare = backend.to_prepare
        self.max_sequences, self.capacity, self.num_pages = max_sequences, capacity, num_pages
        # The token of each place, and whether a step computed it
        self.places: list[list[tuple[int, bool] | None]] = [[None] * self.page_size for _ in range(num_pages)]
        self.sequences: dict[int, ToySequence] = {}
        self.results: deque[list[tuple[int, int]]] = deque()
        self.rows: deque[list[TokenLogprob | None]] = deque()  # log probabilities of `results`
        self.collected: list[TokenLogprob | None] = []
        self.log: list[str] = []  # the names of the calls
        self.started: list[list[int]] = []  # the prompts in the order of their starts
        self.prefilled: list[int] = []  # tokens of each part of a call
        self.closed = False

    def start(
        self,
        slot: int,
        ids: Sequence[int],
        params: SamplingParams,
        pages: Sequence[int],
        computed: int,
        prompt_length: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        assert not self.closed and 0 <= slot < self.max_sequences and params.seed is not None
        assert len(set(pages)) == len(pages) and len(pages) * self.page_size >= len(ids)
        assert computed % self.page_size == 0 and 0 <= computed < len(ids)
        for page in pages[computed // self.page_size :]:
            self.places[page] = [None] * self.page_size
        assert computed == 0 or params.prompt_logprobs is None
        length = len(ids) if prompt_length is None else prompt_length
        assert 1 <= length <= len(ids)
        ready = length <= computed == len(ids) - 1
        self.sequences[slot] = ToySequence(
            list(ids), length, len(ids), params, constraint, list(pages), computed, ready
        )
        self.log.append("start")
        self.started.append(list(ids))

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        s = self.sequences[slot]
        assert not set(pages) & set(s.pages) and len(s.pages) + len(pages) <= -(-self.capacity // self.page_size)
        for page in pages:
            self.places[page] = [None] * self.page_size
        s.pages += pages

    def prefill(self, parts: Sequence[tuple[int, int]]) -> None:
        assert len({slot for slot, _ in parts}) == len(parts) > 0
        self.log.append("prefill")
        results, rows = [], []
        for slot, count in parts:
            s = self.sequences[slot]
            end = s.fed + count
            assert count >= 1 and end <= s.given and (end == s.given or count % self.part_tokens == 0)
            self.prefilled.append(count)
            self.check(s)
            self.feed(s, count)
            if end == s.given:
                s.ready = True
                results.append((slot, self.next_token(s)))
                rows.append(self.backend.logprob(s.ids, s.params))
        if results:
            self.results.append(results)
            self.rows.append(rows)

    def step(self, slots: Sequence[int]) -> None:
        assert slots and len(set(slots)) == len(slots)
        self.log.append("step")
        results = []
        for slot in slots:
            s = self.sequences[slot]
            assert s.ready and s.fed == len(s.ids) - 1
            if s.fed - s.prompt == self.backend.fail_after:
                raise ValueError("a step failed")
            self.feed(s, 1, True)
            results.append((slot, self.next_token(s)))
        self.results.append(results)
        self.rows.append([self.backend.logprob(s.ids, s.params) for s in map(self.sequences.__getitem__, slots)])
        assert len(self.results) <= 2 * (self.max_sequences + 1)

    def collect(self) -> list[tuple[int, int]]:
        self.log.append("collect")
        self.collected = self.rows.popleft()
        return self.results.popleft()

    def logprobs(self) -> list[TokenLogprob | None]:
        return self.collected

    def prompt_logprobs(self, slot: int) -> list[TokenLogprob]:
        s = self.sequences[slot]
        assert s.params.prompt_logprobs is not None
        return self.backend.score(s.ids[: s.given], 1, s.params.prompt_logprobs) if s.given > 1 else []

    def times(self) -> CallTimes:
        return self.call_times

    def prepare(self) -> bool:
        self.to_prepare -= 1
        return self.to_prepare >= 0

    def failure(self, slot: int) -> BitNetError:
        return BackendError(f"{NOT_FINITE}: slot {slot} has a bad token")

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    def feed(self, s: ToySequence, count: int, step: bool = False) -> None:
        for position in range(s.fed, s.fed + count):
            assert position < self.capacity
            page, place = s.pages[position // self.page_size], position % self.page_size
            assert self.places[page][place] is None, "a place was written twice"
            self.places[page][place] = s.ids[position], step
        s.fed += count
        self.check(s)

    def check(self, s: ToySequence) -> None:
        tokens = [held[0] if held else None for page in s.pages for held in self.places[page]]
        assert tokens[: s.fed] == s.ids[: s.fed], "another sequence wrote into these pages"

    def next_token(self, s: ToySequence) -> int:
        bad = self.backend.bad_token in s.ids
        stepped = [held[1] for page in s.pages for held in self.places[page] if held][: s.fed]
        s.ids.append(NO_TOKEN if bad else self.backend.choose(s.ids, s.prompt, s.params, stepped, s.constraint))
        return s.ids[-1]


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
