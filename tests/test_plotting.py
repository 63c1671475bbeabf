"""What is drawn: the number of panels and lines, their data, labels, stamps; not what it looks like."""

import math

import numpy as np
import pytest
import torch
from matplotlib.lines import Line2D

from fwdlib import plotting
from fwdlib.data import Dataset, Source
from fwdlib.history import Run
from fwdlib.plotting import (
    METHOD_STYLES,
    plot_average,
    plot_features,
    plot_images,
    plot_losses,
    plot_quantity,
    plot_seeds,
    plot_training,
)
from fwdlib.results import Record

INF = math.inf
REAL = {"name": "penguins/processed", "substitute_for": None}
SUBSTITUTE = {"name": "digits", "substitute_for": "KMNIST"}
NUM_TEST = 20


def run(seed, status="reached", length=4, start=2.0):
    losses = [max(start * 0.5**i, 1e-3) for i in range(length)]
    errors = [max(10 - 3 * i, 0) for i in range(length)]
    return Run(seed, status, length - 1, losses, [1.5 * loss for loss in losses], errors)


def diverged(seed, after=2):
    return Run(seed, "diverged", after, [2.0] * after + [INF], [2.0] * after + [math.nan], [10] * after + [12])


def make_record(title="backprop", runs=None, source=REAL, quick=False):
    runs = [run(0), run(1, length=6), run(2, "not reached", 9)] if runs is None else runs
    return Record("1a", title, {}, dict(source), NUM_TEST, 15, len(runs), runs, runs[0], {}, quick)


def lines(axes):
    """The curves of a panel, without the empty ones that only stand in the legend."""
    return [line for line in axes.lines if len(line.get_xdata())]


# plot_training


def test_training_has_three_panels_with_units_and_a_curve_for_each_record(drawn):
    figure = drawn(plot_training, [make_record("backprop"), make_record("forward gradient")])
    loss, accuracy, errors = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Test loss", "Test accuracy", "Misclassifications"]
    assert (loss.get_ylabel(), loss.get_yscale()) == ("mean cross entropy [nats]", "log")
    assert accuracy.get_ylabel() == "correct of 20 [%]"
    assert errors.get_ylabel() == "wrong of 20"
    for axes in figure.axes:
        assert axes.get_xlabel() == "iteration (optimizer steps)"
        assert len(lines(axes)) == len(axes.collections) == 2
    assert [text.get_text() for text in accuracy.get_legend().texts] == ["backprop", "forward gradient"]


def test_training_draws_the_median_and_the_middle_half():
    # five seeds with constant losses 1 to 5: median 3, middle half 2 to 4
    runs = [Run(i, "completed", 2, [1.0] * 3, [float(i)] * 3, [i] * 3) for i in (4, 1, 5, 3, 2)]
    loss, accuracy, errors = plot_training(make_record(runs=runs)).axes
    assert lines(loss)[0].get_ydata().tolist() == [3, 3, 3]
    assert lines(errors)[0].get_ydata().tolist() == [3, 3, 3]
    assert lines(accuracy)[0].get_ydata().tolist() == [85, 85, 85]
    band = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (2, 4)


def test_a_seed_that_stopped_keeps_its_last_value():
    loss = plot_training(make_record(runs=[run(0, length=2), run(1, length=5), run(2, length=2)])).axes[0]
    assert lines(loss)[0].get_ydata().tolist() == [3.0, 1.5, 1.5, 1.5, 1.5]


def test_a_seed_that_diverged_counts_as_infinite_and_all_wrong():
    loss, accuracy, errors = plot_training(make_record(runs=[diverged(0), diverged(1), run(2, length=6)])).axes
    assert lines(loss)[0].get_ydata().tolist() == [2.0, 2.0, INF, INF, INF, INF]
    assert lines(accuracy)[0].get_ydata().tolist()[2:] == [0, 0, 0, 0]
    assert lines(errors)[0].get_ydata().tolist()[2:] == [NUM_TEST] * 4


def test_the_axis_ends_when_19_of_20_seeds_have_stopped():
    runs = [run(i, length=5) for i in range(19)] + [run(19, "not reached", 2001)]
    for axes in plot_training(make_record(runs=runs)).axes:
        assert 4 <= axes.get_xlim()[1] < 5
    assert plot_training(make_record(runs=runs[18:])).axes[0].get_xlim()[1] >= 2000


