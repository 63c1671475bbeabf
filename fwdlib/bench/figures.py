"""Figures of what training steps cost: the benchmark's records and other durations in, a matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib.history import Run
from fwdlib.methods.history_figures import steps_of
from fwdlib.plotting import (
    METHOD_STYLES,
    draw_band,
    legend_below,
    panels,
    plain_decades,
    plain_ticks,
    style_of,
    styled,
    write_stamp,
)
from fwdlib.statistics import Interval, paired_ratio

VARIED = ("width", "batch")  # of an MLP, beside its depth
COST_MARKS = {"": ("o", 0.0), "channels_last": ("s", -0.22), "one graph": ("D", 0.22)}  # marker, and place in the row


@styled
def plot_cost(bench: dict[str, Any]) -> Figure:
    """Draw what a training step costs by each method, in units of the fastest backprop, one panel for each model.

    Hollow marks are eager, filled ones compiled. A line through a mark is the 95 % interval of the median ratio, taken
    round by round. Left of the line at 1 is faster than backprop.

    Args:
        bench: as :func:`fwdlib.bench.benchmark.run` returns it, or read from its JSON file.

    Returns:
        A figure with a panel for each model, three in a row, all with the same logarithmic axis.
    """
    entries = list(bench["models"].values())
    names = [name for entry in entries for name in entry["seconds"] if name != "forward"]
    labels = list(dict.fromkeys(_parts(name)[0] for name in names))
    labels = [label for label in labels if " with " not in label]
    labels.sort(key=lambda label: list(METHOD_STYLES).index(label.split(" K=")[0]))
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(1.5 + 2.6 * columns, 0.85 + rows * (0.65 + 0.17 * len(labels))))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(entries) :]:
        axes.set_visible(False)
    for axes, entry in zip(panels.flat, entries, strict=False):
        _draw_ratios(axes, labels, entry)
    _plain_ratios(panels[0, 0])
    for axes in panels.flat[max(len(entries) - columns, 0) : len(entries)]:
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_xlabel("ratio to the fastest backprop")
    grey = {"color": "0.3", "linestyle": "", "markersize": 5.5}
    handles = [Line2D([], [], marker="o", markerfacecolor="white", label="eager", **grey)]
    handles += [Line2D([], [], marker="o", label="compiled", **grey)]
    forms = dict.fromkeys(_parts(name)[1] for name in names if " with " not in name)
    handles += [Line2D([], [], marker=COST_MARKS[form][0], label=form, **grey) for form in forms if form]
    title = f"time of a training step on {bench['environment']['device']}"
    legend_below(figure, handles, title=title, title_fontsize=9)
    _stamp_quick(figure, bench)
    return figure


@styled
def plot_front(bench: dict[str, Any]) -> Figure:
    """Draw time against peak memory of an eager step, one dot for each method, one panel for each model.

    The grey steps are the Pareto front: below and left of them there is no method. A dot with a black edge is on it.

    Args:
        bench: as :func:`fwdlib.bench.benchmark.run` returns it, or read from its JSON file.

    Returns:
        A figure with a panel for each model with memories, three in a row, both axes logarithmic.

    Raises:
        ValueError: if no memory was measured.
    """
    entries = [entry for entry in bench["models"].values() if entry.get("memory")]
    if not entries:
        raise ValueError("bench has no memories: measure again without --no-memory and without --quick")
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(1 + 2.8 * columns, 0.9 + 2.1 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    drawn: dict[str, Any] = {}
    for axes, entry in zip(panels.flat, entries, strict=False):
        drawn |= _draw_front(axes, entry)
    for axes in panels.flat[len(entries) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("memory [MB]")
    for axes in panels.flat[max(len(entries) - columns, 0) : len(entries)]:
        axes.set_xlabel("time over the fastest backprop's")
    legend_below(figure, [drawn[method] for method in METHOD_STYLES if method in drawn])
    _stamp_quick(figure, bench)
    return figure


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points on the Pareto front, by time: of each no other is both as fast and as small.

    Args:
        points: name -> time, memory.
    """
    found: list[str] = []
    for name in sorted(points, key=points.__getitem__):
        if not found or points[name][1] < points[found[-1]][1]:
            found.append(name)
    return found


