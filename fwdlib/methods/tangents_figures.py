"""Figures of several tangents in a step: the mean of the forward gradients against the projection of the gradient.

The names of methods may carry their number of tangents behind a comma: ``"projection, K = 4"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib.plotting import dots_of, draw_band, handles_of, legend_below, panels, plain_ticks, style_of, styled

GREY = {"color": "0.4", "linewidth": 1.1, "markersize": 3.5}


@styled
def plot_closed_forms(
    quantities: dict[str, dict[str, tuple[Sequence[float], Callable[[float], float]]]],
    counts: Sequence[int],
    ylabel: str,
) -> Figure:
    """Draw what was measured over the number of tangents, beside its closed form.

    Args:
        quantities: title -> method -> the measured value for each count, and the same as a function of the count. A
            method in another form (``"projection, rescaled"``) gets hollow dots.
        counts: numbers of tangents.
        ylabel: what was measured.

    Returns:
        A figure with a panel for each title, both axes logarithmic, and one legend.
    """
    where, drawn = np.geomspace(counts[0], counts[-1], 200), {}
    figure = Figure(figsize=(0.6 + 2.9 * len(quantities), 3.4))
    for axes, title, methods in panels(figure, quantities):
        for name, (measured, theory) in methods.items():
            color = style_of(name)["color"]
            values = np.array([theory(k) for k in where])
            axes.plot(where, np.where(values > 0, values, np.nan), color=color, linewidth=1, alpha=0.7)
            shown = [value if value > 1e-12 else np.nan for value in measured]  # zero up to rounding has no logarithm
            (drawn[name],) = axes.plot(counts, shown, "o", markersize=5, color=color, **dots_of(name))
        axes.set(title=title, xlabel="tangents K", xscale="log", yscale="log")
        axes.set_xticks(counts, [f"{k}" for k in counts])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        plain_ticks(axes)
    figure.axes[0].set_ylabel(ylabel)
    legend_below(figure, [*drawn.values(), Line2D([], [], color="0.4", linewidth=1)], [*drawn, "closed form"])
    return figure


@styled
def plot_values(functions: dict[str, dict[str, np.ndarray]], ylabel: str, floor: float = 0.0) -> Figure:
    """Draw the values of descents over the iterations: the median over the seeds, and a band over all of them.

    Args:
        functions: title -> method -> values at each step, shape (seeds, steps + 1), infinite once a descent has
            diverged.
        ylabel: what the values are.
        floor: values at or below it are not drawn.

    Returns:
        A figure with a panel for each title and one legend; the values on a logarithmic axis.
    """
    methods, forms = _methods_and_forms(functions)
    looks = dict(zip(forms, ("-", "--", ":", "-."), strict=False))
    figure = Figure(figsize=(max(5.5, 0.6 + 2.9 * len(functions)), 3.5))
    for axes, title, curves in panels(figure, functions):
        top = 100 * max(values[:, 0].max() for values in curves.values())
        for name, values in curves.items():
            band = np.quantile(values, (0, 0.5, 1), axis=0, method="inverted_cdf")
            band = np.where((band < top) & (band > floor), band, np.nan)
            style = {"color": style_of(name)["color"], "linestyle": looks[_form(name)]}
            draw_band(axes, np.arange(band.shape[1]), band, style)
        axes.set(title=title, xlabel="iteration", yscale="log")
    figure.axes[0].set_ylabel(ylabel)
    grey = [Line2D([], [], color="0.4", linestyle=looks[form], label=form) for form in forms if form]
    legend_below(figure, [*handles_of(methods), *grey])
    return figure


@styled
def plot_dimensions(
    functions: dict[str, dict[str, dict[int, Sequence[float]]]], ylabel: str, floor: float = 1e-16
) -> Figure:
    """Draw the last values of descents over the number of dimensions: the median over the seeds, and their range.

    Args:
        functions: title -> method -> number of dimensions -> the last value of each seed, infinite if it diverged.
        ylabel: what the values are.
        floor: smaller values are drawn here.

    Returns:
        A figure with a panel for each title, both axes logarithmic, and one legend. The range is a vertical line. Seeds
        that diverged are left out.
    """
    methods, forms = _methods_and_forms(functions)
    looks = dict(zip(filter(None, forms), ((":", "v"), ("-.", "s"), ("--", "D"), ("-", "^")), strict=False))
    figure = Figure(figsize=(0.6 + 2.9 * len(functions), 4))
    for axes, title, curves in panels(figure, functions):
        for name, ends in curves.items():
            color, (linestyle, marker) = style_of(name)["color"], looks.get(_form(name), ("-", "o"))
            sizes = sorted(ends)
            values = np.maximum(np.array([np.sort(ends[n]) for n in sizes], dtype=float), floor)
            middle = np.where(np.isfinite(values), values, np.nan)[:, values.shape[1] // 2]
            axes.plot(sizes, middle, linestyle, marker=marker, **GREY | {"color": color})
            axes.vlines(sizes, values[:, 0], values.max(1, where=np.isfinite(values), initial=floor), color=color)
        axes.set(title=title, xlabel="dimensions n", xscale="log", yscale="log")
        every = sorted({n for ends in curves.values() for n in ends})
        shown = every[:: max(1, len(every) // 4)]
        axes.set_xticks(shown, [str(n) for n in shown])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    figure.axes[0].set_ylabel(ylabel)
    grey = [Line2D([], [], linestyle=line, marker=marker, label=form, **GREY) for form, (line, marker) in looks.items()]
    legend_below(figure, [*handles_of(methods), *grey])
    return figure


def _methods_and_forms(functions: dict[str, dict[str, object]]) -> tuple[list[str], list[str]]:
    # Each once, in order; the form of a method that stands alone is "".
    names = [name.partition(", ") for methods in functions.values() for name in methods]
    return list(dict.fromkeys(name[0] for name in names)), list(dict.fromkeys(name[2] for name in names))


def _form(name: str) -> str:
    return name.partition(", ")[2]
