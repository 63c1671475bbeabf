"""Figures of stability: how fast a descent grows, and at which learning rates it diverges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib.plotting import METHOD_STYLES, handles_of, legend_below, panels, plain_decades, style_of, styled


@styled
def plot_growth(rows: Sequence[dict[str, float]], rates: Sequence[float], theory: dict[str, Sequence[float]]) -> Figure:
    """Draw over the learning rate by what factor a step on the sphere multiplies the value.

    Args:
        rows: measured, as :func:`fwdlib.methods.stability.measure_growth` returns them.
        rates: of the theory.
        theory: at these rates, as :func:`fwdlib.methods.stability.growth` returns it.

    Returns:
        A figure with one panel. Lines are the theory, dots are measured, bars are 5 standard errors of the mean.
    """
    forward, backprop = style_of("forward gradient")["color"], style_of("backprop")["color"]
    figure = Figure(figsize=(7, 3.1))
    axes = figure.subplots()
    axes.axhline(1, color="0.2", linewidth=0.8)
    axes.plot(rates, theory["backprop"], color=backprop, label="backprop")
    axes.plot(rates, theory["mean"], color=forward, linestyle="--", label="forward gradient,\nmean of the runs")
    axes.plot(rates, theory["typical"], color=forward, linestyle=":", label="forward gradient,\ntypical run")
    where, means, errors, typical = ([row[key] for row in rows] for key in ("rate", "mean", "error", "typical"))
    axes.errorbar(where, means, 5 * np.array(errors), fmt="o", markersize=4, color=forward)
    axes.plot(where, typical, "o", markersize=4, color=forward, markerfacecolor="white")
    axes.set(title="What a step multiplies the value by", xlabel="learning rate", ylabel="factor", ylim=(0, 3))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


@styled
def plot_divergence(functions: dict[str, dict[str, Any]]) -> Figure:
    """Draw over the learning rate how many of the seeds diverge.

    Args:
        functions: title of a function -> as :func:`fwdlib.methods.stability.divergence` returns it.

    Returns:
        A figure with a panel for each function. A dotted line in the colour of a method is its limit in theory.
    """
    figure = Figure(figsize=(2.35 * len(functions), 2.7))
    for axes, title, found in panels(figure, functions, sharey=True):
        for name, fractions in found["diverged"].items():
            style = METHOD_STYLES[name]
            axes.axvline(found["limits"][name], color=style["color"], linewidth=1, linestyle=":")
            axes.plot(found["rates"], 100 * np.array(fractions), marker="o", markersize=3, label=name, **style)
        axes.set(title=title, xlabel="learning rate", xscale="log", ylim=(-4, 104))
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        plain_decades(axes.xaxis)
    figure.axes[0].set_ylabel("seeds that diverge [%]")
    theory = Line2D([], [], color="0.4", linestyle=":", label="theory")
    legend_below(figure, [*handles_of(found["diverged"], linewidth=1.8), theory])
    return figure