def time_and_memory(entry: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return for each method with a memory the eager time over the fastest backprop's, and the bytes.

    Args:
        entry: of a model, as :func:`fwdlib.bench.measuring.measure_time` returns it, with ``memory``.
    """
    seconds = entry["seconds"]
    return {
        method: (paired_ratio(seconds[f"{method}, eager"], seconds[entry["reference"]]).estimate, held)
        for method, held in entry["memory"].items()
        if f"{method}, eager" in seconds
    }


def _draw_front(axes: Axes, entry: dict[str, Any]) -> dict[str, Any]:
    # below 0.1 MB is what the system rounds to, and a logarithm has no zero
    points = {name: (t, max(held / 1e6, 0.1)) for name, (t, held) in time_and_memory(entry).items()}
    best = front(points)
    steps = np.array([points[name] for name in best])
    axes.step(*steps.T, where="post", color="0.7", linewidth=1, zorder=1)
    drawn = {}
    for name, (t, held) in points.items():
        edge = "black" if name in best else "white"
        style = {"color": METHOD_STYLES[name]["color"], "markeredgecolor": edge, "markersize": 7, "linestyle": ""}
        (drawn[name],) = axes.plot(t, held, marker="o", label=name, **style)
    axes.set_title(f"{entry['title']}\nbatch {entry['batch']}", fontsize=9, parse_math=False)
    axes.set(xscale="log", yscale="log")
    axes.margins(0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    return drawn


@styled
def plot_depth(bench: dict[str, Any], published: dict[str, Sequence[float]] | None = None) -> Figure:
    """Draw time and peak memory of a training step over the number of layers: figure 6 of Baydin et al. 2022.

    Args:
        bench: as :func:`fwdlib.bench.benchmark.run` returns it, or read from its JSON file.
        published: ``layers``, ``R_f`` and ``R_b`` of the paper, drawn as thin grey lines.

    Returns:
        A figure with two panels: the time of a step in plain evaluations of the loss, median with its 95 % interval,
        and the memory above model and batch.

    Raises:
        ValueError: if the depth was not measured.
    """
    if not bench["depth"]:
        raise ValueError("bench has no depth sweep: measure again without --no-sweeps")
    entries = {int(layers): entry for layers, entry in bench["depth"].items()}
    figure = Figure(figsize=(9, 3.4))
    time, memory = figure.subplots(1, 2)
    tops = [*_draw_published(time, published or {}), *_draw_times(time, entries)]
    _draw_memory(memory, entries)
    batch = next(iter(entries.values()))["batch"]
    what = f"layers of width {bench['settings']['width']}, batch {batch}"
    time.set(title="Time of a training step", xlabel=what, ylabel="plain evaluations of the loss")
    time.set_ylim(0, 1.2 * max(tops, default=0.0))  # the band of a disturbed measurement may leave the panel
    memory.set(title="Peak memory of a step above the model's", xlabel=what, ylabel="memory [MB]", yscale="log")
    memory.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    for axes in (time, memory):
        axes.margins(x=0.03)
    legend_below(figure, *time.get_legend_handles_labels())
    _stamp_quick(figure, bench)
    return figure


@styled
def plot_sweeps(bench: dict[str, Any]) -> Figure:
    """Draw time and peak memory of a training step of an MLP over its width and over the batch.

    Args:
        bench: as :func:`fwdlib.bench.benchmark.run` returns it, or read from its JSON file.

    Returns:
        A figure with two rows, width and batch. On the left the time of a step over that of the fastest backprop of the
        same MLP, median with its 95 % interval, hollow where eager; on the right the memory above model and batch.

    Raises:
        ValueError: if neither was measured.
    """
    swept = {sweep: bench[sweep] for sweep in VARIED if bench.get(sweep)}
    if not swept:
        raise ValueError("bench has no sweep of width or batch: measure again without --no-sweeps")
    mlp = bench["settings"]["mlp"]
    whats = {
        "width": f"width of {mlp['layers']} layers, batch {{}}",
        "batch": f"batch, {mlp['layers']} layers of width {mlp['width']}",
    }
    figure = Figure(figsize=(9, 0.4 + 2.8 * len(swept)))
    for (time, memory), (sweep, of) in zip(figure.subplots(len(swept), 2, squeeze=False), swept.items(), strict=True):
        entries = {int(value): entry for value, entry in of.items()}
        _draw_over_fastest(time, entries)
        _draw_memory(memory, entries)
        what = whats[sweep].format(next(iter(entries.values()))["batch"])
        time.set(xlabel=what, ylabel="time, over the fastest backprop's", yscale="log")
        memory.set(xlabel=what, ylabel="memory [MB]", yscale="log")
        for axes in (time, memory):
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(entries), map(str, entries))
            plain_ticks(axes)
    first = figure.axes[:2]
    first[0].set_title("Time of a training step (dots filled: compiled)")
    first[1].set_title("Peak memory of a step above the model's")
    shown = dict(zip(*reversed(first[0].get_legend_handles_labels()), strict=True))
    legend_below(figure, list(shown.values()), list(shown))
    _stamp_quick(figure, bench)
    return figure


@styled
def plot_durations(seconds: dict[str, Sequence[float]]) -> Figure:
    """Draw how long several things take: the median as a dot, the middle half as a line.

    Args:
        seconds: name -> durations, as :func:`fwdlib.bench.measuring.interleave` returns them.

    Returns:
        A figure with one panel, a row for each name in their order, on a logarithmic axis.
    """
    figure = Figure(figsize=(7, 0.6 + 0.34 * len(seconds)))
    axes = figure.subplots()
    for row, (name, values) in enumerate(seconds.items()):
        low, middle, high = 1e3 * np.quantile(values, (0.25, 0.5, 0.75))
        color = style_of(name)["color"]
        axes.plot([low, high], [row, row], color=color, linewidth=4, alpha=0.4)
        axes.plot(middle, row, "o", color=color)
        axes.annotate(f"{middle:.3g} ms", (middle, row), (8, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="time [ms]: median, and the middle half", xscale="log", ylim=(len(seconds) - 0.4, -0.6))
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.margins(x=0.15)
    low, high = axes.get_xlim()
    plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain if high / low < 5 else ticker.NullFormatter())
    return figure


@styled
def plot_over_time(curves: dict[str, tuple[float, Run]]) -> Figure:
    """Draw training losses over the seconds that the steps took.

    Args:
        curves: method -> the seconds that a step takes, and the run.

    Returns:
        A figure with one panel, both axes logarithmic. The value before the first step is not drawn.
    """
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    for name, (seconds, run) in curves.items():
        axes.plot(seconds * steps_of(run), run.train_loss[1:], label=name, **style_of(name))
    axes.set(xlabel="time spent in steps [s]", ylabel="training loss [nats]", xscale="log", yscale="log")
    plain_ticks(axes)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend()
    return figure


@styled
def plot_budget(networks: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draw the test losses over the processor time that the steps took.

    Args:
        networks: network -> method -> shape (4, evaluations): seconds, and lower quartile, median and upper quartile of
            the test loss over the seeds.

    Returns:
        A figure with a panel for each network.
    """
    figure = Figure(figsize=(8, 3.6))
    for axes, title, curves in panels(figure, networks, squeeze=False):
        for method, (seconds, *band) in curves.items():
            draw_band(axes, seconds, band, style_of(method), label=method)
        axes.set(title=title, xlabel="processor time of the steps [s]", ylabel="test loss [nats]", yscale="log")
        plain_ticks(axes)
    legend_below(figure, figure.axes[0].get_legend_handles_labels()[0])
    return figure


def _parts(name: str) -> tuple[str, str, bool]:
    # "rank-one channels_last, compiled" -> row, form, whether compiled
    label, _, mode = name.rpartition(", ")
    form = next((form for form in COST_MARKS if form and label.endswith(form)), "")
    return label.removesuffix(form).strip(), form, mode == "compiled"


def _draw_ratios(axes: Axes, labels: Sequence[str], entry: dict[str, Any]) -> None:
    axes.axvline(1, color="0.2", linewidth=1)
    for name, seconds in entry["seconds"].items():
        if name != "forward" and " with " not in name:
            _draw_ratio(axes, labels, name, paired_ratio(seconds, entry["seconds"][entry["reference"]]))
    axes.set_title(f"{entry['title']}\nbatch {entry['batch']}", fontsize=9, parse_math=False)
    axes.set(xscale="log", ylim=(len(labels) - 0.5, -0.5))
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    plain_decades(axes.xaxis)


def _draw_ratio(axes: Axes, labels: Sequence[str], name: str, ratio: Interval) -> None:
    label, form, compiled = _parts(name)
    color = METHOD_STYLES[label.split(" K=")[0]]["color"]
    marker, shift = COST_MARKS[form]
    place = labels.index(label) + shift
    if ratio.low == ratio.low:  # not nan: there were enough rounds for an interval
        axes.plot([ratio.low, ratio.high], [place, place], color=color, linewidth=1.4, solid_capstyle="butt")
    face = color if compiled else "white"
    axes.plot(ratio.estimate, place, marker, color=color, markersize=5.5, markerfacecolor=face, zorder=3)


def _plain_ratios(axes: Axes) -> None:
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))


