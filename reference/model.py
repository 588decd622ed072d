"""The BitNet b1.58 model in NumPy: the specification that every other backend is tested against.

Read it beside "The Era of 1-bit LLMs" (Ma et al., 2024) and the "BitNet b1.58 2B4T Technical Report" (2025). Nothing is
fused and nothing is clever; arithmetic is float32, except that a linear's sum of products is an exact integer.

Letters: M tokens in this call, T tokens in the cache after it, N rows out, K columns in, H heads, G key-value heads,
D head_dim, V vocabulary size. A comment gives the shape where it changes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.checkpoint.packed import PackedCheckpoint, RowFormat, group_is_ternary
from bitnet_numba.config import GROUPS, Activation, ModelConfig
from bitnet_numba.packing import GROUP_COLS
from bitnet_numba.quantize import SECOND_STEP, quantize_activations, quantize_groups, quantize_groups_twice
from bitnet_numba.reference.rope import rope_tables

Floats = NDArray[np.float32]
Append = Callable[[Floats, Floats], tuple[Floats, Floats]]
ONE = np.float32(1)
TILE = 1 << 18  # weights converted to float32 at a time, so that they stay in the CPU's cache
EXACT_COLUMNS = (1 << 24) // 128  # sums of this many products of int8 with ternary are exact in float32


class Cache:
    """Keys and values of one sequence, for every layer: float32 [capacity, G, D] each."""

    length = 0  # number of tokens in the cache

    def __init__(self, config: ModelConfig, capacity: int):
        shape = (config.num_layers, 2, capacity, config.num_kv_heads, config.head_dim)
        self.values = np.empty(shape, np.float32)

    def append(self, layer: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
        """Stores the next tokens' keys and values [M, G, D] of a layer; returns those of all tokens [T, G, D]."""
        end = self.length + len(keys)
        self.values[layer, :, self.length : end] = keys, values
        return self.values[layer, 0, :end], self.values[layer, 1, :end]


class Model:
    """A decoder-only transformer with ternary linears. Ternary weights are int8 in memory."""

    def __init__(self, checkpoint: PackedCheckpoint):
        config = checkpoint.config
        self.config = config
        self.embedding = load_rows(checkpoint, "embed", checkpoint.embed)
        self.layers = [Layer(checkpoint, i) for i in range(config.num_layers)]
        self.norm = np.array(checkpoint.tensor("norm.weight"))
        self.head = self.embedding if config.tied else load_rows(checkpoint, "head", checkpoint.head)

    def forward(self, ids: NDArray[np.int64], cache: Cache) -> Floats:
        """Appends tokens [M] to the cache and returns their final hidden states, float32 [M, hidden]."""
        config = self.config
        x = self.embedding.look_up(ids)  # [M] -> [M, hidden]
        if config.gemma:
            x = x * np.float32(config.embedding_scale)
        positions = np.arange(cache.length, cache.length + len(ids))
        tables = [rope_tables(config, positions, local) for local in (False, True)]
        for i, layer in enumerate(self.layers):
            cos, sin = tables[config.window_of(i) is not None]
            x = layer(x, cos, sin, partial(cache.append, i))
        cache.length += len(ids)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Floats) -> Floats:
        """Scores of the next token: [M, hidden] -> [M, V]."""
        return self.head.product(hidden)

    def nbytes(self) -> int:
        """Bytes of all weights, including embedding and LM head, which stay in the memory-mapped file."""
        linears = [
            linear
            for layer in self.layers
            for linear in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
        ]
        rows = self.embedding.nbytes + (0 if self.config.tied else self.head.nbytes)
        return rows + sum(
            linear.rows.nbytes if isinstance(linear, DenseLinear) else linear.t.nbytes for linear in linears
        )


