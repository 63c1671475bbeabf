"""What is drawn: the number of panels and lines, their data, labels, stamps; not what it looks like."""

import io
import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.lines import Line2D

from fwdlib import plotting
from fwdlib.data import Dataset, Source
from fwdlib.history import History, Run
from fwdlib.plotting import (
    METHODS,
    plot_average,
    plot_cost,
    plot_depth,
    plot_durations,
    plot_features,
    plot_histories,
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
PUBLISHED = {"layers": [1, 100], "R_f": [2.5, 4.2], "R_b": [4.6, 4.9]}


def run(seed, status="reached", length=4, start=2.0):
    losses = [max(start * 0.5**i, 1e-3) for i in range(length)]
    errors = [max(10 - 3 * i, 0) for i in range(length)]
    return Run(seed, status, length - 1, losses, [1.5 * loss for loss in losses], errors)


def diverged(seed, after=2):
    return Run(seed, "diverged", after, [2.0] * after + [INF], [2.0] * after + [math.nan], [10] * after + [12])


def make_record(title="backprop", runs=None, source=REAL, quick=False):
    runs = [run(0), run(1, length=6), run(2, "not reached", 9)] if runs is None else runs
    return Record("1a", title, {}, dict(source), NUM_TEST, 15, len(runs), runs, runs[0], {}, quick)


def make_bench(quick=False, num_models=2):
    """Ratios to the reference, backprop compiled: 2 for backprop eager, then as the numbers say."""
    steps = {"forward": 1.0, "backprop, eager": 4.0, "backprop, compiled": 2.0, "backprop one graph, compiled": 1.5}
    steps |= {"forward gradient, eager": 8.0, "rank-one, eager": 2.5, "rank-one, compiled": 1.0}
    steps |= {"rank-one K=4, compiled": 3.0, "activity, eager": 5.0}
    entry = {"title": "MLP 4-8-3", "batch": 64, "reference": "backprop, compiled", "skipped": {}}
    entry["seconds"] = {name: [value * (1 + 0.01 * i) for i in range(7)] for name, value in steps.items()}
    depth = {
        n: {
            "batch": 64,
            "seconds": {name: [value] * 7 for name, value in steps.items() if not name.endswith("compiled")},
            "memory": {"backprop": int(n) * 10**7, "forward gradient": int(n) * 10**7, "rank-one": 10**6},
        }
        for n in ("1", "10", "100")
    }
    return {
        "quick": quick,
        "models": {f"m{i}": entry for i in range(num_models)},
        "depth": depth,
        "settings": {"width": 1024},
        "environment": {"device": "cpu"},
    }


def make_history(num_seeds=2, every=5, iterations=12):
    # evaluated after 0, 5, 10 and 12 steps; seed i has i more errors
    runs = [
        Run(i, "completed", iterations, [2.0, 1.0, 0.5, 0.25], [2.0] * 4, [18 + i, 4 + i, 2 + i, 1 + i], [], every)
        for i in range(num_seeds)
    ]
    return History(runs, [{}] * num_seeds, NUM_TEST, 1, 0.0)


def lines(axes):
    """The curves of a panel, without the empty ones that only stand in the legend."""
    return [line for line in axes.lines if len(line.get_xdata())]


def svg(figure):
    file = io.BytesIO()
    with mpl.style.context(plotting.STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def figures():
    data = Dataset(torch.rand(30, 4), torch.arange(30) % 3, torch.rand(3, 4), torch.arange(3), tuple("abc"), None)
    several = [make_record("backprop"), make_record("forward gradient", [run(0), diverged(1)])]
    return {
        "training": lambda: plot_training(several),
        "quantity": lambda: plot_quantity(several, "test loss"),
        "seeds": lambda: plot_seeds(several[1], threshold=0.3),
        "losses": lambda: plot_losses({"a": [1.0, 0.5], "b": [1.0, INF]}, threshold=0.3),
        "images": lambda: plot_images(torch.arange(2 * 28 * 28).reshape(2, 1, 28, 28) / 1568, ["u", "v"]),
        "average": lambda: plot_average([1, 10], [4.0, 1.2], lambda k: 4 / k**0.5, "tangents averaged"),
        "durations": lambda: plot_durations({"backprop": [0.011, 0.012], "FDFA": [0.013, 0.015]}),
        "histories": lambda: plot_histories({"backprop": make_history(), "FG-CV, no feedback": make_history()}),
        "features": lambda: plot_features(data),
        "cost": lambda: plot_cost(make_bench()),
        "depth": lambda: plot_depth(make_bench(), PUBLISHED),
    }


@pytest.mark.parametrize("name", figures())
def test_every_figure_is_drawn_twice_byte_for_byte_alike(name):
    draw = figures()[name]
    assert svg(draw()) == svg(draw())


@pytest.mark.parametrize("name", figures())
def test_drawing_leaves_the_user_s_style_alone(name):
    before = dict(mpl.rcParams)
    figures()[name]().canvas.draw()
    assert dict(mpl.rcParams) == before


# plot_training


def test_training_has_three_panels_with_units_and_a_curve_for_each_record():
    figure = plot_training([make_record("backprop"), make_record("forward gradient")])
    loss, accuracy, errors = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Test loss", "Test accuracy", "Misclassifications"]
    assert (loss.get_ylabel(), loss.get_yscale()) == ("mean cross entropy [nats]", "log")
    assert accuracy.get_ylabel() == "correct of 20 [%]"
    assert errors.get_ylabel() == "wrong of 20"
    for axes in figure.axes:
        assert axes.get_xlabel() == "iteration (optimizer steps)"
        assert len(lines(axes)) == len(axes.collections) == 2
    assert [text.get_text() for text in accuracy.get_legend().texts] == ["backprop", "forward gradient"]


def test_training_takes_one_record_too():
    assert len(lines(plot_training(make_record()).axes[0])) == 1


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
def test_quantity_is_one_panel_of_training(index):
    records = [make_record("backprop"), make_record("forward gradient", source=SUBSTITUTE)]
    quantity = plotting.QUANTITIES[index]
    (alone,), panel = plot_quantity(records, quantity).axes, plot_training(records).axes[index]
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
def test_all_seeds_may_have_diverged(after):
    svg(plot_training(make_record(runs=[diverged(i, after) for i in range(4)])))
    svg(plot_seeds(make_record(runs=[diverged(i, after) for i in range(4)])))


def test_a_method_looks_the_same_in_every_figure():
    for title, style in METHODS.items():
        record = make_record(title)
        line = lines(plot_training([make_record("something else"), record]).axes[0])[1]
        assert (line.get_color(), line.get_linestyle()) == (style["color"], Line2D([], [], **style).get_linestyle())
        assert {line.get_color() for line in lines(plot_seeds(record).axes[0])} == {style["color"]}


def test_no_two_methods_and_no_curve_look_alike():
    # The palette has no nine colours. Where curves are drawn, in the course's six notebooks, the methods are two.
    course = [METHODS[name]["color"] for name in ("backprop", "forward gradient")]
    assert len({*course, *plotting.CURVES}) == len(course) + len(plotting.CURVES)
    assert len({style["color"] for style in METHODS.values()}) == len(METHODS)
    assert len({style["linestyle"] for style in METHODS.values()}) == len(METHODS)


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


def test_seeds_has_a_line_for_each_seed_and_counts_how_they_ended():
    runs = [run(0), run(1), run(2, "not reached", 9), diverged(3), run(4, "completed")]
    axes = plot_seeds(make_record(runs=runs)).axes[0]
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


def test_seeds_draws_the_threshold_where_there_is_one():
    axes = plot_seeds(make_record(), threshold=0.3).axes[0]
    assert [0.3, 0.3] in [list(line.get_ydata()) for line in axes.lines]
    assert "threshold" in [text.get_text() for text in axes.texts]
    assert len(plot_seeds(make_record()).axes[0].texts) == 0


# the others


def test_losses_draws_a_named_curve_each_and_a_cross_where_one_ends():
    axes = plot_losses({"rate 1": [1.0, 0.5, 0.25], "rate 2": [1.0, 4.0, math.nan]}, threshold=0.3).axes[0]
    assert [text.get_text() for text in axes.get_legend().texts] == ["rate 1", "rate 2", "threshold"]
    curves = lines(axes)
    assert curves[0].get_ydata().tolist() == [1.0, 0.5, 0.25]
    crosses = [line for line in curves if line.get_marker() == "x"]
    assert [(*cross.get_xdata(), *cross.get_ydata()) for cross in crosses] == [(1, 4.0)]
    assert crosses[0].get_color() == curves[1].get_color() != curves[0].get_color()


def test_losses_of_a_run_that_was_never_finite():
    svg(plot_losses({"a": [1.0, 0.5], "b": [math.nan]}))


def test_images_has_a_panel_for_each_with_its_title():
    images = torch.rand(3, 1, 8, 8)
    figure = plot_images(images, ["u", "v", "w"])
    assert [axes.get_title() for axes in figure.axes] == ["u", "v", "w"]
    for axes, image in zip(figure.axes, images, strict=True):
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), image[0].numpy())
        assert axes.images[0].get_clim() == (0, 1)  # not stretched: the same grey is the same value in each
    assert len(plot_images(images[:1], ["u"]).axes) == 1
    with pytest.raises(ValueError, match="zip"):
        plot_images(images, ["u"])


