"""Draw the loss curve of the demo model: `python -m tools.demo.plot training.json loss.png` (needs matplotlib).

`training.json` is what `tools/train_demo.py` leaves in its folder.
"""

import argparse
import importlib.util
import json
from pathlib import Path

from tools.demo.size import CONTEXT


def plot(runs: list[dict], image: Path) -> None:
    """Loss per assistant token (left, logarithmic) and learning rate (right) over the tokens seen in all runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens: list[float] = []
    for run in runs:
        before = tokens[-1] if tokens else 0.0
        tokens += [before + point["step"] * int(run["settings"]["rows"]) * CONTEXT / 1e6 for point in run["curve"]]
    curve = [point for run in runs for point in run["curve"]]
    loss = [point["loss"] for point in curve]
    floor = min(loss)

    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axis.set_title("Training of the built-in model")
    axis.plot(tokens, loss, color="tab:blue")
    axis.set_yscale("log")
    ticks = [0.3, 0.4, 0.5, 0.6, 0.8, 1, 2, 4]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("million tokens, each conversation seen once")
    axis.set_ylabel("weighted loss per assistant token (nats)", color="tab:blue")
    end = (tokens[-1], loss[-1])
    axis.annotate(f"{loss[-1]:.3f}", end, xytext=(0, 16), textcoords="offset points", ha="right")
    axis.set_ylim(floor * 0.9, max(loss) * 1.1)
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot(tokens, [point["rate"] * 1e3 for point in curve], color="tab:orange", linewidth=1)
    rate.set_ylabel("learning rate (thousandths)", color="tab:orange")
    rate.set_ylim(0)
    figure.savefig(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("training", type=Path, nargs="+", help="training.json of each run, in order")
    parser.add_argument("image", type=Path, help="PNG file to write")
    args = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is missing; it comes with the extras train and bench")
    plot([json.loads(file.read_text()) for file in args.training], args.image)


if __name__ == "__main__":
    main()