class Layer:
    """One block: attention and feed-forward, each with a norm before it, in Gemma's block also behind it, and a
    residual around it."""

    def __init__(self, checkpoint: PackedCheckpoint, i: int):
        def norm(name: str) -> Floats:
            return np.array(checkpoint.tensor(f"layers.{i}.{name}.weight"))

        config = checkpoint.config
        self.config, self.window = config, config.window_of(i)
        self.input_norm, self.post_attention_norm = norm("input_norm"), norm("post_attention_norm")
        if config.sub_norms:
            self.attn_sub_norm, self.ffn_sub_norm = norm("attn_sub_norm"), norm("ffn_sub_norm")
        if config.gemma:
            self.attn_post_norm, self.ffn_post_norm = norm("attn_post_norm"), norm("ffn_post_norm")
        if config.qk_norm:
            self.q_norm, self.k_norm = norm("q_norm"), norm("k_norm")
        self.q, self.k, self.v = load_linears(checkpoint, i, "qkv")
        (self.o,) = load_linears(checkpoint, i, "o")
        self.gate, self.up = load_linears(checkpoint, i, "gate_up")
        (self.down,) = load_linears(checkpoint, i, "down")

    def __call__(self, x: Floats, cos: Floats, sin: Floats, append: Append) -> Floats:
        """Tokens [M, hidden], the next of a sequence -> [M, hidden]; `append` is the cache's, for this layer."""
        eps = self.config.rms_norm_eps
        y = self.attention(rms_norm(x, self.input_norm, eps), cos, sin, append)
        x = x + (rms_norm(y, self.attn_post_norm, eps) if self.config.gemma else y)
        y = self.feed_forward(rms_norm(x, self.post_attention_norm, eps))
        return x + (rms_norm(y, self.ffn_post_norm, eps) if self.config.gemma else y)

    def attention(self, x: Floats, cos: Floats, sin: Floats, append: Append) -> Floats:
        """Grouped-query causal attention [M, hidden] -> [M, hidden]."""
        config, M = self.config, len(x)
        q = self.q(x).reshape(M, config.num_heads, config.head_dim)  # [M, hidden] -> [M, H, D]
        k = self.k(x).reshape(M, config.num_kv_heads, config.head_dim)  # [M, G, D]
        if config.qk_norm:
            q, k = (rms_norm(q, self.q_norm, config.rms_norm_eps), rms_norm(k, self.k_norm, config.rms_norm_eps))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        v = self.v(x).reshape(M, config.num_kv_heads, config.head_dim)
        keys, values = append(k, v)  # [M, G, D] -> [T, G, D]
        attn_out: Floats = attend(q, keys, values, self.window).reshape(M, config.q_size)  # [M, H, D] -> [M, H * D]
        if config.sub_norms:
            attn_out = rms_norm(attn_out, self.attn_sub_norm, config.rms_norm_eps)
        return self.o(attn_out)

    def feed_forward(self, x: Floats) -> Floats:
        """Gated feed-forward [M, hidden] -> [M, hidden]."""
        config = self.config
        mlp_hidden = ACTIVATIONS[config.activation](self.gate(x)) * self.up(x)  # [M, hidden] -> [M, intermediate]
        if config.sub_norms:
            mlp_hidden = rms_norm(mlp_hidden, self.ffn_sub_norm, config.rms_norm_eps)
        return self.down(mlp_hidden)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang and Sennrich, 2019)."""
    variance: Floats = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return weight * (x * (ONE / np.sqrt(variance + np.float32(eps))))


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary embedding of the pairs (x[j], x[j + D/2]). [M, heads, D] -> [M, heads, D]."""
    half = x.shape[-1] // 2
    turned: Floats = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos[:, None, :] + turned * sin[:, None, :]


