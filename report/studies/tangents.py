"""Several tangents in a step: how far their mean and the projection descend, each with its own learning rate.

The functions have a known minimum and from 2 to 1024 numbers, after Flügel et al. 2024. All results are in one file,
which is saved after each case, so the study can be interrupted. The cases that the page needs most come first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from tqdm import tqdm, trange

from fwdlib import runtime
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.methods.functions import as_objective, rosenbrock, sphere, styblinski_tang
from fwdlib.methods.projection import projected_gradient
from fwdlib.results import write_json
from fwdlib.tangents import sample_tangents
from report.grids import best, runs_of
from report.names import STYBLINSKI_TANG, TANGENTS
from report.studies.common import main, reopen

RATIO = 2**0.5  # the grid of learning rates is a power of this times what theory suggests, ...
POWERS = (-2, -1, 0, 1, 2, 3, 4)  # ... with these powers, and more if the best is at an end


class Problem(NamedTuple):
    """A function to descend on."""

    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    """The first number, and all others."""
    num_steps: int
    curvature: float
    """The largest at the minimum. The best rate of backprop is about 1 / curvature."""
    sizes: tuple[int, ...]
    """Dimensions n, in the order in which they are measured."""
    minimum: float = 0.0
    """For each of the n numbers."""


METHODS: dict[str, tuple[Estimator, int]] = {"backprop": (backprop_gradient, 1)}  # and K
METHODS |= {f"mean, K = {k}": (forward_gradient, k) for k in (1, 2, 4, 16)}
METHODS |= {f"projection, K = {k}": (projected_gradient, k) for k in (1, 2, 4, 16)}


class Settings(NamedTuple):
    """Length of the study."""

    problems: dict[str, Problem]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning_seeds: tuple[int, ...] = (101, 102, 103)

    def kept(self) -> dict[str, Any]:
        """Return what the measurements depend on, as the file keeps it."""
        return {
            "seeds": self.seeds,
            "tuning_seeds": self.tuning_seeds,
            "tangents": "normal",
            "dtype": "float64",
            "powers": POWERS,
            "grid": "powers of the square root of 2 times the suggested rate",
            "problems": {
                name: {"start": problem.start, "num_steps": problem.num_steps, "curvature": problem.curvature}
                for name, problem in self.problems.items()
            },
        }


SIZES = (1024, 256, 64, 2, 4, 8, 16, 32, 128, 512)
SIZES_OF_ROSENBROCK = (2, 16, 64, 128, 4, 1024, 256, 8, 32, 512)
FULL = Settings(
    {
        "sphere": Problem(sphere, (-1.0, -1.0), 1000, 2.0, SIZES),
        "styblinski_tang": Problem(styblinski_tang, (0.0, 0.0), 1000, 34.6, SIZES, STYBLINSKI_TANG),
        "rosenbrock": Problem(rosenbrock, (-1.0, 0.0), 25_000, 1002.0, SIZES_OF_ROSENBROCK),
    }
)
SHORT = Settings(
    {
        "sphere": FULL.problems["sphere"]._replace(sizes=(1024, 2)),
        "styblinski_tang": FULL.problems["styblinski_tang"]._replace(sizes=(1024, 2)),
        "rosenbrock": FULL.problems["rosenbrock"]._replace(sizes=(2, 16), num_steps=2_500),
    }
)


def measure(settings: Settings, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Tune and measure all methods on the problems that the file in ``folder`` does not hold yet.

    Returns:
        The content of the file: ``settings``, ``environment``; ``sizes``, those of each problem; and ``runs``, for each
        problem, n, method and power of the learning rate the last values above the minimum, with the tuning seeds and
        with the others, infinite where the descent has diverged.
    """
    file, problems = folder / TANGENTS, settings.problems
    found = reopen(file, settings.kept(), runs=[]) | {"sizes": {name: problems[name].sizes for name in problems}}
    cases = [(name, n, method) for name, n in in_turn(problems, parts) for method in METHODS]
    for name, n, method in (bar := tqdm(cases, desc="tangents", unit="case")):
        bar.set_postfix_str(f"{name}, n = {n}, {method}")
        for run in tune(settings, name, n, method, runs_of(found["runs"], name, n, method)):
            found["runs"].append(run)
            write_json(file, found)
    return found


