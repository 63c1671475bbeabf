"""Where the jobs of a batch run. This machine is one place, a Dask cluster another (:mod:`fwdlib.runs.cluster`).

Wherever a job runs, its files end up in one folder here, and are collected here by the same rules.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import nbformat
from tqdm import tqdm

from fwdlib import children
from fwdlib.locks import temporary_folder
from fwdlib.runs import notebook, stamps
from fwdlib.runs.jobs import Job, Outcome

STAGGER = 0.5  # seconds between the starts of two kernels, so that they seldom race for ports
BAR = "{desc}: cell {n_fmt} of {total_fmt} |{bar:20}| {elapsed}"


class PlaceError(OSError):
    """The jobs cannot go on where they run; the text says why, and what to do."""


class Place(Protocol):
    """Where jobs run: :class:`Here`, or a :class:`fwdlib.runs.cluster.Cluster`."""

    num_jobs: int | None
    """How many run at once by default; None for a place that has a queue of its own."""
    stagger: float
    """Seconds between two starts."""
    news: deque[str]
    """Lines for the user; whoever shows one takes it out."""

    def start(self, job: Job, results: Path, timeout: float, one_thread: bool, slot: int, progress: bool) -> RunningJob:
        """Start a job."""

    def check(self) -> None:
        """Raise :class:`PlaceError` if the place is gone."""


RUNNING = "running"  # begins the name of a job's folder


class RunningJob:
    """A job that runs: its folder fills, and is collected when the notebook has ended."""

    status: int | None = None  # that the process ended with
    is_lost = False  # with the machine that it was on

    def __init__(self, job: Job, results: Path, timeout: float, slot: int) -> None:
        self.job, self.timeout, self.slot, self.begun, self.where = job, timeout, slot, time.monotonic(), ""
        # papermill inserts a cell for the parameters
        self.num_cells = len(nbformat.read(job.notebook, 4).cells) + bool(job.parameters)
        # Inside the folder of the results, so that a result moves in one step: it is there whole or not at all.
        self._held = ExitStack()
        self.folder = self._held.enter_context(temporary_folder(results, RUNNING, job.name))
        self.staging = self.folder / "results"

    def has_ended(self) -> bool:
        """Tell whether the notebook has ended and all its files are in the folder."""
        raise NotImplementedError

    def collect(self, fingerprint: str, results: Path, executed: Path, owners: dict[Path, str]) -> Outcome:
        """Move the files to their final places.

        Args:
            fingerprint: of the job, for the stamp.
            results: folder for result files.
            executed: folder for executed copies and stamps.
            owners: the names of the jobs that result files already belong to.

        Raises:
            OSError: if a file cannot be written.
        """
        name, seconds, home = self.job.name, time.monotonic() - self.begun, self.job.results_in(results)
        files = [path for path in sorted(self.staging.rglob("*")) if path.is_file()]
        targets = [home / path.relative_to(self.staging) for path in files]
        error = self._error() or _conflict(targets, owners)
        stamp, failed = executed / f"{name}.json", executed / "failed" / f"{name}.ipynb"
        stamp.unlink(missing_ok=True)  # from here on, nothing counts until the new stamp is there
        failed.unlink(missing_ok=True)
        if error:
            self._keep_copy(failed, home)
            return Outcome(self.job, "lost" if self.is_lost else "failed", seconds, failed, (), error)
        for path, target in zip(files, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        copy = executed / f"{name}.ipynb"
        self._keep_copy(copy, home)
        stamps.write(stamp, fingerprint, seconds, results, targets)
        return Outcome(self.job, "done", seconds, copy, tuple(targets))

    def _error(self) -> str:
        verdict = self.folder / "error.txt"
        if verdict.is_file():
            return verdict.read_text(encoding="utf-8")
        last = (self.folder / "log.txt").read_text(errors="replace").strip().rpartition("\n")[2]
        return f"its process ended with status {self.status}: {last}"

    def _keep_copy(self, copy: Path, home: Path) -> None:
        draft = self.folder / "copy.ipynb"
        if draft.is_file():
            from fwdlib.results import write_text

            write_text(copy, replace_paths(draft, {draft: copy, self.staging: home}))

    def remove(self) -> None:
        """End the notebook if it has not ended, and remove the folder."""
        notebook.discard(self.folder)
        self._held.close()


def replace_paths(path: Path, new: dict[Path | str, Path]) -> str:
    """Return the text of a notebook in which paths are replaced by others: new by old, in this order."""
    text = path.read_text(encoding="utf-8")
    for pair in new.items():
        text = text.replace(*(json.dumps(str(path), ensure_ascii=False)[1:-1] for path in pair))
    return text


def _conflict(targets: list[Path], owners: dict[Path, str]) -> str:
    taken = [f"{target.name}, a result of {owners[target]}" for target in targets if target in owners]
    return f"it wrote {', '.join(taken)} in this same batch; give the two jobs different file names" if taken else ""


class Here:
    """This machine, as the place where a batch runs."""

    num_jobs, stagger = 2, STAGGER

    def __init__(self) -> None:
        self.news: deque[str] = deque()

    def start(self, job: Job, results: Path, timeout: float, one_thread: bool, slot: int, progress: bool) -> RunningJob:
        """Start a process for the job."""
        started = LocalJob(job, results, timeout, one_thread, slot, progress)
        self.news.append(f"started  {job.name} ({started.num_cells} cells)")
        return started

    def check(self) -> None:
        """Do nothing: this machine is always there."""


class LocalJob(RunningJob):
    """A job in a process on this machine, with a progress bar."""

    def __init__(self, job: Job, results: Path, timeout: float, one_thread: bool, slot: int, progress: bool) -> None:
        super().__init__(job, results, timeout, slot)
        self.process = notebook.start(self.folder, job.notebook, job.parameters, timeout, one_thread)
        hidden = not (progress and sys.stderr.isatty())
        bar = {"position": slot + 1, "leave": False, "disable": hidden, "bar_format": BAR}
        self.bar = tqdm(desc=job.name, total=self.num_cells, **bar)

    def has_ended(self) -> bool:
        """Tell whether the process has ended; if not, update its bar."""
        if not self.bar.disable and (self.folder / "cell.txt").exists():
            self.bar.n = int((self.folder / "cell.txt").read_text() or 0) + 1  # empty while it is being written
            self.bar.refresh()
        self.status = self.process.poll()
        if self.status is None:
            notebook.end_overdue(self.process, self.folder, self.timeout, self.begun)
        return self.status is not None

    def remove(self) -> None:
        """End the process and its kernel if they still run, and remove the folder."""
        children.end(self.process)
        self.bar.close()
        super().remove()
