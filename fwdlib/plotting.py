"""Figures: saved records in, a matplotlib Figure out; one function per figure, one style file beside this module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from fwdlib import runtime
from fwdlib.checks import check_choice
from fwdlib.data import PENGUIN_FEATURES, Dataset
from fwdlib.history import History, Run
from fwdlib.results import Record
from fwdlib.statistics import Interval, paired_ratio

CURVES = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # for what is no method; never in one figure with METHODS
QUANTITIES = ("test loss", "test accuracy", "misclassifications")
# In quick mode without the layout, half the time of a figure: nobody looks at those.
STYLE = [Path(__file__).with_name("fwdlib.mplstyle"), {"figure.constrained_layout.use": not runtime.is_quick()}]

# One colour and one line style per method, in every figure. Okabe and Ito's palette: told apart by colour-blind
# readers.
METHODS = {
    "backprop": {"color": "#0072B2", "linestyle": "-"},
    "forward gradient": {"color": "#D55E00", "linestyle": "--"},
    "rank-one": {"color": "#009E73", "linestyle": "-."},
    "projection": {"color": "#117733", "linestyle": (0, (4, 1, 1, 1))},
    "per-example": {"color": "#CC79A7", "linestyle": ":"},
    "activity": {"color": "#E69F00", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    "FDFA": {"color": "#56B4E9", "linestyle": (0, (8, 1))},
    "DKP": {"color": "#882255", "linestyle": (0, (6, 2, 1, 2))},
    "DFA": {"color": "0.5", "linestyle": (0, (1, 3))},
    "FG-CV": {"color": "#999933", "linestyle": (0, (3, 1))},
}
COST_MARKS = {"": ("o", 0.0), "channels_last": ("s", -0.22), "one graph": ("D", 0.22)}  # and where in its row


def style_of(method: str) -> dict[str, Any]:
    """Return the colour and line style of a method; dark grey for what is none."""
    return METHODS.get(method, {"color": "0.2"})


def plot_training(records: Record | Sequence[Record]) -> Figure:
    """Draw test loss, test accuracy and misclassifications over the iterations: the median over the seeds, with a band.

    A seed that has stopped keeps its last value; one that has diverged counts as infinite loss and all wrong. The band
    holds the middle half of the seeds. The axis ends when 19 of 20 seeds have stopped.

    Args:
        records: one, or several of the same task to lay over one another.

    Returns:
        A figure with three panels; stamped if a record was made with substitute data or in quick mode.
    """
    records = [records] if isinstance(records, Record) else list(records)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(9, 2.9))
        for axes, quantity in zip(figure.subplots(1, 3), QUANTITIES, strict=True):
            _draw_quantity(axes, records, quantity)
        figure.axes[1].legend()
        _stamp(figure, records)
    return figure


def plot_quantity(records: Sequence[Record], quantity: str) -> Figure:
    """Draw one panel of :func:`plot_training` as a figure of its own.

    Args:
        records: of the same task.
        quantity: ``"test loss"``, ``"test accuracy"`` or ``"misclassifications"``.

    Returns:
        A figure with one panel, stamped as there.

    Raises:
        ValueError: if the quantity is none of these.
    """
    check_choice("quantity", quantity, QUANTITIES)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(4.2, 3.1))
        axes = figure.subplots()
        _draw_quantity(axes, records, quantity)
        axes.legend()
        _stamp(figure, records)
    return figure


def plot_seeds(record: Record, threshold: float | None = None) -> Figure:
    """Draw every seed's training loss over its iterations, marked by how it ended.

    Args:
        record: of a run.
        threshold: where a run stopped, drawn as a line.

    Returns:
        A figure with one panel.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3.1))
        axes = figure.subplots()
        marks = {"reached": ("o", 18), "completed": ("o", 18), "not reached": (">", 24), "diverged": ("x", 40)}
        style = METHODS.get(record.title, {"color": "0.3"})
        for run in record.runs:
            finite = [value if np.isfinite(value) else np.nan for value in run.train_loss]
            axes.plot(finite, color=style["color"], alpha=0.45, linewidth=0.9)
            last = int(np.flatnonzero(np.isfinite(finite))[-1]) if np.isfinite(finite).any() else 0
            marker, size = marks[run.status]
            axes.scatter(last, finite[last], marker=marker, s=size, color=style["color"], zorder=3)
        for status, (marker, size) in marks.items():
            count = sum(run.status == status for run in record.runs)
            if count:
                axes.scatter([], [], marker=marker, s=size, color=style["color"], label=f"{status}: {count}")
        if threshold is not None:
            axes.axhline(threshold, color="0.2", linewidth=0.8, linestyle=":")
            axes.annotate(
                "threshold", (0.01, threshold), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8
            )
        axes.set(
            title=f"Training loss of each of {len(record.runs)} seeds",
            xlabel="iteration (optimizer steps)",
            ylabel="mean cross entropy [nats]",
            yscale="log",
        )
        if not any(np.isfinite(run.train_loss).any() for run in record.runs):
            axes.set_ylim(0.1, 10)  # there is nothing to scale the axis by
        plain_ticks(axes)
        axes.legend()
        _stamp(figure, [record])
    return figure


