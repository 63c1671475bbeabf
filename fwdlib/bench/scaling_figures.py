"""Figures of steps that several processes share: measured over slow links, and predicted by the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib.bench.scaling import NUM_TANGENTS
from fwdlib.plotting import STYLE, plain_ticks, style_of
from fwdlib.statistics import median_interval

UNLIMITED = "as it is"


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
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.8 + 3.6 * len(counts), 3.5))
        panels = np.ravel(figure.subplots(1, len(counts), sharey=True))
        for axes, count in zip(panels, counts, strict=True):
            for number, name in enumerate(NUM_TANGENTS):
                for row in rows:
                    if row["count"] == count:
                        _dot(axes, positions[row["megabits"]] + 0.12 * (number - 1), row["methods"][name], name)
                where = [rate for rate in rates if (count, rate) in predicted]
                lines = [1e3 * predicted[count, rate][name] for rate in where]
                axes.plot([positions[rate] for rate in where], lines, **_look(name))
            labels = [f"{rate:g}" for rate in rates] + [UNLIMITED]
            axes.set(title=f"{count} processes", xlabel="link of each process [Mbit/s]", yscale="log")
            axes.set_xticks(list(positions.values()), labels)
            plain_ticks(axes)
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        panels[0].set_ylabel("time of a step [ms]")
        _legend(figure)
    return figure


def plot_processes(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the predicted time of a step over the number of processes.

    Args:
        rows: each with ``count``, ``gigabits`` and ``seconds``, method -> time of a step.

    Returns:
        A figure with a panel for each rate of the link.
    """
    rates = sorted({row["gigabits"] for row in rows})
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.8 + 3.6 * len(rates), 3.3))
        panels = np.ravel(figure.subplots(1, len(rates), sharey=True))
        for axes, rate in zip(panels, rates, strict=True):
            of_rate = [row for row in rows if row["gigabits"] == rate]
            for name in NUM_TANGENTS:
                counts = [row["count"] for row in of_rate]
                axes.plot(counts, [1e3 * row["seconds"][name] for row in of_rate], marker=_mark(name), **_look(name))
            axes.set(title=f"{rate:g} Gbit/s", xlabel="processes", xscale="log", yscale="log")
            plain_ticks(axes)
        panels[0].set_ylabel("time of a step, by the model [ms]")
        _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    handles = [Line2D([], [], marker=_mark(name), label=name, **_look(name)) for name in NUM_TANGENTS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _dot(axes: Axes, where: float, found: dict[str, Any], name: str) -> None:
    low, middle, high = (1e3 * value for value in median_interval(found["seconds"]))
    if np.isnan(low):  # too few rounds for an interval: draw the range
        low, high = 1e3 * min(found["seconds"]), 1e3 * max(found["seconds"])
    bars = [[middle - low], [high - middle]]
    axes.errorbar([where], [middle], bars, color=_look(name)["color"], marker=_mark(name), linestyle="")


def _look(name: str) -> dict[str, Any]:
    return style_of("rank-one" if NUM_TANGENTS[name] else "backprop")


def _mark(name: str) -> str:
    return {0: "o", 1: "D"}.get(NUM_TANGENTS[name], "s")
