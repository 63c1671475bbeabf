r"""Least squares for the parameters of a process: forward mode has the Jacobian, so the fit needs nothing else.

The residuals :math:`r` are states minus observations. Beside the state runs its derivative by each parameter, so one
pass gives the Jacobian J. From both come the Gauss-Newton step :math:`-(J^\top J)^{-1} J^\top r` and the standard
errors, the roots of the diagonal of :math:`\hat\sigma^2 (J^\top J)^{-1}`.
"""

from __future__ import annotations

import dataclasses

import torch
from scipy import stats
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fwdlib.checks import check_count
from fwdlib.methods.process import ProcessLoss
from fwdlib.methods.sensitivity import sensitivities
from fwdlib.statistics import Interval
from fwdlib.tangents import Params, sample_tangents


@dataclasses.dataclass
class Fit:
    """Fitted parameters, all of them scalars, and what is known about them."""

    params: Params
    residuals: Tensor
    """Shape (N,)."""
    jacobian: Tensor
    """Shape (N, P)."""
    losses: list[float]
    """Half the sum of squares, before the first round and after each."""

    @property
    def sigma(self) -> float:
        """The standard deviation of an observation."""
        return (self.residuals.square().sum() / self._freedom).sqrt().item()

    @property
    def covariance(self) -> Tensor:
        """Of the estimates, shape (P, P)."""
        return self.sigma**2 * torch.linalg.inv(self.jacobian.T @ self.jacobian)

    def intervals(self, confidence: float = 0.95) -> dict[str, Interval]:
        """Return the interval of each parameter by Student's distribution, as if the process were linear there."""
        off = stats.t.ppf(0.5 + confidence / 2, self._freedom) * self.covariance.diag().sqrt()
        pairs = zip(self.params.items(), off.tolist(), strict=True)
        return {name: Interval(x.item() - o, x.item(), x.item() + o) for (name, x), o in pairs}

    def errors_of_states(self) -> Tensor:
        """Return the standard error of each simulated number, shape (N,)."""
        return ((self.jacobian @ self.covariance) * self.jacobian).sum(1).sqrt()

    @property
    def _freedom(self) -> int:
        return len(self.residuals) - self.jacobian.shape[1]


def linearised(process: ProcessLoss, params: Params, compiled: bool | None = None) -> tuple[Tensor, Tensor]:
    """Return the residuals of a process and their Jacobian, from one pass.

    Args:
        process: its observations are nests of tensors like its state; its loss is not used.
        params: the point, scalars.
        compiled: as for :func:`fwdlib.methods.sensitivity.sensitivity_gradient`.

    Returns:
        Residuals, shape (N,), and Jacobian, shape (N, P), in float64.

    Raises:
        ValueError: if the process has no observations.
    """
    if process.observations is None:
        raise ValueError("a fit by least squares needs a process with observations")
    residuals, rows = [], []
    unit = sample_tangents(params, len(params), "unit")
    for moment in sensitivities(process, params, unit, compiled=compiled, progress=None):
        seen = tree_leaves(process.observations[moment.num_steps])
        residuals += [(z - o).flatten() for z, o in zip(tree_leaves(moment.state), seen, strict=True)]
        rows += [dz.reshape(len(params), -1).T for dz in tree_leaves(moment.tangents)]
    return torch.cat(residuals).double(), torch.cat(rows).double()


def levenberg_marquardt(
    process: ProcessLoss,
    params: Params,
    *,
    max_rounds: int = 30,
    damping: float = 0.01,
    tolerance: float = 1e-4,
    compiled: bool | None = None,
) -> Fit:
    """Fit the parameters of a process to its observations: Gauss-Newton steps, damped where they make the fit worse.

    Args:
        process: as for :func:`linearised`.
        params: where to start, scalars.
        max_rounds: how many steps are tried at most.
        damping: relative to the diagonal; ten times less after a good step, ten times more after a bad one.
        tolerance: a step that changes no parameter by more is the last one.
        compiled: as for :func:`fwdlib.methods.sensitivity.sensitivity_gradient`.

    Returns:
        The best fit found.

    Raises:
        ValueError: if the process has no observations, or diverges at the start.
    """
    r, jacobian = linearised(process, params, compiled)
    if not r.isfinite().all():
        raise ValueError("the process diverges at the parameters to start from")
    losses = [r.square().sum().item() / 2]
    for _ in range(check_count("max_rounds", max_rounds)):
        normal = jacobian.T @ jacobian
        step = torch.linalg.solve(normal + damping * normal.diag().diag(), -jacobian.T @ r)
        tried = {name: p + s.to(p.dtype) for (name, p), s in zip(params.items(), step, strict=True)}
        new_r, new_jacobian = linearised(process, tried, compiled)
        is_better = bool(new_r.square().sum() < r.square().sum())  # False for nan
        if is_better:
            params, r, jacobian = tried, new_r, new_jacobian
        damping = damping / 10 if is_better else damping * 10
        losses.append(r.square().sum().item() / 2)
        if step.abs().max() < tolerance:
            break
    return Fit(params, r, jacobian, losses)
