"""Many sequences that decode together on the GPU, behind the engine's interface (see `bitnet_numba.backend.Batch`)."""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from bitnet_numba.backends.cuda.decode import head_launch
from bitnet_numba.backends.cuda.forward import ForwardPass, LMHead, Model, Prefill, Sharing, product_specs
from bitnet_numba.backends.cuda.state import SequenceState, padded_size, pages_of
from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels import embedding as embed
from bitnet_numba.kernels.attention import paged_decode as attention_batch
from bitnet_numba.kernels.attention import paged_simt as attention_rows
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.attention.parts import HeadShape
from bitnet_numba.kernels.lm_head import gemm_mma as head_many
from bitnet_numba.kernels.lm_head import gemm_wgmma as head_warpgroup
from bitnet_numba.kernels.lm_head import split_norm
from bitnet_numba.kernels.runtime.driver import Event, Graph
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, PinnedArray
from bitnet_numba.kernels.runtime.spec import ArchSpec, KernelSpec
from bitnet_numba.kernels.sampling import parts
from bitnet_numba.kernels.sampling.batched import sampler_many, sampler_many_spec
from bitnet_numba.sampling import SamplingParams

MAX_SEQUENCES = 256


class CudaBatch:
    """Slots and pages on the device. Every call enqueues on the model's stream and returns.

    A step is one graph: a pass of one row a sequence, the head, the sampler. Graphs are captured when first needed, for
    a ladder of numbers of rows and of blocks that their contexts are shared out among.
    """

    page_size = PAGE

    def __init__(self, model: Model, max_sequences: int, capacity: int, pages: int, released: Callable[[int], None]):
        """released: told how many pages there are no more, once closed."""
        self._released = released
        config, _, _, stream, _, _ = model
        self.num_pages, self.max_sequences, self.capacity = pages, max_sequences, capacity
        self._model, self._stream = model, stream
        self._state = SequenceState(config, capacity, max_sequences, pages)
        self._most_rows = padded_size(max_sequences)
        shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        tokens = pages_of(capacity) * PAGE
        self._attention = attention_batch.PagedScratch.allocate(model.device, self._most_rows, tokens, shape)
        self._work = DeviceArray(padded_size(self._most_rows * attention_batch.max_splits_of(tokens)), np.int32)
        self._head = LMHead(model, self._most_rows)
        self._last = DeviceArray(config.hidden_size, np.float32)  # of a prompt's rows
        self._chosen = DeviceArray(self._most_rows, np.int64)
        self._prompts = Prefill(model, self._state, self._last)
        self._steps: dict[tuple[int, int], Graph] = {}
        self._first: Graph | None = None  # head and sampler of a prompt's last row
        self._fed = [0] * max_sequences  # tokens of each slot, those under way included
        self._prompt = [0] * max_sequences  # lengths
        self._rows: list[int] = []  # of the last step
        self._shares: list[int] = []  # blocks of each row of the last step
        self._blocks = 0  # of them together, captured
        uncollected = 2 * (max_sequences + 1)  # calls, at most
        self._results = PinnedArray(uncollected * max_sequences, np.int64)
        self._events = [Event() for _ in range(uncollected)]
        self._pending: deque[tuple[int, list[int]]] = deque()  # which event, and the slots of its results
        self._turn = 0

    def start(self, slot: int, ids: Sequence[int], params: SamplingParams, pages: Sequence[int], computed: int) -> None:
        """A new sequence takes a slot."""
        fits = len(ids) <= len(pages) * PAGE and len(pages) <= self._state.table_stride
        if not 0 <= computed < len(ids) <= self.capacity or not fits:
            raise ValueError(f"{len(ids)} tokens, {computed} of them computed, do not fit {len(pages)} pages")
        self._model.device.activate()
        state, write = self._state, self._model.uploads.write
        write(state.tokens, ids, slot * state.stride)
        write(state.seen, state.seen_bits(ids), slot * state.seen_words)
        write(state.table, pages, slot * state.table_stride)
        write(state.settings, parts.settings(params), slot * parts.SETTINGS)
        write(state.position, [computed], slot)
        self._fed[slot], self._prompt[slot] = computed, len(ids)

    def prefill(self, slot: int, count: int) -> None:
        """Computes the next `count` tokens of a prompt; where that completes it, samples the first token."""
        if not 1 <= count <= self._prompt[slot] - self._fed[slot]:
            raise ValueError(f"{count} tokens are more than slot {slot}'s prompt still has")
        self._model.device.activate()
        self._fed[slot] += count
        done = self._fed[slot] == self._prompt[slot]
        self._prompts.feed(slot, count, keep_last=done)
        self._rows = []  # a pass of a prompt has taken their place
        if done:
            if self._first is None:
                self._first = self._stream.capture(self._choose_first())
            self._first.replay(self._stream)
            self._expect([slot])

    def step(self, slots: Sequence[int]) -> None:
        """Feeds each sequence its last token and samples the next."""
        self._model.device.activate()
        for slot in slots:
            if self._fed[slot] == self.capacity:
                raise ValueError(f"slot {slot} is full")
            self._fed[slot] += 1
        rows, shares = padded_size(len(slots)), [attention_batch.splits_needed(self._fed[slot]) for slot in slots]
        places = [*slots, *[-1] * (rows - len(slots))]
        if places != self._rows:
            self._model.uploads.write(self._state.order, places)
            self._rows = places
        if shares != self._shares:
            work = attention_batch.work_entries(shares)
            self._shares, self._blocks = shares, padded_size(len(work), rows)
            self._model.uploads.write(self._work, work + [-1] * (self._blocks - len(work)))
        self._step_graph(rows, self._blocks).replay(self._stream)
        self._expect(list(slots))

    def _step_graph(self, rows: int, blocks: int) -> Graph:
        if (rows, blocks) not in self._steps:
            sharing = Sharing(self._work, blocks, self._attention)
            launches = ForwardPass(self._model, self._state, rows, sharing).launches
            self._steps[rows, blocks] = self._stream.capture(
                [*launches, *self._head.launches(rows), self._sampler(rows)]
            )
        return self._steps[rows, blocks]

    def _choose_first(self) -> list[Launch]:
        """Head and sampler of a prompt's last row, always by the same kernels."""
        config, weights, device, *_ = self._model
        return [head_launch(config, weights, device, self._last, self._head.logits), self._sampler(1)]

    def _sampler(self, rows: int) -> Launch:
        state = self._state
        return sampler_many(
            self._model.device, self._head.logits, rows, self._model.config.vocab_size, state.settings,
            self._model.flow.where, state.tokens, state.stride, state.seen, state.position, self._chosen,
        )  # fmt: skip

    def _expect(self, slots: list[int]) -> None:
        """Has the results of the pass under way copied to where `collect` finds them."""
        if len(self._pending) == len(self._events):
            raise ValueError(f"{len(self._pending)} results wait to be collected: there is no room for more")
        place = self._turn % len(self._events)
        self._turn += 1
        start = 8 * place * self.max_sequences
        self._stream.download(self._results, start, self._chosen.address, 8 * len(slots))
        self._events[place].record(self._stream)
        self._pending.append((place, slots))

    def collect(self) -> list[tuple[int, int]]:
        """The (slot, token) pairs of the oldest call with results."""
        place, slots = self._pending.popleft()
        self._model.device.activate()
        self._events[place].wait()
        start = place * self.max_sequences
        entries = self._results.host[start : start + len(slots)] & 0xFFFFFFFF
        tokens = np.where(entries >> 31, NO_TOKEN, entries).tolist()
        return list(zip(slots, tokens, strict=True))

    def close(self) -> None:
        """Frees everything."""
        self._model.device.activate()
        self._stream.synchronize()
        self._pending.clear()
        self._prompts.close()
        for graph in (*self._steps.values(), *([self._first] if self._first else [])):
            graph.close()
        for array in (*self._attention.arrays, self._work, self._last, self._chosen):
            array.close()
        self._head.close()
        self._state.close()
        self._results.close()
        self._released(self.num_pages)


