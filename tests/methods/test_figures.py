"""What is drawn: the number of panels and lines, their data, labels, stamps; not what it looks like."""

import io
import math

import matplotlib as mpl
import numpy as np
import pytest

from fwdlib.methods.figures import (
    FORMS,
    plot_accuracies,
    plot_arrivals,
    plot_closed_forms,
    plot_cosines,
    plot_decay,
    plot_derivatives,
    plot_dimensions,
    plot_epochs,
    plot_paths,
    plot_reach,
    plot_sparsity,
    plot_validation,
    plot_values,
)
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


def make_derivatives():
    return {"central differences": [1.0, 0.42], "tinynet": [1.0, 0.43], "theirs": [1.0, 0.5]}


def make_validation():
    seeds = {"loss": [[500, 30], [480, 40], [490, 50]], "errors": [[500, 20], [400, 30], [450, 40]]}
    return {
        "own": {"epochs": [1, 100], "way": [0.02, 2.0]} | seeds,
        "divided": {"epochs": [1, 100], "way": [0.0004, 0.04]} | seeds,
    }


def make_decay(*names):
    return {name: np.array([[1.0, 0.5], [1.0, 0.1], [1.0, 0.2]]) for name in names}


def make_sweep():
    return {10.0: [(0.02, 0.6), (0.04, 0.7)], 100.0: [(0.05, 0.8), (0.05, 0.9)]}


def make_forms():
    return {"projection": ([0.25, 1e-30], lambda k: 1 - k / 4), "forward gradient, signs": ([4, 1], lambda k: 4 / k)}


def make_ends(*values):
    return {4: values, 2: [1.0, 3.0, 2.0]}


def figures():
    return {
        "closed forms": lambda: plot_closed_forms({"error": make_forms()}, [1, 4], "relative"),
        "values": lambda: plot_values({"sphere": {"backprop": np.array([[2.0, 1.0]])}}, "f"),
        "dimensions": lambda: plot_dimensions({"sphere": {"projection, K = 4": make_ends(1.0, 2.0, 0.0)}}, "f"),
        "decay": lambda: plot_decay({"l1": make_decay("plain", "averaged")}, [10, 100], "gap"),
        "paths": lambda: plot_paths({"plain": np.zeros((3, 2))}, [1.0, 1.0], [0.5, 0.5]),
        "reach": lambda: plot_reach([0.1, 2.0], {"plain": np.ones((3, 2))}, 0.2),
        "sparsity": lambda: plot_sparsity({"backprop": make_sweep()}, "parameters", 1000),
        "epochs": lambda: plot_epochs(make_experiment()),
        "cosines": lambda: plot_cosines({"FDFA": make_cosines(0.1, 0.9)}, ["first", "second"]),
        "accuracies": lambda: plot_accuracies({"MNIST": {"backprop": [[0.9, 0.05, 0.02]]}}),
        "derivatives": lambda: plot_derivatives({"Tanh": make_derivatives()}, [0.0, 1.0]),
        "validation": lambda: plot_validation(make_validation(), 1000, "squared error"),
        "arrivals": lambda: plot_arrivals({"own": [30, 40, 50], "divided": [900, math.inf, math.inf]}, 1001, "95 %"),
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


def test_derivatives_are_lines_and_finite_differences_dots():
    figure = plot_derivatives({"Sigmoid": make_derivatives(), "Tanh": make_derivatives()}, [0.0, 1.0])
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


def test_validation_has_medians_by_epoch_and_by_way():
    figure = plot_validation(make_validation(), 1000, "squared error")
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


def test_arrivals_have_a_median_where_there_is_one_and_say_who_never_arrived():
    rows = {"own": [30, 40, 50, 60, 70, 80], "divided": [900] + [math.inf] * 5}
    (axes,) = plot_arrivals(rows, 1001, "95 %").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    (median,) = [line for line in axes.lines if line.get_marker() == "D"]
    assert (median.get_xdata()[0], median.get_ydata()[0]) == (55, 0)
    assert [text.get_text() for text in axes.texts] == ["5 never"]
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 6 + 1 + 1  # arrived, and an arrow
    assert axes.get_xlabel() == "epochs, of 1001"


def test_decay_is_a_median_in_a_band_and_zero_is_left_out():
    solved = {"exact gradient": np.array([[1.0, 0.0]] * 3)}
    figure = plot_decay({"l1": make_decay("plain", "averaged"), "l2": make_decay("plain") | solved}, [10, 100], "gap")
    first, second = figure.axes
    assert [list(line.get_ydata()) for line in first.lines] == [[1.0, 0.2]] * 2
    assert list(first.lines[0].get_xdata()) == [10, 100]
    assert [line.get_color() for line in first.lines] == [FORMS[name]["color"] for name in ("plain", "averaged")]
    band = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.1, 1.0)
    assert np.isnan(second.lines[1].get_ydata()[1])
    assert (first.get_ylabel(), first.get_xscale(), first.get_yscale()) == ("gap", "log", "log")
    assert [text.get_text() for text in figure.legends[0].texts] == ["plain", "averaged", "exact gradient"]
    already = {"exact gradient": np.zeros((3, 2))} | make_decay("plain")  # solved before it is looked at
    assert len(plot_decay({"l2": already}, [10, 100], "gap").axes[0].lines) == 1


