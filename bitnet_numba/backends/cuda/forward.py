"""The forward pass as a chain of launches, for 1 to 3072 tokens.

    embed                       h = embeddings of the tokens
    per layer   qkv             RMSNorm, quantise | q, k, v rows
                (norms)         RMSNorm of each query's and key's head, where the model has it
                attention       rotate, append to the cache, attend
                o               (sub-norm,) quantise | o rows, added to h
                gate_up         RMSNorm, quantise | gate and up rows, activation(gate) * up
                down            (sub-norm,) quantise | down rows, added to h

`ForwardPass` has the layer loop; its subclasses choose the kernels:

    DecodePass       one token of one sequence: GEMV, which norms and quantises in every block (not of two planes of
                     activations: see `two_planes`)
    PrefillPass      tokens of prompts: norm and quantisation in a launch of their own, then GEMM
    BatchPass        the next token of each of many sequences: as PrefillPass, with attention over pages; of one, GEMV

What a launch works on is read from device memory (tokens, positions, how many are real), so a pass is captured once,
and one for 128 tokens serves 65 to 128. On sm_90 each launch starts while those before it still run, loads its weights,
and then waits (PDL).

A token's result does not depend, to the bit, on the other tokens of its pass or on how a prompt was cut into passes:
sums of products are exact, and every other sum has an order that depends on the token's own position alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

from bitnet_numba.backends.cuda.buffers import Buffers
from bitnet_numba.backends.cuda.state import SequenceState
from bitnet_numba.backends.cuda.two_planes import two_plane_product
from bitnet_numba.backends.cuda.weights import RowFormats, Weights
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels import embedding
from bitnet_numba.kernels.attention import decode, expand, head_norm, kv_cache, paged_decode, paged_simt, prefill
from bitnet_numba.kernels.attention.kv_cache import LayerCache
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.attention.parts import HeadShape, RopeTables
from bitnet_numba.kernels.linear.gemm import gemm
from bitnet_numba.kernels.linear.gemm_groups import gemm_groups
from bitnet_numba.kernels.linear.gemv import gemv
from bitnet_numba.kernels.linear.gemv_groups import gemv_groups
from bitnet_numba.kernels.linear.operands import GroupedActivations, GroupedLinear, QuantizedActivations
from bitnet_numba.kernels.linear.quantize import quantize
from bitnet_numba.kernels.linear.quantize_groups import quantize_groups
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray
from bitnet_numba.packing import BLOCK_COLS

MAX_TOKENS = 3072  # of a pass; longer prompts take several. 2048 and 4096 take 4 % longer a token on an H200
EPILOGUES = {"qkv": "store", "o": "residual", "gate_up": "gated", "down": "residual"}


class Output(TypedDict):
    """What a product does with its result, as keyword arguments of its launcher."""

    epilogue: str
    activation: str


@dataclass
class CudaModel:
    """A model on a device, and the buffers that its passes share."""

    config: ModelConfig
    device: Device
    weights: Weights
    token_buffers: Buffers  # of one token
    buffers: Buffers  # of up to MAX_TOKENS
    kv_dtype: KVDtype = DEFAULT  # of keys and values in caches

    def __post_init__(self) -> None:
        self.heads = HeadShape(self.config.num_heads, self.config.num_kv_heads, self.config.head_dim)

    @staticmethod
    def dry_run(config: ModelConfig, rows: RowFormats, device: Device, kv_dtype: KVDtype = DEFAULT) -> "CudaModel":
        """A model without memory, to ask passes which kernels they need."""
        weights = Weights.shapes_only(config, rows)
        buffers = Buffers(device, config, 1), Buffers(device, config, MAX_TOKENS)
        return CudaModel(config, device, weights, *buffers, kv_dtype)


class ForwardPass:
    """The launches of one pass over a model and the state of its sequences, in order; see the module's drawing."""

    def __init__(self, model: CudaModel, state: SequenceState, buffers: Buffers, num_tokens: int):
        self.model, self.state, self.buffers, self.num_tokens = model, state, buffers, num_tokens

    def launches(self) -> list[Launch]:
        """All of the pass."""
        return list(self.one_by_one())

    def one_by_one(self) -> Iterator[Launch]:
        """All of the pass, each made when it is asked for."""
        yield self.embed()
        for layer in range(self.model.config.num_layers):
            yield from self.layer(layer)

    def layer(self, layer: int) -> list[Launch]:
        """A layer's launches."""
        b = self.buffers
        return [
            *self.linear(layer, "qkv", b.h, "input_norm", b.qkv),
            *self.head_norms(layer),
            *self.attention(layer),
            *self.linear(layer, "o", b.attn_out, "attn_sub_norm", b.h),
            *self.linear(layer, "gate_up", b.h, "post_attention_norm", b.mlp_hidden),
            *self.linear(layer, "down", b.mlp_hidden, "ffn_sub_norm", b.h),
        ]

    def linear(self, layer: int, group: str, x: DeviceArray, norm: str, out: DeviceArray) -> list[Launch]:
        """Norms (where the model has this norm) and quantises x, and multiplies it with a group's weights."""
        raise NotImplementedError

    def head_norms(self, layer: int) -> list[Launch]:
        """Norms queries and keys, where the model does."""
        model = self.model
        if not model.config.qk_norm:
            return []
        q_norm, k_norm = model.weights.head_norm(layer, "q_norm"), model.weights.head_norm(layer, "k_norm")
        return [head_norm.head_norm(model.device, self.buffers.qkv, q_norm, k_norm, self.num_tokens, model.heads)]

    def embed(self) -> Launch:
        """Embeddings of the tokens into h."""
        raise NotImplementedError

    def attention(self, layer: int) -> list[Launch]:
        """Stores keys and values and attends to the cache: qkv -> attn_out."""
        raise NotImplementedError


