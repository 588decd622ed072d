"""The forward pass of an embedding model over whole texts, as a chain of launches.

    embed                 h = embeddings of the tokens (scaled, in Gemma's block)
    per layer   norm      n = RMSNorm(h)
                q, k, v   each: its own RMSNorm of n, quantise | q, k or v rows
                rotate    RMSNorm of each head of q and k, rotation
                attention within each text
                o         its own RMSNorm, quantise | o rows, added to h; in Gemma's block normed before
                norm      n = RMSNorm(h)
                gate, up  each: its own RMSNorm of n, quantise | gate or up rows
                gate      activation(gate) * up
                down      as o
    norm                  n = RMSNorm(h), the final hidden states

Texts are in one pass from their first token to their last, so nothing is kept from pass to pass. They lie behind each
other, each from a multiple of BLOCK_TOKENS rows on; `text_starts` says where a row's text begins. A text's numbers do
not depend, to the bit, on the others of its pass.
"""

from typing import Any

import numpy as np

from bitnet_numba.backends.cuda.state import upload_rope
from bitnet_numba.backends.cuda.weights import Weights
from bitnet_numba.config import GROUPS, ModelConfig
from bitnet_numba.kernels import embedding
from bitnet_numba.kernels.attention.parts import HeadShape
from bitnet_numba.kernels.attention.rotate_heads import rotate_heads
from bitnet_numba.kernels.attention.text_attention import text_attention
from bitnet_numba.kernels.linear.gated import gate
from bitnet_numba.kernels.linear.gemm import gemm
from bitnet_numba.kernels.linear.operands import QuantizedActivations
from bitnet_numba.kernels.linear.quantize import quantize
from bitnet_numba.kernels.linear.row_norm import row_norm
from bitnet_numba.kernels.operands import Norm, SequenceArrays
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView


