"""A checkpoint's tensors in device memory: one slab, filled from the mapped file through page-locked buffers."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bitnet_numba.checkpoint.packed import PackedCheckpoint, RowFormat, packed_plan
from bitnet_numba.checkpoint.safetensors_file import DTYPES
from bitnet_numba.config import GROUPS, ModelConfig
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.parts import MAX_HEAD_DIM
from bitnet_numba.kernels.linear.gemv_groups import MAX_COLUMNS as MAX_GROUPED_COLUMNS
from bitnet_numba.kernels.linear.operands import GroupedLinear, PackedLinear
from bitnet_numba.kernels.linear.quantize import MAX_COLUMNS
from bitnet_numba.kernels.operands import EmbeddingTable, Norm
from bitnet_numba.kernels.runtime.driver import Event, Stream
from bitnet_numba.kernels.runtime.memory import DeviceArray, DeviceView, PinnedArray
from bitnet_numba.kernels.sampling.parts import MAX_VOCAB
from bitnet_numba.packing import BLOCK_COLS, BLOCK_ROWS, num_groups

ALIGN = 256  # bytes: every tensor starts at a multiple of this
STAGING = 32 << 20  # bytes of each of two page-locked buffers


Linear = PackedLinear | GroupedLinear


class RowFormats(NamedTuple):
    """How the rows of a model's embedding and LM head are kept."""

    embed: RowFormat
    head: RowFormat


def why_unsupported(checkpoint: PackedCheckpoint) -> str | None:
    """What the CUDA backend cannot run about a checkpoint, in a few words; None if it can run it."""
    config = checkpoint.config
    if config.embeds and (config.q_size % BLOCK_ROWS or config.kv_size % BLOCK_ROWS or config.head_dim % 4):
        return f"{config.num_heads} and {config.num_kv_heads} heads of {config.head_dim} are not whole blocks of rows"
    if config.linear_norm != config.embeds:
        own = "with" if config.linear_norm else "of embedding models without"
        return f"linears {own} a norm of their own (use_rms_norm) run on the CPU only"
    if any(name.endswith((".qkv.weight", ".o.weight", ".gate_up.weight", ".down.weight")) for name in checkpoint.names):
        return "linears that are not quantised (modules_to_not_convert) run on the CPU only"
    if config.hidden_size % BLOCK_COLS:
        return f"hidden_size {config.hidden_size} is not a multiple of {BLOCK_COLS}"
    if config.intermediate_size % BLOCK_ROWS:
        return f"intermediate_size {config.intermediate_size} is not a multiple of {BLOCK_ROWS}"
    if config.group_scales and config.q_size % 4:
        return f"with group scales, {config.num_heads} heads of {config.head_dim} are no multiple of 4 columns"
    columns = max(config.group_shape(group)[1] for group in GROUPS)
    most = MAX_GROUPED_COLUMNS if config.group_scales else MAX_COLUMNS
    if columns > most:
        return f"a linear of {columns} columns is over {most}" + (" with group scales" if config.group_scales else "")
    if config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is over {MAX_HEAD_DIM}"
    if config.vocab_size > MAX_VOCAB and not config.embeds:
        return f"a vocabulary of {config.vocab_size} is over {MAX_VOCAB}"
    return None


