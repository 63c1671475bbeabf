"""The section on backprop from scratch: what :mod:`report.studies.scratch` measured, as the page prints it."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import special

from fwdlib.methods.tinynet_figures import plot_epochs_until, plot_validation
from fwdlib.statistics import Interval, median_interval, paired_ratio, t_interval
from report import published
from report.names import CELLS, COMPARED, SCRATCH, read

Trainings = dict[tuple[str, str], dict[int, dict[str, Any]]]  # framework and cell -> seed -> training


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None where nothing was."""
    return read(folder / SCRATCH)


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where no training was measured."""
    trainings = _trainings(found)
    if not trainings:
        return None
    settings = found["settings"]
    rows = {key: _row(runs, settings["num_points"]) for key, runs in trainings.items()}
    factors, times, ratio = _factors(trainings), _times(found), _run(found, "ratio", "ratios")
    quoted = published.load()["scratch"]
    return {
        "settings": settings,
        "environment": found["environment"],
        "num_steps": _num_steps(settings),
        "num_seeds": max(row["num_seeds"] for row in rows.values()),
        "cells": {
            name: {"cell": cell, **rows["tinynet", name]} for name, cell in CELLS.items() if ("tinynet", name) in rows
        },
        "factors": factors,
        "goal": f"{100 * settings['goal']:g} %",
        "verdict": _verdict(factors),
        "xavier_helps": factors["xavier_divided"] is not None and factors["xavier_divided"].high < 1,
        "accuracies": [_accuracies(framework, rows, quoted) for framework in COMPARED],
        "twins": _twins(trainings),
        "agreement": _agreement(found),
        "derivatives": _run(found, "derivatives", "errors"),
        "ratio": ratio,
        "ratio_is_batch_size": ratio is not None and all(abs(r / settings["batch_size"] - 1) < 1e-5 for r in ratio),
        "times": times,
        "faster": all(ratio.high < 1 for row in times for ratio in row["ratios"].values()),
        "published_seconds": {framework: quoted[framework]["seconds"] for framework in COMPARED},
        "published_ratio": quoted["tinynet"]["seconds"] / quoted["PyTorch"]["seconds"],
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure]:
    """Return the figures by name, none where no training was measured."""
    trainings = {cell: runs for (framework, cell), runs in _trainings(found).items() if framework == "tinynet"}
    if not trainings:
        return {}
    settings, curves = found["settings"], {}
    for name, runs in trainings.items():
        rate = settings["learning_rate"] / (settings["batch_size"] if CELLS[name].divided else 1)
        epochs = np.array(next(iter(runs.values()))["epochs"])
        steps = settings["num_points"] // settings["batch_size"] * epochs
        curves[name] = {"epochs": epochs, "way": rate * steps}
        curves[name] |= {key: [run[key] for run in runs.values()] for key in ("loss", "errors")}
    epochs = {name: [run["arrival"] for run in runs.values()] for name, runs in trainings.items()}
    goal = f"{100 * settings['goal']:g} % of the validation points are right"
    return {
        "scratch-validation": plot_validation(curves, settings["num_points"], "summed squared error"),
        "scratch-arrivals": plot_epochs_until(epochs, settings["num_epochs"], goal),
    }


def normal_interval(mean: float, deviation: float, number: int) -> Interval:
    """Return Student's 95 % interval of a mean, from the standard deviation of single runs."""
    half = float(special.stdtrit(number - 1, 0.975)) * deviation / math.sqrt(number)
    return Interval(mean - half, mean, mean + half)


def _run(found: dict[str, Any], kind: str, value: str) -> Any:
    return next((run[value] for run in found["runs"] if run["key"] == [kind]), None)


def _trainings(found: dict[str, Any] | None) -> Trainings:
    trainings: Trainings = {}
    for run in found["runs"] if found else []:
        if run["key"][0] == "training":
            _, framework, cell, seed = run["key"]
            trainings.setdefault((framework, cell), {})[seed] = run | {"arrival": float(run["arrival"])}
    return trainings


