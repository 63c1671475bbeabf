"""Jobs, each one run of a notebook, and what became of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fwdlib.runs.parameters import check_parameter, defaults_of


@dataclass(frozen=True)
class Job:
    """One run of ``notebook``; ``name`` (default: the notebook's, without ``.ipynb``) names its outputs.

    A notebook gives its record the same file name in each run. So a job with another name than its notebook has a
    folder of its own for its results.
    """

    notebook: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "notebook", Path(self.notebook).resolve())
        object.__setattr__(self, "name", self.name or self.notebook.stem)

    def results_in(self, folder: Path) -> Path:
        """Return where in ``folder`` the results go: there, or to ``<name>/`` if the name is not the notebook's."""
        return folder if self.name == self.notebook.stem else folder / self.name


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    job: Job
    status: str
    """``"done"``, ``"reused"``, ``"failed"``, or ``"lost"``: the machines that ran it died."""
    seconds: float
    """In this batch, with the start of the kernel; 0 when reused."""
    executed: Path
    """The executed copy. After a failure it is in ``failed/``; it does not exist if the kernel did not start."""
    results: tuple[Path, ...]
    error: str = ""
    """Of a failure: ``"cell 7: ValueError: ... (in: first line)"``; cells are counted as in the executed copy."""

    @property
    def cause(self) -> str:
        """The error in a word or two, for counting: the notebook's exception, or what happened to its process."""
        raised = re.match(r"cell \S+: (\w+)", self.error)
        return raised[1] if raised else re.split("[:,;]", self.error)[0]


def check_jobs(jobs: list[Job]) -> None:
    """Check the names, notebooks and parameters of jobs.

    Raises:
        FileNotFoundError: if a notebook does not exist.
        ValueError: if a name is not a file name or is given twice; if a notebook or its parameters cannot be used.
    """
    names = [job.name for job in jobs]
    defaults: dict[Path, dict[str, Any]] = {}
    for job in jobs:
        if Path(job.name).name != job.name or job.name.startswith("."):
            raise ValueError(f"the name of a job must be a file name that does not start with a dot, got {job.name!r}")
        if names.count(job.name) > 1:
            raise ValueError(f"each job needs a name of its own, but {names.count(job.name)} are named {job.name!r}")
        if not job.notebook.is_file():
            raise FileNotFoundError(f"job {job.name!r}: there is no notebook at {job.notebook}")
        if job.notebook not in defaults:
            defaults[job.notebook] = defaults_of(job.notebook)
        for name, value in job.parameters.items():
            check_parameter(job.notebook, defaults[job.notebook], name, value)


def failures(outcomes: list[Outcome]) -> str:
    """Return a text of all failures with notebook, cell, parameters and executed copy, and a count of each cause.

    It is empty if nothing failed.
    """
    failed = [outcome for outcome in outcomes if outcome.error]
    lines = [f"{len(failed)} of {len(outcomes)} notebooks failed."] if failed else []
    for outcome in failed:
        lines.append(f"{outcome.job.notebook.name}, {outcome.error}")
        if given := outcome.job.parameters:
            lines.append(f"  parameters: {', '.join(f'{name}={value!r}' for name, value in given.items())}")
        without = "none" if outcome.status == "lost" else "none, its kernel did not start"
        lines.append(f"  executed copy: {outcome.executed if outcome.executed.is_file() else without}")
    if len(failed) > 1:
        causes = Counter(outcome.cause for outcome in failed).most_common()
        lines.append(f"By cause: {', '.join(f'{count} x {cause}' for cause, count in causes)}.")
    return "\n".join(lines)
