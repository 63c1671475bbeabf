"""Quality under a budget, a part of the section on cost: what :mod:`report.studies.budget` trained."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fwdlib.statistics import Interval, difference_by_seed, median_interval
from report.grids import diverged
from report.sections.seeds import losses_over

CAP = 25e6
"""Bytes above the parameters."""
RIVAL = "L checkpoints"
AVOIDING = ("rank-one", "activity", "two-point")
"""Methods without a backward pass."""


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of the study, None if it was not made."""
    if found is None:
        return None
    networks = {}
    for network, memory in found["memory"].items():
        rows = {method: _row(found, network, method, held) for method, held in memory.items()}
        networks[network] = {method: row for method, row in rows.items() if row}
    return {
        "settings": found["settings"],
        "environment": found["environment"],
        "cap": CAP,
        "networks": networks,
        "against": {name: _against(rows) for name, rows in networks.items()},
        "best": {name: min(rows, key=lambda m: rows[m]["test"].estimate) for name, rows in networks.items() if rows},
        "best_under_cap": {
            name: min(fitting, key=lambda m: rows[m]["test"].estimate)
            for name, rows in networks.items()
            if (fitting := [m for m in rows if rows[m]["memory"] <= CAP])
        },
    }


def curves(found: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Return the test losses over time as ``plot_budget`` takes them. A training that diverged ends the curve."""
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for network, memory in found["memory"].items():
        for method in memory:
            if not (runs := _runs(found, network, method)):
                continue
            drawn.setdefault(network, {})[method] = np.vstack(losses_over(runs, "seconds"))
    return drawn


def _runs(found: dict[str, Any], network: str, method: str) -> list[dict[str, Any]]:
    where = {
        "network": network,
        "method": method,
        "purpose": "measured",
        "power": found["chosen"].get(network, {}).get(method),
    }
    return [run for run in found["runs"] if where.items() <= run.items()]


def _row(found: dict[str, Any], network: str, method: str, memory: int) -> dict[str, Any] | None:
    runs = _runs(found, network, method)
    if not runs:
        return None
    test = [_least(run["test"]) for run in runs]
    return {
        "learning_rate": runs[0]["learning_rate"],
        "num_seeds": len(runs),
        "diverged": sum(diverged(run["train"]) for run in runs),
        "steps": float(np.median([run["steps"] for run in runs])),
        "train": median_interval([_least(run["train"]) for run in runs]),
        "test": median_interval(test),
        "accuracy": median_interval([100 * max(run["accuracy"]) for run in runs]),
        "memory": memory,
        "runs": {run["seed"]: run for run in runs},
    }


def _least(losses: list[float | str]) -> float:
    return min((value for value in map(float, losses) if value == value), default=math.inf)


def _against(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    # Checkpointed backprop against each method without a backward pass, seed by seed.
    if RIVAL not in rows:
        return {}
    rival = rows[RIVAL]
    return {
        method: {
            "accuracy": difference_by_seed(_accuracies(rival), _accuracies(rows[method])),
            "time": _time_to_match(rival, rows[method]),
            "memory": rows[method]["memory"] / rival["memory"],
        }
        for method in AVOIDING
        if method in rows
    }


def _accuracies(row: dict[str, Any]) -> dict[int, float]:
    return {seed: 100 * max(run["accuracy"]) for seed, run in row["runs"].items()}


def _time_to_match(rival: dict[str, Any], other: dict[str, Any]) -> Interval:
    # The share of the other's time after which the rival's test loss is as low as the other's ever is.
    shares = []
    for seed, run in rival["runs"].items():
        if seed in other["runs"]:
            level = _least(other["runs"][seed]["test"])
            times = [t for t, loss in zip(run["seconds"], run["test"], strict=True) if float(loss) <= level]
            shares.append(min(times, default=math.inf) / other["runs"][seed]["seconds"][-1])
    return median_interval(shares)
