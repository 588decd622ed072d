"""A pass of many rows through the model: tokens of a prompt, or the next tokens of many sequences, from the one packed
copy of the weights.

    embed         h = embeddings; which slot and position each row is
    per layer     norm_quant | qkv | append to the cache, attention | norm_quant | o, added to h
                  norm_quant | gate and up, activation(gate) * up | norm_quant | down, added to h

What differs from a step of one token (`decode`): rows are normed and quantised once, in launches of their own, because
every block of a product would do all of them again; products are `w2a8_matmul`. A prompt's keys and values are stored
before attention reads them, since a row attends to others of its pass; the next tokens of many sequences are read by
their own rows alone, and `attention_batch` stores them itself. How many rows are real, whose they are and where they
stand is read from device memory, so that a pass captured for 128 rows serves 65 to 128 of them.

A row's result does not depend, to the bit, on the other rows of its pass or on how a prompt was cut into passes: sums
of products are exact, and every other sum has an order that depends on the row's own position alone.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bitnet_numba.backends.cuda.decode import NORMS
from bitnet_numba.backends.cuda.state import SequenceState, padded_size
from bitnet_numba.backends.cuda.weights import Weights, head_name
from bitnet_numba.config import GROUPS, ModelConfig
from bitnet_numba.kernels import embedding as embed
from bitnet_numba.kernels.attention import kv_cache
from bitnet_numba.kernels.attention import paged_decode as attention_batch
from bitnet_numba.kernels.attention import paged_simt as attention_rows
from bitnet_numba.kernels.attention import prefill as attention_prompt
from bitnet_numba.kernels.attention.parts import HeadShape, RopeTables
from bitnet_numba.kernels.linear import gemm as w2a8_matmul
from bitnet_numba.kernels.linear import heuristics
from bitnet_numba.kernels.linear import quantize as norm_quant
from bitnet_numba.kernels.lm_head import gemm_mma as head_many
from bitnet_numba.kernels.lm_head import gemm_wgmma as head_warpgroup
from bitnet_numba.kernels.lm_head import split_norm
from bitnet_numba.kernels.runtime.device import CudaDevice
from bitnet_numba.kernels.runtime.driver import Graph, Stream
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView, Uploads
from bitnet_numba.kernels.runtime.spec import ArchSpec, KernelSpec
from bitnet_numba.packing import BLOCK_COLS

MAX_ROWS = 2048  # of a pass; longer prompts go in several
EPILOGUES = {"qkv": "store", "o": "residual", "gate_up": "gated", "down": "residual"}
MIN_ROWS = 16  # of the shortest captured pass of a prompt


class RowActivations:
    """What flows between the launches of a pass; shared by all sequences, since passes run one after the other."""

    def __init__(self, config: ModelConfig, device: CudaDevice, rows: int):
        def floats(size: int) -> DeviceArray:
            return DeviceArray(size, np.float32, zero=True)

        self.rows = rows
        widest = max(config.group_shape(group)[1] for group in GROUPS)
        qkv, mixed = config.q_size + 2 * config.kv_size, config.q_size
        self.h = floats(rows * config.hidden_size)
        # Nobody reads q, k, v or the heads' output once the feed-forward has begun.
        self.wide = floats(rows * max(qkv + mixed, config.intermediate_size))
        self.qkv = DeviceView(self.wide.address, rows * qkv, np.float32)
        self.mixed = DeviceView(self.wide.address + self.qkv.nbytes, rows * mixed, np.float32)
        self.inner = DeviceView(self.wide.address, rows * config.intermediate_size, np.float32)
        self.q = DeviceArray(rows * -(-widest // BLOCK_COLS) * BLOCK_COLS, np.int8, zero=True)
        self.s, self.total = floats(rows), DeviceArray(rows, np.int32, zero=True)
        self.where = DeviceArray(2 * rows, np.int32, zero=True)
        self.count = DeviceArray(1, np.int32, zero=True)  # real rows of a prompt
        self.plenty = DeviceArray.of(np.array([rows], np.int32))  # a count for passes without one

    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(
            a.nbytes for a in vars(self).values() if isinstance(a, DeviceArray) and not isinstance(a, DeviceView)
        )


class Model(NamedTuple):
    """What every pass takes: weights on a device, a stream for all work, small writes in its order, and the activations
    in between."""

    config: ModelConfig
    weights: Weights
    device: CudaDevice
    stream: Stream
    uploads: Uploads
    flow: RowActivations


class Sharing(NamedTuple):
    """How the contexts of a decode pass are shared out among blocks, and where their results meet: see
    `attention_batch`."""

    work: DeviceArray
    blocks: int
    scratch: attention_batch.PagedScratch


class ForwardPass:
    """The launches of a pass of up to `rows` rows of some sequences: of one's prompt, or one row of each of many.

    sharing: of many sequences, how their contexts are shared out; None: the pass is a prompt's.
    """

    def __init__(
        self,
        model: Model,
        state: SequenceState,
        rows: int,
        sharing: Sharing | None = None,
    ):
        self._model, self._state, self._rows, self._sharing = model, state, rows, sharing
        prompt = sharing is None
        config, weights, device, _, _, flow = model
        self._count = flow.count if prompt else flow.plenty
        self.launches = [
            embed.embed_many(
                device, weights["embed.weight"], weights.get("embed.scale"), state.tokens, state.stride, state.position,
                state.order, flow.count if prompt else None, state.seen, flow.h, flow.where, rows, config.hidden_size,
            )
        ]  # fmt: skip
        for i in range(config.num_layers):
            norms = [weights.get(f"layers.{i}.{norm}.weight") for norm in NORMS]
            self._product(i, "qkv", flow.h, norms[0], flow.qkv)
            self._attend(i)
            self._product(i, "o", flow.mixed, norms[1], flow.h)
            self._product(i, "gate_up", flow.h, norms[2], flow.inner)
            self._product(i, "down", flow.inner, norms[3], flow.h)

    def _product(self, layer: int, group: str, x: DeviceArray, norm: DeviceArray | None, out: DeviceArray) -> None:
        """Norms (with a weight) and quantises rows, and multiplies them with a group's weights."""
        config, weights, device, _, _, flow = self._model
        segments, K = config.group_shape(group)
        eps = config.rms_norm_eps
        self.launches.append(norm_quant.norm_quant(device, x, norm, eps, flow.q, flow.s, flow.total, self._rows, K))
        name = f"layers.{layer}.{group}"
        self.launches.append(
            w2a8_matmul.w2a8_matmul(
                device, weights[f"{name}.words"], flow.q, flow.s, flow.total, self._count, weights[f"{name}.scales"],
                out, self._rows, sum(segments), K, np.cumsum(segments).tolist(), weights.get(f"{name}.bias"),
                EPILOGUES[group], config.activation,
            )
        )  # fmt: skip

    def _attend(self, layer: int) -> None:
        """Stores keys and values and attends to them."""
        config, _, device, _, _, flow = self._model
        state, cache, rows = self._state, self._state.layer_cache(layer), self._rows
        shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        where = (RopeTables(state.cos, state.sin), flow.where)
        if self._sharing is not None and attention_batch.fits(device.arch, shape.head_dim):
            work, blocks, scratch = self._sharing
            self.launches.append(
                attention_batch.paged_decode_attention(
                    device, flow.qkv, *where, cache, work, blocks, scratch, flow.mixed, rows, shape
                )
            )
            return
        self.launches.append(kv_cache.append(device, flow.qkv, *where, cache, rows, shape))
        if self._sharing is None and attention_prompt.fits(device.arch, shape.head_dim):
            attention = attention_prompt.prefill_attention
        else:
            attention = attention_rows.paged_attention_simt
        self.launches.append(attention(device, flow.qkv, *where, cache, flow.mixed, rows, shape))


