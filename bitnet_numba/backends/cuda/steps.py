"""What contexts and batches capture as graphs: passes with what follows them, each by the sizes that it was made for.

None of this needs a device to be built, so that a dry run can ask for every launch that may come (see `warmup`).
"""

import numpy as np

from bitnet_numba.backends.cuda.forward import BatchPass, CudaModel, DecodePass, PrefillPass, SharedContexts
from bitnet_numba.backends.cuda.state import SequenceState, padded_size, pages_of
from bitnet_numba.kernels import embedding
from bitnet_numba.kernels.attention.decode import DecodeScratch
from bitnet_numba.kernels.attention.kv_cache import PAGE
from bitnet_numba.kernels.attention.paged_decode import PagedScratch, max_splits_of
from bitnet_numba.kernels.lm_head.gemm import lm_head_gemm, split_words
from bitnet_numba.kernels.lm_head.gemv import lm_head_gemv
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, PinnedArray
from bitnet_numba.kernels.sampling.batched import sample_batch
from bitnet_numba.kernels.sampling.single import SamplerScratch, sample


class LMHead:
    """Final norm and logits of the tokens that a pass has left in the model's buffers, always by the same kernel, so
    that a token's logits are the same bits for every number of tokens."""

    def __init__(self, model: CudaModel, max_tokens: int):
        self._model = model
        self._split = model.device.empty(split_words(model.device, model.weights.lm_head, max_tokens), np.int32)
        self.logits = model.device.empty(max_tokens * model.config.vocab_size, np.float32)  # [max_tokens, vocabulary]

    def launches(self, num_tokens: int) -> list[Launch]:
        """Of the first `num_tokens`."""
        model = self._model
        return lm_head_gemm(
            model.device, model.weights.lm_head, model.buffers.h, model.weights.final_norm, self._split, self.logits,
            num_tokens,
        )  # fmt: skip

    def close(self) -> None:
        """Frees the memory."""
        self._split.close()
        self.logits.close()


class DecodeBuffers:
    """What the decode steps of one sequence need beside the model's buffers; shared by all contexts."""

    def __init__(self, model: CudaModel):
        self.attention = DecodeScratch.allocate(model.device, model.heads)
        self.sampler = SamplerScratch.allocate(model.device)
        self.logits = model.device.zeros(model.config.vocab_size, np.float32)

    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.attention.nbytes + self.sampler.nbytes + self.logits.nbytes


class DecodeSteps:
    """The steps of one sequence. `long`: its context is at least attention.decode.LONG_CONTEXT tokens."""

    def __init__(self, model: CudaModel, buffers: DecodeBuffers, state: SequenceState, ring: DeviceArray | PinnedArray):
        """ring: where the sampler tells the host which tokens it chose (see `sampling.single`)."""
        self._model, self._buffers, self._state, self._ring = model, buffers, state, ring

    def score(self, long: bool) -> list[Launch]:
        """Feeds a token and computes its logits."""
        return [*self.forward(long), self.lm_head(), embedding.advance(self._model.device, self._state.position)]

    def decode(self, long: bool) -> list[Launch]:
        """Feeds a token and samples the next."""
        return [*self.forward(long), self.lm_head(), self.sampler()]

    def choose(self, long: bool) -> list[Launch]:
        """Samples the token after a prompt, whose last token's row a prefill has left in the model's token buffers."""
        return [self.lm_head(), self.sampler()]

    def forward(self, long: bool) -> list[Launch]:
        """The forward pass of a token."""
        return DecodePass(self._model, self._state, self._buffers.attention, long).launches()

    def lm_head(self) -> Launch:
        """Final norm and logits."""
        model = self._model
        return lm_head_gemv(
            model.device, model.weights.lm_head, model.token_buffers.h, model.weights.final_norm, self._buffers.logits
        )

    def sampler(self) -> Launch:
        """Samples from the logits."""
        model, buffers = self._model, self._buffers
        return sample(
            model.device, buffers.logits, model.config.vocab_size, self._state.arrays, buffers.sampler, self._ring
        )


class PrefillSteps:
    """Passes over prompts."""

    def __init__(self, model: CudaModel, state: SequenceState, last: DeviceArray):
        """last: float32 [hidden], where the row whose logits choose the next token is left."""
        self._model, self._state, self._last = model, state, last

    def prefill(self, num_tokens: int, keep_last: bool) -> list[Launch]:
        """A pass of up to so many tokens.

        keep_last: the slot's position stays that of the last token fed, as samplers want it, and slot_positions[0]
        says so; else it becomes that of the next token.
        """
        model, state, b = self._model, self._state, self._model.buffers
        end = embedding.finish_prompt(
            model.device, b.num_real, state.slot_ids, state.position, int(keep_last), b.h, self._last,
            b.slot_positions, model.config.hidden_size,
        )  # fmt: skip
        return [*PrefillPass(model, state, num_tokens).launches(), end]


class BatchSteps:
    """The steps of many sequences."""

    def __init__(self, model: CudaModel, state: SequenceState):
        config, device = model.config, model.device
        self._model, self._state = model, state
        self.max_tokens = padded_size(state.slots)
        tokens = pages_of(state.capacity) * PAGE
        self._scratch = PagedScratch.allocate(device, self.max_tokens, tokens, model.heads)
        self.work_list = device.empty(padded_size(self.max_tokens * max_splits_of(tokens)), np.int32)
        self._lm_head = LMHead(model, self.max_tokens)
        self.last = device.empty(config.hidden_size, np.float32)  # of a prompt: the row that chooses the next token
        self.chosen = device.empty(self.max_tokens, np.int64)

    def decode(self, num_tokens: int, num_blocks: int) -> list[Launch]:
        """Feeds a token of each sequence and samples the next; num_blocks: entries of the work list."""
        contexts = SharedContexts(self.work_list, num_blocks, self._scratch)
        forward = BatchPass(self._model, self._state, num_tokens, contexts).launches()
        return [*forward, *self._lm_head.launches(num_tokens), self._sampler(num_tokens)]

    def choose_first(self) -> list[Launch]:
        """Samples the first token after a prompt from `last`; always by the same kernels."""
        model = self._model
        logits = lm_head_gemv(
            model.device, model.weights.lm_head, self.last, model.weights.final_norm, self._lm_head.logits
        )
        return [logits, self._sampler(1)]

    def _sampler(self, num_tokens: int) -> Launch:
        model = self._model
        return sample_batch(
            model.device, self._lm_head.logits, model.config.vocab_size, self._state.arrays,
            model.buffers.slot_positions, self.chosen, num_tokens,
        )  # fmt: skip

    def close(self) -> None:
        """Frees the memory."""
        for array in (*self._scratch.arrays, self.work_list, self.last, self.chosen):
            array.close()
        self._lm_head.close()
