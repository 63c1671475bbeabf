"""The section on cost: what ``python -m fwdlib bench`` and :mod:`report.studies.descent` measured, as printed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fwdlib.bench import figures as bench_figures
from fwdlib.statistics import Interval, median_interval, paired_ratio
from report import published
from report.names import BENCH, BENCH_ONE_THREAD, BUDGET, DESCENT, read
from report.sections import budget

NOISE_BYTES = 1e6  # by less than that, two measurements of memory do not differ
TEXTBOOK = "forward gradient, eager"
ONE_GRAPH = "backprop one graph, compiled"
IN_BACKWARD = ("in-backward", "2 checkpoints", "√L checkpoints", "L checkpoints")
OPTIMIZERS = ("SGD", "momentum", "Adam")
STRUCTURED = ("rank-one", "per-example", "activity")
MODEL_OF_DESCENT = "mnist-mlp"


def load(folder: Path) -> dict[str, Any]:
    """Return what was measured: ``bench``, ``one_thread``, ``descent`` and ``budget``, each None if it was not."""
    files = {"bench": BENCH, "one_thread": BENCH_ONE_THREAD, "descent": DESCENT, "budget": BUDGET}
    return {name: read(folder / file) for name, file in files.items()}


def context(measured: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the template prints of it, None without a bench."""
    bench = measured["bench"]
    if bench is None:
        return None
    found: dict[str, Any] = {"bench": [_model(entry) for entry in bench["models"].values()]}
    found["environment"] = bench["environment"]
    found["rank_one"] = [m["structured"]["rank-one"]["ratio"] for m in found["bench"]]
    found["all_faster"] = [m["title"] for m in found["bench"] if m["structured"]["rank-one"]["ratio"].high < 1]
    found["one_graph"] = [m for m in found["bench"] if m["over_one_graph"]]
    found["graph_faster"] = [m["title"] for m in found["one_graph"] if m["over_one_graph"].high < 1]
    found["textbook_slower"] = [m["title"] for m in found["bench"] if m["textbook"].low > 1]
    found["tangents"] = _tangents(bench["models"].get(MODEL_OF_DESCENT, {}).get("seconds", {}))
    found["depth"] = _depth(bench["depth"])
    measured_sweeps = filter(bench.get, bench_figures.VARIED)
    swept = {sweep: [_swept(*each) for each in bench[sweep].items()] for sweep in measured_sweeps}
    found["sweeps"] = swept and {"mlp": bench["settings"]["mlp"], **swept}
    rivals = {m["title"]: m["rivals"] for m in found["bench"] if m["rivals"]}
    found["rivals"] = rivals
    found["smaller"] = [
        title for title, of in rivals.items() if of["smallest"]["memory"] < of["rank-one"]["memory"] - NOISE_BYTES
    ]
    found["exact_smaller"] = [
        title for title, of in rivals.items() if of["exact"]["memory"] < of["rank-one"]["memory"] - NOISE_BYTES
    ]
    found["not_faster"] = [m for m in found["bench"] if m["structured"]["rank-one"]["ratio"].high >= 1]
    found["dropped_in"] = [m for m in found["bench"] if m["dropped_in"]]
    found["dropped_in_faster"] = {
        name: [m["title"] for m in found["dropped_in"] if name in m["dropped_in"] and m["dropped_in"][name].high < 1]
        for name in OPTIMIZERS
    }
    found["compiled"] = [m for m in found["bench"] if m["compile_seconds"]]
    found["one_thread"] = _one_thread(measured.get("one_thread"))
    found["budget"] = budget.context(measured.get("budget"))
    found["descent"] = _descent(measured["descent"], bench) if measured["descent"] else None
    return found