def test_paths_lie_in_the_ball_with_goal_and_optimum():
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.4]])
    figure = plot_paths({"exact gradient": points, "plain, one tangent": points}, [1.2, 0.8], [0.7, 0.3])
    for axes, name in zip(figure.axes, FORMS, strict=False):
        path, goal, optimum = axes.lines
        assert path.get_xydata().tolist() == points.tolist()
        assert path.get_color() == FORMS[name]["color"]
        assert (goal.get_xydata().tolist(), optimum.get_xydata().tolist()) == ([[1.2, 0.8]], [[0.7, 0.3]])
        assert axes.get_aspect() == 1


def test_reach_has_the_theory_and_the_spread_of_the_seeds():
    ends = {"plain": np.array([[0.1, 0.2], [0.1, 0.3], [0.1, 0.1]]), "averaged": np.ones((3, 2))}
    figure = plot_reach([0.1, 2.0], ends, 0.2)
    (axes,) = figure.axes
    best, theory = axes.lines[:2]
    assert (best.get_ydata().max(), theory.get_ydata().max()) == (1.0, 0.2)
    plain, averaged = axes.containers
    assert list(plain.lines[0].get_ydata()) == [0.1, 0.2]
    np.testing.assert_allclose(plain.lines[2][0].get_segments()[1][:, 1], [0.1, 0.3])
    labels = ["the optimum", "theory for plain", "plain", "averaged"]
    assert [text.get_text() for text in figure.legends[0].texts] == labels
    assert list(averaged.lines[0].get_ydata()) == [1.0, 1.0]


def test_sparsity_has_lines_through_the_means_over_radius_and_over_share():
    curves = {"backprop": make_sweep() | {None: [(0.7, 0.92)]}, "activity": make_sweep()}
    figure = plot_sparsity(curves, "parameters", 1000)
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


def test_closed_forms_are_lines_and_what_was_measured_dots():
    figure = plot_closed_forms({"error": make_forms(), "length": make_forms()}, [1, 4], "relative")
    first, second = figure.axes
    theory, measured, _, hollow = first.lines
    assert theory.get_ydata()[0] == 0.75
    assert np.isnan(theory.get_ydata()[-1])  # zero has no place on a logarithmic axis
    assert measured.get_ydata()[0] == 0.25
    assert np.isnan(measured.get_ydata()[1])
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([1, 4], [4, 1])
    assert (measured.get_markerfacecolor(), hollow.get_markerfacecolor()) == (METHODS["projection"]["color"], "white")
    assert [text.get_text() for text in figure.legends[0].texts] == [*make_forms(), "closed form"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "4"]
    assert (first.get_ylabel(), second.get_xlabel()) == ("relative", "tangents K")


def test_values_are_a_median_in_the_range_of_the_seeds():
    seeds = np.array([[4.0, 1.0, 0.0], [4.0, 3.0, math.inf], [4.0, 2.0, 1e-9]])
    curves = {"backprop": np.array([[4.0, 1.0, 0.5]]), "projection, K = 4": seeds, "projection, K = 8": seeds}
    figure = plot_values({"sphere": curves}, "f", floor=1e-6)
    (axes,) = figure.axes
    _, few, many = axes.lines
    assert list(few.get_ydata()[:2]) == [4.0, 2.0]
    assert np.isnan(few.get_ydata()[2])  # below the floor
    assert few.get_linestyle() != many.get_linestyle()
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1.0, 4.0)
    assert [text.get_text() for text in figure.legends[0].texts] == ["backprop", "projection", "K = 4", "K = 8"]
    assert (axes.get_ylabel(), axes.get_yscale()) == ("f", "log")


def test_dimensions_are_in_order_with_the_range_of_the_seeds_and_without_what_diverged():
    ends = {"backprop": make_ends(math.inf, math.inf, math.inf), "projection, K = 4": make_ends(0.0, 1.0, math.inf)}
    figure = plot_dimensions({"sphere": ends}, "f", floor=1e-3)
    (axes,) = figure.axes
    backprop, projection = axes.lines
    assert list(projection.get_xdata()) == [2, 4]
    assert list(projection.get_ydata()) == [2.0, 1.0]
    assert np.isnan(backprop.get_ydata()[1])
    ranges = axes.collections[1].get_segments()
    assert [segment[:, 1].tolist() for segment in ranges] == [[1.0, 3.0], [1e-3, 1.0]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["backprop", "projection", "K = 4"]
