"""Test functions of optimization, whose minima are known.

Each takes a point. :func:`as_objective` turns it into an objective for the estimators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fwdlib.objectives import Objective


def as_objective(function: Callable[[Tensor], Tensor]) -> Objective:
    """Return a function of a point as an objective: ``params -> function(params["x"])``.

    Example:
        >>> as_objective(sphere)({"x": torch.tensor([1.0, 2.0])})
        tensor(5.)
    """
    return lambda params: function(params["x"])


def beale(point: Tensor) -> Tensor:
    r"""Evaluate the function of Beale (1958): a long flat valley that bends towards its minimum, between steep walls.

    .. math:: f(x, y) = (1.5 - x + xy)^2 + (2.25 - x + xy^2)^2 + (2.625 - x + xy^3)^2

    Minimum 0 at (3, 0.5); usual domain -4.5 to 4.5 in both. Source: E. M. L. Beale 1958, *On an iterative method for
    finding a local minimum of a function of more than one variable*.

    Args:
        point: shape (2,).

    Returns:
        A scalar.

    Raises:
        ValueError: if the point has another shape.

    Example:
        >>> beale(torch.tensor([3.0, 0.5])), beale(torch.tensor([0.0, 0.0]))
        (tensor(0.), tensor(14.2031))
    """
    _check_point("beale", point, exactly=2)
    x, y = point.unbind()
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def rosenbrock(point: Tensor) -> Tensor:
    r"""Evaluate the function of Rosenbrock (1960): a curved valley with a gentle floor and steep walls.

    .. math:: f(x) = \sum_{i=1}^{n-1} 100\,(x_{i+1} - x_i^2)^2 + (1 - x_i)^2

    Minimum 0 at (1, ..., 1); from n = 4 on there is a second, local one near (-1, 1, ..., 1). Usual domain -5 to 10 in
    each. Source: H. H. Rosenbrock 1960, *An automatic method for finding the greatest or least value of a function*,
    The Computer Journal 3, for n = 2; chained to more as is common.

    Args:
        point: shape (n,), n at least 2.

    Returns:
        A scalar.

    Raises:
        ValueError: if the point has another shape.

    Example:
        >>> rosenbrock(torch.ones(5)), rosenbrock(torch.tensor([-1.0, 0.0]))
        (tensor(0.), tensor(104.))
    """
    _check_point("rosenbrock", point, at_least=2)
    x, following = point[:-1], point[1:]
    # alpha, not 100 * ...: torch would wrap a factor in a tensor without a tangent, and that doubles the time of a jvp.
    return torch.add((1 - x) ** 2, (following - x**2) ** 2, alpha=100).sum()


def sphere(point: Tensor) -> Tensor:
    r"""Evaluate the sum of squares. Its Hessian is 2 I everywhere, so descent on it can be computed exactly.

    .. math:: f(x) = \sum_{i=1}^{n} x_i^2

    Minimum 0 at 0; usual domain -5.12 to 5.12 in each. Source: the first of the functions of K. A. De Jong 1975, *An
    analysis of the behavior of a class of genetic adaptive systems*.

    Args:
        point: shape (n,).

    Returns:
        A scalar.

    Raises:
        ValueError: if the point has another shape.

    Example:
        >>> sphere(torch.tensor([3.0, 4.0]))
        tensor(25.)
    """
    _check_point("sphere", point)
    return (point**2).sum()


def styblinski_tang(point: Tensor) -> Tensor:
    r"""Evaluate the function of Styblinski and Tang (1990): two valleys in each dimension, one deeper than the other.

    .. math:: f(x) = \frac12 \sum_{i=1}^{n} x_i^4 - 16 x_i^2 + 5 x_i

    Minimum -39.16617 n at (-2.903534, ...); a component that enters the other valley ends at 2.746803. Usual domain -5
    to 5 in each. Source: M. A. Styblinski & T.-S. Tang 1990, *Experiments in nonconvex optimization: stochastic
    approximation with function smoothing and simulated annealing*, Neural Networks 3.

    Args:
        point: shape (n,).

    Returns:
        A scalar.

    Raises:
        ValueError: if the point has another shape.

    Example:
        >>> styblinski_tang(torch.full((3,), -2.903534)) / 3
        tensor(-39.1662)
    """
    _check_point("styblinski_tang", point)
    quartic = torch.add(point**4, point**2, alpha=-16)  # alpha: see rosenbrock
    return torch.add(quartic, point, alpha=5).sum() / 2


def _check_point(name: str, point: Tensor, at_least: int = 1, exactly: int | None = None) -> None:
    if point.dim() != 1 or point.shape[0] < at_least or point.shape[0] != (exactly or point.shape[0]):
        wanted = f"({exactly},)" if exactly else f"(n,) with n at least {at_least}"
        raise ValueError(f"{name} takes a point of shape {wanted}, got {tuple(point.shape)}")
