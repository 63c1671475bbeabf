"""Figures of the notebooks past the core six, in the same style: data in, a matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fwdlib.plotting import CURVES, METHODS, STYLE, plain_ticks, plot_mean, style_of
from fwdlib.statistics import median_interval


def plot_epochs(record: dict[str, Any]) -> Figure:
    """Draw the losses and the test accuracy of one training of an image classifier over its epochs.

    Args:
        record: as ``python -m fwdlib train`` leaves it in ``record.json``, with at least one epoch.

    Returns:
        A figure with two panels.
    """
    settings, epochs = record["settings"], record["epochs"]
    where = [row["epoch"] for row in epochs]
    marker = "o" if len(epochs) == 1 else ""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(8, 3.2))
        loss, accuracy = figure.subplots(1, 2)
        for name, color, linestyle in (("train_loss", CURVES[0], "--"), ("test_loss", CURVES[1], "-")):
            values = [float(row[name]) for row in epochs]
            label = "training, mean over the epoch" if name == "train_loss" else "test"
            loss.plot(where, values, color=color, linestyle=linestyle, marker=marker, label=label)
        loss.set(title="Loss", xlabel="epoch", ylabel="mean cross entropy [nats]", yscale="log")
        plain_ticks(loss)
        loss.legend()
        accuracy.plot(where, [100 * row["test_accuracy"] for row in epochs], color=CURVES[1], marker=marker)
        accuracy.set(
            title=f"Test accuracy, {100 * epochs[-1]['test_accuracy']:.2f} % at the end",
            xlabel="epoch",
            ylabel=f"correct of {record['num_test']} [%]",
        )
        for axes in (loss, accuracy):
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        figure.suptitle(
            f"{settings['train_mode']} on {settings['dataset']}, {record['network']}, {settings['optimizer']} "
            f"{settings['lr']:g}, one seed ({settings['seed']})",
            fontsize=9,
        )
    return figure


def plot_accuracies(curves: dict[str, dict[str, Sequence[Sequence[float]]]]) -> Figure:
    """Draw test errors over the epochs: the mean over the seeds of each method, and each seed as a thin line.

    Args:
        curves: title of a panel -> method, as ``METHODS`` calls it -> for each seed the part of the test set that is
            misclassified, before training and after each epoch.

    Returns:
        A figure with a panel for each title, the error in percent on a logarithmic axis.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(3.4 * len(curves), 3.8))
        for axes, (title, methods) in zip(np.ravel(figure.subplots(1, len(curves))), curves.items(), strict=True):
            for name, seeds in methods.items():
                errors = 100 * np.array(seeds)[:, 1:]
                epochs = np.arange(1, errors.shape[1] + 1)
                plot_mean(axes, epochs, errors, style_of(name), label=name, marker=".")
            axes.set(title=title, xlabel="epoch", ylabel="test error [%]", yscale="log")
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
            plain_ticks(axes)
        labels: dict[str, Any] = {}  # one legend of all that is in some panel
        for axes in figure.axes:
            handles, names = axes.get_legend_handles_labels()
            labels = dict(zip(names, handles, strict=True)) | labels
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=8, fontsize=8)
    return figure


def plot_cosines(runs: dict[str, Sequence[dict[str, float]]], titles: Sequence[str]) -> Figure:
    """Draw over the steps of training how well directions agree.

    Args:
        runs: name -> rows, each with its ``"step"`` and a cosine under each title. Methods are drawn as ``METHODS`` has
            it; other names thin and black beside methods, in colours of their own where none is a method.
        titles: one for each panel.

    Returns:
        A figure with a panel for each title and one legend.
    """
    if any(name in METHODS for name in runs):
        styles = {name: METHODS.get(name, {"color": "0.2", "linewidth": 0.8}) for name in runs}
    else:
        looks = zip(runs, CURVES, ("-", "--", "-.", ":"), strict=False)
        styles = {name: {"color": color, "linestyle": linestyle} for name, color, linestyle in looks}
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.6 + 3.7 * len(titles), 3.1))
        for axes, title in zip(np.ravel(figure.subplots(1, len(titles))), titles, strict=True):
            for name, rows in runs.items():
                axes.plot([row["step"] for row in rows], [row[title] for row in rows], **styles[name])
            lowest = min(row[title] for rows in runs.values() for row in rows)
            axes.set(title=title, xlabel="iteration (optimizer steps)", ylabel="cosine")
            axes.set_ylim(min(-0.03, 1.05 * lowest), 1.03)
        handles = [Line2D([], [], label=name, **styles[name]) for name in runs]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(runs))
    return figure