@pytest.mark.parametrize("index", range(3))
def test_quantity_is_one_panel_of_training(index, drawn):
    records = [make_record("backprop"), make_record("forward gradient", source=SUBSTITUTE)]
    quantity = plotting.QUANTITIES[index]
    (alone,), panel = drawn(plot_quantity, records, quantity).axes, plot_training(records).axes[index]
    assert alone.get_title(loc="left") == panel.get_title(loc="left") == quantity.capitalize()
    assert alone.get_ylabel() == panel.get_ylabel()
    for line, other in zip(lines(alone), lines(panel), strict=True):
        assert line.get_ydata().tolist() == other.get_ydata().tolist()
    assert len(alone.get_legend().texts) == 2
    assert "in place of KMNIST" in plot_quantity(records, quantity).get_suptitle()


def test_quantity_lists_what_there_is():
    with pytest.raises(ValueError, match="quantity must be one of 'test loss', 'test accuracy', 'misclassifications'"):
        plot_quantity([make_record()], "training loss")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_all_seeds_may_have_diverged(after, svg):
    svg(plot_training(make_record(runs=[diverged(i, after) for i in range(4)])))
    svg(plot_seeds(make_record(runs=[diverged(i, after) for i in range(4)])))


def test_a_method_looks_the_same_in_every_figure():
    for title, style in METHOD_STYLES.items():
        record = make_record(title)
        line = lines(plot_training([make_record("something else"), record]).axes[0])[1]
        assert (line.get_color(), line.get_linestyle()) == (style["color"], Line2D([], [], **style).get_linestyle())
        assert {line.get_color() for line in lines(plot_seeds(record).axes[0])} == {style["color"]}


def test_no_two_methods_and_no_curve_look_alike():
    # The palette has no nine colours. Where curves are drawn, in the course's six notebooks, the methods are two.
    course = [METHOD_STYLES[name]["color"] for name in ("backprop", "forward gradient")]
    assert len({*course, *plotting.CURVES}) == len(course) + len(plotting.CURVES)
    assert len({style["color"] for style in METHOD_STYLES.values()}) == len(METHOD_STYLES)
    assert len({style["linestyle"] for style in METHOD_STYLES.values()}) == len(METHOD_STYLES)


# stamps


@pytest.mark.parametrize("draw", [plot_training, plot_seeds])
def test_figures_of_substitute_data_and_quick_runs_are_stamped(draw):
    assert draw(make_record()).get_suptitle() == ""
    substitute = draw(make_record(source=SUBSTITUTE)).get_suptitle()
    assert substitute == "substitute data: digits in place of KMNIST"
    assert "quick mode: not a result" in draw(make_record(quick=True)).get_suptitle()
    both = draw(make_record(source=SUBSTITUTE, quick=True)).get_suptitle()
    assert "in place of KMNIST" in both
    assert "quick mode" in both


def test_one_such_record_among_others_is_enough_and_says_it_once():
    records = [make_record(), make_record("forward gradient", source=SUBSTITUTE), make_record(source=SUBSTITUTE)]
    assert plot_training(records).get_suptitle() == "substitute data: digits in place of KMNIST"


def test_the_source_of_a_data_set_is_what_the_stamp_reads():
    source = Source("digits", "scikit-learn", "KMNIST", "", "", "", 0)._asdict()
    assert "digits in place of KMNIST" in plot_training(make_record(source=source)).get_suptitle()


# plot_seeds


def test_seeds_has_a_line_for_each_seed_and_counts_how_they_ended(drawn):
    runs = [run(0), run(1), run(2, "not reached", 9), diverged(3), run(4, "completed")]
    axes = drawn(plot_seeds, make_record(runs=runs)).axes[0]
    assert len(lines(axes)) == 5
    for line, seed in zip(lines(axes), runs, strict=True):
        finite = np.isfinite(seed.train_loss)
        assert line.get_ydata()[finite].tolist() == np.array(seed.train_loss)[finite].tolist()
    texts = {text.get_text() for text in axes.get_legend().texts}
    assert texts == {"reached: 2", "completed: 1", "not reached: 1", "diverged: 1"}
    assert "each of 5 seeds" in axes.get_title(loc="left")
    assert axes.get_ylabel().endswith("[nats]")


def test_seeds_marks_a_diverged_one_where_it_was_last_finite():
    axes = plot_seeds(make_record(runs=[diverged(0, after=3)])).axes[0]
    assert [2.0, 2.0] in [points.get_offsets()[0].tolist() for points in axes.collections if len(points.get_offsets())]


def test_seeds_of_two_methods_have_their_own_colours_and_counts():
    records = [make_record("backprop", [run(0)]), make_record("forward gradient", [diverged(0), run(1)])]
    axes = plot_seeds(records).axes[0]
    assert [line.get_color() for line in lines(axes)] == [
        METHOD_STYLES[title]["color"] for title in ("backprop", "forward gradient", "forward gradient")
    ]
    texts = [text.get_text() for text in axes.get_legend().texts]
    assert texts == ["backprop, reached: 1", "forward gradient, reached: 1", "forward gradient, diverged: 1"]


