"""Measures the backends on full-size BitNet b1.58 2B4T with random weights; and packing, on one CPU core.

    python tools/bench.py kernels|groups|decode|prefill|batch|load|all [--json FILE] [--plot DIR]      the CUDA backend
    python tools/bench.py decode|prefill|batch|load|cpu --preset NAME        the sizes of another model
    python tools/bench.py decode|prefill|batch|engine --kv-dtype TYPE          with keys and values of this type
    python tools/bench.py cpu [CHECKPOINT ...] [--isa NAME,NAME|all] [--threads N,N] [--parts PART,PART] [--seconds S]
    python tools/bench.py engine [CHECKPOINT] [--backend NAME] [--small]     answers end to end, on any backend
    python tools/bench.py serve [MODEL | --random] [--clients N,N | --rate R] ...   the server, and the engine alone
    python tools/bench.py packing                    needs no GPU
    python tools/bench.py table --json FILE          the Markdown of an earlier run, as in docs/benchmarks.md

Markdown tables and the JSON they are made of go to standard output.
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import timeit
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.engine.loading import ALL_KV_DTYPES, BACKENDS, MAX_THREADS
from bitnet_numba.errors import BitNetError, printable
from bitnet_numba.packing import pack_ternary, unpack_ternary
from tools.benchmarks.table import CPU_PARTS, table
from tools.make_checkpoint import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PRESET = "2b-4t"
OF_A_MODEL = ("decode", "prefill", "batch", "load", "cpu")  # parts that any preset can be measured with
WITH_KV_DTYPE = ("decode", "prefill", "batch")


def environment() -> dict[str, Any]:
    """The device, versions and commit that figures belong to."""
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import driver_call

    device = usable_device()
    return {
        "device": device.name,
        "num_sms": device.num_sms,
        "driver_cuda": driver_call("cuDriverGetVersion"),
        **software("numba", "numba-cuda", "cuda-bindings", "numpy", "torch"),
    }


def software(*packages: str) -> dict[str, Any]:
    """The versions of Python and of those packages that are installed, and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"python": sys.version.split()[0], "versions": versions, "commit": commit.stdout.strip() or "unknown"}


def measure(what: str, preset: str = PRESET, kv_dtype: Any = None) -> dict[str, Any]:
    """The figures of one or all parts; kv_dtype: of keys and values, None for the default."""
    if what == "packing":
        return {"packing": measure_packing()}
    from bitnet_numba.kernels.runtime.device import usable_device
    from bitnet_numba.kernels.runtime.driver import Stream
    from tools.benchmarks import groups, kernels

    figures: dict[str, Any] = {"environment": environment(), "packing": measure_packing()}
    if what in ("kernels", "all"):
        figures["kernels"] = kernels.measure_kernels()
    if what in ("groups", "all"):
        figures["groups"] = groups.measure_groups()
    if what in ("kernels", "groups"):
        return figures
    from bitnet_numba.backends.cuda.backend import CudaBackend
    from bitnet_numba.kernels.attention.kv_dtype import DEFAULT
    from tools.benchmarks import decode, many_tokens
    from tools.benchmarks.inputs import row_formats, write_random_packed

    heads = row_formats(preset)
    figures["environment"] |= {"model": "2B4T" if preset == PRESET else preset, "head": heads[0]}
    if what in ("prefill", "batch", "all") and preset == PRESET:
        figures["products"] = many_tokens.measure_products()
    bandwidth = figures.get("kernels", {}).get("bandwidth_GB/s")
    with tempfile.TemporaryDirectory() as folder:
        folders = {head: Path(folder) / head for head in heads}
        for head in heads if what in ("decode", "all") else heads[:1]:
            write_random_packed(folders[head], head, preset)
        if what in ("decode", "all"):
            bandwidth = bandwidth or kernels.measure_bandwidth(usable_device(), Stream())
            figures["decode"] = decode.measure_decode(folders, bandwidth, kv_dtype or DEFAULT)
        if what in ("prefill", "batch", "all"):
            backend = CudaBackend(open_packed(folders[heads[0]]), kv_dtype or DEFAULT)
            if what != "batch":
                figures["prefill"] = many_tokens.measure_prefill(backend)
            if what != "prefill":
                figures["batch"] = many_tokens.measure_batch(backend)
                figures["mixed"] = many_tokens.measure_mixed(backend)
            backend.weights.close()
        if what in ("load", "all"):
            figures["load"] = decode.measure_load(folders[heads[0]])
    return figures


