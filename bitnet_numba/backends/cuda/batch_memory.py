"""What a batch has on the device, and the graphs captured over it: all that can outlive the batch."""

from collections.abc import Callable, Iterator

import numpy as np

from bitnet_numba.backends.cuda.call_clock import CallClock
from bitnet_numba.backends.cuda.extras import NOTHING, Asked, Extras, PromptScorer, Records
from bitnet_numba.backends.cuda.prompts import Prefill
from bitnet_numba.backends.cuda.runtime import Runtime
from bitnet_numba.backends.cuda.state import SequenceState, page_bytes, pages_of, step_size, step_sizes
from bitnet_numba.backends.cuda.steps import BatchSteps
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.attention import paged_decode
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.attention.kv_dtype import KVDtype
from bitnet_numba.kernels.attention.parts import HeadShape
from bitnet_numba.kernels.runtime.driver import Event, Graph
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import PinnedArray


class BatchMemory:
    """State, buffers, results and graphs of a batch of up to `slots` sequences with `pages` pages.

    Graphs hold addresses. So a batch that takes the memory of one before needs to capture nothing again.
    """

    def __init__(self, runtime: Runtime, slots: int, capacity: int, pages: int):
        self.runtime, self.pages = runtime, pages
        model = runtime.model
        self.state = SequenceState(runtime.device, model.config, capacity, slots, pages, model.kv_dtype)
        self.steps = BatchSteps(runtime.model, self.state)
        self.prefill = Prefill(runtime, self.state)
        self._graphs: dict[tuple[object, ...], Graph] = {}  # by what they were captured of
        self._scorer: PromptScorer | None = None
        self.records: Records | None = None  # of the results that are not collected
        max_uncollected = 2 * (slots + 1)  # calls
        self.results = PinnedArray(max_uncollected * slots, np.int64)
        self.events = [Event(timing=False) for _ in range(max_uncollected)]
        self.clock = CallClock(runtime.stream)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.pages * page_bytes(self.runtime.model.config, self.state.kv_dtype)

    def fits(self, slots: int, capacity: int, pages: int) -> bool:
        """Whether a batch of this size can use it."""
        return slots <= self.state.slots and capacity == self.state.capacity and pages <= self.pages

    def extras(self) -> Extras:
        """What requests that ask for more share; allocated by the first, as are `records`."""
        if self.steps.extras is None:
            self.records = Records(len(self.events) * self.state.slots)
            self.steps.extras = Extras(self.runtime.model, self.state, self.steps.max_tokens)
        return self.steps.extras

    def scorer(self) -> PromptScorer:
        """For prompts whose log probabilities are wanted; allocated by the first."""
        if self._scorer is None:
            self._scorer = PromptScorer(self.runtime.model, self.state)
        return self._scorer

    def prepare(self, sequences: int) -> Iterator[bool]:
        """Captures, one after the other, what calls for up to so many sequences will need if these ask for no more than
        tokens; yields True after each."""
        for num_rows in self.prefill.sizes:
            self.prefill.capture(num_rows)
            yield True
        for num_tokens in step_sizes(sequences):
            self.choose_graph(num_tokens, NOTHING)
            yield True
            for num_blocks in self.steps.block_counts(num_tokens):
                self.step_graph(num_tokens, num_blocks, NOTHING)
                yield True

    def step_graph(self, num_tokens: int, num_blocks: int, asked: Asked) -> Graph:
        """See `BatchSteps.decode`."""
        return self._graph("decode", self.steps.decode, num_tokens, num_blocks, asked)

    def feed_graph(self, num_tokens: int, num_blocks: int) -> Graph:
        """See `BatchSteps.feed`."""
        return self._graph("feed", self.steps.feed, num_tokens, num_blocks)

    def draw_graph(self, num_tokens: int, asked: Asked) -> Graph:
        """See `BatchSteps.draw`."""
        return self._graph("draw", self.steps.draw, num_tokens, asked)

    def choose_graph(self, num_tokens: int, asked: Asked) -> Graph:
        """See `BatchSteps.choose`."""
        return self._graph("choose", self.steps.choose, num_tokens, asked)

    def _graph(self, name: str, launches: Callable[..., list[Launch]], *arguments: object) -> Graph:
        """The graph of such launches, which is captured when it is first needed."""
        key = name, *arguments
        if key not in self._graphs:
            self._graphs[key] = self.runtime.stream.capture(launches(*arguments))
        return self._graphs[key]

    def close(self) -> None:
        """Frees everything; no work on it may be under way."""
        self.prefill.close()
        for graph in self._graphs.values():
            graph.close()
        self.steps.close()
        self.state.close()
        self.results.close()
        for more in (self.steps.extras, self.records, self._scorer):
            if more is not None:
                more.close()


def fixed_bytes(config: ModelConfig, slots: int, capacity: int, kv_dtype: KVDtype) -> int:
    """Bytes of device memory that a batch takes beside its pages, except for a few small arrays, graphs and what scores
    prompts; with what requests for more take (see `Extras`), though that is allocated later."""
    num_tokens = step_size(slots)
    shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
    scratch = 4 * sum(paged_decode.PagedScratch.sizes(num_tokens, pages_of(capacity) * PAGE, shape, kv_dtype))
    logits = 2 * config.vocab_size + config.vocab_size // 32  # also edited, and masks
    return scratch + 4 * num_tokens * (logits + 3 * config.hidden_size + capacity)
