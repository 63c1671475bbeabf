"""The section on several tangents: how far their mean and the projection descend, each with a learning rate of its own.

Three functions with a known minimum, from 2 to 1024 numbers, after Flügel et al. 2024. What is finished is kept, so the
study can be interrupted; the cases that the page needs most come first.

    python -m report.studies.tangents               # all functions
    python -m report.studies.tangents sphere        # some
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from tqdm import tqdm, trange

from fwdlib import runtime
from fwdlib.checks import check_choice
from fwdlib.estimators import Estimator, backprop_gradient, multi_tangent_gradient, projected_gradient
from fwdlib.methods.functions import as_objective, rosenbrock, sphere, styblinski_tang
from fwdlib.methods.tangents_figures import plot_dimensions
from fwdlib.results import write_json
from fwdlib.tangents import sample_tangents
from report.studies.common import RESULTS, either, reopen
from report.wording import enumerated, number

FILE = RESULTS / "tangents.json"
TUNING_SEEDS = [101, 102, 103]
SEEDS = [1, 2, 3, 4, 5]
RATIO = 2**0.5  # the grid of learning rates: powers of this times what theory suggests, ...
POWERS = [-2, -1, 0, 1, 2, 3, 4]  # ... these, and more where an end is the best


class Problem(NamedTuple):
    """A function to descend on, as published."""

    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]  # the first number and all others
    num_steps: int
    curvature: float  # the largest at the minimum; the best rate of backprop is about 1 / curvature
    sizes: tuple[int, ...]
    minimum: float = 0.0  # for each of the n


# n, in the order in which they are measured
SIZES = either((1024, 256, 64, 2, 4, 8, 16, 32, 128, 512), (1024, 2))
SIZES_OF_ROSENBROCK = either((2, 16, 64, 128, 4, 1024, 256, 8, 32, 512), (2, 16))
PROBLEMS = {
    "sphere": Problem(sphere, (-1.0, -1.0), 1000, 2.0, SIZES),
    "styblinski_tang": Problem(styblinski_tang, (0.0, 0.0), 1000, 34.6, SIZES, -39.16616570377142),
    "rosenbrock": Problem(rosenbrock, (-1.0, 0.0), either(25_000, 2_500), 1002.0, SIZES_OF_ROSENBROCK),
}
METHODS: dict[str, tuple[Estimator, int]] = {"backprop": (backprop_gradient, 1)}  # and K
METHODS |= {f"mean, K = {k}": (multi_tangent_gradient, k) for k in (1, 2, 4, 16)}
METHODS |= {f"projection, K = {k}": (projected_gradient, k) for k in (1, 2, 4, 16)}

TITLES = {"sphere": "Sphere", "rosenbrock": "Rosenbrock", "styblinski_tang": "Styblinski-Tang"}
TINY = -12  # the power of ten below which the sphere is taken to be solved

# The best values that the authors' search for learning rates came upon, one run each (github Helmholtz-AI-Energy/frog,
# commit 344affc, lrs/): problem -> n -> method -> value. Not the five seeds of the paper's own table.
_ALL = ["backprop", "mean, K = 1", "mean, K = 2", "mean, K = 4", "mean, K = 16"]
_ALL += ["projection, K = 2", "projection, K = 4", "projection, K = 16"]
_SOME = ["backprop", "mean, K = 1", "mean, K = 16", "projection, K = 16"]
PUBLISHED: dict[str, dict[int, dict[str, float]]] = {
    "sphere": {
        64: dict(zip(_ALL, (0, 2.96e-5, 1.9e-11, 1.3e-23, 0, 2.1e-12, 1.4e-26, 0), strict=True)),
        256: dict(zip(_ALL, (0, 3.91, 0.0804, 3.0e-5, 1.2e-24, 0.073, 2.0e-5, 1.3e-26), strict=True)),
        1024: dict(zip(_ALL, (0, 433, 157, 22.8, 2.3e-4, 155, 22.7, 2.0e-4), strict=True)),
    },
    "rosenbrock": {
        2: {"backprop": 3.8e-10, "mean, K = 1": 8.1e-9},
        16: dict(zip(_SOME, (1.3e-9, 4.26, 3.1e-3, 1.3e-9), strict=True)),
        64: dict(zip(_SOME, (1.9e-8, 51.8, 8.65, 0.506), strict=True)),
        128: dict(zip(_SOME, (2.3e-3, 121, 76.3, 77.5), strict=True)),
        1024: {"backprop": 866, "mean, K = 1": 1010, "projection, K = 16": 1000},
    },
    "styblinski_tang": {
        1024: dict(zip(_ALL, (-4.01e4, -2.00e4, -2.38e4, -2.92e4, -3.70e4, -2.32e4, -2.90e4, -3.71e4), strict=True))
    },
}


def measure(problems: Sequence[str], file: Path = FILE) -> dict[str, Any]:
    """Tune and measure all methods on ``problems``, and return everything that ``file`` then holds.

    Returns:
        ``settings``, ``environment``, and ``runs``: for each problem, n, method and power of the learning rate the last
        values above the minimum, with the tuning seeds and with the others, infinite where the descent has diverged.

    Raises:
        ValueError: if ``file`` holds runs with other settings.
    """
    settings = {
        "seeds": SEEDS,
        "tuning_seeds": TUNING_SEEDS,
        "tangents": "normal",
        "dtype": "float64",
        "powers": POWERS,
        "grid": "powers of the square root of 2 times the suggested rate",
        "problems": {
            name: {"start": list(problem.start), "num_steps": problem.num_steps, "curvature": problem.curvature}
            for name, problem in PROBLEMS.items()
        },
    }
    found = reopen(file, settings, runs=[])
    cases = [(name, n, method) for name, n in _in_turn(problems) for method in METHODS]
    for name, n, method in (bar := tqdm(cases, desc="tangents", unit="case")):
        bar.set_postfix_str(f"{name}, n = {n}, {method}")
        for run in _tune(name, n, method, runs_of(found["runs"], name, n, method)):
            found["runs"].append(run)
        write_json(file, found)
    return found


def _in_turn(problems: Sequence[str]) -> Iterator[tuple[str, int]]:
    # The first size of each problem, then the second of each: an interrupt leaves something of all.
    for sizes in zip_longest(*(PROBLEMS[name].sizes for name in problems)):
        yield from ((name, n) for name, n in zip(problems, sizes, strict=True) if n is not None)


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
    rates = [suggested_rate(problem.curvature, n, method) * RATIO**power for power in powers]
    values = descend(
        problem.function,
        start,
        estimator,
        num_tangents=num_tangents,
        rates=rates,
        seeds=TUNING_SEEDS + SEEDS,
        num_steps=problem.num_steps,
    )
    values = (values - n * problem.minimum).tolist()
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
    """Return where :func:`fwdlib.methods.minimise.minimise` would end, for each learning rate and seed.

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
    for _, tangents in zip(
        trange(num_steps, leave=False, unit="step"), _draw(start, num_tangents, seeds), strict=False
    ):
        points = graph(points, rates, tangents)
    values = vmap(vmap(function))(points)
    return torch.where(values.isfinite(), values, math.inf)