def attend(q: Floats, keys: Floats, values: Floats, window: int | None = None) -> Floats:
    """Causal attention of M queries, the last M of T positions. q [M, H, D]; keys, values [T, G, D] -> [M, H, D].

    Query head h reads key-value head h // (H / G); softmax(q . k / sqrt(D)) in float32. With a window, a query sees
    its own position and those before it, `window` in all.
    """
    (M, H, D), (T, G, _) = q.shape, keys.shape
    grouped = q.reshape(M, G, H // G, D).transpose(1, 2, 0, 3)  # [G, H / G, M, D]
    scores = grouped @ keys.transpose(1, 2, 0)[:, None]  # [G, H / G, M, T]
    scores *= np.float32(D**-0.5)
    distance = np.arange(T - M, T)[:, None] - np.arange(T)  # [M, T]
    unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores[..., unseen] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = weights @ values.transpose(1, 0, 2)[:, None]  # [G, H / G, M, D]
    return out.transpose(2, 0, 1, 3).reshape(M, H, D)


def relu2(x: Floats) -> Floats:
    """Squared ReLU (So et al., 2021)."""
    return np.square(np.maximum(x, 0))


def silu(x: Floats) -> Floats:
    """x * sigmoid(x) (Hendrycks and Gimpel, 2016)."""
    with np.errstate(over="ignore"):  # exp(-x) may overflow to infinity; the quotient is then 0, as it should be
        return x / (ONE + np.exp(-x))


def gelu(x: Floats) -> Floats:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), an approximation by Hendrycks and Gimpel (2016)."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * (x * x * x))
    return np.float32(0.5) * x * (ONE + np.tanh(inner))


ACTIVATIONS: dict[Activation, Callable[[Floats], Floats]] = {"relu2": relu2, "silu": silu, "gelu": gelu}


@dataclass(frozen=True)
class TernaryLinear:
    """y = (q . t) * m / s + bias, with q, s the quantised input (after an optional RMSNorm) and t, m the weights."""

    t: NDArray[np.int8]  # [N, K] in {-1, 0, 1}
    m: np.float32
    bias: Floats | None  # [N]
    norm: Floats | None  # [K]
    norm_eps: float

    def __call__(self, x: Floats) -> Floats:
        """[M, K] -> [M, N]"""
        if self.norm is not None:
            x = rms_norm(x, self.norm, self.norm_eps)
        q, s = quantize_activations(x)  # [M, K], [M, 1]
        y = integer_product(q, self.t) * self.m / s
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class GroupedLinear:
    """The same with a scale m for each row and 128 columns, and int8 activations with a step d for each token and 128:

    y = sum over groups g of (q . t over the columns of g) * (m_g * d_g) + bias, in float32, from the first group on.

    With two planes, the same product of the second one, whose steps are d / 254, is added before the bias.
    """

    t: NDArray[np.int8]  # [N, K] in {-1, 0, 1}
    m: Floats  # [N, groups]
    bias: Floats | None  # [N]
    planes: int = 1  # of activations

    def __call__(self, x: Floats) -> Floats:
        """[M, K] -> [M, N]"""
        if self.planes == 1:
            y = self.product(*quantize_groups(x))
        else:
            q, q2, d = quantize_groups_twice(x)
            y = self.product(q, d) + self.product(q2, d * SECOND_STEP)
        return y if self.bias is None else y + self.bias

    def product(self, q: NDArray[np.int8], d: Floats) -> Floats:
        """Without the bias: int8 [M, K] and steps [M, groups] -> [M, N]"""
        y = np.zeros((len(q), len(self.t)), np.float32)
        for g in range(self.m.shape[1]):
            columns = slice(GROUP_COLS * g, GROUP_COLS * (g + 1))
            y += integer_product(q[:, columns], self.t[:, columns]) * (self.m[:, g] * d[:, g, None])
        return y


@dataclass(frozen=True)
class DenseLinear:
    """y = x . w + bias: a linear that is not quantised."""

    rows: "Rows"
    bias: Floats | None

    def __call__(self, x: Floats) -> Floats:
        """[M, K] -> [M, N]"""
        y = self.rows.product(x)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Rows:
    """A matrix of floating-point or scaled int8 rows: embedding, LM head or dense linear, in the dtype of the file."""

    stored: NDArray[Any]  # [N, K], uint16 bit patterns of bfloat16, float16, float32 or int8
    scale: Floats | None  # [N], for int8

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.stored.nbytes

    def look_up(self, ids: NDArray[np.int64]) -> Floats:
        """Rows by number: [M] -> [M, K]"""
        x = widen(self.stored[ids])
        return x if self.scale is None else x * self.scale[ids, None]

    def product(self, x: Floats) -> Floats:
        """[M, K] -> [M, N]"""
        y = np.empty((len(x), len(self.stored)), np.float32)
        for rows in tiles(*self.stored.shape):
            np.matmul(x, widen(self.stored[rows]).T, out=y[:, rows])
        return y if self.scale is None else y * self.scale


