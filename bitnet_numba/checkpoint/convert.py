"""Converts a Hugging Face BitNet checkpoint into the packed checkpoint that bitnet_numba runs.

Tensors are converted one at a time into a temporary folder beside the target, which is renamed at the end: if the
conversion is interrupted, the target is as it was before.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.checkpoint.huggingface import HuggingFaceCheckpoint
from bitnet_numba.checkpoint.packed import FORMAT, EmbeddingDtype, group_is_ternary, packed_plan, read_config
from bitnet_numba.checkpoint.safetensors_file import write_tensors
from bitnet_numba.config import GROUPS
from bitnet_numba.errors import CheckpointError, one_line
from bitnet_numba.packing import pack_ternary
from bitnet_numba.text.tokenizer import Tokenizer, from_tiktoken

OPTIONAL_FILES = ["generation_config.json", "special_tokens_map.json", "chat_template.jinja"]
PACKED_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *OPTIONAL_FILES]
ROWS_AT_A_TIME = 8192  # of embedding and LM head, checked and rounded in chunks to bound memory

Named = tuple[str, np.ndarray]


@dataclass
class Report:
    """Statistics of a conversion."""

    tensors: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    zeros: dict[str, list[int]] = field(default_factory=dict)  # kind of matrix -> [number of zeros, number of weights]


def convert(
    source: Path,
    target: Path,
    head: EmbeddingDtype = "bf16",
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Converts the Hugging Face folder `source` into the packed folder `target`.

    head: dtype of embedding and LM head.
    force: replace `target` if it is a packed checkpoint.
    progress: called after each tensor with the bytes written so far and the total.

    Raises BitNetError if anything is wrong with either folder; `target` is then unchanged.
    """
    if target.exists() and not force:
        raise CheckpointError(f"{target} already exists; use --force to replace it")
    if target.exists():
        refuse_to_replace(source, target)
    checkpoint = HuggingFaceCheckpoint(source)
    plan = packed_plan(checkpoint.config, head)
    report = Report(checkpoint.count, checkpoint.nbytes, sum(spec.nbytes for spec in plan.values()))
    try:
        with beside(target) as folder:
            write_tokenizer(source, folder, checkpoint.config.vocab_size)
            raw = checkpoint.raw_config | {"bitnet_numba": {"format": FORMAT, "head": head}}
            (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
            with open(folder / "model.safetensors", "wb") as file:
                tensors = packed_tensors(checkpoint, head, report)
                if progress is not None:
                    tensors = reporting(tensors, progress, report.bytes_after)
                write_tensors(file, plan, tensors, {"format": "np"})
                file.flush()
                os.fsync(file.fileno())
            checkpoint.refuse_leftovers()
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or one_line(error)}") from None
    return report