def plot_derivatives(panels: dict[str, dict[str, Sequence[float]]], where: Sequence[float]) -> Figure:
    """Draw derivatives beside what finite differences say of them.

    Args:
        panels: title -> name -> values at ``where``; the first of a panel are the finite differences, drawn as dots.
        where: the points.

    Returns:
        A figure with a panel for each title.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.6 + 3.7 * len(panels), 3.1))
        for axes, (title, curves) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
            (reference, dots), *lines = curves.items()
            every = max(1, len(where) // 24)
            axes.plot(where[::every], dots[::every], "o", color="0.3", markersize=4.5, label=reference)
            for (name, values), color, linestyle in zip(lines, CURVES, ("-", "--", "-.", ":"), strict=False):
                axes.plot(where, values, color=color, linestyle=linestyle, label=name)
            axes.set(title=title, xlabel="x", ylabel="derivative")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    return figure


def plot_validation(curves: dict[str, dict[str, Any]], num_validation: int, loss: str) -> Figure:
    """Draw how trainings with different learning rates get on: by epochs, and by the way that they have gone.

    Args:
        curves: name -> ``"epochs"`` and the same as ``"way"``, that is, learning rate times steps; ``"loss"`` and
            ``"errors"`` on the validation set, one row for each seed.
        num_validation: size of that set.
        loss: what the loss is, for the axis.

    Returns:
        A figure with three panels and one legend: the median over the seeds, and a band with the middle half.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(9, 3.3))
        panels = figure.subplots(1, 3)
        quantities = (("epochs", "errors"), ("epochs", "loss"), ("way", "loss"))
        for (name, rows), color, linestyle in zip(curves.items(), CURVES, ("-", "--", "-.", ":"), strict=False):
            for axes, (x, y) in zip(panels, quantities, strict=True):
                values = np.array(rows[y], dtype=float)
                values = 100 * (1 - values / num_validation) if y == "errors" else values
                low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
                axes.fill_between(rows[x], low, high, color=color, alpha=0.18, linewidth=0)
                axes.plot(rows[x], middle, color=color, linestyle=linestyle, label=name)
        accuracy, by_epoch, by_way = panels
        accuracy.set(title="Accuracy", xlabel="epoch", ylabel=f"correct of {num_validation} [%]")
        by_epoch.set(title="Loss", xlabel="epoch", ylabel=loss, yscale="log")
        by_way.set(
            title="The same by way", xlabel="learning rate \N{MULTIPLICATION SIGN} steps", ylabel=loss, yscale="log"
        )
        for axes in panels:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        for axes in panels[1:]:
            plain_ticks(axes)
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    return figure


