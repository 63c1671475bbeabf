r"""What the number of tangents, the learning rate and the number of parameters do to a descent: formulas, sliders.

The loss is a bowl that is equally steep in all directions, :math:`L(\theta) = \lambda |\theta|^2 / 2`, so the mean loss
after any number of steps is known exactly, and a single run needs two random numbers a step, whatever the number of
parameters. ``report/page/sliders.js`` has the same functions for the web pages; a test compares the two.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fwdlib.plotting import METHOD_STYLES, styled

if TYPE_CHECKING:
    import ipywidgets

WIDGET, PICTURE = "application/vnd.jupyter.widget-view+json", "image/png"
FLOOR, TOP = 1e-4, 1e4  # of the figure's axis
SEEDS = (1, 2, 3)  # of the runs that the figure shows


def second_moment(num_params: int, num_tangents: int) -> float:
    """Return :math:`E|g|^2 / |grad L|^2` of the mean over normal tangents: (P + K + 1)/K.

    Example:
        >>> second_moment(num_params=15, num_tangents=1)
        17.0
    """
    return (num_params + num_tangents + 1) / num_tangents


def relative_error(num_params: int, num_tangents: int) -> float:
    """Return the root mean square of |g - grad L| / |grad L| for normal tangents: the root of (P + 1)/K.

    Example:
        >>> relative_error(num_params=15, num_tangents=4)
        2.0
    """
    return ((num_params + 1) / num_tangents) ** 0.5


def largest_rate(moment: float) -> float:
    """Return the learning rate, times the curvature, up to which the mean loss on the bowl falls.

    Args:
        moment: the second moment of the estimate; 1 for backprop.

    Example:
        >>> largest_rate(1.0), largest_rate(second_moment(15, 1)) < 0.12
        (2.0, True)
    """
    return 2 / moment


def mean_losses(num_steps: int, rate: float, moment: float) -> list[float]:
    r"""Return the mean loss on the bowl before the first of ``num_steps`` steps and after each, starting from 1.

    A step multiplies :math:`E|\theta|^2` by :math:`1 - 2 \eta\lambda + m\, (\eta\lambda)^2`.

    Args:
        num_steps: how many.
        rate: the learning rate times the curvature.
        moment: the second moment m of the estimate; 1 for backprop.

    Example:
        >>> mean_losses(num_steps=2, rate=0.5, moment=2.0)
        [1.0, 0.5, 0.25]
    """
    factor = 1 - 2 * rate + moment * rate**2
    with np.errstate(over="ignore"):  # a loss that grows becomes infinite
        return (factor ** np.arange(num_steps + 1.0)).tolist()


def run_losses(num_steps: int, rate: float, num_params: int, num_tangents: int, seed: int) -> list[float]:
    r"""Return the loss of one run on the bowl, with the mean of K normal tangents, before each step and after the last.

    The estimate has the part :math:`c/K` along the gradient, in units of its length, and across it one of the squared
    length :math:`c\,w/K^2`, where :math:`c \sim \chi^2_K` and :math:`w \sim \chi^2_{P-1}` are independent. So a step
    multiplies the loss by :math:`(1 - \eta\lambda\, c/K)^2 + (\eta\lambda)^2\, c\,w/K^2`.

    Args:
        num_steps: how many.
        rate: the learning rate times the curvature.
        num_params: P.
        num_tangents: K.
        seed: of the run. A seed draws the same normal numbers for all P and K, so a run changes smoothly with them.

    Example:
        >>> [round(loss, 3) for loss in run_losses(num_steps=2, rate=0.1, num_params=10, num_tangents=10**6, seed=1)]
        [1.0, 0.809, 0.656]
    """
    losses, draws = [1.0], _normals(seed)
    for _ in range(num_steps):
        along = _chi_square(num_tangents, next(draws)) / num_tangents
        across = along * _chi_square(num_params - 1, next(draws)) / num_tangents
        losses.append(losses[-1] * ((1 - rate * along) ** 2 + rate**2 * across))
    return losses


def _chi_square(degrees: int, normal: float) -> float:
    # From a normal number: exact for 0 and 1, else by the cube of Wilson and Hilferty (1931).
    if degrees < 2:
        return degrees * normal**2
    width = 2 / (9 * degrees)
    return degrees * max(0.0, 1 - width + normal * width**0.5) ** 3


def _normals(seed: int) -> Iterator[float]:
    # By Box and Muller's formula, from a generator that JavaScript computes the same: 48271^n modulo 2^31 - 1.
    state = 1000 * seed + 1
    while True:
        state = state * 48271 % (2**31 - 1)
        radius = (-2 * math.log(state / (2**31 - 1))) ** 0.5
        state = state * 48271 % (2**31 - 1)
        angle = 2 * math.pi * state / (2**31 - 1)
        yield radius * math.cos(angle)
        yield radius * math.sin(angle)


@styled
def plot_bowl(num_params: int, num_tangents: int, rate: float, num_steps: int = 200) -> Figure:
    """Draw the mean loss over the steps on a bowl, for backprop and for forward gradients at the same learning rate.

    Thin lines are single runs with forward gradients.

    Args:
        num_params: P.
        num_tangents: K.
        rate: the learning rate times the curvature of the bowl.
        num_steps: of the horizontal axis.

    Returns:
        A figure with one panel, whose title says whether the forward gradient descends.
    """
    figure = Figure(figsize=(6.4, 3))
    axes = figure.subplots()
    moment = second_moment(num_params, num_tangents)
    for name, label, m in (("backprop", "backprop", 1.0), ("forward gradient", "forward gradient, mean", moment)):
        losses = np.clip(mean_losses(num_steps, rate, m), FLOOR, TOP)
        axes.plot(losses, label=label, **METHOD_STYLES[name])
    for seed in SEEDS:
        losses = np.clip(run_losses(num_steps, rate, num_params, num_tangents, seed), FLOOR, TOP)
        label = "three runs of it" if seed == SEEDS[0] else None
        axes.plot(losses, label=label, color=METHOD_STYLES["forward gradient"]["color"], linewidth=0.7, alpha=0.6)
    axes.set(yscale="log", ylim=(FLOOR, TOP), xlabel="steps", ylabel="loss, over that at the start")
    verdict = "falls" if rate < largest_rate(moment) else "grows"
    title = f"P = {num_params:,}, K = {num_tangents}, rate {rate:.3g}: its mean loss {verdict}"
    axes.set(title=f"{title} (limit {largest_rate(moment):.3g})")
    axes.legend(loc="lower left")
    return figure


class Sliders:
    """Three sliders and the figure of :func:`plot_bowl`; where no widget can be shown, the figure alone.

    Args:
        num_params: P at the start.
        num_tangents: K at the start.
        rate: the learning rate, times the curvature, at the start.
    """

    def __init__(self, num_params: int = 100, num_tangents: int = 1, rate: float = 0.01) -> None:
        self.start = {"num_params": num_params, "num_tangents": num_tangents, "rate": rate}

    def widget(self) -> ipywidgets.Widget:
        """Return the widget: three sliders with powers as values, and the figure that follows them."""
        import ipywidgets

        wide = {"layout": {"width": "95%"}, "style": {"description_width": "10em"}, "base": 10}
        powers = {
            "num_tangents": ipywidgets.FloatLogSlider(min=0, max=3, step=0.1, description="tangents K", **wide),
            "rate": ipywidgets.FloatLogSlider(min=-6, max=0.4, step=0.05, description="learning rate", **wide),
            "num_params": ipywidgets.FloatLogSlider(min=0, max=6, step=0.1, description="parameters P", **wide),
        }
        for name, slider in powers.items():
            slider.value = self.start[name]
        picture = ipywidgets.Image(format="png")

        def draw(_change: object = None) -> None:
            values = {name: slider.value for name, slider in powers.items()}
            values |= {name: round(values[name]) for name in ("num_tangents", "num_params")}
            picture.value = _png(plot_bowl(**values))

        for slider in powers.values():
            slider.observe(draw, "value")
        draw()
        return ipywidgets.VBox([*powers.values(), picture])

    def _repr_mimebundle_(self, **_options: Any) -> Mapping[str, Any]:
        bundle = {"text/plain": "sliders for K, the learning rate and P", PICTURE: _png(plot_bowl(**self.start))}
        shown = self.widget()._repr_mimebundle_()
        return bundle | {WIDGET: shown[WIDGET]}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
