"""From saved results to the numbers and verdicts that the report prints.

Every number of the report is computed here, from files; the template only puts them into sentences.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fwdlib.results import Record, iterations, load_run
from fwdlib.statistics import Interval, median_interval, paired_difference, paired_ratio
from report import names, published
from report.sections import (
    choice,
    claims,
    cost,
    feedback,
    frank_wolfe,
    functions,
    protocols,
    scaling,
    scratch,
    sensitivity,
    tangents,
    traffic,
    verdicts,
)

METHODS = {"backprop": "backprop", "forward": "forward gradient"}  # key -> as records and timings call it
TIMINGS = "timings.json"
BARELY = 1.0  # percent: a training loss that falls by less has "barely moved"


class Task(NamedTuple):
    """A model and its pair of notebooks."""

    title: str
    short: str  # for the axis of a figure
    description: str  # of the model of fwdlib.models, whose docstring says the same
    num_tensors: int
    backprop: str
    forward: str


TASKS = {
    "logistic": Task(
        "Logistic regression",
        "logistic",
        "One linear layer, 4 → 3, with weight and bias drawn from N(0, 1)",
        2,
        "1a_logistic_backprop",
        "1b_logistic_forward",
    ),
    "mlp": Task(
        "Multilayer perceptron",
        "MLP",
        "Three linear layers, 4 → 64 → 8 → 3, with ReLU between them and all parameters drawn from U(-1, 1)",
        6,
        "2a_mlp_backprop",
        "2b_mlp_forward",
    ),
    "cnn": Task(
        "Convolutional network",
        "CNN",
        "Two 3x3 convolutions with 2 and 4 channels, one 2x2 max-pool, two linear layers; torch's own initialisation",
        8,
        "3a_cnn_backprop",
        "3b_cnn_forward",
    ),
}


RECORDS = [*(f"{getattr(task, method)}.json" for task in TASKS.values() for method in METHODS), TIMINGS]

# The sections with studies of their own, see report.sections. Without its study, a section has no figures, and its
# context is None. The text is sections/<name>.md.j2.
PARTS: dict[str, Any] = {
    "protocols": protocols,
    "cost": cost,
    "functions": functions,
    "sensitivity": sensitivity,
    "tangents": tangents,
    "feedback": feedback,
    "frank_wolfe": frank_wolfe,
    "scaling": scaling,
    "traffic": traffic,
    "scratch": scratch,
}


class Results(NamedTuple):
    """Everything that the report is made from."""

    records: dict[str, dict[str, Record]]  # task -> method -> the notebook's record
    timings: dict[str, Any]  # as report.studies.timings.measure returns them
    parts: dict[str, Any]  # what the modules of PARTS load
    is_short: bool  # whether the studies were made with their short settings


def load_results(folder: Path, studies: Path | None = None) -> Results:
    """Read the records of the six notebooks, the timings, and the results of the studies.

    Args:
        folder: of the records and timings.
        studies: folder of the studies' results. Default: the same one.

    Raises:
        FileNotFoundError: if a record or the timings are missing.
        ValueError: if a file is damaged, or the two notebooks of a pair ran on different data or seeds.
    """
    records = {}
    for key, task in TASKS.items():
        pair = {method: load_run(folder / f"{getattr(task, method)}.json") for method in METHODS}
        for what, values in {
            "data": [record.source["fingerprint"] for record in pair.values()],
            "seeds": [[run.seed for run in record.runs] for record in pair.values()],
            "quick mode": [record.quick for record in pair.values()],
        }.items():
            if values[0] != values[1]:
                raise ValueError(f"{task.backprop} and {task.forward} differ in {what}: {values[0]} and {values[1]}")
        records[key] = pair
    path = folder / TIMINGS
    if not path.is_file():
        raise FileNotFoundError(f"no timings at {path}; `python -m report` takes them after the notebooks")
    try:
        timings = json.loads(path.read_text())
        complete = set(timings["tasks"]) == set(TASKS)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no timings ({error}); delete it and run `python -m report`") from error
    if not complete:
        raise ValueError(f"{path} has timings of {', '.join(timings['tasks'])}, not of {', '.join(TASKS)}")
    studies = studies or folder
    parts = {name: part.load(studies) for name, part in PARTS.items()}
    return Results(records, timings, parts, (studies / names.SHORT_FORM).is_file())


def build_context(results: Results) -> dict[str, Any]:
    """Return what the template prints: numbers, intervals and verdicts, by name."""
    quoted = published.load()
    for key in TASKS:
        for run in (quoted["predecessors"][key][method] for method in METHODS):  # published: only the times
            run["iterations"] = round(run["total_seconds"] / run["step_seconds"])
    tasks = {
        key: _task(key, results.records[key], results.timings["tasks"][key], quoted["predecessors"][key])
        for key in TASKS
    }
    records = [record for pair in results.records.values() for record in pair.values()]
    sources = list({record.source["fingerprint"]: record.source for record in records}.values())
    environments = [record.environment for record in records]
    found = {
        "tasks": tasks,
        **{name: part.context(results.parts[name]) for name, part in PARTS.items()},
        "barely": BARELY,
        "quoted": quoted,
        "short": results.is_short,
        "quick": any(record.quick for record in records),
        "substitutes": [source for source in sources if source["substitute_for"]],
        # An iteration includes an evaluation. If the evaluation alone took longer, another program was running.
        "disturbed": [t["title"] for t in tasks.values() if min(m["over_plain"] for m in t["methods"].values()) < 1],
        "sources": [
            {**source, "tasks": [tasks[key]["title"] for key in TASKS if tasks[key]["source"] == source]}
            for source in sources
        ],
        "environment": environments[0],
        "same_environment": all(other == environments[0] for other in environments),
        "timing_environment": results.timings["environment"],
        "files": {key: [getattr(TASKS[key], method) for method in METHODS] for key in TASKS},
    }
    found["claims"] = claims.findings(found)
    found["margins"] = {"points": verdicts.POINTS, "times": verdicts.TIMES}
    found["choice"] = choice.rows(found)
    return found


def durations(runs: dict[str, list]) -> dict[str, list[float]]:
    """Return each seed's seconds for one task and method: in total, and the median and mean of a step.

    The total is infinite for a seed that did not reach the threshold.

    Args:
        runs: lists ``status, iterations, step_seconds, total_seconds``, one item per seed.
    """
    finished = [status in ("reached", "completed") for status in runs["status"]]
    return {
        "total": [t if ok else math.inf for t, ok in zip(runs["total_seconds"], finished, strict=True)],
        "median_step": [math.inf if t is None else t for t in runs["step_seconds"]],
        "mean_step": [t / n if n else math.inf for t, n in zip(runs["total_seconds"], runs["iterations"], strict=True)],
    }


def relation(ratio: Interval) -> str:
    """Return whether forward gradients need ``more`` or ``less`` than backprop, the ``same``, or ``unclear``.

    Args:
        ratio: of forward gradient to backprop. ``same`` if its interval contains 1; ``unclear`` without an interval.
    """
    if math.isnan(ratio.low):
        return "unclear"
    return "more" if ratio.low > 1 else "less" if ratio.high < 1 else "same"


def _task(key: str, pair: dict[str, Record], timed: dict[str, Any], quoted: dict[str, Any]) -> dict[str, Any]:
    task, forward = TASKS[key], pair["forward"]
    clocks = {method: durations(timed["methods"][name]) for method, name in METHODS.items()}
    plain = float(np.median(timed["plain_seconds"]))
    published = float(np.median(timed["published_seconds"]))
    taken = {method: iterations(record) for method, record in pair.items()}
    both = [(f, b) for f, b in zip(taken["forward"], taken["backprop"], strict=True) if math.isfinite(f + b)]
    methods = {}
    for method, record in pair.items():
        step = median_interval(clocks[method]["median_step"])
        methods[method] = {
            **_method(record),
            "step": step,
            "mean_step": median_interval(clocks[method]["mean_step"]),
            "total": median_interval(clocks[method]["total"]),
            "over_plain": step.estimate / plain,
        }
    ratios = {
        "iterations": paired_ratio(taken["forward"], taken["backprop"]),
        "step": paired_ratio(clocks["forward"]["median_step"], clocks["backprop"]["median_step"]),
        "total": paired_ratio(clocks["forward"]["total"], clocks["backprop"]["total"]),
    }
    threshold = forward.parameters.get("threshold")
    medians = [method["iterations"].estimate for method in methods.values()]
    return {
        "key": key,
        "title": task.title,
        "description": task.description,
        "num_params": forward.num_params,
        "num_tensors": task.num_tensors,
        "source": forward.source,
        "num_test": forward.num_test,
        "seeds": [run.seed for run in forward.runs],
        "threshold": threshold,
        "limit": forward.parameters["num_iterations" if threshold is None else "max_iterations"],
        "forward_parameters": forward.parameters,
        "settings": _settings(pair),
        "notebooks": {method: getattr(task, method) for method in METHODS},
        "methods": methods,
        "ratios": ratios,
        "relations": {name: relation(ratio) for name, ratio in ratios.items()},
        "number_relation": "never" if all(map(math.isinf, medians)) else relation(ratios["iterations"]),
        "difference": paired_difference(*zip(*both, strict=True)) if both else None,
        "num_both": len(both),
        "num_timed": len(timed["methods"]["backprop"]["seed"]),
        "plain": plain,
        "published": published,
        "num_published": len(timed["published_seconds"]),
        "speedup": published / methods["forward"]["step"].estimate,
        "quoted": quoted,
        "moves": min(float(m["train_fall"].estimate) for m in methods.values()) >= BARELY,
        "comparisons": _comparisons(quoted, ratios, threshold is None),
    }


def _method(record: Record) -> dict[str, Any]:
    def over_seeds(value: Callable[[Any], float]) -> Interval:
        values = [value(run) for run in record.runs]
        return median_interval([v if math.isfinite(v) else math.inf for v in values])

    num_test = record.num_test
    return {
        "ended": dict(Counter(run.status for run in record.runs).most_common()),
        "strayed": [run for run in record.runs if run.status in ("diverged", "not reached")],
        "iterations": median_interval(iterations(record)),
        "train_loss_start": over_seeds(lambda run: run.train_loss[0]),
        "train_loss": over_seeds(lambda run: run.train_loss[-1]),
        "train_fall": over_seeds(lambda run: 100 * (1 - run.train_loss[-1] / run.train_loss[0])),
        "test_loss_start": over_seeds(lambda run: run.test_loss[0]),
        "test_loss": over_seeds(lambda run: run.test_loss[-1]),
        "accuracy_start": over_seeds(lambda run: 100 * (1 - run.test_errors[0] / num_test)),
        "accuracy": over_seeds(lambda run: 100 * (1 - run.end(num_test)[1] / num_test)),
        "errors": over_seeds(lambda run: run.end(num_test)[1]),
    }


def _settings(pair: dict[str, Record]) -> dict[str, Any]:
    """Return the parameters of the two notebooks without the seeds; both values where they differ."""
    backprop, forward = (pair[method].parameters for method in METHODS)
    skipped = ("seed", "num_seeds", "device")
    used = {name: value for name, value in forward.items() if name not in skipped and value is not None}
    if forward.get("num_iterations") and forward.get("threshold") is None:
        used.pop("max_iterations", None)  # not used without a threshold
    differ = {name for name in used if name in backprop and backprop[name] != used[name]}
    return {name: f"{backprop[name]} and {value}" if name in differ else value for name, value in used.items()}


def _comparisons(quoted: dict[str, Any], ratios: dict[str, Any], fixed: bool) -> list[dict[str, Any]]:
    """Return the published ratio of each quantity, ours, and whether both point the same way."""
    found = []
    for name, key in (("iterations", "iterations"), ("step", "step_seconds"), ("total", "total_seconds")):
        if name == "iterations" and fixed:
            continue
        ratio, published = ratios[name], quoted["forward"][key] / quoted["backprop"][key]
        ours, theirs = relation(ratio), "more" if published > 1 else "less"
        verdict = ours if ours in ("same", "unclear") else "agrees" if ours == theirs else "contradicts"
        found.append({"quantity": name, "published": published, "ours": ratio, "verdict": verdict})
    return found