def _draw(start: Tensor, num_tangents: int, seeds: Sequence[int]) -> Iterator[Tensor]:
    # The tangents of one step after another, (seeds, K, n); many steps are drawn at once, which changes no number.
    generators = [runtime.generator(seed) for seed in seeds]
    steps = max(1, 2**14 // (num_tangents * len(start)))
    while True:
        drawn = [sample_tangents({"x": start}, steps * num_tangents, "normal", g)["x"] for g in generators]
        yield from torch.stack(drawn).unflatten(1, (steps, num_tangents)).transpose(0, 1).contiguous()


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


# --- the page --------------------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None where nothing was.

    Args:
        folder: of the results.
    """
    path = folder / FILE.name
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def chosen(found: dict[str, Any]) -> dict[str, dict[int, dict[str, dict[str, Any]]]]:
    """Return the run with the best learning rate: problem -> n -> method -> run, with its values as numbers.

    Args:
        found: as :func:`load` returns it.
    """
    cases: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for name in PROBLEMS:
        for n in sorted(PROBLEMS[name].sizes):
            for method in METHODS:
                if runs := runs_of(found["runs"], name, n, method):
                    run = best(runs)
                    values = sorted(map(float, run["measured"]))
                    cases.setdefault(name, {}).setdefault(n, {})[method] = run | {"measured": values}
    return cases


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where nothing was measured.

    Args:
        found: as :func:`load` returns it.
    """
    if found is None or not found["runs"]:
        return None
    cases = chosen(found)
    return {
        "tables": [_table(name, sizes) for name, sizes in cases.items() if set(sizes) & set(PUBLISHED[name])],
        "sphere": _sphere(cases.get("sphere", {})),
        "projection": list(filter(None, (_projection(name, sizes) for name, sizes in cases.items()))),
        "diverged": [
            f"{TITLES[name]}, n = {n}, {method}"
            for name, sizes in cases.items()
            for n, methods in sizes.items()
            for method, run in methods.items()
            if not math.isfinite(run["measured"][-1])
        ],
        "missing": list(filter(None, (_missing(name, cases.get(name, {})) for name in PROBLEMS))),
        "settings": found["settings"],
        "tiny": TINY,
        "num_seeds": len(found["settings"]["seeds"]),
        "num_tuning_seeds": len(found["settings"]["tuning_seeds"]),
        "environment": found["environment"],
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure]:
    """Draw where the descents end over the number of dimensions.

    Args:
        found: as :func:`load` returns it.

    Returns:
        One figure, ``tangents``; none where nothing was measured.
    """
    if found is None or not found["runs"]:
        return {}
    panels = {
        TITLES[name]: {
            method.replace("mean", "forward gradient"): {
                n: methods[method]["measured"] for n, methods in sizes.items() if method in methods
            }
            for method in METHODS
            if any(method in methods for methods in sizes.values())
        }
        for name, sizes in chosen(found).items()
    }
    return {"tangents": plot_dimensions(panels, "last value above the minimum")}


def scientific(value: float) -> str:
    """Return a number to three digits, with a power of ten where it needs one, in pandoc's Markdown.

    Example:
        >>> scientific(0.000204), scientific(22.7), scientific(0.0), scientific(float("inf"))
        ('2.04 × 10^−4^', '22.7', '0', 'diverged')
    """
    if value == 0 or (math.isfinite(value) and 1e-3 <= abs(value) < 1e6):
        return number(value) if value else "0"
    if not math.isfinite(value):
        return "diverged"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} \N{MULTIPLICATION SIGN} 10^{int(exponent)}^".replace("-", "\N{MINUS SIGN}")