class LMHead:
    """Logits, float32 [rows, vocabulary], of rows that a pass has left in `flow.h`; always from the same kernel, so
    that a row's are the same bits for every number of rows."""

    def __init__(self, model: Model, rows: int):
        config, weights, device, *_ = model
        self._model, name = model, head_name(config)
        self._weight, self._scale = weights[f"{name}.weight"], weights.get(f"{name}.scale")
        self._int8 = self._weight.dtype == np.int8
        self._by_warpgroups = head_warpgroup.serves(device.arch, self._int8)
        split_words = head_warpgroup.split_words if self._by_warpgroups else head_many.split_words
        self._terms = DeviceArray(split_words(rows, config.hidden_size), np.int32)
        self.logits = DeviceArray(rows * config.vocab_size, np.float32)

    def launches(self, rows: int) -> list[Launch]:
        """Norm and head of the first `rows`."""
        config, weights, device, _, _, flow = self._model
        terms, K, vocabulary = self._terms, config.hidden_size, config.vocab_size
        normed = (device, flow.h, weights["norm.weight"], config.rms_norm_eps, terms, rows, K)
        if self._by_warpgroups:
            return [
                head_warpgroup.norm_split(*normed),
                head_warpgroup.head_warpgroup(device, self._weight, terms, self.logits, vocabulary, rows, K),
            ]
        return [
            split_norm.norm_split(*normed, self._int8),
            head_many.head_many(device, self._weight, self._scale, terms, self.logits, vocabulary, rows, K),
        ]

    def close(self) -> None:
        """Frees the memory."""
        self._terms.close()
        self.logits.close()


