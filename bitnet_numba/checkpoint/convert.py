"""Converts a Hugging Face BitNet checkpoint or a GGUF file into the packed checkpoint that bitnet_numba runs.

Tensors are converted one at a time into a folder beside the target, which takes its place at the end (see `install`):
if the conversion is interrupted, the target is as it was before.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_numba.bfloat16 import from_float32, to_float32
from bitnet_numba.checkpoint.gguf import GgufCheckpoint
from bitnet_numba.checkpoint.gguf_file import is_gguf
from bitnet_numba.checkpoint.gguf_tokenizer import write_tokenizer_files
from bitnet_numba.checkpoint.gguf_types import I2sLayout
from bitnet_numba.checkpoint.huggingface import HuggingFaceCheckpoint
from bitnet_numba.checkpoint.install import CannotWrite, replacing
from bitnet_numba.checkpoint.packed import (
    FORMAT,
    OPTIONAL_FILES,
    PACKED_FILES,
    RowFormat,
    group_is_ternary,
    packed_plan,
    read_config,
)
from bitnet_numba.checkpoint.rows import HeadFormat, Named, Rows, row_format, row_tensors
from bitnet_numba.checkpoint.safetensors_file import write_tensors
from bitnet_numba.config import GROUPS
from bitnet_numba.errors import CheckpointError, one_line, printable
from bitnet_numba.model_folder import FileError, ModelFile, ModelFolder, why
from bitnet_numba.packing import pack_scales, pack_ternary
from bitnet_numba.text.chat_template import ADDITIONAL
from bitnet_numba.text.tiktoken import from_tiktoken
from bitnet_numba.text.tokenizer import Tokenizer

GROUPS_FOUND = (
    "the linears were found to be ternary times a scale for each row and 128 columns; activations will be int8 with a "
    "scale for each 128 columns"
)
# A layer's norms, and what they are called in transformers; in Gemma's block, a name there means another one.
NORMS = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "pre_feedforward_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
Source = HuggingFaceCheckpoint | GgufCheckpoint


@dataclass
class Report:
    """Statistics of a conversion."""

    tensors: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    zeros: dict[str, list[int]] = field(default_factory=dict)  # kind of matrix -> [number of zeros, number of weights]
    notes: list[str] = field(default_factory=list)  # what the user should know, such as keys that were ignored


def convert(
    source: Path,
    target: Path,
    head: HeadFormat = "source",
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
    i2s_layout: I2sLayout | None = None,
) -> Report:
    """Converts the Hugging Face folder or the GGUF file `source` into the packed folder `target`.

    head: format of embedding and LM head; "source" keeps them as they are.
    force: replace `target` if it is a packed checkpoint.
    progress: called as the work goes on with the bytes converted so far and the total, both of the new file.
    i2s_layout: of a GGUF file's tensors of type I2_S, which does not say whether it was made on x86 (None) or on ARM.

    Raises BitNetError if anything is wrong with either folder, or if another process is writing `target`; `target` is
    then unchanged.
    """

    def check() -> None:
        refuse_to_replace(source, target, force)

    report = Report()
    try:
        check()
        checkpoint = open_source(source, i2s_layout)
        tables = take_tables(checkpoint, head)
        formats = {name: kept_as for name, (_, kept_as) in tables.items()}
        formats.setdefault("head", formats["embed"])
        plan = packed_plan(checkpoint.config, formats["embed"], formats["head"])
        report = Report(checkpoint.count, checkpoint.nbytes, sum(spec.nbytes for spec in plan.values()))
        advance = counter(progress, report.bytes_after)
        with replacing(target, check) as folder:
            notes = write_tokenizer(checkpoint, folder)
            raw = checkpoint.raw_config | {"bitnet_numba": {"format": FORMAT, **formats}}
            (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
            with open(folder / "model.safetensors", "wb") as file:
                write_tensors(
                    file, plan, packed_tensors(checkpoint, tables, report, advance), {"format": "np"}, advance
                )
            checkpoint.refuse_leftovers()
            report.notes = notes + checkpoint.notes + ([GROUPS_FOUND] if checkpoint.config.group_scales else [])
            if checkpoint.folder.replaced():
                raise CheckpointError(f"{checkpoint.folder} was replaced by another folder while it was converted")
    except OSError as error:
        raise CannotWrite(f"cannot write {printable(str(target), 400)}: {why(error)}") from None
    except MemoryError as error:
        size = f" ({report.bytes_before / 1e6:,.0f} MB)" if report.bytes_before else ""
        reason = f": {one_line(error)}" if str(error) else ""
        raise CheckpointError(f"not enough memory to convert {printable(str(source), 400)}{size}{reason}") from None
    return report


def open_source(source: Path, i2s_layout: I2sLayout | None = None) -> Source:
    """The checkpoint at a path: a GGUF file, or else a Hugging Face folder. Raises BitNetError if it is neither."""
    if not os.path.isdir(source) and (source.suffix.lower() == ".gguf" or is_gguf(source)):
        return GgufCheckpoint(source, i2s_layout)
    if i2s_layout is not None:
        raise CheckpointError("the layout of I2_S tensors can be chosen for GGUF files only")
    folder = ModelFolder(source)
    if not (folder / "config.json").exists() and (files := sorted(source.glob("*.gguf"))):
        raise CheckpointError(
            f"{folder} has no config.json, but GGUF files: name one, such as {folder / files[0].name}"
        )
    return HuggingFaceCheckpoint(folder)


def refuse_to_replace(source: Path, target: Path, force: bool) -> None:
    """Raises CheckpointError if `target` exists, unless `force` and it is empty or a packed checkpoint and no more.

    Raises OSError if that cannot be found out.
    """
    shown = printable(str(target), 400)
    try:
        os.stat(target)
    except FileNotFoundError:
        return
    if not force:
        raise CheckpointError(f"{shown} already exists; use --force to replace it")
    if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(target)):
        raise CheckpointError(f"{shown} holds the source, so --force will not replace it")
    names = set(os.listdir(target)) if target.is_dir() else {""}
    if names and "bitnet_numba" not in _config_of(target):
        raise CheckpointError(f"{shown} is not a packed checkpoint, so --force will not replace it")
    if names - {*PACKED_FILES}:
        stranger = printable(min(names - {*PACKED_FILES}))
        raise CheckpointError(f"{shown} also holds {stranger}, so --force will not replace it")


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return read_config(ModelFolder(folder))
    except CheckpointError:
        return {}


def counter(progress: Callable[[int, int], object] | None, total: int) -> Callable[[int], None]:
    """A function that is called with the bytes of each piece twice: when it is converted, and when it is written.

    It tells `progress` the bytes so far, starting with 0 at once.
    """
    halves = 0

    def advance(nbytes: int) -> None:
        nonlocal halves
        halves += nbytes
        if progress is not None:
            progress(halves // 2, total)

    advance(0)
    return advance


Tables = dict[str, tuple[Rows, RowFormat]]


def take_tables(checkpoint: Source, head: HeadFormat) -> Tables:
    """The rows of "embed" and "head", unless these are tied, and the format in which they will be kept."""
    config = checkpoint.config
    shape = (config.vocab_size, config.hidden_size)
    rows = {"embed": checkpoint.take_rows("model.embed_tokens.weight", shape)}
    if config.tied:
        checkpoint.drop_if_equal("lm_head.weight", "model.embed_tokens.weight")
    elif not config.is_ternary("lm_head"):
        rows["head"] = checkpoint.take_rows("lm_head.weight", shape)
    else:
        raise CheckpointError("config.json: a quantised lm_head (modules_to_not_convert without it) is not supported")
    return {name: (of, row_format(of, head, config.group_scales)) for name, of in rows.items()}


def packed_tensors(
    checkpoint: Source, tables: Tables, report: Report, advance: Callable[[int], None]
) -> Iterator[Named]:
    """All tensors of the packed checkpoint, in the order of `packed_plan`; `advance` gets the bytes that are ready."""
    for name, (rows, kept_as) in tables.items():
        yield from row_tensors(checkpoint, name, rows, kept_as, advance)
    for name, array in norms_and_linears(checkpoint, report):
        advance(array.nbytes)
        yield name, array


def norms_and_linears(checkpoint: Source, report: Report) -> Iterator[Named]:
    """The tensors of the packed checkpoint after the rows of embedding and LM head."""
    config = checkpoint.config
    yield "norm.weight", checkpoint.take_norm("model.norm.weight", config.hidden_size)
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        for name, theirs in (GEMMA_NORMS if config.gemma else NORMS).items():
            yield f"layers.{i}.{name}.weight", checkpoint.take_norm(f"{prefix}.{theirs}.weight", config.hidden_size)
        if config.sub_norms:
            for name, size in (("attn_sub_norm", config.q_size), ("ffn_sub_norm", config.intermediate_size)):
                yield f"layers.{i}.{name}.weight", checkpoint.take_sub_norm(i, name, size)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                weight = checkpoint.take_norm(f"{prefix}.self_attn.{name}.weight", config.head_dim)
                yield f"layers.{i}.{name}.weight", weight
        for group in GROUPS:
            yield from group_tensors(checkpoint, i, group, report)


def group_tensors(checkpoint: Source, layer: int, group: str, report: Report) -> Iterator[Named]:
    """The linears of a group, joined into one matrix: words and scales, or dense rows."""
    config, name = checkpoint.config, f"layers.{layer}.{group}"
    segments, K = config.group_shape(group)
    modules = [f"model.layers.{layer}.{module}" for module in GROUPS[group]]
    has_bias = config.group_bias(group)
    if config.group_scales:
        groups = [checkpoint.take_groups(m, N, K, has_bias) for m, N in zip(modules, segments, strict=True)]
        for module, part in zip(GROUPS[group], groups, strict=True):
            count_zeros(report, module, part.t)
        yield f"{name}.words", pack_ternary(np.concatenate([part.t for part in groups]))
        yield f"{name}.scales", pack_scales(np.concatenate([part.scales for part in groups]))
        biases = [part.bias for part in groups if part.bias is not None]
    elif group_is_ternary(config, layer, group):
        linears = [checkpoint.take_linear(m, N, K, has_bias) for m, N in zip(modules, segments, strict=True)]
        for module, linear in zip(GROUPS[group], linears, strict=True):
            count_zeros(report, module, linear.t)
        yield f"{name}.words", pack_ternary(np.concatenate([linear.t for linear in linears]))
        yield f"{name}.scales", np.array([linear.m for linear in linears], np.float32)
        if config.linear_norm:
            yield f"{name}.norms", np.stack([linear.norm for linear in linears if linear.norm is not None])
        biases = [linear.bias for linear in linears if linear.bias is not None]
    else:
        parts = [checkpoint.take_floats(f"{m}.weight", (N, K)) for m, N in zip(modules, segments, strict=True)]
        rows = np.concatenate(parts)
        bits = from_float32(rows)
        checkpoint.note_rounding("linears that are not quantised", rows, to_float32(bits), "bfloat16")
        yield f"{name}.weight", bits
        biases = [checkpoint.take_floats(f"{m}.bias", (N,)) for m, N in zip(modules, segments, strict=True) if has_bias]
    if has_bias:
        yield f"{name}.bias", np.concatenate(biases)


def count_zeros(report: Report, module: str, t: np.ndarray) -> None:
    """Adds a module's weights to the statistics of its kind."""
    count = report.zeros.setdefault(module.split(".")[1], [0, 0])
    count[0] += t.size - int(np.count_nonzero(t))
    count[1] += t.size


