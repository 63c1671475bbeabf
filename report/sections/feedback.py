"""The section on feedback: what :mod:`report.studies.feedback` measured, as the page prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fwdlib.methods.feedback_figures import plot_depths, plot_test_errors
from fwdlib.statistics import difference_by_seed, paired_ratio, t_interval
from report.names import (
    DEPTH_MODES,
    DEPTHS,
    FEEDBACK,
    LEARNS,
    MODES,
    PLAIN,
    RECORDED,
    STEPS,
    TASKS,
    feedback_file,
    read,
)

DATASETS = {
    "MNIST": "MNIST",
    "KMNIST": "KMNIST",
    "FashionMNIST": "Fashion-MNIST",
    "CIFAR10-jpeg": "CIFAR-10 as JPEG copies",
}
NETWORKS = {
    "2x800": "2 x 800",
    "2x1000": "2 x 1000",
    "cnn": "CNN",
    "S-1-1": "LocalMixer S/1/1",
    "M-1-16": "LocalMixer M/1/16",
}
TITLES = {name: f"{DATASETS[task.dataset]}, {NETWORKS[task.network]}" for name, task in TASKS.items()}
WIDTH = 800  # units of a hidden layer
# titles of the tasks that answer and claims rest on
LARGE, CONVOLUTIONAL, MIXER = (TITLES[f"MNIST-{network}"] for network in ("2x800", "cnn", "M-1-16"))
NEAR = (
    "FDFA",
    "L-BP",
    "LG-BP",
    "LG-FG-A",
    "LG-FG-A, 16 groups",
    "FG-GUIDED",
)  # modes whose distance from backprop is of interest
METHODS = {"BP": "backprop", "FG": "forward gradient", "FG-RANK1": "rank-one", "FG-A": "activity"}  # in the figures


def load(folder: Path) -> dict[str, Any]:
    """Return ``studies``, task -> mode -> the content of its file; ``depths``, the same by hidden layers; ``steps``."""
    studies = {name: _files(folder, name, task.modes) for name, task in TASKS.items()}
    depths = {depth: _files(folder, task, DEPTH_MODES) for task, depth in DEPTHS.items()}
    return {
        "studies": {task: found for task, found in studies.items() if found},
        "depths": {depth: found for depth, found in depths.items() if found},
        "steps": read(folder / FEEDBACK / STEPS),
    }


def _files(folder: Path, task: str, modes: tuple[str, ...]) -> dict[str, Any]:
    files = {mode: read(folder / FEEDBACK / feedback_file(task, mode)) for mode in modes}
    return {mode: content for mode, content in files.items() if content and measured(content)}


def measured(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trainings that count: those that were not for tuning, at the rates that the tuning chose."""
    chosen = content.get("chosen", {}) | {"purpose": "measured"}
    return [run for run in content["runs"] if chosen.items() <= run.items()]


def curves(studies: dict[str, Any]) -> dict[str, dict[str, list[list[float]]]]:
    """Return the errors over the epochs as ``plot_test_errors`` takes them, without runs that diverged."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for task, modes in studies.items():
        panel = found[TITLES[task]] = {}
        for mode, content in modes.items():
            runs = [run for run in measured(content) if run["status"] == "completed"]
            if runs and "," not in mode:
                errors = [[errors / run["num_test"] for errors in run["test_errors"]] for run in runs]
                panel[METHODS.get(mode, mode)] = errors
    return found


def context(found: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the template prints of it, None where nothing was measured."""
    if not found["studies"]:
        return None
    studies = [_study(task, modes) for task, modes in found["studies"].items()]
    contents = [content for modes in found["studies"].values() for content in modes.values()]
    return {
        "studies": studies,
        "large": next((study for study in studies if study["title"] == LARGE), None),
        "missing": [title for task, title in TITLES.items() if task not in found["studies"]],
        "sources": list({content["source"]["fingerprint"]: content["source"] for content in contents}.values()),
        "depths": _depths(found["depths"]),
        "steps": _steps(found["steps"]) if found["steps"] else None,
        "environment": contents[0]["environment"],
    }


