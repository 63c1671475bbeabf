"""What is drawn: the number of panels and lines, their data, labels and units; not what it looks like."""

import pytest

from fwdlib.bench.figures import (
    front,
    plot_cost,
    plot_depth,
    plot_durations,
    plot_front,
    plot_over_time,
    plot_sweeps,
    time_and_memory,
)
from fwdlib.history import Run
from fwdlib.plotting import METHOD_STYLES

PUBLISHED = {"layers": [1, 100], "R_f": [2.5, 4.2], "R_b": [4.6, 4.9]}


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


def make_run():
    # evaluated after 0, 5, 10 and 12 steps
    return Run(0, "completed", 12, [2.0, 1.0, 0.5, 0.25], every=5)


def lines(axes):
    """The curves of a panel, without the empty ones that only stand in the legend."""
    return [line for line in axes.lines if len(line.get_xdata())]


@pytest.mark.parametrize(("slowest", "has_minor"), [(0.016, True), (0.1, False)])
def test_durations_have_numbers_on_the_axis_also_where_they_span_no_decade(slowest, has_minor, drawn):
    figure = drawn(plot_durations, {"backprop": [0.011, 0.011, 0.012], "FDFA": [slowest] * 3})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert bool("".join(label.get_text() for label in axes.get_xticklabels(minor=True))) == has_minor
    assert [text.get_text() for text in axes.texts] == ["11 ms", f"{1e3 * slowest:g} ms"]
    assert lines(axes)[1].get_color() == METHOD_STYLES["backprop"]["color"]


def test_cost_has_a_panel_for_each_model_and_a_row_for_each_method(drawn):
    figure = drawn(plot_cost, make_bench(num_models=4))
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
        assert dots[place] == (pytest.approx(ratio), METHOD_STYLES[method]["color"])


def test_depth_draws_time_in_forward_passes_and_memory_in_megabytes(drawn):
    time, memory = drawn(plot_depth, make_bench(), PUBLISHED).axes
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


def test_depth_without_the_paper_or_the_memory(drawn):
    bench = make_bench()
    for entry in bench["depth"].values():
        del entry["memory"]
    time, memory = drawn(plot_depth, bench).axes
    assert not time.texts
    assert not lines(memory)


def test_depth_that_was_not_measured():
    with pytest.raises(ValueError, match="no depth sweep"):
        plot_depth(make_bench() | {"depth": {}})


def test_sweeps_draw_the_ratio_to_the_fastest_backprop_and_memory_in_megabytes(drawn):
    bench = make_bench()
    bench["settings"]["mlp"] = {"layers": 4, "width": 256}
    with pytest.raises(ValueError, match="no sweep of width or batch"):
        plot_sweeps(bench)
    entry = bench["models"]["m0"] | {"memory": {"backprop": 2 * 10**6, "rank-one": 10**6}}
    bench["batch"] = {"1": entry, "64": entry}
    time, memory = drawn(plot_sweeps, bench).axes
    found = {(line.get_label(), line.get_markerfacecolor() == "white"): line for line in lines(time)}
    for (label, is_hollow), ratio in {
        ("backprop", True): 2,
        ("rank-one", True): 1.25,
        ("rank-one", False): 0.5,
    }.items():
        assert list(found[label, is_hollow].get_ydata()) == pytest.approx([ratio] * 2)
        assert list(found[label, is_hollow].get_xdata()) == [1, 64]
    assert {line.get_label(): list(line.get_ydata()) for line in lines(memory)} == {
        "backprop": [2, 2],
        "rank-one": [1, 1],
    }
    assert time.get_xlabel() == "batch, 4 layers of width 256"


@pytest.mark.parametrize("draw", [plot_cost, plot_depth])
def test_figures_of_a_quick_benchmark_are_stamped(draw):
    assert draw(make_bench()).get_suptitle() == ""
    assert draw(make_bench(quick=True)).get_suptitle() == "quick mode: not a result"


def test_losses_over_time_are_at_the_seconds_that_the_steps_took(drawn):
    run = make_run()
    (axes,) = drawn(plot_over_time, {"backprop": (0.1, run), "rank-one": (0.2, run)}).axes
    first, second = lines(axes)
    assert list(first.get_xdata()) == pytest.approx([0.5, 1.0, 1.2])
    assert list(second.get_xdata()) == pytest.approx([1.0, 2.0, 2.4])
    assert list(first.get_ydata()) == list(second.get_ydata()) == run.train_loss[1:]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time spent in steps [s]", "training loss [nats]")


def with_memory(bench):
    held = {"backprop": 8_000_000, "rank-one": 1_000_000, "forward gradient": 9_000_000, "activity": 0}
    for entry in bench["models"].values():
        entry["memory"] = held
    return bench


def test_front_holds_what_nothing_beats_in_both():
    points = {"a": (1.0, 9.0), "b": (2.0, 3.0), "c": (2.0, 5.0), "d": (3.0, 3.0), "e": (4.0, 1.0), "f": (1.5, 9.0)}
    assert front(points) == ["a", "b", "e"]


def test_time_and_memory_are_those_of_eager_steps_over_the_fastest_backprop():
    (entry, _) = with_memory(make_bench())["models"].values()
    found = time_and_memory(entry)
    assert found["rank-one"] == (pytest.approx(2.5 / 2.0), 1_000_000)
    assert set(found) == {"backprop", "rank-one", "forward gradient", "activity"}


def test_front_has_a_panel_for_each_model_and_marks_the_front(drawn):
    figure = drawn(plot_front, with_memory(make_bench(num_models=2)))
    assert len(figure.axes) == 2
    dots = {line.get_label(): line for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert set(dots) == {"backprop", "rank-one", "forward gradient", "activity"}
    assert dots["activity"].get_ydata() == [0.1]  # a logarithm has no zero
    on_front = {name for name, dot in dots.items() if dot.get_markeredgecolor() == "black"}
    assert on_front == {"rank-one", "activity"}  # times 1.25 and 2.5, memories 1 and 0.1 MB


def test_front_without_memory_is_refused():
    with pytest.raises(ValueError, match="--quick"):
        plot_front(make_bench())