def plot_arrivals(arrivals: dict[str, Sequence[float]], limit: int, goal: str) -> Figure:
    """Draw after how many epochs each seed arrives: dots, their median and its 95 % interval, arrows for "never".

    Args:
        arrivals: name -> epochs of each seed, infinite for one that did not arrive; in the colours of
            :func:`plot_validation`.
        limit: how many epochs there were.
        goal: where they are to arrive, for the title.

    Returns:
        A figure with one panel, a row for each name in their order, on a logarithmic axis.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.42 * len(arrivals)))
        axes = figure.subplots()
        end = 1.5 * limit
        axes.axvline(limit, color="0.2", linewidth=0.8, linestyle=":")
        for row, (epochs, color) in enumerate(zip(arrivals.values(), CURVES, strict=False)):
            place = row + (np.linspace(-0.2, 0.2, len(epochs)) if len(epochs) > 1 else np.zeros(1))
            arrived = np.isfinite(epochs)
            axes.scatter(np.array(epochs)[arrived], place[arrived], s=14, color=color, alpha=0.55, linewidth=0)
            if never := np.count_nonzero(~arrived):
                axes.scatter(end, row, marker=">", s=30, color=color)
                axes.annotate(f"{never} never", (end, row), (0, 6), textcoords="offset points", ha="center", fontsize=8)
            low, middle, high = median_interval(epochs)
            axes.plot([low, min(high, end)], [row, row], color=color, linewidth=2.2, solid_capstyle="butt")
            if np.isfinite(middle):
                axes.plot(middle, row, "D", color=color, markersize=6.5, markeredgecolor="white", zorder=3)
        axes.set(title=f"Epochs until {goal}", xlabel=f"epochs, of {limit}", xscale="log")
        axes.set_ylim(len(arrivals) - 0.5, -0.5)
        axes.set_yticks(range(len(arrivals)), list(arrivals))
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    return figure


def plot_closed_forms(
    panels: dict[str, dict[str, tuple[Sequence[float], Callable[[float], float]]]], counts: Sequence[int], ylabel: str
) -> Figure:
    """Draw what was measured over the number of tangents, beside its closed form.

    Args:
        panels: title -> method, as ``METHODS`` calls it, with dots for it in another form (``"projection, rescaled"``)
            -> what was measured for each count, and the same as a function of the count.
        counts: numbers of tangents.
        ylabel: what was measured.

    Returns:
        A figure with a panel for each title, both axes logarithmic, and one legend; dots of another form are hollow.
    """
    where, drawn = np.geomspace(counts[0], counts[-1], 200), {}
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.6 + 2.9 * len(panels), 3.4))
        for axes, (title, methods) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for name, (measured, theory) in methods.items():
                method, _, form = name.partition(", ")
                color = style_of(method)["color"]
                values = np.array([theory(k) for k in where])
                axes.plot(where, np.where(values > 0, values, np.nan), color=color, linewidth=1, alpha=0.7)
                shown = [value if value > 1e-12 else np.nan for value in measured]  # zero, up to rounding, has no place
                face = {"markerfacecolor": "white"} if form else {}
                (drawn[name],) = axes.plot(counts, shown, "o", markersize=5, color=color, **face)
            axes.set(title=title, xlabel="tangents K", xscale="log", yscale="log")
            axes.set_xticks(counts, [f"{k}" for k in counts])
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            plain_ticks(axes)
        figure.axes[0].set_ylabel(ylabel)
        handles = [*drawn.values(), Line2D([], [], color="0.4", linewidth=1)]
        figure.legend(handles, [*drawn, "closed form"], loc="outside lower center", ncols=len(handles))
    return figure


def plot_values(panels: dict[str, dict[str, np.ndarray]], ylabel: str, floor: float = 0.0) -> Figure:
    """Draw how descents go on: the median over the seeds, and a band over all of them.

    Args:
        panels: title -> method, as ``METHODS`` calls it, with its number of tangents behind a comma (``"projection,
            K = 4"``) -> values at each step, shape (seeds, steps + 1), infinite where a descent has diverged.
        ylabel: what the values are.
        floor: what is below it is not drawn.

    Returns:
        A figure with a panel for each title and one legend; the values on a logarithmic axis.
    """
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    forms = list(dict.fromkeys(name.partition(", ")[2] for name in names))
    looks = dict(zip(forms, ("-", "--", ":", "-."), strict=False))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(max(5.5, 0.6 + 2.9 * len(panels)), 3.5))
        for axes, (title, methods) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
            top = 100 * max(values[:, 0].max() for values in methods.values())
            for name, values in methods.items():
                method, _, form = name.partition(", ")
                style = {"color": style_of(method)["color"], "linestyle": looks[form]}
                low, middle, high = (
                    np.where((row < top) & (row > floor), row, np.nan)
                    for row in np.quantile(values, (0, 0.5, 1), axis=0, method="inverted_cdf")
                )
                axes.fill_between(np.arange(len(low)), low, high, color=style["color"], alpha=0.15, linewidth=0)
                axes.plot(middle, **style)
            axes.set(title=title, xlabel="iteration", yscale="log")
        figure.axes[0].set_ylabel(ylabel)
        methods = dict.fromkeys(name.partition(", ")[0] for name in names)
        handles = [Line2D([], [], color=style_of(name)["color"], label=name) for name in methods]
        handles += [Line2D([], [], color="0.4", linestyle=looks[form], label=form) for form in forms if form]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


# Frank-Wolfe from the exact gradient, from forward gradients as they come, and from their average.
FORMS = {
    "exact gradient": {"color": "0.3", "linestyle": ":"},
    "plain": {"color": CURVES[3], "linestyle": "--"},
    "averaged": {"color": CURVES[0], "linestyle": "-"},
}


def plot_decay(panels: dict[str, dict[str, np.ndarray]], steps: Sequence[int], quantity: str) -> Figure:
    """Draw how something falls over the iterations: the median over the seeds, with a band from the least to the most.

    Args:
        panels: title -> ``"exact gradient"``, ``"plain"`` or ``"averaged"`` -> values, shape (seeds, steps).
        steps: where the values are.
        quantity: what it is, for the axis.

    Returns:
        A figure with a panel for each title, all axes logarithmic; what has fallen below 1e-12 is not drawn.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.9 + 2.9 * len(panels), 3.3))
        for axes, (title, curves) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for name, seeds in curves.items():
                values = np.where(np.asarray(seeds) > 1e-12, seeds, np.nan)
                if np.isnan(values).all():
                    continue  # the exact gradient can be at the optimum after one step
                low, middle, high = np.quantile(values, (0, 0.5, 1), axis=0)
                axes.fill_between(steps, low, high, color=FORMS[name]["color"], alpha=0.18, linewidth=0)
                axes.plot(steps, middle, **FORMS[name])
            axes.set(title=title, xlabel="iteration", xscale="log", yscale="log")
            axes.yaxis.set_major_locator(ticker.LogLocator(numticks=8))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        figure.axes[0].set_ylabel(quantity)
        drawn = dict.fromkeys(name for curves in panels.values() for name in curves)
        handles = [Line2D([], [], label=name, **FORMS[name]) for name in drawn]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(drawn))
    return figure