def refuse_to_replace(source: Path, target: Path) -> None:
    """Raises CheckpointError unless `target` is empty or a packed checkpoint without any other files."""
    if source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} holds the source, so --force will not replace it")
    names = {path.name for path in target.iterdir()} if target.is_dir() else {""}
    if names and "bitnet_numba" not in _config_of(target):
        raise CheckpointError(f"{target} is not a packed checkpoint, so --force will not replace it")
    if names - {*PACKED_FILES}:
        raise CheckpointError(f"{target} also holds {min(names - {*PACKED_FILES})}, so --force will not replace it")


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return read_config(folder)
    except CheckpointError:
        return {}


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that replaces it at the end, or is deleted if anything fails.

    A symbolic link is followed. Leftovers of a killed conversion into the same target are deleted first.
    """
    target = target.resolve()
    folder = target.parent / f".{target.name}.bitnet-partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        if target.exists():
            old = target.parent / f".{target.name}.bitnet-old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reporting(tensors: Iterator[Named], progress: Callable[[int, int], object], total: int) -> Iterator[Named]:
    """Passes tensors through, and calls `progress` after each with the bytes so far."""
    written = 0
    for name, array in tensors:
        yield name, array
        written += array.nbytes
        progress(written, total)


def packed_tensors(checkpoint: HuggingFaceCheckpoint, head: EmbeddingDtype, report: Report) -> Iterator[Named]:
    """All tensors of the packed checkpoint, in the order of `packed_plan`."""
    config = checkpoint.config
    yield from row_tensors(checkpoint, "embed", "model.embed_tokens.weight", head)
    if config.tied:
        checkpoint.drop_if_equal("lm_head.weight", "model.embed_tokens.weight")
    elif not config.is_ternary("lm_head"):
        yield from row_tensors(checkpoint, "head", "lm_head.weight", head)
    else:
        raise CheckpointError("config.json: a quantised lm_head (modules_to_not_convert without it) is not supported")
    yield "norm.weight", checkpoint.take_floats("model.norm.weight", (config.hidden_size,))
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        for name, theirs in (("input_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")):
            weight = checkpoint.take_floats(f"{prefix}.{theirs}.weight", (config.hidden_size,))
            yield f"layers.{i}.{name}.weight", weight
        if config.sub_norms:
            for name, size in (("attn_sub_norm", config.q_size), ("ffn_sub_norm", config.intermediate_size)):
                yield f"layers.{i}.{name}.weight", checkpoint.take_sub_norm(i, name, size)
        for group in GROUPS:
            yield from group_tensors(checkpoint, i, group, report)


def row_tensors(checkpoint: HuggingFaceCheckpoint, name: str, source: str, head: EmbeddingDtype) -> Iterator[Named]:
    """Embedding or LM head as bfloat16 rows, or as int8 rows with one scale absmax / 127 per row."""
    config = checkpoint.config
    dtype, stored = checkpoint.take_raw(source, (config.vocab_size, config.hidden_size))
    out = np.empty(stored.shape, np.int8) if head == "int8" else np.empty(stored.shape, np.uint16)
    scales = np.empty(config.vocab_size, np.float32)
    for start in range(0, config.vocab_size, ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        values = to_float32(stored[rows]) if dtype == "BF16" else stored[rows].astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"tensor {source} holds NaN or infinity")
        if head == "int8":
            scales[rows] = np.abs(values).max(axis=1) / np.float32(127)
            safe = np.where(scales[rows] >= np.finfo(np.float32).tiny, scales[rows], np.float32(1))
            out[rows] = np.clip(np.rint(values / safe[:, None]), -127, 127)
            scales[rows] = safe
        else:
            out[rows] = from_float32(values)
    yield f"{name}.weight", out
    if head == "int8":
        yield f"{name}.scale", scales


def group_tensors(checkpoint: HuggingFaceCheckpoint, layer: int, group: str, report: Report) -> Iterator[Named]:
    """The linears of a group, joined into one matrix: words and scales, or dense rows."""
    config, name = checkpoint.config, f"layers.{layer}.{group}"
    segments, K = config.group_shape(group)
    modules = [f"model.layers.{layer}.{module}" for module in GROUPS[group]]
    has_bias = config.group_bias(group)
    if group_is_ternary(config, layer, group):
        linears = [checkpoint.take_linear(m, N, K, has_bias) for m, N in zip(modules, segments, strict=True)]
        for module, linear in zip(GROUPS[group], linears, strict=True):
            count = report.zeros.setdefault(module.split(".")[1], [0, 0])
            count[0] += linear.t.size - int(np.count_nonzero(linear.t))
            count[1] += linear.t.size
        yield f"{name}.words", pack_ternary(np.concatenate([linear.t for linear in linears]))
        yield f"{name}.scales", np.array([linear.m for linear in linears], np.float32)
        if config.linear_norm:
            yield f"{name}.norms", np.stack([linear.norm for linear in linears if linear.norm is not None])
        biases = [linear.bias for linear in linears if linear.bias is not None]
    else:
        parts = [checkpoint.take_floats(f"{m}.weight", (N, K)) for m, N in zip(modules, segments, strict=True)]
        yield f"{name}.weight", from_float32(np.concatenate(parts))
        biases = [checkpoint.take_floats(f"{m}.bias", (N,)) for m, N in zip(modules, segments, strict=True) if has_bias]
    if has_bias:
        yield f"{name}.bias", np.concatenate(biases)


def write_tokenizer(source: Path, folder: Path, vocab_size: int) -> None:
    """Copies the tokenizer's files, or builds them from a tiktoken vocabulary; checks that the result opens."""
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
        if (source / "tokenizer_config.json").is_file():
            shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
    elif (source / "tokenizer.model").is_file():
        from_tiktoken(source / "tokenizer.model", folder)
    else:
        raise CheckpointError(f"{source} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    for name in OPTIONAL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    Tokenizer.open(folder, vocab_size, trial=True)
