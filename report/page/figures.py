"""The figures of the report, from saved results to SVG files. The same results give the same bytes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fwdlib import plotting
from fwdlib.results import iterations
from fwdlib.statistics import Interval, median_interval
from report.page.context import METHODS, PARTS, TASKS, Results, durations
from report.page.svg import write_svg

PANEL = (3.0, 2.5)  # inches: three side by side on a page or a desktop, one on a phone
MARKERS = {"backprop": "o", "forward": "D"}  # beside the colours of METHOD_STYLES, for prints in black and white


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure of the report into a folder, two at a time.

    Returns:
        The files: three for the summary, three for each model, and those of the sections whose studies were made.

    Raises:
        ChildProcessError: if a process that draws is killed.
    """
    groups = sorted(["summary", *TASKS, *PARTS], key="functions".__ne__)  # the animation first: it takes longest
    method = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(2, method, initializer=_end_with_parent) as pool:
            drawn = pool.map(_draw_group, groups, (_needed(results, name) for name in groups), [folder] * len(groups))
            return [path for paths in drawn for path in paths]
    except BrokenProcessPool as error:
        raise ChildProcessError("a process that draws figures was killed, perhaps for its memory; try again") from error


def _end_with_parent() -> None:
    """End this process silently at Ctrl-C, and when its parent is gone, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _needed(results: Results, name: str) -> Results:
    """Return the part of the results that one group of figures is drawn from."""
    if name in PARTS:
        return results._replace(records={}, timings={}, parts={name: results.parts[name]})
    return results._replace(parts={})


def _draw_group(name: str, results: Results, folder: Path) -> list[Path]:
    paths = []
    for stem, figure in _figures_of(results, name).items():
        if isinstance(figure, bytes):  # an animation, under its file's name
            paths.append(folder / stem)
            paths[-1].write_bytes(figure)
            continue
        paths.append(folder / f"{stem}.svg")
        write_svg(figure, paths[-1])
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

    Returns:
        Three figures of one panel: ``iterations``, ``step`` and ``total``.
    """
    clocks = {
        task: {method: durations(timed["methods"][name]) for method, name in METHODS.items()}
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
    """Draw a dot for each seed, or an arrow at the right if it never finished; on top, the median and its interval."""
    color = plotting.METHOD_STYLES[METHODS[method]]["color"]
    middle = Interval(*(min(end, ceiling) for end in median_interval(row)))  # min() keeps a nan that comes first
    finite = [value for value in row if math.isfinite(value)]
    shift = np.linspace(-0.09, 0.09, len(row)) if len(row) > 1 else [0.0]  # so that equal values stay visible
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
