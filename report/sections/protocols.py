"""The section on the two protocols: what :mod:`report.studies.protocols` measured, as the page prints it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from fwdlib import plotting
from fwdlib.statistics import Interval, median_interval, paired_ratio, t_interval
from report.names import AS_PUBLISHED, METHODS, MODELS, PROTOCOLS, STEPS, read

THEIR_TIMER = "their timer"
JOINT = "one tangent for all tensors"
TITLES = {"logistic": "Logistic regression", "mlp": "Multilayer perceptron", "cnn": "Convolutional network"}


def load(folder: Path) -> dict[str, Any]:
    """Return what was measured: ``models``, name -> the content of its file, and ``steps``, which may be None.

    A model whose fair protocol is not complete is left out.
    """
    models = {name: read(folder / PROTOCOLS / f"{name}.json") for name in MODELS}
    complete = {name: found for name, found in models.items() if found and set(found.get("fair", {})) == set(METHODS)}
    return {"models": complete, "steps": read(folder / PROTOCOLS / STEPS)}


def context(found: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the template prints of it, None where nothing was measured."""
    if not found["models"] or not found["steps"]:
        return None
    models = {name: _model(name, content, found["steps"]["seconds"][name]) for name, content in found["models"].items()}
    return {
        "models": models,
        "missing": {name: title for name, title in TITLES.items() if name not in models},
        "num_seeds": sorted({r["num_seeds"] for m in models.values() if m["threshold"] for r in m["fair"].values()}),
        "environment": next(iter(found["models"].values()))["environment"],
        "timing_environment": found["steps"]["environment"],
        "culprits": [
            f"{row['departure']} ({models[name]['title'].lower()})"
            for name in models
            for row in models[name]["published"]
            if row["departure"] and row["verdict"] == "faster"
        ],
    }


def figures(found: dict[str, Any]) -> dict[str, Figure]:
    """Return the figure of the report's first screen, by name; no figure where nothing was measured."""
    measured = context(found)
    return {"answer": plot_tuned(measured["models"])} if measured else {}


