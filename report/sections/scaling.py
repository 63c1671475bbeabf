"""The section on several processes: what :mod:`report.studies.scaling` measured, and a model carries on, on paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fwdlib.bench import scaling, scaling_figures
from fwdlib.statistics import Interval, median_interval, paired_ratio
from report.names import DESCENT, SCALING, read

FEW = "FG-RANK1, K = 1"
MANY = "FG-RANK1, K = 16"
PART = (FEW, MANY)
RIVAL = "PowerSGD, rank 1"
HEADERS = 52  # bytes of a packet, of IPv4 and TCP with its time stamps, without the link's own
PAPER_COUNTS = (10, 100, 1000)
PAPER_GIGABITS = (1, 100)
PAPER_LATENCY = 50e-6  # seconds: assumed, that of a good network; the page states it


def load(folder: Path) -> dict[str, Any] | None:
    """Return the measurements together with those of :mod:`report.studies.descent`, None where nothing was measured."""
    found = read(folder / SCALING)
    return found and found | {"descent": read(folder / DESCENT)}


def context(measured: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where too little was measured."""
    if not _is_enough(measured):
        return None
    predicted = scaling.predictions(measured["rows"])
    rows = []
    for row in measured["rows"]:
        methods = {}
        for name, found in row["methods"].items():
            expected = predicted.get((row["count"], row["megabits"]), {}).get(name)
            seconds = median_interval(found["seconds"])
            methods[name] = found | {
                "seconds": seconds,
                "predicted": expected,
                "off": seconds.estimate / expected if expected else None,
            }
        ratios = {name: paired_ratio(row["methods"]["BP"]["seconds"], row["methods"][name]["seconds"]) for name in PART}
        rivals = {name: found["seconds"] for name, found in row["methods"].items() if name == RIVAL}
        over = paired_ratio(rivals[RIVAL], row["methods"][FEW]["seconds"]) if rivals else None
        rows.append(row | {"methods": methods, "ratios": ratios, "rival": over})
    off = {name: [row["methods"][name]["off"] for row in rows] for name in scaling.NUM_TANGENTS}
    off = {name: [value for value in values if value] for name, values in off.items()}
    paper = _paper(measured)
    num_params = measured["rows"][0]["num_params"]
    return {
        "settings": measured["settings"],
        "environment": measured["environment"],
        "obstacle": measured["obstacle"],
        "rival": RIVAL if any(row["rival"] for row in rows) else None,
        "rows": sorted(rows, key=lambda row: (row["count"], -(row["megabits"] or math.inf))),
        "off": {name: (min(values), max(values)) for name, values in off.items() if values},
        "slowest": max((row for row in rows if row["megabits"] == 100), key=lambda row: row["count"], default=None),
        "num_params": num_params,
        "gradient": scaling.BYTES_OF_A_NUMBER * num_params,
        "most": {name: max(_bytes(rows, name)) for name in PART},
        "wire": {name: max(_bytes(rows, name, headers=HEADERS)) for name in PART},
        "least": min(_bytes(rows, "BP")),  # sent once: what a slow link drops is sent again
        "paper": paper,
        "latency": PAPER_LATENCY,
        "mega": 1e6,
        "num_steps": {name: scaling.num_steps(k, num_params) for name, k in scaling.NUM_TANGENTS.items()},
        "never": not any(
            _even(row, name, scaling.num_steps(scaling.NUM_TANGENTS[name], num_params))
            for row in paper
            for name in PART
        ),
        "descent": _descent(measured["descent"], paper),
        "ahead": {name: [row for row in paper if row["seconds"][name] < row["seconds"]["BP"]] for name in PART},
    }


def figures(measured: dict[str, Any] | None) -> dict[str, Figure]:
    """Return the figures of the section by name."""
    if not _is_enough(measured):
        return {}
    return {
        "scaling-links": scaling_figures.plot_links(measured["rows"], scaling.predictions(measured["rows"])),
        "scaling-workers": scaling_figures.plot_processes(_paper(measured)),
    }


def _is_enough(measured: dict[str, Any] | None) -> bool:
    # Ratios and the model need one process alone, and a message between two.
    return measured is not None and {1, 2} <= {row["count"] for row in measured["rows"]}


def _bytes(rows: list[dict[str, Any]], name: str, headers: int = 0) -> list[int]:
    methods = [row["methods"][name] for row in rows if row["count"] > 1]
    return [found["bytes"] + headers * found["segments"] for found in methods]


def _even(row: dict[str, Any], name: str, ratio: float) -> float:
    return scaling.even_bandwidth(row["costs"]["BP"], row["costs"][name], PAPER_LATENCY, ratio)


def _descent(descent: dict[str, Any] | None, paper: list[dict[str, Any]]) -> dict[str, Any] | None:
    # How many steps with one tangent it took for one of backprop's, to a training loss that every seed of both reached.
    if descent is None:
        return None
    curves = {
        method: [list(map(float, run["train_loss"])) for run in descent["runs"] if _is(run, method)]
        for method in ("backprop", "rank-one")
    }
    if not all(curves.values()):
        return None
    level, every = max(min(curve) for curve in curves["rank-one"]), descent["settings"]["evaluate_every"]
    steps = {
        method: [every * next(i for i, loss in enumerate(curve) if loss <= level) for curve in of_method]
        for method, of_method in curves.items()
    }
    steps_of_backprop = median_interval(steps["backprop"]).estimate
    ratio = median_interval(steps["rank-one"]).estimate / steps_of_backprop
    even = [_even(row, FEW, ratio) for row in paper]
    return {
        "level": level,
        "steps": {method: Interval(min(v), median_interval(v).estimate, max(v)) for method, v in steps.items()},
        "num_seeds": {method: len(values) for method, values in steps.items()},
        "ratio": ratio,
        "even": (min(even), max(even)),
        "without": steps_of_backprop * paper[0]["costs"]["BP"].compute,
        "model": descent["settings"]["model"],
    }


def _is(run: dict[str, Any], method: str) -> bool:
    return run["method"] == method and run["purpose"] == "measured" and run["status"] != "diverged"


def _paper(measured: dict[str, Any]) -> list[dict[str, Any]]:
    return scaling.on_paper(measured["rows"], PAPER_COUNTS, PAPER_GIGABITS, PAPER_LATENCY)
