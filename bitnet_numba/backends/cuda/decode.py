"""One decode step as a chain of launches: the token at the present position goes in, logits or the next token come out.

Five launches a layer, each of which starts while those before it still run, loads its weights, and then waits:

    qkv         RMSNorm, quantise | q, k, v rows
    attention   rotate, append to the cache, attend
    o           (sub-norm,) quantise | o rows, added to the residual
    gate_up     RMSNorm, quantise | gate and up rows, activation(gate) * up
    down        (sub-norm,) quantise | down rows, added to the residual

before them the embedding, after them the head (which does the final norm) and the sampler. Everything that changes
from step to step (position, tokens, sampling settings) is read from device memory, so that the chain is captured once.
"""

from typing import Any

import numpy as np

from bitnet_numba.backends.cuda.state import SequenceState
from bitnet_numba.backends.cuda.weights import Weights, head_name
from bitnet_numba.config import GROUPS, ModelConfig
from bitnet_numba.kernels import embedding as embed
from bitnet_numba.kernels.attention import decode as attention
from bitnet_numba.kernels.attention.decode import DecodeScratch
from bitnet_numba.kernels.attention.parts import HeadShape, RopeTables
from bitnet_numba.kernels.linear import gemv as w2a8_gemv
from bitnet_numba.kernels.lm_head import gemv as head
from bitnet_numba.kernels.runtime.device import CudaDevice
from bitnet_numba.kernels.runtime.launch import Launch
from bitnet_numba.kernels.runtime.memory import DeviceArray, PinnedArray
from bitnet_numba.kernels.runtime.spec import ArchSpec, KernelSpec
from bitnet_numba.kernels.sampling import single as sampler
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS

LAYER = ("qkv", "attention", "o", "gate_up", "down")
NORMS = ("input_norm", "attn_sub_norm", "post_attention_norm", "ffn_sub_norm")  # in the order of config.GROUPS