@dataclass(frozen=True)
class TernaryRows:
    """Ternary rows with group scales: embedding, or LM head."""

    linear: GroupedLinear

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.linear.t.nbytes

    def look_up(self, ids: NDArray[np.int64]) -> Floats:
        """Rows by number: [M] -> [M, K]"""
        t, m = self.linear.t[ids], np.repeat(self.linear.m[ids], GROUP_COLS, axis=1)
        return t * m[:, : t.shape[1]]

    def product(self, x: Floats) -> Floats:
        """[M, K] -> [M, N], of activations in int8 as for any ternary linear"""
        return self.linear(x)


def load_rows(checkpoint: PackedCheckpoint, name: str, row_format: RowFormat) -> Rows | TernaryRows:
    """Embedding or LM head, left in the mapped file unless it is ternary."""
    if row_format == "ternary":
        shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
        t, m = checkpoint.ternary(f"{name}.words", *shape), checkpoint.group_scales(f"{name}.scales", *shape)
        return TernaryRows(GroupedLinear(t, m, None, checkpoint.config.activation_planes))
    scale = np.array(checkpoint.tensor(f"{name}.scale")) if row_format == "int8" else None
    return Rows(checkpoint.tensor(f"{name}.weight"), scale)


def widen(stored: NDArray[Any]) -> Floats:
    """bfloat16 bit patterns, float16, float32 or int8 as float32, exactly."""
    return to_float32(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)


def integer_product(q: NDArray[np.int8], t: NDArray[np.int8]) -> Floats:
    """The exact sums of q * t: int8 [M, K], ternary int8 [N, K] -> integers in float32 [M, N].

    float32 represents all integers up to 2^24, and no partial sum of int8 times ternary over EXACT_COLUMNS columns is
    larger, in whatever order the matrix product adds them.
    """
    if q.shape[1] > EXACT_COLUMNS:
        raise ValueError(f"{q.shape[1]} columns are more than {EXACT_COLUMNS}: sums in float32 would not be exact")
    acc = np.empty((len(q), len(t)), np.float32)
    wide = q.astype(np.float32)
    for rows in tiles(*t.shape):
        np.matmul(wide, t[rows].astype(np.float32).T, out=acc[:, rows])
    return acc


def tiles(N: int, K: int) -> list[slice]:
    """Row ranges that cut an [N, K] matrix into tiles of about TILE elements."""
    step = max(1, TILE // K)
    return [slice(start, start + step) for start in range(0, N, step)]


Linear = TernaryLinear | GroupedLinear | DenseLinear


def load_linears(checkpoint: PackedCheckpoint, layer: int, group: str) -> list[Linear]:
    """The linears of a group (see `config.GROUPS`), split from the one matrix they are stored as."""
    config, name = checkpoint.config, f"layers.{layer}.{group}"
    segments, K = config.group_shape(group)
    bias = np.array(checkpoint.tensor(f"{name}.bias")) if config.group_bias(group) else None
    ternary = group_is_ternary(config, layer, group)
    if ternary:
        t = checkpoint.ternary(f"{name}.words", sum(segments), K)
        grouped = config.group_scales
        scales = checkpoint.group_scales(f"{name}.scales", *t.shape) if grouped else checkpoint.tensor(f"{name}.scales")
        norms = np.array(checkpoint.tensor(f"{name}.norms")) if config.linear_norm else None
    linears: list[Linear] = []
    start = 0
    for i in range(len(GROUPS[group])):
        rows = slice(start, start + segments[i])
        start = rows.stop
        part_of_bias = None if bias is None else bias[rows]
        if ternary and config.group_scales:
            linears.append(GroupedLinear(t[rows], scales[rows], part_of_bias, config.activation_planes))
        elif ternary:
            norm = None if norms is None else norms[i]
            linears.append(TernaryLinear(t[rows], np.float32(scales[i]), part_of_bias, norm, config.linear_norm_eps))
        else:
            linears.append(DenseLinear(Rows(checkpoint.tensor(f"{name}.weight")[rows], None), part_of_bias))
    return linears
