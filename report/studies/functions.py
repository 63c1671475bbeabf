"""The section on test functions: the paper's two descents, and which learning rates four functions bear.

    python -m report.studies.functions            # what is not there yet
    python -m report.studies.functions steps      # anew: one or more of descents, divergence, growth, steps

The times of steps take turns and count as ratios; for them the machine should be quiet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from torch import Tensor
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.measuring import interleave
from fwdlib.checks import check_choice
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.methods import landscapes, stability
from fwdlib.methods.minimise import minimise, step_of
from fwdlib.objectives import beale, rosenbrock, sphere, styblinski_tang
from fwdlib.results import write_json
from fwdlib.statistics import Interval, median_interval, paired_ratio
from report.studies.common import RESULTS, either, reopen
from report.studies.tangents import scientific

FILE = RESULTS / "functions.json"
ANIMATION = "functions.gif"  # beside the figures
METHODS: dict[str, Estimator] = {
    "backprop": backprop_gradient,
    "forward gradient": partial(forward_gradient, tangents="normal"),
}
SEEDS = list(range(20))  # of the descents, twice as many as in the paper; backprop draws nothing and runs once
SEEDS_OF_DIVERGENCE = list(range(either(50, 20)))
NUM_ITERATIONS = 1000  # of divergence
SEEDS_OF_GROWTH = 200
THRESHOLD = 1e-3
ENOUGH = 0.9  # of the seeds below the threshold
SECONDS = either(30, 10)  # of timing, in all
BLOCK_SECONDS = 0.05  # of a turn: long enough for the ups and downs of a processor
WRITTEN_OUT = "Rosenbrock, written out"


class Function(NamedTuple):
    """A function of two numbers; from where, and to where."""

    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]

    def points(self) -> Tensor:
        """Return start and minimum in double precision, shape (2, 2)."""
        return torch.tensor([self.start, self.minimum], dtype=torch.float64)


class Published(NamedTuple):
    """Baydin et al. 2022, figure 2: settings from its caption, what came out read off its plots."""

    learning_rate: float
    num_iterations: int
    end: float  # of both methods, about
    ratio: float  # of the times, forward/backprop, about


FUNCTIONS = {
    "Beale": Function(beale, (0.0, 0.5), (3.0, 0.5)),
    "Rosenbrock": Function(rosenbrock, (-1.0, 0.0), (1.0, 1.0)),
    "Sphere": Function(sphere, (-1.0, -1.0), (0.0, 0.0)),
    "Styblinski-Tang": Function(styblinski_tang, (0.0, 0.0), (-2.903534, -2.903534)),
}
PUBLISHED = {
    "Beale": Published(0.01, 1000, 5e-5, 0.87),
    "Rosenbrock": Published(5e-4, 25_000, 5e-6, 0.75),
}


def measure(words: Sequence[str] = (), file: Path = FILE) -> dict[str, Any]:
    """Measure the parts that ``words`` name, anew, or all that are missing; return everything that ``file`` then holds.

    Args:
        words: of :data:`PARTS`.
        file: where it is kept.

    Returns:
        ``settings``, ``environment``, and the parts.

    Raises:
        ValueError: if ``file`` was made with other settings.
    """
    found = reopen(file, settings_now())
    for word in tqdm(list(words) or [part for part in PARTS if part not in found], desc="functions", unit="part"):
        found[word] = PARTS[word]()
        write_json(file, found)
    return found


def settings_now() -> dict[str, Any]:
    """Return what the measurements depend on; a file with others is not gone on with."""
    return {
        "starts": {title: list(f.start) for title, f in FUNCTIONS.items()},
        "paper": {title: [p.learning_rate, p.num_iterations] for title, p in PUBLISHED.items()},
        "seeds": SEEDS,
        "seeds_of_divergence": SEEDS_OF_DIVERGENCE,
        "iterations_of_divergence": NUM_ITERATIONS,
        "seeds_of_growth": SEEDS_OF_GROWTH,
    }


def measure_descents() -> dict[str, Any]:
    """Return title -> method -> steps, values and paths, at the paper's settings."""
    found: dict[str, Any] = {}
    for title, paper in PUBLISHED.items():
        function, start = FUNCTIONS[title].function, FUNCTIONS[title].points()[0]
        how = {"learning_rate": paper.learning_rate, "num_iterations": paper.num_iterations, "keep_trajectories": True}
        found[title] = {
            name: minimise(
                function, start, estimator, seeds=SEEDS[:1] if name == "backprop" else SEEDS, progress=title, **how
            ).thinned()
            for name, estimator in METHODS.items()
        }
    return found