def figures(measured: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures of the section by name."""
    if not (bench := measured["bench"]):
        return {}
    found = {"cost": bench_figures.plot_cost(bench)}
    if any("in-backward" in entry.get("memory", {}) for entry in bench["models"].values()):
        found["front"] = bench_figures.plot_front(bench)
    if bench["depth"]:
        found["depth"] = bench_figures.plot_depth(bench, published.load()["paper"]["depth"])
    if any(map(bench.get, bench_figures.VARIED)):
        found["sweeps"] = bench_figures.plot_sweeps(bench)
    if measured.get("budget"):
        found["budget"] = bench_figures.plot_budget(budget.curves(measured["budget"]))
    return found


def _model(entry: dict[str, Any]) -> dict[str, Any]:
    seconds = entry["seconds"]
    reference, forward = seconds[entry["reference"]], seconds["forward"]
    structured = {}
    for method in STRUCTURED:
        name = _fastest(seconds, method)
        structured[method] = {
            "mode": name.removeprefix(method).strip(", ").replace(", ", " "),
            "seconds": float(np.median(seconds[name])),
            "ratio": paired_ratio(seconds[name], reference),
            "over_plain": paired_ratio(seconds[name], forward).estimate,
        }
    best = seconds[_fastest(seconds, "rank-one")]
    memory = entry.get("memory", {})
    return {
        "title": entry["title"],
        "batch": entry["batch"],
        "num_params": entry["num_params"],
        "reference": entry["reference"].removeprefix("backprop").strip(", ").replace(", ", " "),
        "seconds": float(np.median(reference)),
        "over_plain": paired_ratio(reference, forward).estimate,
        "textbook": paired_ratio(seconds[TEXTBOOK], reference),
        "textbook_over_plain": paired_ratio(seconds[TEXTBOOK], forward),
        "eager_over_plain": paired_ratio(seconds["backprop, eager"], forward),
        "structured": structured,
        "memory": memory,
        "heavier": memory.get("rank-one", 0) > max(memory.get("backprop", 0), 10e6),  # less than that is noise
        "over_one_graph": paired_ratio(best, seconds[ONE_GRAPH]) if ONE_GRAPH in seconds else None,
        "rivals": _rivals(entry),
        "dropped_in": _dropped_in(seconds),
        "compile_seconds": _compile_seconds(entry.get("compile_seconds", {})),
    }


def _one_thread(bench: dict[str, Any] | None) -> list[dict[str, Any]]:
    # The models that were timed in one thread, too.
    return [_model(entry) for entry in bench["models"].values()] if bench else []


def _rivals(entry: dict[str, Any]) -> dict[str, Any] | None:
    # What competes with rank-one tangents where memory is short; all of it eager. None if it was not measured.
    seconds, memory = entry["seconds"], entry.get("memory", {})
    methods = [method for method in (*IN_BACKWARD, "two-point") if method in memory and f"{method}, eager" in seconds]
    if "rank-one" not in memory or not methods:
        return None
    rank_one = seconds["rank-one, eager"]
    found = {
        method: {
            "name": method,
            "memory": memory[method],
            "share": memory["rank-one"] / memory[method] if memory[method] > 0 else math.inf,
            "ratio": paired_ratio(rank_one, seconds[f"{method}, eager"]),
        }
        for method in (*methods, "rank-one")
    }
    exact = [found[method] for method in methods if method in IN_BACKWARD]
    front = bench_figures.front(bench_figures.time_and_memory(entry))
    return found | {
        "smallest": min((found[method] for method in methods), key=lambda rival: rival["memory"]),
        "exact": min(exact, key=lambda rival: rival["memory"]),
        "front": front,
    }


def _dropped_in(seconds: dict[str, list[float]]) -> dict[str, Interval]:
    # Rank-one gradients in .grad and one of torch's optimizers, over backprop with the same one.
    pairs = {name: [f"{method} with {name}, eager" for method in ("rank-one", "backprop")] for name in OPTIMIZERS}
    return {
        name: paired_ratio(seconds[ours], seconds[theirs])
        for name, (ours, theirs) in pairs.items()
        if ours in seconds and theirs in seconds
    }


def _compile_seconds(compiling: dict[str, float]) -> dict[str, float]:
    keys = {"rank-one": "rank-one, compiled", "backprop": "backprop, compiled"}
    return {name: compiling[key] for name, key in keys.items() if key in compiling}


def _fastest(seconds: dict[str, list[float]], method: str) -> str:
    return min(_forms(seconds, method), key=lambda name: np.median(seconds[name]))


def _forms(seconds: dict[str, list[float]], method: str) -> list[str]:
    return [name for name in seconds if name.partition(", ")[0] in (method, f"{method} channels_last")]


def _tangents(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for k in (4, 16):
        if f"rank-one K={k}, eager" in seconds:
            one, many = (seconds[f"{method}, eager"] for method in ("rank-one", f"rank-one K={k}"))
            rows.append({"k": k, "ratio": paired_ratio(many, one), "passes": (1 + k) / 2})
    return rows


def _swept(value: str, entry: dict[str, Any]) -> dict[str, Any]:
    seconds, rivals = entry["seconds"], _rivals(entry)
    name = _fastest(seconds, "rank-one")
    ratio = paired_ratio(seconds[name], seconds[entry["reference"]])
    return {
        "value": int(value),
        "reference": entry["reference"],
        "rank_one": ratio,
        "is_faster": ratio.high < 1,
        "mode": name.partition(", ")[2],
        "memory": rivals and {"rank-one": entry["memory"]["rank-one"], "exact": rivals["exact"]},
    }


def _depth(depth: dict[str, Any]) -> dict[str, Any] | None:
    if not depth:
        return None
    layers = sorted(map(int, depth))
    first, last = depth[str(layers[0])], depth[str(layers[-1])]
    found: dict[str, Any] = {"layers": layers, "last": layers[-1]}
    for method in ("backprop", "forward gradient", "rank-one"):
        seconds = last["seconds"]
        found[method.replace("-", "_").replace(" ", "_")] = {
            "over_plain": paired_ratio(seconds[f"{method}, eager"], seconds["forward"]).estimate,
            "ratio": paired_ratio(seconds[f"{method}, eager"], seconds["backprop, eager"]),
            "first_memory": first.get("memory", {}).get(method),
            "memory": last.get("memory", {}).get(method),
        }
    found["rivals"] = _rivals(last)
    return found


def _descent(descent: dict[str, Any], bench: dict[str, Any]) -> dict[str, Any]:
    seconds = bench["models"][MODEL_OF_DESCENT]["seconds"]
    rows = []
    for method in dict.fromkeys(run["method"] for run in descent["runs"]):
        runs = [run for run in descent["runs"] if run["method"] == method and run["purpose"] == "measured"]
        timed = method.replace(", K = ", " K=")
        if not runs or not _forms(seconds, timed):  # a short benchmark does not have all
            continue
        steps = [run["iterations"] if run["status"] == "reached" else float("inf") for run in runs]
        step = float(np.median(seconds[_fastest(seconds, timed)]))
        interval = median_interval(steps)
        rows.append(
            {
                "method": method,
                "learning_rate": runs[0]["learning_rate"],
                "reached": sum(run["status"] == "reached" for run in runs),
                "diverged": sum(run["status"] == "diverged" for run in runs),
                "num_seeds": len(runs),
                "steps": interval,
                "range": Interval(min(steps), interval.estimate, max(steps)),
                "step": step,
                "seconds": interval.estimate * step,
                "at_least": max(run["iterations"] for run in runs) * step,
                "end_loss": float(np.median([_number(run["train_loss"][-1]) for run in runs])),
            }
        )
    settings = descent["settings"]
    return {"rows": rows, "settings": settings, "source": settings["data"], "environment": descent["environment"]}


def _number(value: float | str) -> float:
    value = float(value)
    return value if value == value else float("inf")
