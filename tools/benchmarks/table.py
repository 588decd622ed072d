"""The Markdown tables of tools/bench.py, from the figures that it measured."""

from typing import Any

HOW_LADDER = (
    "The kernels of kernels/linear/gemv_simple.py and the fast one, on the same words and int8 activations, cold L2. "
    "The simple ones are launched by Numba, as a user launches them, and these launches are captured in a graph: timed "
    "is the machine code that a user gets, without the host's part of a launch. Each starts when the one before has "
    "ended, but with PDL. us (GB/s of weights):"
)
HOW_TIMED = (
    'In "us" each starts while the one before still runs and waits for its result, as in a decode step; '
    'in "alone" each starts when the one before has ended.'
)

CPU_PARTS = ("decode", "prompts", "batch", "demo")  # of `bench.py cpu`
CPU_TITLES = {
    "decode": "Decoding on the CPU, one sequence",
    "prompts": "Prompts on the CPU, to the first token out",
    "batch": "Batches on the CPU, context 128",
    "demo": "The built-in model on the CPU, one story through `generate`",
}
HOW_CPU = (
    "Best and median window of each; all that stands in a table took turns. GB/s are the bytes of weights, LM head, "
    "keys and values that a step reads, over the best time. The streaming read is one of 512 MiB of memory, repeated "
    "to last as long as a window of decoding, by as many threads, each with one stream; that of a checkpoint is its "
    "largest tensor where the file is mapped. Layers and head: each in its own fastest window."
)


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head_of(*cells: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["", row(*cells), row(*(["---"] * len(cells)))]


def ladder_table(kernels: dict[str, Any]) -> list[str]:
    """What each step from a plain loop to the fast GEMV buys, and what reading the weights would take."""
    rungs = kernels.get("ladder", [])  # figures of earlier versions have none
    if not rungs:
        return []
    lines = ["", "### From a loop to the GEMV", "", HOW_LADDER, *head_of("", *(f"{r['N']} x {r['K']}" for r in rungs))]
    for step in rungs[0]["us"]:
        cells = [f"{r['us'][step]:.2f} ({r['bytes'] / r['us'][step] / 1e3:.0f})" for r in rungs]
        lines.append(row(step, *cells))
    read = kernels["bandwidth_GB/s"]
    cells = [f"{r['bytes'] / read / 1e3:.2f} ({read:.0f})" for r in rungs]
    lines.append(row("only reading the weights", *cells))
    return lines


def group_table(rows: list[dict[str, Any]]) -> list[str]:
    """Products with group scales beside those with one scale."""
    lines = ["", "## Products with group scales", ""]
    lines.append("Cold L2, in a graph; each starts while the one before still runs. us, and the share of one scale's:")
    tokens = list(dict.fromkeys(r["M"] for r in rows))
    lines += head_of("N x K", *(f"{M} token{'s' if M > 1 else ''}" for M in tokens))
    for N, K in dict.fromkeys((r["N"], r["K"]) for r in rows):
        own = {r["M"]: r for r in rows if (r["N"], r["K"]) == (N, K)}
        cells = [f"{own[M]['groups_us']:.2f} ({own[M]['groups_us'] / own[M]['one_us']:.2f})" for M in tokens]
        lines.append(row(f"{N} x {K}", *cells))
    return lines


def cpu_tables(cpu: dict[str, Any]) -> list[str]:
    """A table for each part of the CPU's benchmark."""
    env = cpu["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    lines = [f"{env['device']}, {env['cores']} cores, Python {env['python']}, {versions}; commit {env['commit']}, "
             f"{cpu['date']}.", "", HOW_CPU]  # fmt: skip
    for part in CPU_PARTS:
        if part not in cpu:
            continue
        figures, rows = cpu[part], cpu[part]["rows"]
        lines += [
            "",
            f"## {CPU_TITLES[part]}",
            "",
            f"{figures['rounds']} windows of each. {load_text(figures['load'])}",
        ]
        lines += head_of("streaming read of", "threads", "GB/s", "median")
        for read in figures["read"]:
            lines.append(row(read["of"], read["threads"], f"{read['GB/s']:.1f}", f"{read['median_GB/s']:.1f}"))
        first = ["checkpoint", "head"] if part != "demo" else []
        size = {"decode": "context", "prompts": "prompt", "batch": "sequences", "demo": "tokens"}[part]
        steps = part in ("decode", "batch")
        lines += head_of(
            *first, "instruction set", "threads", size, "ms", "median", "tokens/s", "median",
            *(["GB/s", "of streaming read", "median", "layers, ms", "head, ms"] if steps else []),
        )  # fmt: skip
        for r in rows:
            cells = [*(r[key] for key in first), r["isa"], r["threads"], r[size]]
            cells += [f"{r['ms']:.1f}", f"{r['median_ms']:.1f}", f"{r['tokens/s']:.1f}", f"{r['median_tokens/s']:.1f}"]
            cells += (
                [
                    f"{r['GB/s']:.1f}",
                    f"{r['share_of_read']:.0%}",
                    f"{r['median_share_of_read']:.0%}",
                    f"{r['layers_ms']:.1f}",
                    f"{r['head_ms']:.1f}",
                ]
                if steps
                else []
            )
            lines.append(row(*cells))
    return lines


def engine_tables(engine: dict[str, Any]) -> list[str]:
    """Answers end to end, and the rounds of a scheduler."""
    env, stalls = engine["environment"], engine["stalls"]
    lines = [f"{env['device']}, Python {env['python']}; commit {env['commit']}.", "", "## Answers end to end"]
    lines += ["", "The first run of the process, and the best of those after it; what of one core the host took; and "
              "what part of the time the device was at work:"]  # fmt: skip
    lines += head_of("", "first, s", "s", "tokens/s", "core", "device")
    for r in engine["rows"]:
        device = f"{r['device_s'] / r['s']:.0%}" if r["device_s"] else "---"
        figures = [f"{r['first_s']:.3f}", f"{r['s']:.3f}", f"{r['tokens/s']:.0f}"]
        lines.append(row(r["case"], *figures, f"{r['host_share']:.0%}", device))
    waits = [stalls[name] - stalls["alone_ms"] for name in ("median_ms", "p99_ms", "longest_ms")]
    lines += ["", f"A round of up to {stalls['running']} answers takes {stalls['alone_ms']:.2f} ms, and "
              f"{stalls['median_ms']:.2f} while prompts of any length come in (99th percentile {stalls['p99_ms']:.2f}, "
              f"longest of {stalls['rounds']} {stalls['longest_ms']:.2f}): the answers wait for prompts for "
              f"{waits[0]:.2f} ms ({waits[1]:.2f}, {waits[2]:.2f})."]  # fmt: skip
    return lines


def load_text(load: list[float | None]) -> str:
    """The load average before and after."""
    if None in load:
        return "Load average unknown."
    return f"Load average {load[0]:.1f} before, {load[1]:.1f} after."


def table(figures: dict[str, Any]) -> str:
    """The Markdown of a run."""
    lines = cpu_tables(figures["cpu"]) if "cpu" in figures else []
    lines += engine_tables(figures["engine"]) if "engine" in figures else []
    if "environment" in figures:
        env = figures["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        cuda = f"{env['driver_cuda'] // 1000}.{env['driver_cuda'] % 1000 // 10}"
        lines.append(f"{env['device']}, driver for CUDA {cuda}, Python {env['python']}, {versions}; "
                     f"commit {env['commit']}.")  # fmt: skip
    if "packing" in figures:
        packing = figures["packing"]
        lines += ["", "## Packing, one CPU core", *head_of("N x K", "pack, s", "unpack, s")]
        lines.append(row(f"{packing['N']} x {packing['K']}", f"{packing['pack_s']:.3f}", f"{packing['unpack_s']:.3f}"))
    if "kernels" in figures:
        kernels = figures["kernels"]
        lines += ["", "## Matrix-vector products", ""]
        lines.append(f"Cold L2, in a graph. Streaming read: {kernels['bandwidth_GB/s']:.0f} GB/s. {HOW_TIMED}")
        lines += head_of(
            "N x K", "us", "alone", "GB/s", "of read", "host us a call", "cuBLAS bf16 us", "speed-up", "alone"
        )
        for p in kernels["products"]:
            cublas = p["cublas_bf16_us"]
            compared = [cublas, cublas / p["us"], cublas / p["us_alone"]] if cublas else []
            lines.append(
                row(f"{p['N']} x {p['K']}", f"{p['us']:.2f}", f"{p['us_alone']:.2f}", f"{p['GB/s']:.0f}",
                    f"{p['share_of_bandwidth']:.0%}", f"{p['host_us_per_call']:.1f}",
                    *([f"{value:.1f}" for value in compared] or "---"))
            )  # fmt: skip
        lines += ladder_table(kernels)
    measured = figures.get("environment", {})  # of earlier versions, 2B4T
    model, head_format = measured.get("model", "2B4T"), measured.get("head", "bf16")
    if "groups" in figures:
        lines += group_table(figures["groups"])
    if "decode" in figures:
        first = next(iter(figures["decode"].values()))
        lines += ["", f"## Decoding, {model}, one sequence"]
        lines += head_of("head", "context", "us a step", "tokens/s", "of the byte ceiling")
        for head, part in figures["decode"].items():
            for step in part["steps"]:
                lines.append(
                    row(head, step["context"], f"{step['us']:.0f}", f"{step['tokens/s']:.0f}",
                        f"{step['share_of_ceiling']:.0%}")
                )  # fmt: skip
        lines += ["", "Launches of one kind after another, us for all of a step's (they overlap in a step):"]
        names = list(next(iter(first["kernels_us"].values())))
        lines += head_of("head", "context", *names)
        for head, part in figures["decode"].items():
            for context, times in part["kernels_us"].items():
                lines.append(row(head, context, *(f"{times[name]:.0f}" for name in names)))
        lines += ["", "Latency, ms, from the prompt's ids to the last token:"]
        answers = sorted({entry["answer"] for entry in first["latency"]})
        lines += head_of("head", "prompt", *(f"{answer} tokens out" for answer in answers))
        for head, part in figures["decode"].items():
            for prompt in sorted({entry["prompt"] for entry in part["latency"]}):
                cells = [f"{entry['ms']:.0f}" for entry in part["latency"] if entry["prompt"] == prompt]
                lines.append(row(head, prompt, *cells))
        lines += ["", "Device memory with a context of 4096, MB:"]
        lines += head_of("head", "weights", "keys and values", "activations", "taken from the device in all")
        for head, part in figures["decode"].items():
            memory = [part["memory"][key] / 1e6 for key in ("weights", "kv_cache", "activations")]
            lines.append(row(head, *(f"{size:.0f}" for size in (*memory, part["device_bytes"] / 1e6))))
    if "products" in figures:
        lines += ["", "## Products of many tokens", "", f"Cold L2, in a graph. {HOW_TIMED}"]
        lines += head_of("N x K", "tokens", "us", "alone", "TOP/s", "cuBLAS bf16 us", "speed-up", "alone")
        for p in figures["products"]:
            cublas = p["cublas_bf16_us"]
            compared = [cublas, cublas / p["us"], cublas / p["us_alone"]] if cublas else []
            lines.append(
                row(f"{p['N']} x {p['K']}", p["M"], f"{p['us']:.2f}", f"{p['us_alone']:.2f}", f"{p['TOPS']:.0f}",
                    *([f"{value:.1f}" for value in compared] or "---"))
            )  # fmt: skip
    if "prefill" in figures:
        prefill = figures["prefill"]
        lines += ["", f"## Prompts, {model}, {head_format} head"]
        lines += ["", "From the prompt's ids to the first token out; passes captured before, and the very first time:"]
        lines += head_of("prompt", "ms", "first time, ms", "tokens/s")
        for p in prefill["prompts"]:
            lines.append(row(p["prompt"], f"{p['ms']:.2f}", f"{p['first_ms']:.1f}", f"{p['tokens/s']:.0f}"))
        turns = prefill["conversation"]
        lines += ["", f"A conversation of {len(turns)} turns, each of {turns[0]['new']} new tokens and "
                  f"{turns[0]['answer']} answered, ms to the first token of a turn:"]  # fmt: skip
        lines += head_of("tokens held before", "ms")
        lines += [row(turn["held"], f"{turn['ms']:.2f}") for turn in turns[:: max(1, len(turns) // 5)]]
    if "batch" in figures:
        lines += ["", f"## Batches, {model}, {head_format} head, context 256", ""]
        lines += ["Steps one ahead of the host, wall-clock time:"]
        lines += head_of("sequences", "us a step", "device us", "tokens/s in all", "tokens/s each")
        for b in figures["batch"]:
            lines.append(
                row(b["sequences"], f"{b['us']:.0f}", f"{b['device_us']:.0f}", f"{b['tokens/s']:.0f}",
                    f"{1e6 / b['us']:.0f}")
            )  # fmt: skip
    if "mixed" in figures:
        mixed = figures["mixed"]
        short, long = min(mixed["contexts"]), max(mixed["contexts"])
        lines += ["", f"{mixed['sequences'] - 1} sequences around a context of {short} and one around {long}: "
                  f"{mixed['us']:.0f} us a step, {mixed['tokens/s']:.0f} tokens/s in all."]  # fmt: skip
    if "load" in figures:
        load = figures["load"]
        lines += [
            "",
            "## Start",
            "",
            f"Seconds from the start of Python to the first token, {model}, {head_format} head, warm files:",
        ]
        lines += head_of("first start (compiles)", "later starts")
        lines.append(row(f"{load['first_start_s']:.1f}", f"{load['later_starts_s']:.1f}"))
    return "\n".join(lines)