class Prefill:
    """Passes of prompts of some sequences, captured for a ladder of lengths."""

    def __init__(self, model: Model, state: SequenceState, last: DeviceArray):
        """last: float32 [hidden], where `feed` leaves the row whose logits choose the next token."""
        self._model, self._state, self._last = model, state, last
        self._graphs: dict[tuple[int, bool], Graph] = {}

    def feed(self, slot: int, count: int, keep_last: bool = False) -> None:
        """Feeds a slot's next `count` tokens; afterwards its position is that of the next token.

        `keep_last`: its position stays that of the last token fed, as samplers want it, `where` of the first row says
        so, and the token's row lies in `last`.
        """
        flow, uploads = self._model.flow, self._model.uploads
        uploads.write(self._state.order, [slot])
        while count:
            rows = min(count, flow.rows)
            count -= rows
            uploads.write(flow.count, [rows])
            self._graph(padded_size(rows, MIN_ROWS), keep_last and not count).replay(self._model.stream)

    def _graph(self, rows: int, keep_last: bool) -> Graph:
        key = rows, keep_last
        if key not in self._graphs:
            model, state = self._model, self._state
            launches = ForwardPass(model, state, rows).launches
            launches.append(
                embed.finish_prompt(
                    model.device, model.flow.count, state.order, state.position, int(keep_last), model.flow.h,
                    self._last, model.flow.where, model.config.hidden_size,
                )
            )  # fmt: skip
            self._graphs[key] = model.stream.capture(launches)
        return self._graphs[key]

    def close(self) -> None:
        """Frees the captured passes."""
        for graph in self._graphs.values():
            graph.close()


def product_specs(config: ModelConfig, device: ArchSpec, sizes: Iterable[int]) -> list[KernelSpec]:
    """Every form of the products in passes of so many rows."""
    found: dict[str, KernelSpec] = {}
    for rows in sizes:
        for group, epilogue in EPILOGUES.items():
            segments, K = config.group_shape(group)
            tile = heuristics.plan(rows, sum(segments), K, device.arch, device.num_sms, epilogue == "gated")
            spec = w2a8_matmul.spec(device.arch, tile, epilogue, config.activation, config.group_bias(group))
            found[spec.name] = spec
    return list(found.values())


def prompt_specs(config: ModelConfig, int8_rows: bool, device: ArchSpec) -> list[KernelSpec]:
    """Every form that prompts take."""
    arch, head_dim, group = device.arch, config.head_dim, config.num_heads // config.num_kv_heads
    widths = {
        (config.hidden_size, True),
        (config.q_size, config.sub_norms),
        (config.intermediate_size, config.sub_norms),
    }
    sizes = [1 << i for i in range(MIN_ROWS.bit_length() - 1, MAX_ROWS.bit_length())]
    return [
        *product_specs(config, device, sizes),
        *(norm_quant.norm_quant_spec(arch, K, norm=norm) for K, norm in sorted(widths)),
        embed.embed_many_spec(arch, int8_rows, True),
        embed.finish_prompt_spec(arch),
        kv_cache.append_spec(arch, head_dim),
        attention_prompt.prefill_spec(arch, head_dim, group)
        if attention_prompt.fits(arch, head_dim)
        else attention_rows.paged_simt_spec(arch, head_dim, group),
    ]
