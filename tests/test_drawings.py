"""The drawings of the ideas: what stands in them is true of the numbers that they are given."""

from __future__ import annotations

import math

import numpy as np

from fwdlib import drawings


def ends(axes):
    """Return the end of each arrow in the legend, by its label."""
    return {line.get_label(): np.concatenate(line.get_data()) for line in axes.lines if line.get_label()[0] != "_"}


def test_the_forward_gradient_is_drawn_on_the_line_of_its_tangent_and_downhill():
    gradient, tangent = np.array([1.2, 0.5]), np.array([-0.9, 0.5])
    (axes,) = drawings.plot_arrow(gradient, tangent).axes
    found = ends(axes)
    (estimate,) = [end for label, end in found.items() if label.startswith("$g =")]
    np.testing.assert_allclose(estimate, (gradient @ tangent) * tangent)
    assert estimate @ gradient > 0


def test_the_mean_of_unit_tangents_is_drawn_on_the_gradient():
    gradient = np.array([1.0, -0.5])
    axes = drawings.plot_arrow(gradient, (1.0, 1.0), others=math.sqrt(2) * np.eye(2)).axes[1]
    np.testing.assert_allclose(ends(axes)["mean of 2"], gradient)


def test_a_dual_number_goes_out_with_the_slope_times_its_tangent():
    (axes,) = drawings.plot_dual(lambda x: (x * x, 2 * x), 3.0, 0.5, "x²").axes
    np.testing.assert_allclose(ends(axes)["out: (9, 3)"], (3.5, 12.0))


def test_only_backprop_goes_back_and_keeps_values():
    back, one_pass = drawings.plot_passes().axes
    kept = [[text.get_text() for text in axes.texts].count("kept in\nmemory") for axes in (back, one_pass)]
    assert kept == [2, 0]
    arrows = [[note for note in axes.texts if getattr(note, "arrow_patch", None)] for axes in (back, one_pass)]
    ways = [[note.xy[0] > note.xyann[0] for note in notes] for notes in arrows]
    assert ways == [[True, False] * 3, [True] * 6]
