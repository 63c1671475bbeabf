"""The figure of one training: the curves that ``python -m fwdlib train`` draws beside its record."""

from __future__ import annotations

from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure

from fwdlib.plotting import CURVES, plain_ticks, styled


@styled
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
    figure = Figure(figsize=(8, 3.2))
    loss, accuracy = figure.subplots(1, 2)
    curves = (("train_loss", "training, mean over the epoch", "--"), ("test_loss", "test", "-"))
    for (name, label, linestyle), color in zip(curves, CURVES, strict=False):
        values = [float(row[name]) for row in epochs]
        loss.plot(where, values, color=color, linestyle=linestyle, marker=marker, label=label)
    loss.set(title="Loss", xlabel="epoch", ylabel="mean cross entropy [nats]", yscale="log")
    plain_ticks(loss)
    loss.legend()
    accuracy.plot(where, [100 * row["test_accuracy"] for row in epochs], color=CURVES[1], marker=marker)
    end = f"Test accuracy, {100 * epochs[-1]['test_accuracy']:.2f} % at the end"
    accuracy.set(title=end, xlabel="epoch", ylabel=f"correct of {record['num_test']} [%]")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    title = f"{settings['train_mode']} on {settings['dataset']}, {record['network']}, {settings['optimizer']} "
    figure.suptitle(f"{title}{settings['lr']:g}, one seed ({settings['seed']})", fontsize=9)
    return figure
