"""Charts of what tools/bench.py measured."""

from pathlib import Path
from typing import Any


def plot(figures: dict[str, Any], folder: Path) -> None:
    """Writes speed-up bars, a roofline and the time of a step by kernel into a folder, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    device = figures["environment"]["device"]
    if "kernels" in figures:
        products = figures["kernels"]["products"]
        names = [f"{p['N']} x {p['K']}" for p in products]
        compared = [p for p in products if p["cublas_bf16_us"]]
        if compared:
            figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
            places = range(len(compared))
            for shift, key, label in ((-0.2, "us", "in a chain, overlapping"), (0.2, "us_alone", "each alone")):
                speed_ups = [p["cublas_bf16_us"] / p[key] for p in compared]
                axes.bar_label(axes.bar([i + shift for i in places], speed_ups, 0.4, label=label), fmt="%.1f")
            axes.set_xticks(places, [f"{p['N']} x {p['K']}" for p in compared])
            axes.margins(y=0.2)
            axes.legend()
            axes.set_ylabel("times as fast as cuBLAS bf16")
            axes.set_title(f"W2A8 matrix-vector product, {device}")
            axes.tick_params(axis="x", rotation=40)
            figure.savefig(folder / "speed_up.png", dpi=120)
            pyplot.close(figure)
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        sizes = [p["N"] * p["K"] / 4e6 for p in products]
        axes.axhline(figures["kernels"]["bandwidth_GB/s"], color="grey", linestyle="--", label="streaming read")
        axes.scatter(sizes, [p["GB/s"] for p in products], label="in a graph, launches overlapping")
        axes.scatter(sizes, [s * 1e3 / p["us_alone"] for s, p in zip(sizes, products, strict=True)], label="each alone")
        order = sorted(zip(sizes, names, products, strict=True), key=lambda item: item[0])
        for i, (size, name, p) in enumerate(order):
            below = i % 2 == 0  # neighbours in size take turns
            place = {"xytext": (4, -10) if below else (-4, 5), "ha": "left" if below else "right"}
            axes.annotate(name, (size, p["GB/s"]), textcoords="offset points", fontsize=7, **place)
        axes.set_xscale("log")
        axes.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.set_xlabel("weights, MB")
        axes.set_ylabel("GB/s")
        axes.set_title(f"Roofline of the product: memory, {device}")
        axes.legend()
        figure.savefig(folder / "roofline.png", dpi=120)
        pyplot.close(figure)
    if "decode" in figures:
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        bars_of = [
            (f"{head}, {context}", times)
            for head, part in figures["decode"].items()
            for context, times in part["kernels_us"].items()
        ]
        left = [0.0] * len(bars_of)
        for name in bars_of[0][1]:
            widths = [times[name] for _, times in bars_of]
            axes.barh([label for label, _ in bars_of], widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_xlabel("us, launches of one kind after another")
        axes.set_title(f"Where a decode step's time goes (head, context), {device}")
        figure.legend(fontsize=8, loc="outside right upper")
        figure.savefig(folder / "step.png", dpi=120)
        pyplot.close(figure)
    if "batch" in figures:
        batch = figures["batch"]
        sizes = [b["sequences"] for b in batch]
        figure, (left_axes, right_axes) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        left_axes.plot(sizes, [b["tokens/s"] for b in batch], marker="o")
        left_axes.set_ylabel("tokens/s in all")
        right_axes.plot(sizes, [b["us"] / 1e3 for b in batch], marker="o")
        right_axes.set_ylabel("ms from token to token of a sequence")
        for one in (left_axes, right_axes):
            one.set_xscale("log", base=2)
            one.set_xticks(sizes, [str(size) for size in sizes])
            one.set_xlabel("sequences")
            one.set_ylim(bottom=0)
            one.grid(alpha=0.3)
        figure.suptitle(f"Batched decoding, 2B4T, context 256, {device}")
        figure.savefig(folder / "batch.png", dpi=120)
        pyplot.close(figure)
