"""Figures of steps that several processes share: measured over slow links, and predicted by the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib.bench.scaling import NUM_TANGENTS
from fwdlib.plotting import CURVES, LINES, legend_below, panels, plain_ticks, style_of, styled
from fwdlib.statistics import median_interval

UNLIMITED = "as it is"


@styled
def plot_links(rows: Sequence[dict[str, Any]], predicted: dict[tuple[int, float], dict[str, float]]) -> Figure:
    """Draw the time of a step over the rate of the link: dots as measured, lines by the model.

    Args:
        rows: as :func:`fwdlib.bench.sharing.measure_step` returns them, for several counts and rates; rows without a
            rate are drawn at the right.
        predicted: (count, rate) -> method -> seconds.

    Returns:
        A figure with a panel for each count of processes above one.
    """
    counts = sorted({row["count"] for row in rows if row["count"] > 1})
    rates = sorted({row["megabits"] for row in rows if row["megabits"]})
    positions: dict[float | None, float] = {rate: float(i) for i, rate in enumerate(rates)} | {None: float(len(rates))}
    figure = Figure(figsize=(0.8 + 3.6 * len(counts), 3.5))
    for axes, title, count in panels(figure, {f"{count} processes": count for count in counts}, sharey=True):
        for number, name in enumerate(NUM_TANGENTS):
            for row in rows:
                if row["count"] == count:
                    _dot(axes, positions[row["megabits"]] + 0.12 * (number - 1), row["methods"][name], name)
            where = [rate for rate in rates if (count, rate) in predicted]
            lines = [1e3 * predicted[count, rate][name] for rate in where]
            axes.plot([positions[rate] for rate in where], lines, **_look(name))
        axes.set(title=title, xlabel="link of each process [Mbit/s]", yscale="log")
        axes.set_xticks(list(positions.values()), [f"{rate:g}" for rate in rates] + [UNLIMITED])
        plain_ticks(axes)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    figure.axes[0].set_ylabel("time of a step [ms]")
    legend_below(figure, [_handle(name) for name in NUM_TANGENTS])
    return figure


@styled
def plot_processes(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the predicted time of a step over the number of processes.

    Args:
        rows: each with ``count``, ``gigabits`` and ``seconds``, method -> time of a step.

    Returns:
        A figure with a panel for each rate of the link.
    """
    rates = sorted({row["gigabits"] for row in rows})
    figure = Figure(figsize=(0.8 + 3.6 * len(rates), 3.3))
    for axes, title, rate in panels(figure, {f"{rate:g} Gbit/s": rate for rate in rates}, sharey=True):
        of_rate = [row for row in rows if row["gigabits"] == rate]
        for name in NUM_TANGENTS:
            counts = [row["count"] for row in of_rate]
            axes.plot(counts, [1e3 * row["seconds"][name] for row in of_rate], marker=_mark(name), **_look(name))
        axes.set(title=title, xlabel="processes", xscale="log", yscale="log")
        plain_ticks(axes)
    figure.axes[0].set_ylabel("time of a step, by the model [ms]")
    legend_below(figure, [_handle(name) for name in NUM_TANGENTS])
    return figure


@styled
def plot_traffic(curves: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draw the test loss over the bytes that a process has sent.

    Args:
        curves: method, see :mod:`fwdlib.bench.shared_steps`, -> ``bytes`` (evaluations,) and ``quartiles`` of the loss
            (3, evaluations). Evaluations before the first byte are left out; a method that sends none is a line
            at its last loss.
    """
    figure = Figure(figsize=(7.5, 3.8))
    axes = figure.subplots()
    kinds = ("DDP", "PowerSGD", "local SGD", "rank-one")
    styles = [style_of("backprop"), {"color": CURVES[1]}, {"color": CURVES[3]}, style_of("rank-one")]
    seen = dict.fromkeys(kinds, 0)
    for method, curve in curves.items():
        if not curve["bytes"].any():
            axes.axhline(curve["quartiles"][1, -1], color="0.3", linestyle=LINES[3], label=method)
            continue
        kind = next(kind for kind in kinds if method.startswith(kind))
        style = styles[kinds.index(kind)] | {"linestyle": LINES[seen[kind] % len(LINES)]}
        seen[kind] += 1
        sent = curve["bytes"] > 0
        low, middle, high = curve["quartiles"][:, sent]
        axes.plot(curve["bytes"][sent] / 1e6, middle, label=method, **style)
        axes.fill_between(curve["bytes"][sent] / 1e6, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="sent by a process [MB]", ylabel="test loss [nats]", xscale="log", yscale="log")
    plain_ticks(axes)
    legend_below(figure, axes.get_legend_handles_labels()[0])
    return figure


def _dot(axes: Axes, where: float, found: dict[str, Any], name: str) -> None:
    low, middle, high = (1e3 * value for value in median_interval(found["seconds"]))
    if np.isnan(low):  # too few rounds for an interval: draw the range
        low, high = 1e3 * min(found["seconds"]), 1e3 * max(found["seconds"])
    bars = [[middle - low], [high - middle]]
    axes.errorbar([where], [middle], bars, color=_look(name)["color"], marker=_mark(name), linestyle="")


def _handle(name: str) -> Line2D:
    return Line2D([], [], marker=_mark(name), label=name, **_look(name))


def _look(name: str) -> dict[str, Any]:
    return style_of("rank-one" if NUM_TANGENTS[name] else "backprop")


def _mark(name: str) -> str:
    return {0: "o", 1: "D"}.get(NUM_TANGENTS[name], "s")