def _row(runs: dict[int, dict[str, Any]], num_points: int) -> dict[str, Any]:
    arrivals = [run["arrival"] for run in runs.values()]
    accuracies = {seed: 100 * (1 - run["test_errors"] / num_points) for seed, run in runs.items()}
    return {
        "arrivals": arrivals,
        "arrival": median_interval(arrivals),
        "never": sum(math.isinf(value) for value in arrivals),
        "accuracies": accuracies,
        "accuracy": t_interval(list(accuracies.values())),
        "loss": statistics.median(run["loss"][-1] for run in runs.values()),
        "num_seeds": len(runs),
    }


def _accuracies(framework: str, rows: dict[tuple[str, str], dict[str, Any]], quoted: dict[str, Any]) -> dict[str, Any]:
    """Return the published accuracy of a framework, and what both of ours reach with its settings."""
    mean, deviation = quoted[framework]["accuracy"], quoted[framework]["deviation"]
    interval = normal_interval(100 * mean, 100 * deviation, quoted["runs"])
    cell = COMPARED[framework]
    ours = {name: rows[name, cell] for name in COMPARED if (name, cell) in rows}
    meets = [row["accuracy"].low <= interval.high and interval.low <= row["accuracy"].high for row in ours.values()]
    return {
        "framework": framework,
        "settings": cell,
        "published": interval,
        "num_published": quoted["runs"],
        "ours": ours,
        "agrees": all(meets),
    }


def _factors(trainings: Trainings) -> dict[str, Interval | None]:
    """Return by which factor one difference alone prolongs the training, seed by seed; None if no seed can tell."""

    def factor(after: str, before: str) -> Interval | None:
        first, second = (trainings.get(("tinynet", cell), {}) for cell in (after, before))
        taken = [(first[seed]["arrival"], second[seed]["arrival"]) for seed in sorted(first.keys() & second.keys())]
        ratios = [a / b for a, b in taken if math.isfinite(min(a, b))]  # 0 if only the first reached the goal
        return median_interval(ratios) if ratios else None

    return {
        "division": factor("divided", "as PyTorch"),
        "division_xavier": factor("divided, Xavier", "Xavier"),
        "xavier": factor("Xavier", "as PyTorch"),
        "xavier_divided": factor("divided, Xavier", "divided"),
        "both": factor("divided, Xavier", "as PyTorch"),
    }


def _verdict(factors: dict[str, Interval | None]) -> str | None:
    """Return whether the division alone prolongs the training, with either initial parameters; None if unknown."""
    division = [factors["division"], factors["division_xavier"]]
    if None in division:
        return None
    return "division" if all(factor.low > 1 for factor in division) else "unclear"


def _agreement(found: dict[str, Any]) -> dict[str, Any] | None:
    differences = [run["difference"] for run in found["runs"] if run["key"][0] == "agreement"]
    if not differences:
        return None
    largest = max(differences)
    return {"number": len(differences), "exponent": math.ceil(math.log10(largest)) if largest else None}


def _twins(trainings: Trainings) -> dict[str, Any] | None:
    """Compare the test errors of both frameworks, in float32 from the same parameters over the same batches."""
    differences = [
        abs(run["test_errors"] - trainings["PyTorch", cell][seed]["test_errors"])
        for framework, cell in trainings
        if framework == "tinynet" and ("PyTorch", cell) in trainings
        for seed, run in trainings[framework, cell].items()
        if seed in trainings["PyTorch", cell]
    ]
    if not differences:
        return None
    return {"same": differences.count(0), "number": len(differences), "largest": max(differences)}


def _times(found: dict[str, Any]) -> list[dict[str, Any]]:
    num_steps = _num_steps(found["settings"])
    return [
        {
            "threads": int(threads),
            "rounds": len(seconds["tinynet"]),
            "own": median_interval([num_steps * value for value in seconds["tinynet"]]),
            "torch": median_interval([num_steps * value for value in seconds["PyTorch"]]),
            "ratios": {name: paired_ratio(seconds["tinynet"], seconds[name]) for name in seconds if name != "tinynet"},
        }
        for threads, seconds in found.get("steps", {}).items()
    ]


def _num_steps(settings: dict[str, Any]) -> int:
    return settings["num_epochs"] * settings["num_points"] // settings["batch_size"]
