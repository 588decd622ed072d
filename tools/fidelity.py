"""How far a model's logits are from those of transformers, by backend and by what keys and values are held as.

    python tools/fidelity.py [FOLDER] [--preset NAME] [--tokens N,N,...] [--backends NAME,NAME,...] [--truth NAME]
                             [--device cpu|cuda] [--json FILE]

FOLDER is a model in Hugging Face format; without one, a model of random weights is made, of the sizes of 2B4T. The
truth is transformers in float32 (which needs torch, transformers and accelerate), or `--truth reference`: this
project's NumPy model, which needs nothing. Beside it stands transformers in bfloat16, as a yardstick.

Errors are in units of sigma, the standard deviation of a prompt's logits. Prompts are random tokens; each is fed as a
whole, and one token at a time. Most of an error is int8 rounding: the smallest difference tips an activation from one
integer to the next now and then, and the layers after it make that grow. With float32 keys and values a prompt without
such a flip is off by less than 1e-4.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.commands import complain
from bitnet_numba.engine.loading import KV_DTYPES, load
from bitnet_numba.errors import BackendError, BitNetError, one_line
from tools.make_checkpoint import PRESETS, make_checkpoint

PROG = "fidelity.py"
COLUMNS = ("model", "keys and values", "fed", "tokens", "rms", "largest", "same best token")

Logits = NDArray[np.float32]  # [T, vocab]
LogitsOf = Callable[[list[int]], Logits]


def transformers_logits(folder: Path, device: str, dtype: str) -> LogitsOf:
    """What transformers computes with weights and arithmetic of a type of torch."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # transformers compiles its quantisation, which needs a C++ compiler
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager")
    torch.nn.Module.to(model, device=device, dtype=kind)  # norms and scales are of the file's type until then
    for module in model.modules():
        if type(module).__name__ == "BitLinear":
            module.dtype = kind

    def logits(ids: list[int]) -> Logits:
        with torch.no_grad():
            found = model(torch.tensor([ids], device=device), use_cache=False).logits[0]
        return np.asarray(found.float().cpu().numpy())

    return logits


def measure(truth: list[Logits], prompts: list[list[int]], logits_of: LogitsOf) -> list[dict[str, Any]]:
    """The errors of each prompt's logits."""
    rows = []
    for ids, expected in zip(prompts, truth, strict=True):
        logits = logits_of(ids)
        error = np.abs(logits.astype(np.float64) - expected) / expected.std()
        rows.append(
            {
                "tokens": len(ids),
                "rms": float(np.sqrt(np.mean(error**2))),
                "largest": float(error.max()),
                "same best token": float((logits.argmax(axis=1) == expected.argmax(axis=1)).mean()),
            }
        )
    return rows


def measure_backends(
    folder: Path, names: list[str], truth: list[Logits], prompts: list[list[int]]
) -> Iterator[dict[str, Any]]:
    """The errors of this project's backends, those that run here, with each type of keys and values."""
    for name in names:
        for kv_dtype in KV_DTYPES[name]:
            try:
                llm = load(folder, name, max(map(len, prompts)), kv_dtype=kv_dtype)
            except BackendError as error:
                complain(PROG, str(error))
                break
            with llm:

                def one_by_one(ids: list[int], llm: Any = llm) -> Logits:
                    context = llm._backend.new_context(len(ids))
                    found = np.concatenate([context.logits([token]) for token in ids])
                    context.close()
                    return found

                for fed, logits_of in (("whole", llm.logits), ("one by one", one_by_one)):
                    for row in measure(truth, prompts, logits_of):
                        if fed == "whole" or row["tokens"] > 1:
                            yield {"model": name, "keys and values": kv_dtype, "fed": fed, **row}


def compare(source: Path, work: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, for a model in Hugging Face format. work: a folder for the converted one."""
    convert(source, work / "packed")
    vocab = json.loads((source / "config.json").read_text())["vocab_size"]
    prompts = [np.random.default_rng(i).integers(0, vocab, n).tolist() for i, n in enumerate(args.tokens)]
    rows: list[dict[str, Any]] = []
    if args.truth == "reference":
        with load(work / "packed", "reference", max(args.tokens)) as llm:
            truth = [llm.logits(ids) for ids in prompts]
    else:
        exact = transformers_logits(source, args.device, "float32")
        truth = [exact(ids) for ids in prompts]
        del exact
        yardstick = {"model": "transformers, bfloat16", "keys and values": "bfloat16", "fed": "whole"}
        rows += [
            {**yardstick, **row}
            for row in measure(truth, prompts, transformers_logits(source, args.device, "bfloat16"))
        ]
    return rows + list(measure_backends(work / "packed", args.backends, truth, prompts))


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [f"{row[c]:.2g}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of tokens")
    return lengths


def _backends(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in KV_DTYPES:
            raise argparse.ArgumentTypeError(f"there is no backend {name!r}: {', '.join(KV_DTYPES)}")
    return names


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog=PROG, description="How far logits are from those of transformers in float32.")
    add = parser.add_argument
    add(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="a model in Hugging Face format (default: random weights)",
    )
    add("--preset", choices=PRESETS, default="2b-4t", help="sizes of random weights (default: %(default)s)")
    add(
        "--tokens",
        type=_lengths,
        default=[1, 1, 1, 7, 33, 130],
        metavar="N,N",
        help="prompts (default: 1,1,1,7,33,130)",
    )
    add("--backends", type=_backends, default=list(KV_DTYPES), metavar="NAME,NAME", help="(default: all that run here)")
    add("--truth", choices=("transformers", "reference"), default="transformers", help="(default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where transformers runs (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


def main() -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake."""
    args = build_parser().parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            source = args.folder
            if source is None:
                source = Path(temporary) / "source"
                weight_format, config = PRESETS[args.preset]
                make_checkpoint(source, config, weight_format)
            rows = compare(source, Path(temporary), args)
    except ImportError as error:
        complain(PROG, f"{one_line(error)}: --truth reference needs neither torch nor transformers")
        return 2
    except (BitNetError, OSError) as error:
        complain(PROG, one_line(error))
        return 2
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
