"""Many sequences that decode together on the GPU, behind the engine's interface (see `backends.protocol.Batch`)."""

import itertools
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from bitnet_numba.backends.cuda.batch_memory import BatchMemory
from bitnet_numba.backends.cuda.extras import NOTHING, Asked, asked_by
from bitnet_numba.backends.cuda.forward import MAX_TOKENS
from bitnet_numba.backends.cuda.prompts import PromptPart, round_tokens
from bitnet_numba.backends.cuda.state import padded_size, step_size, why_nan
from bitnet_numba.backends.protocol import NO_TOKEN, NOT_FINITE, CallTimes, Constraint
from bitnet_numba.errors import BackendError, BitNetError, RequestError
from bitnet_numba.kernels.attention import paged_decode
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.runtime.driver import Pace
from bitnet_numba.kernels.sampling.parts import SETTINGS, pack_settings
from bitnet_numba.logprobs import NONE, LogprobRows
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams


class _ScoredPrompt:
    """A prompt whose log probabilities are wanted: what there is of them."""

    def __init__(self, ids: Sequence[int], top: int):
        self._ids, self._top = ids, top
        self.logprobs: list[TokenLogprob] = []
        self.failed = False  # a logit was not finite

    def add(self, memory: BatchMemory, slot: int, start: int, count: int) -> None:
        """Adds those of the tokens after `count` tokens from `start` on, which are the rows of the pass just
        enqueued."""
        runtime, tokens = memory.runtime, self._ids[start + 1 : start + 1 + count]
        try:
            self.logprobs += memory.scorer().score(runtime.stream, runtime.uploads.write, slot, 0, tokens, self._top)
        except ValueError:
            self.failed = True


