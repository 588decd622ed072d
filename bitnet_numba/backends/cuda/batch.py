"""Many sequences that decode together on the GPU, behind the engine's interface (see `backends.protocol.Batch`)."""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from bitnet_numba.backends.cuda.batch_memory import BatchMemory
from bitnet_numba.backends.cuda.context import refuse_extras
from bitnet_numba.backends.cuda.prompts import PromptPart
from bitnet_numba.backends.cuda.state import padded_size
from bitnet_numba.backends.protocol import NO_TOKEN, NOT_FINITE
from bitnet_numba.kernels.attention import paged_decode
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.sampling.parts import SETTINGS, pack_settings
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams


class CudaBatch:
    """Slots and pages on the device. Every call enqueues on the model's stream and returns.

    A step is one graph: a forward pass of one token a sequence, the LM head, the sampler. Graphs are captured when
    first needed, for powers of two of sequences and of CTAs that their contexts are shared out among.
    """

    page_size = PAGE
    uniform = False  # prompts and steps have different kernels, which round differently

    def __init__(self, memory: BatchMemory, max_sequences: int, pages: int, on_close: Callable[[BatchMemory], None]):
        """memory: has at least these slots and pages. on_close: is given it on close, when no work is under way."""
        self.num_pages, self.max_sequences, self.capacity = pages, max_sequences, memory.state.capacity
        self._memory, self._on_close = memory, on_close
        self._runtime, self._state = memory.runtime, memory.state
        # Of each slot: tokens, those under way included; tokens that it was started with; pages
        self._num_fed, self._num_given, self._num_pages = (np.zeros(max_sequences, np.int64) for _ in range(3))
        self._slot_ids: list[int] = []  # of the last step
        self._splits: list[int] = []  # CTAs of each sequence of the last step
        self._num_blocks = 0  # of them together, as captured
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
        self._num_fed[slot], self._num_given[slot], self._num_pages[slot] = computed, len(ids), len(pages)

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        """Adds pages to a slot's row of the block table, for calls that are enqueued from now on."""
        held, stride = int(self._num_pages[slot]), self._state.block_table_stride
        if held + len(pages) > stride:
            raise ValueError(f"slot {slot} has {held} pages: {len(pages)} more are beyond its capacity")
        self._runtime.device.activate()
        self._runtime.uploads.write(self._state.block_table, pages, slot * stride + held)
        self._num_pages[slot] += len(pages)

    def prefill(self, parts: Sequence[tuple[int, int]]) -> None:
        """Computes the next tokens of prompts, together; samples the first token of those that are then complete."""
        for slot, count in parts:
            if not 1 <= count <= self._num_given[slot] - self._num_fed[slot]:
                raise ValueError(f"{count} tokens are more than slot {slot}'s prompt still has")
        self._runtime.device.activate()
        passes = self._memory.prefill.feed([PromptPart(slot, int(self._num_fed[slot]), count) for slot, count in parts])
        for slot, count in parts:
            self._num_fed[slot] += count
        completed: list[int] = []
        for ends in passes:
            rows = {parts[i][0]: row for i, row in ends if self._complete(parts[i][0])}
            if rows:
                self._choose(list(rows.values()), len(completed))
                completed += rows
        if completed:
            self._expect(completed)

    def step(self, slots: Sequence[int]) -> None:
        """Feeds each sequence its last token and samples the next."""
        self._runtime.device.activate()
        places = np.asarray(slots)
        if (self._num_fed[places] == self.capacity).any():
            raise ValueError(f"a slot of {list(slots)} is full")
        if (self._num_fed[places] == self._num_pages[places] * PAGE).any():
            raise ValueError(f"a slot of {list(slots)} has no page for its next token")
        self._num_fed[places] += 1
        num_tokens = padded_size(len(slots))
        splits = paged_decode.splits_needed(self._num_fed[places]).tolist()
        slot_ids = [*slots, *[-1] * (num_tokens - len(slots))]
        write = self._runtime.uploads.write
        if slot_ids != self._slot_ids:
            write(self._state.slot_ids, slot_ids)
            self._slot_ids = slot_ids
        if splits != self._splits:
            work_list = paged_decode.work_entries(splits)
            self._splits, self._num_blocks = splits, padded_size(len(work_list), num_tokens)
            write(self._memory.steps.work_list, work_list + [-1] * (self._num_blocks - len(work_list)))
        self._memory.step_graph(num_tokens, self._num_blocks).replay(self._runtime.stream)
        self._download(len(slots), 0)
        self._expect(list(slots))

    def collect(self) -> list[tuple[int, int]]:
        """The (slot, token) pairs of the oldest call with results."""
        place, slots = self._pending.popleft()
        self._runtime.device.activate()
        self._memory.events[place].wait()
        start = place * self._state.slots
        entries = self._memory.results.host[start : start + len(slots)] & 0xFFFFFFFF
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
        """Gives the memory back."""
        self._runtime.device.activate()
        self._runtime.stream.synchronize()
        self._pending.clear()
        self._on_close(self._memory)

    def _complete(self, slot: int) -> bool:
        return bool(self._num_fed[slot] == self._num_given[slot])

    def _choose(self, rows: list[int], before: int) -> None:
        """Samples from rows of the pass just enqueued; before: results that this call has already."""
        num_tokens = padded_size(len(rows))
        self._runtime.uploads.write(self._memory.steps.last_rows, rows + [-1] * (num_tokens - len(rows)))
        self._memory.choose_graph(num_tokens).replay(self._runtime.stream)
        self._download(len(rows), before)

    def _place(self) -> int:
        """Which event and results the call under way takes."""
        return self._num_calls % len(self._memory.events)

    def _download(self, count: int, before: int) -> None:
        """Enqueues the copy of a sampler's results to where `collect` finds them."""
        if len(self._pending) == len(self._memory.events):
            raise ValueError(f"{len(self._pending)} results wait to be collected: there is no room for more")
        start = 8 * (self._place() * self._state.slots + before)
        self._runtime.stream.download(self._memory.results, start, self._memory.steps.chosen.address, 8 * count)

    def _expect(self, slots: list[int]) -> None:
        """Notes the results of a call, whose copies are enqueued."""
        place = self._place()
        self._memory.events[place].record(self._runtime.stream)
        self._pending.append((place, slots))
        self._num_calls += 1
