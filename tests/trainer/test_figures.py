"""What is drawn of one training: curves, units, the seed."""

import pytest

from fwdlib.trainer.figures import plot_epochs


def make_experiment(num_epochs=3):
    rows = [
        {"epoch": i, "train_loss": 1 / i, "test_loss": 2 / i if i < 3 else "inf", "test_accuracy": 1 - 0.5 / i}
        for i in range(1, num_epochs + 1)
    ]
    settings = {"train_mode": "FDFA", "dataset": "MNIST", "optimizer": "Adam", "lr": 1e-4, "seed": 3}
    return {"settings": settings, "network": "2x800", "num_test": 10_000, "epochs": rows}


@pytest.mark.parametrize("num_epochs", [1, 2, 100])
def test_epochs_have_losses_and_accuracy_with_units_and_the_seed(num_epochs, drawn):
    figure = drawn(plot_epochs, make_experiment(num_epochs))
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines] == ["training, mean over the epoch", "test"]
    assert all(len(line.get_xdata()) == num_epochs for line in (*loss.lines, *accuracy.lines))
    assert loss.lines[0].get_ydata()[0] == 1.0
    assert accuracy.lines[0].get_ydata()[0] == 50.0
    assert (loss.get_ylabel(), loss.get_yscale()) == ("mean cross entropy [nats]", "log")
    assert accuracy.get_ylabel() == "correct of 10000 [%]"
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch"]
    assert figure.get_suptitle() == "FDFA on MNIST, 2x800, Adam 0.0001, one seed (3)"
