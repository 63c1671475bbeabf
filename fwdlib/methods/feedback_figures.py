"""Figures of feedback alignment: test errors over the epochs, and how well directions agree."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib.drawings import ERROR, VALUE, draw_arrow, draw_layers
from fwdlib.methods.history_figures import draw_mean
from fwdlib.plotting import CURVES, LINES, METHOD_STYLES, legend_below, panels, plain_ticks, style_of, styled

COLUMNS = 4  # panels in a row


@styled
def plot_test_errors(studies: dict[str, dict[str, Sequence[Sequence[float]]]]) -> Figure:
    """Draw test errors over the epochs: the mean over the seeds of each method, and each seed as a thin line.

    Args:
        studies: title of a panel -> method -> for each seed the fraction of the test set that is misclassified, before
            training and after each epoch.

    Returns:
        A figure with a panel for each title, the error in percent on a logarithmic axis.
    """
    rows = -(-len(studies) // COLUMNS)
    columns = -(-len(studies) // rows)
    figure = Figure(figsize=(3.4 * columns, 0.6 + 3.2 * rows))
    labels: dict[str, Any] = {}  # one legend for the methods of all panels
    for axes, title, methods in panels(figure, studies, columns=columns):
        for name, seeds in methods.items():
            errors = 100 * np.array(seeds)[:, 1:]
            draw_mean(axes, np.arange(1, errors.shape[1] + 1), errors, style_of(name), label=name, marker=".")
        axes.set(title=title, xlabel="epoch", ylabel="test error [%]", yscale="log")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        plain_ticks(axes)
        handles, names = axes.get_legend_handles_labels()
        labels = dict(zip(names, handles, strict=True)) | labels
    legend_below(figure, labels.values(), labels, ncols=2 * columns, fontsize=8)
    return figure


@styled
def plot_depths(accuracies: dict[str, dict[int, Sequence[float]]]) -> Figure:
    """Draw the test accuracy over the number of hidden layers: the mean over the seeds, and each seed as a dot.

    Args:
        accuracies: method -> hidden layers -> the accuracy of each seed, in percent.
    """
    figure = Figure(figsize=(6.5, 3.5))
    axes = figure.subplots()
    depths = sorted({depth for by_depth in accuracies.values() for depth in by_depth})
    for name, by_depth in accuracies.items():
        style = style_of(name)
        for depth, values in by_depth.items():
            axes.plot([depth] * len(values), values, ".", color=style["color"], alpha=0.4)
        where = sorted(by_depth)
        axes.plot(where, [np.mean(by_depth[depth]) for depth in where], label=name, **style)
    axes.set(xlabel="hidden layers", ylabel="test accuracy [%]", xscale="log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    legend_below(figure, axes.get_legend_handles_labels()[0])
    return figure


@styled
def plot_cosines(runs: dict[str, Sequence[dict[str, float]]], titles: Sequence[str]) -> Figure:
    """Draw over the steps of training how well directions agree.

    Args:
        runs: name -> rows, each with its ``"step"`` and a cosine under each title. Methods have their own colours.
            Beside methods, other names are thin and black. Without methods, each name has a colour.
        titles: one for each panel.

    Returns:
        A figure with a panel for each title and one legend.
    """
    if any(name in METHOD_STYLES for name in runs):
        styles = {name: METHOD_STYLES.get(name, {"color": "0.2", "linewidth": 0.8}) for name in runs}
    else:
        looks = zip(runs, CURVES, LINES, strict=False)
        styles = {name: {"color": color, "linestyle": linestyle} for name, color, linestyle in looks}
    figure = Figure(figsize=(0.6 + 3.7 * len(titles), 3.1))
    for axes, title, _ in panels(figure, dict.fromkeys(titles)):
        for name, rows in runs.items():
            axes.plot([row["step"] for row in rows], [row[title] for row in rows], **styles[name])
        lowest = min(row[title] for rows in runs.values() for row in rows)
        axes.set(title=title, xlabel="iteration (optimizer steps)", ylabel="cosine")
        axes.set_ylim(min(-0.03, 1.05 * lowest), 1.03)
    legend_below(figure, [Line2D([], [], label=name, **styles[name]) for name in runs])
    return figure


@styled
def plot_ways() -> Figure:
    """Draw how the error reaches the layers: from layer to layer with backprop, straight from the output with feedback.

    Returns:
        A figure with two panels.
    """
    figure = Figure(figsize=(8.2, 2.2))
    names = ("inputs", "block 1", "block 2", "output")
    for axes, title, is_backprop in panels(figure, {"Backprop": True, "Direct feedback": False}):
        places = draw_layers(axes, names)
        for left, right in itertools.pairwise(places):
            draw_arrow(axes, (left, 0.1), (right, 0.1), VALUE)
        for place in places[-2:0:-1]:
            if is_backprop:
                draw_arrow(axes, (place + 1, -0.1), (place, -0.1), ERROR)
            else:
                draw_arrow(axes, (places[-1], -0.1), (place, -0.1), METHOD_STYLES["FDFA"]["color"], bend=-0.35)
        way = "through every layer between" if is_backprop else "by a matrix of each block's own, $B_l$"
        said = f"black: values; the error comes back\n{way}"
        axes.text(1.5, -0.6, said, ha="center", va="top", fontsize=8.5)
        axes.set(title=title, ylim=(-1.1, 0.4))
    return figure
