"""Figures of descents on test functions: values, paths on the map, the same in motion, and where they diverge.

What they draw is plain data, as it is saved: title of a function -> method, as ``METHODS`` calls it -> ``steps``
(T,), ``values`` (R, T), ``paths`` (R, T, 2) and ``seconds``, the time of a step.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import torch
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from fwdlib.checks import check_count
from fwdlib.objectives import beale, rosenbrock
from fwdlib.plotting import METHODS, STYLE, plain_ticks

Descents = dict[str, dict[str, dict[str, Any]]]


class Landscape(NamedTuple):
    """A function of two numbers, and the part of the plane to show."""

    function: Callable[[Tensor], Tensor]
    minimum: tuple[float, float]
    window: tuple[float, float, float, float]
    """Left, right, bottom, top."""


LANDSCAPES = {
    "Beale": Landscape(beale, (3.0, 0.5), (-0.6, 3.6, -0.6, 1.1)),
    "Rosenbrock": Landscape(rosenbrock, (1.0, 1.0), (-1.3, 1.5, -0.7, 1.4)),
}


def plot_descents(descents: Descents) -> Figure:
    """Draw the value of each function over the iterations and over the seconds that they took.

    Args:
        descents: see the module; of each method only ``steps``, ``values`` and ``seconds``.

    Returns:
        A figure with a row of two panels for each function: the median over the seeds, a band with the middle half, and
        each seed as a thin line. All axes are logarithmic, so the value at the start is not drawn.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(8, 0.3 + 2.4 * len(descents)))
        for row, (title, methods) in zip(
            figure.subplots(len(descents), 2, squeeze=False), descents.items(), strict=True
        ):
            for name, found in methods.items():
                steps, values = np.array(found["steps"])[1:], np.array(found["values"], dtype=float)[:, 1:]
                low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")
                for axes, x in zip(row, (steps, steps * found["seconds"]), strict=True):
                    axes.plot(x, values.T, color=METHODS[name]["color"], linewidth=0.4, alpha=0.25)
                    axes.fill_between(x, low, high, color=METHODS[name]["color"], alpha=0.18, linewidth=0)
                    axes.plot(x, middle, label=name, **METHODS[name])
            for axes, unit in zip(row, ("iteration", "time spent in steps [s]"), strict=True):
                axes.set(xlabel=unit, ylabel="value of f", xscale="log", yscale="log", title=title)
                axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
                plain_ticks(axes)
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    return figure