def plot_paths(paths: dict[str, np.ndarray], goal: Sequence[float], optimum: Sequence[float]) -> Figure:
    """Draw the way of Frank-Wolfe through the l1 ball of radius 1 in two dimensions.

    Args:
        paths: title of a panel, beginning with ``"exact gradient"``, ``"plain"`` or ``"averaged"`` -> points, shape
            (steps, 2).
        goal: a point outside of the ball.
        optimum: the nearest point of the ball.

    Returns:
        A figure with a panel for each path.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2.9 * len(paths), 3.1))
        for axes, (title, points) in zip(np.ravel(figure.subplots(1, len(paths))), paths.items(), strict=True):
            color = FORMS[next(name for name in FORMS if title.startswith(name))]["color"]
            axes.fill([1, 0, -1, 0], [0, 1, 0, -1], facecolor="0.94", edgecolor="0.6", linewidth=0.8)
            axes.plot(*np.asarray(points).T, color=color, linewidth=0.9, marker=".", markersize=3)
            axes.plot(*goal, "k+", markersize=9, label="goal")
            axes.plot(*optimum, "o", color="k", markerfacecolor="none", markersize=8, label="optimum")
            axes.set(title=title, aspect="equal", xlim=(-1.1, 1.35), ylim=(-1.1, 1.35))
            axes.set(xlabel="first parameter", ylabel="second parameter")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def plot_reach(distances: Sequence[float], ends: dict[str, np.ndarray], reach: float) -> Figure:
    """Draw how far from the centre of the l2 ball of radius 1 Frank-Wolfe ends, over how far away the goal is.

    Args:
        distances: of the goal.
        ends: ``"plain"`` and ``"averaged"`` -> the distances of the ends, shape (seeds, goals).
        reach: where plain Frank-Wolfe is expected to come to an end.

    Returns:
        A figure with one panel: the median over the seeds, with a line from the least to the most.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(5.4, 3.1))
        axes = figure.subplots()
        x = np.asarray(distances)
        fine = np.geomspace(x.min(), x.max(), 200)
        axes.plot(fine, np.minimum(fine, 1), color="0.4", linestyle=":", linewidth=1, label="the optimum")
        axes.plot(fine, np.minimum(fine, reach), color="0.4", linewidth=1, label="theory for plain")
        for (name, seeds), marker in zip(ends.items(), ("D", "o"), strict=False):
            low, middle, high = np.quantile(seeds, (0, 0.5, 1), axis=0)
            spread = np.stack([middle - low, high - middle])
            axes.errorbar(x, middle, spread, fmt=marker, color=FORMS[name]["color"], markersize=4.5, label=name)
        axes.set(xlabel="distance of the goal from the centre, in radii", ylabel="distance of the end", xscale="log")
        axes.set(yscale="log", title="How far it gets")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_formatter(ticker.NullFormatter())
        figure.legend(loc="outside right center")
    return figure


