"""Gradient descent on a function of a few numbers, with many replicates at once.

:func:`fwdlib.training.train` is for models and data. Here there is no model, no data and no test set, and the minimum
is known, so a step is one line. The loop around it must be cheap: a step on two numbers takes less time than ``train``
needs to check whether an evaluation is due.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import trange

from fwdlib import runtime
from fwdlib.checks import check_count, check_positive
from fwdlib.estimators import Estimator, GradientEstimate
from fwdlib.methods.functions import as_objective
from fwdlib.seeds import replicated_estimate, single_estimate
from fwdlib.tangents import check_params


class Descent(NamedTuple):
    """R replicates, recorded T + 1 times. A replicate that has stopped keeps its last record."""

    steps: Tensor
    """The iterations of the records, from 0 to ``num_iterations``, shape (T + 1,)."""
    values: Tensor
    """The values of the function, shape (R, T + 1); infinite once a replicate has diverged."""
    points: Tensor
    """The last point of each, shape (R, n)."""
    trajectories: Tensor | None
    """The points at ``steps``, shape (R, T + 1, n); None unless they were asked for."""
    iterations: Tensor
    """The iteration at which each stopped, shape (R,)."""
    status: list[str]
    """How each ended: ``"reached"`` the threshold, ``"completed"``, or ``"diverged"`` (the value was not finite)."""

    def thinned(self, num_records: int = 100) -> dict[str, list]:
        """Return some of the records, evenly spaced on a logarithmic axis, to save and to draw.

        Args:
            num_records: at most.

        Returns:
            Lists of the shapes above: ``steps``, ``values`` and, if there are trajectories, ``paths``.
        """
        last = len(self.steps) - 1
        kept = torch.logspace(0, math.log10(last + 1), num_records, dtype=torch.float64).round().long().unique() - 1
        found = {"steps": self.steps[kept].tolist(), "values": self.values[:, kept].tolist()}
        return found | ({} if self.trajectories is None else {"paths": self.trajectories[:, kept].tolist()})


@torch.no_grad()
def minimise(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    estimator: Estimator,
    *,
    learning_rate: float | Sequence[float] | Tensor,
    num_iterations: int,
    seeds: Sequence[int] = (0,),
    every: int = 1,
    threshold: float = -math.inf,
    keep_trajectories: bool = False,
    progress: str | None = "descent",
) -> Descent:
    r"""Descend by :math:`x \leftarrow x - \eta\, g(x)`, once for each of R replicates.

    The replicates run side by side, and one that stops is taken out. Each draws what it would draw alone, so its
    numbers are those of a single run, up to rounding. For a grid of learning rates, make one call with each rate
    repeated for each seed. If a step handles a million numbers, call :func:`fwdlib.runtime.keep_freed_memory` first:
    the descent then takes a sixth of the time.

    Args:
        function: point (n,) -> scalar, such as those of :mod:`fwdlib.methods.functions`.
        start: shape (n,), or (R, n) with a point for each replicate. It sets the dtype and the device.
        estimator: ``(objective, params) -> GradientEstimate``; the point is the only parameter. If it takes a keyword
            ``generator``, each replicate gets its own.
        learning_rate: eta, or one for each replicate.
        num_iterations: the largest number of steps.
        seeds: of the tangents, one for each replicate; they may repeat.
        every: iterations between two records. The stopping rule is checked only at these records.
        threshold: stop a replicate once a recorded value is at most this.
        keep_trajectories: whether to return the points of all records.
        progress: title of the progress bar; None for no bar.

    Returns:
        The records, and how each replicate ended. Divergence is a result, not an error.

    Raises:
        ValueError: if a shape, a count or a learning rate is out of range.
        TypeError: if the start is not a real floating tensor.

    Example:
        >>> from fwdlib.estimators import backprop_gradient
        >>> from fwdlib.methods.functions import sphere
        >>> start = torch.tensor([1.0, -1.0])
        >>> minimise(sphere, start, backprop_gradient, learning_rate=0.25, num_iterations=3, progress=None).values
        tensor([[2.0000, 0.5000, 0.1250, 0.0312]])
    """
    check_count("num_iterations", num_iterations)
    check_count("every", every)
    check_params({"start": start})
    num = check_count("the number of seeds", len(seeds))
    points = _for_each("start", start, 1, num)
    rates = _for_each("learning_rate", torch.as_tensor(learning_rate, dtype=start.dtype, device=start.device), 0, num)
    for rate in rates.unique().tolist():
        check_positive("learning_rate", rate)

    generators = [runtime.generator(seed, start.device) for seed in seeds]
    estimate = _stack(estimator, function, generators)
    rows = torch.arange(num, device=start.device)  # the replicate of each row
    steps = torch.tensor([*range(0, num_iterations, every), num_iterations])
    iterations, ends = torch.zeros_like(rows), points.clone()
    values = points.new_empty(num, len(steps))
    trajectories = points.new_empty(num, len(steps), points.shape[1]) if keep_trajectories else None

    for iteration in trange(num_iterations + 1, desc=progress, leave=False, disable=progress is None):
        loss, grads = estimate(points)
        if iteration % every == 0 or iteration == num_iterations:
            record = -(-iteration // every)
            values[rows, record] = torch.where(loss.isfinite(), loss, math.inf)
            iterations[rows], ends[rows] = iteration, points
            if trajectories is not None:
                trajectories[rows, record] = points
            going = loss.isfinite() & (loss > threshold)
            if not going.any():
                break
            if not going.all():
                points, rates, grads, rows = points[going], rates[going], grads[going], rows[going]
                estimate = _stack(estimator, function, [generators[i] for i in rows.tolist()])
        points = points - rates.unsqueeze(1) * grads

    last = torch.arange(len(steps)).minimum(-(-iterations.cpu().unsqueeze(1) // every)).to(start.device)
    values = values.gather(1, last)
    if trajectories is not None:
        trajectories = trajectories.gather(1, last.unsqueeze(2).expand_as(trajectories))
    status = [_status(value, threshold) for value in values[:, -1].tolist()]
    return Descent(steps, values, ends, trajectories, iterations, status)


def step_of(function: Callable[[Tensor], Tensor], start: Tensor, estimator: Estimator) -> Callable[[], None]:
    """Return a function that takes one step of a single replicate, for timing: estimate and update.

    The learning rate is so small that the point hardly moves.

    Args:
        function: point (n,) -> scalar.
        start: shape (n,).
        estimator: ``(objective, params) -> GradientEstimate``; it draws from torch's global generator.
    """
    objective, params = as_objective(function), {"x": start}

    def step() -> None:
        params["x"] = params["x"] - 1e-12 * estimator(objective, params).grads["x"]

    return step


def _for_each(name: str, given: Tensor, dims: int, num: int) -> Tensor:
    # Returns a row of `dims` axes for each replicate; given is one row for all of them, or one for each.
    rows = given.expand(num, *given.shape) if given.dim() == dims else given
    if rows.dim() != dims + 1 or len(rows) != num:
        one = "a number" if dims == 0 else "of shape (n,)"
        raise ValueError(f"{name} must be {one}, or have a row for each of the {num} seeds, got {tuple(given.shape)}")
    return rows.clone()  # forward mode refuses rows that share their memory


def _stack(
    estimator: Estimator, function: Callable[[Tensor], Tensor], generators: list[torch.Generator]
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    # From points (R, n) to values (R,) and gradients (R, n). A single row avoids vmap, which is most of a step's time.
    if len(generators) > 1:
        every_row = replicated_estimate(estimator, as_objective(function), generators)
        return lambda points: _parts(every_row({"x": points}))
    one_row = single_estimate(estimator, as_objective(function), generators)
    return lambda points: tuple(part.unsqueeze(0) for part in _parts(one_row({"x": points[0]})))


def _parts(estimate: GradientEstimate) -> tuple[Tensor, Tensor]:
    return estimate.loss, estimate.grads["x"]


def _status(value: float, threshold: float) -> str:
    return "diverged" if math.isinf(value) else "reached" if value <= threshold else "completed"
