"""Figures: saved records in, a matplotlib Figure out; one function per figure, one style file beside this module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fwdlib.checks import check_choice
from fwdlib.data import PENGUIN_FEATURES, Dataset
from fwdlib.history import Run
from fwdlib.results import Record

CURVES = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # of the same palette as METHODS, none of the methods' own
QUANTITIES = ("test loss", "test accuracy", "misclassifications")
STYLE = Path(__file__).with_name("fwdlib.mplstyle")

# One colour and one line style per method, in every figure. Okabe and Ito's palette: told apart by colour-blind
# readers.
METHODS = {
    "backprop": {"color": "#0072B2", "linestyle": "-"},
    "forward gradient": {"color": "#D55E00", "linestyle": "--"},
}


def plot_training(records: Record | Sequence[Record]) -> Figure:
    """Draw test loss, test accuracy and misclassifications over the iterations: the median over the seeds, with a band.

    A seed that has stopped keeps its last value; one that has diverged counts as infinite loss and all wrong. The band
    holds the middle half of the seeds. The axis ends when 19 of 20 seeds have stopped.

    Args:
        records: one, or several of the same task to lay over one another.

    Returns:
        A figure with three panels; stamped if a record was made with substitute data or in quick mode.
    """
    records = [records] if isinstance(records, Record) else list(records)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(9, 2.9))
        for axes, quantity in zip(figure.subplots(1, 3), QUANTITIES, strict=True):
            _draw_quantity(axes, records, quantity)
        figure.axes[1].legend()
        _stamp(figure, records)
    return figure


def plot_quantity(records: Sequence[Record], quantity: str) -> Figure:
    """Draw one panel of :func:`plot_training` as a figure of its own.

    Args:
        records: of the same task.
        quantity: ``"test loss"``, ``"test accuracy"`` or ``"misclassifications"``.

    Returns:
        A figure with one panel, stamped as there.

    Raises:
        ValueError: if the quantity is none of these.
    """
    check_choice("quantity", quantity, QUANTITIES)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(4.2, 3.1))
        axes = figure.subplots()
        _draw_quantity(axes, records, quantity)
        axes.legend()
        _stamp(figure, records)
    return figure


def plot_seeds(record: Record, threshold: float | None = None) -> Figure:
    """Draw every seed's training loss over its iterations, marked by how it ended.

    Args:
        record: of a run.
        threshold: where a run stopped, drawn as a line.

    Returns:
        A figure with one panel.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3.1))
        axes = figure.subplots()
        marks = {"reached": ("o", 18), "completed": ("o", 18), "not reached": (">", 24), "diverged": ("x", 40)}
        style = METHODS.get(record.title, {"color": "0.3"})
        for run in record.runs:
            finite = [value if np.isfinite(value) else np.nan for value in run.train_loss]
            axes.plot(finite, color=style["color"], alpha=0.45, linewidth=0.9)
            last = int(np.flatnonzero(np.isfinite(finite))[-1]) if np.isfinite(finite).any() else 0
            marker, size = marks[run.status]
            axes.scatter(last, finite[last], marker=marker, s=size, color=style["color"], zorder=3)
        for status, (marker, size) in marks.items():
            count = sum(run.status == status for run in record.runs)
            if count:
                axes.scatter([], [], marker=marker, s=size, color=style["color"], label=f"{status}: {count}")
        if threshold is not None:
            axes.axhline(threshold, color="0.2", linewidth=0.8, linestyle=":")
            axes.annotate(
                "threshold", (0.01, threshold), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8
            )
        axes.set(
            title=f"Training loss of each of {len(record.runs)} seeds",
            xlabel="iteration (optimizer steps)",
            ylabel="mean cross entropy [nats]",
            yscale="log",
        )
        if not any(np.isfinite(run.train_loss).any() for run in record.runs):
            axes.set_ylim(0.1, 10)  # there is nothing to scale the axis by
        _plain_ticks(axes)
        axes.legend()
        _stamp(figure, [record])
    return figure


