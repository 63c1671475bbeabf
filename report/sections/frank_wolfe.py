"""The section on Frank-Wolfe: what :mod:`report.studies.frank_wolfe` measured, as the page prints it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fwdlib.methods.frank_wolfe_figures import VARIANTS, plot_decay, plot_sparsity
from fwdlib.statistics import Interval, difference_by_seed, median_interval, t_interval
from report import published
from report.names import FRANK_WOLFE, read

NUM_PARAMS = 784 * 10 + 10  # of the trained model
SOLVED = 1e-9  # of the gap at the start: the exact gradient can be at the optimum after one step
FALLS = 1.1  # a gap that falls by less than this factor in a decade of steps has levelled off
LESS = 0.9  # of backprop's memory


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None where nothing was."""
    return read(folder / FRANK_WOLFE)


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where no convergence was measured."""
    if not found or not found.get("convergence"):
        return None
    settings, runs = found["settings"], found["convergence"]
    rows = {
        ball: {
            place: {form: _decay(runs[f"{ball}, {form}"], place, settings["first"]) for form in VARIANTS}
            for place in settings["places"]
        }
        for ball in _balls(runs)
    }
    verdicts = {ball: {place: _verdicts(forms) for place, forms in places.items()} for ball, places in rows.items()}
    return {
        "settings": settings,
        "environment": found["environment"],
        "source": found.get("source"),
        "rows": rows,
        "verdicts": verdicts,
        "level_inside": [ball for ball, by_place in verdicts.items() if by_place["inside"]["plain"] == "level"],
        "falls_near": [ball for ball, by_place in verdicts.items() if by_place["near the centre"]["plain"] == "falls"],
        "num_decades": round(float(np.log10(settings["num_steps"] / settings["first"]))),
        "ahead_near": [ball for ball, places in rows.items() if _plain_is_ahead(places["near the centre"])],
        "reach": _reach(settings, rows),
        "training": _trainings(found.get("training", {}), settings),
        "rates": {method: tuned["learning_rate"] for method, tuned in found.get("tuning", {}).items()},
        "memory": _memory(found.get("memory", {})),
        "quoted": published.load()["frank_wolfe"],
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure]:
    """Return the figures of what was measured, by the name of their file."""
    drawn: dict[str, Figure] = {}
    if not found:
        return drawn
    runs, places = found.get("convergence", {}), found["settings"]["places"]
    balls = _balls(runs)

    def curves(ball: str, place: str, quantity: str) -> dict[str, np.ndarray]:
        return {form: np.array(runs[f"{ball}, {form}"][place][quantity]) for form in VARIANTS}

    if "l1" in balls:
        steps = runs["l1, plain"]["steps"]
        gaps = {f"l1 ball, goal {place}": curves("l1", place, "gap") for place in places}
        drawn["frank-wolfe-gap"] = plot_decay(gaps, steps, "Frank-Wolfe gap, relative")
        errors = {f"{ball} ball": curves(ball, "outside", "error") for ball in balls}
        drawn["frank-wolfe-error"] = plot_decay(errors, steps, "loss above its optimum, relative")
    if trainings := list(found.get("training", {}).values()):
        quantity = f"parameters that hold {100 * found['settings']['holds']:g} % of the l1 norm"
        swept = _swept(trainings, found["settings"]["iterations"])
        drawn["frank-wolfe-sparsity"] = plot_sparsity(swept, quantity, trainings[0]["num_test"])
    return drawn


# --- convergence -----------------------------------------------------------------------------------------------------


def _balls(runs: dict[str, Any]) -> list[str]:
    """Return the balls of which every form was run."""
    balls = dict.fromkeys(name.partition(", ")[0] for name in runs)
    return [ball for ball in balls if all(f"{ball}, {form}" in runs for form in VARIANTS)]


def _decay(run: dict[str, Any], place: str, first: int) -> dict[str, Any]:
    """Return how the gap of one run fell: the slope of each seed, and the factor of each decade of steps."""
    steps, gaps = np.array(run["steps"]), np.maximum(run[place]["gap"], 1e-16)  # rounding can make one negative
    if (gaps[:, -1] < SOLVED).all():
        return {"solved": True}
    kept = steps >= first
    slopes = [np.polyfit(np.log10(steps[kept]), np.log10(row[kept]), 1)[0] for row in gaps]
    ends = {int(step): gaps[:, i] for i, step in enumerate(steps)}
    decades = [step for step in ends if step >= first and 10 * step in ends and np.log10(step / first) % 1 == 0]
    return {
        "solved": False,
        "slopes": dict(enumerate(slopes)),  # by seed
        "slope": t_interval(slopes),
        "falls": [median_interval(ends[step] / ends[10 * step]) for step in decades],
        "gap": median_interval(gaps[:, -1]),
        "error": median_interval([row[-1] for row in run[place]["error"]]),
    }


def _verdicts(forms: dict[str, Any]) -> dict[str, str]:
    """Return for each form whether its gap ``falls`` in each decade, is ``level`` in the last, or is ``unclear``."""
    verdicts = {}
    for form, row in forms.items():
        if row["solved"] or all(fall.low > FALLS for fall in row["falls"]):
            verdicts[form] = "falls"
        else:
            verdicts[form] = "level" if row["falls"][-1].high < FALLS else "unclear"
    return verdicts


def _plain_is_ahead(forms: dict[str, Any]) -> bool:
    """Return whether plain Frank-Wolfe falls more steeply than the averaged form, goal by goal."""
    return difference_by_seed(forms["plain"]["slopes"], forms["averaged"]["slopes"]).high < 0


def _reach(settings: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any] | None:
    """Return where the plain form ends on the l2 ball, in theory and measured, in units of the start."""
    if "l2" not in rows:
        return None
    radius, away = reach_of(settings["num_params"]), settings["places"]["outside"]
    predicted = ((away - radius) ** 2 - (away - 1) ** 2) / (away**2 - (away - 1) ** 2)
    return {"radius": radius, "predicted": predicted, "measured": rows["l2"]["outside"]["plain"]["error"]}


def reach_of(num_params: int) -> float:
    """Return what :func:`fwdlib.methods.frank_wolfe.l2_reach` returns, without torch."""
    return math.exp(math.lgamma(num_params / 2) - math.lgamma((num_params + 1) / 2)) / math.sqrt(math.pi)


# --- training --------------------------------------------------------------------------------------------------------


def _trainings(runs: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row for each training, over its seeds, sorted by method, and the comparisons that the text makes."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        groups.setdefault(name.rpartition(", seed")[0], []).append(run)
    if not groups:
        return None
    rows = [_training(seeds) for seeds in groups.values()]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rows.sort(key=lambda row: methods.index(row["method"]))  # stable

    steps, middle = settings["iterations"], settings["middle"]

    def at(method: str, ball: str | None, averaged: bool | None, radius: float | None, iterations: int = steps) -> Any:
        key = {"method": method, "ball": ball, "averaged": averaged, "radius": radius, "iterations": iterations}
        return next((row for row in rows if key.items() <= row.items()), None)

    found = {
        "backprop": at("backprop", "l1", True, middle),
        "activity": at("activity", "l1", True, middle),
        "plain": at("forward gradient", "l1", False, middle),
        "averaged": at("forward gradient", "l1", True, middle),
        "long": at("forward gradient", "l1", True, middle, settings["long"]),
        "l2": at("forward gradient", "l2", True, settings["middle_l2"]),
        "free": at("forward gradient", None, None, None),
    }
    return {
        "rows": rows,
        "num_seeds": max(row["num_seeds"] for row in rows),
        "num_test": next(iter(runs.values()))["num_test"],
        "num_params": NUM_PARAMS,
        "at": found,
        "behind": {name: _behind(found["backprop"], found[name]) for name in ("activity", "averaged", "long")},
    }


def _training(runs: list[dict[str, Any]]) -> dict[str, Any]:
    # A run that diverged has learned nothing.
    accuracies = {
        run["seed"]: 0.0 if run["status"] == "diverged" else 100 * (1 - run["test_errors"][-1] / run["num_test"])
        for run in runs
    }
    first = {key: runs[0][key] for key in ("method", "ball", "averaged", "radius", "iterations")}
    return first | {
        "form": {None: "SGD, no constraint", False: "plain", True: "averaged"}[first["averaged"]],
        "num_seeds": len(runs),
        "accuracies": accuracies,
        "accuracy": t_interval(list(accuracies.values())),
        "nonzero": 100 * float(np.mean([run["nonzero"] for run in runs])),
        "holding": 100 * float(np.mean([run["holding"] for run in runs])),
        "norm": float(np.mean([run["norm"] for run in runs])),
    }


def _behind(first: dict[str, Any] | None, second: dict[str, Any] | None) -> Interval | None:
    """Return by how many points the accuracy of the second is lower, seed by seed; None where one is missing."""
    return difference_by_seed(*(row["accuracies"] if row else {} for row in (first, second)))


def _swept(runs: list[dict[str, Any]], iterations: int) -> dict[str, dict[float | None, list[tuple[float, float]]]]:
    """Return what the sweep of radii gave: method -> radius -> sparsity and accuracy of each seed."""
    curves: dict[str, dict[float | None, list[tuple[float, float]]]] = {}
    for run in runs:
        is_swept = run["averaged"] is not False and run["ball"] != "l2" and run["iterations"] == iterations
        if is_swept and run["status"] != "diverged":
            accuracy = 1 - run["test_errors"][-1] / run["num_test"]
            curves.setdefault(run["method"], {}).setdefault(run["radius"], []).append((run["holding"], accuracy))
    return curves


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(items: dict[str, Any]) -> dict[str, Any] | None:
    """Return ``rows``, ``less`` and ``not_less``; None where nothing was measured.

    A row is a model and an estimator, with the bytes of each form of step and their share of backprop's. ``less`` are
    the models for which averaged Frank-Wolfe by some forward gradient needs clearly less memory, each with the smallest
    share; ``not_less`` are the others.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for item in items.values():
        first = {"model": item["model"], "title": item["title"], "batch": item["batch"], "method": item["method"]}
        row = rows.setdefault((item["model"], item["method"]), first | {"bytes": {}})
        row["bytes"][item["form"]] = item["bytes"]
    for (model, _), row in rows.items():
        whole = rows.get((model, "backprop"), {"bytes": {}})["bytes"].get("averaged")
        row["share"] = row["bytes"]["averaged"] / whole if whole and "averaged" in row["bytes"] else None
    if not rows:
        return None
    least: dict[str, float] = {}
    for row in rows.values():
        if row["share"] and row["method"] != "backprop":
            least[row["title"]] = min(row["share"], least.get(row["title"], math.inf))
    return {
        "rows": list(rows.values()),
        "less": {title: share for title, share in least.items() if share < LESS},
        "not_less": [title for title, share in least.items() if share >= LESS],
    }
