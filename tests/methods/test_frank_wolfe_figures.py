"""What is drawn: the number of panels and lines, their data, labels and units; not what it looks like."""

import numpy as np
import pytest

from fwdlib.methods.frank_wolfe_figures import VARIANTS, plot_decay, plot_paths, plot_reach, plot_sparsity


def make_decay(*names):
    return {name: np.array([[1.0, 0.5], [1.0, 0.1], [1.0, 0.2]]) for name in names}


def make_sweep():
    return {10.0: [(0.02, 0.6), (0.04, 0.7)], 100.0: [(0.05, 0.8), (0.05, 0.9)]}


def test_decay_is_a_median_in_a_band_and_zero_is_left_out(drawn):
    solved = {"exact gradient": np.array([[1.0, 0.0]] * 3)}
    balls = {"l1": make_decay("plain", "averaged"), "l2": make_decay("plain") | solved}
    figure = drawn(plot_decay, balls, [10, 100], "gap")
    first, second = figure.axes
    assert [list(line.get_ydata()) for line in first.lines] == [[1.0, 0.2]] * 2
    assert list(first.lines[0].get_xdata()) == [10, 100]
    assert [line.get_color() for line in first.lines] == [VARIANTS[name]["color"] for name in ("plain", "averaged")]
    band = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.1, 1.0)
    assert np.isnan(second.lines[1].get_ydata()[1])
    assert (first.get_ylabel(), first.get_xscale(), first.get_yscale()) == ("gap", "log", "log")
    assert [text.get_text() for text in figure.legends[0].texts] == ["plain", "averaged", "exact gradient"]
    already = {"exact gradient": np.zeros((3, 2))} | make_decay("plain")  # solved before it is looked at
    assert len(plot_decay({"l2": already}, [10, 100], "gap").axes[0].lines) == 1


def test_paths_lie_in_the_ball_with_goal_and_optimum(drawn):
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.4]])
    paths = {"exact gradient": points, "plain, one tangent": points}
    figure = drawn(plot_paths, paths, [1.2, 0.8], [0.7, 0.3])
    for axes, name in zip(figure.axes, VARIANTS, strict=False):
        path, goal, optimum = axes.lines
        assert path.get_xydata().tolist() == points.tolist()
        assert path.get_color() == VARIANTS[name]["color"]
        assert (goal.get_xydata().tolist(), optimum.get_xydata().tolist()) == ([[1.2, 0.8]], [[0.7, 0.3]])
        assert axes.get_aspect() == 1


def test_reach_has_the_theory_and_the_spread_of_the_seeds(drawn):
    ends = {"plain": np.array([[0.1, 0.2], [0.1, 0.3], [0.1, 0.1]]), "averaged": np.ones((3, 2))}
    figure = drawn(plot_reach, [0.1, 2.0], ends, 0.2)
    (axes,) = figure.axes
    best, theory = axes.lines[:2]
    assert (best.get_ydata().max(), theory.get_ydata().max()) == (1.0, 0.2)
    plain, averaged = axes.containers
    assert list(plain.lines[0].get_ydata()) == [0.1, 0.2]
    np.testing.assert_allclose(plain.lines[2][0].get_segments()[1][:, 1], [0.1, 0.3])
    labels = ["the optimum", "theory for plain", "plain", "averaged"]
    assert [text.get_text() for text in figure.legends[0].texts] == labels
    assert list(averaged.lines[0].get_ydata()) == [1.0, 1.0]


def test_sparsity_has_lines_through_the_means_over_radius_and_over_share(drawn):
    curves = {"backprop": make_sweep() | {None: [(0.7, 0.92)]}, "activity": make_sweep()}
    figure = drawn(plot_sparsity, curves, "parameters", 1000)
    over_radius, over_share = figure.axes
    np.testing.assert_allclose(over_radius.lines[0].get_xydata(), [[10.0, 65.0], [100.0, 85.0]])  # percent
    np.testing.assert_allclose(over_share.lines[0].get_xydata(), [[3.0, 65.0], [5.0, 85.0]])
    assert over_share.collections[0].get_offsets().tolist() == [[2.0, 60.0], [4.0, 70.0]]
    assert [sum(len(dots.get_offsets()) for dots in axes.collections) for axes in figure.axes] == [8, 8]
    (star,) = [line.get_xydata()[0] for line in over_share.lines if line.get_marker() == "*"]
    assert star.tolist() == pytest.approx([70.0, 92.0])
    assert over_radius.get_ylabel() == "correct of 1000 [%]"
    assert [axes.get_xlabel() for axes in figure.axes] == ["radius of the ball", "parameters [%]"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["backprop", "activity", "no constraint"]