def plot_losses(
    curves: dict[str, Sequence[float]], threshold: float | None = None, threshold_label: str = "threshold"
) -> Figure:
    """Draw a few named loss curves over the iterations, each until it leaves a hundred times the start.

    Args:
        curves: name -> training loss before the first step and after each.
        threshold: drawn as a line.
        threshold_label: what it is.

    Returns:
        A figure with one panel.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3))
        axes = figure.subplots()
        top = 100 * max(losses[0] for losses in curves.values())
        for (name, losses), color, linestyle in zip(curves.items(), CURVES, ("-", "--", "-.", ":"), strict=False):
            shown = np.array([value if value < top else np.nan for value in losses])
            axes.plot(shown, color=color, linestyle=linestyle, label=name)
            if np.isnan(shown).any():
                last = int(np.flatnonzero(np.isnan(shown))[0]) - 1
                axes.plot(last, shown[last], "x", color=color, markersize=8)
        if threshold is not None:
            axes.axhline(threshold, color="0.2", linewidth=0.8, linestyle=":", label=threshold_label)
        axes.set(xlabel="iteration (optimizer steps)", ylabel="training loss [nats]", yscale="log")
        _plain_ticks(axes)
        axes.legend()
    return figure


def plot_images(inputs: Tensor, titles: Sequence[str]) -> Figure:
    """Draw a row of grey images.

    Args:
        inputs: shape (N, 1, H, W), values in 0..1.
        titles: one above each.

    Returns:
        A figure with N panels.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(1.05 * len(inputs), 1.4))
        for axes, image, title in zip(np.atleast_1d(figure.subplots(1, len(inputs))), inputs, titles, strict=True):
            axes.imshow(image.squeeze().cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(title, fontsize=9, loc="center", fontweight="normal")
            axes.set_axis_off()
    return figure


def plot_average(
    counts: Sequence[int], measured: Sequence[float], predicted: Callable[[float], float], unit: str
) -> Figure:
    """Draw how the mean of many estimates approaches the gradient, beside what the theory says.

    Args:
        counts: how many estimates were averaged.
        measured: |mean - gradient| / |gradient| for each count, root mean square.
        predicted: the same as a function of the count.
        unit: what was averaged, for the axis.

    Returns:
        A figure with one panel, both axes logarithmic.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(5, 3))
        axes = figure.subplots()
        axes.loglog(counts, [predicted(k) for k in counts], color="0.4", linestyle=":", label="theory")
        axes.loglog(counts, measured, "o", color="#009E73", label="measured")
        axes.set(title="The mean closes in on the gradient", xlabel=unit, ylabel="relative error of the mean")
        axes.legend()
    return figure


def plot_features(data: Dataset) -> Figure:
    """Draw a table data set: every class in the plane of the first two features and of the last two.

    Args:
        data: with inputs of shape (N, 4), such as :func:`fwdlib.data.load_penguins` returns.

    Returns:
        A figure with two panels.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.5, 3))
        panels = figure.subplots(1, 2)
        inputs, targets = data.train_inputs.cpu(), data.train_targets.cpu()
        for axes, (x, y) in zip(panels, ((0, 1), (2, 3)), strict=True):
            for index, (name, marker) in enumerate(zip(data.class_names, "o^s", strict=False)):
                points = inputs[targets == index]
                axes.scatter(
                    points[:, x], points[:, y], s=14, marker=marker, alpha=0.7, color=CURVES[index], label=name
                )
            axes.set(xlabel=_scaled(PENGUIN_FEATURES[x]), ylabel=_scaled(PENGUIN_FEATURES[y]))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
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
        style = {"label": record.title, **METHODS.get(record.title, {"color": "0.3", "linestyle": "-."})}
        axes.fill_between(np.arange(longest), low, finite, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(middle, **style)
        ends.append(np.quantile([len(values) - 1 for values in series], 0.95, method="inverted_cdf"))
    axes.set(title=quantity.capitalize(), xlabel="iteration (optimizer steps)", xlim=(0, max(ends) * 1.02 or 1))
    if quantity == "test loss":
        axes.set(ylabel="mean cross entropy [nats]", yscale="log")
        drawn = np.concatenate([line.get_ydata()[np.isfinite(line.get_ydata())] for line in axes.lines])
        axes.set_ylim((0.9 * drawn.min(), 1.4 * drawn.max()) if drawn.size else (0.1, 10))
        _plain_ticks(axes)
    elif quantity == "test accuracy":
        axes.set(ylabel=f"correct of {num_test} [%]", ylim=(0, 103))
    else:
        axes.set(ylabel=f"wrong of {num_test}", ylim=(0, None))


def _until_end(run: Run, quantity: str, num_test: int) -> np.ndarray:
    values = np.asarray(run.test_loss if quantity == "test loss" else run.test_errors, dtype=float)
    values[-1] = run.end(num_test)[0 if quantity == "test loss" else 1]
    return (
        100 * (1 - values / num_test) if quantity == "test accuracy" else np.where(np.isfinite(values), values, np.inf)
    )


def _scaled(feature: str) -> str:
    return feature.removesuffix("_mm").removesuffix("_g").replace("_", " ") + ", scaled to 0..1"


def _plain_ticks(axes: Axes) -> None:
    # 0.3 rather than 3 x 10^-1 on a logarithmic axis; minor labels only where it spans few decades
    low, high = axes.get_ylim()
    subs = (2, 3, 5) if high / low < 100 else ()
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=subs or (2, 4, 6, 8)))
    axes.yaxis.set_minor_formatter(ticker.FormatStrFormatter("%g") if subs else ticker.NullFormatter())


def _stamp(figure: Figure, records: Sequence[Record]) -> None:
    words = []
    for record in records:
        if record.source.get("substitute_for"):
            words.append(f"substitute data: {record.source['name']} in place of {record.source['substitute_for']}")
        if record.quick:
            words.append("quick mode: not a result")
    if words:
        figure.suptitle(" · ".join(dict.fromkeys(words)), color="#B00020", fontsize=9, fontweight="bold")
