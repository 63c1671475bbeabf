"""Figures as SVG files: the same figure gives the same bytes, on any processor."""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fwdlib.plotting import STYLE


class RoundedLayout(ConstrainedLayoutEngine):
    """Constrained layout with rounded positions.

    The last bits of a position depend on how a processor does linear algebra. matplotlib names a clip path after all
    bits, and a coordinate halfway between two numbers of the file is rounded by them. So without this, a file could
    change from one machine to the next although it shows the same.
    """

    def execute(self, figure: Figure) -> None:
        """Place the axes of a figure, once: later calls leave them where they are."""
        super().execute(figure)
        for axes in figure.axes:
            axes.set_position(np.round(axes.get_position().bounds, 6))


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure to a file."""
    with matplotlib.style.context(STYLE):  # its hash salt and fonts are used when the file is written
        if figure.get_layout_engine():
            figure.set_layout_engine(RoundedLayout())
        # as savefig() does, which draws everything twice
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None, "Creator": None})
