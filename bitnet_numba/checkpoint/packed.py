"""The packed checkpoint: the folder that `bitnet-numba convert` writes.

It holds config.json (the source's own plus the key "bitnet_numba"), model.safetensors, tokenizer.json,
tokenizer_config.json and generation_config.json. Its tensors, for layer i and group g of `config.GROUPS`:

    embed.weight             [vocab, hidden] in bfloat16, float16 or float32; or int8, with embed.scale float32 [vocab]
    embed.words, .scales     or ternary, with group scales: as layers.i.g.words and .scales
    head.weight, ...         the same, for the LM head, unless it is tied to the embedding
    norm.weight              float32 [hidden]
    layers.i.input_norm.weight, layers.i.post_attention_norm.weight            float32 [hidden]
    layers.i.attn_post_norm.weight, layers.i.ffn_post_norm.weight              float32 [hidden], if config.gemma: behind
                             attention and feed-forward (post_attention_norm always is the one before the feed-forward)
    layers.i.attn_sub_norm.weight, layers.i.ffn_sub_norm.weight                float32, if config.sub_norms
    layers.i.q_norm.weight, layers.i.k_norm.weight                             float32 [head_dim], if config.qk_norm
    layers.i.g.words         int32, the ternary matrix [N, K] of all segments, packed (see `packing`)
    layers.i.g.scales        float32 [segments]: y = acc * scale / s; or, if config.group_scales, float16, the scales of
                             each row and 128 columns in storage order (see `packing.pack_scales`)
    layers.i.g.bias          float32 [N], if config.group_bias(g)
    layers.i.g.norms         float32 [segments, K], if config.linear_norm
    layers.i.g.weight        bfloat16 [N, K] instead of words, scales and norms, for a group that is not quantised
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.checkpoint.install import read_folder
from bitnet_numba.checkpoint.safetensors_file import TensorFile, TensorSpec
from bitnet_numba.config import GROUPS, ModelConfig
from bitnet_numba.errors import CheckpointError, ConfigError, printable
from bitnet_numba.json_file import read_json
from bitnet_numba.model_folder import ModelFolder
from bitnet_numba.packing import packed_scales, packed_words, unpack_scales, unpack_ternary

FORMAT = 2  # that is written
FORMATS = (1, FORMAT)  # that are read; the first has one format for the rows of embedding and LM head
OPTIONAL_FILES = ["generation_config.json", "special_tokens_map.json", "chat_template.jinja"]
PACKED_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *OPTIONAL_FILES]
RowFormat = Literal["bf16", "f16", "f32", "int8", "ternary"]  # of the rows of embedding and LM head
ROW_FORMATS: dict[str, RowFormat] = {name: name for name in get_args(RowFormat)}
_ROW_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32", "int8": "I8"}
T = TypeVar("T")


def packed_plan(config: ModelConfig, embed: RowFormat, head: RowFormat) -> dict[str, TensorSpec]:
    """All tensors of a packed checkpoint, in file order. `head` has no meaning if it is tied to the embedding."""
    plan: dict[str, TensorSpec] = {}

    def rows(name: str, of: RowFormat) -> None:
        shape = (config.vocab_size, config.hidden_size)
        if of == "ternary":
            plan[f"{name}.words"] = TensorSpec("I32", (packed_words(*shape),))
            plan[f"{name}.scales"] = TensorSpec("F16", (packed_scales(*shape),))
            return
        plan[f"{name}.weight"] = TensorSpec(_ROW_DTYPES[of], shape)
        if of == "int8":
            plan[f"{name}.scale"] = TensorSpec("F32", (config.vocab_size,))

    def norm(name: str, size: int) -> None:
        plan[f"{name}.weight"] = TensorSpec("F32", (size,))

    rows("embed", embed)
    if not config.tied:
        rows("head", head)
    norm("norm", config.hidden_size)
    for i in range(config.num_layers):
        norm(f"layers.{i}.input_norm", config.hidden_size)
        norm(f"layers.{i}.post_attention_norm", config.hidden_size)
        if config.gemma:
            norm(f"layers.{i}.attn_post_norm", config.hidden_size)
            norm(f"layers.{i}.ffn_post_norm", config.hidden_size)
        if config.sub_norms:
            norm(f"layers.{i}.attn_sub_norm", config.q_size)
            norm(f"layers.{i}.ffn_sub_norm", config.intermediate_size)
        if config.qk_norm:
            norm(f"layers.{i}.q_norm", config.head_dim)
            norm(f"layers.{i}.k_norm", config.head_dim)
        for group in GROUPS:
            segments, K = config.group_shape(group)
            N, name = sum(segments), f"layers.{i}.{group}"
            if group_is_ternary(config, i, group):
                plan[f"{name}.words"] = TensorSpec("I32", (packed_words(N, K),))
                scales = TensorSpec("F32", (len(segments),))
                plan[f"{name}.scales"] = TensorSpec("F16", (packed_scales(N, K),)) if config.group_scales else scales
                if config.linear_norm:
                    plan[f"{name}.norms"] = TensorSpec("F32", (len(segments), K))
            else:
                plan[f"{name}.weight"] = TensorSpec("BF16", (N, K))
            if config.group_bias(group):
                plan[f"{name}.bias"] = TensorSpec("F32", (N,))
    return plan


def group_is_ternary(config: ModelConfig, layer: int, group: str) -> bool:
    """Whether a layer's group is quantised. Raises ConfigError if modules_to_not_convert splits the group."""
    kinds = {config.is_ternary(f"model.layers.{layer}.{module}") for module in GROUPS[group]}
    if len(kinds) > 1:
        raise ConfigError(
            "config.json: modules_to_not_convert names some but not all of "
            f"{', '.join(GROUPS[group])} in layer {layer}, which is not supported"
        )
    return kinds.pop()