def write_tokenizer(checkpoint: Source, folder: Path) -> list[str]:
    """Writes the tokenizer's files, and checks that the result opens. Returns notes for the user."""
    notes: list[str] = []
    if isinstance(checkpoint, GgufCheckpoint):
        source, made_from = checkpoint.name, {"tokenizer.json": f"the tokenizer of {checkpoint.name}"}
        notes = write_tokenizer_files(checkpoint.metadata, folder, source)
    else:
        source, made_from = str(checkpoint.folder), {}
        if copy_tokenizer(checkpoint.folder, folder) != "tokenizer.json":
            made_from["tokenizer.json"] = str(checkpoint.folder / "tokenizer.model")
    # Messages name what the user knows: this folder is gone if anything fails.
    written = ModelFolder(folder, shown=source, made_from=made_from)
    Tokenizer.open(written, checkpoint.config.vocab_size, trial=True)
    return notes


def copy_tokenizer(source: ModelFolder, folder: Path) -> str:
    """Copies the tokenizer's files of a Hugging Face folder, or builds them from a tiktoken vocabulary.

    Returns the name of the file that has the vocabulary.
    """
    copied, vocabulary = OPTIONAL_FILES, "tokenizer.json"
    if (source / vocabulary).exists():
        copied = ["tokenizer.json", "tokenizer_config.json", *OPTIONAL_FILES]
    elif (source / "tokenizer.model").exists():
        vocabulary = "tokenizer.model"
        from_tiktoken(source / vocabulary, folder)
    else:
        raise CheckpointError(f"{source} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    for name in copied:
        if (source / name).exists():
            copy(source / name, folder / name)
    default = source / f"{ADDITIONAL}/default.jinja"
    if default.exists() and not (folder / "chat_template.jinja").exists():
        copy(default, folder / "chat_template.jinja")  # what transformers takes of several
    return vocabulary


def copy(file: ModelFile, to: Path) -> None:
    """Copies a file of a model folder. Raises CheckpointError if it cannot be read, OSError if not written."""
    try:
        data = file.read_bytes()
    except FileError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    to.write_bytes(data)