class DecodePass(ForwardPass):
    """One token of one sequence, whose cache is contiguous."""

    def __init__(
        self, model: CudaModel, state: SequenceState, scratch: "decode.DecodeScratch | SharedContexts", long: bool
    ):
        """scratch: of the kernel that attends, the batch's with float8. long: the context is at least
        attention.decode.LONG_CONTEXT tokens."""
        super().__init__(model, state, model.token_buffers, 1)
        self._scratch, self._long = scratch, long

    def embed(self) -> Launch:
        model = self.model
        return embedding.embed_token(model.device, model.weights.embedding, self.state.arrays, self.buffers.h)

    def linear(self, layer: int, group: str, x: DeviceArray, norm: str, out: DeviceArray) -> list[Launch]:
        device, weights = self.model.device, self.model.weights
        packed, given_norm = weights.linear(layer, group), weights.layer_norm(layer, norm)
        output: Output = {"epilogue": EPILOGUES[group], "activation": self.model.config.activation}
        if isinstance(packed, GroupedLinear):
            if self.model.config.activation_planes == 2:
                several = self.model.buffers
                return two_plane_product(device, packed, several, x, given_norm, several.num_max, out, 1, **output)
            return [gemv_groups(device, packed, x, out, norm=given_norm, **output)]
        return [gemv(device, packed, x, out, norm=given_norm, spread=True, **output)]

    def attention(self, layer: int) -> list[Launch]:
        model, state, b = self.model, self.state, self.buffers
        cache = state.layer_cache(layer)
        if isinstance(self._scratch, SharedContexts):
            return attend_in_batch(model, b, state, state.slot_position, cache, self._scratch, 1)
        if not decode.takes(cache.dtype):
            return append_and_attend(model, b, state.rope, state.slot_position, cache, 1)
        return [
            decode.decode_attention(
                model.device, b.qkv, state.rope, state.position, cache.keys, cache.values, state.padded_capacity,
                self._scratch, b.attn_out, model.heads, dtype=cache.dtype, long=self._long,
            )
        ]  # fmt: skip


class _GemmPass(ForwardPass):
    """Several tokens: products are GEMMs of activations that were quantised once."""

    def __init__(self, model: CudaModel, state: SequenceState, num_tokens: int, num_real: DeviceArray):
        """num_real: how many of the tokens are real when the pass runs, int32 [1]."""
        super().__init__(model, state, model.buffers, num_tokens)
        self._num_real = num_real

    def linear(self, layer: int, group: str, x: DeviceArray, norm: str, out: DeviceArray) -> list[Launch]:
        device, weights, quantized = self.model.device, self.model.weights, self.buffers.quantized
        packed, given_norm, M = weights.linear(layer, group), weights.layer_norm(layer, norm), self.num_tokens
        output: Output = {"epilogue": EPILOGUES[group], "activation": self.model.config.activation}
        if isinstance(packed, GroupedLinear):
            if self.model.config.activation_planes == 2:
                return two_plane_product(device, packed, self.buffers, x, given_norm, self._num_real, out, M, **output)
            assert isinstance(quantized, GroupedActivations)  # the model's buffers are made for its weights
            return [
                quantize_groups(device, x, quantized, M, packed.K, norm=given_norm),
                gemm_groups(device, packed, quantized, self._num_real, out, M, **output),
            ]
        assert isinstance(quantized, QuantizedActivations)
        return [
            quantize(device, x, quantized, M, packed.K, norm=given_norm),
            gemm(device, packed, quantized, self._num_real, out, M, **output),
        ]

    def _embed(self, slot_ids: DeviceArray | None) -> Launch:
        model, state, b = self.model, self.state, self.buffers
        return embedding.embed_tokens(
            model.device, model.weights.embedding, state.arrays, slot_ids, b.h, b.slot_positions, self.num_tokens
        )