def measure_divergence() -> dict[str, Any]:
    """Return for each function what :func:`fwdlib.methods.stability.divergence` returns."""
    return {
        title: stability.divergence(
            f.function, *f.points(), seeds=SEEDS_OF_DIVERGENCE, num_iterations=NUM_ITERATIONS, progress=title
        )
        for title, f in FUNCTIONS.items()
    }


def measure_growth() -> dict[str, Any]:
    """Return the factors of a step on the sphere, measured and from theory, and from where on the typical one grows."""

    def theory(rates: Tensor) -> dict[str, Tensor]:
        return stability.growth(rates, generator=runtime.generator(0, purpose="growth"))

    def excess(rate: float) -> float:
        return theory(torch.tensor([rate], dtype=torch.float64))["typical"].item() - 1

    rates, fine = (torch.arange(*ends, dtype=torch.float64) / 100 for ends in ((5, 51, 5), (1, 56)))
    return {
        "rows": stability.measure_growth(rates, num_seeds=SEEDS_OF_GROWTH),
        "expected": theory(rates)["mean"].tolist(),
        "rates": fine.tolist(),
        "theory": {name: factors.tolist() for name, factors in theory(fine).items()},
        "typical_limit": brentq(excess, 0.3, 0.7, xtol=1e-6),
    }


def measure_steps() -> dict[str, Any]:
    """Return the seconds of a step of one replicate by function and method, taking turns, and the machine."""

    def written_out(point: Tensor) -> Tensor:  # Rosenbrock's function, as its formula has it
        x, y = point.unbind()
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    timed = {title: (FUNCTIONS[title].function, FUNCTIONS[title].points()[0]) for title in PUBLISHED}
    timed[WRITTEN_OUT] = (written_out, timed["Rosenbrock"][1])
    steps = {f"{title}: {name}": step_of(*task, e) for title, task in timed.items() for name, e in METHODS.items()}
    return {
        "seconds": interleave(steps, seconds=SECONDS, block_seconds=BLOCK_SECONDS),
        "environment": runtime.environment(),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "descents": measure_descents,
    "divergence": measure_divergence,
    "growth": measure_growth,
    "steps": measure_steps,
}