def plot_losses(
    curves: dict[str, Sequence[float]], threshold: float | None = None, threshold_label: str = "threshold"
) -> Figure:
    """Draw a few named loss curves over the iterations, each until it leaves a hundred times the start.

    Args:
        curves: name -> training loss before the first step and after each.
        threshold: drawn as a line.
        threshold_label: what it is.

    Returns:
        A figure with one panel.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3))
        axes = figure.subplots()
        top = 100 * max(losses[0] for losses in curves.values())
        for (name, losses), color, linestyle in zip(curves.items(), CURVES, ("-", "--", "-.", ":"), strict=False):
            shown = np.array([value if value < top else np.nan for value in losses])
            axes.plot(shown, color=color, linestyle=linestyle, label=name)
            if np.isnan(shown).any():
                last = int(np.flatnonzero(np.isnan(shown))[0]) - 1
                axes.plot(last, shown[last], "x", color=color, markersize=8)
        if threshold is not None:
            axes.axhline(threshold, color="0.2", linewidth=0.8, linestyle=":", label=threshold_label)
        axes.set(xlabel="iteration (optimizer steps)", ylabel="training loss [nats]", yscale="log")
        plain_ticks(axes)
        axes.legend()
    return figure


def plot_images(inputs: Tensor, titles: Sequence[str]) -> Figure:
    """Draw a row of grey images.

    Args:
        inputs: shape (N, 1, H, W), values in 0..1.
        titles: one above each.

    Returns:
        A figure with N panels.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(1.05 * len(inputs), 1.4))
        for axes, image, title in zip(np.atleast_1d(figure.subplots(1, len(inputs))), inputs, titles, strict=True):
            axes.imshow(image.squeeze().cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(title, fontsize=9, loc="center", fontweight="normal")
            axes.set_axis_off()
    return figure


def plot_average(
    counts: Sequence[int],
    measured: Sequence[float] | dict[str, Sequence[float]],
    predicted: Callable[[float], float] | dict[str, Callable[[float], float]],
    unit: str,
    goal: str = "gradient",
) -> Figure:
    """Draw how the mean of many estimates approaches the gradient, beside what the theory says.

    Args:
        counts: how many estimates were averaged.
        measured: |mean - gradient| / |gradient| for each count, root mean square; or that by method, with hollow dots
            for a method in another form (``"FG-CV, random feedback"``).
        predicted: the same as a function of the count; or that for some of the methods.
        unit: what was averaged, for the axis.
        goal: what is estimated, for the title.

    Returns:
        A figure with one panel, both axes logarithmic.
    """
    is_crowded = isinstance(predicted, dict)
    theories = list(predicted.values()) if is_crowded else [predicted]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.2, 3.2) if is_crowded else (5, 3))
        axes = figure.subplots()
        for theory in theories:
            label = "theory" if theory is theories[0] else None
            axes.loglog(counts, [theory(k) for k in counts], color="0.4", linestyle=":", label=label)
        for name, errors in measured.items() if isinstance(measured, dict) else [("measured", measured)]:
            method, _, form = name.partition(", ")
            color = METHODS.get(method, {"color": CURVES[0] if name == "measured" else "0.2"})["color"]
            face = {"markerfacecolor": "white"} if form else {}
            axes.loglog(counts, errors, "o", color=color, label=name, **face)
        axes.set(title=f"The mean closes in on the {goal}", xlabel=unit, ylabel="relative error of the mean")
        if is_crowded:
            figure.legend(loc="outside right center")
        else:
            axes.legend()
    return figure