def test_average_draws_what_was_measured_beside_the_theory():
    axes = plot_average([1, 4, 16], [3.9, 2.1, 0.9], lambda k: 4 / k**0.5, "tangents averaged").axes[0]
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
    assert {line.get_color() for line in drawn[3:]} == {METHODS["FG-CV"]["color"]}
    assert figure.axes[0].get_title(loc="left") == "The mean closes in on the Jacobian"
    assert [text.get_text() for text in figure.legends[0].texts] == ["theory", *measured]


@pytest.mark.parametrize(("slowest", "has_minor"), [(0.016, True), (0.1, False)])
def test_durations_have_numbers_on_the_axis_also_where_they_span_no_decade(slowest, has_minor):
    figure = plot_durations({"backprop": [0.011, 0.011, 0.012], "FDFA": [slowest] * 3})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert bool("".join(label.get_text() for label in axes.get_xticklabels(minor=True))) == has_minor
    assert [text.get_text() for text in axes.texts] == ["11 ms", f"{1e3 * slowest:g} ms"]
    assert lines(axes)[1].get_color() == METHODS["backprop"]["color"]


def test_histories_draw_each_seed_thin_and_their_mean_where_they_were_evaluated():
    figure = plot_histories({"backprop": make_history(2), "FG-CV, no feedback": make_history(2)})
    loss, error = figure.axes
    for axes in figure.axes:
        assert [list(line.get_xdata()) for line in lines(axes)] == [[5, 10, 12]] * 6
    assert [list(line.get_ydata()) for line in lines(error)[:3]] == [[20, 10, 5], [25, 15, 10], [22.5, 12.5, 7.5]]
    assert list(lines(loss)[2].get_ydata()) == [1.0, 0.5, 0.25]
    assert (loss.get_ylabel(), error.get_ylabel()) == ("mean cross entropy [nats]", "wrong of 20 [%]")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Training loss, 2 seeds", "Test error, 2 seeds"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["backprop", "FG-CV, no feedback"]
    assert lines(error)[5].get_color() == METHODS["FG-CV"]["color"]
    assert lines(error)[5].get_linestyle() == ":"
    assert plot_histories({"DFA": make_history(1)}).axes[0].get_title(loc="left") == "Training loss, one seed"