class CudaBatch:
    """Slots and pages on the device. Every call enqueues on the model's stream and returns.

    A step is one graph: a forward pass of one token a sequence, the LM head, the sampler. Graphs are captured when
    first needed or by `prepare`, for some numbers of sequences (see `step_size`) and powers of two of CTAs that their
    contexts are shared out among.
    """

    page_size = PAGE
    asynchronous = True
    call_tokens = MAX_TOKENS  # a pass
    uniform = False  # prompts and steps have different kernels, which round differently

    def __init__(self, memory: BatchMemory, max_sequences: int, pages: int, on_close: Callable[[BatchMemory], None]):
        """memory: has at least these slots and pages. on_close: is given it on close, when no work is under way."""
        self.num_pages, self.max_sequences, self.capacity = pages, max_sequences, memory.state.capacity
        self.granularity = memory.prefill.block
        # Half a page where blocks allow it: a round's tokens are not all whole pages.
        self.part_tokens = min(PAGE, max(PAGE // 2, self.granularity))
        self.round_tokens = round_tokens(self.granularity)
        self._memory, self._on_close = memory, on_close
        self._runtime, self._state = memory.runtime, memory.state
        # Of each slot: tokens, those under way included; tokens that it was started with; pages
        self._num_fed, self._num_given, self._num_pages = (np.zeros(max_sequences, np.int64) for _ in range(3))
        self._slot_ids: list[int] = []  # of the last step
        self._splits: list[int] = []  # CTAs of each sequence of the last step
        self._num_blocks = 0  # of them together, as captured
        # Which event, the slots of its results, and those of them that have failed
        self._pending: deque[tuple[int, list[int], list[int]]] = deque()
        self._params: dict[int, SamplingParams] = {}  # of each slot's sequence
        self._tops: dict[int, int] = {}  # how many of the most likely tokens each of its tokens comes with, or NONE
        self._asking: set[int] = set()  # slots whose sequences ask for more (see `extras`)
        self._scored: dict[int, _ScoredPrompt] = {}  # prompts whose log probabilities are wanted, by slot
        self._constraints: dict[int, Constraint] = {}  # of slots whose sequences have one
        self._failures: dict[int, RequestError] = {}  # why, of slots whose constraints cannot be followed any more
        # Of calls whose tokens constraints wait for: which event; rows and their constraints
        self._untold: deque[tuple[int, list[tuple[int, Constraint]]]] = deque()
        self._pace = Pace()
        # Since the last call with results: about how many pages of prompts, and how large a step
        self._enqueued: list[int] = []
        self._kinds: dict[int, tuple[int, ...]] = {}  # by event: what was enqueued from the event before to it
        self._collected: tuple[int, list[tuple[int, int]]] = 0, []  # the first place and the results of the last call
        self._num_calls = 0  # with results
        self._preparing = memory.prepare(max_sequences)

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
        """A new sequence takes a slot."""
        fits = len(ids) <= len(pages) * PAGE and len(pages) <= self._state.block_table_stride
        if not 0 <= computed < len(ids) <= self.capacity or not fits:
            raise ValueError(f"{len(ids)} tokens, {computed} of them computed, do not fit {len(pages)} pages")
        self._runtime.device.activate()
        state, write = self._state, self._runtime.uploads.write
        write(state.tokens, ids, slot * state.tokens_stride)
        if params.repetition_penalty != 1.0:  # else no step looks at it
            write(state.seen, state.seen_bits(ids), slot * state.seen_stride)
        write(state.block_table, pages, slot * state.block_table_stride)
        write(state.settings, pack_settings(params), slot * SETTINGS)
        write(state.position, [computed], slot)
        self._num_fed[slot], self._num_given[slot], self._num_pages[slot] = computed, len(ids), len(pages)
        self._params[slot] = params
        self._tops[slot] = (
            NONE if params.logprobs is None else min(params.logprobs, self._runtime.model.config.vocab_size)
        )
        self._asking.discard(slot)
        self._constraints.pop(slot, None)
        self._failures.pop(slot, None)
        if any(asked_by([params], constraint is not None)):
            self._asking.add(slot)
        try:
            if self._memory.steps.extras is not None or slot in self._asking:
                # Of a sequence that asks for nothing, too: others of its steps may.
                length = len(ids) if prompt_length is None else prompt_length
                self._memory.extras().set_slot(write, slot, params, length, constraint is not None)
            if params.prompt_logprobs is not None:
                self._memory.scorer()
        except BackendError as error:  # what it takes is allocated by the first that asks; this one ends alone
            self._asking.discard(slot)
            raise RequestError(f"penalties, bias, a form or log probabilities cannot be computed: {error}") from None
        if constraint is not None:
            self._constraints[slot] = constraint
        self._scored.pop(slot, None)
        if params.prompt_logprobs is not None:
            self._scored[slot] = _ScoredPrompt(ids, params.prompt_logprobs)

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
        completed: list[int] = []
        for _, together in itertools.groupby(parts, lambda part: part if part[0] in self._scored else None):
            self._feed(list(together), completed)
        if completed:
            self._expect(completed)

    def _feed(self, parts: Sequence[tuple[int, int]], completed: list[int]) -> None:
        """Enqueues the passes of some parts; adds the slots whose first tokens are sampled to `completed`."""
        feed = [PromptPart(slot, int(self._num_fed[slot]), count) for slot, count in parts]
        for slot, count in parts:
            self._num_fed[slot] += count
        self._enqueued.append(sum(-(-count // PAGE) for _, count in parts))
        slot, start, left = feed[0]
        for ends in self._memory.prefill.feed(feed, self._memory.clock):
            if slot in self._scored:  # which is fed alone
                count = min(left, MAX_TOKENS)
                self._scored[slot].add(self._memory, slot, start, count)
                start, left = start + count, left - count
            rows = {parts[i][0]: row for i, row in ends if self._complete(parts[i][0])}
            if rows:
                self._choose(list(rows), list(rows.values()), len(completed))
                completed += rows

    def step(self, slots: Sequence[int]) -> None:
        """Feeds each sequence its last token and samples the next."""
        self._runtime.device.activate()
        places = np.asarray(slots)
        if (self._num_fed[places] == self.capacity).any():
            raise ValueError(f"a slot of {list(slots)} is full")
        if (self._num_fed[places] == self._num_pages[places] * PAGE).any():
            raise ValueError(f"a slot of {list(slots)} has no page for its next token")
        self._num_fed[places] += 1
        num_tokens = step_size(len(slots))
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
        self._enqueued += [num_tokens, self._num_blocks]
        asked = self._asked(slots)
        if self._constrained(slots):
            self._memory.feed_graph(num_tokens, self._num_blocks).replay(self._runtime.stream)
            self._upload_masks(slots)  # which waits for the tokens before, while that runs
            self._memory.draw_graph(num_tokens, asked).replay(self._runtime.stream)
        else:
            self._memory.clock.replay(self._memory.step_graph(num_tokens, self._num_blocks, asked))
        self._download(len(slots), 0, asked)
        self._expect(list(slots))

    def collect(self) -> list[tuple[int, int]]:
        """The (slot, token) pairs of the oldest call with results."""
        place, slots, failed_slots = self._pending.popleft()
        self._runtime.device.activate()
        if self._untold and self._untold[0][0] == place:
            self._tell_constraints(1)
        start, tokens = place * self._state.slots, self._tokens(place, len(slots))
        if failed_slots:
            tokens = [NO_TOKEN if slot in failed_slots else token for slot, token in zip(slots, tokens, strict=True)]
        if self._scored:
            failed = [slot in self._scored and self._scored[slot].failed for slot in slots]
            tokens = [NO_TOKEN if bad else token for token, bad in zip(tokens, failed, strict=True)]
        results = list(zip(slots, tokens, strict=True))
        self._collected = start, results
        return results

    def logprobs(self) -> LogprobRows:
        """Of the tokens that the last `collect` returned."""
        first, results = self._collected
        tops = [NONE if token == NO_TOKEN else self._tops[slot] for slot, token in results]
        assert self._memory.records is not None
        return self._memory.records.read(first, [token for _, token in results], tops)

    def prompt_logprobs(self, slot: int) -> list[TokenLogprob]:
        """Of all tokens of a prompt but the first."""
        return self._scored[slot].logprobs

    def times(self) -> CallTimes:
        """Of calls that are done."""
        self._runtime.device.activate()
        return self._memory.clock.times()

    def prepare(self) -> bool:
        """Captures a graph that calls to come may need; False if there are no more. Raises BackendError."""
        self._runtime.device.activate()
        return next(self._preparing, False)

    def failure(self, slot: int) -> BitNetError:
        """Why a sequence got NO_TOKEN: nothing but NaN and infinity makes the sampler return it."""
        return self._failures.get(slot) or BackendError(f"{NOT_FINITE}: {why_nan(self._state.kv_dtype)}")

    def close(self) -> None:
        """Gives the memory back."""
        self._runtime.device.activate()
        self._runtime.stream.synchronize()
        self._pending.clear()
        self._untold.clear()
        self._on_close(self._memory)

    def _asked(self, slots: Sequence[int]) -> Asked:
        """What sequences ask for beside their tokens."""
        asking = self._asking.intersection(slots)
        return asked_by((self._params[slot] for slot in asking), self._constrained(slots)) if asking else NOTHING

    def _constrained(self, slots: Sequence[int]) -> bool:
        """Whether a slot's sequence has a constraint."""
        return bool(self._constraints) and not self._constraints.keys().isdisjoint(slots)

    def _tokens(self, place: int, count: int) -> list[int]:
        """The first tokens of a call's results, once they are there."""
        self._pace.wait(self._memory.events[place], self._kinds.get(place))
        start = place * self._state.slots
        entries = self._memory.results.host[start : start + count] & 0xFFFFFFFF
        return np.where(entries >> 31, NO_TOKEN, entries).tolist()

    def _tell_constraints(self, calls: int) -> None:
        """Tells constraints the tokens of the oldest calls that they wait for."""
        for _ in range(calls):
            place, waiting = self._untold.popleft()
            tokens = self._tokens(place, 1 + waiting[-1][0])
            for row, constraint in waiting:
                if tokens[row] != NO_TOKEN:
                    constraint.accept(tokens[row])

    def _upload_masks(self, slots: Sequence[int]) -> None:
        """Enqueues the masks of a call's rows, after telling the constraints all tokens so far."""
        self._tell_constraints(len(self._untold))
        constraints = [self._constraints.get(slot) for slot in slots]
        failures = self._memory.extras().masks.upload(self._runtime.stream, constraints)
        for row, error in failures.items():
            self._failures[slots[row]] = error
            del self._constraints[slots[row]]

    def _complete(self, slot: int) -> bool:
        return bool(self._num_fed[slot] == self._num_given[slot])

    def _choose(self, slots: list[int], rows: list[int], before: int) -> None:
        """Samples for slots, from rows of the pass just enqueued; before: results that this call has already."""
        num_tokens = step_size(len(rows))
        self._runtime.uploads.write(self._memory.steps.last_rows, rows + [-1] * (num_tokens - len(rows)))
        asked = self._asked(slots)
        if self._constrained(slots):
            self._upload_masks(slots)
        self._memory.choose_graph(num_tokens, asked).replay(self._runtime.stream)
        self._download(len(rows), before, asked)

    def _place(self) -> int:
        """Which event and results the call under way takes."""
        return self._num_calls % len(self._memory.events)

    def _download(self, count: int, before: int, asked: Asked) -> None:
        """Enqueues the copy of a sampler's results to where `collect` finds them."""
        if len(self._pending) == len(self._memory.events):
            raise ValueError(f"{len(self._pending)} results wait to be collected: there is no room for more")
        first, stream = self._place() * self._state.slots + before, self._runtime.stream
        stream.download(self._memory.results, 8 * first, self._memory.steps.chosen.address, 8 * count)
        if asked.logprobs:
            assert self._memory.records is not None
            self._memory.records.download(stream, self._memory.extras(), first, count)

    def _expect(self, slots: list[int]) -> None:
        """Notes the results of a call, whose copies are enqueued."""
        place = self._place()
        self._memory.events[place].record(self._runtime.stream)
        self._kinds[place], self._enqueued = tuple(self._enqueued), []
        self._pending.append((place, slots, [slot for slot in slots if slot in self._failures]))
        if self._constrained(slots):
            constraints = self._constraints
            self._untold.append(
                (place, [(i, constraints[slot]) for i, slot in enumerate(slots) if slot in constraints])
            )
        self._num_calls += 1