@plotting.styled
def plot_tuned(models: dict[str, Any]) -> Figure:
    """Draw the times of a step and of a training at tuned learning rates over backprop's, a panel for each model.

    Args:
        models: of :func:`context`. Only those that train to a threshold are drawn.
    """
    models = {model["title"]: model for model in models.values() if model["threshold"] is not None}
    methods = [method for method in METHODS if method != "backprop"]
    figure = Figure(figsize=(7.2, 2.1))
    for axes, title, model in plotting.panels(figure, models, sharex=True, sharey=True):
        axes.axvline(1, **plotting.METHOD_STYLES["backprop"], linewidth=1.2)
        for place, method in enumerate(methods):
            color = plotting.METHOD_STYLES[method.partition(",")[0]]["color"]
            row = model["fair"][method]
            for ratio, face in ((row["step"], "white"), (row["against"]["total"], color)):
                axes.plot([ratio.low, ratio.high], [place, place], color=color, linewidth=2.2, zorder=2)
                axes.plot(ratio.estimate, place, "o", color=color, markerfacecolor=face, markersize=6, zorder=3)
        axes.set_title(title)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(visible=False, axis="y")
        where = {"xytext": (-4, -2), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        look = {"ha": "right", "va": "top", "fontsize": 8, "color": plotting.METHOD_STYLES["backprop"]["color"]}
        axes.annotate("backprop", (1, 1), **where, **look)
    first = figure.axes[0]
    first.set_yticks(range(len(methods)), methods)
    first.set_ylim(len(methods) - 0.5, -0.7)
    first.set_xlim(left=0.45)
    figure.supxlabel("time over backprop's: of a step (hollow), of the training (filled)", fontsize=9)
    return figure


def _model(name: str, content: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    settings = content["settings"]
    threshold = settings["threshold"]
    step = paired_ratio(seconds["forward, published form"], seconds["backprop"])
    theirs = paired_ratio(seconds["forward, their code"], seconds["backprop, their code"])
    forms = content["published"]
    text, joint = AS_PUBLISHED, paired_ratio(seconds["forward gradient"], seconds["backprop"])
    pairs = [(None, text, text, step)]
    pairs += [(form, form, text, step) for form in forms["backprop"] if form != text]
    pairs += [(form, text, form, joint if form == JOINT else step) for form in forms["forward"] if form != text]
    pairs += [(THEIR_TIMER, text, text, theirs)]
    published = [
        {"departure": departure} | _pair(forms["backprop"][b], forms["forward"][f], time, threshold)
        for departure, b, f, time in pairs
    ]
    fair = {method: _tuned(content, method, seconds, threshold) for method in METHODS if method != "backprop"}
    return {
        "title": TITLES[name],
        "threshold": threshold,
        "settings": settings,
        "num_test": content["num_test"],
        "source": content["source"],
        "statements": content["statements"],
        "published": published,
        "step": step,
        "their_step": theirs,
        "fair": {"backprop": _tuned(content, "backprop", seconds, threshold)} | fair,
        "equal": {method: _runs(content["equal"][method]["0"], threshold) for method in METHODS},
        "slower": all(row["against"]["total"].low > 1 for row in fair.values()),
        "faster": any(row["against"]["total"].high < 1 for row in fair.values()),
        "best": min(set(fair) - {"forward gradient"}, key=lambda method: fair[method]["against"]["total"].estimate),
        "unstable": {
            method: _runs(content["tuning"][method][half], threshold)
            for method, row in fair.items()
            if threshold is None and 2 * row["arrived"] < row["num_seeds"]
            if (half := str(_best(content, method) - 1)) in content["tuning"][method]
        },
        "edge": [method for method in METHODS if _best(content, method) in (settings["grid"][0], settings["grid"][-1])],
    }


def _pair(backprop: dict[str, Any], forward: dict[str, Any], step: Interval, threshold: float | None) -> dict[str, Any]:
    # Both methods of one row, and the time of a training that follows.
    both = sorted(set(backprop["seed"]) & set(forward["seed"]))
    b, f = ({seed: i for i, seed in enumerate(runs["seed"])} for runs in (backprop, forward))
    ratio = paired_ratio(
        [_arrival(forward, f[seed], threshold) for seed in both],
        [_arrival(backprop, b[seed], threshold) for seed in both],
    )
    total = Interval(*(end * step.estimate for end in ratio))
    total = Interval(total.low * step.low / step.estimate, total.estimate, total.high * step.high / step.estimate)
    gap = [100 * (backprop["accuracy"][b[seed]] - forward["accuracy"][f[seed]]) for seed in both]
    return {
        "backprop": _runs(backprop, threshold),
        "forward": _runs(forward, threshold),
        "num_seeds": len(both),
        "iterations": ratio,
        "step": step,
        "total": total,
        "accuracy_gap": t_interval(gap),
        "loss_gap": median_interval([_lead(forward["train_loss"][f[s]], backprop["train_loss"][b[s]]) for s in both]),
        "verdict": None if threshold is None else _verdict(total),  # both took the number of iterations that was set
    }


def _lead(forward: float | str, backprop: float | str) -> float:
    # By how much backprop's loss is lower: infinitely where only the forward gradient diverged, by 0 where both did.
    losses = _finite(forward), _finite(backprop)
    return 0.0 if losses == (math.inf, math.inf) else losses[0] - losses[1]


def _verdict(total: Interval) -> str:
    return "faster" if total.high < 1 else "slower" if total.low > 1 else "unclear"


def _runs(runs: dict[str, Any], threshold: float | None) -> dict[str, Any]:
    return {
        "learning_rate": runs["learning_rate"],
        "num_seeds": len(runs["seed"]),
        "arrived": sum(math.isfinite(_arrival(runs, i, threshold)) for i in range(len(runs["seed"]))),
        "iterations": median_interval([_arrival(runs, i, threshold) for i in range(len(runs["seed"]))]),
        "train_loss": median_interval([_finite(value) for value in runs["train_loss"]]),
        "accuracy": median_interval([100 * value for value in runs["accuracy"]]),
        "accuracy_start": median_interval([100 * value for value in runs["accuracy_start"]]),
    }


def _tuned(content: dict[str, Any], method: str, seconds: dict[str, list[float]], threshold: float | None) -> dict:
    best = content["fair"][method][str(_best(content, method))]
    baseline = content["fair"]["backprop"][str(_best(content, "backprop"))]
    step = paired_ratio(seconds[method], seconds["backprop"])
    return {"step": step} | _runs(best, threshold) | {"against": _pair(baseline, best, step, threshold)}


def _best(content: dict[str, Any], method: str) -> int:
    (power,) = content["fair"][method]
    return int(power)


def _arrival(runs: dict[str, Any], i: int, threshold: float | None) -> float:
    arrived = runs["status"][i] == ("completed" if threshold is None else "reached")
    return float(runs["iterations"][i]) if arrived else math.inf


def _finite(value: float | str) -> float:
    value = float(value)
    return value if np.isfinite(value) else math.inf