class EmbeddingBuffers:
    """Buffers of passes of up to `max_rows` rows.

    float32: h, n [max_rows, hidden], q, attn_out [max_rows, q], k, v [max_rows, kv], gate, up [max_rows, intermediate].
    tokens, text_starts int32 [max_rows]; slot_positions int32 [max_rows, 2], see `embedding.embed_tokens`: slot 0 and
    the row, or slot -1; num_real int32 [1]: rows up to the last that is used.
    """

    def __init__(self, device: Device, config: ModelConfig, max_rows: int):
        c = config
        self.max_rows = max_rows
        self.h, self.n = (device.zeros(max_rows * c.hidden_size, np.float32) for _ in range(2))
        sizes = [max_rows * width for width in (c.q_size, c.q_size, c.kv_size, c.kv_size)]
        # Nobody reads q, k, v or the heads' output once the feed-forward has begun: the two share memory.
        shared = device.zeros(max(sum(sizes), 2 * max_rows * c.intermediate_size), np.float32)
        self.q, self.attn_out, self.k, self.v = _cut(shared, sizes)
        self.gate, self.up = _cut(shared, [max_rows * c.intermediate_size] * 2)
        self.quantized = QuantizedActivations.empty(device, max_rows, max(c.group_shape(g)[1] for g in GROUPS))
        self.tokens, self.text_starts = (device.zeros(max_rows, np.int32) for _ in range(2))
        self.slot_positions = device.zeros(2 * max_rows, np.int32)
        self.num_real = device.zeros(1, np.int32)
        seen_stride = -(-c.vocab_size // 32)
        unused = device.zeros(max(1, seen_stride), np.int32)  # what only samplers read
        self.sequence = SequenceArrays(self.tokens, max_rows, self.num_real, unused, seen_stride, unused)
        self.rope = [upload_rope(device, c, max_rows, local) for local in ((False, True) if c.local else (False,))]
        angles = [table for tables in self.rope for table in tables]
        self._owned = [
            self.h, self.n, shared, *vars(self.quantized).values(), self.tokens, self.text_starts, self.slot_positions,
            self.num_real, unused, *angles,
        ]  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(array.nbytes for array in self._owned)

    def close(self) -> None:
        """Frees the memory."""
        for array in self._owned:
            array.close()


def _cut(array: DeviceArray, sizes: list[int]) -> list[DeviceView]:
    """Parts of a float32 array, one behind the other."""
    starts = np.cumsum([0, *sizes])
    return [
        DeviceView(array.address + 4 * int(start), size, np.float32)
        for start, size in zip(starts[:-1], sizes, strict=True)
    ]


class EmbeddingPass:
    """The launches of a pass of `num_rows` rows, a multiple of BLOCK_TOKENS."""

    def __init__(
        self, config: ModelConfig, device: Device, weights: Weights, buffers: EmbeddingBuffers, num_rows: int
    ) -> None:
        self.config, self.device, self.weights, self.buffers, self.num_rows = config, device, weights, buffers, num_rows
        self._heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)

    def launches(self) -> list[Launch]:
        """All of the pass."""
        device, b, M, hidden = self.device, self.buffers, self.num_rows, self.config.hidden_size
        found = [embedding.embed_tokens(device, self.weights.embedding, b.sequence, None, b.h, b.slot_positions, M)]
        if self.config.gemma:
            found.append(embedding.scale(device, b.h, M * hidden, self.config.embedding_scale))
        for layer in range(self.config.num_layers):
            found += [*self.attention(layer), *self.feed_forward(layer)]
        return [*found, row_norm(device, b.h, self.weights.final_norm, b.n, M, hidden)]

    def attention(self, layer: int) -> list[Launch]:
        """h += attention(norm(h))."""
        device, weights, b, M, heads = self.device, self.weights, self.buffers, self.num_rows, self._heads
        window = self.config.window_of(layer)
        rope = b.rope[window is not None]
        found = [self._norm(layer, "input_norm")]
        for i, out in enumerate((b.q, b.k, b.v)):
            found += self._linear(layer, "qkv", i, b.n, out)
        for x, name, count in ((b.q, "q_norm", heads.num_heads), (b.k, "k_norm", heads.num_kv_heads)):
            norm = weights.head_norm(layer, name)
            found.append(rotate_heads(device, x, norm, rope, b.text_starts, M, count, heads.head_dim))
        found.append(text_attention(device, b.q, b.k, b.v, b.text_starts, b.attn_out, M, heads, window=window))
        return [*found, *self._residual(layer, "o", b.attn_out, "attn_post_norm")]

    def feed_forward(self, layer: int) -> list[Launch]:
        """h += feed_forward(norm(h))."""
        b = self.buffers
        found = [self._norm(layer, "post_attention_norm")]
        for i, out in enumerate((b.gate, b.up)):
            found += self._linear(layer, "gate_up", i, b.n, out)
        size = self.num_rows * self.config.intermediate_size
        found.append(gate(self.device, b.gate, b.up, size, self.config.activation))
        return [*found, *self._residual(layer, "down", b.gate, "ffn_post_norm")]

    def _norm(self, layer: int, name: str) -> Launch:
        b = self.buffers
        return row_norm(self.device, b.h, self._layer_norm(layer, name), b.n, self.num_rows, self.config.hidden_size)

    def _layer_norm(self, layer: int, name: str) -> Norm:
        norm = self.weights.layer_norm(layer, name)
        assert norm is not None  # every embedding model has those that are asked for
        return norm

    def _linear(
        self, layer: int, group: str, i: int, x: DeviceArray, out: DeviceArray, epilogue: str = "store"
    ) -> list[Launch]:
        """A linear of a group: its own norm of x, quantisation, and its rows."""
        device, b, M = self.device, self.buffers, self.num_rows
        packed, norm = self.weights.segment(layer, group, i)
        product: Any = gemm(device, packed, b.quantized, b.num_real, out, M, epilogue=epilogue)
        return [quantize(device, x, b.quantized, M, packed.K, norm=norm), product]

    def _residual(self, layer: int, group: str, x: DeviceArray, post_norm: str) -> list[Launch]:
        """A linear whose rows are added to h, or in Gemma's block normed before."""
        b, hidden = self.buffers, self.config.hidden_size
        if not self.config.gemma:
            return self._linear(layer, group, 0, x, b.h, "residual")
        norm = self._layer_norm(layer, post_norm)
        return [
            *self._linear(layer, group, 0, x, b.n),
            row_norm(self.device, b.n, norm, b.h, self.num_rows, hidden, add=True),
        ]
