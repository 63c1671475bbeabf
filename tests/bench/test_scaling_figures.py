"""What is drawn of measured and modelled steps."""

from __future__ import annotations

import pytest

from fwdlib.bench import scaling
from fwdlib.bench.scaling_figures import UNLIMITED, plot_links, plot_processes


def row(count, megabits, factor=1.0):
    seconds = [0.010, 0.011, 0.012, 0.011, 0.010, 0.013]
    methods = {
        name: {"seconds": [factor * s for s in seconds], "alone": seconds, "bytes": 100, "segments": 3}
        for name in scaling.NUM_TANGENTS
    }
    return {"count": count, "megabits": megabits, "methods": methods, "exchange": [1e-3], "num_params": 10**6}


ROWS = [row(1, None), row(2, None), row(2, 10, 100), row(2, 100, 10), row(4, None, 2), row(4, 100, 20)]


def test_a_panel_for_each_number_of_processes_with_a_dot_for_each_link_and_lines_by_the_model(drawn):
    two, four = drawn(plot_links, ROWS, scaling.predictions(ROWS)).axes
    assert [axes.get_title("left") for axes in (two, four)] == ["2 processes", "4 processes"]
    assert [label.get_text() for label in two.get_xticklabels()] == ["10", "100", UNLIMITED]
    medians = sorted({round(bar.lines[0].get_ydata()[0], 6) for bar in two.containers})
    assert medians == [11.0, 110.0, 1100.0]  # ms: an even number of rounds has the mean of the middle two
    lines = [line for line in two.get_lines() if len(line.get_xdata()) == 2]
    assert len(lines) >= len(scaling.NUM_TANGENTS)


def test_what_has_few_rounds_gets_a_bar_from_the_least_to_the_most():
    few = [each | {"methods": {n: m | {"seconds": [0.01, 0.03]} for n, m in each["methods"].items()}} for each in ROWS]
    (bar, *_) = plot_links(few, {}).axes[0].containers
    (low, high), *_ = [segment[:, 1] for segment in bar.lines[2][0].get_segments()]
    assert (low, high) == pytest.approx((10.0, 30.0))


def test_on_paper_a_panel_for_each_rate(drawn):
    panels = drawn(plot_processes, scaling.on_paper(ROWS, (10, 100), (1, 100), 1e-4)).axes
    assert [axes.get_title("left") for axes in panels] == ["1 Gbit/s", "100 Gbit/s"]
    assert all(len(axes.get_lines()) == len(scaling.NUM_TANGENTS) for axes in panels)
