"""What is drawn: the number of panels and lines, their data, labels and units; not what it looks like."""

import pytest

from fwdlib.methods.stability_figures import plot_divergence, plot_growth
from fwdlib.plotting import METHOD_STYLES

LIMITS = {"backprop": 0.04, "forward gradient": 0.01}


def make_growth():
    rows = [{"rate": r, "mean": 1 - r, "error": 0.01, "typical": 1 - 2 * r} for r in (0.1, 0.2)]
    return rows, [0.0, 0.5], {"backprop": [1.0, 0.0], "mean": [1.0, 2.0], "typical": [1.0, 0.5]}


def make_grid():
    diverged = {"backprop": [0.0, 1.0], "forward gradient": [0.25, 1.0]}
    return {"rates": [0.01, 0.1], "diverged": diverged, "limits": LIMITS}


def test_growth_has_the_theory_as_lines_and_five_standard_errors(drawn):
    (axes,) = drawn(plot_growth, *make_growth()).axes
    named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(named["forward gradient,\nmean of the runs"].get_ydata()) == [1.0, 2.0]
    assert list(named["forward gradient,\ntypical run"].get_ydata()) == [1.0, 0.5]
    assert named["backprop"].get_color() == METHOD_STYLES["backprop"]["color"]
    bars = axes.collections[0].get_segments()
    assert [bar[1, 1] - bar[0, 1] for bar in bars] == pytest.approx([0.1, 0.1])
    assert [list(line.get_ydata()) for line in axes.lines if line.get_markerfacecolor() == "white"] == [[0.8, 0.6]]


def test_divergence_has_a_panel_for_each_function_with_the_limits_of_both_methods(drawn):
    figure = drawn(plot_divergence, {"Beale": make_grid(), "sphere": make_grid()})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Beale", "sphere"]
    at_limit, backprop, forward_limit, forward = figure.axes[0].lines
    assert list(backprop.get_ydata()) == [0.0, 100.0]
    assert list(forward.get_ydata()) == [25.0, 100.0]
    assert [at_limit.get_xdata()[0], forward_limit.get_xdata()[0]] == [0.04, 0.01]
    assert figure.axes[0].get_ylabel() == "seeds that diverge [%]"
