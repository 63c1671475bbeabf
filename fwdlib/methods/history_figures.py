"""Figures that compare the training of several methods: the histories of :func:`fwdlib.training.train` in."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fwdlib.history import History, Run
from fwdlib.plotting import legend_below, plain_ticks, style_of, styled


@styled
def plot_histories(histories: dict[str, History]) -> Figure:
    """Draw training loss and test error of several methods over the steps: the mean over the seeds, and each seed.

    Args:
        histories: method -> its runs, all of the same length. A method in another form (``"FG-CV, no feedback"``) is
            dotted.

    Returns:
        A figure with two panels; each seed is a thin line. The value before the first step is not drawn.
    """
    figure = Figure(figsize=(8, 3.4))
    loss, error = figure.subplots(1, 2)
    for name, history in histories.items():
        style = style_of(name) | ({"linestyle": ":"} if ", " in name else {})
        steps = steps_of(history.runs[0])
        losses = np.array([run.train_loss[1:] for run in history.runs])
        errors = 100 / history.num_test * np.array([run.test_errors[1:] for run in history.runs])
        for axes, values in ((loss, losses), (error, errors)):
            draw_mean(axes, steps, values, style, label=name)
    history = next(iter(histories.values()))
    seeds = f"{len(history.runs)} seeds" if len(history.runs) > 1 else "one seed"
    loss.set(title=f"Training loss, {seeds}", ylabel="mean cross entropy [nats]")
    error.set(title=f"Test error, {seeds}", ylabel=f"wrong of {history.num_test} [%]")
    for axes in (loss, error):
        axes.set(xlabel="iteration (optimizer steps)", yscale="log")
        plain_ticks(axes)
    legend_below(figure, *loss.get_legend_handles_labels())
    return figure


def draw_mean(axes: Axes, where: np.ndarray, seeds: np.ndarray, style: dict[str, Any], **options: Any) -> None:
    """Draw the mean of the rows of ``seeds``, and each row as a thin line."""
    axes.plot(where, seeds.T, **style | {"linestyle": "-", "linewidth": 0.5, "alpha": 0.4})
    axes.plot(where, seeds.mean(0), **style, **options)


def steps_of(run: Run) -> np.ndarray:
    """Return the steps after which the values of a run were taken, without the value before the first step."""
    return np.minimum(run.every * np.arange(1, len(run.train_loss)), run.iterations)