def _draw_published(axes: Axes, published: dict[str, Sequence[float]]) -> list[float]:
    # Returns the largest value of each line.
    lines = (("R_f", "--", -9), ("R_b", "-", 5)) if published else ()
    for name, linestyle, shift in lines:
        x, y = published["layers"], published[name]
        axes.plot(x, y, color="0.55", linewidth=0.9, linestyle=linestyle)
        place = {"xytext": (0, shift), "textcoords": "offset points", "ha": "right", "va": "center"}
        axes.annotate(f"paper's ${name}$", (x[-1], y[-1]), fontsize=8, color="0.4", **place)
    return [max(published[name]) for name, *_ in lines]


def _draw_times(axes: Axes, entries: dict[int, dict[str, Any]]) -> list[float]:
    # Returns the largest value of each line.
    tops = []
    for method, style in METHOD_STYLES.items():
        timed = {n: e["seconds"] for n, e in entries.items() if f"{method}, eager" in e["seconds"]}
        if timed:
            ratios = [paired_ratio(seconds[f"{method}, eager"], seconds["forward"]) for seconds in timed.values()]
            letters = {"backprop": ", $R_b$", "forward gradient": ", $R_f$", "rank-one": ", $R_f$"}
            label = method + letters.get(method, "")
            low, middle, high = np.array(ratios).T
            draw_band(axes, list(timed), (low, middle, high), style, marker="o", markersize=4, label=label)
            tops.append(max(middle))
    return tops