def plot_paths(descents: Descents) -> Figure:
    """Draw where the descents went, on the contour lines of their functions, one line for each seed.

    Args:
        descents: see the module; titles of :data:`LANDSCAPES`, and of each method only ``paths``.

    Returns:
        A figure with a panel for each function. A ring is the start, a star the minimum.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.6 + 4.2 * len(descents), 3.5))
        for axes, (title, methods) in zip(np.ravel(figure.subplots(1, len(descents))), descents.items(), strict=True):
            _draw_map(axes, title)
            for name, found in reversed(methods.items()):  # the one of backprop on top
                paths, is_single = np.array(found["paths"], dtype=float), len(found["paths"]) == 1
                axes.plot(*paths.T, color=METHODS[name]["color"], linewidth=1.8 if is_single else 0.7, alpha=0.9)
            axes.plot(*paths[0, 0], "o", color="0.2", markersize=7, markerfacecolor="none")
        _legend(figure, methods)
    return figure


def animate_paths(descents: Descents, num_frames: int = 40, dpi: int = 72) -> bytes:
    """Draw the descents in motion: where each seed is, and the way that it came.

    An animated GIF, because that plays wherever there is an ``<img>``: in Jupyter, in a page without scripts.

    Args:
        descents: see the module; titles of :data:`LANDSCAPES`, and of each method only ``steps`` and ``paths``.
        num_frames: how many, evenly spaced in the records; equal ones become one.
        dpi: pixels per inch; it is some 8 inches wide.

    Returns:
        The file; the same descents give the same bytes.

    Raises:
        ValueError: if there are less than 2 frames.
    """
    check_count("num_frames", num_frames, minimum=2)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(0.4 + 3.9 * len(descents), 3.2), dpi=dpi)
        canvas, moving = FigureCanvasAgg(figure), []
        for axes, (title, methods) in zip(np.ravel(figure.subplots(1, len(descents))), descents.items(), strict=True):
            _draw_map(axes, title)
            axes.set_title(title)
            for name, found in reversed(methods.items()):
                look = {"color": METHODS[name]["color"], "marker": "o", "markersize": 5}
                look["linewidth"] = 1.8 if len(found["paths"]) == 1 else 0.8
                for path in np.array(found["paths"], dtype=float):
                    (line,) = axes.plot(*path[:1].T, **look, markevery=[-1], markeredgecolor="white", alpha=0.9)
                    moving.append((axes, line, path, title, found["steps"]))
        _legend(figure, methods)
        canvas.draw()
        figure.set_layout_engine("none")  # laid out once: nothing may jump
        for axes, line, _, title, _ in moving:  # the rest is drawn once, too
            line.set_animated(True)
            axes.set_title(title, animated=True)
        canvas.draw()
        still, images = canvas.copy_from_bbox(figure.bbox), []
        for part in np.linspace(0, 1, num_frames):
            canvas.restore_region(still)
            heads = {}
            for axes, line, path, title, steps in moving:
                now = round(part * (len(path) - 1))
                line.set_data(*path[: now + 1].T)
                axes.draw_artist(line)
                heads[axes] = axes.set_title(f"{title}, iteration {steps[now]:,}")
            for axes, head in heads.items():
                axes.draw_artist(head)
            images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    return _gif(images, ["black", *(METHODS[name]["color"] for name in methods)])


def plot_growth(rows: Sequence[dict[str, float]], rates: Sequence[float], theory: dict[str, Sequence[float]]) -> Figure:
    """Draw by what factor a step on the sphere multiplies the value, over the learning rate.

    Args:
        rows: measured, as :func:`fwdlib.methods.stability.measure_growth` returns them.
        rates: of the theory.
        theory: at these rates, as :func:`fwdlib.methods.stability.growth` returns it.

    Returns:
        A figure with one panel: lines are the theory, dots what was measured, with 5 standard errors of the mean.
    """
    forward, backprop = METHODS["forward gradient"]["color"], METHODS["backprop"]["color"]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3.1))
        axes = figure.subplots()
        axes.axhline(1, color="0.2", linewidth=0.8)
        axes.plot(rates, theory["backprop"], color=backprop, label="backprop")
        axes.plot(rates, theory["mean"], color=forward, linestyle="--", label="forward gradient,\nmean of the runs")
        axes.plot(rates, theory["typical"], color=forward, linestyle=":", label="forward gradient,\ntypical run")
        where, means, errors, typical = ([row[key] for row in rows] for key in ("rate", "mean", "error", "typical"))
        axes.errorbar(where, means, 5 * np.array(errors), fmt="o", markersize=4, color=forward)
        axes.plot(where, typical, "o", markersize=4, color=forward, markerfacecolor="white")
        axes.set(title="What a step multiplies the value by", xlabel="learning rate", ylabel="factor", ylim=(0, 3))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_divergence(grids: dict[str, dict[str, Any]]) -> Figure:
    """Draw over the learning rate how many of the seeds diverge.

    Args:
        grids: title of a function -> ``rates``, ``diverged`` and ``limits``: of each method the part of the seeds at
            each rate, and the largest stable learning rate of the quadratic at the minimum.

    Returns:
        A figure with a panel for each function; a dotted line is the limit of the method in its colour.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2.35 * len(grids), 2.7))
        panels = np.ravel(figure.subplots(1, len(grids), sharey=True))
        for axes, (title, grid) in zip(panels, grids.items(), strict=True):
            for name, parts in grid["diverged"].items():
                axes.axvline(grid["limits"][name], color=METHODS[name]["color"], linewidth=1, linestyle=":")
                axes.plot(grid["rates"], 100 * np.array(parts), marker="o", markersize=3, label=name, **METHODS[name])
            axes.set(title=title, xlabel="learning rate", xscale="log", ylim=(-4, 104))
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        panels[0].set_ylabel("seeds that diverge [%]")
        _legend(
            figure, next(iter(grids.values()))["diverged"], Line2D([], [], color="0.4", linestyle=":", label="theory")
        )
    return figure


def _draw_map(axes: Axes, title: str) -> None:
    function, minimum, (left, right, bottom, top) = LANDSCAPES[title]
    x, y = torch.meshgrid(torch.linspace(left, right, 160), torch.linspace(bottom, top, 120), indexing="xy")
    heights = torch.func.vmap(torch.func.vmap(function))(torch.stack([x, y], -1))
    axes.contour(x, y, heights, levels=np.logspace(-2.5, 3, 12), colors="0.72", linewidths=0.7)
    axes.plot(*minimum, "*", color="0.1", markersize=11, zorder=4)
    axes.set(title=title, xlabel="x", ylabel="y", xlim=(left, right), ylim=(bottom, top))
    axes.grid(visible=False)


def _legend(figure: Figure, methods: Sequence[str], *more: Line2D) -> None:
    handles = [Line2D([], [], label=name, color=METHODS[name]["color"], linewidth=1.8) for name in methods]
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=len(handles) + len(more))


def _gif(images: list[Image.Image], colors: Sequence[str], milliseconds: int = 120, pause: int = 2500) -> bytes:
    # One palette for all frames, so that what stands still is stored once: black and the colours, each faded to white.
    shades = [1 - share * (1 - np.array(to_rgb(color))) for color in colors for share in np.linspace(0, 1, 12)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.uint8(np.round(255 * np.array(shades))).tobytes())
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times = [milliseconds] * (len(frames) - 1) + [pause]
    buffer = io.BytesIO()
    frames[0].save(buffer, "gif", save_all=True, append_images=frames[1:], duration=times, loop=0)
    return buffer.getvalue()
