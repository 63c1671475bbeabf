"""The figures of the course: saved records in, a matplotlib Figure out. Also the style that every figure shares.

The six notebooks of the course and the report's summary need the figures here. All other figures are beside the method
that they show, in :mod:`fwdlib.methods`, or in :mod:`fwdlib.bench.figures`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib import runtime
from fwdlib.checks import check_choice
from fwdlib.history import Run
from fwdlib.results import Record

if TYPE_CHECKING:
    from torch import Tensor

    from fwdlib.data import Dataset

CURVES = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # for curves that are not methods; never beside METHOD_STYLES
HANDLE_WIDTH, CHARACTER_WIDTH = 0.6, 0.07  # inches of an entry of a legend, about
LINES = ("-", "--", "-.", ":")  # the line styles that go with CURVES
QUANTITIES = ("test loss", "test accuracy", "misclassifications")
# Quick mode skips the layout, which takes half the time of a figure: nobody looks at those figures.
STYLE = [Path(__file__).with_name("fwdlib.mplstyle"), {"figure.constrained_layout.use": not runtime.is_quick()}]
styled = matplotlib.style.context(STYLE)  # a decorator for the functions that draw

# One colour and one line style for each method, in every figure. The first colours are Okabe and Ito's palette, which
# colour-blind readers can distinguish.
METHOD_STYLES = {
    "backprop": {"color": "#0072B2", "linestyle": "-"},
    "forward gradient": {"color": "#D55E00", "linestyle": "--"},
    "rank-one": {"color": "#009E73", "linestyle": "-."},
    "projection": {"color": "#117733", "linestyle": (0, (4, 1, 1, 1))},
    "per-example": {"color": "#CC79A7", "linestyle": ":"},
    "activity": {"color": "#E69F00", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    "FDFA": {"color": "#56B4E9", "linestyle": (0, (8, 1))},
    "DKP": {"color": "#882255", "linestyle": (0, (6, 2, 1, 2))},
    "DFA": {"color": "0.5", "linestyle": (0, (1, 3))},
    "FG-CV": {"color": "#999933", "linestyle": (0, (3, 1))},
    "L-BP": {"color": "#44AA99", "linestyle": (0, (3, 1, 1, 1))},
    "LG-BP": {"color": "0.15", "linestyle": (0, (2, 1))},
    "FG-GUIDED": {"color": "#6699CC", "linestyle": (0, (9, 1, 2, 1))},
    "LG-FG-A": {"color": "#7F3C8D", "linestyle": (0, (7, 1, 1, 1))},
    "in-backward": {"color": "#332288", "linestyle": (0, (10, 1))},
    "2 checkpoints": {"color": "#4477AA", "linestyle": (0, (6, 1))},
    "√L checkpoints": {"color": "#66A0D0", "linestyle": (0, (4, 2))},
    "L checkpoints": {"color": "#88CCEE", "linestyle": (0, (1, 1))},
    "two-point": {"color": "#AA4499", "linestyle": (0, (5, 2, 1, 2))},
    "torchzero": {"color": "#661100", "linestyle": (0, (2, 2))},
}


@styled
def plot_training(records: Record | Sequence[Record]) -> Figure:
    """Draw test loss, test accuracy and misclassifications over the iterations: the median over the seeds, with a band.

    A seed that has stopped keeps its last value. A seed that has diverged counts as infinite loss and all wrong. The
    band holds the middle half of the seeds. The axis ends when 19 of 20 seeds have stopped.

    Args:
        records: one record, or several of the same task to compare.

    Returns:
        A figure with three panels; stamped if a record was made with substitute data or in quick mode.
    """
    records = [records] if isinstance(records, Record) else list(records)
    figure = Figure(figsize=(9, 2.9))
    for axes, quantity in zip(figure.subplots(1, 3), QUANTITIES, strict=True):
        _draw_quantity(axes, records, quantity)
    figure.axes[1].legend()
    stamp_records(figure, records)
    return figure


@styled
def plot_quantity(records: Sequence[Record], quantity: str) -> Figure:
    """Draw one panel of :func:`plot_training` as a figure of its own.

    Args:
        records: of the same task.
        quantity: ``"test loss"``, ``"test accuracy"`` or ``"misclassifications"``.

    Returns:
        A figure with one panel, stamped like that of :func:`plot_training`.

    Raises:
        ValueError: if the quantity is none of these.
    """
    check_choice("quantity", quantity, QUANTITIES)
    figure = Figure(figsize=(4.2, 3.1))
    axes = figure.subplots()
    _draw_quantity(axes, records, quantity)
    axes.legend()
    stamp_records(figure, records)
    return figure


@styled
def plot_seeds(records: Record | Sequence[Record], threshold: float | None = None) -> Figure:
    """Draw every seed's training loss over its iterations, marked by how it ended.

    Args:
        records: one record, or several of the same task to compare.
        threshold: the loss at which a seed stopped, drawn as a line.

    Returns:
        A figure with one panel.
    """
    records = [records] if isinstance(records, Record) else list(records)
    figure = Figure(figsize=(7, 3.1))
    axes = figure.subplots()
    for record in records:
        _draw_seeds(axes, record, f"{record.title}, " if len(records) > 1 else "")
    if threshold is not None:
        axes.axhline(threshold, color="0.2", linewidth=0.8, linestyle=":")
        where = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "bottom"}
        axes.annotate("threshold", (0.01, threshold), fontsize=8, **where)
    axes.set(title=f"Training loss of each of {len(records[0].runs)} seeds", xlabel="iteration (optimizer steps)")
    axes.set(ylabel="mean cross entropy [nats]", yscale="log")
    if not any(np.isfinite(run.train_loss).any() for record in records for run in record.runs):
        axes.set_ylim(0.1, 10)  # there is nothing to scale the axis by
    plain_ticks(axes)
    axes.legend()
    stamp_records(figure, records)
    return figure


@styled
def plot_losses(
    curves: dict[str, Sequence[float]], threshold: float | None = None, threshold_label: str = "threshold"
) -> Figure:
    """Draw a few named loss curves over the iterations; each ends with a cross before it exceeds 100 times the start.

    Args:
        curves: name -> training loss before the first step and after each.
        threshold: drawn as a line.
        threshold_label: what the line is.

    Returns:
        A figure with one panel.
    """
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    top = 100 * max(losses[0] for losses in curves.values())
    for (name, losses), color, linestyle in zip(curves.items(), CURVES, LINES, strict=False):
        shown = np.array([value if value < top else np.nan for value in losses])
        axes.plot(shown, color=color, linestyle=linestyle, label=name)
        if np.isnan(shown).any():
            last = int(np.flatnonzero(np.isnan(shown))[0]) - 1
            axes.plot(last, shown[last], "x", color=color, markersize=8)
    if any(line.get_marker() == "x" for line in axes.lines):
        axes.plot([], [], "x", color="0.3", markersize=8, label="goes on above 100 times the start")
    if threshold is not None:
        axes.axhline(threshold, color="0.2", linewidth=0.8, linestyle=":", label=threshold_label)
    axes.set(xlabel="iteration (optimizer steps)", ylabel="training loss [nats]", yscale="log")
    plain_ticks(axes)
    axes.legend()
    return figure


@styled
def plot_images(inputs: Tensor, titles: Sequence[str]) -> Figure:
    """Draw a row of grey images.

    Args:
        inputs: shape (N, 1, H, W), values in 0..1.
        titles: one for each image.

    Returns:
        A figure with N panels.
    """
    figure = Figure(figsize=(1.05 * len(inputs), 1.4))
    for axes, image, title in zip(np.atleast_1d(figure.subplots(1, len(inputs))), inputs, titles, strict=True):
        axes.imshow(image.squeeze().cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9, loc="center", fontweight="normal")
        axes.set_axis_off()
    return figure


@styled
def plot_average(
    counts: Sequence[int],
    measured: Sequence[float] | dict[str, Sequence[float]],
    predicted: Callable[[float], float] | dict[str, Callable[[float], float]],
    unit: str,
    goal: str = "gradient",
) -> Figure:
    """Draw how the mean of many estimates approaches the gradient, beside what the theory says.

    Args:
        counts: how many estimates were averaged.
        measured: |mean - gradient| / |gradient| for each count, root mean square; or a dictionary with these for each
            method. A method in another form (``"FG-CV, random feedback"``) gets hollow dots.
        predicted: the same as a function of the count; or a dictionary with such functions for some of the methods.
        unit: what was averaged, for the axis.
        goal: what is estimated, for the title.

    Returns:
        A figure with one panel, both axes logarithmic.
    """
    is_crowded = isinstance(predicted, dict)
    theories = list(predicted.values()) if is_crowded else [predicted]
    figure = Figure(figsize=(7.2, 3.2) if is_crowded else (5, 3))
    axes = figure.subplots()
    for theory in theories:
        label = "theory" if theory is theories[0] else None
        axes.loglog(counts, [theory(k) for k in counts], color="0.4", linestyle=":", label=label)
    for name, errors in measured.items() if isinstance(measured, dict) else [("measured", measured)]:
        color = CURVES[0] if name == "measured" else style_of(name)["color"]
        axes.loglog(counts, errors, "o", color=color, label=name, **dots_of(name))
    axes.set(title=f"The mean closes in on the {goal}", xlabel=unit, ylabel="relative error of the mean")
    if is_crowded:
        figure.legend(loc="outside right center")
    else:
        axes.legend()
    return figure


@styled
def plot_features(data: Dataset) -> Figure:
    """Draw a table data set: every class in the plane of the first two features and of the last two.

    Args:
        data: with inputs of shape (N, 4), such as :func:`fwdlib.data.load_penguins` returns.

    Returns:
        A figure with two panels.
    """
    from fwdlib.data import PENGUIN_FEATURES  # with torch, which no other figure needs

    figure = Figure(figsize=(7.5, 3))
    inputs, targets = data.train_inputs.cpu(), data.train_targets.cpu()
    for axes, (x, y) in zip(figure.subplots(1, 2), ((0, 1), (2, 3)), strict=True):
        for index, (name, marker) in enumerate(zip(data.class_names, "o^s", strict=False)):
            points = inputs[targets == index]
            axes.scatter(points[:, x], points[:, y], s=14, marker=marker, alpha=0.7, color=CURVES[index], label=name)
        axes.set(xlabel=_scaled(PENGUIN_FEATURES[x]), ylabel=_scaled(PENGUIN_FEATURES[y]))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _draw_quantity(axes: Axes, records: Sequence[Record], quantity: str) -> None:
    num_test = records[0].num_test
    ends = []
    for record in records:
        series = [_until_end(run, quantity, num_test) for run in record.runs]
        longest = max(len(values) for values in series)
        rows = np.stack([np.pad(values, (0, longest - len(values)), mode="edge") for values in series])
        # order statistics, not interpolation: between a finite and an infinite loss there is no value
        low, middle, high = np.quantile(rows, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")
        # off the panel, but drawable; 1 for seeds that were never finite
        finite = np.where(np.isfinite(high), high, 1e3 * np.max(rows[np.isfinite(rows)], initial=1e-3))
        style = METHOD_STYLES.get(record.title, {"color": "0.3", "linestyle": "-."})
        title = record.title.replace("$", r"\$")  # matplotlib would read a formula between two of them
        draw_band(axes, np.arange(longest), (low, middle, finite), style, label=title)
        ends.append(np.quantile([len(values) - 1 for values in series], 0.95, method="inverted_cdf"))
    axes.set(title=quantity.capitalize(), xlabel="iteration (optimizer steps)", xlim=(0, max(ends) * 1.02 or 1))
    if quantity == "test loss":
        axes.set(ylabel="mean cross entropy [nats]", yscale="log")
        drawn = np.concatenate([line.get_ydata()[np.isfinite(line.get_ydata())] for line in axes.lines])
        axes.set_ylim((0.9 * drawn.min(), 1.4 * drawn.max()) if drawn.size else (0.1, 10))
        plain_ticks(axes)
    elif quantity == "test accuracy":
        axes.set(ylabel=f"correct of {num_test} [%]", ylim=(0, 103))
    else:
        axes.set(ylabel=f"wrong of {num_test}", ylim=(0, None))


def _draw_seeds(axes: Axes, record: Record, prefix: str) -> None:
    marks = {"reached": ("o", 18), "completed": ("o", 18), "not reached": (">", 24), "diverged": ("x", 40)}
    color = METHOD_STYLES.get(record.title, {"color": "0.3"})["color"]
    for run in record.runs:
        finite = [value if np.isfinite(value) else np.nan for value in run.train_loss]
        axes.plot(finite, color=color, alpha=0.45, linewidth=0.9)
        last = int(np.flatnonzero(np.isfinite(finite))[-1]) if np.isfinite(finite).any() else 0
        marker, size = marks[run.status]
        axes.scatter(last, finite[last], marker=marker, s=size, color=color, zorder=3)
    for status, (marker, size) in marks.items():
        count = sum(run.status == status for run in record.runs)
        if count:
            axes.scatter([], [], marker=marker, s=size, color=color, label=f"{prefix}{status}: {count}")


def _until_end(run: Run, quantity: str, num_test: int) -> np.ndarray:
    values = np.asarray(run.test_loss if quantity == "test loss" else run.test_errors, dtype=float)
    values[-1] = run.end(num_test)[0 if quantity == "test loss" else 1]
    if quantity == "test accuracy":
        return 100 * (1 - values / num_test)
    return np.where(np.isfinite(values), values, np.inf)


def _scaled(feature: str) -> str:
    return feature.removesuffix("_mm").removesuffix("_g").replace("_", " ") + ", scaled to 0..1"


# Shared by all figures, here and in the wings.


def style_of(name: str) -> dict[str, Any]:
    """Return the colour and line style of a method, also in another form (``"projection, K = 4"``); else dark grey."""
    return METHOD_STYLES.get(name.partition(", ")[0], {"color": "0.2"})


def dots_of(name: str) -> dict[str, Any]:
    """Return the option for hollow dots if the name is of a method in another form (``"projection, rescaled"``)."""
    return {"markerfacecolor": "white"} if ", " in name else {}


def panels(
    figure: Figure, contents: dict[str, Any], *, columns: int = 99, **options: Any
) -> Iterator[tuple[Axes, str, Any]]:
    """Yield a panel for each entry of ``contents``, in rows of at most ``columns``, with its title and value."""
    columns = min(columns, len(contents))
    grid = np.ravel(figure.subplots(-(-len(contents) // columns), columns, **options))
    for unused in grid[len(contents) :]:
        unused.remove()
    return zip(grid[: len(contents)], contents.keys(), contents.values(), strict=True)


def draw_band(axes: Axes, where: Any, band: Sequence[np.ndarray], style: dict[str, Any], **options: Any) -> None:
    """Draw a line within a band: ``band`` has the lower end, the line and the upper end at ``where``."""
    low, middle, high = band
    axes.fill_between(where, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(where, middle, **style, **options)


def handles_of(names: Sequence[str], **options: Any) -> list[Line2D]:
    """Return a solid line in the colour of each method, for a legend."""
    return [Line2D([], [], label=name, color=style_of(name)["color"], **options) for name in names]


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str] | None = None, **options: Any) -> None:
    """Put one legend for all panels below them, in as few rows as its width allows unless ``ncols`` says otherwise."""
    labels = [handle.get_label() for handle in handles] if labels is None else list(labels)
    inches = sum(HANDLE_WIDTH + CHARACTER_WIDTH * len(label) for label in labels)
    num_rows = max(1, math.ceil(inches / figure.get_figwidth()))
    ncols = max(1, -(-len(labels) // num_rows))
    figure.legend(handles, labels, loc="outside lower center", **{"ncols": ncols} | options)


def plain_ticks(axes: Axes) -> None:
    """Write 0.3 rather than 3 x 10^-1 on a logarithmic y axis, with minor labels only where it spans few decades."""
    low, high = axes.get_ylim()
    subs = (2, 3, 5) if high / low < 100 else ()
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=subs or (2, 4, 6, 8)))
    axes.yaxis.set_minor_formatter(ticker.FormatStrFormatter("%g") if subs else ticker.NullFormatter())


def plain_decades(axis: Axis) -> None:
    """Write 0.1 rather than 10^-1 at the major ticks of a logarithmic axis, and nothing at the minor ones."""
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def stamp_records(figure: Figure, records: Sequence[Record]) -> None:
    """Stamp a figure if one of its records was made with substitute data or in quick mode."""
    words = []
    for record in records:
        if record.source.get("substitute_for"):
            words.append(f"substitute data: {record.source['name']} in place of {record.source['substitute_for']}")
        if record.quick:
            words.append("quick mode: not a result")
    write_stamp(figure, words)


def write_stamp(figure: Figure, words: Sequence[str]) -> None:
    """Write on top of a figure what its reader must know first, for example that the data are a substitute."""
    if words:
        bold = {"color": "#B00020", "fontsize": 9, "fontweight": "bold"}
        figure.suptitle(" · ".join(dict.fromkeys(words)), parse_math=False, **bold)
