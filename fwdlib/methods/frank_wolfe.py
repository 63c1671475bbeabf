r"""Frank-Wolfe: minimise over a ball without projections, from exact gradients or from forward gradients.

.. math:: s_k = \arg\min_{|s| \le r} \langle d_k, s \rangle, \qquad x_{k+1} = x_k + \gamma_k\, (s_k - x_k)

Each :math:`x_k` is a weighted mean of the start and of vertices of the ball, so it stays inside. On the l1 ball, k
steps give at most k nonzero entries. If :math:`d_k` is the gradient, :math:`f(x_k) - f^*` falls like 1/k for convex,
smooth f (Jaggi 2013, *Revisiting Frank-Wolfe*, theorem 1).

A forward gradient :math:`(\nabla f \cdot v)\, v` cannot simply replace the gradient. A vertex does not depend on the
length of its direction, so it is the vertex of the tangent v, and the loss decides only its sign. The noise does not
shrink with the steps, and :math:`x_k` settles where the vertices average to :math:`x_k` itself. Rostami & Kia 2024
(arXiv 2403.12511) call this a non-vanishing error, and average the past directions:

.. math:: d_k = (1 - \rho_k)\, d_{k-1} + \rho_k\, g_k, \qquad \rho_k = 4\, (k + 8)^{-2/3}, \qquad
    \gamma_k = 2/(k + 8)

**We chose these weights**, because theirs were not available to us. They are those of Mokhtari, Hassani & Karbasi 2020
(*Stochastic Conditional Gradient Methods*, arXiv 1804.09554) for unbiased gradients of bounded variance, who show
:math:`\mathbb E f(x_k) - f^* = O(k^{-1/3})` for convex, smooth f.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fwdlib import runtime
from fwdlib.checks import check_choice, check_count, check_positive

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
DUALS = {"l1": "linf", "l2": "l2", "linf": "l1"}
BALLS = (*ORDERS, "nuclear")
POWER = 2 / 3
OFFSETS = {True: 8.0, False: 2.0}  # averaged: Mokhtari et al.; plain: the classical 2/(k + 2)
SMALL = 256  # matrices with a side up to this are decomposed exactly
SLACK = 1e-4  # relative: single precision may put a point this far outside of a ball


def ball_norm(x: Tensor, ball: str) -> Tensor:
    """Return the norm that defines a ball of :func:`linear_minimiser`.

    Args:
        x: shape (..., P), or (..., m, n) for the nuclear norm, which is the sum of the singular values.
        ball: ``"l1"``, ``"l2"``, ``"linf"`` or ``"nuclear"``.

    Returns:
        Shape (...).

    Raises:
        ValueError: if ``ball`` is unknown, or ``x`` has too few axes for it.

    Example:
        >>> [ball_norm(torch.tensor([3.0, -4.0]), ball).item() for ball in ("l1", "l2", "linf")]
        [7.0, 5.0, 4.0]
    """
    if _is_vector_ball(x, ball):
        return torch.linalg.vector_norm(x, ORDERS[ball], dim=-1)
    return torch.linalg.matrix_norm(x, "nuc")


def linear_minimiser(direction: Tensor, ball: str, radius: float) -> Tensor:
    r"""Return the point s of a ball that minimises :math:`\langle d, s \rangle`.

    ======= ====================================================================
    l1      :math:`-r\, \mathrm{sign}(d_j)\, e_j` for the largest :math:`|d_j|`
    l2      :math:`-r\, d/|d|`
    linf    :math:`-r\, \mathrm{sign}(d)`
    nuclear :math:`-r\, u v^T` for the largest singular value
    ======= ====================================================================

    If several vertices are minimal, the result is their mean, which is minimal too: in the l1 ball, entries of equal
    size share the radius; in the linf ball, a zero entry gives zero; in any ball, the zero direction gives the centre.
    (With the first of the largest entries instead, rademacher tangents, whose entries all have the same size, would
    always move the same parameter.) Between equal singular values the decomposition decides.

    If both sides of a matrix are above 256, its singular vectors come from ``torch.lobpcg``, started from a fixed
    random vector, and are about as precise as the dtype.

    Cost: of the order of the direction's size; for the nuclear norm, that of the singular vectors.

    Args:
        direction: shape (..., P), or (..., m, n) for the nuclear norm; leading axes hold independent
            directions. Where it is nan, the result is nan.
        ball: ``"l1"``, ``"l2"``, ``"linf"`` or ``"nuclear"``.
        radius: r.

    Returns:
        The shape of ``direction``.

    Raises:
        ValueError: if ``ball`` is unknown, the radius is not a finite number above 0, or the direction has too few
            axes.

    Example:
        >>> direction = torch.tensor([1.0, -3.0, 0.0])
        >>> linear_minimiser(direction, "l1", radius=2.0) + 0.0
        tensor([0., 2., 0.])
        >>> linear_minimiser(direction, "linf", radius=2.0) + 0.0
        tensor([-2.,  2.,  0.])
    """
    check_positive("radius", radius)
    if not _is_vector_ball(direction, ball):
        return -radius * _top_singular_pair(direction)
    if ball == "l1":
        largest = direction.abs() == ball_norm(direction, "linf").unsqueeze(-1)  # false everywhere if one is nan
        share = -radius / largest.sum(-1, keepdim=True).to(direction.dtype)
        return direction.sign().mul_(largest).mul_(share)
    if ball == "l2":
        length = ball_norm(direction, "l2").unsqueeze(-1)
        return direction * (-radius / length.where(length != 0, 1.0))
    return direction.sign().mul_(-radius).add_(direction, alpha=0.0)  # the sign of nan is 0, 0 * nan is nan


def _top_singular_pair(matrix: Tensor) -> Tensor:
    # u v^T, or zero for the zero matrix.
    if min(matrix.shape[-2:]) <= SMALL:
        u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[..., :1] @ v[..., :1, :] * (sizes[..., :1, None] > 0)
    if matrix.shape[-2] < matrix.shape[-1]:
        return _top_singular_pair(matrix.mT).mT
    if not matrix.any():
        return torch.zeros_like(matrix)
    start = torch.randn(matrix.shape[-1], 1, generator=runtime.generator(0, purpose="singular vectors"))
    start = start.to(matrix).expand(*matrix.shape[:-2], -1, 1)
    _, v = torch.lobpcg(matrix.mT @ matrix, k=1, X=start)
    u = matrix @ v
    return u / torch.linalg.vector_norm(u, dim=-2, keepdim=True) @ v.mT


def frank_wolfe_gap(grad: Tensor, x: Tensor, ball: str, radius: float) -> Tensor:
    r"""Return how far the linear model of f at x can still fall within the ball: zero where x is stationary.

    .. math:: \max_{|s| \le r} \langle \nabla f(x), x - s \rangle = \langle \nabla f(x), x \rangle + r\,|\nabla f(x)|_*

    For convex f it is at least :math:`f(x) - f^*` (Jaggi 2013, section 2): a bound that can be computed without knowing
    the optimum. The gradient must be exact; from an estimate, the result bounds nothing.

    Args:
        grad: at x, shape (..., P), or (..., m, n) for the nuclear norm.
        x: a point of the ball, of the same shape.
        ball: ``"l1"``, ``"l2"``, ``"linf"`` or ``"nuclear"``.
        radius: r.

    Returns:
        Shape (...).

    Raises:
        ValueError: as :func:`linear_minimiser`.

    Example:
        >>> frank_wolfe_gap(torch.tensor([1.0, -3.0]), torch.tensor([0.0, 2.0]), "l1", radius=2.0)
        tensor(0.)
    """
    check_positive("radius", radius)
    if _is_vector_ball(grad, ball):
        return (grad * x).sum(-1) + radius * ball_norm(grad, DUALS[ball])
    return (grad * x).sum((-2, -1)) + radius * torch.linalg.matrix_norm(grad, 2)


def l2_reach(num_params: int) -> float:
    r"""Return how far plain Frank-Wolfe gets in the l2 ball of radius 1 with one normal tangent in each step.

    The vertex is :math:`-\mathrm{sign}(\nabla f \cdot v)\, v/|v|`. Its mean is :math:`-\mathbb E|u_1|\, \nabla
    f/|\nabla f|` with u uniform on the sphere: the vertex of Frank-Wolfe with the exact gradient in a ball of radius

    .. math:: \mathbb E|u_1| = \frac{\Gamma(P/2)}{\sqrt\pi\, \Gamma((P + 1)/2)} \approx \sqrt{\frac{2}{\pi P}}

    An optimum inside this smaller ball is found; otherwise the result is only the best point of the smaller ball. (We
    derived this closed form.)

    Args:
        num_params: P.

    Returns:
        The radius of the smaller ball.

    Raises:
        ValueError: if ``num_params`` is below 1.

    Example:
        >>> round(l2_reach(1), 4), round(l2_reach(2) * math.pi, 4), round(l2_reach(7850), 4)
        (1.0, 2.0, 0.009)
    """
    check_count("num_params", num_params)
    return math.exp(math.lgamma(num_params / 2) - math.lgamma((num_params + 1) / 2)) / math.sqrt(math.pi)


def frank_wolfe(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    ball: str,
    radius: float,
    averaged: bool = True,
    offset: float | None = None,
    power: float = POWER,
) -> Iterator[Tensor]:
    r"""Yield :math:`x_0, x_1, x_2, \ldots` without end: the algorithm itself, for a function of x.

    .. math:: d_k = d_{k-1} + \rho_k\, (g_k - d_{k-1}), \qquad x_{k+1} = x_k + \gamma_k\, (s(d_k) - x_k)

    with :math:`\gamma_k = 2/(k + c)` and :math:`\rho_k = (c/(k + c))^p`, so that :math:`d_0 = g_0`. With c = 8 and p =
    2/3 these are the weights of Mokhtari et al., see :mod:`fwdlib.methods.frank_wolfe`. Plain Frank-Wolfe has
    :math:`d_k = g_k` and classically c = 2.

    Args:
        gradient: x -> the gradient or an estimate of it; called once in each step.
        start: a point of the ball, shape (..., P), or (..., m, n) for the nuclear norm; leading axes hold independent
            runs.
        ball: ``"l1"``, ``"l2"``, ``"linf"`` or ``"nuclear"``.
        radius: r.
        averaged: whether to average the directions.
        offset: c, at least 2; None for 8 if averaged, else 2.
        power: p, above 0 and at most 1.

    Yields:
        The next point, beginning with ``start``.

    Raises:
        ValueError: if an argument is out of its range, or the start lies outside of the ball.

    Example:
        >>> goal = torch.tensor([0.2, -0.3])
        >>> points = frank_wolfe(lambda x: x - goal, torch.zeros(2), ball="l1", radius=1.0, averaged=False)
        >>> far = [x for _, x in zip(range(2001), points)][-1]
        >>> [round(value, 2) for value in far.tolist()]
        [0.2, -0.3]
    """
    offset, power = _check_schedule(averaged, offset, power)
    _check_inside(start, ball, radius)
    x = average = start
    k = 0
    while True:
        yield x
        gamma, rho = _weights(k, offset, power)
        average = torch.lerp(average, gradient(x), rho) if averaged else gradient(x)
        x = torch.lerp(x, linear_minimiser(average, ball, radius), gamma)
        k += 1


class FrankWolfe(Optimizer):
    r"""Frank-Wolfe as a torch optimizer, for any loop that sets ``.grad`` by backprop or by a forward gradient.

    .. math:: d_k = (1 - \rho_k)\, d_{k-1} + \rho_k\, g_k, \qquad \theta_{k+1} = \theta_k + \gamma_k\, (s(d_k) -
        \theta_k)

    :mod:`fwdlib.methods.frank_wolfe`, :func:`linear_minimiser` and :func:`frank_wolfe` define s, the weights and the
    rates, and name their sources. The numbers are those of :func:`frank_wolfe`.

    **Each parameter group has one ball.** All parameters of a group form one vector: with one l1 ball for weight and
    bias, a step moves a single number among them all. For a ball for each tensor, make each a group of its own,
    ``[{"params": [p], "radius": 5.0} for p in model.parameters()]``. A nuclear ball takes one matrix; all axes of a
    convolution's weight but the first are joined.

    The start must lie inside the ball: zero does, and :func:`shrink_into` scales any start into it. There is no
    learning rate: the radius and a fixed schedule replace it.

    Cost: the average is one number for each parameter, kept between the steps. Plain Frank-Wolfe keeps nothing. A step
    makes the direction and the vertex of one group at a time and frees them at its end.

    Args:
        params: parameters, or groups of them, as for any torch optimizer; a group can have each of the options below.
        ball: ``"l1"``, ``"l2"``, ``"linf"`` or ``"nuclear"``.
        radius: r.
        averaged: whether to average the gradients; if not, Frank-Wolfe with forward gradients does not converge.
        offset: c of the weights, at least 2; None for 8 if averaged, else 2.
        power: p of the weights, above 0 and at most 1.

    Raises:
        ValueError: if an argument is out of its range, or a group does not start in its ball; the message has the norm.

    Example:
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> optimizer = FrankWolfe([weight], ball="l1", radius=2.0, averaged=False)
        >>> weight.grad = torch.tensor([1.0, -3.0, 0.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0., 2., 0.])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        ball: str = "l1",
        radius: float,
        averaged: bool = True,
        offset: float | None = None,
        power: float = POWER,
    ) -> None:
        defaults = {"ball": ball, "radius": radius, "averaged": averaged, "offset": offset, "power": power}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters in a ball of their own, as ``torch.optim.Optimizer`` does.

        Raises:
            ValueError: as for the class.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["offset"], group["power"] = _check_schedule(group["averaged"], group["offset"], group["power"])
            _check_inside(_joined(group["params"], group["ball"]), group["ball"], group["radius"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step in each group that has a gradient; in such a group, a missing gradient counts as zero.

        Args:
            closure: evaluates the model again and returns the loss, as for any torch optimizer; rarely needed.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                self._advance(**group)
        return loss

    def _advance(
        self, params: list[Tensor], ball: str, radius: float, averaged: bool, offset: float, power: float
    ) -> None:
        k = self.state[params[0]].get("step", 0)
        gamma, rho = _weights(k, offset, power)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for p, grad in zip(params, grads, strict=True):
            state = self.state[p]
            state["step"] = k + 1
            if averaged:
                state.setdefault("average", torch.zeros_like(p)).lerp_(grad, rho)
        directions = [self.state[p]["average"] for p in params] if averaged else grads
        vertex = linear_minimiser(_joined(directions, ball), ball, radius).flatten()
        for p, part in zip(params, vertex.split([p.numel() for p in params]), strict=True):
            p.lerp_(part.view_as(p).to(p.dtype), gamma)


def shrink_into(params: Iterable[Tensor], ball: str, radius: float) -> list[Tensor]:
    """Scale parameters in place, all by the same factor, so that they lie in a ball; leave them if they do already.

    This is not a projection onto the nearest point, but it keeps the signs and ratios of an initialisation.

    Args:
        params: one group of :class:`FrankWolfe`.
        ball: ``"l1"``, ``"l2"``, ``"linf"`` or ``"nuclear"``.
        radius: r.

    Returns:
        The parameters, for a line like ``FrankWolfe(shrink_into(params, "l1", 5.0), ball="l1", radius=5.0)``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> shrink_into([torch.tensor([3.0, -4.0]), torch.tensor([1.0])], "l1", radius=2.0)
        [tensor([ 0.7500, -1.0000]), tensor([0.2500])]
    """
    check_positive("radius", radius)
    params = list(params)
    with torch.no_grad():
        norm = ball_norm(_joined(params, ball), ball)
        for p in params:
            p.mul_((radius / norm).clamp(max=1.0))
    return params


def _weights(k: int, offset: float, power: float) -> tuple[float, float]:
    # gamma and rho
    return 2 / (k + offset), (offset / (k + offset)) ** power


def _joined(tensors: list[Tensor], ball: str) -> Tensor:
    # Joins a group to the one vector, or the one matrix, that its ball takes.
    if ball != "nuclear":
        return torch.cat([t.detach().flatten() for t in tensors])
    if len(tensors) != 1 or tensors[0].dim() < 2:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"a nuclear ball takes one matrix, got {shapes}: give each matrix a group of its own")
    return tensors[0].detach().flatten(1)


def _is_vector_ball(x: Tensor, ball: str) -> bool:
    is_vector = check_choice("ball", ball, BALLS) != "nuclear"
    if x.dim() < (1 if is_vector else 2):
        raise ValueError(f"the {ball} ball takes {'vectors' if is_vector else 'matrices'}, got {tuple(x.shape)}")
    return is_vector


def _check_schedule(averaged: bool, offset: float | None, power: float) -> tuple[float, float]:
    offset = OFFSETS[bool(averaged)] if offset is None else check_positive("offset", offset)
    if offset < 2:
        raise ValueError(f"offset must be at least 2, because the first step goes 2/offset of the way, got {offset!r}")
    if check_positive("power", power) > 1:
        raise ValueError(f"power must be at most 1, got {power!r}")
    return offset, power


def _check_inside(x: Tensor, ball: str, radius: float) -> None:
    check_positive("radius", radius)
    largest = ball_norm(x, ball).max().item()
    if not largest <= radius * (1 + SLACK):
        raise ValueError(
            f"the start must lie in the {ball} ball of radius {radius:g}, its norm is {largest:.6g}: start at zero, or "
            f"scale it with shrink_into"
        )
