"""Many sequences that decode together on the GPU, behind the engine's interface (see `backends.protocol.Batch`)."""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from bitnet_numba.backends.cuda.context import Prefill, Runtime, refuse_extras
from bitnet_numba.backends.cuda.state import SequenceState, padded_size, pages_of
from bitnet_numba.backends.cuda.steps import BatchSteps
from bitnet_numba.backends.protocol import NO_TOKEN, NOT_FINITE
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.attention import paged_decode
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.attention.parts import HeadShape
from bitnet_numba.kernels.runtime.driver import Event, Graph
from bitnet_numba.kernels.runtime.memory import PinnedArray
from bitnet_numba.kernels.sampling.parts import SETTINGS, pack_settings
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams

MAX_SEQUENCES = 256


class CudaBatch:
    """Slots and pages on the device. Every call enqueues on the model's stream and returns.

    A step is one graph: a forward pass of one token a sequence, the LM head, the sampler. Graphs are captured when
    first needed, for powers of two of sequences and of CTAs that their contexts are shared out among.
    """

    page_size = PAGE
    uniform = False  # prompts and steps have different kernels, which round differently

    def __init__(
        self, runtime: Runtime, max_sequences: int, capacity: int, pages: int, on_close: Callable[[int], None]
    ):
        """on_close: called on close with the number of pages freed."""
        self.num_pages, self.max_sequences, self.capacity = pages, max_sequences, capacity
        self._runtime, self._on_close = runtime, on_close
        self._state = SequenceState(runtime.device, runtime.model.config, capacity, max_sequences, pages)
        self._steps = BatchSteps(runtime.model, self._state)
        self._prefill = Prefill(runtime, self._state, self._steps.last)
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._choose_first: Graph | None = None
        self._num_fed = [0] * max_sequences  # tokens of each slot, those under way included
        self._num_known = [0] * max_sequences  # tokens that each slot was started with
        self._num_pages = [0] * max_sequences
        self._slot_ids: list[int] = []  # of the last step
        self._splits: list[int] = []  # CTAs of each sequence of the last step
        self._num_blocks = 0  # of them together, as captured
        max_uncollected = 2 * (max_sequences + 1)  # calls
        self._results = PinnedArray(max_uncollected * max_sequences, np.int64)
        self._events = [Event() for _ in range(max_uncollected)]
        self._pending: deque[tuple[int, list[int]]] = deque()  # which event, and the slots of its results
        self._num_calls = 0  # with results

    def start(
        self,
        slot: int,
        ids: Sequence[int],
        params: SamplingParams,
        pages: Sequence[int],
        computed: int,
        prompt_length: int | None = None,
    ) -> None:
        """A new sequence takes a slot."""
        refuse_extras(params)
        fits = len(ids) <= len(pages) * PAGE and len(pages) <= self._state.block_table_stride
        if not 0 <= computed < len(ids) <= self.capacity or not fits:
            raise ValueError(f"{len(ids)} tokens, {computed} of them computed, do not fit {len(pages)} pages")
        self._runtime.device.activate()
        state, write = self._state, self._runtime.uploads.write
        write(state.tokens, ids, slot * state.tokens_stride)
        write(state.seen, state.seen_bits(ids), slot * state.seen_stride)
        write(state.block_table, pages, slot * state.block_table_stride)
        write(state.settings, pack_settings(params), slot * SETTINGS)
        write(state.position, [computed], slot)
        self._num_fed[slot], self._num_known[slot], self._num_pages[slot] = computed, len(ids), len(pages)

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        """Adds pages to a slot's row of the block table, for calls that are enqueued from now on."""
        held = self._num_pages[slot]
        if held + len(pages) > self._state.block_table_stride:
            raise ValueError(f"slot {slot} has {held} pages: {len(pages)} more are beyond its capacity")
        self._runtime.device.activate()
        self._runtime.uploads.write(
            self._state.block_table, pages, slot * self._state.block_table_stride + held
        )  # fmt: skip
        self._num_pages[slot] = held + len(pages)

    def prefill(self, slot: int, count: int) -> None:
        """Computes the next `count` tokens of a prompt; where that completes it, samples the first token."""
        if not 1 <= count <= self._num_known[slot] - self._num_fed[slot]:
            raise ValueError(f"{count} tokens are more than slot {slot}'s prompt still has")
        self._runtime.device.activate()
        self._num_fed[slot] += count
        done = self._num_fed[slot] == self._num_known[slot]
        self._prefill.feed(slot, count, keep_last=done)
        self._slot_ids = []  # the prompt's slot has taken their place
        if done:
            if self._choose_first is None:
                self._choose_first = self._runtime.stream.capture(self._steps.choose_first())
            self._choose_first.replay(self._runtime.stream)
            self._expect([slot])

    def step(self, slots: Sequence[int]) -> None:
        """Feeds each sequence its last token and samples the next."""
        self._runtime.device.activate()
        for slot in slots:
            if self._num_fed[slot] == self.capacity:
                raise ValueError(f"slot {slot} is full")
            if self._num_fed[slot] == self._num_pages[slot] * PAGE:
                raise ValueError(f"slot {slot} has no page for token {self._num_fed[slot]}")
            self._num_fed[slot] += 1
        num_tokens = padded_size(len(slots))
        splits = [paged_decode.splits_needed(self._num_fed[slot]) for slot in slots]
        slot_ids = [*slots, *[-1] * (num_tokens - len(slots))]
        write = self._runtime.uploads.write
        if slot_ids != self._slot_ids:
            write(self._state.slot_ids, slot_ids)
            self._slot_ids = slot_ids
        if splits != self._splits:
            work_list = paged_decode.work_entries(splits)
            self._splits, self._num_blocks = splits, padded_size(len(work_list), num_tokens)
            write(self._steps.work_list, work_list + [-1] * (self._num_blocks - len(work_list)))
        key = num_tokens, self._num_blocks
        if key not in self._graphs:
            self._graphs[key] = self._runtime.stream.capture(self._steps.decode(*key))
        self._graphs[key].replay(self._runtime.stream)
        self._expect(list(slots))

    def _expect(self, slots: list[int]) -> None:
        """Enqueues the copy of this pass's results to where `collect` finds them."""
        if len(self._pending) == len(self._events):
            raise ValueError(f"{len(self._pending)} results wait to be collected: there is no room for more")
        place = self._num_calls % len(self._events)
        self._num_calls += 1
        start = 8 * place * self.max_sequences
        self._runtime.stream.download(self._results, start, self._steps.chosen.address, 8 * len(slots))
        self._events[place].record(self._runtime.stream)
        self._pending.append((place, slots))

    def collect(self) -> list[tuple[int, int]]:
        """The (slot, token) pairs of the oldest call with results."""
        place, slots = self._pending.popleft()
        self._runtime.device.activate()
        self._events[place].wait()
        start = place * self.max_sequences
        entries = self._results.host[start : start + len(slots)] & 0xFFFFFFFF
        tokens = np.where(entries >> 31, NO_TOKEN, entries).tolist()
        return list(zip(slots, tokens, strict=True))

    def logprobs(self) -> list[TokenLogprob | None]:
        """Refused at the start."""
        raise NotImplementedError

    def prompt_logprobs(self, slot: int) -> list[TokenLogprob]:
        """Refused at the start."""
        raise NotImplementedError

    def failure(self, slot: int) -> str:
        """Why a sequence got NO_TOKEN: nothing else makes the sampler return it."""
        return f"{NOT_FINITE}: logits hold NaN"

    def close(self) -> None:
        """Frees everything."""
        self._runtime.device.activate()
        self._runtime.stream.synchronize()
        self._pending.clear()
        self._prefill.close()
        for graph in (*self._graphs.values(), *([self._choose_first] if self._choose_first else [])):
            graph.close()
        self._steps.close()
        self._state.close()
        self._results.close()
        self._on_close(self.num_pages)


def fixed_bytes(config: ModelConfig, max_sequences: int, capacity: int) -> int:
    """Bytes of device memory that a batch takes beside its pages, except for a few small arrays."""
    num_tokens = padded_size(max_sequences)
    shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
    scratch = 4 * sum(paged_decode.PagedScratch.sizes(num_tokens, pages_of(capacity) * PAGE, shape))
    return scratch + 4 * num_tokens * (config.vocab_size + 2 * config.hidden_size + capacity)