def plot_durations(seconds: dict[str, Sequence[float]]) -> Figure:
    """Draw how long several things take: the median, with a line that holds the middle half.

    Args:
        seconds: name -> durations, as :func:`fwdlib.bench.measuring.interleave` returns them.

    Returns:
        A figure with one panel, a row for each name in their order, on a logarithmic axis.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 0.34 * len(seconds)))
        axes = figure.subplots()
        for row, (name, values) in enumerate(seconds.items()):
            low, middle, high = 1e3 * np.quantile(values, (0.25, 0.5, 0.75))
            color = style_of(name.partition(", ")[0])["color"]
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


def plot_over_time(curves: dict[str, tuple[float, Run]]) -> Figure:
    """Draw training losses over the seconds that the steps took.

    Args:
        curves: method -> the seconds that a step takes, and the run.

    Returns:
        A figure with one panel, both axes logarithmic; the value before the first step is not drawn.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3))
        axes = figure.subplots()
        for name, (seconds, run) in curves.items():
            axes.plot(seconds * _steps_of(run), run.train_loss[1:], label=name, **style_of(name))
        axes.set(xlabel="time spent in steps [s]", ylabel="training loss [nats]", xscale="log", yscale="log")
        plain_ticks(axes)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend()
    return figure


def plot_histories(histories: dict[str, History]) -> Figure:
    """Draw training loss and test error of several methods over the steps: the mean over the seeds, and each seed.

    Args:
        histories: method, as ``METHODS`` calls it, with dots for it in another form (``"FG-CV, no feedback"``) -> its
            runs, all of the same length.

    Returns:
        A figure with two panels; each seed is a thin line. What was before the first step is not drawn.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(8, 3.4))
        loss, error = figure.subplots(1, 2)
        for name, history in histories.items():
            method, _, form = name.partition(", ")
            style = style_of(method) | ({"linestyle": ":"} if form else {})
            steps = _steps_of(history.runs[0])
            losses = np.array([run.train_loss[1:] for run in history.runs])
            errors = 100 / history.num_test * np.array([run.test_errors[1:] for run in history.runs])
            for axes, values in ((loss, losses), (error, errors)):
                plot_mean(axes, steps, values, style, label=name)
        history = next(iter(histories.values()))
        seeds = f"{len(history.runs)} seeds" if len(history.runs) > 1 else "one seed"
        loss.set(title=f"Training loss, {seeds}", ylabel="mean cross entropy [nats]")
        error.set(title=f"Test error, {seeds}", ylabel=f"wrong of {history.num_test} [%]")
        for axes in (loss, error):
            axes.set(xlabel="iteration (optimizer steps)", yscale="log")
            plain_ticks(axes)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=len(histories))
    return figure


def plot_features(data: Dataset) -> Figure:
    """Draw a table data set: every class in the plane of the first two features and of the last two.

    Args:
        data: with inputs of shape (N, 4), such as :func:`fwdlib.data.load_penguins` returns.

    Returns:
        A figure with two panels.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.5, 3))
        panels = figure.subplots(1, 2)
        inputs, targets = data.train_inputs.cpu(), data.train_targets.cpu()
        for axes, (x, y) in zip(panels, ((0, 1), (2, 3)), strict=True):
            for index, (name, marker) in enumerate(zip(data.class_names, "o^s", strict=False)):
                points = inputs[targets == index]
                axes.scatter(
                    points[:, x], points[:, y], s=14, marker=marker, alpha=0.7, color=CURVES[index], label=name
                )
            axes.set(xlabel=_scaled(PENGUIN_FEATURES[x]), ylabel=_scaled(PENGUIN_FEATURES[y]))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def plot_cost(bench: dict[str, Any]) -> Figure:
    """Draw what a training step costs by each method, in units of the fastest backprop, one panel for each model.

    Hollow marks are eager, filled ones compiled; a line through a mark is the 95 % interval of the median ratio, taken
    round by round. Left of the line at 1 is faster than backprop.

    Args:
        bench: as :func:`fwdlib.bench.benchmark.run` returns it, or read from its JSON file.

    Returns:
        A figure with a panel for each model, three in a row, all with the same logarithmic axis.
    """
    entries = list(bench["models"].values())
    names = [name for entry in entries for name in entry["seconds"] if name != "forward"]
    labels = list(dict.fromkeys(_parts(name)[0] for name in names))
    labels.sort(key=lambda label: list(METHODS).index(label.split(" K=")[0]))
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(1.5 + 2.6 * columns, 0.85 + rows * (0.75 + 0.24 * len(labels))))
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(entries) :]:
            axes.set_visible(False)
        for axes, entry in zip(panels.flat, entries, strict=False):
            axes.axvline(1, color="0.2", linewidth=1)
            for name, seconds in entry["seconds"].items():
                if name != "forward":
                    ratio = paired_ratio(seconds, entry["seconds"][entry["reference"]])
                    _draw_ratio(axes, labels, name, ratio)
            axes.set_title(f"{entry['title']}\nbatch {entry['batch']}", fontsize=9)
            axes.set(xscale="log", ylim=(len(labels) - 0.5, -0.5))
            axes.set_yticks(range(len(labels)), labels)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        _plain_ratios(panels[0, 0])
        for axes in panels.flat[max(len(entries) - columns, 0) : len(entries)]:
            axes.tick_params(axis="x", labelbottom=True)
            axes.set_xlabel("ratio to the fastest backprop")
        grey = {"color": "0.3", "linestyle": "", "markersize": 5.5}
        handles = [Line2D([], [], marker="o", markerfacecolor="white", label="eager", **grey)]
        handles += [Line2D([], [], marker="o", label="compiled", **grey)]
        forms = dict.fromkeys(_parts(name)[1] for name in names)
        handles += [Line2D([], [], marker=COST_MARKS[form][0], label=form, **grey) for form in forms if form]
        title = f"time of a training step on {bench['environment']['device']}"
        figure.legend(handles=handles, title=title, title_fontsize=9, loc="outside lower center", ncols=len(handles))
        _stamp_quick(figure, bench)
    return figure


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
        raise ValueError("bench has no depth sweep: measure again without --no-depth")
    layers = [int(n) for n in bench["depth"]]
    entries = list(bench["depth"].values())
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(9, 3.4))
        time, memory = figure.subplots(1, 2)
        tops = [0.0]
        for name, linestyle, shift in (("R_f", "--", -9), ("R_b", "-", 5)) if published else ():
            x, y = published["layers"], published[name]
            time.plot(x, y, color="0.55", linewidth=0.9, linestyle=linestyle)
            place = {"xytext": (0, shift), "textcoords": "offset points", "ha": "right", "va": "center"}
            time.annotate(f"paper's ${name}$", (x[-1], y[-1]), fontsize=8, color="0.4", **place)
            tops.append(max(y))
        for method, style in METHODS.items():
            timed = [
                (n, paired_ratio(entry["seconds"][f"{method}, eager"], entry["seconds"]["forward"]))
                for n, entry in zip(layers, entries, strict=True)
                if f"{method}, eager" in entry["seconds"]
            ]
            if timed:
                where, ratios = zip(*timed, strict=True)
                low, middle, high = np.array(ratios).T
                time.fill_between(where, low, high, color=style["color"], alpha=0.18, linewidth=0)
                label = f"{method}, ${'R_b' if method == 'backprop' else 'R_f'}$"
                tops.append(max(middle))
                time.plot(where, middle, marker="o", markersize=4, label=label, **style)
            held = {
                n: entry["memory"][method] / 1e6
                for n, entry in zip(layers, entries, strict=True)
                if method in entry.get("memory", {})
            }
            if held:
                # below 0.1 MB is what the system rounds to, and a logarithm has no zero
                memory.plot(
                    list(held), np.maximum(list(held.values()), 0.1), marker="o", markersize=4, label=method, **style
                )
        what = f"layers of width {bench['settings']['width']}, batch {entries[0]['batch']}"
        time.set(title="Time of a training step", xlabel=what, ylabel="plain evaluations of the loss")
        time.set_ylim(0, 1.2 * max(tops))  # the band of a disturbed measurement may leave the panel
        memory.set(title="Peak memory of a step above the model's", xlabel=what, ylabel="memory [MB]", yscale="log")
        memory.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        for axes in (time, memory):
            axes.margins(x=0.03)
        handles, labels = time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
        _stamp_quick(figure, bench)
    return figure


