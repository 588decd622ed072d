"""Prompts on the GPU: their tokens go through the model in passes, those of several prompts together.

    rows of a pass    | prompt a: 0 .. 99 | - | prompt b: 0 .. 63 | prompt c: 0 .. |    slot and position of each row:
                      0                   ^   128                 192                   `slot_positions`; slot -1: none

Attention takes a prompt's tokens in blocks, so each prompt begins at a multiple of a block's rows (see
`prefill.block_tokens`). The ternary products take all rows alike.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.backends.cuda.call_clock import CallClock
from bitnet_numba.backends.cuda.forward import MAX_TOKENS, PrefillPass
from bitnet_numba.backends.cuda.runtime import Runtime
from bitnet_numba.backends.cuda.state import SequenceState, padded_size, padded_sizes
from bitnet_numba.kernels.attention import prefill
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.runtime.driver import Graph
from bitnet_numba.kernels.runtime.launch import Launch

MIN_TOKENS = 16  # rows of the smallest captured pass
# Rows of a pass that H200s have time for beside running answers. 512 take 10 % longer: their products of few rows need
# another round of CTAs.
ROUND_TOKENS = 480


class PromptPart(NamedTuple):
    """Tokens start .. start + num_tokens - 1 of the sequence in a slot."""

    slot: int
    start: int
    num_tokens: int


class PromptPass(NamedTuple):
    """What one pass computes."""

    slot_positions: NDArray[np.int32]  # [rows, 2]
    ends: list[tuple[int, int]]  # for each part whose last token is in this pass: (its index, the token's row)


def plan_passes(parts: Sequence[PromptPart], block: int, max_rows: int) -> Iterator[PromptPass]:
    """The passes, of up to `max_rows` rows, that compute all parts in order; each begins at a multiple of `block`."""
    rows = np.full((max_rows, 2), -1, np.int32)
    used = 0
    ends: list[tuple[int, int]] = []
    for i, (slot, start, left) in enumerate(parts):
        while left:
            first = -(-used // block) * block
            if first >= max_rows:
                yield PromptPass(rows[:used].copy(), ends)
                rows[:used], used, ends, first = -1, 0, [], 0
            fit = min(left, max_rows - first)
            rows[first : first + fit, 0] = slot
            rows[first : first + fit, 1] = np.arange(start, start + fit)
            used, start, left = first + fit, start + fit, left - fit
        ends.append((i, used - 1))
    if used:
        yield PromptPass(rows[:used].copy(), ends)


def page_places(slot_positions: NDArray[np.int32], stride: int) -> list[int]:
    """Where in a block table the pages are that the tokens of a pass attend to; slot_positions int32 [rows, 2]."""
    ends: dict[int, int] = {}
    for slot, position in slot_positions.tolist():
        if slot >= 0:
            ends[slot] = max(ends.get(slot, 0), position // PAGE + 1)
    return [slot * stride + page for slot, end in ends.items() for page in range(end)]


def pass_sizes() -> list[int]:
    """What passes are padded to: powers of two, ROUND_TOKENS and MAX_TOKENS."""
    sizes = {*padded_sizes(MIN_TOKENS, MAX_TOKENS), ROUND_TOKENS, MAX_TOKENS}
    return sorted(size for size in sizes if size <= MAX_TOKENS)


def round_tokens(granularity: int) -> Sequence[int]:
    """See `Batch.round_tokens`."""
    few = ROUND_TOKENS if ROUND_TOKENS % granularity == 0 else padded_size(ROUND_TOKENS)
    return [*(size for size in (64, 128, 256) if size % granularity == 0), few, 1024, 2048, MAX_TOKENS]


class Prefill:
    """Feeds prompts of some sequences, by passes that are captured when first needed."""

    def __init__(self, runtime: Runtime, state: SequenceState):
        self._runtime, self._state = runtime, state
        heads = runtime.model.heads
        # Rows of a pass at whose multiples prompts begin
        self.block = prefill.block_tokens(runtime.device.arch, heads.head_dim, heads.group)
        self.sizes = pass_sizes()
        self._graphs: dict[int, Graph] = {}

    def feed(self, parts: Sequence[PromptPart], clock: CallClock | None = None) -> Iterator[list[tuple[int, int]]]:
        """Enqueues the passes over the parts; yields each one's `ends` while its rows are in the model's buffers.

        clock: times each pass but those that are captured here.
        """
        runtime, b = self._runtime, self._runtime.model.buffers
        for slot_positions, ends in plan_passes(parts, self.block, MAX_TOKENS):
            num_rows = len(slot_positions)
            padded = next(size for size in self.sizes if size >= num_rows)
            spare = np.full((padded - num_rows, 2), -1, np.int32)
            runtime.uploads.write(b.slot_positions, np.concatenate([slot_positions, spare]))
            runtime.uploads.write(b.num_real, [num_rows])
            if self._state.expanded is not None:
                places = page_places(slot_positions, self._state.block_table_stride)
                runtime.uploads.write(self._state.expanded.pages, [len(places), *places])
            if padded not in self._graphs:
                self._run_first(padded)
            elif clock is None:
                self._graphs[padded].replay(runtime.stream)
            else:  # with as many tokens as they count, see `Batch.granularity`
                clock.replay(self._graphs[padded], -(-num_rows // self.block) * self.block)
            yield ends

    def capture(self, num_rows: int) -> None:
        """Captures the pass of one of these sizes, where that has not been done."""
        if num_rows not in self._graphs:
            launches = PrefillPass(self._runtime.model, self._state, num_rows).launches()
            self._graphs[num_rows] = self._runtime.stream.capture(launches)

    def _run_first(self, num_rows: int) -> None:
        """Enqueues a pass, and captures it. Its launches take 20 ms to make, so each is enqueued as soon as it is."""
        launches, stream = list[Launch](), self._runtime.stream
        for launch in PrefillPass(self._runtime.model, self._state, num_rows).one_by_one():
            launch(stream.handle)
            launches.append(launch)
        self._graphs[num_rows] = stream.capture(launches)

    def close(self) -> None:
        """Frees the captured passes."""
        for graph in self._graphs.values():
            graph.close()
