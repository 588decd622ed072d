"""Charts of what tools/bench.py measured."""

from pathlib import Path
from typing import Any

INT8_PEAK = {"NVIDIA H200": 1979.0}  # dense int8 tensor-core TOPS, from the data sheet
WORD_BITS_PER_WEIGHT = 2


def plot(figures: dict[str, Any], folder: Path) -> None:
    """Writes a PNG for each part that was measured into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    if "cpu" in figures:
        plot_cpu(figures["cpu"], folder / "cpu.png")
    if "environment" not in figures:  # of the GPU
        return
    device = figures["environment"]["device"]
    if "kernels" in figures:
        _speed_up(figures["kernels"]["products"], device, folder / "speed_up.png")
        _bandwidth(figures["kernels"], device, folder / "bandwidth.png")
        _roofline(figures["kernels"], figures.get("products", []), device, folder / "roofline.png")
    if "decode" in figures:
        _step(figures["decode"], device, folder / "step.png")
    if "batch" in figures:
        _batch(figures["batch"], device, folder / "batch.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _speed_up(products: list[dict[str, Any]], device: str, path: Path) -> None:
    """GEMV against cuBLAS."""
    from matplotlib import pyplot

    compared = [p for p in products if p["cublas_bf16_us"]]
    if not compared:
        return
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for shift, key, label in ((-0.2, "us", "launches overlap, as in a decode step"), (0.2, "us_alone", "each alone")):
        speed_ups = [p["cublas_bf16_us"] / p[key] for p in compared]
        bars = axes.bar([i + shift for i in range(len(compared))], speed_ups, 0.4, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(compared)), [f"{p['N']}\n× {p['K']}" for p in compared])
    axes.set_xlabel("rows × columns of weights")
    axes.margins(y=0.2)
    axes.legend()
    axes.set_ylabel("times as fast as cuBLAS bf16")
    axes.set_title(f"W2A8 GEMV, {device}")
    _save(figure, path)


def _bandwidth(kernels: dict[str, Any], device: str, path: Path) -> None:
    """GB/s of each GEMV, smallest matrix on top."""
    from matplotlib import pyplot

    products = sorted(kernels["products"], key=lambda p: p["N"] * p["K"], reverse=True)
    megabytes = [p["N"] * p["K"] * WORD_BITS_PER_WEIGHT / 8e6 for p in products]
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for shift, key, label in ((0.2, "us", "launches overlap, as in a decode step"), (-0.2, "us_alone", "each alone")):
        rates = [1e3 * size / p[key] for size, p in zip(megabytes, products, strict=True)]
        bars = axes.barh([i + shift for i in range(len(products))], rates, 0.4, label=label)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    read = kernels["bandwidth_GB/s"]
    axes.axvline(read, color="grey", linestyle="--", label=f"streaming read, {read:.0f} GB/s")
    axes.set_yticks(
        range(len(products)),
        [f"{p['N']} × {p['K']}, {size:.1f} MB" for p, size in zip(products, megabytes, strict=True)],
    )
    axes.set_xlabel("GB/s of weights")
    axes.set_xlim(right=1.15 * read)
    axes.set_title(f"Memory bandwidth of the W2A8 GEMV, {device}")
    axes.legend(loc="upper right", bbox_to_anchor=(0.86, 1.0))
    _save(figure, path)


def _roofline(kernels: dict[str, Any], products: list[dict[str, Any]], device: str, path: Path) -> None:
    """TOPS over operations per byte, under the two roofs."""
    from matplotlib import pyplot

    def intensity(N: int, K: int, M: int) -> float:
        """Operations per byte: 2 MNK over packed weights, int8 activations and float32 results, each moved once."""
        return 2 * M * N * K / (N * K * WORD_BITS_PER_WEIGHT / 8 + M * K + 4 * M * N)

    points: dict[int, list[tuple[float, float]]] = {}
    for p in kernels["products"]:
        points.setdefault(1, []).append((intensity(p["N"], p["K"], 1), 2 * p["N"] * p["K"] / p["us"] / 1e6))
    for p in products:
        points.setdefault(p["M"], []).append((intensity(p["N"], p["K"], p["M"]), p["TOPS"]))
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    slope = kernels["bandwidth_GB/s"] / 1e3  # TOPS for one operation per byte
    peak = INT8_PEAK.get(device)
    right = 2 * max(x for group in points.values() for x, _ in group)
    knee = min(right, peak / slope) if peak else right
    axes.plot([4, knee], [4 * slope, knee * slope], color="black", label=f"streaming read, {1e3 * slope:.0f} GB/s")
    if peak and knee < right:
        axes.plot([knee, right], [peak, peak], color="black", linestyle="--", label=f"int8 peak, {peak:.0f} TOPS")
    for M, group in sorted(points.items()):
        label = "1 token (GEMV, dp4a)" if M == 1 else f"{M} tokens (GEMM)"
        axes.scatter(*zip(*group, strict=True), label=label, s=30, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("int8 operations per byte of device memory")
    axes.set_ylabel("TOPS")
    axes.grid(alpha=0.3, which="both")
    axes.set_title(f"Roofline of the W2A8 products, {device}")
    axes.legend(loc="lower right")
    _save(figure, path)


def _step(decode: dict[str, Any], device: str, path: Path) -> None:
    """Each kernel of a decode step by itself, beside the whole step, in which they overlap."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(decode), figsize=(5.5 * len(decode), 5.5), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (dtype, part) in zip(panels[0], decode.items(), strict=True):
        whole = {str(step["context"]): step["us"] for step in part["steps"]}
        contexts = {str(context): times for context, times in part["kernels_us"].items()}
        names = list(next(iter(contexts.values())))
        height = 0.8 / len(contexts)
        for n, (context, times) in enumerate(contexts.items()):
            bars = axes.barh(
                [i + (n - (len(contexts) - 1) / 2) * height for i in range(len(names))],
                [times[name] for name in names],
                height,
                label=f"context {context}: whole step {whole[context]:.0f} µs",
            )
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axes.set_yticks(range(len(names)), names)
        axes.margins(x=0.12)
        axes.set_xlabel("µs a step, launches of one kind in a graph of their own")
        axes.set_title(f"{dtype} embedding and LM head")
        axes.legend(fontsize=8, loc="upper right")
    panels[0][0].invert_yaxis()  # shared by all panels
    figure.suptitle(f"Kernels of a decode step, 2B4T, {device} (they overlap in a step)")
    _save(figure, path)