def segment_of(whole: Linear, i: int) -> Linear:
    """The i-th of the linears joined in `whole`; its rows, and those before them, are whole blocks."""
    start, rows, columns = sum(whole.segments[:i]), whole.segments[i], _padded(whole.K)
    words = DeviceView(whole.words.address + start * columns // 4, rows * columns // 16, np.int32)
    bias = None if whole.bias is None else DeviceView(whole.bias.address + 4 * start, rows, np.float32)
    if isinstance(whole, GroupedLinear):
        groups = num_groups(whole.K)
        scales = DeviceView(whole.scales.address + 2 * start * groups, rows * groups, np.float16)
        return GroupedLinear(words, scales, (rows,), whole.K, bias)
    return PackedLinear(words, DeviceView(whole.scales.address + 4 * i, 1, np.float32), (rows,), whole.K, bias)


def _padded(size: int) -> int:
    """Elements with the zeros after them: norms and scales are read in whole 16-byte pieces, up to whole blocks."""
    return -(-size // BLOCK_COLS) * BLOCK_COLS


class Weights:
    """A model's tensors on a device, as the operands of the kernels that read them.

    Norms are padded with zeros to whole blocks of columns. Tensor names are those of `checkpoint.packed`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: RowFormats,
        tensors: Mapping[str, DeviceArray],
        slab: DeviceArray | None = None,
    ):
        """slab: the memory that the tensors lie in, freed by `close`."""
        self._config, self._tensors, self._slab = config, tensors, slab
        self.nbytes = slab.nbytes if slab is not None else 0
        self.embedding = self._table("embed", rows.embed)
        self.lm_head = self._lm_head("embed", rows.embed) if config.tied else self._lm_head("head", rows.head)
        self.final_norm = self._norm("norm.weight")

    @staticmethod
    def upload(checkpoint: PackedCheckpoint, stream: Stream, free: int) -> "Weights":
        """Copies a checkpoint to the device; `free` is the device memory, in bytes, that may be used.

        Raises BackendError if it does not suffice.
        """
        offsets: dict[str, int] = {}
        size = 0
        for name in checkpoint.names:
            tensor = checkpoint.tensor(name)
            offsets[name] = size
            size += -(-_padded(tensor.size) * tensor.itemsize // ALIGN) * ALIGN
        if size > free:
            raise BackendError(
                f"the weights take {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB of device memory are free"
            )
        slab = DeviceArray(size, np.uint8, zero=True)
        tensors: dict[str, DeviceArray] = {}
        staging = [(PinnedArray(STAGING, np.uint8), Event()) for _ in range(2)]
        copies = 0
        for name in checkpoint.names:
            tensor = checkpoint.tensor(name)
            tensors[name] = DeviceView(slab.address + offsets[name], _padded(tensor.size), tensor.dtype)
            data = tensor.reshape(-1).view(np.uint8)
            for start in range(0, len(data), STAGING):
                buffer, done = staging[copies % 2]
                part = data[start : start + STAGING]
                if copies >= 2:
                    done.wait()  # the last copy out of this buffer
                buffer.host[: len(part)] = part
                stream.upload(slab.address + offsets[name] + start, buffer, len(part))
                done.record(stream)
                copies += 1
        stream.synchronize()
        for buffer, _ in staging:
            buffer.close()
        return Weights(checkpoint.config, RowFormats(checkpoint.embed, checkpoint.head), tensors, slab)

    @staticmethod
    def shapes_only(config: ModelConfig, rows: RowFormats) -> "Weights":
        """Weights without memory, for a dry run."""
        plan = packed_plan(config, *rows)
        return Weights(
            config,
            rows,
            {
                name: DeviceView(0, _padded(int(np.prod(spec.shape, dtype=np.int64))), DTYPES[spec.dtype])
                for name, spec in plan.items()
            },
        )

    def linear(self, layer: int, group: str) -> Linear:
        """A layer's ternary matrix of a group (a key of `config.GROUPS`)."""
        segments, K = self._config.group_shape(group)
        name = f"layers.{layer}.{group}"
        kind = GroupedLinear if self._config.group_scales else PackedLinear
        return kind(
            self._tensors[f"{name}.words"],
            self._tensors[f"{name}.scales"],
            tuple(segments),
            K,
            self._tensors.get(f"{name}.bias"),
        )

    def segment(self, layer: int, group: str, i: int) -> tuple[PackedLinear, Norm]:
        """The i-th linear of a group whose linears have norms of their own, and its norm; its rows, and those before
        them, are whole blocks."""
        linear = segment_of(self.linear(layer, group), i)
        assert isinstance(linear, PackedLinear)
        norms = self._tensors[f"layers.{layer}.{group}.norms"].address
        return linear, Norm(DeviceView(norms + 4 * i * linear.K, linear.K, np.float32), self._config.linear_norm_eps)

    def layer_norm(self, layer: int, name: str) -> Norm | None:
        """A layer's input_norm, attn_sub_norm, attn_post_norm, ...; None if the model has none."""
        full_name = f"layers.{layer}.{name}.weight"
        return self._norm(full_name) if full_name in self._tensors else None

    def head_norm(self, layer: int, name: str) -> Norm:
        """A layer's q_norm or k_norm, of models that have them."""
        return self._norm(f"layers.{layer}.{name}.weight")

    def _norm(self, name: str) -> Norm:
        return Norm(self._tensors[name], self._config.rms_norm_eps)

    def _lm_head(self, name: str, row_format: RowFormat) -> EmbeddingTable | GroupedLinear:
        """The LM head: a table of rows or, where these are ternary, the operand of a ternary product."""
        table = self._table(name, row_format)
        if row_format != "ternary":
            return table
        return GroupedLinear(table.rows, table.scale, (table.vocab_size,), table.columns)

    def _table(self, name: str, row_format: RowFormat) -> EmbeddingTable:
        config, tensors = self._config, self._tensors
        ternary = row_format == "ternary"
        rows = tensors[f"{name}.words" if ternary else f"{name}.weight"]
        scale = tensors.get(f"{name}.scales" if ternary else f"{name}.scale")
        return EmbeddingTable(rows, scale, config.vocab_size, config.hidden_size, row_format)

    def close(self) -> None:
        """Frees the memory."""
        if self._slab is not None:
            self._slab.close()
