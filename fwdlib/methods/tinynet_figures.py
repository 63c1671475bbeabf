"""Figures of backprop from scratch: derivatives, validation curves, and how long the seeds take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from fwdlib.plotting import CURVES, LINES, draw_band, legend_below, panels, plain_decades, plain_ticks, styled
from fwdlib.statistics import median_interval


@styled
def plot_derivatives(functions: dict[str, dict[str, Sequence[float]]], where: Sequence[float]) -> Figure:
    """Draw derivatives beside finite differences.

    Args:
        functions: title -> name -> values at ``where``. The first name of a panel is that of the finite differences,
            which are drawn as dots.
        where: the points.

    Returns:
        A figure with a panel for each title.
    """
    figure = Figure(figsize=(0.6 + 3.7 * len(functions), 3.1))
    every = max(1, len(where) // 24)
    for axes, title, curves in panels(figure, functions):
        (reference, dots), *lines = curves.items()
        axes.plot(where[::every], dots[::every], "o", color="0.3", markersize=4.5, label=reference)
        for (name, values), color, linestyle in zip(lines, CURVES, LINES, strict=False):
            axes.plot(where, values, color=color, linestyle=linestyle, label=name)
        axes.set(title=title, xlabel="x", ylabel="derivative")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


@styled
def plot_validation(curves: dict[str, dict[str, Any]], num_validation: int, loss: str) -> Figure:
    """Draw the progress of trainings with different learning rates: over the epochs, and over rate times steps.

    Args:
        curves: name -> ``"epochs"``; ``"way"``, the learning rate times the steps of these epochs; ``"loss"`` and
            ``"errors"`` on the validation set, a row for each seed.
        num_validation: size of that set.
        loss: what the loss is, for the axis.

    Returns:
        A figure with three panels and one legend: the median over the seeds, and a band with the middle half.
    """
    figure = Figure(figsize=(9, 3.3))
    accuracy, by_epoch, by_way = figure.subplots(1, 3)
    quantities = ((accuracy, "epochs", "errors"), (by_epoch, "epochs", "loss"), (by_way, "way", "loss"))
    for (name, rows), color, linestyle in zip(curves.items(), CURVES, LINES, strict=False):
        for axes, x, y in quantities:
            values = np.array(rows[y], dtype=float)
            values = 100 * (1 - values / num_validation) if y == "errors" else values
            band = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            draw_band(axes, rows[x], band, {"color": color, "linestyle": linestyle}, label=name)
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel=f"correct of {num_validation} [%]")
    by_epoch.set(title="Loss", xlabel="epoch", ylabel=loss, yscale="log")
    way = "learning rate \N{MULTIPLICATION SIGN} steps"
    by_way.set(title="The same by way", xlabel=way, ylabel=loss, yscale="log")
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    for axes in (by_epoch, by_way):
        plain_ticks(axes)
    legend_below(figure, *accuracy.get_legend_handles_labels())
    return figure


@styled
def plot_epochs_until(epochs: dict[str, Sequence[float]], limit: int, goal: str) -> Figure:
    """Draw after how many epochs each seed reaches a goal: dots, their median and its 95 % interval.

    An arrow counts the seeds that never do.

    Args:
        epochs: name -> epochs of each seed, infinite for one that did not reach it; in the colours of
            :func:`plot_validation`.
        limit: the number of epochs that were run.
        goal: what is to be reached, for the title.

    Returns:
        A figure with one panel, a row for each name in their order, on a logarithmic axis.
    """
    figure = Figure(figsize=(7, 0.9 + 0.42 * len(epochs)))
    axes = figure.subplots()
    end = 1.5 * limit
    axes.axvline(limit, color="0.2", linewidth=0.8, linestyle=":")
    for row, (seeds, color) in enumerate(zip(epochs.values(), CURVES, strict=False)):
        place = row + (np.linspace(-0.2, 0.2, len(seeds)) if len(seeds) > 1 else np.zeros(1))
        reached = np.isfinite(seeds)
        axes.scatter(np.array(seeds)[reached], place[reached], s=14, color=color, alpha=0.55, linewidth=0)
        if never := np.count_nonzero(~reached):
            axes.scatter(end, row, marker=">", s=30, color=color)
            axes.annotate(f"{never} never", (end, row), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        low, middle, high = median_interval(seeds)
        axes.plot([low, min(high, end)], [row, row], color=color, linewidth=2.2, solid_capstyle="butt")
        if np.isfinite(middle):
            axes.plot(middle, row, "D", color=color, markersize=6.5, markeredgecolor="white", zorder=3)
    axes.set(title=f"Epochs until {goal}", xlabel=f"epochs, of {limit}", xscale="log")
    axes.set_ylim(len(epochs) - 0.5, -0.5)
    axes.set_yticks(range(len(epochs)), list(epochs))
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    plain_decades(axes.xaxis)
    return figure
