"""What contexts and batches capture as graphs: passes with what follows them, each by the sizes that it was made for.

None of this needs a device to be built, so that a dry run can ask for every launch that may come (see `warmup`).
"""

import numpy as np

from bitnet_numba.backends.cuda.extras import NOTHING, Asked, Extras
from bitnet_numba.backends.cuda.forward import BatchPass, CudaModel, DecodePass, SharedContexts
from bitnet_numba.backends.cuda.lm_head import LMHead, one_token
from bitnet_numba.backends.cuda.state import SequenceState, padded_size, padded_sizes, pages_of, step_size
from bitnet_numba.kernels import embedding
from bitnet_numba.kernels.attention.decode import DecodeScratch
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.attention.paged_decode import (
    MAX_SPLITS,
    MIN_SPLIT_TOKENS,
    PagedScratch,
    fits,
    max_splits_of,
    work_entries,
)
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, PinnedArray
from bitnet_numba.kernels.sampling import single
from bitnet_numba.kernels.sampling.batched import sample_batch
from bitnet_numba.kernels.sampling.single import SamplerScratch, sample


class DecodeBuffers:
    """What the decode steps of one sequence need beside the model's buffers; shared by all contexts."""

    def __init__(self, model: CudaModel):
        self.attention = decode_scratch(model)
        self.sampler = SamplerScratch.allocate(model.device)
        self.logits = model.device.zeros(model.config.vocab_size, np.float32)
        self.last_row = model.device.zeros(1, np.int32)  # of a pass over a prompt: the last token's
        self.last_slot_position = model.device.zeros(2, np.int32)

    def nbytes(self) -> int:
        """Bytes of device memory."""
        attention = self.attention.scratch if isinstance(self.attention, SharedContexts) else self.attention
        return attention.nbytes + self.sampler.nbytes + self.logits.nbytes


def decode_scratch(model: CudaModel) -> DecodeScratch | SharedContexts:
    """What attention of one sequence's tokens takes: float8 has no kernel of its own for that, but the batch's."""
    device, shape, dtype = model.device, model.heads, model.kv_dtype
    if dtype != "float8" or not fits(device.arch, shape.head_dim, dtype):
        return DecodeScratch.allocate(device, shape)
    work_list = device.array(np.array(work_entries([MAX_SPLITS]), np.int32))  # those without work leave at once
    scratch = PagedScratch.allocate(device, 1, MAX_SPLITS * MIN_SPLIT_TOKENS, shape, dtype)  # for any context
    return SharedContexts(work_list, MAX_SPLITS, scratch)


class DecodeSteps:
    """The steps of one sequence. `long`: its context is at least attention.decode.LONG_CONTEXT tokens."""

    def __init__(self, model: CudaModel, buffers: DecodeBuffers, state: SequenceState, ring: DeviceArray | PinnedArray):
        """ring: where the sampler tells the host which tokens it chose (see `sampling.single`)."""
        self._model, self._buffers, self._state, self._ring = model, buffers, state, ring
        self.extras: Extras | None = None  # of requests that ask for more; set before the first of them

    def score(self, long: bool) -> list[Launch]:
        """Feeds a token and computes its logits."""
        return [*self.feed(long), embedding.advance(self._model.device, self._state.position)]

    def decode(self, long: bool, asked: Asked = NOTHING) -> list[Launch]:
        """Feeds a token and samples the next; asked: of what `extras` adds."""
        return [*self.feed(long), *self.draw(long, asked)]

    def feed(self, long: bool) -> list[Launch]:
        """The first part of `decode`, up to the logits."""
        return [*self.forward(long), *self.lm_head()]

    def draw(self, long: bool, asked: Asked = NOTHING) -> list[Launch]:
        """The second part of `decode`; `long` makes no difference."""
        return self.sampler(asked)

    def choose(self, long: bool, asked: Asked = NOTHING) -> list[Launch]:
        """Samples the token after a prompt, from row `last_row` of the pass before."""
        model, buffers, b = self._model, self._buffers, self._model.buffers
        last = embedding.gather_last(
            model.device, buffers.last_row, b.h, b.slot_positions, model.token_buffers.h, buffers.last_slot_position,
            1, model.config.hidden_size,
        )  # fmt: skip
        return [last, *self.lm_head(), *self.sampler(asked)]

    def forward(self, long: bool) -> list[Launch]:
        """The forward pass of a token."""
        return DecodePass(self._model, self._state, self._buffers.attention, long).launches()

    def lm_head(self) -> list[Launch]:
        """Final norm and logits."""
        return one_token(self._model, self._buffers.logits)

    def sampler(self, asked: Asked = NOTHING) -> list[Launch]:
        """Samples from the logits."""
        model, buffers, state = self._model, self._buffers, self._state

        def sample_from(logits: DeviceArray) -> Launch:
            device, vocab, ring = model.device, model.config.vocab_size, self._ring
            if not single.fits(device.num_sms, vocab):
                return sample_batch(device, logits, vocab, state.arrays, state.slot_position, ring, 1, ring.size)
            return sample(device, logits, vocab, state.arrays, buffers.sampler, ring)

        if self.extras is None:
            return [sample_from(buffers.logits)]
        # The sampler moves the state's position on, which is then the chosen token's.
        return self.extras.around(sample_from, asked, buffers.logits, state.slot_position, ahead=0, num_rows=1)