def measure_on_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of the CPU backend."""
    from bitnet_numba.backends.cores import usable_cores
    from bitnet_numba.kernels.cpu import isa
    from tools.benchmarks.cpu import measure_cpu
    from tools.benchmarks.inputs import row_formats, write_random_packed

    named = args.isa.split(",") if args.isa else [None]
    isas = isa.available() if args.isa == "all" else [isa.choose(name).name for name in named]
    threads = args.threads or [1, usable_cores()]
    with tempfile.TemporaryDirectory() as temporary:
        folders = {printable(folder.resolve().name, 40): folder for folder in args.checkpoint}
        if len(folders) < len(args.checkpoint):  # of the same name: their paths tell them apart
            folders = {printable(str(folder), 80): folder for folder in args.checkpoint}
        if not folders and args.parts != ["demo"]:
            for head in row_formats(args.preset):
                name = f"{args.preset.replace('2b-4t', '2b4t')}-{head}"
                folders[name] = Path(temporary) / head
                write_random_packed(folders[name], head, args.preset)
        environment = {"device": cpu_name(), "cores": usable_cores(), **software("numba", "llvmlite", "numpy")}

        def save(figures: dict[str, Any]) -> None:
            if args.json:
                write_json(args.json, {"cpu": {"environment": environment, **figures}})

        parts = args.parts or CPU_PARTS
        figures = measure_cpu(folders, isas, sorted(set(threads)), parts, args.seconds, save)
    return {"cpu": {"environment": environment, **figures}}


def measure_end_to_end(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of the engine, of a checkpoint or of 2B4T with random weights."""
    from bitnet_numba.engine.loading import load
    from tools.benchmarks import engine
    from tools.benchmarks.inputs import write_random_packed, write_random_tokenizer

    sizes = engine.SMALL if args.small else engine.FULL
    context = max(sizes.mixed_prompts[1] + sizes.mixed_answer, sizes.prompt + sizes.answer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoint[0] if args.checkpoint else Path(temporary) / "2b4t"
        if not args.checkpoint:
            write_random_packed(folder, "bf16")
            write_random_tokenizer(folder, open_packed(folder).config.vocab_size)
        llm = load(folder, args.backend or "auto", context, kv_dtype=args.kv_dtype)
        device = environment() if llm.backend == "cuda" else {"device": cpu_name(), **software("numba", "numpy")}
        return {"engine": {"environment": device, **engine.measure_engine(llm, sizes)}}


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Writes figures to a file."""
    path.write_text(json.dumps(figures, indent=1) + "\n")


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_packing(N: int = 13824, K: int = 2560, repeats: int = 5) -> dict[str, Any]:
    """Best seconds to pack and to unpack the largest matrix of 2B4T; NumPy does this on one core."""
    w = np.random.default_rng(0).integers(-1, 2, (N, K)).astype(np.int8)
    words = pack_ternary(w)
    return {
        "N": N,
        "K": K,
        "pack_s": min(timeit.repeat(lambda: pack_ternary(w), number=1, repeat=repeats)),
        "unpack_s": min(timeit.repeat(lambda: unpack_ternary(words, N, K), number=1, repeat=repeats)),
    }


def thread_counts(text: str) -> list[int]:
    """Numbers of threads with commas between them, for argparse."""
    counts = [int(part) for part in text.split(",")]
    if not all(1 <= number <= MAX_THREADS for number in counts):
        raise argparse.ArgumentTypeError(f"must be between 1 and {MAX_THREADS}")
    return counts


def parts(text: str) -> list[str]:
    """Parts of the CPU's benchmark with commas between them, for argparse."""
    names = text.split(",")
    if not set(names) <= set(CPU_PARTS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(CPU_PARTS)}")
    return [part for part in CPU_PARTS if part in names]


def seconds(text: str) -> float:
    """A time, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be a positive number")
    return number


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 2 for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["serve"]:
        from tools.benchmarks import serve

        return serve.main(arguments[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument(
        "what",
        choices=("kernels", "groups", "decode", "prefill", "batch", "load", "all", "engine", "cpu", "packing", "table"),
        help="what to measure; groups: products with group scales; engine: answers end to end; cpu: the CPU backend; "
        "table: print the tables of an earlier run",
    )
    parser.add_argument(
        "checkpoint",
        nargs="*",
        type=Path,
        help="cpu, engine: packed checkpoints, one for the engine (default: 2B4T of random weights, for the CPU with "
        "both heads)",
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default=PRESET,
        help=f"{', '.join(OF_A_MODEL)}: the model whose sizes the random weights have (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, help="engine: default auto")
    parser.add_argument(
        "--kv-dtype",
        choices=ALL_KV_DTYPES,
        help="engine, decode, prefill, batch: what keys and values are held as (default: the backend's own)",
    )
    parser.add_argument("--small", action="store_true", help="engine: few and short requests, for slow backends")
    cpu = parser.add_argument_group("cpu")
    cpu.add_argument(
        "--isa", metavar="NAME,NAME", help="instruction sets, or all: those of this machine (default: the best)"
    )
    cpu.add_argument("--threads", type=thread_counts, metavar="N,N", help="default: 1, and one for each core")
    names = ",".join(CPU_PARTS)
    cpu.add_argument(
        "--parts",
        type=parts,
        metavar="PART,PART",
        help=f"default: {names}; demo is the built-in model through generate",
    )
    cpu.add_argument(
        "--seconds", type=seconds, default=60.0, metavar="S", help="time for each part (default: %(default)g)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to this file (table: read them from it)"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write PNG charts to this folder; needs matplotlib")
    args = parser.parse_intermixed_args(argv)
    if args.what != "cpu" and (args.isa or args.threads or args.parts):
        parser.error(f"{args.what} takes no --isa, --threads or --parts: they are for cpu")
    if args.what != "engine" and (args.backend or args.small):
        parser.error(f"{args.what} takes no --backend or --small: they are for engine")
    if args.kv_dtype and args.what not in ("engine", *WITH_KV_DTYPE):
        parser.error(f"{args.what} takes no --kv-dtype")
    if args.what in WITH_KV_DTYPE and args.kv_dtype == "float32":
        parser.error("float32 is for checking: its kernels are not measured")
    if len(args.checkpoint) > {"cpu": sys.maxsize, "engine": 1}.get(args.what, 0):
        parser.error(f"{args.what} takes {'one' if args.what == 'engine' else 'no'} checkpoint")
    if args.preset != PRESET and (args.what not in OF_A_MODEL or args.checkpoint):
        parser.error(f"{args.what} takes no --preset" + (" beside checkpoints" if args.checkpoint else ""))
    if args.preset != PRESET and args.plot:
        parser.error("charts are made for 2B4T alone")
    if args.what == "packing" and args.plot:
        parser.error("packing has no charts")
    try:
        if args.what == "table":
            if args.json is None:
                parser.error("table needs --json FILE")
            figures = json.loads(args.json.read_text())
        else:
            runs = {"cpu": measure_on_cpu, "engine": measure_end_to_end}
            measured = runs[args.what](args) if args.what in runs else measure(args.what, args.preset, args.kv_dtype)
            figures = json.loads(json.dumps(measured))  # keys as they are in the file
    except (BitNetError, OSError, json.JSONDecodeError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    print(table(figures))
    if args.what != "table":
        print(f"\n```json\n{json.dumps(figures)}\n```")
        if args.json:
            write_json(args.json, figures)
    if args.plot:
        from tools.benchmarks.plot import plot

        plot(figures, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
