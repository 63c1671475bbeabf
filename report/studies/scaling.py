"""What a step costs that several processes share: over links slowed on purpose, and on paper for more of them.

Everything is measured on one machine: each process has one thread, and a link of its own in a network namespace, which
takes root and Debian's package iproute2. Without, only the loopback device is measured, and the page says so.

    python -m report.studies.scaling
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench import links, scaling, sharing
from fwdlib.bench.scaling import NUM_TANGENTS
from fwdlib.results import write_json
from fwdlib.statistics import Interval, median_interval, paired_ratio
from report.studies.common import RESULTS, either, reopen

FILE = "scaling.json"
COUNTS = either((1, 2, 4), (1, 2))
RATES = either((None, 1000, 100, 10), (None, 100))  # Mbit/s
NUM_ROUNDS = either(11, 3)
# On paper. The latency is an assumption, of a good network; it stands on the page.
PAPER_COUNTS = (10, 100, 1000)
PAPER_GIGABITS = (1, 100)
PAPER_LATENCY = 50e-6
FEW = "FG-RANK1, K = 1"
MANY = "FG-RANK1, K = 16"
PART = (FEW, MANY)
HEADERS = 52  # bytes of a packet, of IPv4 and TCP with its time stamps, without the link's own
FILE_OF_DESCENT = "descent.json"


def measure(file: Path = RESULTS / FILE) -> dict[str, Any]:
    """Measure what is not there yet, with nothing beside it, and return everything that ``file`` then holds.

    Returns:
        ``settings``, ``environment``, and ``rows``, as :func:`fwdlib.bench.sharing.measure_step` returns them;
        ``obstacle``, why links could not be slowed, or nothing.

    Raises:
        ValueError: if ``file`` was made with other settings.
    """
    settings = {
        "counts": list(COUNTS),
        "rates": list(RATES),
        "num_rounds": NUM_ROUNDS,
        "batch_size": sharing.BATCH_SIZE,
    }
    found = reopen(file, settings, rows=[])
    found["obstacle"] = links.obstacle()
    there = {(row["count"], row["megabits"]) for row in found["rows"]}
    wanted = [(count, rate) for count in COUNTS for rate in RATES if count > 1 or rate is None]
    for count, rate in tqdm([each for each in wanted if each not in there], desc="scaling", unit="link"):
        if rate is None or not found["obstacle"]:
            row = sharing.measure_step(count, rate, slow=rate is not None, num_rounds=NUM_ROUNDS)
            found["rows"].append(row)
            write_json(file, found)
    return found


def load(folder: Path) -> dict[str, Any] | None:
    """Return the measurements, and those of :mod:`report.studies.descent` beside them; None if there are none.

    Args:
        folder: of the results.
    """
    path, descent = folder / FILE, folder / FILE_OF_DESCENT
    if not path.is_file():
        return None
    beside = json.loads(descent.read_text("utf-8")) if descent.is_file() else None
    return json.loads(path.read_text("utf-8")) | {"descent": beside}


def context(measured: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it.

    Args:
        measured: as :func:`load` returns it.
    """
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
        rows.append(row | {"methods": methods, "ratios": ratios})
    off = {name: [row["methods"][name]["off"] for row in rows if row["methods"][name]["off"]] for name in NUM_TANGENTS}
    paper = _paper(measured)
    num_params = measured["rows"][0]["num_params"]
    return {
        "settings": measured["settings"],
        "environment": measured["environment"],
        "obstacle": measured["obstacle"],
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
        "num_steps": {name: scaling.num_steps(k, num_params) for name, k in NUM_TANGENTS.items()},
        "never": not any(
            _even(row, name, scaling.num_steps(NUM_TANGENTS[name], num_params)) for row in paper for name in PART
        ),
        "descent": _descent(measured["descent"], paper),
        "ahead": {name: [row for row in paper if row["seconds"][name] < row["seconds"]["BP"]] for name in PART},
    }


def figures(measured: dict[str, Any] | None) -> dict[str, Figure]:
    """Return the figures of the section by name.

    Args:
        measured: as :func:`load` returns it.
    """
    from fwdlib.bench import scaling_figures

    if not _is_enough(measured):
        return {}
    return {
        "scaling-links": scaling_figures.plot_links(measured["rows"], scaling.predictions(measured["rows"])),
        "scaling-workers": scaling_figures.plot_processes(_paper(measured)),
    }


def _is_enough(measured: dict[str, Any] | None) -> bool:
    # For a ratio and for the model: one process alone, and a message between two.
    return measured is not None and {1, 2} <= {row["count"] for row in measured["rows"]}


def _bytes(rows: list[dict[str, Any]], name: str, headers: int = 0) -> list[int]:
    methods = [row["methods"][name] for row in rows if row["count"] > 1]
    return [found["bytes"] + headers * found["segments"] for found in methods]


def _even(row: dict[str, Any], name: str, ratio: float) -> float:
    return scaling.even_bandwidth(row["costs"]["BP"], row["costs"][name], PAPER_LATENCY, ratio)


def _descent(descent: dict[str, Any] | None, paper: list[dict[str, Any]]) -> dict[str, Any] | None:
    # How many steps of one tangent it took for one of backprop's, to a training loss that every seed of both came to.
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


if __name__ == "__main__":
    runtime.keep_freed_memory()
    measure()