class Activations:
    """What flows between the launches of a step; shared by all contexts, since steps run one after the other."""

    def __init__(self, config: ModelConfig, device: CudaDevice):
        def floats(size: int) -> DeviceArray:
            return DeviceArray(-(-size // BLOCK_COLS) * BLOCK_COLS, np.float32, zero=True)

        self.h = floats(config.hidden_size)  # the residual stream
        self.qkv = floats(config.q_size + 2 * config.kv_size)
        self.mixed = floats(config.q_size)
        self.inner = floats(config.intermediate_size)
        self.logits = floats(config.vocab_size)
        shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self.attention = DecodeScratch.allocate(device, shape)
        self.scratch = DeviceArray(sampler.SCRATCH_WORDS, np.int64, zero=True)
        self.counters = DeviceArray(sampler.COUNTERS, np.int32, zero=True)

    def nbytes(self) -> int:
        """Bytes of all of it."""
        arrays = [value for value in vars(self).values() if isinstance(value, DeviceArray)]
        return sum(array.nbytes for array in (*arrays, *self.attention.arrays))


class Products:
    """The compiled forms and launches of a model's ternary products."""

    def __init__(self, config: ModelConfig, device: CudaDevice):
        self.config, self.device = config, device
        sub_norm = "norm" if config.sub_norms else "quantize"
        self.kinds = {
            "qkv": ("norm", "store"),
            "o": (sub_norm, "residual"),
            "gate_up": ("norm", "gated"),
            "down": (sub_norm, "residual"),
        }
        self.plans, self.specs = {}, {}
        for group, (prologue, epilogue) in self.kinds.items():
            segments, K = config.group_shape(group)
            plan = w2a8_gemv.plan(sum(segments), K, device.num_sms, epilogue == "gated")
            bias = config.group_bias(group)
            self.plans[group] = plan
            self.specs[group] = w2a8_gemv.spec(device.arch, K, plan, prologue, epilogue, config.activation, bias)

    def launch(self, weights: Weights, layer: int, group: str, x: Any, norm: Any, out: Any) -> Launch:
        """A layer's product: out (or out +=) group's rows times quantised x."""
        segments, _ = self.config.group_shape(group)
        name = f"layers.{layer}.{group}"
        gated = self.kinds[group][1] == "gated"
        rows = segments[0] if gated else sum(segments)
        bounds = np.cumsum(segments)
        blocks = -(-rows // BLOCK_ROWS)
        arguments = (
            weights[f"{name}.words"], x, norm if norm is not None else x, self.config.rms_norm_eps,
            weights[f"{name}.scales"], weights.get(f"{name}.bias"), out, rows, blocks, blocks if gated else 0,
            int(bounds[0]), int(bounds[1]) if len(bounds) > 1 else rows,
        )  # fmt: skip
        return self.device.launch(self.specs[group], self.plans[group].grid, arguments)


def kernel_specs(config: ModelConfig, int8_rows: bool, device: ArchSpec) -> list[KernelSpec]:
    """Every form that decoding with a model takes."""
    return [
        *Products(config, device).specs.values(),  # type: ignore[arg-type]  # only launches ask for more
        *(
            attention.decode_spec(device.arch, config.head_dim, config.num_heads // config.num_kv_heads, long)
            for long in (False, True)
        ),
        embed.embed_spec(device.arch, int8_rows),
        head.spec(device.arch, config.hidden_size, int8_rows),
        sampler.sampler_spec(device.arch),
        embed.advance_spec(device.arch),
    ]


class Step:
    """The launches of one step of one sequence."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        flow: Activations,
        state: SequenceState,
        ring: PinnedArray,
        device: CudaDevice,
    ):
        self._embed = embed.embed(
            device, weights["embed.weight"], weights.get("embed.scale"), state.tokens, state.position, state.seen,
            flow.h, config.hidden_size,
        )  # fmt: skip
        rope = RopeTables(state.cos, state.sin)
        shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        products = Products(config, device)
        self._layers: list[dict[bool, Launch]] = []  # in order; each for short and for long contexts
        for i in range(config.num_layers):
            name = f"layers.{i}"
            keys, values = state.keys_values(i)
            attentions = {
                long: attention.decode_attention(
                    device, flow.qkv, rope, state.position, keys, values, state.padded, flow.attention, flow.mixed,
                    shape, long=long,
                )
                for long in (False, True)
            }  # fmt: skip
            norms = [weights.get(f"{name}.{norm}.weight") for norm in NORMS]
            ends = ((flow.h, flow.qkv), (flow.mixed, flow.h), (flow.h, flow.inner), (flow.inner, flow.h))
            qkv, o, gate_up, down = (
                {False: launch, True: launch}
                for launch in (
                    products.launch(weights, i, group, x, norm, out)
                    for group, norm, (x, out) in zip(GROUPS, norms, ends, strict=True)
                )
            )
            self._layers += [qkv, attentions, o, gate_up, down]
        self._head = head_launch(config, weights, device, flow.h, flow.logits)
        self._sampler = sampler.sampler(
            device, flow.logits, config.vocab_size, state.settings, state.position, state.tokens, state.seen,
            flow.scratch, flow.counters, ring,
        )  # fmt: skip
        self._advance = device.launch(embed.advance_spec(device.arch), 1, (state.position,))

    def score(self, long: bool) -> list[Launch]:
        """A token and its logits. `long`: the context is at least attention.LONG_CONTEXT tokens."""
        return [self._embed, *self.layers(long), self._head, self._advance]

    def decode(self, long: bool) -> list[Launch]:
        """A token and the choice of the next."""
        return [self._embed, *self.layers(long), self._head, self._sampler]

    def choose(self, long: bool) -> list[Launch]:
        """The choice after a token that a pass over a prompt fed (see `rows.Prompts`), whose row is in `flow.h`."""
        return [self._head, self._sampler]

    def layers(self, long: bool) -> list[Launch]:
        """The launches of all layers, in order: as in LAYER, again and again."""
        return [launch[long] for launch in self._layers]

    def launches(self, long: bool) -> dict[str, list[Launch]]:
        """The launches of `decode` by name, for measurements."""
        named = {name: self.layers(long)[i :: len(LAYER)] for i, name in enumerate(LAYER)}
        return {"embed": [self._embed], **named, "head": [self._head], "sampler": [self._sampler]}


def head_launch(
    config: ModelConfig, weights: Weights, device: CudaDevice, h: DeviceArray, logits: DeviceArray
) -> Launch:
    """The final norm and the head of one row: h float32 [hidden] -> logits float32 [vocabulary]."""
    rows = head_name(config)
    return head.head(
        device, weights[f"{rows}.weight"], weights.get(f"{rows}.scale"), h, weights["norm.weight"],
        config.rms_norm_eps, logits, config.vocab_size, config.hidden_size,
    )  # fmt: skip
