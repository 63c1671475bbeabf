"""The projection of the gradient onto the span of several tangents (Flügel et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from fwdlib.checks import check_choice, check_count
from fwdlib.estimators import GradientEstimate
from fwdlib.forward.derivatives import derivatives_along
from fwdlib.objectives import Objective, check_objective, through_hooks
from fwdlib.tangents import AnyGenerator, Params, Sampler, sample_tangents, weighted_sum

RESCALES = ("unbiased",)
RANK_TOLERANCE = 1e-12  # eigenvalues below it, relative to the largest, count as zero


@torch.no_grad()
def projected_gradient(
    objective: Objective,
    params: Params,
    *,
    num_tangents: int = 1,
    tangents: str | Sampler = "normal",
    rescale: str | None = None,
    chunk_size: int | None = None,
    generator: AnyGenerator = None,
) -> GradientEstimate:
    r"""Project the gradient orthogonally onto the span of K tangents, from directional derivatives alone.

    .. math:: g(\theta) = V\,(V^\top V)^{-1}\,d = P_V \nabla f(\theta), \qquad d = V^\top \nabla f(\theta)

    with the tangents as the columns of V: of all vectors in their span the one closest to the gradient. Flügel,
    Coquelin, Weiel, Debus, Streit & Götz 2024, *Beyond Backpropagation: Optimization with Multi-Tangent Forward
    Gradients* (arXiv 2410.17764), the orthogonal projection, "FROG". For K >= P tangents in general position it is the
    gradient itself. It is never longer than the gradient, up to rounding, and it depends on the span alone.

    Bias: :math:`\mathbb E g = K/P\, \nabla f` for K <= P normal or orthonormal tangents, P being the number of
    parameters: always too short. ``rescale="unbiased"`` multiplies by P over the rank of V, and there is none. For
    rademacher tangents the same holds with the expected rank for K, which is less than K only where P is small. The
    components of rank-one tangents are not exchangeable between tensors, so for them neither holds exactly.

    Mean squared error: :math:`(1 - K/P)\, |\nabla f|^2`, and :math:`\mathbb E|g|^2 = K/P\, |\nabla f|^2`; rescaled
    :math:`(P/K - 1)\, |\nabla f|^2`, that of the mean over orthonormal tangents, and less by :math:`(1 + 1/K)\, |\nabla
    f|^2` than that of the mean over normal ones. The squared cosine with the gradient is K/P on average.

    So a learning rate of :func:`forward_gradient` has to be multiplied by about P/K to suit it.

    Cost: K jvps as in :func:`forward_gradient`, and :math:`O(K^2 P + K^3)` for the Gram matrix, that is O(K P) more for
    each jvp: no small part of it where a batch is small. The matrix is summed and decomposed in float64 whatever the
    parameters are, and for float64 ones the solution is refined once, so that the error is about the condition number
    of V times the rounding of the jvps, not its square.

    Tangents that are repeated, zero or more than P are welcome: the Gram matrix of the tangents, scaled to unit length,
    is inverted through its eigenvalues, and one below 1e-12 of the largest counts as zero. What is left is the
    projection onto the span of the others.

    Args:
        objective: params -> scalar.
        params: the point, a dict of real tensors.
        num_tangents: K, how many tangents to project on.
        tangents: ``"normal"``, ``"rademacher"``, ``"orthonormal"``, ``"rank-one"`` or a sampler (see
            :mod:`fwdlib.tangents`).
        rescale: None for the projection, ``"unbiased"`` for P over the rank times it.
        chunk_size: how many tangents go through the model at once; None for all.
        generator: where the tangents come from; None for torch's global generator.

    Returns:
        The estimate; ``jvps`` has shape (K,).

    Raises:
        ValueError: if ``num_tangents`` or ``chunk_size`` is below 1, ``tangents`` or ``rescale`` is unknown, there are
            no parameters, or the objective is not a scalar.
        TypeError: if a parameter is not a real floating tensor, or as :func:`fwdlib.forward_gradient`.

    Example:
        >>> objective = lambda p: (p["x"] ** 2).sum()
        >>> params = {"x": torch.tensor([1.0, 2.0])}
        >>> draw = torch.Generator().manual_seed(0)
        >>> shadow = projected_gradient(objective, params, generator=draw).grads["x"]  # on a line
        >>> whole = projected_gradient(objective, params, num_tangents=2, generator=draw).grads["x"]
        >>> round(shadow.norm().item(), 2), [round(value, 4) for value in whole.tolist()]
        (1.22, [2.0, 4.0])
    """
    if rescale is not None:
        check_choice("rescale", rescale, RESCALES)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_objective(objective, params)
    sampled = sample_tangents(params, num_tangents, tangents, generator)
    found = derivatives_along(objective, params, sampled, chunk_size=chunk_size)
    sampled = found.trained(sampled)
    coefficients, rank = _solve_gram(sampled, found.jvps)
    if rescale == "unbiased":
        coefficients = coefficients * (sum(p.numel() for p in params.values()) / rank.clamp(min=1))
    grads = {name: weighted_sum(coefficients, v) for name, v in sampled.items()}
    return GradientEstimate(found.loss, through_hooks(objective, params, grads), found.jvps)


def _solve_gram(tangents: Params, jvps: Tensor) -> tuple[Tensor, Tensor]:
    # The least c with V^T V c = d, and the rank of V. By eigenvalues rather than Cholesky, which is faster but neither
    # tells the rank nor fails reliably where it is short; and without a branch on data, so that it can be vmapped.
    rows, d = [v.reshape(len(jvps), -1) for v in tangents.values()], jvps.double()
    gram = sum(wide @ wide.mT for wide in map(Tensor.double, rows))
    squares = gram.diagonal()
    scale = torch.where(squares > 0, squares, torch.inf).rsqrt()  # a zero tangent stays zero
    values, vectors = torch.linalg.eigh(scale.unsqueeze(1) * gram * scale)
    kept = values > RANK_TOLERANCE * values[-1]
    root = scale.unsqueeze(1) * vectors * torch.where(kept, values, torch.inf).rsqrt()  # root root^T inverts the matrix
    c = root @ (root.mT @ d)
    if jvps.dtype == d.dtype:  # else the rounding of the jvps is more than that of c
        c = c + root @ (root.mT @ (d - sum(wide @ (c @ wide) for wide in map(Tensor.double, rows))))
    return c, kept.sum(dtype=d.dtype)
