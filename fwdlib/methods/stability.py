"""The learning rates at which a descent is stable: in theory, for a quadratic, and as measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.func import hessian

from fwdlib.checks import check_count, check_positive
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.methods.functions import sphere
from fwdlib.methods.minimise import minimise


def limits_at(function: Callable[[Tensor], Tensor], minimum: Tensor) -> dict[str, float]:
    """Return the largest stable learning rates, for the quadratic that approximates a function at its minimum.

    Args:
        function: point (n,) -> scalar.
        minimum: shape (n,); the Hessian there must be positive definite.

    Returns:
        ``"backprop"``: 2 over the largest curvature; ``"forward gradient"``: :func:`mean_square_limit`.

    Raises:
        ValueError: if a curvature is not above 0.

    Example:
        >>> from fwdlib.methods.functions import sphere
        >>> {name: round(limit, 6) for name, limit in limits_at(sphere, torch.zeros(2)).items()}
        {'backprop': 1.0, 'forward gradient': 0.25}
    """
    curvatures = torch.linalg.eigvalsh(hessian(function)(minimum))
    return {"backprop": 2 / curvatures.max().item(), "forward gradient": mean_square_limit(curvatures)}


def mean_square_limit(curvatures: Sequence[float] | Tensor, num_tangents: int = 1) -> float:
    r"""Return the learning rate above which descent by forward gradients is unstable in the mean square.

    On the quadratic :math:`\tfrac12 \sum_i \lambda_i x_i^2`, with the mean of K normal tangents, the second moments
    :math:`c_i = \mathbb E\, x_i^2` follow a recursion of their own,

    .. math:: c_i \leftarrow \big(1 - 2\eta\lambda_i + (1 + \tfrac1K)\,\eta^2\lambda_i^2\big)\, c_i
        + \tfrac1K\, \eta^2 \sum_j \lambda_j^2 c_j,

    and shrink to zero as long as :math:`\sum_i \eta\lambda_i / (2K - (K + 1)\,\eta\lambda_i) < 1`. That is the
    condition of least mean squares filters (Feuer & Weinstein 1985, there K = 1). With n equal curvatures
    :math:`\eta < 2K/((n + K + 1)\,\lambda)`; for backprop, or K to infinity, :math:`\eta < 2/\lambda_{\max}`. A single
    run can converge for a long time above the limit: a few other runs then dominate the mean.

    Args:
        curvatures: lambda, the eigenvalues of the Hessian, all above 0.
        num_tangents: K.

    Raises:
        ValueError: if there are no curvatures, one is not above 0, or K is below 1.

    Example:
        >>> round(mean_square_limit([2.0, 2.0]), 6)
        0.25
    """
    curvatures = torch.as_tensor(curvatures, dtype=torch.float64).tolist()
    check_count("the number of curvatures", len(curvatures))
    for curvature in curvatures:
        check_positive("a curvature", curvature)
    k, largest = check_count("num_tangents", num_tangents), max(curvatures)

    def excess(a: float) -> float:  # of the sum over 1, at the rate a / largest
        parts = [a * curvature / largest for curvature in curvatures]
        return sum(part / (2 * k - (k + 1) * part) for part in parts) - 1

    return brentq(excess, 0, (1 - 1e-12) * 2 * k / (k + 1)) / largest  # at the upper end a term is infinite


def fractions_diverged(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    estimator: Estimator,
    rates: Sequence[float] | Tensor,
    *,
    seeds: Sequence[int] = (0,),
    num_iterations: int = 1000,
    progress: str | None = "divergence",
) -> list[float]:
    """Measure which fraction of the seeds diverges at each learning rate: ends above its start, or not finite.

    A finite value above the start counts because a sum of squares grows by a constant factor in each step and takes
    long to overflow. A function that grows with the fourth power overflows within a few steps.

    Args:
        function: point (n,) -> scalar.
        start: shape (n,).
        estimator: as :func:`fwdlib.methods.minimise.minimise` takes it.
        rates: the learning rates.
        seeds: of the tangents, the same at each rate.
        num_iterations: steps.
        progress: title of the progress bar; None for no bar.

    Returns:
        For each rate a number from 0 to 1.

    Raises:
        ValueError: if there are no rates or seeds, or a number is out of range.

    Example:
        >>> from fwdlib.estimators import backprop_gradient
        >>> from fwdlib.methods.functions import sphere
        >>> fractions_diverged(sphere, torch.ones(2), backprop_gradient, [0.9, 1.1], num_iterations=10, progress=None)
        [0.0, 1.0]
    """
    check_count("the number of rates", len(rates))
    found = minimise(
        function,
        start,
        estimator,
        learning_rate=torch.as_tensor(rates, dtype=start.dtype).repeat_interleave(len(seeds)),
        num_iterations=num_iterations,
        seeds=list(seeds) * len(rates),
        every=min(20, num_iterations),
        progress=progress,
    )
    rose = found.values[:, -1] > found.values[:, 0]
    return rose.view(len(rates), len(seeds)).double().mean(1).tolist()


def divergence(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    minimum: Tensor,
    *,
    seeds: Sequence[int],
    num_iterations: int = 1000,
    progress: str | None = "divergence",
) -> dict[str, Any]:
    """Compare backprop with forward gradients of one normal tangent, at learning rates around the limits of both.

    Args:
        function: point (n,) -> scalar.
        start: shape (n,).
        minimum: shape (n,).
        seeds: of the tangents.
        num_iterations: steps.
        progress: title of the progress bar; None for no bar.

    Returns:
        ``limits``, as :func:`limits_at` returns them; ``rates``, from an eighth of backprop's limit to four times it;
        ``diverged``, method -> as :func:`fractions_diverged` returns them.
    """
    limits = limits_at(function, minimum)
    rates = limits["backprop"] * 2 ** (torch.arange(-6, 5, dtype=torch.float64) / 2)
    how = {"num_iterations": num_iterations, "progress": progress}
    diverged = {
        "backprop": fractions_diverged(function, start, backprop_gradient, rates, **how),
        "forward gradient": fractions_diverged(
            function, start, partial(forward_gradient, tangents="normal"), rates, seeds=seeds, **how
        ),
    }
    return {"rates": rates.tolist(), "diverged": diverged, "limits": limits}


def growth(
    rates: Tensor, *, curvature: float = 2.0, n: int = 2, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    r"""Return the factor by which a step multiplies a quadratic with the same curvature in all n dimensions.

    Write :math:`a = \eta\lambda`. Backprop multiplies the value by :math:`(1 - a)^2`. A forward gradient of one normal
    tangent, with component z along x and w across it, multiplies it by :math:`(1 - a z^2)^2 + a^2 z^2 |w|^2`, whatever
    x is. The mean of this factor is :math:`1 - 2a + (n + 2)\,a^2`. After many steps, a run follows the *typical* factor
    :math:`\exp \mathbb E \log`, which is smaller.

    Args:
        rates: eta, shape (R,).
        curvature: lambda.
        n: dimensions.
        generator: of the 200 000 tangents from which the typical factor is computed.

    Returns:
        ``backprop``, ``mean`` and ``typical``, shape (R,).

    Example:
        >>> factors = growth(torch.tensor([0.25]), generator=torch.Generator().manual_seed(0))
        >>> {name: round(factor.item(), 2) for name, factor in factors.items()}
        {'backprop': 0.25, 'mean': 1.0, 'typical': 0.68}
    """
    check_positive("curvature", curvature)
    a = curvature * rates
    squares = torch.randn(200_000, check_count("n", n), generator=generator, dtype=a.dtype, device=a.device).square()
    along, across = squares[:, 0], squares[:, 1:].sum(1)
    logs = [((1 - each * along) ** 2 + each**2 * along * across).log().mean() for each in a]
    return {"backprop": (1 - a) ** 2, "mean": 1 - 2 * a + (n + 2) * a**2, "typical": torch.stack(logs).exp()}


def measure_growth(
    rates: Tensor, *, n: int = 2, num_seeds: int = 100, num_iterations: int = 100, progress: str | None = "growth"
) -> list[dict[str, float]]:
    """Measure the factors of :func:`growth` on the sphere, in each step of each run.

    Args:
        rates: shape (R,).
        n: dimensions.
        num_seeds: runs at each rate, all with the same tangents.
        num_iterations: steps of each run.
        progress: title of the progress bar; None for no bar.

    Returns:
        A row for each rate: ``rate``, ``mean`` and its standard ``error``, and ``typical``, the geometric mean.
    """
    found = minimise(
        sphere,
        rates.new_ones(n),
        partial(forward_gradient, tangents="normal"),
        learning_rate=rates.repeat_interleave(num_seeds),
        num_iterations=num_iterations,
        seeds=list(range(num_seeds)) * len(rates),
        progress=progress,
    )
    factors = (found.values[:, 1:] / found.values[:, :-1]).view(len(rates), -1)
    error = factors.std(1) / factors.shape[1] ** 0.5
    columns = torch.stack([rates, factors.mean(1), error, factors.log().mean(1).exp()], 1)
    return [dict(zip(("rate", "mean", "error", "typical"), row, strict=True)) for row in columns.tolist()]
