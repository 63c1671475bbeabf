"""Processes to differentiate: a differential equation, a partial one, a training loop, a recurrent layer.

Each function returns a :class:`~fwdlib.methods.process.ProcessLoss`, or the step of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from fwdlib.checks import check_positive
from fwdlib.methods.process import ProcessLoss, Tree
from fwdlib.tangents import Params


def runge_kutta(slope: Callable[[Tree, Params], Tree], step_size: float) -> Callable[[Tree, Params], Tree]:
    """Return a step of the classical Runge-Kutta method of order 4 for the equation z' = slope(z, params).

    Args:
        slope: ``(state, params) -> derivative by time``, a nest of tensors like the state.
        step_size: the time of a step.
    """
    h = check_positive("step_size", step_size)

    def step(state: Tree, params: Params) -> Tree:
        def ahead(k: Tree, time: float) -> Tree:
            return tree_map(lambda x, y: x + time * y, state, k)

        one = slope(state, params)
        two = slope(ahead(one, h / 2), params)
        three = slope(ahead(two, h / 2), params)
        four = slope(ahead(three, h), params)
        return tree_map(lambda x, a, b, c, d: x + h / 6 * (a + 2 * b + 2 * c + d), state, one, two, three, four)

    return step


def lotka_volterra(state: tuple[Tensor, Tensor], params: Params) -> tuple[Tensor, Tensor]:
    r"""Return the slope of Lotka and Volterra's equations, prey x and predators y.

    .. math:: x' = a x - b x y, \qquad y' = d x y - c y

    Args:
        state: x and y, of any one shape.
        params: ``a``, the growth of the prey, ``b``, how much of it a predator eats, ``c``, the death of predators, and
            ``d``, their growth by prey.
    """
    x, y = state
    return params["a"] * x - params["b"] * x * y, params["d"] * x * y - params["c"] * y


def lorenz(state: tuple[Tensor, Tensor, Tensor], params: Params) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the slope of Lorenz's equations, which are chaotic near rho = 28.

    .. math:: x' = 10\,(y - x), \qquad y' = x\,(\rho - z) - y, \qquad z' = x y - \tfrac83 z

    Args:
        state: x, y and z, of any one shape.
        params: ``rho``.
    """
    x, y, z = state
    return 10 * (y - x), x * (params["rho"] - z) - y, x * y - 8 / 3 * z


def reaction_diffusion(step_size: float) -> Callable[[Tensor, Params], Tensor]:
    r"""Return a step of Euler's method for diffusion, flow and growth on a periodic grid with cells of length 1.

    .. math:: u_t = D\, \Delta u - c_x u_x - c_y u_y + r\, u\, (1 - u) - k\, u

    Args:
        step_size: the time of a step; stable below :math:`1/(4 D)`.

    Returns:
        A function of the state (..., height, width) and of the parameters ``D``, ``cx``, ``cy``, ``r`` and ``k``.
    """
    h = check_positive("step_size", step_size)

    def step(u: Tensor, p: Params) -> Tensor:
        left, right, up, down = u.roll(1, -1), u.roll(-1, -1), u.roll(1, -2), u.roll(-1, -2)
        diffusion = p["D"] * (left + right + up + down - 4 * u)
        flow = 0.5 * (p["cx"] * (right - left) + p["cy"] * (down - up))
        return u + h * (diffusion - flow + p["r"] * u * (1 - u) - p["k"] * u)

    return step


def training(
    loss: Callable[[Params, Tensor, Tensor], Tensor],
    weights: Params,
    inputs: Tensor,
    targets: Tensor,
    validation: Callable[[Params], Tensor],
    at: Mapping[int, Any] | None = None,
) -> ProcessLoss:
    r"""Return the training of a model by SGD as a process, whose parameters are ``rate``, ``momentum`` and ``decay``.

    .. math:: m \leftarrow \mu\, m + \nabla L(w) + \lambda\, w, \qquad w \leftarrow w - \eta\, m

    as ``torch.optim.SGD`` has it. The step takes a gradient itself, by ``torch.func.grad``, and the derivative by the
    three parameters goes forward through it.

    Args:
        loss: ``(weights, inputs, targets) -> scalar``.
        weights: the initial ones.
        inputs: those of each step, shape (T, B, ...).
        targets: those of each step, shape (T, B).
        validation: weights -> scalar, the loss that the parameters should make small.
        at: validate after these numbers of steps and sum the losses; None for after the last.
    """

    def step(state: tuple[Params, Params], p: Params, batch: tuple[Tensor, Tensor]) -> tuple[Params, Params]:
        w, m = state
        grads = torch.func.grad(loss)(w, *batch)
        m = {name: p["momentum"] * m[name] + grads[name] + p["decay"] * w[name] for name in w}
        return {name: w[name] - p["rate"] * m[name] for name in w}, m

    initial = weights, {name: torch.zeros_like(w) for name, w in weights.items()}
    if at is None:
        return ProcessLoss(step, initial, lambda state, p: validation(state[0]), len(inputs), inputs=(inputs, targets))
    return ProcessLoss(
        step,
        initial,
        lambda state, p, _: validation(state[0]),
        len(inputs),
        inputs=(inputs, targets),
        observations=dict.fromkeys(at, 0),
    )


RECURRENT = ("recurrent", "input", "bias")
"""The parameters of the recurrent layer, by which its units are element-wise."""


def recurrent_layer(
    sequences: Tensor,
    targets: Tensor,
    num_units: int,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    *,
    every: int | None = None,
) -> ProcessLoss:
    r"""Return a recurrent layer whose units do not mix, with a linear readout, as a process along the sequence.

    .. math:: h_t = \phi(u \odot h_{t-1} + w\, x_t + b)

    Li, Li, Cook, Zhu & Gao 2018, *Independently Recurrent Neural Network (IndRNN)* (arXiv 1803.04831), equation 3.

    Args:
        sequences: numbers, shape (T, B).
        targets: classes, shape (B,).
        num_units: N.
        activation: phi.
        every: read out after so many steps, too, and average the losses; None for after the last step alone.
    """
    num_steps, batch = sequences.shape
    moments = [num_steps] if every is None else sorted({*range(every, num_steps, every), num_steps})

    def step(h: Tensor, p: Params, x: Tensor) -> Tensor:
        return activation(p["recurrent"] * h + p["input"] * x + p["bias"])

    def loss(h: Tensor, p: Params, _: Any) -> Tensor:
        return F.cross_entropy(F.linear(h, p["weight"], p["readout_bias"]), targets) / len(moments)

    start = sequences.new_zeros(batch, num_units)
    observations = dict.fromkeys(moments, 0)
    return ProcessLoss(step, start, loss, num_steps, inputs=sequences.unsqueeze(-1), observations=observations)


def recurrent_parameters(
    num_units: int, num_classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Params:
    """Return initial parameters of :func:`recurrent_layer`: memories of many lengths, and small weights.

    The recurrent weights are uniform in (0, 1), as Li et al. have them for layers that remember for a long time.
    """

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.empty(shape, dtype=dtype).uniform_(low, high, generator=generator)

    bound = num_units**-0.5
    return {
        "recurrent": uniform(num_units, low=0, high=1),
        "input": uniform(num_units, low=-1, high=1),
        "bias": uniform(num_units, low=-0.1, high=0.1),
        "weight": uniform(num_classes, num_units, low=-bound, high=bound),
        "readout_bias": torch.zeros(num_classes, dtype=dtype),
    }
