"""The section on several tangents: how far their mean and the projection descend, each with a learning rate of its own.

Three functions with a known minimum, from 2 to 1024 numbers, after Flügel et al. 2024. What is finished is kept, so the
study can be interrupted; the cases that the page needs most come first.

    python -m report.tangents               # all functions
    python -m report.tangents sphere        # some
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from tqdm import tqdm, trange

from fwdlib import runtime
from fwdlib.checks import check_choice
from fwdlib.estimators import Estimator, backprop_gradient, multi_tangent_gradient, projected_gradient
from fwdlib.objectives import as_objective, rosenbrock, sphere, styblinski_tang
from fwdlib.results import write_json
from fwdlib.tangents import sample_tangents

FILE = Path(__file__).parent / "results" / "tangents.json"
TUNING_SEEDS = [101, 102, 103]
SEEDS = [1, 2, 3, 4, 5]
POWERS = [-2, -1, 0, 1, 2]  # the grid, in powers of two times what theory suggests; it grows where an end is the best


class Problem(NamedTuple):
    """A function to descend on, as published."""

    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]  # the first number and all others
    num_steps: int
    curvature: float  # the largest at the minimum; the best rate of backprop is about 1 / curvature
    sizes: tuple[int, ...]  # n, in the order in which they are measured


PROBLEMS = {
    "sphere": Problem(sphere, (-1.0, -1.0), 1000, 2.0, (1024, 256, 64, 2, 4, 8, 16, 32, 128, 512)),
    "styblinski_tang": Problem(styblinski_tang, (0.0, 0.0), 1000, 34.6, (1024, 256, 64, 2, 4, 8, 16, 32, 128, 512)),
    "rosenbrock": Problem(rosenbrock, (-1.0, 0.0), 25_000, 1002.0, (2, 16, 64, 128, 4, 1024, 256, 8, 32, 512)),
}
METHODS: dict[str, tuple[Estimator, int]] = {"backprop": (backprop_gradient, 1)}  # and K
METHODS |= {f"mean, K = {k}": (multi_tangent_gradient, k) for k in (1, 2, 4, 16)}
METHODS |= {f"projection, K = {k}": (projected_gradient, k) for k in (1, 2, 4, 16)}


def measure(problems: Sequence[str], file: Path = FILE) -> dict[str, Any]:
    """Tune and measure all methods on ``problems``, and return everything that ``file`` then holds.

    Returns:
        ``settings``, ``environment``, and ``runs``: for each problem, n, method and power of the learning rate the last
        values with the tuning seeds and with the others, infinite where the descent has diverged.

    Raises:
        ValueError: if ``file`` holds runs with other settings.
    """
    found = json.loads(file.read_text()) if file.is_file() else {"runs": []}
    settings = {
        "seeds": SEEDS,
        "tuning_seeds": TUNING_SEEDS,
        "tangents": "normal",
        "dtype": "float64",
        "problems": {
            name: {"start": list(problem.start), "num_steps": problem.num_steps, "curvature": problem.curvature}
            for name, problem in PROBLEMS.items()
        },
    }
    if found.setdefault("settings", settings) != settings:
        raise ValueError(f"{file} was made with other settings; delete it to start anew")
    found["environment"] = runtime.environment()
    cases = [(name, n, method) for name in problems for n in PROBLEMS[name].sizes for method in METHODS]
    for name, n, method in (bar := tqdm(cases, desc="tangents", unit="case")):
        bar.set_postfix_str(f"{name}, n = {n}, {method}")
        for run in _tune(name, n, method, runs_of(found["runs"], name, n, method)):
            found["runs"].append(run)
        write_json(file, found)
    return found


def _tune(name: str, n: int, method: str, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    # What is missing of the grid, until its best is not at an end.
    powers, runs = {*POWERS, *(run["power"] for run in runs)}, list(runs)
    while True:
        missing = sorted(powers - {run["power"] for run in runs})
        if missing:
            new = _run(name, n, method, missing)
            runs += new
            yield from new
        power = best(runs)["power"]
        if min(powers) < power < max(powers):
            return
        powers |= {power - 2, power - 1} if power == min(powers) else {power + 1, power + 2}


def _run(name: str, n: int, method: str, powers: list[int]) -> list[dict[str, Any]]:
    problem, (estimator, num_tangents) = PROBLEMS[name], METHODS[method]
    first, others = problem.start
    start = torch.full((n,), others, dtype=torch.float64)
    start[0] = first
    rates = [suggested_rate(problem.curvature, n, method) * 2.0**power for power in powers]
    values = descend(
        problem.function,
        start,
        estimator,
        num_tangents=num_tangents,
        rates=rates,
        seeds=TUNING_SEEDS + SEEDS,
        num_steps=problem.num_steps,
    ).tolist()
    key, split = {"problem": name, "n": n, "method": method}, len(TUNING_SEEDS)
    return [
        key | {"power": power, "learning_rate": rate, "tuning": row[:split], "measured": row[split:]}
        for power, rate, row in zip(powers, rates, values, strict=True)
    ]


def suggested_rate(curvature: float, n: int, method: str) -> float:
    """Return the best learning rate where the curvature is the same in all directions, the middle of the grid.

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
    """Return where :func:`fwdlib.beyond.minimise.minimise` would end, for each learning rate and seed.

    One step of the whole grid is recorded once as a graph of plain tensor operations and replayed, without the
    layers of vmap and jvp that a call of the estimator goes through: a tenth of the time. A seed has the same tangents
    at all rates, so they are drawn, and their Gram matrix decomposed, once for all of them.

    Args:
        function: point (n,) -> scalar.
        start: shape (n,).
        estimator: of the gradient.
        num_tangents: K.
        rates: learning rates.
        seeds: of the tangents.
        num_steps: of each descent; none stops before.

    Returns:
        The last values, shape (rates, seeds), infinite where the descent has diverged.
    """
    draws = [runtime.generator(seed) for seed in seeds]

    def draw() -> Tensor:  # (seeds, K, n)
        return torch.stack([sample_tangents({"x": start}, num_tangents, "normal", g)["x"] for g in draws])

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
    for _ in trange(num_steps, leave=False, unit="step", mininterval=1):
        points = graph(points, rates, draw())
    values = vmap(vmap(function))(points)
    return torch.where(values.isfinite(), values, math.inf)


def runs_of(runs: list[dict[str, Any]], problem: str, n: int, method: str) -> list[dict[str, Any]]:
    """Return the runs of one case, one for each power of the learning rate."""
    key = {"problem": problem, "n": n, "method": method}
    return [run for run in runs if key.items() <= run.items()]


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run whose median over the tuning seeds is lowest; of several, that nearest to the suggested rate."""

    def cost(run: dict[str, Any]) -> tuple[float, int]:
        middle = median(map(float, run["tuning"]))  # infinity is a word in the file
        return middle, abs(run["power"]) if math.isfinite(middle) else run["power"]

    return min(runs, key=cost)


if __name__ == "__main__":
    runtime.keep_freed_memory()
    measure([check_choice("problem", name, PROBLEMS) for name in sys.argv[1:]] or list(PROBLEMS))
