"""What is drawn: panels, lines and their data; that the animation moves."""

import io

import numpy as np
import pytest
from PIL import Image

from fwdlib.methods.minimise_figures import MAPS, animate_paths, plot_descents, plot_paths
from fwdlib.plotting import METHOD_STYLES


def make_method(num_seeds, seconds):
    values = [[14.0, 10.0 / (seed + 1), 0.1 / (seed + 1)] for seed in range(num_seeds)]
    paths = [[[0.0, 0.5], [1.0, 0.1 * seed], [3.0, 0.5]] for seed in range(num_seeds)]
    return {"steps": [0, 10, 1000], "values": values, "paths": paths, "seconds": seconds}


def make_descents(*titles):
    methods = {"backprop": make_method(1, 1e-3), "forward gradient": make_method(5, 2e-3)}
    return dict.fromkeys(titles, methods)


@pytest.mark.parametrize("name", MAPS)
def test_the_minimum_is_on_the_map(name):
    x, y = MAPS[name].minimum
    left, right, bottom, top = MAPS[name].window
    assert left < x < right
    assert bottom < y < top


def test_descents_are_drawn_over_iterations_and_over_seconds(drawn):
    figure = drawn(plot_descents, make_descents("Beale", "Rosenbrock"))
    assert len(figure.axes) == 4
    by_step, by_second = figure.axes[2:]
    assert by_step.get_title(loc="left") == "Rosenbrock"
    assert [axes.get_xlabel() for axes in (by_step, by_second)] == ["iteration", "time spent in steps [s]"]
    for axes, x in ((by_step, [10, 1000]), (by_second, [0.02, 2.0])):
        named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert list(named) == ["backprop", "forward gradient"]
        assert list(named["forward gradient"].get_xdata()) == pytest.approx(x)
        assert list(named["forward gradient"].get_ydata()) == pytest.approx([10 / 3, 0.1 / 3])  # of five, the third
        assert len(axes.lines) == 2 + 1 + 5
    assert [text.get_text() for text in figure.legends[0].texts] == ["backprop", "forward gradient"]


def test_descents_that_diverge_can_be_drawn(svg):
    descents = make_descents("Beale")
    descents["Beale"]["forward gradient"]["values"][0] = [14.0, "inf", "inf"]  # as JSON has it
    svg(plot_descents(descents))


def test_paths_have_a_line_for_each_seed_and_backprop_on_top(drawn):
    figure = drawn(plot_paths, make_descents("Rosenbrock", "Beale"))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Rosenbrock", "Beale"]
    star, *lines, ring = figure.axes[1].lines
    assert star.get_xydata().tolist() == [[3.0, 0.5]]
    assert ring.get_xydata().tolist() == [[0.0, 0.5]]
    assert [line.get_color() for line in lines] == 5 * [METHOD_STYLES["forward gradient"]["color"]] + [
        METHOD_STYLES["backprop"]["color"]
    ]
    assert lines[2].get_xydata().tolist() == [[0.0, 0.5], [1.0, 0.2], [3.0, 0.5]]


# the animation


@pytest.fixture(scope="module")
def gif():
    return animate_paths(make_descents("Beale"), num_frames=3)


def test_animation_is_a_gif_that_repeats_and_rests_at_the_end(gif):
    image = Image.open(io.BytesIO(gif))
    assert (image.format, image.n_frames, image.info["loop"]) == ("GIF", 3, 0)
    times = []
    for frame in range(image.n_frames):
        image.seek(frame)
        times.append(image.info["duration"])
    assert times[-1] > 10 * times[0]


def test_animation_is_drawn_twice_byte_for_byte_alike(gif):
    assert animate_paths(make_descents("Beale"), num_frames=3) == gif


def test_animation_moves_and_the_trails_of_both_methods_grow(gif):
    image, reds, blues = Image.open(io.BytesIO(gif)), [], []
    for frame in (0, image.n_frames - 1):
        image.seek(frame)
        red, _, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=float), 2, 0)
        reds.append((red - blue > 80).sum())
        blues.append((blue - red > 80).sum())
    assert reds[1] > reds[0] + 50
    assert blues[1] > blues[0] + 50


def test_animation_needs_two_frames():
    with pytest.raises(ValueError, match="num_frames must be a whole number of at least 2, got 1"):
        animate_paths(make_descents("Beale"), num_frames=1)
