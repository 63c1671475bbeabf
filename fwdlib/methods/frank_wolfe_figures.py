"""Figures of Frank-Wolfe: the gap over the iterations, paths in a ball, how far it gets, accuracy and sparsity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib.plotting import CURVES, METHOD_STYLES, draw_band, legend_below, panels, plain_decades, styled

# Frank-Wolfe with the exact gradient, with forward gradients as they are, and with their average.
VARIANTS = {
    "exact gradient": {"color": "0.3", "linestyle": ":"},
    "plain": {"color": CURVES[3], "linestyle": "--"},
    "averaged": {"color": CURVES[0], "linestyle": "-"},
}


@styled
def plot_decay(cases: dict[str, dict[str, np.ndarray]], steps: Sequence[int], quantity: str) -> Figure:
    """Draw how a quantity falls over the iterations: the median over the seeds, with a band over all of them.

    Args:
        cases: title -> ``"exact gradient"``, ``"plain"`` or ``"averaged"`` -> values, shape (seeds, steps).
        steps: the iterations of the values.
        quantity: what falls, for the axis.

    Returns:
        A figure with a panel for each title, all axes logarithmic. Values below 1e-12 are not drawn.
    """
    figure = Figure(figsize=(0.9 + 2.9 * len(cases), 3.3))
    for axes, title, curves in panels(figure, cases):
        for name, seeds in curves.items():
            values = np.where(np.asarray(seeds) > 1e-12, seeds, np.nan)
            if np.isnan(values).all():
                continue  # the exact gradient can be at the optimum after one step
            draw_band(axes, steps, np.quantile(values, (0, 0.5, 1), axis=0), VARIANTS[name])
        axes.set(title=title, xlabel="iteration", xscale="log", yscale="log")
        axes.yaxis.set_major_locator(ticker.LogLocator(numticks=8))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    figure.axes[0].set_ylabel(quantity)
    drawn = dict.fromkeys(name for curves in cases.values() for name in curves)
    legend_below(figure, [Line2D([], [], label=name, **VARIANTS[name]) for name in drawn])
    return figure


@styled
def plot_paths(paths: dict[str, np.ndarray], goal: Sequence[float], optimum: Sequence[float]) -> Figure:
    """Draw the path of Frank-Wolfe through the l1 ball of radius 1 in two dimensions.

    Args:
        paths: title of a panel, which begins with ``"exact gradient"``, ``"plain"`` or ``"averaged"`` -> points, shape
            (steps, 2).
        goal: a point outside of the ball.
        optimum: the point of the ball that is nearest to the goal.

    Returns:
        A figure with a panel for each path.
    """
    figure = Figure(figsize=(2.9 * len(paths), 3.1))
    for axes, title, points in panels(figure, paths):
        color = VARIANTS[next(name for name in VARIANTS if title.startswith(name))]["color"]
        axes.fill([1, 0, -1, 0], [0, 1, 0, -1], facecolor="0.94", edgecolor="0.6", linewidth=0.8)
        axes.plot(*np.asarray(points).T, color=color, linewidth=0.9, marker=".", markersize=3)
        axes.plot(*goal, "k+", markersize=9, label="goal")
        axes.plot(*optimum, "o", color="k", markerfacecolor="none", markersize=8, label="optimum")
        axes.set(title=title, aspect="equal", xlim=(-1.1, 1.35), ylim=(-1.1, 1.35))
        axes.set(xlabel="first parameter", ylabel="second parameter")
    legend_below(figure, *figure.axes[0].get_legend_handles_labels())
    return figure


@styled
def plot_reach(distances: Sequence[float], ends: dict[str, np.ndarray], reach: float) -> Figure:
    """Draw how far from the centre of the l2 ball of radius 1 Frank-Wolfe ends, over the distance of the goal.

    Args:
        distances: of the goal.
        ends: ``"plain"`` and ``"averaged"`` -> the distances of the ends, shape (seeds, goals).
        reach: where plain Frank-Wolfe is expected to end.

    Returns:
        A figure with one panel: the median over the seeds, with a line from the least to the most.
    """
    figure = Figure(figsize=(5.4, 3.1))
    axes = figure.subplots()
    x = np.asarray(distances)
    fine = np.geomspace(x.min(), x.max(), 200)
    axes.plot(fine, np.minimum(fine, 1), color="0.4", linestyle=":", linewidth=1, label="the optimum")
    axes.plot(fine, np.minimum(fine, reach), color="0.4", linewidth=1, label="theory for plain")
    for (name, seeds), marker in zip(ends.items(), ("D", "o"), strict=False):
        low, middle, high = np.quantile(seeds, (0, 0.5, 1), axis=0)
        spread = np.stack([middle - low, high - middle])
        axes.errorbar(x, middle, spread, fmt=marker, color=VARIANTS[name]["color"], markersize=4.5, label=name)
    axes.set(xlabel="distance of the goal from the centre, in radii", ylabel="distance of the end", xscale="log")
    axes.set(yscale="log", title="How far it gets")
    plain_decades(axes.xaxis)
    plain_decades(axes.yaxis)
    figure.legend(loc="outside right center")
    return figure


@styled
def plot_sparsity(
    curves: dict[str, dict[float | None, Sequence[tuple[float, float]]]], quantity: str, num_test: int
) -> Figure:
    """Draw accuracy along a sweep of radii, and against sparsity: lines through the means, and a dot for each seed.

    Args:
        curves: method -> radius, None for no constraint -> for each seed the fraction of the parameters that counts,
            and the test accuracy.
        quantity: what counts, for the axis.
        num_test: size of the test set.

    Returns:
        A figure with two panels, over the radius and over the fraction; a star in the second for no constraint.
    """
    figure = Figure(figsize=(8, 3.4))
    over_radius, over_share = figure.subplots(1, 2, sharey=True)
    for name, radii in curves.items():
        style, dots = METHOD_STYLES[name], {"s": 9, "alpha": 0.4, "linewidth": 0}
        swept = {radius: 100 * np.array(seeds) for radius, seeds in radii.items() if radius is not None}
        means = np.array([values.mean(0) for values in swept.values()])
        for radius, values in swept.items():
            over_radius.scatter([radius] * len(values), values[:, 1], color=style["color"], **dots)
            over_share.scatter(*values.T, color=style["color"], **dots)
        over_radius.plot(list(swept), means[:, 1], marker="o", markersize=5, label=name, **style)
        over_share.plot(*means.T, marker="o", markersize=5, **style)
        if None in radii:
            star = {"color": style["color"], "markersize": 11, "markeredgecolor": "white"}
            over_share.plot(*100 * np.mean(radii[None], axis=0), "*", **star)
    over_radius.plot([], [], "*", color="0.3", markersize=11, markeredgecolor="white", label="no constraint")
    over_radius.set(title="Test accuracy by radius", xlabel="radius of the ball", ylabel=f"correct of {num_test} [%]")
    over_share.set(title="Test accuracy by sparsity", xlabel=f"{quantity} [%]")
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.margins(x=0.05, y=0.1)
        plain_decades(axes.xaxis)
    legend_below(figure, *over_radius.get_legend_handles_labels())
    return figure
