"""Figures of descents on test functions: values, paths on a map of the function, and the same paths in motion.

They draw plain data, as it is saved: title of a function -> method -> ``steps`` (T,), ``values`` (R, T) and ``paths``
(R, T, 2) of R seeds, as :meth:`fwdlib.methods.minimise.Descent.thinned` returns them, and ``seconds``, the time of a
step.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fwdlib.checks import check_count
from fwdlib.methods.functions import beale, rosenbrock
from fwdlib.plotting import draw_band, handles_of, legend_below, panels, plain_ticks, style_of, styled

Descents = dict[str, dict[str, dict[str, Any]]]


class Map(NamedTuple):
    """A function of two numbers, and the part of the plane to show."""

    function: Callable[[Tensor], Tensor]
    minimum: tuple[float, float]
    window: tuple[float, float, float, float]
    """Left, right, bottom, top."""


MAPS = {
    "Beale": Map(beale, (3.0, 0.5), (-0.6, 3.6, -0.6, 1.1)),
    "Rosenbrock": Map(rosenbrock, (1.0, 1.0), (-1.3, 1.5, -0.7, 1.4)),
}


@styled
def plot_descents(descents: Descents) -> Figure:
    """Draw the value of each function over the iterations and over the seconds that they took.

    Args:
        descents: see the module; the paths are not used.

    Returns:
        A figure with a row of two panels for each function: the median over the seeds, a band with the middle half, and
        each seed as a thin line. All axes are logarithmic, so the value at the start is not drawn.
    """
    figure = Figure(figsize=(8, 0.3 + 2.4 * len(descents)))
    for row, (title, methods) in zip(figure.subplots(len(descents), 2, squeeze=False), descents.items(), strict=True):
        for name, found in methods.items():
            steps, values = np.array(found["steps"])[1:], np.array(found["values"], dtype=float)[:, 1:]
            band, style = np.quantile(values, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf"), style_of(name)
            for axes, x in zip(row, (steps, steps * found["seconds"]), strict=True):
                axes.plot(x, values.T, color=style["color"], linewidth=0.4, alpha=0.25)
                draw_band(axes, x, band, style, label=name)
        for axes, unit in zip(row, ("iteration", "time spent in steps [s]"), strict=True):
            axes.set(xlabel=unit, ylabel="value of f", xscale="log", yscale="log", title=title)
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            plain_ticks(axes)
    legend_below(figure, *row[0].get_legend_handles_labels())
    return figure


@styled
def plot_paths(descents: Descents) -> Figure:
    """Draw the paths of the descents on the contour lines of their functions, a line for each seed.

    Args:
        descents: see the module; titles of :data:`MAPS`, and of each method only ``paths``.

    Returns:
        A figure with a panel for each function. A ring is the start, a star the minimum.
    """
    figure = Figure(figsize=(0.6 + 4.2 * len(descents), 3.5))
    for axes, title, methods in panels(figure, descents):
        _draw_map(axes, title)
        for name, found in reversed(methods.items()):  # backprop, the first, on top
            paths = np.array(found["paths"], dtype=float)
            width = 1.8 if len(paths) == 1 else 0.7
            axes.plot(*paths.T, color=style_of(name)["color"], linewidth=width, alpha=0.9)
        axes.plot(*paths[0, 0], "o", color="0.2", markersize=7, markerfacecolor="none")
    legend_below(figure, handles_of(methods, linewidth=1.8))
    return figure


@styled
def animate_paths(descents: Descents, num_frames: int = 40) -> bytes:
    """Draw the descents in motion: where each seed is, and its path so far.

    The result is an animated GIF, which plays in any ``<img>``: in Jupyter, and in a page without scripts.

    Args:
        descents: see the module; titles of :data:`MAPS`, and of each method only ``steps`` and ``paths``.
        num_frames: how many, evenly spaced in the records; equal ones become one.

    Returns:
        The file; the same descents give the same bytes.

    Raises:
        ValueError: if there are less than 2 frames.
    """
    check_count("num_frames", num_frames, minimum=2)
    figure = Figure(figsize=(0.4 + 3.9 * len(descents), 3.2), dpi=72)
    canvas, moving = FigureCanvasAgg(figure), []
    for axes, title, methods in panels(figure, descents):
        _draw_map(axes, title)
        for name, found in reversed(methods.items()):
            look = {"color": style_of(name)["color"], "marker": "o", "markersize": 5}
            look["linewidth"] = 1.8 if len(found["paths"]) == 1 else 0.8
            for path in np.array(found["paths"], dtype=float):
                (line,) = axes.plot(*path[:1].T, **look, markevery=[-1], markeredgecolor="white", alpha=0.9)
                moving.append((axes, line, path, title, found["steps"]))
    legend_below(figure, handles_of(methods, linewidth=1.8))
    images = _frames(figure, canvas, moving, num_frames)
    return _gif(images, ["black", *(style_of(name)["color"] for name in methods)])


def _frames(figure: Figure, canvas: FigureCanvasAgg, moving: list[tuple], num_frames: int) -> list[Image.Image]:
    canvas.draw()
    figure.set_layout_engine("none")  # laid out once, so that nothing jumps
    for axes, line, _, title, _ in moving:  # what does not move is drawn once, too
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
    return images


def _gif(images: list[Image.Image], colors: Sequence[str]) -> bytes:
    # One palette for all frames, so that what does not move is stored once: black and the colours, each faded to white.
    shades = [1 - share * (1 - np.array(to_rgb(color))) for color in colors for share in np.linspace(0, 1, 12)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.uint8(np.round(255 * np.array(shades))).tobytes())
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times = [120] * (len(frames) - 1) + [2500]  # milliseconds
    buffer = io.BytesIO()
    frames[0].save(buffer, "gif", save_all=True, append_images=frames[1:], duration=times, loop=0)
    return buffer.getvalue()


def _draw_map(axes: Axes, title: str) -> None:
    function, minimum, (left, right, bottom, top) = MAPS[title]
    x, y = torch.meshgrid(torch.linspace(left, right, 160), torch.linspace(bottom, top, 120), indexing="xy")
    heights = torch.func.vmap(torch.func.vmap(function))(torch.stack([x, y], -1))
    axes.contour(x, y, heights, levels=np.logspace(-2.5, 3, 12), colors="0.72", linewidths=0.7)
    axes.plot(*minimum, "*", color="0.1", markersize=11, zorder=4)
    axes.set(title=title, xlabel="x", ylabel="y", xlim=(left, right), ylim=(bottom, top))
    axes.grid(visible=False)
