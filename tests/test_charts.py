"""The charts of the documentation, drawn anew from the figures beside them: titles, units, numbers, no collisions."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.benchmarks import plot
from tools.demo import plot as demo_plot

pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")

DOCS = Path(__file__).parent.parent / "docs"
CHARTS = ("speed_up", "bandwidth", "roofline", "step", "batch", "cpu", "demo-loss")
UNITS = ("µs", "ms ", "GB/s", "TOPS", "tokens/s", "times as fast", "operations per byte", "million tokens", "nats")
COUNTS = ("sequences", "rows × columns", "thousandths")  # what has no unit
TOUCHING = 1.0  # pixels by which boxes may overlap, since they are a little larger than the letters


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each chart as matplotlib's figure, drawn."""
    from matplotlib import pyplot

    folder, found = tmp_path_factory.mktemp("charts"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_save", lambda figure, path: found.update({path.stem: figure}))
        for name in ("benchmarks", "benchmarks-cpu"):
            plot.plot(json.loads((DOCS / f"{name}.json").read_text()), folder)
    training = json.loads((DOCS / "demo-training.json").read_text())
    demo_plot.plot(training if isinstance(training, list) else [training], folder / "demo-loss.png")
    found["demo-loss"] = pyplot.gcf()
    for figure in found.values():
        figure.set_dpi(120)
        figure.canvas.draw()
    yield found
    pyplot.close("all")


def texts_of(figure: Any) -> list[tuple[str, Any]]:
    """Every text that is shown, and its box in pixels."""
    from matplotlib.text import Text

    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not axis.get_visible() or not low <= tick.get_loc() <= high:
                hidden |= {id(tick.label1), id(tick.label2)}
        if not axis.get_visible():
            hidden.add(id(axis.label))
    return [(t.get_text(), t.get_window_extent()) for t in shown if id(t) not in hidden]


def is_number(text: str) -> bool:
    return text.startswith("$") or text.replace("\N{MINUS SIGN}", "").replace(".", "").isdigit()


def overlap(one: Any, other: Any) -> bool:
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    down = min(one.y1, other.y1) - max(one.y0, other.y0)
    return across > TOUCHING and down > TOUCHING


def bars_of(axes: Any) -> list[Any]:
    from matplotlib.patches import Rectangle

    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_every_chart_of_the_documentation_is_looked_at(figures: dict[str, Any]) -> None:
    assert set(figures) == set(CHARTS) == {path.stem for path in DOCS.glob("*.png")}


@pytest.mark.parametrize("name", CHARTS)
def test_titles_and_units(figures: dict[str, Any], name: str) -> None:
    figure = figures[name]
    suptitle = figure._suptitle.get_text() if figure._suptitle else ""
    for axes in figure.axes[: 1 if name == "demo-loss" else None]:
        assert suptitle or axes.get_title()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_visible()):
        label, ticks = axis.label.get_text() + " ", [tick.get_text() for tick in axis.get_ticklabels()]
        if any(is_number(tick) for tick in ticks):
            assert any(unit in label for unit in (*UNITS, *COUNTS)), f"{label}: {ticks}"


@pytest.mark.parametrize("name", CHARTS)
def test_texts_do_not_collide(figures: dict[str, Any], name: str) -> None:
    figure = figures[name]
    found = texts_of(figure)
    assert len(found) > 5
    for (one, box), (other, other_box) in itertools.combinations(found, 2):
        assert not overlap(box, other_box), f"{one!r} and {other!r}"
    page = figure.bbox
    boxes = found + [("legend", axes.get_legend().get_window_extent()) for axes in figure.axes if axes.get_legend()]
    for text, box in boxes:
        assert box.x0 >= page.x0 and box.y0 >= page.y0 and box.x1 <= page.x1 and box.y1 <= page.y1, text


@pytest.mark.parametrize("name", CHARTS)
def test_legends_hide_nothing(figures: dict[str, Any], name: str) -> None:
    for axes in figures[name].axes:
        legend = axes.get_legend()
        if legend is None:
            continue
        box = legend.get_window_extent()
        for text in axes.texts:
            assert not overlap(text.get_window_extent(), box), text.get_text()
        for bar in bars_of(axes):
            assert not overlap(bar.get_window_extent(), box)
        points = [axes.transData.transform(p) for group in axes.collections for p in group.get_offsets()]
        assert not any(box.contains(x, y) for x, y in points if len(axes.patches) == 0)


@pytest.mark.parametrize("name", CHARTS)
def test_no_line_runs_through_a_number(figures: dict[str, Any], name: str) -> None:
    for text in (text for axes in figures[name].axes for text in axes.texts):
        box = text.get_window_extent()
        for axes in figures[name].axes:
            for line in axes.lines:
                points = line.get_transform().transform(line.get_xydata())
                shares = np.linspace(0, 1, 200)[:, None, None]
                x, y = np.moveaxis(points[:-1] + shares * (points[1:] - points[:-1]), -1, 0)
                assert not ((box.x0 < x) & (x < box.x1) & (box.y0 < y) & (y < box.y1)).any(), text.get_text()


@pytest.mark.parametrize("name", ["speed_up", "bandwidth", "step", "cpu"])
def test_each_bar_has_its_number_and_none_lies_on_another(figures: dict[str, Any], name: str) -> None:
    for axes in figures[name].axes:
        bars = bars_of(axes)
        numbers = [text.get_text() for text in axes.texts]
        assert len(bars) == len(numbers) > 0
        for container, labels in zip(axes.containers, batched(numbers, axes.containers), strict=True):
            for value, label in zip(container.datavalues, labels, strict=True):
                assert float(label) == pytest.approx(value, abs=0.51 if "." not in label else 0.051)
        for bar in bars:
            assert (bar.get_x() if container.orientation == "horizontal" else bar.get_y()) == 0, "bars start at 0"
        for one, other in itertools.combinations(bars, 2):
            assert not overlap(one.get_window_extent(), other.get_window_extent())


def batched(numbers: list[str], containers: Any) -> list[list[str]]:
    """The labels of each group of bars."""
    ends = list(itertools.accumulate(len(container) for container in containers))
    return [numbers[end - len(container) : end] for end, container in zip(ends, containers, strict=True)]


def test_the_roofline_has_its_roofs(figures: dict[str, Any]) -> None:
    """Both axes are logarithmic; the slanting roof is the streaming read, the flat one the peak; points lie below."""
    (axes,) = figures["roofline"].axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    kernels = json.loads((DOCS / "benchmarks.json").read_text())["kernels"]
    slanting, flat = axes.lines
    (x0, x1), (y0, y1) = slanting.get_data()
    slope = kernels["bandwidth_GB/s"] / 1e3
    assert [y0 / x0, y1 / x1] == pytest.approx([slope, slope]) and y1 > y0
    assert set(flat.get_ydata()) == {plot.INT8_PEAK["NVIDIA H200"]} and flat.get_xdata()[0] == x1
    assert math.isclose(y1, flat.get_ydata()[0])
    points = [point for group in axes.collections for point in group.get_offsets()]
    assert len(points) > len(kernels["products"])
    for x, y in points:
        assert 0 < y <= min(slope * x, flat.get_ydata()[0]) and x <= flat.get_xdata()[1]