def test_features_shows_every_row_once_in_each_panel():
    inputs, targets = torch.rand(30, 4), torch.arange(30) % 3
    figure = plot_features(Dataset(inputs, targets, inputs[:3], targets[:3], ("a", "b", "c"), None))
    assert len(figure.axes) == 2
    for axes, columns in zip(figure.axes, ([0, 1], [2, 3]), strict=True):
        for index, points in enumerate(axes.collections):
            expected = inputs[targets == index][:, columns].numpy()
            np.testing.assert_allclose(np.asarray(points.get_offsets()), expected)
    assert figure.axes[0].get_xlabel().startswith("bill length")
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b", "c"]


# plot_cost and plot_depth


def test_cost_has_a_panel_for_each_model_and_a_row_for_each_method():
    figure = plot_cost(make_bench(num_models=4))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 4
    for axes in panels:
        assert axes.get_title(loc="left") == "MLP 4-8-3\nbatch 64"
        assert axes.get_xscale() == "log"
        assert axes.get_xlabel() in ("ratio to the fastest backprop", "")
    rows = ["backprop", "forward gradient", "rank-one", "rank-one K=4", "activity"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == rows
    assert panels[-1].get_xlabel()
    assert figure.legends[0].get_title().get_text() == "time of a training step on cpu"


def test_cost_draws_the_ratio_hollow_where_eager():
    axes = plot_cost(make_bench(num_models=1)).axes[0]
    dots = {}
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            (x,), (y,) = line.get_xdata(), line.get_ydata()
            dots[round(float(y), 2), line.get_marker(), line.get_markerfacecolor() == "white"] = x, line.get_color()
    expected = {
        (0, "o", True): (2.0, "backprop"),
        (0, "o", False): (1.0, "backprop"),
        (0.22, "D", False): (0.75, "backprop"),
        (1, "o", True): (4.0, "forward gradient"),
        (2, "o", True): (1.25, "rank-one"),
        (2, "o", False): (0.5, "rank-one"),
        (3, "o", False): (1.5, "rank-one"),
        (4, "o", True): (2.5, "activity"),
    }
    assert dots.keys() == expected.keys()
    for place, (ratio, method) in expected.items():
        assert dots[place] == (pytest.approx(ratio), METHODS[method]["color"])


def test_depth_draws_time_in_forward_passes_and_memory_in_megabytes():
    time, memory = plot_depth(make_bench(), PUBLISHED).axes
    drawn = {line.get_label(): line for line in lines(time) if not line.get_label().startswith("_")}
    for label, ratio in (("backprop, $R_b$", 4), ("forward gradient, $R_f$", 8), ("rank-one, $R_f$", 2.5)):
        assert list(drawn[label].get_xdata()) == [1, 10, 100]
        assert list(drawn[label].get_ydata()) == [ratio] * 3
    assert {text.get_text() for text in time.texts} == {"paper's $R_f$", "paper's $R_b$"}
    held = {line.get_label(): list(line.get_ydata()) for line in lines(memory)}
    assert held["backprop"] == [10, 100, 1000]
    assert held["rank-one"] == [1, 1, 1]
    assert memory.get_yscale() == "log"
    assert memory.get_ylabel() == "memory [MB]"
    assert "width 1024, batch 64" in time.get_xlabel()


def test_depth_without_the_paper_or_the_memory():
    bench = make_bench()
    for entry in bench["depth"].values():
        del entry["memory"]
    time, memory = plot_depth(bench).axes
    assert not time.texts
    assert not lines(memory)
    svg(plot_depth(bench))


def test_depth_that_was_not_measured():
    with pytest.raises(ValueError, match="no depth sweep"):
        plot_depth(make_bench() | {"depth": {}})


@pytest.mark.parametrize("draw", [plot_cost, plot_depth])
def test_figures_of_a_quick_benchmark_are_stamped(draw):
    assert draw(make_bench()).get_suptitle() == ""
    assert draw(make_bench(quick=True)).get_suptitle() == "quick mode: not a result"
