"""Where a checkpoint's tensors are in the mapped file: the arrays of addresses that the compiled step reads."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.checkpoint.packed import PackedCheckpoint, group_is_ternary
from bitnet_numba.config import GROUPS
from bitnet_numba.kernels.cpu import layout, lm_head


class Weights:
    """Where a checkpoint's tensors are: the arrays that `step` reads."""

    def __init__(self, checkpoint: PackedCheckpoint, row_sums: int | None):
        self.config = c = checkpoint.config
        self._checkpoint = checkpoint
        self._kept: list[NDArray[Any]] = []  # what addresses point to
        self.nbytes = checkpoint.nbytes()
        self.model = np.zeros(1, layout.MODEL)
        m = self.model[0]
        m["layers"] = c.num_layers
        m["hidden"], m["intermediate"], m["vocab"] = c.hidden_size, c.intermediate_size, c.vocab_size
        m["heads"], m["kv_heads"], m["head_dim"] = c.num_heads, c.num_kv_heads, c.head_dim
        m["activation"], m["embedding_scale"] = layout.ACTIVATIONS[c.activation], c.embedding_scale
        m["eps"], m["linear_eps"] = c.rms_norm_eps, c.linear_norm_eps
        m["norm"] = self._address("norm.weight")
        self._rows(m, row_sums)
        self.layers = np.zeros(c.num_layers, layout.LAYER)
        for i, layer in enumerate(self.layers):
            layer["input_norm"] = self._address(f"layers.{i}.input_norm.weight")
            layer["post_attention_norm"] = self._address(f"layers.{i}.post_attention_norm.weight")
            if c.sub_norms:
                layer["attn_sub_norm"] = self._address(f"layers.{i}.attn_sub_norm.weight")
                layer["ffn_sub_norm"] = self._address(f"layers.{i}.ffn_sub_norm.weight")
            if c.gemma:
                layer["attn_post_norm"] = self._address(f"layers.{i}.attn_post_norm.weight")
                layer["ffn_post_norm"] = self._address(f"layers.{i}.ffn_post_norm.weight")
            layer["window"] = c.window_of(i) or 0
            if c.qk_norm:
                layer["q_norm"] = self._address(f"layers.{i}.q_norm.weight")
                layer["k_norm"] = self._address(f"layers.{i}.k_norm.weight")
            for group in GROUPS:
                self._linear(layer[group], i, group)

    def _linear(self, linear: Any, layer: int, group: str) -> None:
        name = f"layers.{layer}.{group}"
        linear["segments"] = len(GROUPS[group])
        if group_is_ternary(self.config, layer, group):
            linear["words"] = self._address(f"{name}.words")
            linear["group_scales" if self.config.group_scales else "scales"] = self._address(f"{name}.scales")
            if self.config.linear_norm:
                linear["norms"] = self._address(f"{name}.norms")
        else:
            linear["rows"] = self._keep(_with_min_columns(self._checkpoint.tensor(f"{name}.weight")))
        if self.config.group_bias(group):
            linear["bias"] = self._address(f"{name}.bias")

    def _rows(self, m: Any, row_sums: int | None) -> None:
        head = "embed" if self.config.tied else "head"
        embed_format, head_format = self._checkpoint.embed, self._checkpoint.head
        m["embed_format"], m["head_format"] = layout.ROW_FORMATS[embed_format], layout.ROW_FORMATS[head_format]
        if embed_format == "ternary":
            m["embed"], m["embed_scale"] = self._address("embed.words"), self._address("embed.scales")
        else:
            m["embed"] = self._address("embed.weight")
        if embed_format == "int8":
            m["embed_scale"] = self._address("embed.scale")
        m["head"]["segments"] = 1
        if head_format == "ternary":
            m["head"]["words"], m["head"]["group_scales"] = (
                self._address(f"{head}.{of}") for of in ("words", "scales")
            )
            return
        rows = _with_min_columns(self._checkpoint.tensor(f"{head}.weight"))
        m["head"]["rows"] = self._keep(rows)
        if head_format == "int8":
            m["head_scale"] = self._address(f"{head}.scale")
        if row_sums is not None:
            sums = np.empty(self.config.vocab_size, np.int32)
            _call(row_sums, int(m["head"]["rows"]), rows.shape[1], sums.ctypes.data, 0, len(sums))
            m["head_sums"] = self._keep(sums)

    def _address(self, name: str) -> int:
        return self._keep(self._checkpoint.tensor(name))

    def _keep(self, array: NDArray[Any]) -> int:
        self._kept.append(array)
        return array.ctypes.data


def _with_min_columns(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows of at least as many columns as the kernels need; the same ones, in the mapped file, if they have them."""
    missing = lm_head.MIN_COLUMNS - rows.shape[1]
    return rows if missing <= 0 else np.ascontiguousarray(np.pad(rows, ((0, 0), (0, missing))))


def _call(address: int, *arguments: int) -> None:
    """Calls a kernel from Python."""
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(address)(*arguments)
