"""The section on test functions: what :mod:`report.studies.functions` measured, as the page prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fwdlib.methods.stability_figures import plot_divergence, plot_growth
from fwdlib.statistics import Interval, median_interval, paired_ratio
from report import published
from report.names import FUNCTIONS, WRITTEN_OUT, read
from report.wording import scientific

NEEDED = {"descents", "divergence", "growth", "steps"}
METHODS = ("backprop", "forward gradient")
ANIMATION = "functions.gif"  # its file, beside the figures
NUM_ANIMATED = 10  # seeds
THRESHOLD = 1e-3  # a descent that ends below it has converged
ENOUGH = 0.9  # of the seeds


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None where a part is missing."""
    found = read(folder / FUNCTIONS) or {}
    return found if found.keys() >= NEEDED else None


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where nothing was measured."""
    if found is None:
        return None
    quoted = published.load()["functions"]
    rows = [_descent(title, found, quoted["descents"][title]) for title in found["descents"]]
    divergence = [_rates(title, measured) for title, measured in found["divergence"].items()]
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
            "mean_limit": found["divergence"]["Sphere"]["limits"]["forward gradient"],
            "typical_limit": found["growth"]["typical_limit"],
        },
        "quoted": quoted,
        "environment": found["environment"],
        "steps_environment": found["steps"]["environment"],
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure | bytes]:
    """Return the figures by name, and the animation by the name of its file."""
    if found is None:
        return {}
    from fwdlib.methods.minimise_figures import plot_descents, plot_paths  # with torch, for the maps

    growth, descents = found["growth"], _timed(found)
    return {
        "functions-descents": plot_descents(descents),
        "functions-paths": plot_paths(descents),
        "functions-growth": plot_growth(growth["rows"], growth["rates"], growth["theory"]),
        "functions-divergence": plot_divergence(found["divergence"]),
        ANIMATION: animation(found),
    }


def animation(found: dict[str, Any]) -> bytes:
    """Return the animated GIF; the same results give the same bytes."""
    from fwdlib.methods.minimise_figures import animate_paths

    return animate_paths(
        {
            title: {name: rows | {"paths": rows["paths"][:NUM_ANIMATED]} for name, rows in methods.items()}
            for title, methods in found["descents"].items()
        }
    )


def _timed(found: dict[str, Any]) -> dict[str, Any]:
    """Return the descents, each with the median time of a step."""
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


def _descent(title: str, found: dict[str, Any], quoted: dict[str, Any]) -> dict[str, Any]:
    learning_rate, num_iterations = found["settings"]["paper"][title]
    ends = {name: [float(row[-1]) for row in rows["values"]] for name, rows in found["descents"][title].items()}
    (backprop,), forward = ends["backprop"], ends["forward gradient"]
    low, middle, high = (scientific(value) for value in median_interval(forward))
    ratio = _ratio(found, title)
    return {
        "title": title,
        "learning_rate": learning_rate,
        "of_limit": learning_rate / found["divergence"][title]["limits"]["forward gradient"],
        "num_iterations": num_iterations,
        "backprop": scientific(backprop),
        "backprop_arrived": backprop < THRESHOLD,
        "forward": f"{middle} [{low}, {high}]",
        "arrived": sum(end < THRESHOLD for end in forward),
        "num_seeds": len(forward),
        "published": scientific(quoted["end"]).replace(".00", ""),
        "ratio": ratio,
        "published_ratio": quoted["ratio"],
        "relation": "less" if ratio.high < 1 else "more" if ratio.low > 1 else "same",
    }


def _rates(title: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the largest rate up to which nothing diverges, and the smallest from which everything does."""
    row = {"title": title, "limits": measured["limits"]}
    for name, fractions in measured["diverged"].items():
        safe = next((i for i, fraction in enumerate(fractions) if fraction > 0), len(fractions)) - 1
        lost = next((i for i in range(len(fractions)) if min(fractions[i:]) == 1), None)
        row[name] = {
            "safe": measured["rates"][safe] if safe >= 0 else None,
            "lost": measured["rates"][lost] if lost is not None else None,
        }
    return row
