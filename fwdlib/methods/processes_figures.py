"""Figures of the notebooks on long processes: simulators and their derivatives, tuned trainings, recurrent layers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fwdlib.plotting import CURVES, LINES, METHOD_STYLES, panels, plain_decades, style_of, styled
from fwdlib.statistics import Interval

FORWARD, BACKPROP = METHOD_STYLES["forward gradient"]["color"], METHOD_STYLES["backprop"]["color"]


@styled
def plot_fit(
    when: Sequence[float],
    species: Mapping[str, tuple[Sequence[float], np.ndarray, np.ndarray]],
    intervals: Mapping[str, Interval],
    published: Mapping[str, float],
) -> Figure:
    """Draw a fitted simulation through its data, and its parameters beside published ones.

    Args:
        when: the years.
        species: name -> what was observed, and of the simulation the logarithm and its standard error.
        intervals: of the parameters.
        published: value of each.

    Returns:
        A figure with two panels. The bands are 95 % intervals of the simulation, from the same derivatives.
    """
    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.9, 1))
    for (name, (seen, middle, error)), color, line in zip(species.items(), CURVES[1::2], LINES, strict=False):
        left.fill_between(when, np.exp(middle - 2 * error), np.exp(middle + 2 * error), color=color, alpha=0.25, lw=0)
        left.plot(when, np.exp(middle), line, color=color, label=name)
        left.plot(when, seen, "o", color=color, markersize=4)
    left.set(title="Pelts, and the fitted simulation", xlabel="year", ylabel="pelts [thousands]", ylim=(0, None))
    left.xaxis.set_major_locator(ticker.MultipleLocator(4))
    left.legend(loc="upper right")
    for row, (name, interval) in enumerate(intervals.items()):
        low, estimate, high = (x / published[name] for x in interval)
        right.plot([low, high], [row, row], color=FORWARD, linewidth=3, alpha=0.5)
        right.plot(estimate, row, "o", color=FORWARD, label="fit, 95 % interval" if row == 0 else None)
    right.axvline(1, color="0.2", linestyle=":", label="published")
    right.set(title="Estimate / published", yticks=range(len(intervals)), yticklabels=list(intervals))
    right.set(ylim=(len(intervals) + 0.3, -0.6))
    right.legend(loc="lower right")
    return figure


@styled
def plot_fields(rows: Mapping[str, Sequence[Any]], titles: Sequence[str]) -> Figure:
    """Draw pictures in rows, all on one scale of colours.

    Args:
        rows: name of a row -> its pictures, each of shape (height, width).
        titles: of the columns.

    Returns:
        A figure with a panel for each picture. The last row sets the scale of colours.
    """
    high = max(float(image.max()) for image in list(rows.values())[-1])
    figure = Figure(figsize=(1.12 * len(titles) + 0.9, 1.12 * len(rows) + 0.3))
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image, cmap="viridis", vmin=0, vmax=high)
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
        row[0].set_ylabel(name)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    return figure


@styled
def animate_fields(frames: Sequence[Mapping[str, Any]], num_levels: int = 7) -> bytes:
    """Draw a state and its derivatives in motion, each by its own scale.

    Args:
        frames: for each moment the name of a picture -> its numbers, shape (height, width). The first picture is the
            state, the others are derivatives: red above zero, blue below.
        num_levels: how many colours a picture has.

    Returns:
        An animated GIF.
    """
    names = list(frames[0])
    scales = {name: max(float(abs(frame[name]).max()) for frame in frames) or 1.0 for name in names}
    figure = Figure(figsize=(4.9, 3.7), dpi=72)
    canvas, images = FigureCanvasAgg(figure), []
    drawn = {}
    grid = figure.subplots(2, -(-len(names) // 2)).flat
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        is_state = name == names[0]
        cmap = colormaps["viridis" if is_state else "RdBu_r"].resampled(num_levels)
        limits = {"vmin": 0, "vmax": scales[name]} if is_state else {"vmin": -scales[name], "vmax": scales[name]}
        drawn[name] = axes.imshow(frames[0][name], cmap=cmap, **limits)
        axes.set(xticks=[], yticks=[], title=name)
        axes.grid(visible=False)
    for frame in frames:
        for name, image in frame.items():
            drawn[name].set_data(image)
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    both = Image.fromarray(np.concatenate([np.asarray(image) for image in images[::4]]))
    palette = both.quantize(32, dither=Image.Dither.NONE)
    moving = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    buffer = io.BytesIO()
    times = [150] * (len(moving) - 1) + [1500]  # milliseconds
    moving[0].save(buffer, "gif", save_all=True, append_images=moving[1:], duration=times, loop=0)
    return buffer.getvalue()


@styled
def plot_costs(panels_of: Mapping[str, tuple[str, str, Mapping[str, Mapping[float, float]]]]) -> Figure:
    """Draw costs of forward gradients beside those of backprop.

    Args:
        panels_of: title of a panel -> label of x, label of y, and for each method x -> cost.

    Returns:
        A figure with a panel for each, all axes logarithmic.
    """
    figure = Figure(figsize=(4.1 * len(panels_of), 3))
    for axes, title, (x, y, methods) in panels(figure, panels_of):
        for name, costs in methods.items():
            axes.plot(list(costs), list(costs.values()), "o", **style_of(name) | {"linestyle": "-"}, label=name)
        axes.set(title=title, xlabel=x, ylabel=y)
        if any(methods.values()):  # in quick mode there may be nothing
            axes.set(xscale="log", yscale="log")
            plain_decades(axes.yaxis)
        axes.legend()
    return figure


@styled
def plot_chaos(
    values: Sequence[float], by_time: Mapping[float, Sequence[float]], times: Sequence[float], slopes: Sequence[float]
) -> Figure:
    """Draw a chaotic state against a parameter, after several times, and how its derivative grows.

    Args:
        values: of the parameter.
        by_time: time -> the state then, for each value.
        times: when the derivatives were looked at.
        slopes: their sizes, then.

    Returns:
        A figure with a panel for each of ``by_time`` and one for the growth.
    """
    figure = Figure(figsize=(2.5 * (len(by_time) + 1), 2.6))
    row = figure.subplots(1, len(by_time) + 1)
    for axes, (time, state) in zip(row, by_time.items(), strict=False):
        axes.plot(values, state, color=CURVES[1], linewidth=0.8)
        axes.set(title=f"z at time {time:g}", xlabel=r"parameter $\rho$")
    row[-1].plot(times, slopes, color=FORWARD)
    row[-1].set(title=r"median $|dz/d\rho|$", xlabel="time", yscale="log")
    return figure


@styled
def plot_recurrent(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    along: Mapping[str, Sequence[Sequence[float]]],
    parts: Sequence[float],
) -> Figure:
    """Draw trainings by two methods on each other, and how answers improve along a sequence.

    Args:
        curves: method -> data set -> training loss.
        along: data set -> for each seed the accuracy in percent after each of ``parts``.
        parts: of the sequence, 0 to 1.

    Returns:
        A figure with two panels.
    """
    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    for method, losses in curves.items():
        style = {"linewidth": 4, "alpha": 0.4, "linestyle": "-"} if method == "backprop" else {"linewidth": 1.3}
        for name, loss in losses.items():
            first = name == next(iter(losses))
            left.plot(range(len(loss)), loss, **style_of(method) | style, label=method if first else None)
            left.annotate(name, (len(loss) - 1, loss[-1]), fontsize=8, xytext=(3, 0), textcoords="offset points")
    left.set(title="Two gradients, one training", xlabel="iteration", ylabel="training loss [nats]")
    left.margins(x=0.12)
    left.legend()
    for (name, seeds), color, line in zip(along.items(), CURVES, LINES, strict=False):
        right.plot(100 * np.array(parts), np.mean(seeds, 0), line, marker="o", color=color, label=name)
    right.set(title="Answers while the pixels come in", xlabel="pixels seen [%]", ylabel="correct [%]", ylim=(0, None))
    right.legend()
    return figure


@styled
def plot_search(
    rates: Sequence[float], momenta: Sequence[float], losses: Any, path: Sequence[Mapping[str, float]]
) -> Figure:
    """Draw a descent of learning rate and momentum over the validation losses of a grid.

    Args:
        rates: of the grid.
        momenta: of the grid.
        losses: shape (rates, momenta), infinite where the training diverged.
        path: ``rate``, ``momentum`` and ``loss`` of each step of the descent.

    Returns:
        A figure with two panels: the map, and the losses along the descent.
    """
    figure = Figure(figsize=(9, 3.3))
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    x, y = np.log10(np.asarray(rates)), np.arange(len(momenta))
    shown = np.where(np.asarray(losses) < 1.2, np.asarray(losses), np.nan).T
    picture = left.pcolormesh(x, y, shown, cmap="viridis", shading="nearest")
    figure.colorbar(picture, ax=left, label="validation loss [nats]")
    at = np.interp([p["momentum"] for p in path], np.asarray(momenta), y)
    left.plot(np.log10([p["rate"] for p in path]), at, "o-", color=FORWARD, markeredgecolor="white", markersize=7)
    ticks = np.arange(np.ceil(x.min()), x.max() + 0.5)
    left.set(title="A grid, and a descent", xlabel="learning rate", xticks=ticks, ylabel="momentum")
    left.set(xticklabels=[f"{10**t:g}" for t in ticks], yticks=y, yticklabels=[f"{m:.2g}" for m in momenta])
    left.grid(visible=False)
    right.plot(range(len(path)), [p["loss"] for p in path], "o-", color=FORWARD, label="descent")
    right.axhline(float(np.asarray(losses).min()), color="0.3", linestyle=":", label="best of the grid")
    right.set(title="Along the descent", xlabel="hypergradients used", ylabel="validation loss [nats]")
    right.legend()
    return figure


@styled
def plot_horizons(found: Mapping[int, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """Draw validation losses and hypergradients over the learning rate, for trainings of several lengths.

    Args:
        found: number of steps -> learning rates, losses, derivatives by the logarithm of the rate.

    Returns:
        A figure with a column for each length.
    """
    figure = Figure(figsize=(9, 4))
    grid = figure.subplots(2, len(found), sharex=True, sharey="row", squeeze=False)
    for (top, bottom), (num_steps, (rates, losses, slopes)) in zip(grid.T, found.items(), strict=True):
        top.plot(rates, np.where(np.isfinite(losses), losses, np.nan), color=BACKPROP, linewidth=1)
        sizes = np.abs(np.where(np.isfinite(slopes), slopes, np.nan))
        bottom.plot(rates, sizes, ".", color=FORWARD, markersize=3)
        top.set(title=f"{num_steps:,} steps", ylim=(0, 3), xscale="log")
        bottom.set(xlabel="learning rate", yscale="log")
    grid[0, 0].set_ylabel("validation loss [nats]")
    grid[1, 0].set_ylabel("|hypergradient|")
    return figure
