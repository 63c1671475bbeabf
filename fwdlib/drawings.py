"""Drawings of the ideas: the two passes, the forward gradient as an arrow, a dual number. They show no measurement."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fwdlib.plotting import METHOD_STYLES, panels, styled

VALUE, TANGENT, ERROR = "0.25", METHOD_STYLES["forward gradient"]["color"], METHOD_STYLES["backprop"]["color"]
LAYERS = ("inputs", "layer 1", "layer 2", "loss")


@styled
def plot_passes() -> Figure:
    """Draw both methods on a chain of layers: backprop keeps values and goes back, a forward gradient does not.

    Returns:
        A figure with two panels.
    """
    figure = Figure(figsize=(8.2, 2.2))
    titles = {"Backprop: forward, then back": True, "Forward gradient: one pass": False}
    for axes, title, is_backprop in panels(figure, titles):
        places = draw_layers(axes, LAYERS)
        for left, right in itertools.pairwise(places):
            draw_arrow(axes, (left, 0.12), (right, 0.12), VALUE)
            if is_backprop:
                draw_arrow(axes, (right, -0.12), (left, -0.12), ERROR)
            else:
                draw_arrow(axes, (left, -0.12), (right, -0.12), TANGENT)
        if is_backprop:
            for place in places[1:-1]:
                axes.text(place, 0.34, "kept in\nmemory", ha="center", va="bottom", fontsize=8, color=VALUE)
        axes.text(1.5, -0.42, _caption(is_backprop), ha="center", va="top", fontsize=8.5)
        axes.set(title=title, ylim=(-0.95, 0.8))
    return figure


def _caption(is_backprop: bool) -> str:
    if is_backprop:
        return "black: values\nblue, on the way back: the gradient of the loss"
    return "black: values; orange, beside them: how fast they change\nalong the tangent. No way back, nothing is kept."


@styled
def plot_arrow(gradient: Sequence[float], tangent: Sequence[float], others: Sequence[Sequence[float]] = ()) -> Figure:
    """Draw the forward gradient as an arrow, the tangent times its product with the gradient; and the mean of many.

    Args:
        gradient: of two parameters.
        tangent: v, of the first panel.
        others: tangents of the second panel.

    Returns:
        A figure with two panels, the second only if there are other tangents.
    """
    gradient, tangent = np.asarray(gradient, dtype=float), np.asarray(tangent, dtype=float)
    figure = Figure(figsize=(8.2, 3.6) if len(others) else (4.2, 3.6))
    arrows = {"gradient $\\nabla L$": (gradient, ERROR), "tangent $v$": (tangent, VALUE)}
    estimate = (gradient @ tangent) * tangent
    first, *rest = np.atleast_1d(figure.subplots(1, 1 + bool(len(others))))
    first.plot(*_line(tangent, 4 * np.abs(gradient).max()), color="0.8", linewidth=0.8, zorder=1)
    for name, (vector, color) in arrows.items():
        _vector(first, vector, color, name)
    foot = estimate / (tangent @ tangent)  # the nearest point of the tangent's line
    first.plot(*zip(gradient, foot, strict=True), color=ERROR, linewidth=0.8, linestyle=":", zorder=1)
    _vector(first, estimate, TANGENT, f"$g = ({gradient @ tangent:.2f})\\,v$".replace("-", "\N{MINUS SIGN}"))
    first.set(title="$g$ lies on the line of its tangent")
    for axes in rest:
        estimates = (np.asarray(others) @ gradient)[:, None] * np.asarray(others)
        for one in estimates:
            axes.plot(
                [0, one[0]], [0, one[1]], color=TANGENT, alpha=0.25, linewidth=1, zorder=1
            )  # cut off at the frame
        _vector(axes, gradient, ERROR, "gradient $\\nabla L$")
        _vector(axes, estimates.mean(0), TANGENT, f"mean of {len(estimates)}")
        axes.set(title="The noise cancels in the mean")
    reach = 1.25 * max(np.abs(gradient).max(), np.abs(tangent).max(), np.abs(estimate).max())
    for axes in (first, *rest):
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="first parameter", ylabel="second parameter")
        axes.set_aspect("equal")
        axes.legend(loc="lower left", fontsize=8)
    return figure


@styled
def plot_dual(function: Callable[[float], tuple[float, float]], at: float, tangent: float, name: str) -> Figure:
    """Draw a dual number and its image: a point with an arrow on the axis, and both as a function maps them.

    Args:
        function: from a number to its value and its derivative.
        at: the value of the dual number.
        tangent: its other part, how fast the value changes.
        name: of the function, for the title.

    Returns:
        A figure with one panel.
    """
    figure = Figure(figsize=(5.2, 3.4))
    axes = figure.subplots()
    where = np.linspace(at - 2.2 * abs(tangent), at + 2.2 * abs(tangent), 200)
    axes.plot(where, [function(x)[0] for x in where], color="0.6", label=name)
    value, slope = function(at)
    low = min(function(x)[0] for x in where)
    axes.plot([at, at], [low, value], color="0.8", linewidth=0.8)
    _vector(axes, (tangent, 0), VALUE, f"in: ({at:g}, {tangent:g})", start=(at, low))
    _vector(axes, (tangent, slope * tangent), TANGENT, f"out: ({value:.3g}, {slope * tangent:.3g})", start=(at, value))
    axes.set(title="A dual number: a value, and how fast it changes", xlabel="x", ylabel=name)
    axes.legend(fontsize=8)
    return figure


# Shared with the drawings beside the methods.


def draw_layers(axes: Axes, names: Sequence[str]) -> list[float]:
    """Draw a row of named boxes without an axis; return where their centres are."""
    places = [float(i) for i in range(len(names))]
    for place, name in zip(places, names, strict=True):
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.5"}
        axes.text(place, 0, name.replace(" ", "\n"), ha="center", va="center", fontsize=8.5, bbox=box, zorder=4)
    axes.set(xlim=(-0.5, len(names) - 0.5))
    axes.set_axis_off()
    return places


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0) -> None:
    """Draw an arrow between two boxes of :func:`draw_layers`; ``bend`` makes it an arc."""
    shape = {"arrowstyle": "->", "color": color, "linewidth": 1.6, "shrinkA": 24, "shrinkB": 24}
    axes.annotate("", end, start, arrowprops=shape | {"connectionstyle": f"arc3,rad={bend}"}, zorder=2)


def _vector(axes: Axes, vector: Sequence[float], color: str, label: str, start: Sequence[float] = (0, 0)) -> None:
    end = np.add(start, vector)
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2}, zorder=3)
    axes.plot(*end, color=color, linewidth=2, label=label)  # for the legend, and so that the axes hold the end


def _line(direction: np.ndarray, reach: float) -> tuple[list[float], list[float]]:
    unit = direction / np.linalg.norm(direction)
    return [-reach * unit[0], reach * unit[0]], [-reach * unit[1], reach * unit[1]]