def _table(name: str, sizes: dict[int, dict[str, Any]]) -> dict[str, Any]:
    columns = [n for n in sizes if n in PUBLISHED[name]]
    rows = {
        method: [
            _cell(sizes[n].get(method), n * PROBLEMS[name].minimum, PUBLISHED[name][n].get(method)) for n in columns
        ]
        for method in METHODS
        if any(method in sizes[n] for n in columns)
    }
    return {"title": TITLES[name], "num_steps": PROBLEMS[name].num_steps, "columns": columns, "rows": rows}


def _cell(run: dict[str, Any] | None, minimum: float, published: float | None) -> str:
    # median [range] (published)
    if run is None:
        return ""
    low, middle, high = (
        scientific(minimum + value) for value in (run["measured"][0], _middle(run), run["measured"][-1])
    )
    text = middle if low == middle == high else f"{middle} [{low}, {high}]"
    return text if published is None else f"{text} ({scientific(published)})"


def _middle(run: dict[str, Any]) -> float:
    return median(run["measured"])


def _sphere(sizes: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    # How the sphere compares with theory and with what was published, where there is most to compare.
    if 1024 not in sizes:
        return None
    methods = sizes[1024]
    expected = {method: expected_value(1024, method) for method in methods if method != "backprop"}
    over_theory = [_middle(methods[method]) / value for method, value in expected.items()]
    compared = [m for m in methods if PUBLISHED["sphere"][1024].get(m)]
    over_published = {method: _middle(methods[method]) / PUBLISHED["sphere"][1024][method] for method in compared}
    furthest = max(over_published, key=lambda method: abs(math.log(over_published[method])))
    powers = [run["power"] for at in sizes.values() for method, run in at.items() if method != "backprop"]
    many = [run for method, run in sizes.get(64, {}).items() if method.endswith("K = 16")]
    return {
        "over_theory": (min(over_theory), max(over_theory)),
        "furthest": furthest,
        "factor": math.exp(abs(math.log(over_published[furthest]))),
        "as_suggested": sum(power == 0 for power in powers),
        "num_cases": len(powers),
        "tiny": bool(many) and max(run["measured"][-1] for run in many) < 10.0**TINY,
    }


def expected_value(n: int, method: str) -> float:
    """Return the expected last value on the sphere at the best rate: every step takes the same part of it away.

    Args:
        n: numbers in a point.
        method: of :data:`METHODS`, not backprop; K below n.
    """
    k, problem = METHODS[method][1], PROBLEMS["sphere"]
    falls = k / (n + k + 1) if method.startswith("mean") else k / n
    return n * problem.start[0] ** 2 * (1 - falls) ** problem.num_steps


def _missing(name: str, sizes: dict[int, dict[str, Any]]) -> str | None:
    lacking = [str(n) for n in sorted(PROBLEMS[name].sizes) if set(sizes.get(n, {})) != set(METHODS)]
    return f"{TITLES[name]} at n = {enumerated(lacking)}" if lacking else None


def _projection(name: str, sizes: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    # The projection's last value over the mean's, above the minimum, at the largest n.
    n = max(sizes)
    pairs = [(k, sizes[n].get(f"mean, K = {k}"), sizes[n].get(f"projection, K = {k}")) for k in (1, 2, 4, 16)]
    ratios = {k: _middle(projection) / _middle(mean) for k, mean, projection in pairs if mean and projection}
    return {"title": TITLES[name], "n": n, "ratios": ratios} if ratios else None


if __name__ == "__main__":
    runtime.keep_freed_memory()
    measure([check_choice("problem", name, PROBLEMS) for name in sys.argv[1:]] or list(PROBLEMS))
