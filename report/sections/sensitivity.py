"""The section on processes of many steps: what :mod:`report.studies.sensitivity` measured, as the page prints it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import nnls

from fwdlib.methods import sensitivity_figures
from fwdlib.statistics import Interval, median_interval, paired_ratio
from report import published
from report.names import SENSITIVITY, read
from report.wording import scientific

NEEDED = {"cases", "memory", "map", "stored"}
FORWARD, EAGER_FORWARD, PLAIN = "forward, compiled", "forward, eager", "plain"
REVERSE, CHECKPOINTED = "reverse, eager", "reverse, checkpointed"
ADJOINT = "torchdiffeq odeint_adjoint"
TORCH = "forward, torch.func"
EXACT = 1e-12  # relative: what the two modes may differ by
FLAT = 1.1  # memory at the most steps over that at the fewest, below which it counts as flat
RESOLUTION = 1e5  # bytes: what a measurement of memory is off by
TITLES = {  # what the claims call a case -> its title in the study
    "one trajectory": "Lotka-Volterra, 1 trajectory",
    "hypergradients": "hypergradients of an MLP",
    "small layer, relu": "recurrent, 128 units, relu",
    "wide layer, relu": "recurrent, 512 units, relu",
    "small layer, tanh": "recurrent, 128 units, tanh",
    "wide layer, tanh": "recurrent, 512 units, tanh",
}
GROWTHS = {"Lotka-Volterra": "Lotka-Volterra, 4000 trajectories", "hypergradients": "hypergradients of an MLP"}


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None where a part is missing."""
    found = read(folder / SENSITIVITY) or {}
    return found if found.keys() >= NEEDED and all(found[part] for part in NEEDED) else None


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where nothing was measured."""
    if found is None:
        return None
    memory = _memory(found["memory"])
    titles = found["settings"]["cases"]
    rows = [_case(title, found["cases"][title]) for title in titles if title in found["cases"]]
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    errors = [value for row in rows for value in row["errors"].values()]
    return {
        "rows": rows,
        "reverses": [name for name in names if not name.startswith("forward") and name != PLAIN],
        "missing": [title for title in titles if title not in found["cases"]],
        "faster": [row for row in rows if row["headline"].high < 1],
        "slower": [row for row in rows if row["headline"].low > 1],
        "even": [row for row in rows if row["headline"].low <= 1 <= row["headline"].high],
        "error": scientific(max(errors, default=0)),
        "is_exact": max(errors, default=0) <= EXACT,
        "torch": {row["title"]: row["ratios"][TORCH] for row in rows if TORCH in row["ratios"]},
        "memory": memory,
        "map": _map(found),
        "by_title": {
            name: _over(next((r for r in rows if r["title"] == title), None)) for name, title in TITLES.items()
        },
        "growth": {
            name: {
                short: memory[title]["methods"][method]["growth"] if title in memory else None
                for short, method in (("forward", FORWARD), ("reverse", REVERSE))
            }
            for name, title in GROWTHS.items()
        },
        "quoted": published.load()["processes"],
        "settings": found["settings"],
        "environment": found["environment"],
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure]:
    """Return the figures of the section by name."""
    if found is None:
        return {}
    memory, of_map = _memory(found["memory"]), _map(found)
    over_steps = {title: row["methods"] for title, row in memory.items() if row["is_over_steps"]}
    return {
        "sensitivity-memory": sensitivity_figures.plot_memory(over_steps),
        "sensitivity-map": sensitivity_figures.plot_map(
            of_map["cells"], {"the same time": of_map["border"], "the same memory": of_map["memory_border"]}
        ),
    }


def _case(title: str, measured: dict[str, Any]) -> dict[str, Any]:
    seconds = measured["seconds"]
    ratios = {name: paired_ratio(seconds[FORWARD], rival) for name, rival in seconds.items() if name != FORWARD}
    reverses = [name for name in seconds if not name.startswith("forward") and name != PLAIN]
    fastest = min(reverses, key=lambda name: median(seconds[name]))
    compiled = measured["compile_seconds"]
    saved = median(seconds[fastest]) - median(seconds[FORWARD])
    longer = compiled.get(FORWARD, 0.0) - (compiled.get(fastest) or 0.0)
    return {
        "title": title,
        "num_steps": measured["num_steps"],
        "num_params": measured["num_params"],
        "num_tangents": measured["num_tangents"],
        "seconds": median_interval(seconds[FORWARD]),
        "ratios": ratios,
        "fastest": fastest,
        "headline": ratios[fastest],
        "compile": compiled.get(FORWARD),
        "compile_reverse": compiled.get(fastest),
        "ahead_after": max(0.0, longer) / saved if ratios[fastest].high < 1 and saved > 0 else None,
        "errors": {name: error for name, error in measured["errors"].items() if name in (FORWARD, EAGER_FORWARD)},
        "error": scientific(max(measured["errors"][name] for name in (FORWARD, EAGER_FORWARD))),
        "skipped": measured["skipped"],
        "over_plain": paired_ratio(seconds[FORWARD], seconds[PLAIN]) if PLAIN in seconds else None,
    }


def _over(row: dict[str, Any] | None) -> dict[str, Any] | None:
    # The ratios that claims are judged by, None for what was not measured.
    if row is None:
        return None
    rivals = {"fastest": row["fastest"], "eager": REVERSE, "adjoint": ADJOINT, "plain": PLAIN}
    return {"over": {key: row["ratios"].get(name) for key, name in rivals.items()}}


def _memory(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # title -> what each method needs, forward mode's growth over the steps, and its share of plain reverse mode's.
    found: dict[str, dict[str, Any]] = {}
    for key, entry in measured.items():
        title, name = key.split(": ")
        values = {int(steps): values for steps, values in entry["bytes"].items()}
        method = {
            "steps": list(values),
            "bytes": [median(of) for of in values.values()],
            "growth": _growth(values),
            "stopped": None,
            "expected": None,
            "reason": None,
        }
        if entry["stopped"]:
            stopped = entry["stopped"]["num_steps"]
            factor = stopped / method["steps"][-1]
            growth = math.sqrt(factor) if name == CHECKPOINTED else factor
            method |= {
                "stopped": stopped,
                "expected": growth * method["bytes"][-1],
                "reason": entry["stopped"]["reason"],
            }
        found.setdefault(title, {"methods": {}})["methods"][name] = method
    found = {title: row for title, row in found.items() if {FORWARD, REVERSE} <= row["methods"].keys()}
    for row in found.values():
        methods = row["methods"]
        row["is_over_steps"] = len(methods[FORWARD]["steps"]) > 1
        common = [t for t in methods[REVERSE]["steps"] if t in methods[FORWARD]["steps"]][-1]
        row["at"] = common
        row["used"] = {
            name: m["bytes"][m["steps"].index(common)] for name, m in methods.items() if common in m["steps"]
        }
        row["smaller"] = [name for name, value in row["used"].items() if value < row["used"][FORWARD]]
        row["share"] = row["used"][FORWARD] / row["used"][REVERSE]
        row["is_flat"] = methods[FORWARD]["growth"].estimate <= FLAT
    return found


def _growth(values: dict[int, list[float]]) -> Interval:
    # Memory at the most steps over that at the fewest, with the range over the repeats.
    first, last = values[min(values)], values[max(values)]
    if min(first) <= 0:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(min(last) / max(first), median(last) / median(first), max(last) / min(first))


def _map(found: dict[str, Any]) -> dict[str, Any]:
    columns = {int(num): column for num, column in found["map"].items()}
    steps = found["settings"]["steps"]
    reverse = next(name for name in next(iter(columns.values()))[str(steps[0])] if name.startswith("reverse, compiled"))
    cells, ratios, eager = [], {}, {}
    for num, column in sorted(columns.items()):
        for length in steps:
            seconds = column.get(str(length))
            ratio = paired_ratio(seconds[FORWARD], seconds[reverse]) if seconds else None
            cells.append((num, length, ratio.estimate if ratio else None))
            if ratio:
                ratios.setdefault(length, {})[num] = ratio.estimate
                if REVERSE in seconds:
                    eager.setdefault(length, {})[num] = paired_ratio(seconds[FORWARD], seconds[REVERSE]).estimate
    border = [(length, _crossing(of)) for length, of in ratios.items()]
    border = [(length, num) for length, num in border if num is not None]
    stored = {int(num): entry for num, entry in found["stored"].items()}
    known = [(length, ratio) for num, length, ratio in cells if ratio is not None]
    return {
        "cells": cells,
        "border": border,
        "borders": {
            "compiled reverse mode": border[-1][1] if border else None,
            "eager reverse mode": _crossing(eager[max(eager)]) if eager else None,
        },
        "border_at": border[-1][0] if border else None,
        "eager_at": max(eager, default=None),
        "memory_border": _memory_border(stored),
        "model": _model(columns, reverse, steps, dict(border)),
        "resolution": RESOLUTION,
        "num_cells": len(cells),
        "num_measured": len(known),
        "num_faster": sum(ratio < 1 for _, ratio in known),
        "best": min(ratio for _, ratio in known),
        "forward_bytes": {num: entry["forward"] for num, entry in stored.items()},
    }


def _crossing(ratios: dict[int, float]) -> float | None:
    # Where the ratio is 1, on logarithmic axes; None where it is on one side alone.
    points = sorted(ratios.items())
    for (low, first), (high, second) in itertools.pairwise(points):
        if first < 1 <= second:
            share = math.log(1 / first) / math.log(second / first)
            return low * (high / low) ** share
    return None


def _memory_border(stored: dict[int, dict[str, Any]]) -> list[tuple[float, float]]:
    # The number of steps at which reverse mode needs as much as forward mode, from its memory at the most steps.
    points = []
    for num, entry in sorted(stored.items()):
        steps, most = max((int(steps), value) for steps, value in entry["reverse"].items())
        points.append((max(entry["forward"], RESOLUTION) / (most / steps), num))
    return [(steps, num) for steps, num in points if steps > 0]


def _model(
    columns: dict[int, Any], reverse: str, steps: Sequence[int], border: dict[int, float]
) -> dict[str, Any] | None:
    """Return the cost of a step in units of a plain one, forward mode's a + cK + dKP, and the border that follows.

    A method's time is fixed + cost of a step times T, from its two greatest numbers of steps.
    """
    plain = {num: _per_step(column, PLAIN) for num, column in columns.items()}
    forward = {num: _per_step(column, FORWARD) for num, column in columns.items()}
    backward = {num: _per_step(column, reverse) for num, column in columns.items()}
    usable = [num for num in sorted(columns) if plain[num] and forward[num] and backward[num]]
    if len(usable) < 2:
        return None
    cost = {num: forward[num] / plain[num] for num in usable}
    rival = {num: backward[num] / plain[num] for num in usable}
    # Least squares of the relative errors, no coefficient below 0.
    design = np.array([[1, num, num**2] for num in usable], dtype=float)
    weights = 1 / np.array([cost[num] for num in usable])
    start, slope, bend = (float(value) for value in nnls(design * weights[:, None], np.ones(len(usable)))[0])
    level = median(rival.values())
    longest = max(border, default=None)
    return {
        "start": start,
        "slope": slope,
        "bend": bend,
        "terms": (scientific(slope), scientific(bend)),
        "level": level,
        "border": _root(start - level, slope, bend),
        "measured": border.get(longest),
        "at": longest,
        "cost": cost,
        "rival": rival,
        "fixed": median(
            seconds
            for column in columns.values()
            if (seconds := median(column[str(steps[0])][FORWARD]) - steps[0] * _per_step(column, FORWARD)) is not None
        ),
    }


def _per_step(column: dict[str, Any], name: str) -> float:
    lengths = sorted(int(length) for length, seconds in column.items() if name in seconds)
    first, last = lengths[0], lengths[-1]
    if first == last:
        return median(column[str(last)][name]) / last
    return (median(column[str(last)][name]) - median(column[str(first)][name])) / (last - first)


def _root(a: float, b: float, c: float) -> float:
    # The least positive root of a + b x + c x^2, infinite if there is none.
    roots = [root.real for root in np.roots([c, b, a]) if abs(root.imag) < 1e-9 and root.real > 0]
    return float(min(roots, default=math.inf))
