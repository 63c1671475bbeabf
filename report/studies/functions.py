"""Test functions: the paper's two descents, and the learning rates at which four functions diverge.

All results are in one file, which is saved after each part. A part that the file holds is not measured again, except
``steps``, the times of a step. They are taken in turns and count as ratios; run nothing else meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.measuring import interleave
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.methods import stability
from fwdlib.methods.functions import beale, rosenbrock, sphere, styblinski_tang
from fwdlib.methods.minimise import minimise, step_of
from fwdlib.results import write_json
from report import published
from report.names import FUNCTIONS, WRITTEN_OUT
from report.studies.common import main, reopen

METHODS: dict[str, Estimator] = {
    "backprop": backprop_gradient,
    "forward gradient": partial(forward_gradient, tangents="normal"),
}
BLOCK_SECONDS = 0.05  # of a turn of timing: long enough to average over changes in the processor's speed


class Function(NamedTuple):
    """A function of two numbers, where the descents start, and its minimum."""

    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]

    def points(self) -> Tensor:
        """Return start and minimum in double precision, shape (2, 2)."""
        return torch.tensor([self.start, self.minimum], dtype=torch.float64)


TEST_FUNCTIONS = {
    "Beale": Function(beale, (0.0, 0.5), (3.0, 0.5)),
    "Rosenbrock": Function(rosenbrock, (-1.0, 0.0), (1.0, 1.0)),
    "Sphere": Function(sphere, (-1.0, -1.0), (0.0, 0.0)),
    "Styblinski-Tang": Function(styblinski_tang, (0.0, 0.0), (-2.903534, -2.903534)),
}


def published_descents() -> dict[str, tuple[float, int]]:
    """Return learning rate and number of iterations of the paper's descents, by the title of their function."""
    quoted = published.load()["functions"]["descents"]
    return {title: (row["learning_rate"], row["num_iterations"]) for title, row in quoted.items()}


class Settings(NamedTuple):
    """Length of the study, by default for the report."""

    descents: dict[str, tuple[float, int]] = published_descents()
    """Learning rate and number of iterations."""
    seeds: tuple[int, ...] = tuple(range(20))
    """Of the descents, twice as many as in the paper. Backprop draws nothing and runs once."""
    seeds_of_divergence: tuple[int, ...] = tuple(range(50))
    iterations_of_divergence: int = 1000
    seeds_of_growth: int = 200
    """How many."""
    seconds: float = 30
    """Of timing, in all."""

    def kept(self) -> dict[str, Any]:
        """Return what the measurements depend on, as the file keeps it."""
        return {
            "starts": {title: f.start for title, f in TEST_FUNCTIONS.items()},
            "paper": self.descents,
            "seeds": self.seeds,
            "seeds_of_divergence": self.seeds_of_divergence,
            "iterations_of_divergence": self.iterations_of_divergence,
            "seeds_of_growth": self.seeds_of_growth,
        }


FULL = Settings()
SHORT = Settings(seeds_of_divergence=tuple(range(20)), seconds=10)


def measure(settings: Settings, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Measure the parts that the file in ``folder`` does not hold yet, and ``"steps"`` again if it is asked for.

    Returns:
        The content of the file: ``settings``, ``environment``, and the parts.
    """
    found = reopen(folder / FUNCTIONS, settings.kept())
    for part in tqdm([part for part in parts if part not in found or part == "steps"], desc="functions", unit="part"):
        found[part] = PARTS[part](settings)
        write_json(folder / FUNCTIONS, found)
    return found


def measure_descents(settings: Settings) -> dict[str, Any]:
    """Return title -> method -> steps, values and paths."""
    found: dict[str, Any] = {}
    for title, (learning_rate, num_iterations) in settings.descents.items():
        function, start = TEST_FUNCTIONS[title].function, TEST_FUNCTIONS[title].points()[0]
        how = {"learning_rate": learning_rate, "num_iterations": num_iterations, "keep_trajectories": True}
        found[title] = {}
        for name, estimator in METHODS.items():
            seeds = settings.seeds[:1] if name == "backprop" else settings.seeds
            descent = minimise(function, start, estimator, seeds=list(seeds), progress=title, **how)
            found[title][name] = descent.thinned()
    return found


def measure_divergence(settings: Settings) -> dict[str, Any]:
    """Return for each function what :func:`fwdlib.methods.stability.divergence` returns."""
    how = {"seeds": settings.seeds_of_divergence, "num_iterations": settings.iterations_of_divergence}
    return {
        title: stability.divergence(f.function, *f.points(), progress=title, **how)
        for title, f in TEST_FUNCTIONS.items()
    }


def measure_growth(settings: Settings) -> dict[str, Any]:
    """Return the factors of a step on the sphere, measured and in theory, and the rate at which typical runs grow."""

    def theory(rates: Tensor) -> dict[str, Tensor]:
        return stability.growth(rates, generator=runtime.generator(0, purpose="growth"))

    def excess(rate: float) -> float:
        return theory(torch.tensor([rate], dtype=torch.float64))["typical"].item() - 1

    rates, fine = (torch.arange(*ends, dtype=torch.float64) / 100 for ends in ((5, 51, 5), (1, 56)))
    return {
        "rows": stability.measure_growth(rates, num_seeds=settings.seeds_of_growth),
        "expected": theory(rates)["mean"].tolist(),
        "rates": fine.tolist(),
        "theory": {name: factors.tolist() for name, factors in theory(fine).items()},
        "typical_limit": brentq(excess, 0.3, 0.7, xtol=1e-6),
    }


def measure_steps(settings: Settings) -> dict[str, Any]:
    """Return the seconds of a step of one replicate by function and method, and the machine."""

    def written_out(point: Tensor) -> Tensor:  # Rosenbrock's function, written like its formula
        x, y = point.unbind()
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    timed = {title: (TEST_FUNCTIONS[title].function, TEST_FUNCTIONS[title].points()[0]) for title in settings.descents}
    timed[WRITTEN_OUT] = (written_out, TEST_FUNCTIONS["Rosenbrock"].points()[0])
    steps = {f"{title}: {name}": step_of(*task, e) for title, task in timed.items() for name, e in METHODS.items()}
    return {
        "seconds": interleave(steps, seconds=settings.seconds, block_seconds=BLOCK_SECONDS),
        "environment": runtime.environment(),
    }


PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "descents": measure_descents,
    "divergence": measure_divergence,
    "growth": measure_growth,
    "steps": measure_steps,
}

if __name__ == "__main__":
    torch.set_num_threads(1)  # the points have two numbers
    main(measure, FULL, SHORT, PARTS)
