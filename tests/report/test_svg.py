"""SVG files do not depend on the last bits of the layout."""

from __future__ import annotations

import matplotlib.style
import matplotlib.transforms
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fwdlib.plotting import STYLE
from report.page.svg import write_svg


def draw():
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(6, 2.5))
        for axes in figure.subplots(1, 3):
            axes.plot([0, 1, 10], [1, 10, 2], label="a line")
            axes.scatter([2, 3], [4, 5])
            axes.set(title="a title", xlabel="steps", ylabel="value", yscale="log")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    return figure


def test_a_processor_that_rounds_differently_writes_the_same_file(tmp_path, monkeypatch):
    write_svg(draw(), tmp_path / "first.svg")
    invert, noise = matplotlib.transforms.inv, np.random.default_rng(0)
    monkeypatch.setattr(
        matplotlib.transforms, "inv", lambda m: invert(m) * (1 + 1.2e-16 * noise.integers(-1, 2, m.shape))
    )
    for _ in range(5):
        write_svg(draw(), tmp_path / "again.svg")
        assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "first.svg").read_bytes()


def test_the_layout_is_the_constrained_one_up_to_rounding(tmp_path):
    ours, plain = draw(), draw()
    write_svg(ours, tmp_path / "ours.svg")
    with matplotlib.style.context(STYLE):
        FigureCanvasSVG(plain).print_svg(tmp_path / "plain.svg")
    for rounded, axes in zip(ours.axes, plain.axes, strict=True):
        difference = np.subtract(rounded.get_position().bounds, axes.get_position().bounds)
        assert 0 < np.abs(difference).max() < 1e-6