@dataclass(frozen=True)
class PackedCheckpoint:
    """An open packed checkpoint. Tensors are memory-mapped, so they are read only when they are used."""

    folder: Path
    config: ModelConfig
    embed: RowFormat  # of the embedding
    head: RowFormat  # of the LM head
    file: TensorFile

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self.file.specs)

    def tensor(self, name: str) -> NDArray[Any]:
        """A tensor as a read-only memory map; bfloat16 as uint16 bit patterns. KeyError if there is none."""
        return self.file.view(name)

    def ternary(self, name: str, N: int, K: int) -> NDArray[np.int8]:
        """A tensor of packed words, unpacked: int8 [N, K]. Raises CheckpointError if the words are damaged."""
        try:
            return unpack_ternary(np.asarray(self.tensor(name)), N, K)
        except ValueError as error:
            raise CheckpointError(f"{self.file.path}: tensor {printable(name)}: {error}") from None

    def group_scales(self, name: str, N: int, K: int) -> NDArray[np.float32]:
        """The group scales of a ternary matrix, from storage order: float32 [N, groups]."""
        return unpack_scales(np.asarray(self.tensor(name)), N, K).astype(np.float32)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.file.specs.values())


def open_packed(folder: str | os.PathLike[str] | ModelFolder) -> PackedCheckpoint:
    """Opens a packed checkpoint and checks that it has exactly the expected tensors, with their dtypes and shapes.

    A conversion that replaces the folder meanwhile is harmless: the checkpoint is the old or the new one. Raises
    CheckpointError or ConfigError, naming what is wrong.
    """
    if not isinstance(folder, ModelFolder):
        return read_packed(folder, open_packed)
    raw = read_config(folder)
    packed = raw.get("bitnet_numba")
    if packed is None:
        raise CheckpointError(f"{folder} is not a packed checkpoint: run  bitnet-numba convert {folder} DST")
    embed, head = _row_formats(folder, packed)
    config = ModelConfig.from_hf(raw)
    if config.tied:
        head = embed
    if "ternary" in (embed, head) and not config.group_scales:
        raise CheckpointError(f"{folder}: config.json is damaged: only models with group scales have ternary rows")
    file = TensorFile(folder / "model.safetensors")
    # A damaged config may ask for millions of layers: compare the numbers before building the plan.
    if config.num_layers > len(file.specs):
        raise CheckpointError(f"{file.path}: too few tensors for {config.num_layers} layers")
    plan = packed_plan(config, embed, head)
    for name, spec in plan.items():
        if name not in file.specs:
            raise CheckpointError(f"{file.path}: tensor {name} is missing")
        if file.specs[name] != spec:
            raise CheckpointError(f"{file.path}: tensor {name} is {file.specs[name]}, expected {spec}")
    extra = next((name for name in file.specs if name not in plan), None)
    if extra is not None:
        raise CheckpointError(f"{file.path}: unexpected tensor {printable(extra)}")
    for name, spec in plan.items():
        is_rows = name in ("embed.weight", "head.weight")  # too large to be read here
        if spec.dtype in ("F32", "F16") and not is_rows and not np.isfinite(file.view(name)).all():
            raise CheckpointError(f"{file.path}: tensor {name} holds NaN or infinity")
        if name.endswith((".scale", ".scales")) and not _are_scales(file.view(name)):
            raise CheckpointError(f"{file.path}: tensor {name} holds a scale that is not positive")
    return PackedCheckpoint(folder.path, config, embed, head, file)


def _row_formats(folder: ModelFolder, packed: Any) -> tuple[RowFormat, RowFormat]:
    """The formats of embedding and LM head. CheckpointError for a packed format that is not one of FORMATS."""
    if isinstance(packed, dict) and packed.get("format") in FORMATS:
        head = packed.get("head")
        embed = packed.get("embed") if packed["format"] == FORMAT else head
        if isinstance(head, str) and isinstance(embed, str) and {head, embed} <= ROW_FORMATS.keys():
            return ROW_FORMATS[embed], ROW_FORMATS[head]
    raise CheckpointError(f"{folder} has a packed format that this version does not support: convert it again")


def _are_scales(scales: NDArray[Any]) -> bool:
    """Whether scales are positive; group scales, in float16, may be 0 where all weights are."""
    return bool((scales >= 0).all() if scales.dtype == np.float16 else (scales > 0).all())


def read_packed(path: str | os.PathLike[str], read: Callable[[ModelFolder], T]) -> T:
    """What `read` makes of an open packed folder; all its files are of one conversion (see `install.read_folder`)."""
    return read_folder(path, PACKED_FILES, read)


def read_config(folder: ModelFolder) -> dict[str, Any]:
    """The parsed config.json of a model folder. Raises CheckpointError if there is none or it is damaged."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json")
    return read_json(folder / "config.json")
