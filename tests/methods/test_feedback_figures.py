"""What is drawn: the number of panels and lines, their data, labels and units; not what it looks like."""

import pytest

from fwdlib.methods.feedback_figures import plot_cosines, plot_test_errors
from fwdlib.plotting import CURVES, METHOD_STYLES


def make_cosines(*values):
    return [{"step": 10 * i, "first": value, "second": 1.0} for i, value in enumerate(values)]


def test_cosines_have_a_panel_for_each_title_and_one_legend(drawn):
    runs = {"FDFA": make_cosines(0.1, 0.9), "mean Jacobian": make_cosines(-0.4, 0.95)}
    figure = drawn(plot_cosines, runs, ["first", "second"])
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["first", "second"]
    assert [list(line.get_ydata()) for line in first.lines] == [[0.1, 0.9], [-0.4, 0.95]]
    assert [list(line.get_xdata()) for line in second.lines] == [[0, 10]] * 2
    assert first.get_ylim()[0] < -0.4 < -0.05 < second.get_ylim()[0]
    assert first.lines[0].get_color() == METHOD_STYLES["FDFA"]["color"]
    assert [text.get_text() for text in figure.legends[0].texts] == list(runs)


def test_cosines_of_what_is_no_method_have_colours_of_their_own():
    runs = {f"rate {i}": make_cosines(0.1, 0.9) for i in range(4)}
    (axes,) = plot_cosines(runs, ["first"]).axes
    assert [line.get_color() for line in axes.lines] == list(CURVES)


def test_errors_have_a_panel_for_each_study_and_a_thick_line_for_each_method(drawn):
    seeds = [[0.9, 0.05, 0.02], [0.9, 0.07, 0.04]]
    figure = drawn(plot_test_errors, {"MNIST": {"backprop": seeds, "FDFA": seeds[:1]}, "digits": {"FDFA": seeds}})
    first, second = figure.axes
    assert [axes.get_title(loc="left") or axes.get_title() for axes in (first, second)] == ["MNIST", "digits"]
    named = {line.get_label(): line for line in first.get_lines() if not line.get_label().startswith("_")}
    assert list(named) == ["backprop", "FDFA"]
    assert named["backprop"].get_ydata() == pytest.approx([6.0, 3.0])  # percent, the mean; without the untrained model
    assert list(named["backprop"].get_xdata()) == [1, 2]
    assert len(first.get_lines()) == 3 + 2