class BatchSteps:
    """The steps of many sequences."""

    def __init__(self, model: CudaModel, state: SequenceState):
        config, device = model.config, model.device
        self._model, self._state = model, state
        self.max_tokens = step_size(state.slots)
        tokens = pages_of(state.capacity) * PAGE
        self._scratch = PagedScratch.allocate(device, self.max_tokens, tokens, model.heads, model.kv_dtype)
        self._max_splits = max_splits_of(tokens)
        self.work_list = device.empty(padded_size(self.max_tokens * self._max_splits), np.int32)
        self._lm_head = LMHead(model, self.max_tokens)
        # Of prompts that end: rows of the pass, and what is copied of them.
        self.last_rows = device.empty(self.max_tokens, np.int32)
        self._last = device.empty(self.max_tokens * config.hidden_size, np.float32)
        self._last_slot_positions = device.empty(2 * self.max_tokens, np.int32)
        self.chosen = device.empty(self.max_tokens, np.int64)
        self.extras: Extras | None = None  # of requests that ask for more; set before the first of them

    def block_counts(self, num_tokens: int) -> list[int]:
        """What the number of blocks that contexts are shared out among is padded to, in steps of so many tokens."""
        return padded_sizes(padded_size(num_tokens), padded_size(num_tokens * self._max_splits))

    def decode(self, num_tokens: int, num_blocks: int, asked: Asked = NOTHING) -> list[Launch]:
        """Feeds a token of each sequence and samples the next; num_blocks: entries of the work list; asked: of what
        `extras` adds."""
        return [*self.feed(num_tokens, num_blocks), *self.draw(num_tokens, asked)]

    def feed(self, num_tokens: int, num_blocks: int) -> list[Launch]:
        """The first part of `decode`, up to the logits."""
        forward = BatchPass(self._model, self._state, num_tokens, self.contexts(num_blocks)).launches()
        return [*forward, *self._lm_head.launches(num_tokens, self._model.buffers.h)]

    def contexts(self, num_blocks: int) -> SharedContexts:
        """How a step's contexts are shared out among so many blocks."""
        return SharedContexts(self.work_list, num_blocks, self._scratch)

    def draw(self, num_tokens: int, asked: Asked) -> list[Launch]:
        """The second part of `decode`."""
        return self._sampler(num_tokens, self._model.buffers.slot_positions, asked)

    def choose(self, num_tokens: int, asked: Asked = NOTHING) -> list[Launch]:
        """Samples the tokens after prompts that the pass before has completed, from its rows `last_rows` (-1: none)."""
        model, b = self._model, self._model.buffers
        last = embedding.gather_last(
            model.device, self.last_rows, b.h, b.slot_positions, self._last, self._last_slot_positions, num_tokens,
            model.config.hidden_size,
        )  # fmt: skip
        head = self._lm_head.launches(num_tokens, self._last)
        return [last, *head, *self._sampler(num_tokens, self._last_slot_positions, asked)]

    def _sampler(self, num_tokens: int, slot_positions: DeviceArray, asked: Asked) -> list[Launch]:
        model, head = self._model, self._lm_head

        def sample_from(logits: DeviceArray) -> Launch:
            return sample_batch(
                model.device, logits, model.config.vocab_size, self._state.arrays, slot_positions, self.chosen,
                num_tokens,
            )  # fmt: skip

        if self.extras is None:
            return [sample_from(head.logits)]
        return self.extras.around(sample_from, asked, head.logits, slot_positions, 1, num_tokens)

    def close(self) -> None:
        """Frees the memory."""
        arrays = self.work_list, self.last_rows, self._last, self._last_slot_positions, self.chosen
        for array in (*self._scratch.arrays, *arrays):
            array.close()
        self._lm_head.close()