def in_turn(problems: dict[str, Problem], names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield the first size of each problem, then the second of each, so that an interrupt leaves something of all."""
    for sizes in zip_longest(*(problems[name].sizes for name in names)):
        yield from ((name, n) for name, n in zip(names, sizes, strict=True) if n is not None)


def tune(settings: Settings, name: str, n: int, method: str, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the runs of a case that are missing, until the best learning rate is not at an end of the grid."""
    powers, runs = {*POWERS, *(run["power"] for run in runs)}, list(runs)
    while True:
        missing = sorted(powers - {run["power"] for run in runs})
        if missing:
            new = run_grid(settings, name, n, method, missing)
            runs += new
            yield from new
        power = best(runs)["power"]
        if min(powers) < power < max(powers):
            return
        powers |= {power - 2, power - 1} if power == min(powers) else {power + 1, power + 2}


def run_grid(settings: Settings, name: str, n: int, method: str, powers: list[int]) -> list[dict[str, Any]]:
    """Return a run for each power of the learning rate: the last values above the minimum, of all seeds."""
    problem, (estimator, num_tangents) = settings.problems[name], METHODS[method]
    first, others = problem.start
    start = torch.full((n,), others, dtype=torch.float64)
    start[0] = first
    rates = [suggested_rate(problem.curvature, n, method) * RATIO**power for power in powers]
    values = descend(
        problem.function,
        start,
        estimator,
        num_tangents=num_tangents,
        rates=rates,
        seeds=settings.tuning_seeds + settings.seeds,
        num_steps=problem.num_steps,
    )
    values = (values - n * problem.minimum).tolist()
    key, split = {"problem": name, "n": n, "method": method}, len(settings.tuning_seeds)
    return [
        key | {"power": power, "learning_rate": rate, "tuning": row[:split], "measured": row[split:]}
        for power, rate, row in zip(powers, rates, values, strict=True)
    ]


def suggested_rate(curvature: float, n: int, method: str) -> float:
    """Return the best learning rate if the curvature is the same in all directions, the middle of the grid.

    Args:
        curvature: of the function, its second derivative.
        n: numbers in a point.
        method: of :data:`METHODS`.
    """
    k = METHODS[method][1]
    return (k / (n + k + 1) if method.startswith("mean") else 1.0) / curvature


@torch.no_grad()
def descend(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    estimator: Estimator,
    *,
    num_tangents: int,
    rates: Sequence[float],
    seeds: Sequence[int],
    num_steps: int,
) -> Tensor:
    """Return where :func:`fwdlib.methods.minimise.minimise` would end, for each learning rate and seed.

    A step of the whole grid is recorded once as a graph of plain tensor operations and then replayed. It skips the
    layers of vmap and jvp that each call of the estimator goes through, and takes a tenth of the time. A seed has the
    same tangents at all rates, so they are drawn, and their Gram matrix is decomposed, once for all rates.

    Args:
        function: point (n,) -> scalar.
        start: shape (n,).
        estimator: of the gradient.
        num_tangents: K.
        rates: learning rates.
        seeds: of the tangents.
        num_steps: of each descent; none stops earlier.

    Returns:
        The last values, shape (rates, seeds), infinite where the descent has diverged.
    """

    def step(point: Tensor, rate: Tensor, tangents: Tensor) -> Tensor:
        options = {"num_tangents": num_tangents, "tangents": lambda *_: {"x": tangents}}
        own = partial(estimator, **({} if estimator is backprop_gradient else options))
        return point - rate * own(as_objective(function), {"x": point}).grads["x"]

    points = start.repeat(len(rates), len(seeds), 1)
    rates = torch.tensor(rates, dtype=start.dtype)
    grid = vmap(vmap(step, in_dims=(0, None, 0)), in_dims=(0, 0, None))
    graph = make_fx(grid)(points, rates, torch.ones(len(seeds), num_tangents, *start.shape, dtype=start.dtype))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    draws = _draw(start, num_tangents, seeds)
    for _, tangents in zip(trange(num_steps, leave=False, unit="step"), draws, strict=False):
        points = graph(points, rates, tangents)
    values = vmap(vmap(function))(points)
    return torch.where(values.isfinite(), values, math.inf)


def _draw(start: Tensor, num_tangents: int, seeds: Sequence[int]) -> Iterator[Tensor]:
    # The tangents of each step, (seeds, K, n). Many steps are drawn at once, which gives the same numbers.
    generators = [runtime.generator(seed) for seed in seeds]
    steps = max(1, 2**14 // (num_tangents * len(start)))
    while True:
        drawn = [sample_tangents({"x": start}, steps * num_tangents, "normal", g)["x"] for g in generators]
        yield from torch.stack(drawn).unflatten(1, (steps, num_tangents)).transpose(0, 1).contiguous()


if __name__ == "__main__":
    main(measure, FULL, SHORT, FULL.problems)
