"""What command lines that run a model share: the options that name it, and opening it."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitnet_numba.backends.progress import shown_by
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import ACTIVATIONS, ALL_KV_DTYPES, BACKENDS, load
from bitnet_numba.hub.fetch import as_hub_model, find_model, is_gguf

MODEL_HELP = (
    "a model of the Hugging Face hub, such as owner/name, downloaded and converted when it is first used; a short name "
    "that `bitnet-numba models list --known` shows; a GGUF file; or a converted model folder (default: the built-in "
    "model)"
)
ACTIVATIONS_HELP = (
    "what linears read in models with group scales: int8x2 is as accurate as floats, but slower (default: int8)"
)
LOAD_OPTIONS = ("backend", "context", "threads", "kv_dtype", "activations")
KV_HELP = "type of keys and values (default: float16 on CUDA, bfloat16 on the CPU, float32 on the reference)"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, --revision, --backend, --threads, --kv-dtype, --activations and --context."""
    parser.add_argument("checkpoint", nargs="?", metavar="MODEL", help=MODEL_HELP)
    group = parser.add_argument_group("model")
    add_run_options(group)
    group.add_argument(
        "--context", type=int, metavar="N", help="maximum tokens of question and answers (default: the model's)"
    )


def add_run_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    kv_dtypes: Sequence[str] = ALL_KV_DTYPES,
    kv_help: str = KV_HELP,
    activations: bool = True,
) -> None:
    """Adds --revision, --backend, --threads, --kv-dtype with these choices and this help, and, where it is of use,
    --activations."""
    add = parser.add_argument
    add("--revision", metavar="R", help="branch, tag or commit of a model of the hub (default: main)")
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what runs the model (default: auto: CUDA if usable, otherwise the CPU)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="threads on the CPU (default: one for each physical core; on the reference, what BLAS takes)",
    )
    add("--kv-dtype", choices=kv_dtypes, help=kv_help)
    if activations:
        add("--activations", choices=ACTIVATIONS, help=ACTIVATIONS_HELP)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What these options say of how `load` is to open a model, whichever model that is."""
    return {name: getattr(args, name) for name in LOAD_OPTIONS if hasattr(args, name)}


def find_first(path: str | None, revision: str | None) -> tuple[str | Path | None, str | None]:
    """What `load` is to be given as path and revision: a model of the hub or a GGUF file is fetched and converted here,
    which shows progress of its own. Raises BitNetError if it cannot."""
    if path and (is_gguf(path) or as_hub_model(path, revision) is not None):
        return find_model(path, revision), None
    return path, revision


def open_model(args: argparse.Namespace, quiet: bool = False) -> Engine:
    """Loads the model that these options name; with a status line on a terminal, unless quiet.

    Raises BitNetError if it cannot.
    """
    path, revision = find_first(args.checkpoint, args.revision)  # before the status line
    with _status("loading the model ...", quiet):
        return load(path, revision=revision, **load_options(args))


@contextlib.contextmanager
def _status(text: str, quiet: bool) -> Iterator[None]:
    """Inside, a terminal shows `text`, or which kernels are being compiled, unless quiet."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status, shown_by(lambda line: status.update(line or text)):
        yield