def append_and_attend(
    model: CudaModel, b: Buffers, rope: RopeTables, slot_positions: Any, cache: LayerCache, num_tokens: int
) -> list[Launch]:
    """Stores tokens' keys and values, and attends to them: by kernels for every type of the cache and card."""
    common = model.device, b.qkv, rope, slot_positions, cache
    return [
        kv_cache.append(*common, num_tokens, model.heads),
        paged_simt.paged_attention_simt(*common, b.attn_out, num_tokens, model.heads),
    ]


class PrefillPass(_GemmPass):
    """Tokens of one or several prompts, those that `slot_positions` says (see `prompts`)."""

    def __init__(self, model: CudaModel, state: SequenceState, num_tokens: int):
        super().__init__(model, state, num_tokens, model.buffers.num_real)

    def embed(self) -> Launch:
        return self._embed(None)

    def attention(self, layer: int) -> list[Launch]:
        model, state, b, cache = self.model, self.state, self.buffers, self.state.layer_cache(layer)
        common = model.device, b.qkv, state.rope, b.slot_positions, cache
        wide, expansion = cache, list[Launch]()
        if state.expanded is not None:
            wide = state.expanded.cache
            expansion = [expand.expand(model.device, state.expanded.pages, cache, wide, model.heads)]
        if not prefill.fits(model.device.arch, model.heads.head_dim, wide.dtype):
            return append_and_attend(model, b, state.rope, b.slot_positions, cache, self.num_tokens)
        return [  # stored before attention reads them: tokens attend to others of their pass
            kv_cache.append(*common, self.num_tokens, model.heads),
            *expansion,
            prefill.prefill_attention(*common[:-1], wide, b.attn_out, self.num_tokens, model.heads),
        ]


@dataclass(frozen=True)
class SharedContexts:
    """How the contexts of a batch are shared out among CTAs, and where their partial results meet (see
    `paged_decode`)."""

    work_list: DeviceArray
    num_blocks: int
    scratch: paged_decode.PagedScratch


class BatchPass(_GemmPass):
    """The next token of each of many sequences, whose keys and values lie in pages; slot -1 stands for no sequence."""

    def __init__(self, model: CudaModel, state: SequenceState, num_tokens: int, contexts: SharedContexts):
        super().__init__(model, state, num_tokens, model.buffers.num_max)
        self._contexts = contexts

    def embed(self) -> Launch:
        return self._embed(self.state.slot_ids)

    def linear(self, layer: int, group: str, x: DeviceArray, norm: str, out: DeviceArray) -> list[Launch]:
        device, weights = self.model.device, self.model.weights
        packed = weights.linear(layer, group)
        if self.num_tokens > 1 or isinstance(packed, GroupedLinear) or packed.K % BLOCK_COLS:
            return super().linear(layer, group, x, norm, out)
        given_norm = weights.layer_norm(layer, norm)  # exact: as `quantize` does it, whatever the number of tokens
        output: Output = {"epilogue": EPILOGUES[group], "activation": self.model.config.activation}
        return [gemv(device, packed, x, out, norm=given_norm, exact=True, spread=True, **output)]

    def attention(self, layer: int) -> list[Launch]:
        model, state, b, contexts = self.model, self.state, self.buffers, self._contexts
        cache = state.layer_cache(layer)
        if not paged_decode.fits(model.device.arch, model.heads.head_dim, cache.dtype):
            return append_and_attend(model, b, state.rope, b.slot_positions, cache, self.num_tokens)
        return attend_in_batch(model, b, state, b.slot_positions, cache, contexts, self.num_tokens)


def attend_in_batch(
    model: CudaModel,
    b: Buffers,
    state: SequenceState,
    slot_positions: Any,
    cache: LayerCache,
    contexts: SharedContexts,
    num_tokens: int,
) -> list[Launch]:
    """Attention of one token in each slot, which stores the keys and values: only its own token reads a new key."""
    return [
        paged_decode.paged_decode_attention(
            model.device, b.qkv, state.rope, slot_positions, cache, contexts.work_list, contexts.num_blocks,
            contexts.scratch, b.attn_out, num_tokens, model.heads,
        )
    ]  # fmt: skip
