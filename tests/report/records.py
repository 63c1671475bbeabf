"""Small made-up records of the six notebooks, and what tests do with them."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

from fwdlib.history import Run
from fwdlib.models import CNN, MLP, LogisticRegression, num_parameters
from fwdlib.results import FORMAT, Record, load_run, write_json
from report.output import HIDDEN, hold
from report.page import render
from report.page.context import METHODS, TASKS, build_context, load_results

VERSIONS = {"python": "3.11.7", "torch": "2.15.0"}
MACHINE = {"versions": VERSIONS, "system": "Linux x86_64", "processor": "a CPU", "cores": 2, "threads": 1}
MODELS = {"logistic": LogisticRegression, "mlp": MLP, "cnn": CNN}


def make_run(seed: int, iterations: int, status: str = "reached") -> Run:
    losses = [2.0 - 1.7 * i / iterations for i in range(iterations + 1)]
    if status == "diverged":
        losses[-1] = math.nan
    errors = [40 - 33 * i // iterations for i in range(iterations + 1)]
    return Run(seed, status, iterations, losses, [loss + 0.02 for loss in losses], errors, [])


def make_results(folder: Path) -> Path:
    """Write the six records and the timings: seed s takes 30 + s steps with backprop, 33 + s with forward gradients."""
    timings = {"environment": {**MACHINE, "threads": 2}, "tasks": {}}
    for key, task in TASKS.items():
        data = "KMNIST" if key == "cnn" else "penguins/processed"
        source = {
            "name": data,
            "origin": "a shelf",
            "substitute_for": None,
            "fingerprint": f"of {data}",
            "licence": "CC0 1.0",
            "citation": "Someone (2020)",
            "split_seed": 0,
        }
        fixed = key == "cnn"
        parameters = {
            "seed": 0,
            "num_seeds": 8,
            "learning_rate": 0.2,
            "threshold": None if fixed else 0.3,
            "max_iterations": 77,
            "optimizer": "SGD",
            **({"num_iterations": 9} if fixed else {}),
        }
        blocks = {"num_tangents": 1, "tangents": "normal", "blocks": "joint" if fixed else "parameter"}
        timed = {}
        for method, title in METHODS.items():
            late = 3 * (method == "forward")
            runs = [make_run(s, *((9, "completed") if fixed else (30 + s + late, "reached"))) for s in range(8)]
            record = Record(
                name=getattr(task, method),
                title=title,
                parameters=parameters | (blocks if late else {}),
                source=source,
                num_test=84,
                num_params=num_parameters(MODELS[key]()),
                together=8,
                runs=runs,
                alone=runs[0],
                environment=MACHINE,
                quick=False,
            )
            save(record, folder)
            step = [(3e-3 if late else 1e-3) * (1 + s / 100) for s in range(8)]
            timed[title] = {
                "seed": list(range(8)),
                "status": [run.status for run in runs],
                "iterations": [run.iterations for run in runs],
                "step_seconds": step,
                "total_seconds": [s * run.iterations for s, run in zip(step, runs, strict=True)],
            }
        timings["tasks"][key] = {"plain_seconds": [5e-4] * 3, "published_seconds": [0.6] * 3, "methods": timed}
    write_json(folder / "timings.json", timings)
    return folder


def save(record: Record, folder: Path) -> None:
    write_json(folder / f"{record.name}.json", {"format": FORMAT, **copy.deepcopy(record.__dict__)} | {
        "runs": [run.__dict__ for run in record.runs], "alone": record.alone.__dict__
    })  # fmt: skip


def text_of(folder: Path) -> str:
    return render.markdown(build_context(load_results(folder)))


def draw(records: Path, folder: Path) -> Path:
    """Draw the page of some records into a folder, and return the folder."""
    with hold(folder) as output:
        render.render(load_results(records), output)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder, apart from those of its lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and HIDDEN not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def section(text: str, name: str) -> str:
    """Return one section of the Markdown, by its name in braces."""
    return re.search(rf"\{{#{name} ?\}}(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)[1]


def change(folder: Path, name: str, edit) -> None:
    record = load_run(folder / f"{name}.json")
    edit(record)
    save(record, folder)
