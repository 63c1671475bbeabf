"""What the tests of several modules of runs share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fwdlib.data import Source
from fwdlib.history import History, Run
from fwdlib.results import save_run
from fwdlib.runs.jobs import Job, Outcome


@pytest.fixture(scope="session")
def outcome_of() -> Callable[..., Outcome]:
    """Return the function that makes the outcome of a job."""
    return _outcome_of


def _outcome_of(folder: Path, name: str = "1b_line", *, given=None, recorded=None, runs=None, **changes) -> Outcome:
    """Return a job that succeeded and left a record, a text and a JSON file of another kind."""
    runs = runs or [Run(0, "reached", 2, [1.5, 0.25], [1.5, 0.5], [20, 5]), Run(1, "diverged", 1, [math.nan], [], [])]
    alone = Run(0, "reached", 2, [1.5, 0.25], [1.5, 0.5], [20, 5], [0.1, 0.4, 0.2])
    history, first = History(runs, [{}] * len(runs), 40, len(runs), 1.0), History([alone], [{}], 40, 1, 0.5)
    source = Source("digits", "a test", "KMNIST", "0123", "CC0 1.0", "nobody", 0)
    content = {"history": history, "alone": first, "parameters": recorded or {"seed": 0, "learning_rate": 0.123457}}
    record = save_run(name, title="forward gradient", source=source, folder=folder, **content | changes)
    (folder / "notes.txt").write_text("not a record")
    (folder / "other.json").write_text("{}")
    job = Job(folder / f"{name}.ipynb", given or {}, f"{name}-x")
    return Outcome(job, "done", 1.0, folder / "copy.ipynb", (folder / "notes.txt", folder / "other.json", record))