def _parts(name: str) -> tuple[str, str, bool]:
    # "rank-one channels_last, compiled" -> row, form, whether compiled
    label, _, mode = name.rpartition(", ")
    form = next((form for form in COST_MARKS if form and label.endswith(form)), "")
    return label.removesuffix(form).strip(), form, mode == "compiled"


def _draw_ratio(axes: Axes, labels: Sequence[str], name: str, ratio: Interval) -> None:
    label, form, compiled = _parts(name)
    color = METHODS[label.split(" K=")[0]]["color"]
    marker, shift = COST_MARKS[form]
    place = labels.index(label) + shift
    if ratio.low == ratio.low:
        axes.plot([ratio.low, ratio.high], [place, place], color=color, linewidth=1.4, solid_capstyle="butt")
    face = color if compiled else "white"
    axes.plot(ratio.estimate, place, marker, color=color, markersize=5.5, markerfacecolor=face, zorder=3)


def _plain_ratios(axes: Axes) -> None:
    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high / low < 300 else (1,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))


def _draw_quantity(axes: Axes, records: Sequence[Record], quantity: str) -> None:
    num_test = records[0].num_test
    ends = []
    for record in records:
        series = [_until_end(run, quantity, num_test) for run in record.runs]
        longest = max(len(values) for values in series)
        rows = np.stack([np.pad(values, (0, longest - len(values)), mode="edge") for values in series])
        # order statistics, not interpolation: between a finite and an infinite loss there is no value
        low, middle, high = np.quantile(rows, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")
        # off the panel, but drawable; 1 for seeds that were never finite
        finite = np.where(np.isfinite(high), high, 1e3 * np.max(rows[np.isfinite(rows)], initial=1e-3))
        style = {"label": record.title, **METHODS.get(record.title, {"color": "0.3", "linestyle": "-."})}
        axes.fill_between(np.arange(longest), low, finite, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(middle, **style)
        ends.append(np.quantile([len(values) - 1 for values in series], 0.95, method="inverted_cdf"))
    axes.set(title=quantity.capitalize(), xlabel="iteration (optimizer steps)", xlim=(0, max(ends) * 1.02 or 1))
    if quantity == "test loss":
        axes.set(ylabel="mean cross entropy [nats]", yscale="log")
        drawn = np.concatenate([line.get_ydata()[np.isfinite(line.get_ydata())] for line in axes.lines])
        axes.set_ylim((0.9 * drawn.min(), 1.4 * drawn.max()) if drawn.size else (0.1, 10))
        plain_ticks(axes)
    elif quantity == "test accuracy":
        axes.set(ylabel=f"correct of {num_test} [%]", ylim=(0, 103))
    else:
        axes.set(ylabel=f"wrong of {num_test}", ylim=(0, None))


def plot_mean(axes: Axes, where: np.ndarray, seeds: np.ndarray, style: dict[str, Any], **options: Any) -> None:
    """Draw the mean of the rows of ``seeds``, and each row as a thin line."""
    axes.plot(where, seeds.T, **style | {"linestyle": "-", "linewidth": 0.5, "alpha": 0.4})
    axes.plot(where, seeds.mean(0), **style, **options)


def _steps_of(run: Run) -> np.ndarray:
    # At which steps the values of its series are, that before the first step left out.
    return np.minimum(run.every * np.arange(1, len(run.train_loss)), run.iterations)


def _until_end(run: Run, quantity: str, num_test: int) -> np.ndarray:
    values = np.asarray(run.test_loss if quantity == "test loss" else run.test_errors, dtype=float)
    values[-1] = run.end(num_test)[0 if quantity == "test loss" else 1]
    return (
        100 * (1 - values / num_test) if quantity == "test accuracy" else np.where(np.isfinite(values), values, np.inf)
    )


def _scaled(feature: str) -> str:
    return feature.removesuffix("_mm").removesuffix("_g").replace("_", " ") + ", scaled to 0..1"


def plain_ticks(axes: Axes) -> None:
    """Write 0.3 rather than 3 x 10^-1 on a logarithmic y axis, with minor labels only where it spans few decades."""
    low, high = axes.get_ylim()
    subs = (2, 3, 5) if high / low < 100 else ()
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=subs or (2, 4, 6, 8)))
    axes.yaxis.set_minor_formatter(ticker.FormatStrFormatter("%g") if subs else ticker.NullFormatter())


def _stamp(figure: Figure, records: Sequence[Record]) -> None:
    words = []
    for record in records:
        if record.source.get("substitute_for"):
            words.append(f"substitute data: {record.source['name']} in place of {record.source['substitute_for']}")
        if record.quick:
            words.append("quick mode: not a result")
    write_stamp(figure, words)


def _stamp_quick(figure: Figure, bench: dict[str, Any]) -> None:
    write_stamp(figure, ["quick mode: not a result"] if bench["quick"] else [])


def write_stamp(figure: Figure, words: Sequence[str]) -> None:
    """Write on top of a figure what its reader must know of it first, a substitute for example."""
    if words:
        figure.suptitle(" · ".join(dict.fromkeys(words)), color="#B00020", fontsize=9, fontweight="bold")