def _draw_over_fastest(axes: Axes, entries: dict[int, dict[str, Any]]) -> None:
    axes.axhline(1, color="0.2", linewidth=1)
    for method, style in METHOD_STYLES.items():
        for mode, face in (("eager", "white"), ("compiled", None)):
            key = f"{method}, {mode}"
            timed = {
                n: (e["seconds"][key], e["seconds"][e["reference"]]) for n, e in entries.items() if key in e["seconds"]
            }
            if timed:
                band = np.array([paired_ratio(*pair) for pair in timed.values()]).T
                dots = {"marker": "o", "markersize": 4, "markerfacecolor": face or style["color"]}
                draw_band(axes, list(timed), band, style, label=method, **dots)


def _draw_memory(axes: Axes, entries: dict[int, dict[str, Any]]) -> None:
    for method, style in METHOD_STYLES.items():
        held = {n: e["memory"][method] / 1e6 for n, e in entries.items() if method in e.get("memory", {})}
        if held:
            # below 0.1 MB is what the system rounds to, and a logarithm has no zero
            megabytes = np.maximum(list(held.values()), 0.1)
            axes.plot(list(held), megabytes, marker="o", markersize=4, label=method, **style)


def _stamp_quick(figure: Figure, bench: dict[str, Any]) -> None:
    write_stamp(figure, ["quick mode: not a result"] if bench["quick"] else [])