def test_seeds_draws_the_threshold_where_there_is_one():
    axes = plot_seeds(make_record(), threshold=0.3).axes[0]
    assert [0.3, 0.3] in [list(line.get_ydata()) for line in axes.lines]
    assert "threshold" in [text.get_text() for text in axes.texts]
    assert len(plot_seeds(make_record()).axes[0].texts) == 0


# the others


def test_losses_draws_a_named_curve_each_and_a_cross_where_one_ends(drawn):
    losses = {"rate 1": [1.0, 0.5, 0.25], "rate 2": [1.0, 4.0, math.nan]}
    axes = drawn(plot_losses, losses, threshold=0.3).axes[0]
    entries = ["rate 1", "rate 2", "goes on above 100 times the start", "threshold"]
    assert [text.get_text() for text in axes.get_legend().texts] == entries
    curves = lines(axes)
    assert curves[0].get_ydata().tolist() == [1.0, 0.5, 0.25]
    crosses = [line for line in curves if line.get_marker() == "x"]
    assert [(*cross.get_xdata(), *cross.get_ydata()) for cross in crosses] == [(1, 4.0)]
    assert crosses[0].get_color() == curves[1].get_color() != curves[0].get_color()


def test_losses_says_nothing_of_crosses_where_there_are_none():
    axes = plot_losses({"a": [1.0, 0.5]}).axes[0]
    assert [text.get_text() for text in axes.get_legend().texts] == ["a"]


def test_losses_of_a_run_that_was_never_finite(svg):
    svg(plot_losses({"a": [1.0, 0.5], "b": [math.nan]}))


def test_images_has_a_panel_for_each_with_its_title(drawn):
    images = torch.rand(3, 1, 8, 8)
    figure = drawn(plot_images, images, ["u", "v", "w"])
    assert [axes.get_title() for axes in figure.axes] == ["u", "v", "w"]
    for axes, image in zip(figure.axes, images, strict=True):
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), image[0].numpy())
        assert axes.images[0].get_clim() == (0, 1)  # not stretched: the same grey is the same value in each
    assert len(plot_images(images[:1], ["u"]).axes) == 1
    with pytest.raises(ValueError, match="zip"):
        plot_images(images, ["u"])


def test_average_draws_what_was_measured_beside_the_theory(drawn):
    axes = drawn(plot_average, [1, 4, 16], [3.9, 2.1, 0.9], lambda k: 4 / k**0.5, "tangents averaged").axes[0]
    theory, measured = lines(axes)
    assert list(theory.get_ydata()) == [4.0, 2.0, 1.0]
    assert list(measured.get_ydata()) == [3.9, 2.1, 0.9]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "tangents averaged"


def test_average_draws_several_methods_and_the_theories_that_there_are():
    measured = {"DFA": [0.5, 0.5], "FG-CV, no feedback": [9.0, 4.4], "FG-CV": [3.0, 1.6]}
    predicted = {"FG-CV": lambda k: 3 / k**0.5, "FG-CV, no feedback": lambda k: 9 / k**0.5}
    figure = plot_average([1, 4], measured, predicted, "draws", goal="Jacobian")
    drawn = lines(figure.axes[0])
    assert [list(line.get_ydata()) for line in drawn] == [[3.0, 1.5], [9.0, 4.5], *measured.values()]
    assert [line.get_markerfacecolor() == "white" for line in drawn[2:]] == [False, True, False]
    assert {line.get_color() for line in drawn[3:]} == {METHOD_STYLES["FG-CV"]["color"]}
    assert figure.axes[0].get_title(loc="left") == "The mean closes in on the Jacobian"
    assert [text.get_text() for text in figure.legends[0].texts] == ["theory", *measured]


def test_features_shows_every_row_once_in_each_panel(drawn):
    inputs, targets = torch.rand(30, 4), torch.arange(30) % 3
    figure = drawn(plot_features, Dataset(inputs, targets, inputs[:3], targets[:3], ("a", "b", "c"), None))
    assert len(figure.axes) == 2
    for axes, columns in zip(figure.axes, ([0, 1], [2, 3]), strict=True):
        for index, points in enumerate(axes.collections):
            expected = inputs[targets == index][:, columns].numpy()
            np.testing.assert_allclose(np.asarray(points.get_offsets()), expected)
    assert figure.axes[0].get_xlabel().startswith("bill length")
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b", "c"]
