"""Figures of local losses: from one group of units to one unit in each group, and what the heads know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from fwdlib.plotting import METHOD_STYLES, plain_ticks, style_of, styled


@styled
def plot_groups(rows: Sequence[dict[str, Any]], references: dict[str, Sequence[float]]) -> Figure:
    """Draw how noise and test error change with the size of the groups.

    Args:
        rows: one for each size: ``units`` in a group; ``measured`` and ``predicted`` relative error of the gradient,
            the root of its mean square; ``errors``, the test error of each seed, a fraction.
        references: method without groups -> the test error of each seed.

    Returns:
        A figure with two panels. A relative error of zero is drawn at the lower edge, as a hollow triangle.
    """
    figure = Figure(figsize=(8, 3.2))
    noise, error = figure.subplots(1, 2)
    units = [row["units"] for row in rows]
    style = METHOD_STYLES["LG-FG-A"] | {"linestyle": "none"}
    shown = [row for row in rows if row["predicted"] > 0]
    lowest = 0.5 * min(row["predicted"] for row in shown)
    noise.plot([r["units"] for r in shown], [r["predicted"] for r in shown], ":", color="0.4", label="theory")
    noise.plot([r["units"] for r in shown], [r["measured"] for r in shown], marker="o", **style, label="measured")
    exact = [row["units"] for row in rows if row["predicted"] == 0]
    noise.plot(exact, [lowest] * len(exact), marker="v", markerfacecolor="white", **style, label="none: exact")
    noise.set(title="Noise of a step", ylabel="relative error of the gradient", yscale="log")
    noise.legend()
    percent = 100 * np.array([row["errors"] for row in rows])
    error.plot(units, percent, "o", color=style["color"], markersize=3, alpha=0.5)
    error.plot(units, percent.mean(1), color=style["color"], label="LG-FG-A")
    for name, seeds in references.items():
        error.axhline(100 * np.mean(seeds), **style_of(name), label=name)
    error.set(title="After training", ylabel="test error [%]", yscale="log")
    plain_ticks(error)
    error.legend()
    for axes in (noise, error):
        axes.set(xlabel="units in a group", xscale="log")
        axes.xaxis.set_major_locator(ticker.FixedLocator(units))
        axes.xaxis.set_major_formatter(ticker.FixedFormatter([str(n) for n in units]))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    return figure


@styled
def plot_heads(accuracies: dict[str, Sequence[float]]) -> Figure:
    """Draw how well the classes can be told from the outputs of each block.

    Args:
        accuracies: method -> the fraction of the test set that a head classifies correctly, block by block; the last is
            that of the readout.

    Returns:
        A figure with one panel.
    """
    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    for name, values in accuracies.items():
        axes.plot(
            range(1, len(values) + 1), [100 * value for value in values], **style_of(name), marker="o", label=name
        )
    axes.set(title="What a block knows", xlabel="block", ylabel="test accuracy of its head [%]")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside right center")
    return figure
