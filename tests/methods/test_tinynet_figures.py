"""What is drawn: the number of panels and lines, their data, labels and units; not what it looks like."""

import math

import pytest

from fwdlib.methods.tinynet_figures import plot_derivatives, plot_epochs_until, plot_validation
from fwdlib.plotting import CURVES


def make_derivatives():
    return {"central differences": [1.0, 0.42], "tinynet": [1.0, 0.43], "theirs": [1.0, 0.5]}


def make_validation():
    seeds = {"loss": [[500, 30], [480, 40], [490, 50]], "errors": [[500, 20], [400, 30], [450, 40]]}
    return {
        "own": {"epochs": [1, 100], "way": [0.02, 2.0]} | seeds,
        "divided": {"epochs": [1, 100], "way": [0.0004, 0.04]} | seeds,
    }


def test_derivatives_are_lines_and_finite_differences_dots(drawn):
    figure = drawn(plot_derivatives, {"Sigmoid": make_derivatives(), "Tanh": make_derivatives()}, [0.0, 1.0])
    for axes, title in zip(figure.axes, ("Sigmoid", "Tanh"), strict=True):
        assert axes.get_title(loc="left") == title
        dots, *lines = axes.lines
        assert (dots.get_marker(), dots.get_linestyle(), list(dots.get_ydata())) == ("o", "None", [1.0, 0.42])
        assert [list(line.get_ydata()) for line in lines] == [[1.0, 0.43], [1.0, 0.5]]
        assert [line.get_color() for line in lines] == list(CURVES[:2])
    assert [text.get_text() for text in figure.legends[0].texts] == list(make_derivatives())


def test_finite_differences_of_many_points_are_thinned_out():
    where = [i / 100 for i in range(1000)]
    dots, line = plot_derivatives({"Tanh": {"measured": where, "exact": where}}, where).axes[0].lines
    assert len(dots.get_xdata()) < 30 < len(line.get_xdata()) == 1000
    assert list(dots.get_xdata()) == list(dots.get_ydata())


def test_validation_has_medians_by_epoch_and_by_way(drawn):
    figure = drawn(plot_validation, make_validation(), 1000, "squared error")
    accuracy, by_epoch, by_way = figure.axes
    assert [list(line.get_xdata()) for line in by_epoch.lines] == [[1, 100], [1, 100]]
    assert [list(line.get_xdata()) for line in by_way.lines] == [[0.02, 2.0], [0.0004, 0.04]]
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([55.0, 97.0])  # percent right, medians
    assert list(by_way.lines[1].get_ydata()) == [490, 40]
    assert [len(axes.collections) for axes in figure.axes] == [2, 2, 2]  # bands
    assert accuracy.get_ylabel() == "correct of 1000 [%]"
    assert [axes.get_ylabel() for axes in (by_epoch, by_way)] == ["squared error"] * 2
    assert [axes.get_xlabel() for axes in (accuracy, by_epoch)] == ["epoch", "epoch"]
    assert by_way.get_xlabel() == "learning rate \N{MULTIPLICATION SIGN} steps"
    assert [text.get_text() for text in figure.legends[0].texts] == ["own", "divided"]


def test_epochs_until_a_goal_have_a_median_where_there_is_one_and_count_who_never_reached_it(drawn):
    rows = {"own": [30, 40, 50, 60, 70, 80], "divided": [900] + [math.inf] * 5}
    (axes,) = drawn(plot_epochs_until, rows, 1001, "95 %").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    (median,) = [line for line in axes.lines if line.get_marker() == "D"]
    assert (median.get_xdata()[0], median.get_ydata()[0]) == (55, 0)
    assert [text.get_text() for text in axes.texts] == ["5 never"]
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 6 + 1 + 1  # those that reached it, and an arrow
    assert axes.get_xlabel() == "epochs, of 1001"
