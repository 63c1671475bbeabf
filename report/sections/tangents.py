"""The section on several tangents: what :mod:`report.studies.tangents` measured, as the page prints it."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from fwdlib.methods.tangents_figures import plot_dimensions
from report import published
from report.grids import best, runs_of
from report.names import STYBLINSKI_TANG, TANGENTS, read
from report.wording import enumerated, scientific

TITLES = {"sphere": "Sphere", "styblinski_tang": "Styblinski-Tang", "rosenbrock": "Rosenbrock"}
MINIMA = {"styblinski_tang": STYBLINSKI_TANG}  # for each of the n numbers, where it is not zero
TINY = -12  # a last value on the sphere below this power of ten counts as solved

Cases = dict[str, dict[int, dict[str, dict[str, Any]]]]  # problem -> n -> method -> run


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None where nothing was."""
    return read(folder / TANGENTS)


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where nothing was measured."""
    if found is None or not found["runs"]:
        return None
    cases, problems, quoted = chosen(found), found["settings"]["problems"], published_values()
    return {
        "tables": [
            _table(name, sizes, quoted[name]) | {"num_steps": problems[name]["num_steps"]}
            for name, sizes in cases.items()
            if set(sizes) & set(quoted[name])
        ],
        "sphere": _sphere(cases.get("sphere", {}), problems, quoted["sphere"]),
        "projection": list(filter(None, (_projection(name, sizes) for name, sizes in cases.items()))),
        "diverged": [
            f"{TITLES[name]}, n = {n}, {method}"
            for name, sizes in cases.items()
            for n, methods in sizes.items()
            for method, run in methods.items()
            if not math.isfinite(run["measured"][-1])
        ],
        "missing": _missing(cases, found.get("sizes", {}), methods_of(found)),
        "settings": found["settings"],
        "source": published.load()["tangents"],
        "tiny": TINY,
        "num_seeds": len(found["settings"]["seeds"]),
        "num_tuning_seeds": len(found["settings"]["tuning_seeds"]),
        "environment": found["environment"],
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure]:
    """Draw where the descents end over the number of dimensions.

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
            for method in methods_of(found)
            if any(method in methods for methods in sizes.values())
        }
        for name, sizes in chosen(found).items()
    }
    return {"tangents": plot_dimensions(panels, "last value above the minimum")}


def methods_of(found: dict[str, Any]) -> list[str]:
    """Return the methods, in the order in which they were measured."""
    return list(dict.fromkeys(run["method"] for run in found["runs"]))


def chosen(found: dict[str, Any]) -> Cases:
    """Return the run with the best learning rate of each case, with its values as sorted numbers."""
    cases: Cases = {}
    for name in TITLES:
        for n in sorted({run["n"] for run in found["runs"] if run["problem"] == name}):
            for method in methods_of(found):
                if runs := runs_of(found["runs"], name, n, method):
                    run = best(runs)
                    values = sorted(map(float, run["measured"]))
                    cases.setdefault(name, {}).setdefault(n, {})[method] = run | {"measured": values}
    return cases


def published_values() -> dict[str, dict[int, dict[str, float]]]:
    """Return the published values: problem -> n -> method -> value."""
    quoted = published.load()["tangents"]
    return {name: {int(n): values for n, values in quoted[name].items()} for name in TITLES}


def expected_value(n: int, method: str, start: float, num_steps: int) -> float:
    """Return the expected last value on the sphere at the best rate, where each step takes away the same share.

    Args:
        n: numbers in a point.
        method: not backprop; its K is below n.
        start: each of the n numbers at the start.
        num_steps: of the descent.
    """
    k = _num_tangents(method)
    falls = k / (n + k + 1) if method.startswith("mean") else k / n
    return n * start**2 * (1 - falls) ** num_steps


def _num_tangents(method: str) -> int:
    return int(method.rpartition(" ")[2])


def _table(name: str, sizes: dict[int, dict[str, Any]], quoted: dict[int, dict[str, float]]) -> dict[str, Any]:
    columns = [n for n in sizes if n in quoted]
    methods = dict.fromkeys(method for n in columns for method in sizes[n])
    minimum = MINIMA.get(name, 0.0)
    rows = {
        method: [_cell(sizes[n].get(method), n * minimum, quoted[n].get(method)) for n in columns] for method in methods
    }
    return {"title": TITLES[name], "columns": columns, "rows": rows}


def _cell(run: dict[str, Any] | None, minimum: float, quoted: float | None) -> str:
    # median [range] (published)
    if run is None:
        return ""
    low, middle, high = (
        scientific(minimum + value) for value in (run["measured"][0], _middle(run), run["measured"][-1])
    )
    text = middle if low == middle == high else f"{middle} [{low}, {high}]"
    return text if quoted is None else f"{text} ({scientific(quoted)})"


def _middle(run: dict[str, Any]) -> float:
    return median(run["measured"])


def _sphere(
    sizes: dict[int, dict[str, Any]], problems: dict[str, Any], quoted: dict[int, dict[str, float]]
) -> dict[str, Any] | None:
    """Compare the sphere with theory and with the published values, at the size that has most of them."""
    if 1024 not in sizes:
        return None
    methods, start, num_steps = sizes[1024], problems["sphere"]["start"][0], problems["sphere"]["num_steps"]
    expected = {method: expected_value(1024, method, start, num_steps) for method in methods if method != "backprop"}
    over_theory = [_middle(methods[method]) / value for method, value in expected.items()]
    compared = [method for method in methods if quoted[1024].get(method)]
    over_published = {method: _middle(methods[method]) / quoted[1024][method] for method in compared}
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


def _projection(name: str, sizes: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the ratio of the projection's last value to the mean's, above the minimum, at the largest n."""
    n = max(sizes)
    pairs = {method: f"projection{method.removeprefix('mean')}" for method in sizes[n] if method.startswith("mean")}
    ratios = {
        _num_tangents(mean): _middle(sizes[n][projection]) / _middle(sizes[n][mean])
        for mean, projection in pairs.items()
        if projection in sizes[n]
    }
    return {"title": TITLES[name], "n": n, "ratios": ratios} if ratios else None


def _missing(cases: Cases, planned: dict[str, list[int]], methods: list[str]) -> list[str]:
    """Return in words the sizes at which a method is missing. Files of an earlier version do not name their sizes."""
    lacking = {
        name: [str(n) for n in sorted(sizes) if set(cases.get(name, {}).get(n, {})) != set(methods)]
        for name, sizes in planned.items()
    }
    return [f"{TITLES[name]} at n = {enumerated(sizes)}" for name, sizes in lacking.items() if sizes]
