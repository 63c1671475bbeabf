"""The figures of the report: saved results in, SVG files out; the same results give the same bytes."""

from __future__ import annotations

import math
import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fwdlib import plotting
from fwdlib.results import iterations
from fwdlib.statistics import Interval, median_interval
from report.page.context import METHODS, PARTS, TASKS, Results, arrivals

PANEL = (3.0, 2.5)  # inches: three side by side on a page or a desktop, one on a phone
MARKERS = {
    "backprop": "o",
    "forward": "D",
}  # beside the colours of METHOD_STYLES, for prints in black and white


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure of the report into a folder.

    Args:
        results: as :func:`report.page.context.load` reads them.
        folder: must be there.

    Returns:
        The files: three for the summary, three for each model, and those of the sections whose studies were made.
    """
    groups = sorted(["summary", *TASKS, *PARTS], key="functions".__ne__)  # the animation first, it takes longest
    if sys.platform != "linux":  # elsewhere a process with threads is not to be forked
        return [path for name in groups for path in _draw_group(results, folder, name)]
    context = multiprocessing.get_context("fork")
    # One thread for torch: OpenMP does not survive a fork.
    options = {"mp_context": context, "initializer": torch.set_num_threads, "initargs": (1,)}
    with warnings.catch_warnings(), ProcessPoolExecutor(2, **options) as pool:
        # Python 3.12 and later warn of any fork with threads; those here are torch's, and idle.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        return [path for paths in pool.map(partial(_draw_group, results, folder), groups) for path in paths]


def _draw_group(results: Results, folder: Path, name: str) -> list[Path]:
    paths = []
    for stem, figure in _figures_of(results, name).items():
        if isinstance(figure, bytes):  # an animation, with the name of its file
            paths.append(folder / stem)
            paths[-1].write_bytes(figure)
            continue
        paths.append(folder / f"{stem}.svg")
        with matplotlib.style.context(plotting.STYLE):  # its hash salt and its fonts count when the file is written
            # what savefig() comes to, without its drawing of all that it then draws
            FigureCanvasSVG(figure).print_svg(paths[-1], metadata={"Date": None, "Creator": None})
    return paths


def _figures_of(results: Results, name: str) -> dict[str, Figure | bytes]:
    if name in PARTS:
        return PARTS[name].figures(results.parts[name])
    if name == "summary":
        figures = {f"summary-{quantity}": figure for quantity, figure in plot_summary(results).items()}
    else:
        pair = list(results.records[name].values())
        figures = {
            f"{name}-{quantity.replace(' ', '-')}": plotting.plot_quantity(pair, quantity)
            for quantity in plotting.QUANTITIES
        }
    for figure in figures.values():
        figure.set_size_inches(PANEL)
    return figures


def plot_summary(results: Results) -> dict[str, Figure]:
    """Draw iterations, time of an iteration and total time of both methods on all models: each seed, and the median.

    Args:
        results: as :func:`report.page.context.load` reads them.

    Returns:
        Three figures of one panel: ``iterations``, ``step`` and ``total``.
    """
    clocks = {
        task: {method: arrivals(timed["methods"][name]) for method, name in METHODS.items()}
        for task, timed in results.timings["tasks"].items()
    }
    panels = {
        "iterations": (
            "Iterations to the end",
            "optimizer steps, logarithmic",
            lambda t, m: iterations(results.records[t][m]),
        ),
        "step": ("Time of an iteration", "time, logarithmic", lambda t, m: clocks[t][m]["median_step"]),
        "total": ("Time of the whole training", "time, logarithmic", lambda t, m: clocks[t][m]["total"]),
    }
    records = [record for pair in results.records.values() for record in pair.values()]
    figures = {}
    for name, (title, unit, values) in panels.items():
        with matplotlib.style.context(plotting.STYLE):
            figures[name] = figure = Figure(figsize=PANEL)
            axes = figure.subplots()
            table = {(task, method): values(task, method) for task in TASKS for method in METHODS}
            ceiling = 2 * max((v for row in table.values() for v in row if math.isfinite(v)), default=1.0)
            for (task, method), row in table.items():
                place = list(TASKS).index(task) + (-0.17 if method == "backprop" else 0.17)
                _draw_row(axes, place, row, method, ceiling)
            axes.set(title=title, xlabel=unit, xscale="log", ylim=(len(TASKS) - 0.5, -0.5))
            axes.margins(x=0.06)
            axes.set_yticks(range(len(TASKS)), [task.short for task in TASKS.values()])
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_formatter(ticker.FuncFormatter(_plain if name == "iterations" else _seconds))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
            plotting.stamp_records(figure, records)
    return figures


def _draw_row(axes: Axes, place: float, row: Sequence[float], method: str, ceiling: float) -> None:
    """Draw each seed as a dot, one that never arrived as an arrow at the right, the median and its interval on top."""
    color = plotting.METHOD_STYLES[METHODS[method]]["color"]
    middle = Interval(*(min(end, ceiling) for end in median_interval(row)))  # min keeps a nan that comes first
    finite = [value for value in row if math.isfinite(value)]
    shift = np.linspace(-0.09, 0.09, len(row)) if len(row) > 1 else [0.0]  # apart, so that equal seeds can be seen
    axes.scatter(finite, place + np.asarray(shift[: len(finite)]), s=9, color=color, alpha=0.35, linewidth=0)
    never = len(row) - len(finite)
    if never:
        axes.scatter([ceiling] * never, place + np.asarray(shift[len(finite) :]), marker=">", s=26, color=color)
        axes.annotate(
            f"{never} never", (ceiling, place), xytext=(0, 6), textcoords="offset points", ha="right", fontsize=7
        )
    if not math.isnan(middle.low):
        axes.plot([middle.low, middle.high], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
    label = METHODS[method] if round(place) == 0 else None  # once for each method
    axes.plot(
        middle.estimate, place, MARKERS[method], color=color, markersize=6.5, markeredgecolor="white", label=label
    )


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _seconds(value: float, _: int) -> str:
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "\N{MICRO SIGN}s")):
        if value * scale >= 0.999:
            return f"{value * scale:g} {unit}"
    return f"{value:g} s"