def figures(found: dict[str, Any]) -> dict[str, Figure]:
    """Return the figure of the section, by name."""
    drawn = {"feedback": plot_test_errors(curves(found["studies"]))} if found["studies"] else {}
    if found["depths"]:
        by_mode: dict[str, dict[int, list[float]]] = {}
        for depth, modes in found["depths"].items():
            for mode, content in modes.items():
                by_mode.setdefault(METHODS.get(mode, mode), {})[depth] = [_accuracy(run) for run in measured(content)]
        drawn["feedback-depth"] = plot_depths(by_mode)
    return drawn


def _depths(depths: dict[int, Any]) -> dict[str, Any] | None:
    # For each number of hidden layers the accuracy of each mode, and how far backprop is ahead of it.
    if not depths:
        return None
    accuracies = {
        depth: {mode: {run["seed"]: _accuracy(run) for run in measured(content)} for mode, content in modes.items()}
        for depth, modes in depths.items()
    }
    settings = next(content["settings"] for modes in depths.values() for content in modes.values())
    return {
        "modes": [mode for mode in DEPTH_MODES if any(mode in of for of in accuracies.values())],
        "rows": {d: {mode: t_interval(list(of.values())) for mode, of in by.items()} for d, by in accuracies.items()},
        "behind": {
            depth: {m: difference_by_seed(of["BP"], values) for m, values in of.items() if m != "BP" and "BP" in of}
            for depth, of in accuracies.items()
        },
        "epochs": settings["epochs"],
        "width": WIDTH,
        "num_seeds": min(len(values) for of in accuracies.values() for values in of.values()),
    }


def _study(task: str, modes: dict[str, Any]) -> dict[str, Any]:
    rows = {}
    for mode in MODES:  # in this order
        if mode not in modes:
            continue
        runs = measured(modes[mode])
        accuracies = {run["seed"]: _accuracy(run) for run in runs}
        rows[mode] = {
            "mode": mode,
            "lr": runs[0]["lr"],
            "b_lr": runs[0]["b_lr"] if LEARNS[mode] else None,
            "num_groups": modes[mode]["settings"].get("num_groups"),
            "accuracies": accuracies,
            "accuracy": t_interval(list(accuracies.values())),
            "diverged": sum(run["status"] == "diverged" for run in runs),
            "num_seeds": len(runs),
        }
    settings = next(iter(modes.values()))["settings"]
    accuracies = {mode: row["accuracies"] for mode, row in rows.items()}
    return {
        "title": TITLES[task],
        "rows": rows,
        "epochs": settings["epochs"],
        "settings": settings,
        "behind": {
            mode: difference_by_seed(accuracies.get("BP", {}), accuracies[mode]) for mode in NEAR if mode in rows
        },
        "missing": [mode for mode in TASKS[task].modes if mode not in rows],
    }


def _accuracy(run: dict[str, Any]) -> float:
    # In percent. A run that diverged has learned nothing.
    return 0.0 if run["status"] == "diverged" else 100 * (1 - run["test_errors"][-1] / run["num_test"])


def _steps(steps: dict[str, Any]) -> dict[str, Any]:
    rows = {
        net: {mode: paired_ratio(seconds, taken["BP"]) for mode, seconds in taken.items()}
        for net, taken in steps["seconds"].items()
    }
    against = {
        net: {
            mode: {other: paired_ratio(taken[mode], taken[other]) for other in (PLAIN, RECORDED) if other in taken}
            for mode in ("FDFA", "LG-FG-A")
            if mode in taken
        }
        for net, taken in steps["seconds"].items()
    }
    modes = [mode for mode in MODES if mode != "BP" and any(mode in of for of in rows.values())]
    return {"rows": rows, "modes": modes, "against": against, "environment": steps["environment"]}
