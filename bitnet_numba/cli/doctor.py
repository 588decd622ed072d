"""`bitnet-numba doctor`: what runs on this machine, how fast, and why not more."""

import argparse
import json
import sys
from typing import Any

from bitnet_numba.checkpoint.progress import size_text
from bitnet_numba.cli import machine
from bitnet_numba.cli.machine import Facts, guarded
from bitnet_numba.commands import make_parser, output
from bitnet_numba.errors import printable


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        prog,
        description="Show what runs on this machine, how fast, and why not more. The exit code is 0 if anything runs. "
        "The first time, kernels are compiled, which takes up to some minutes.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(argv: list[str] | None = None, prog: str = "bitnet-numba doctor") -> int:
    """The command line; returns the exit code: 0 if a backend runs, 1 if none does, 2 for a user's mistake."""
    args = build_parser(prog).parse_args(argv)
    report = examine()
    failed = output(prog, (json.dumps(report, indent=2) if args.json else "\n".join(describe(report))) + "\n")
    return failed or (0 if any("problem" not in facts for facts in report["runs"].values()) else 1)


def examine() -> Facts:
    """Everything that is found out, as JSON has it."""
    report: Facts = {"software": guarded(machine.software)}
    _waiting("looking at the processor ...")
    cpu = guarded(machine.processor) | guarded(machine.probe, "cpu")
    speed = guarded(machine.bandwidth, cpu.get("threads", 1))
    report["cpu"] = cpu | {key: value for key, value in speed.items() if key != "problem" or "problem" not in cpu}
    _waiting("looking at the GPU ...")
    report["gpu"] = guarded(machine.probe, "cuda")
    report["caches"] = guarded(machine.caches)
    report["runs"] = {}
    if report["gpu"].get("problem") is None:
        _waiting("trying the built-in model on the GPU; the first time, this takes up to a minute ...")
        report["runs"]["cuda"] = guarded(machine.answer, "cuda")
    _waiting("trying the built-in model on the CPU; the first time, this takes up to a minute ...")
    report["runs"]["cpu"] = guarded(machine.answer, "cpu")
    if all("problem" in facts for facts in report["runs"].values()):
        _waiting("trying the built-in model with NumPy alone ...")
        report["runs"]["reference"] = guarded(machine.answer, "reference")
    _waiting("")
    report["advice"] = advice(report)
    return report


def advice(report: Facts) -> list[str]:
    """What the user can do so that more runs, or faster."""
    found = []
    gpu, caches, runs = report["gpu"], report["caches"], report["runs"]
    extra = gpu.get("extra")
    if extra and gpu.get("problem") is not None and gpu.get("cards"):
        found.append(f'to use the GPU: pip install "bitnet-numba[{extra}]"')
    elif gpu.get("cuda") and not extra:
        found.append("to use the GPU: install a newer NVIDIA driver (525 or later)")
    for name, variable in (("kernels", "BITNET_NUMBA_CACHE"), ("models", "BITNET_NUMBA_MODELS")):
        if not caches.get(name, {}).get("writable", True):
            what = "kernels are compiled at each start" if name == "kernels" else "models cannot be fetched by name"
            found.append(f"{what}: set {variable} to a folder that can be written")
    if "problem" not in runs.get("reference", {"problem": ""}):
        found.append("only the slow NumPy backend is left: see the problem of the CPU above")
    if all("problem" in facts for facts in runs.values()):
        found.append("nothing runs: pip install --force-reinstall bitnet-numba  may mend it")
    return found


def describe(report: Facts) -> list[str]:
    """The report as lines of text, a screen at most."""
    software, cpu, gpu = report["software"], report["cpu"], report["gpu"]
    lines = []

    def add(title: str, text: Any) -> None:
        lines.append(f"{title:11}{printable(str(text), 240)}")

    add("version", f"bitnet-numba {software.get('bitnet_numba', '?')}, Python {software.get('python', '?')}")
    if "location" in software:
        add("", f"in {software['location']}")
    add("system", software.get("system", "unknown"))
    versions = [f"{name} {version}" for name, version in software.get("packages", {}).items() if version]
    add("packages", ", ".join(versions))
    for name, value in software.get("settings", {}).items():
        add("setting", f"{name}={value}")
    _problem(add, software)

    memory = f", {size_text(cpu['memory_bytes'])} of memory" if cpu.get("memory_bytes") else ""
    add("CPU", f"{cpu.get('name', 'unknown')}{memory}")
    if "instruction_sets" in cpu:
        sets = [f"{name} (used)" if name == cpu.get("instruction_set") else name for name in cpu["instruction_sets"]]
        add("", f"{cpu['threads']} threads; instruction sets: {', '.join(sets)}")
    if "read_bytes_per_second" in cpu:
        add("", f"reads memory at {cpu['read_bytes_per_second'] / 1e9:.1f} GB/s")
    _problem(add, cpu)

    for card in gpu.get("cards", []):
        add("GPU", f"{card['name']}, sm_{card['sm']}, {size_text(card['memory_bytes'])}")
    if gpu.get("cuda"):
        add("", f"driver {gpu.get('driver') or 'of unknown version'}, for CUDA {gpu['cuda']}")
    if gpu.get("problem") is not None:
        add("" if gpu.get("cards") else "GPU", f"not used: {gpu['problem']}")

    for name, title in (("kernels", "compiled"), ("models", "models"), ("hugging_face", "downloads")):
        facts = report["caches"].get(name, report["caches"])
        if "problem" in facts:
            add(title, f"problem: {facts['problem']}")
            continue
        size = "of unknown size" if facts["nbytes"] is None else size_text(facts["nbytes"])
        add(title, f"{facts['path']}, {size}{'' if facts['writable'] else ', CANNOT BE WRITTEN'}")
    if "kernels_cached" in cpu:
        when = "are" if cpu["kernels_cached"] == cpu["kernels"] else "were, before this run,"
        add("", f"{cpu['kernels_cached']} of the built-in model's {cpu['kernels']} CPU kernels {when} compiled")

    for backend, facts in report["runs"].items():
        if "problem" in facts:
            add("runs", f"NOT on {backend}: {facts['problem']}")
        else:
            speed = f"{facts['tokens_per_second']:,.0f} tokens/s" if facts["tokens_per_second"] else "speed unknown"
            add("runs", f"on {backend}: the built-in model answers {facts['answer']!r}, {speed}")
    for line in report["advice"]:
        add("advice", line)
    return lines


def _problem(add: Any, facts: Facts) -> None:
    if "problem" in facts:
        add("", f"problem: {facts['problem']}")


def _waiting(text: str) -> None:
    """A line that says what is being done, on a terminal; the next one takes its place."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
