"""What is drawn: the number of panels and lines, their data, labels, stamps; not what it looks like."""

import io

import matplotlib as mpl
import pytest

from fwdlib.beyond.figures import plot_accuracies, plot_cosines, plot_epochs
from fwdlib.plotting import CURVES, METHODS, STYLE


def make_experiment(num_epochs=3):
    rows = [
        {"epoch": i, "train_loss": 1 / i, "test_loss": 2 / i if i < 3 else "inf", "test_accuracy": 1 - 0.5 / i}
        for i in range(1, num_epochs + 1)
    ]
    settings = {"train_mode": "FDFA", "dataset": "MNIST", "optimizer": "Adam", "lr": 1e-4, "seed": 3}
    return {"settings": settings, "network": "2x800", "num_test": 10_000, "epochs": rows}


def make_cosines(*values):
    return [{"step": 10 * i, "first": value, "second": 1.0} for i, value in enumerate(values)]


def figures():
    return {
        "epochs": lambda: plot_epochs(make_experiment()),
        "cosines": lambda: plot_cosines({"FDFA": make_cosines(0.1, 0.9)}, ["first", "second"]),
        "accuracies": lambda: plot_accuracies({"MNIST": {"backprop": [[0.9, 0.05, 0.02]]}}),
    }


def svg(figure):
    file = io.BytesIO()
    with mpl.style.context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


@pytest.mark.parametrize("name", figures())
def test_every_figure_is_drawn_twice_byte_for_byte_alike(name):
    draw = figures()[name]
    assert svg(draw()) == svg(draw())


@pytest.mark.parametrize("name", figures())
def test_drawing_leaves_the_user_s_style_alone(name):
    before = dict(mpl.rcParams)
    figures()[name]().canvas.draw()
    assert dict(mpl.rcParams) == before


def test_cosines_have_a_panel_for_each_title_and_one_legend():
    runs = {"FDFA": make_cosines(0.1, 0.9), "mean Jacobian": make_cosines(-0.4, 0.95)}
    figure = plot_cosines(runs, ["first", "second"])
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["first", "second"]
    assert [list(line.get_ydata()) for line in first.lines] == [[0.1, 0.9], [-0.4, 0.95]]
    assert [list(line.get_xdata()) for line in second.lines] == [[0, 10]] * 2
    assert first.get_ylim()[0] < -0.4 < -0.05 < second.get_ylim()[0]
    assert first.lines[0].get_color() == METHODS["FDFA"]["color"]
    assert [text.get_text() for text in figure.legends[0].texts] == list(runs)


def test_cosines_of_what_is_no_method_have_colours_of_their_own():
    runs = {f"rate {i}": make_cosines(0.1, 0.9) for i in range(4)}
    (axes,) = plot_cosines(runs, ["first"]).axes
    assert [line.get_color() for line in axes.lines] == list(CURVES)


@pytest.mark.parametrize("num_epochs", [1, 2, 100])
def test_epochs_have_losses_and_accuracy_with_units_and_the_seed(num_epochs):
    figure = plot_epochs(make_experiment(num_epochs))
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines] == ["training, mean over the epoch", "test"]
    assert all(len(line.get_xdata()) == num_epochs for line in (*loss.lines, *accuracy.lines))
    assert loss.lines[0].get_ydata()[0] == 1.0
    assert accuracy.lines[0].get_ydata()[0] == 50.0
    assert (loss.get_ylabel(), loss.get_yscale()) == ("mean cross entropy [nats]", "log")
    assert accuracy.get_ylabel() == "correct of 10000 [%]"
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch"]
    assert figure.get_suptitle() == "FDFA on MNIST, 2x800, Adam 0.0001, one seed (3)"
    svg(figure)


def test_accuracies_have_a_panel_for_each_study_and_a_thick_line_for_each_method():
    seeds = [[0.9, 0.05, 0.02], [0.9, 0.07, 0.04]]
    figure = plot_accuracies({"MNIST": {"backprop": seeds, "FDFA": seeds[:1]}, "digits": {"FDFA": seeds}})
    first, second = figure.axes
    assert [axes.get_title(loc="left") or axes.get_title() for axes in (first, second)] == ["MNIST", "digits"]
    named = {line.get_label(): line for line in first.get_lines() if not line.get_label().startswith("_")}
    assert list(named) == ["backprop", "FDFA"]
    assert named["backprop"].get_ydata() == pytest.approx([6.0, 3.0])  # percent, the mean; without the untrained model
    assert list(named["backprop"].get_xdata()) == [1, 2]
    assert len(first.get_lines()) == 3 + 2
