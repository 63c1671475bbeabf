"""Figures: saved records in, a matplotlib Figure out; one function per figure, one style file beside this module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fwdlib.results import Record
from fwdlib.training import Run

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
    holds the middle half of the seeds.

    Args:
        records: one, or several of the same task to lay over one another.

    Returns:
        A figure with three panels; stamped if a record was made with substitute data or in quick mode.
    """
    records = [records] if isinstance(records, Record) else list(records)
    with mpl.style.context(STYLE):
        figure = Figure(figsize=(10.5, 3.1))
        loss_axes, accuracy_axes, errors_axes = figure.subplots(1, 3)
        for record in records:
            style = _style(record)
            _draw_band(loss_axes, [_until_end(run, run.test_loss, np.inf) for run in record.runs], style)
            wrong = [_until_end(run, run.test_errors, record.num_test) for run in record.runs]
            _draw_band(accuracy_axes, [100 * (1 - errors / record.num_test) for errors in wrong], style)
            _draw_band(errors_axes, wrong, style)
        num_test = records[0].num_test
        loss_axes.set(title="Test loss", ylabel="mean cross entropy [nats]", yscale="log")
        accuracy_axes.set(title="Test accuracy", ylabel=f"correct of {num_test} [%]", ylim=(0, 103))
        errors_axes.set(title="Misclassifications", ylabel=f"wrong of {num_test}", ylim=(0, None))
        for axes in (loss_axes, accuracy_axes, errors_axes):
            axes.set_xlabel("iteration (optimizer steps)")
        accuracy_axes.legend(loc="lower right")
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
    with mpl.style.context(STYLE):
        figure = Figure(figsize=(7, 3.1))
        axes = figure.subplots()
        marks = {"reached": ("o", 18), "completed": ("o", 18), "not reached": (">", 24), "diverged": ("x", 40)}
        style = METHODS.get(record.title, {"color": "0.3"})
        for run in record.runs:
            finite = [value if np.isfinite(value) else np.nan for value in run.train_loss]
            axes.plot(finite, color=style["color"], alpha=0.35, linewidth=0.8)
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
                "threshold", (1, threshold), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        axes.set(
            title=f"Training loss of each of {len(record.runs)} seeds",
            xlabel="iteration (optimizer steps)",
            ylabel="mean cross entropy [nats]",
            yscale="log",
        )
        axes.legend()
        _stamp(figure, [record])
    return figure


def plot_images(inputs: Tensor, titles: Sequence[str]) -> Figure:
    """Draw a row of grey images.

    Args:
        inputs: shape (N, 1, H, W), values in 0..1.
        titles: one above each.

    Returns:
        A figure with N panels.
    """
    with mpl.style.context(STYLE):
        figure = Figure(figsize=(1.05 * len(inputs), 1.4))
        for axes, image, title in zip(np.atleast_1d(figure.subplots(1, len(inputs))), inputs, titles, strict=True):
            axes.imshow(image.squeeze().cpu(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(title, fontsize=9, loc="center", fontweight="normal")
            axes.set_axis_off()
    return figure


def plot_average(counts: Sequence[int], measured: Sequence[float], predicted: Callable[[float], float]) -> Figure:
    """Draw how the mean of many forward gradients approaches the backprop gradient, beside what the theory says.

    Args:
        counts: how many tangents were averaged.
        measured: |mean - gradient| / |gradient| for each count.
        predicted: the root mean square of that for a count.

    Returns:
        A figure with one panel, both axes logarithmic.
    """
    with mpl.style.context(STYLE):
        figure = Figure(figsize=(5, 3.1))
        axes = figure.subplots()
        axes.loglog(counts, [predicted(k) for k in counts], color="0.4", linestyle=":", label="theory")
        axes.loglog(counts, measured, "o", color=METHODS["forward gradient"]["color"], label="measured")
        axes.set(
            title="Averaging closes in on the gradient",
            xlabel="number of tangents K",
            ylabel="relative error of the mean",
        )
        axes.legend()
    return figure


def _style(record: Record) -> dict[str, object]:
    return {"label": record.title, **METHODS.get(record.title, {"color": "0.3", "linestyle": "-."})}


def _until_end(run: Run, series: Sequence[float], if_diverged: float) -> np.ndarray:
    values = np.asarray(series, dtype=float)
    if run.status == "diverged":
        values[-1] = if_diverged
    return values


def _draw_band(axes: Axes, series: list[np.ndarray], style: dict[str, object]) -> None:
    longest = max(len(values) for values in series)
    rows = np.stack([np.pad(values, (0, longest - len(values)), mode="edge") for values in series])
    rows[~np.isfinite(rows)] = np.inf
    # Order statistics, not interpolation: between a finite and an infinite loss there is no value.
    low, middle, high = np.quantile(rows, (0.25, 0.5, 0.75), axis=0, method="closest_observation")
    top = 1e3 * np.nanmax(rows[np.isfinite(rows)])  # off the panel; matplotlib draws no polygon to infinity
    iterations = np.arange(longest)
    axes.fill_between(iterations, low, np.minimum(high, top), color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(iterations, middle, **style)
    finite = np.concatenate([middle[np.isfinite(middle)], high[np.isfinite(high)], low[np.isfinite(low)]])
    limits = axes.dataLim.intervaly if axes.lines[:-1] else (finite.min(), finite.max())
    del limits


def _stamp(figure: Figure, records: Sequence[Record]) -> None:
    words = []
    for record in records:
        if record.source.get("substitute_for"):
            words.append(f"substitute data: {record.source['name']} in place of {record.source['substitute_for']}")
        if record.quick:
            words.append("quick mode: not a result")
    if words:
        figure.suptitle(" · ".join(dict.fromkeys(words)), color="#B00020", fontsize=9, fontweight="bold")
