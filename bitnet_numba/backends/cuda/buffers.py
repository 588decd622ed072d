"""Activations between the launches of a forward pass."""

import numpy as np

from bitnet_numba.config import GROUPS, ModelConfig
from bitnet_numba.kernels.linear.operands import GroupedActivations, QuantizedActivations
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView
from bitnet_numba.packing import BLOCK_COLS


class Buffers:
    """Buffers of a pass of up to `max_tokens` tokens; shared by all sequences, since passes run one after the other.

    h float32 [max_tokens, hidden]: the residual stream. qkv float32 [max_tokens, q + 2 kv]. attn_out float32
    [max_tokens, q]. mlp_hidden float32 [max_tokens, intermediate]. Each ends with zeros up to a multiple of 32
    elements, which GEMV reads. quantized: the input of the next GEMM (of more than one token). slot_positions int32
    [max_tokens, 2]: which slot and position each token is, -1 for none. num_real int32 [1]: how many tokens of a
    padded pass over prompts there are, up to the last real one. Where activations have two int8 planes, also of passes
    of one token: second, the second plane; up float32 [max_tokens, intermediate].
    """

    def __init__(self, device: Device, config: ModelConfig, max_tokens: int):
        def floats(size: int) -> DeviceArray:
            return device.zeros(-(-size // BLOCK_COLS) * BLOCK_COLS, np.float32)

        self.max_tokens = max_tokens
        qkv = max_tokens * (config.q_size + 2 * config.kv_size)
        attn_out, mlp_hidden = max_tokens * config.q_size, max_tokens * config.intermediate_size
        self.h = floats(max_tokens * config.hidden_size)
        self._owned = [self.h]
        if max_tokens == 1:
            self.qkv, self.attn_out, self.mlp_hidden = floats(qkv), floats(attn_out), floats(mlp_hidden)
            self._owned += [self.qkv, self.attn_out, self.mlp_hidden]
            return
        # Nobody reads q, k, v or the heads' output once the feed-forward has begun: the two share memory.
        shared = floats(max(qkv + attn_out, mlp_hidden))
        self.qkv = DeviceView(shared.address, qkv, np.float32)
        self.attn_out = DeviceView(shared.address + self.qkv.nbytes, attn_out, np.float32)
        self.mlp_hidden = DeviceView(shared.address, mlp_hidden, np.float32)
        kind = GroupedActivations if config.group_scales else QuantizedActivations
        K = max(config.group_shape(g)[1] for g in GROUPS)
        self.quantized = kind.empty(device, max_tokens, K)
        self.slot_positions = device.zeros(2 * max_tokens, np.int32)
        self.num_real = device.zeros(1, np.int32)
        self.num_max = device.array(np.array([max_tokens], np.int32))  # for passes whose tokens are all real
        self._owned += [shared, *vars(self.quantized).values(), self.slot_positions, self.num_real, self.num_max]
        if config.activation_planes == 2:
            self.second = GroupedActivations.empty(device, max_tokens, K)
            self.up = floats(mlp_hidden)
            self._owned += [*vars(self.second).values(), self.up]

    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(array.nbytes for array in self._owned)