# --- the page --------------------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured; None where a part is missing.

    Args:
        folder: of the results.
    """
    file = folder / FILE.name
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found if found.keys() >= PARTS.keys() else None


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where nothing was measured.

    Args:
        found: as :func:`load` returns it.
    """
    if found is None:
        return None
    rows = [_descent(title, found) for title in PUBLISHED]
    divergence = [_bearable(title, grid) for title, grid in found["divergence"].items()]
    return {
        "rows": rows,
        "threshold": THRESHOLD,
        "all_arrive": all(row["arrived"] == row["num_seeds"] and row["backprop_arrived"] for row in rows),
        "enough_arrive": all(row["arrived"] >= ENOUGH * row["num_seeds"] and row["backprop_arrived"] for row in rows),
        "written_out": _ratio(found, WRITTEN_OUT),
        "divergence": divergence,
        "all_diverge": all(row[name]["lost"] is not None for row in divergence for name in METHODS),
        "earlier": all((row["forward gradient"]["safe"] or 0) < (row["backprop"]["safe"] or 0) for row in divergence),
        "settings": found["settings"],
        "growth": {
            "off": max(
                abs(row["mean"] - expected) / row["error"]
                for row, expected in zip(found["growth"]["rows"], found["growth"]["expected"], strict=True)
            ),
            "mean_limit": stability.mean_square_limit([2.0, 2.0]),
            "typical_limit": found["growth"]["typical_limit"],
        },
        "environment": found["environment"],
        "steps_environment": found["steps"]["environment"],
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure | bytes]:
    """Return the figures by name, without ``.svg``, and the animation by that of its file.

    Args:
        found: as :func:`load` returns it.
    """
    if found is None:
        return {}
    growth, descents = found["growth"], _timed(found)
    return {
        "functions-descents": landscapes.plot_descents(descents),
        "functions-paths": landscapes.plot_paths(descents),
        "functions-growth": landscapes.plot_growth(growth["rows"], growth["rates"], growth["theory"]),
        "functions-divergence": landscapes.plot_divergence(found["divergence"]),
        ANIMATION: animation(found),
    }


def animation(found: dict[str, Any]) -> bytes:
    """Return :data:`ANIMATION`; the same results give the same bytes.

    Args:
        found: as :func:`load` returns it.
    """
    ten = {
        title: {name: rows | {"paths": rows["paths"][:10]} for name, rows in methods.items()}
        for title, methods in found["descents"].items()
    }
    return landscapes.animate_paths(ten)


def _timed(found: dict[str, Any]) -> dict[str, Any]:
    # The descents, with the median time of a step.
    seconds = found["steps"]["seconds"]
    return {
        title: {
            name: rows | {"seconds": float(np.median(seconds[f"{title}: {name}"]))} for name, rows in methods.items()
        }
        for title, methods in found["descents"].items()
    }


def _ratio(found: dict[str, Any], title: str) -> Interval:
    seconds = found["steps"]["seconds"]
    return paired_ratio(seconds[f"{title}: forward gradient"], seconds[f"{title}: backprop"])


def _descent(title: str, found: dict[str, Any]) -> dict[str, Any]:
    paper = PUBLISHED[title]
    ends = {name: [float(row[-1]) for row in rows["values"]] for name, rows in found["descents"][title].items()}
    (backprop,), forward = ends["backprop"], ends["forward gradient"]
    low, middle, high = (scientific(value) for value in median_interval(forward))
    ratio = _ratio(found, title)
    return {
        "title": title,
        "learning_rate": paper.learning_rate,
        "of_limit": paper.learning_rate / found["divergence"][title]["limits"]["forward gradient"],
        "num_iterations": paper.num_iterations,
        "backprop": scientific(backprop),
        "backprop_arrived": backprop < THRESHOLD,
        "forward": f"{middle} [{low}, {high}]",
        "arrived": sum(end < THRESHOLD for end in forward),
        "num_seeds": len(forward),
        "published": scientific(paper.end).replace(".00", ""),
        "ratio": ratio,
        "published_ratio": paper.ratio,
        "relation": "less" if ratio.high < 1 else "more" if ratio.low > 1 else "same",
    }


def _bearable(title: str, grid: dict[str, Any]) -> dict[str, Any]:
    # The largest learning rate up to which nothing diverges, and the least from which on everything does.
    row = {"title": title, "limits": grid["limits"]}
    for name, parts in grid["diverged"].items():
        safe = next((i for i, part in enumerate(parts) if part > 0), len(parts)) - 1
        lost = next((i for i in range(len(parts)) if min(parts[i:]) == 1), None)
        row[name] = {
            "safe": grid["rates"][safe] if safe >= 0 else None,
            "lost": grid["rates"][lost] if lost is not None else None,
        }
    return row


if __name__ == "__main__":
    torch.set_num_threads(1)  # two numbers at a time
    measure([check_choice("part", word, PARTS) for word in sys.argv[1:]])
