"""The figures of long processes draw what they are given."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from fwdlib.methods import processes_figures as figures
from fwdlib.statistics import Interval


def test_a_fit_shows_each_species_and_each_parameter():
    years, row = range(4), np.array([1.0, 2.0, 1.5, 1.0])
    species = {"hare": (np.exp(row), row, 0.1 * np.ones(4)), "lynx": (np.exp(row), row, 0.2 * np.ones(4))}
    figure = figures.plot_fit(years, species, {"a": Interval(0.4, 0.5, 0.6)}, {"a": 0.5})
    left, right = figure.axes
    assert [line.get_label() for line in left.lines if not line.get_label().startswith("_")] == ["hare", "lynx"]
    np.testing.assert_allclose(right.lines[0].get_xdata(), [0.8, 1.2])


def test_fields_are_on_the_scale_of_the_last_row():
    figure = figures.plot_fields({"noisy": [np.full((4, 4), 9.0)], "truth": [np.full((4, 4), 2.0)]}, ["after 1 step"])
    assert {axes.images[0].get_clim() for axes in figure.axes} == {(0, 2)}


def test_the_animation_has_a_frame_for_each_moment():
    ramp = np.linspace(-1, 1, 64).reshape(8, 8)
    frames = [{"u": abs(ramp) * k, "du / da": ramp * k, "du / db": -ramp * k} for k in (1, 2, 3)]
    image = Image.open(io.BytesIO(figures.animate_fields(frames)))
    assert image.n_frames == 3


def test_costs_are_drawn_even_if_none_was_measured():
    costs = {"Time": ("P", "s", {"forward gradient": {1: 1.0, 4: 3.0}, "backprop": {1: 1.0, 4: 1.0}})}
    costs["Memory"] = ("T", "MiB", {"forward gradient": {}, "backprop": {}})
    figure = figures.plot_costs(costs)
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "linear"]
    figure.draw_without_rendering()


def test_searches_horizons_chaos_and_recurrence_have_their_panels():
    losses = np.array([[1.0, np.inf], [0.5, 0.4]])
    path = [{"rate": 0.1, "momentum": 0.5, "loss": 1.0}, {"rate": 0.2, "momentum": 0.6, "loss": 0.5}]
    search = figures.plot_search([0.1, 1.0], [0.0, 0.9], losses, path)
    assert search.axes[1].lines[1].get_ydata()[0] == 0.4
    rates = np.logspace(-2, 0, 5)
    found = {10: (rates, rates, rates), 100: (rates, np.array([1, 1, 1, np.inf, np.nan]), rates)}
    assert len(figures.plot_horizons(found).axes) == 4
    assert len(figures.plot_chaos([27, 28], {1.0: [1, 2], 5.0: [2, 1]}, [1, 2], [1.0, 10.0]).axes) == 3
    curves = {m: {"MNIST": [2.0, 1.0]} for m in ("forward gradient", "backprop")}
    assert len(figures.plot_recurrent(curves, {"MNIST": [[10, 20]]}, [0.5, 1.0]).axes) == 2