def fixed_bytes(config: ModelConfig, max_sequences: int, capacity: int) -> int:
    """Bytes of device memory that a batch takes beside its pages, but for small change."""
    rows = padded_size(max_sequences)
    partials, stats, _ = attention_batch.PagedScratch.sizes(
        rows, pages_of(capacity) * PAGE, HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
    )
    return 4 * (partials + stats + rows * (config.vocab_size + 2 * config.hidden_size + capacity))


def batch_specs(config: ModelConfig, int8_rows: bool, device: ArchSpec, max_sequences: int) -> list[KernelSpec]:
    """Every form that a batch takes beside those of prompts."""
    arch, head_dim, group = device.arch, config.head_dim, config.num_heads // config.num_kv_heads
    sizes = [1 << i for i in range(padded_size(max_sequences).bit_length())]
    if head_warpgroup.serves(arch, int8_rows):
        head = [head_warpgroup.norm_spec(arch, config.hidden_size)]
        head += [head_warpgroup.spec(arch, tile) for tile in sorted({head_warpgroup.plan(rows) for rows in sizes})]
    else:
        head = [split_norm.norm_split_spec(arch, config.hidden_size, int8_rows)]
        tiles = sorted({head_many.tiles_of(rows) for rows in sizes})
        head += [head_many.head_many_spec(arch, config.hidden_size, int8_rows, n) for n in tiles]
    if attention_batch.fits(arch, head_dim):
        threads = {attention_batch.threads_for(head_dim, n, 1) for n in range(8)}
        attention = [attention_batch.paged_decode_spec(arch, head_dim, group, t) for t in sorted(threads)]
    else:
        attention = [attention_rows.paged_simt_spec(arch, head_dim, group)]
    return [
        *product_specs(config, device, sizes),
        embed.embed_many_spec(arch, int8_rows, False),
        *attention,
        *head,
        sampler_many_spec(arch),
    ]
