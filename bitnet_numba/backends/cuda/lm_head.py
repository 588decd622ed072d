"""Logits of several tokens."""

import numpy as np

from bitnet_numba.backends.cuda.forward import CudaModel
from bitnet_numba.kernels.lm_head.gemm import lm_head_gemm, split_words
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray


class LMHead:
    """Final norm and logits of several tokens, always by the same kernel, so that a token's logits are the same bits
    for every number of tokens."""

    def __init__(self, model: CudaModel, max_tokens: int):
        self._model = model
        self._split = model.device.empty(split_words(model.device, model.weights.lm_head, max_tokens), np.int32)
        self.logits = model.device.empty(max_tokens * model.config.vocab_size, np.float32)  # [max_tokens, vocabulary]

    def launches(self, num_tokens: int, h: DeviceArray) -> list[Launch]:
        """Of the first `num_tokens` rows of h, float32 [at least num_tokens, hidden]."""
        model = self._model
        return lm_head_gemm(
            model.device, model.weights.lm_head, h, model.weights.final_norm, self._split, self.logits, num_tokens
        )

    def close(self) -> None:
        """Frees the memory."""
        self._split.close()
        self.logits.close()
