"""What is drawn: the number of panels and lines, their data, labels and units; not what it looks like."""

import math

import numpy as np

from fwdlib.methods.tangents_figures import plot_closed_forms, plot_dimensions, plot_values
from fwdlib.plotting import METHOD_STYLES


def make_forms():
    return {"projection": ([0.25, 1e-30], lambda k: 1 - k / 4), "forward gradient, signs": ([4, 1], lambda k: 4 / k)}


def make_ends(*values):
    return {4: values, 2: [1.0, 3.0, 2.0]}


def test_closed_forms_are_lines_and_what_was_measured_dots(drawn):
    figure = drawn(plot_closed_forms, {"error": make_forms(), "length": make_forms()}, [1, 4], "relative")
    first, second = figure.axes
    theory, measured, _, hollow = first.lines
    assert theory.get_ydata()[0] == 0.75
    assert np.isnan(theory.get_ydata()[-1])  # zero has no place on a logarithmic axis
    assert measured.get_ydata()[0] == 0.25
    assert np.isnan(measured.get_ydata()[1])
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([1, 4], [4, 1])
    assert (measured.get_markerfacecolor(), hollow.get_markerfacecolor()) == (
        METHOD_STYLES["projection"]["color"],
        "white",
    )
    assert [text.get_text() for text in figure.legends[0].texts] == [*make_forms(), "closed form"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "4"]
    assert (first.get_ylabel(), second.get_xlabel()) == ("relative", "tangents K")


def test_values_are_a_median_in_the_range_of_the_seeds(drawn):
    seeds = np.array([[4.0, 1.0, 0.0], [4.0, 3.0, math.inf], [4.0, 2.0, 1e-9]])
    curves = {"backprop": np.array([[4.0, 1.0, 0.5]]), "projection, K = 4": seeds, "projection, K = 8": seeds}
    figure = drawn(plot_values, {"sphere": curves}, "f", floor=1e-6)
    (axes,) = figure.axes
    _, few, many = axes.lines
    assert list(few.get_ydata()[:2]) == [4.0, 2.0]
    assert np.isnan(few.get_ydata()[2])  # below the floor
    assert few.get_linestyle() != many.get_linestyle()
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1.0, 4.0)
    assert [text.get_text() for text in figure.legends[0].texts] == ["backprop", "projection", "K = 4", "K = 8"]
    assert (axes.get_ylabel(), axes.get_yscale()) == ("f", "log")


def test_dimensions_are_in_order_with_the_range_of_the_seeds_and_without_what_diverged(drawn):
    ends = {"backprop": make_ends(math.inf, math.inf, math.inf), "projection, K = 4": make_ends(0.0, 1.0, math.inf)}
    figure = drawn(plot_dimensions, {"sphere": ends}, "f", floor=1e-3)
    (axes,) = figure.axes
    backprop, projection = axes.lines
    assert list(projection.get_xdata()) == [2, 4]
    assert list(projection.get_ydata()) == [2.0, 1.0]
    assert np.isnan(backprop.get_ydata()[1])
    ranges = axes.collections[1].get_segments()
    assert [segment[:, 1].tolist() for segment in ranges] == [[1.0, 3.0], [1e-3, 1.0]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["backprop", "projection", "K = 4"]
