"""Logits of one token, and of several."""

import numpy as np

from bitnet_numba.backends.cuda.forward import CudaModel
from bitnet_numba.backends.cuda.two_planes import two_plane_product
from bitnet_numba.kernels.linear.gemm_groups import gemm_groups
from bitnet_numba.kernels.linear.gemv_groups import gemv_groups
from bitnet_numba.kernels.linear.operands import GroupedActivations, GroupedLinear
from bitnet_numba.kernels.linear.quantize_groups import quantize_groups
from bitnet_numba.kernels.lm_head.gemm import lm_head_gemm, split_words
from bitnet_numba.kernels.lm_head.gemv import lm_head_gemv
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray


def one_token(model: CudaModel, logits: DeviceArray) -> list[Launch]:
    """Final norm and logits of the token in the model's buffers of one; logits: float32 [vocabulary]."""
    head, h, norm = model.weights.lm_head, model.token_buffers.h, model.weights.final_norm
    if isinstance(head, GroupedLinear):
        if model.config.activation_planes == 2:
            return two_plane_product(model.device, head, model.buffers, h, norm, model.buffers.num_max, logits, 1)
        return [gemv_groups(model.device, head, h, logits, norm=norm)]
    return [lm_head_gemv(model.device, head, h, norm, logits)]


class LMHead:
    """Final norm and logits of several tokens, always by the same kernel or the same arithmetic, so that a token's
    logits are the same bits for every number of tokens."""

    def __init__(self, model: CudaModel, max_tokens: int):
        self._model = model
        device, head = model.device, model.weights.lm_head
        self.logits = device.empty(max_tokens * model.config.vocab_size, np.float32)  # [max_tokens, vocabulary]
        self._scratch: DeviceArray | GroupedActivations  # between the two launches
        self._owned: list[DeviceArray] = []
        if isinstance(head, GroupedLinear) and model.config.activation_planes == 2:
            self._scratch = model.buffers.second  # and others of the model's buffers, see `two_plane_product`
        elif isinstance(head, GroupedLinear):
            self._scratch = GroupedActivations.empty(device, max_tokens, head.K)
            self._owned = [self._scratch.q, self._scratch.steps]
        else:
            self._scratch = device.empty(split_words(device, head, max_tokens), np.int32)
            self._owned = [self._scratch]

    def launches(self, num_tokens: int, h: DeviceArray) -> list[Launch]:
        """Of the first `num_tokens` rows of h, float32 [at least num_tokens, hidden]."""
        model, x = self._model, self._scratch
        device, head, norm = model.device, model.weights.lm_head, model.weights.final_norm
        if isinstance(head, GroupedLinear):
            assert isinstance(x, GroupedActivations)
            count = model.buffers.num_max  # all are real
            if model.config.activation_planes == 2:
                return two_plane_product(device, head, model.buffers, h, norm, count, self.logits, num_tokens)
            return [
                quantize_groups(device, h, x, num_tokens, head.K, norm=norm),
                gemm_groups(device, head, x, count, self.logits, num_tokens),
            ]
        assert not isinstance(x, GroupedActivations)
        return lm_head_gemm(device, head, h, norm, x, self.logits, num_tokens)

    def close(self) -> None:
        """Frees the memory."""
        for array in (self.logits, *self._owned):
            array.close()