def plot_sparsity(
    curves: dict[str, dict[float | None, Sequence[tuple[float, float]]]], quantity: str, num_test: int
) -> Figure:
    """Draw accuracy along a sweep of radii, and against sparsity: lines through the means, and a dot for each seed.

    Args:
        curves: method, as ``METHODS`` calls it -> radius, None for no constraint -> for each seed the share of the
            parameters that counts and the test accuracy.
        quantity: what counts, for the axis.
        num_test: size of the test set.

    Returns:
        A figure with two panels, over the radius and over the share; a star in the second for no constraint.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(8, 3.4))
        over_radius, over_share = figure.subplots(1, 2, sharey=True)
        for name, radii in curves.items():
            style, dots = METHODS[name], {"s": 9, "color": METHODS[name]["color"], "alpha": 0.4, "linewidth": 0}
            swept = {radius: 100 * np.array(seeds) for radius, seeds in radii.items() if radius is not None}
            means = np.array([values.mean(0) for values in swept.values()])
            for radius, values in swept.items():
                over_radius.scatter([radius] * len(values), values[:, 1], **dots)
                over_share.scatter(*values.T, **dots)
            over_radius.plot(list(swept), means[:, 1], marker="o", markersize=5, label=name, **style)
            over_share.plot(*means.T, marker="o", markersize=5, **style)
            if None in radii:
                star = {"color": style["color"], "markersize": 11, "markeredgecolor": "white"}
                over_share.plot(*100 * np.mean(radii[None], axis=0), "*", **star)
        over_radius.plot([], [], "*", color="0.3", markersize=11, markeredgecolor="white", label="no constraint")
        over_radius.set(title="Test accuracy by radius", xlabel="radius of the ball")
        over_radius.set_ylabel(f"correct of {num_test} [%]")
        over_share.set(title="Test accuracy by sparsity", xlabel=f"{quantity} [%]")
        for axes in figure.axes:
            axes.set_xscale("log")
            axes.margins(x=0.05, y=0.1)
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        figure.legend(*over_radius.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves) + 1)
    return figure


def plot_dimensions(
    panels: dict[str, dict[str, dict[int, Sequence[float]]]], ylabel: str, floor: float = 1e-16
) -> Figure:
    """Draw where descents end over the number of dimensions: the median over the seeds, and their range as a line.

    Args:
        panels: title -> method, as ``METHODS`` calls it, with its number of tangents behind a comma (``"projection,
            K = 4"``) -> number of dimensions -> the last value of each seed, infinite where it diverged.
        ylabel: what the values are.
        floor: values below it are drawn on it.

    Returns:
        A figure with a panel for each title, both axes logarithmic, and one legend; what diverged is left out.
    """
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    forms = list(dict.fromkeys(form for name in names if (form := name.partition(", ")[2])))
    looks = {"": ("-", "o")} | dict(zip(forms, ((":", "v"), ("-.", "s"), ("--", "D"), ("-", "^")), strict=False))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.6 + 2.9 * len(panels), 4))
        for axes, (title, methods) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for name, ends in methods.items():
                method, _, form = name.partition(", ")
                color, (linestyle, marker) = style_of(method)["color"], looks[form]
                sizes = sorted(ends)
                values = np.maximum(np.array([np.sort(ends[n]) for n in sizes], dtype=float), floor)
                middle = np.where(np.isfinite(values), values, np.nan)[:, values.shape[1] // 2]
                axes.plot(sizes, middle, linestyle, marker=marker, markersize=3.5, linewidth=1.1, color=color)
                axes.vlines(sizes, values[:, 0], values.max(1, where=np.isfinite(values), initial=floor), color=color)
            axes.set(title=title, xlabel="dimensions n", xscale="log", yscale="log")
            every = sorted({n for ends in methods.values() for n in ends})
            axes.set_xticks(every[:: max(1, len(every) // 4)], [str(n) for n in every[:: max(1, len(every) // 4)]])
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        figure.axes[0].set_ylabel(ylabel)
        handles = [
            Line2D([], [], color=style_of(name)["color"], label=name)
            for name in dict.fromkeys(name.partition(", ")[0] for name in names)
        ]
        grey = {"color": "0.4", "markersize": 3.5, "linewidth": 1.1}
        handles += [
            Line2D([], [], linestyle=looks[form][0], marker=looks[form][1], label=form, **grey) for form in forms
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure
