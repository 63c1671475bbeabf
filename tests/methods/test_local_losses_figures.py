"""What is drawn of local losses: panels, values, units; what is exact is shown and not lost on a logarithmic axis."""

import pytest

from fwdlib.methods.local_losses_figures import plot_groups, plot_heads

ROWS = [
    {"units": 1, "measured": 1e-16, "predicted": 0.0, "errors": [0.05, 0.07]},
    {"units": 4, "measured": 1.1, "predicted": 1.0, "errors": [0.1, 0.12]},
    {"units": 16, "measured": 2.1, "predicted": 2.0, "errors": [0.2, 0.3]},
]


def test_noise_and_error_over_the_size_of_the_groups(drawn):
    noise, error = drawn(plot_groups, ROWS, {"LG-BP": [0.04, 0.06]}).axes
    theory, measured, exact = noise.lines
    assert list(theory.get_ydata()) == [1.0, 2.0]
    assert list(measured.get_xdata()) == [4, 16]
    assert list(exact.get_xdata()) == [1]
    assert 0 < exact.get_ydata()[0] < 1.0
    mean = next(line for line in error.lines if line.get_label() == "LG-FG-A")
    assert list(mean.get_ydata()) == pytest.approx([6, 11, 25])
    reference = next(line for line in error.lines if line.get_label() == "LG-BP")
    assert reference.get_ydata()[0] == pytest.approx(5)
    assert [text.get_text() for text in error.get_xticklabels()] == ["1", "4", "16"]


def test_heads_have_a_line_for_each_method(drawn):
    (axes,) = drawn(plot_heads, {"LG-BP": [0.9, 0.95], "LG-FG-A": [0.8, 0.9]}).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([90, 95]), pytest.approx([80, 90])]
    assert axes.get_ylabel().endswith("[%]")
