"""What a study and its section both ask of the runs between them: the best of a grid, and whether one diverged."""

from __future__ import annotations

import math
from statistics import median
from typing import Any


def runs_of(runs: list[dict[str, Any]], problem: str, n: int, method: str) -> list[dict[str, Any]]:
    """Return the runs of one case, one for each power of the learning rate."""
    key = {"problem": problem, "n": n, "method": method}
    return [run for run in runs if key.items() <= run.items()]


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run whose median over the tuning seeds is lowest.

    Of equals, it is the one nearest to the suggested learning rate; if all diverged, the one with the lowest rate.
    """

    def cost(run: dict[str, Any]) -> tuple[float, int]:
        middle = median(map(float, run["tuning"]))  # infinity is a word in the file
        return middle, abs(run["power"]) if math.isfinite(middle) else run["power"]

    return min(runs, key=cost)


def diverged(losses: list[float | str]) -> bool:
    """Return whether a training ends above its start, though it may have been lower in between, or is not a number.

    Example:
        >>> diverged([2.3, 0.4, 2.4]), diverged([2.3, 0.4, "nan"]), diverged([2.3, 0.4])
        (True, True, False)
    """
    first, last = float(losses[0]), float(losses[-1])
    return math.isnan(last) or last > first
