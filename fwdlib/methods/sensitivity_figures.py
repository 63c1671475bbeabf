"""Figures of processes with few parameters: memory over the number of steps, and the map of who wins where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from fwdlib.plotting import METHOD_STYLES, legend_below, panels, styled

FORWARD = METHOD_STYLES["forward gradient"]["color"]
REVERSE = METHOD_STYLES["backprop"]["color"]
MAP = LinearSegmentedColormap.from_list("forward to reverse", [FORWARD, "white", REVERSE])
FULL_COLOUR = 4  # a ratio of times that gets the full colour
MARKS = "DosP^v"
MEGABYTE = 1e6


@styled
def plot_memory(processes: Mapping[str, Mapping[str, dict[str, Any]]]) -> Figure:
    """Draw the peak memory over the number of steps.

    Args:
        processes: title -> method -> ``steps`` and ``bytes``, two lists; ``stopped``, None or the number of steps at
            which the method was not run, ``reason`` and ``expected``, its bytes there.

    Returns:
        A figure with a panel for each process. Hollow marks are expected, not measured.
    """
    figure = Figure(figsize=(3.9 * len(processes), 3.4))
    names = list(dict.fromkeys(name for methods in processes.values() for name in methods))
    for axes, title, methods in panels(figure, processes):
        for name, found in methods.items():
            style, values = _style(names, name), np.array(found["bytes"]) / MEGABYTE
            axes.plot(found["steps"], values, **style)
            if found["stopped"]:
                end = [found["steps"][-1], found["stopped"]], [values[-1], found["expected"] / MEGABYTE]
                axes.plot(*end, **style | {"linestyle": ":", "marker": ""})
                axes.plot(end[0][1], end[1][1], **style | {"markerfacecolor": "white"})
        axes.set(title=title, xlabel="steps", xscale="log", yscale="log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    figure.axes[0].set_ylabel("peak memory above the start [MB]")
    handles = [Line2D([], [], label=name, **_style(names, name)) for name in names]
    legend_below(figure, handles, ncols=2)
    return figure


@styled
def plot_map(
    cells: Sequence[tuple[float, float, float | None]],
    borders: Mapping[str, Sequence[tuple[float, float]]],
) -> Figure:
    """Draw who takes less time, over the number of steps and of parameters, and the borders of time and memory.

    Args:
        cells: parameters, steps, and the time of forward mode over reverse mode's; None where it was not measured.
        borders: what it is the border of -> its points, steps and parameters.

    Returns:
        A figure with one panel: orange where forward mode is faster, blue where reverse mode is.
    """
    figure = Figure(figsize=(7.2, 4.3))
    axes = figure.subplots()
    parameters, steps = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    ratios = np.full((len(parameters), len(steps)), np.nan)
    for num, length, ratio in cells:
        if ratio is not None:
            ratios[parameters.index(num), steps.index(length)] = ratio
    edges = _edges(steps), _edges(parameters)
    axes.set_facecolor("0.88")
    shown = np.clip(np.log(ratios) / np.log(FULL_COLOUR), -1, 1)
    axes.pcolormesh(*edges, shown, cmap=MAP, vmin=-1, vmax=1, alpha=0.75, edgecolors="white", linewidth=1.5)
    for (row, column), ratio in np.ndenumerate(ratios):
        text = "not run" if np.isnan(ratio) else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
        outline = [withStroke(linewidth=2.5, foreground="white", alpha=0.7)]
        axes.text(steps[column], parameters[row], text, ha="center", va="center", fontsize=9, path_effects=outline)
    for (what, points), style in zip(borders.items(), ("-", "--", ":"), strict=False):
        axes.plot(*np.array(points).reshape(-1, 2).T, style, color="0.1", linewidth=2, label=what)
    axes.set(xscale="log", yscale="log", xlabel="steps T", ylabel="parameters P")
    axes.set(xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
    axes.set_xticks(steps, [f"{value:,}" for value in steps])
    axes.set_yticks(parameters, [f"{value:,}" for value in parameters])
    axes.minorticks_off()
    axes.grid(visible=False)
    sides = [
        Patch(color=FORWARD, alpha=0.75, label="forward mode is faster"),
        Patch(color=REVERSE, alpha=0.75, label="reverse mode is faster"),
    ]
    legend_below(figure, [*sides, *axes.get_legend_handles_labels()[0]], ncols=2)
    return figure


def _style(names: Sequence[str], name: str) -> dict[str, Any]:
    is_forward, number = name.startswith("forward"), names.index(name)
    lines = ["-", "-", "--", "-.", ":"]
    return {
        "color": FORWARD if is_forward else REVERSE,
        "linestyle": lines[number % len(lines)],
        "marker": MARKS[number % len(MARKS)],
        "markersize": 5,
    }


def _edges(values: Sequence[float]) -> np.ndarray:
    # Half way between neighbours, on a logarithmic axis.
    logs = np.log10(np.array(values, dtype=float))
    if len(logs) == 1:
        return 10 ** np.array([logs[0] - 0.5, logs[0] + 0.5])
    middle = (logs[1:] + logs[:-1]) / 2
    return 10 ** np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]])