def _batch(batch: list[dict[str, Any]], device: str, path: Path) -> None:
    """Throughput and latency over the number of sequences."""
    from matplotlib import pyplot

    sizes = [b["sequences"] for b in batch]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, values, label, fmt in (
        (panels[0], [b["tokens/s"] for b in batch], "tokens/s, all sequences together", "{:,.0f}"),
        (panels[1], [b["us"] / 1e3 for b in batch], "ms between two tokens of a sequence", "{:.2f}"),
    ):
        axes.plot(sizes, values, marker="o")
        for x, y in zip(sizes, values, strict=True):
            axes.annotate(fmt.format(y), (x, y), (-4, 6), textcoords="offset points", fontsize=8, ha="right")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("sequences")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.15 * max(values))
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    figure.suptitle(f"Batched decoding, 2B4T, context 256, {device}")
    _save(figure, path)


def plot_cpu(cpu: dict[str, Any], path: Path) -> None:
    """Decoding on the CPU by context, beside the rate of the streaming read, if that part was measured."""
    from matplotlib import pyplot

    if not cpu.get("decode", {}).get("rows"):
        return
    rows = cpu["decode"]["rows"]
    best = rows[0]["isa"]
    series: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in rows:
        if r["isa"] == best:
            series.setdefault((r["checkpoint"], r["threads"]), []).append(r)
    contexts = sorted({r["context"] for r in rows})
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(series)
    for n, ((name, threads), own) in enumerate(series.items()):
        at = [contexts.index(r["context"]) + (n - (len(series) - 1) / 2) * width for r in own]
        label = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
        bars = axes.bar(at, [r["tokens/s"] for r in own], width, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
        ceilings = [r["tokens/s"] / r["share_of_read"] for r in own]
        limit = "at the rate of the streaming read" if n == 0 else None
        axes.hlines(ceilings, [x - width / 2 for x in at], [x + width / 2 for x in at], "black", label=limit)
    axes.set_xticks(range(len(contexts)), [f"context {context}" for context in contexts])
    axes.margins(y=0.25)
    axes.set_ylabel("tokens/s, best window")
    axes.set_title(f"Decoding on the CPU, one sequence, {best}, {cpu['environment']['device']}")
    axes.legend(fontsize=8, ncols=2)
    _save(figure, path)
