"""Notebooks x parameters through papermill: each in a process of its own, resumable, nothing half-written.

One loop starts, watches and collects the workers; it needs no threads, because all that passes between it and a worker
lies in the worker's folder. A worker holds the read end of a pipe whose write end only this process has. When the pipe
closes - we closed it, or we are dead, by whatever signal - the worker ends its kernel, removes its folder and exits.

Where the workers are is up to a :class:`Place`: here, or on a cluster (:mod:`fwdlib.runs.cluster`). What they leave is
collected here in either case, so that the rules of results, stamps and resuming are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import nbformat
import papermill
import psutil
from papermill.exceptions import PapermillExecutionError, strip_color
from tqdm import tqdm

from fwdlib.checks import check_count, check_positive
from fwdlib.runs.parameters import check_parameter, defaults_of

# results and runtime are imported where they are used: a worker has no use for the two seconds that torch takes.
START_RETRIES = 2  # kernels that start at the same time can race for ports
STAGGER = 0.5  # seconds between two starts, to make that rare
JOBS_BAR = "{n_fmt} of {total_fmt} jobs |{bar:20}| {elapsed}"
BAR = "{desc}: cell {n_fmt} of {total_fmt} |{bar:20}| {elapsed}"


@dataclass(frozen=True)
class Job:
    """One run of ``notebook``; ``name`` (default: the notebook's, without ``.ipynb``) names its outputs.

    A notebook calls its record the same in each run, so a job that has a name of its own has a folder for its results.
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
    status: str  # "done", "reused", "failed", or "lost": the notebook did nothing wrong, but its workers died
    seconds: float  # in this batch, with the start of the kernel; 0 when reused
    executed: Path  # of a failure: apart, in failed/, and not there when the kernel did not start
    results: tuple[Path, ...]
    error: str = ""  # of a failure: "cell 7: ValueError: ... (in: first line)", counted as in the executed copy

    @property
    def cause(self) -> str:
        """The error in a word or two, to count by: the notebook's exception, or what befell its process."""
        raised = re.match(r"cell \S+: (\w+)", self.error)
        return raised[1] if raised else re.split("[:,;]", self.error)[0]


class PlaceError(OSError):
    """Where the jobs ran they cannot run on; the text says why, and what to do."""


class Place(Protocol):
    """Where jobs run: :class:`Here`, or on a :class:`fwdlib.runs.cluster.Cluster`."""

    num_jobs: int | None  # that run at once when nobody asks for another number; None: it has a queue of its own
    stagger: float  # seconds between two starts
    news: deque[str]  # lines for the user, to be taken away

    def start(self, job: Job, results: Path, timeout: float, one_thread: bool, slot: int, progress: bool) -> Worker:
        """Have a job run."""

    def check(self) -> None:
        """Raise :class:`PlaceError` if it is gone."""


def run_batch(
    jobs: list[Job],
    *,
    results: Path,
    executed: Path,
    num_jobs: int | None = None,
    resume: bool = True,
    timeout: float = 600,
    fingerprint: str = "",
    progress: bool = True,
    place: Place | None = None,
) -> list[Outcome]:
    """Run every job, and keep the results of those that succeed.

    A notebook finds an empty folder in ``FWDLIB_RESULTS``. Once it has succeeded, what it put there moves to
    ``results`` (see :class:`Job`), the executed copy to ``executed/<name>.ipynb``, and last of all a stamp to
    ``executed/<name>.json``: without it nothing counts as a result of this job. A failure moves no result and removes
    the stamp; older result files stay, but no later build takes them for its own. Times taken with ``num_jobs`` above 1
    are not timings.

    Args:
        jobs: what to run.
        results: folder for result files.
        executed: folder for executed copies and stamps.
        num_jobs: how many run at once; above 1, each is held to one thread. Default: 2 here, and as many as a cluster
            has threads for.
        resume: keep what an earlier batch made if its stamp fits: same cells and tags, parameters, fwdlib, versions of
            Python and torch, quick mode and ``fingerprint``, and result files of the stamped content.
        timeout: seconds for a whole notebook, the start of its kernel included.
        fingerprint: stands for whatever else the results depend on, such as the data.
        progress: show a bar of jobs, one per notebook that runs here (in a terminal), and a line per start and end, on
            stderr.
        place: where they run; default: here.

    Returns:
        One outcome per job, in the order of the jobs.

    Raises:
        FileNotFoundError: if a notebook does not exist; before anything runs.
        ValueError: if a notebook, its parameters or a name is not usable; before anything runs.
        OSError: if results cannot be written.
        PlaceError: if the place is gone. What was finished is kept.
    """
    if num_jobs is not None:
        check_count("num_jobs", num_jobs)
    check_positive("timeout", timeout)
    _check_jobs(jobs)
    results, executed = Path(results).resolve(), Path(executed).resolve()
    results.mkdir(parents=True, exist_ok=True)
    for folder in results.glob(".running-*-*"):  # left over when a batch and its workers died at the same moment
        if not psutil.pid_exists(int(folder.name.split("-")[1])):
            shutil.rmtree(folder, ignore_errors=True)

    say = partial(tqdm.write, file=sys.stderr if progress else io.StringIO())  # goes above the bars
    hidden = not (progress and sys.stderr.isatty())
    prints = _fingerprints(jobs, fingerprint)
    outcomes = _finished(jobs, prints, results, executed) if resume else {}
    for name in outcomes:
        say(f"reused   {name}")

    place = place or Here()
    room = num_jobs or place.num_jobs or max(1, len(jobs))
    waiting, next_start = [job for job in jobs if job.name not in outcomes], 0.0
    workers: list[Worker] = []
    bar = tqdm(total=len(jobs), initial=len(outcomes), leave=False, disable=hidden, bar_format=JOBS_BAR)
    try:
        while waiting or workers:
            place.check()
            while waiting and len(workers) < room and time.monotonic() >= next_start:
                slot = min(set(range(room)) - {worker.slot for worker in workers})
                workers.append(place.start(waiting.pop(0), results, timeout, room > 1, slot, progress))
                next_start = time.monotonic() + place.stagger
            while place.news:
                say(place.news.popleft())
            for worker in [worker for worker in workers if worker.has_ended()]:
                name = worker.job.name
                owners = {path: other for other, outcome in outcomes.items() for path in outcome.results}
                end = outcomes[name] = worker.collect(prints[name], results, executed, owners)
                worker.remove()
                workers.remove(worker)
                done = f"done     {name} in {end.seconds:.1f} s{worker.where}"
                say(f"{end.status.upper():<9}{name}{worker.where}: {end.error}" if end.error else done)
                bar.update()
            time.sleep(0.1)
    finally:  # there are some left after Ctrl-C, or when a folder cannot be written
        bar.close()
        for worker in workers:
            worker.remove()
    return [outcomes[job.name] for job in jobs]


def finished(jobs: list[Job], *, results: Path, executed: Path, fingerprint: str = "") -> list[Outcome]:
    """Return the jobs that :func:`run_batch` with the same arguments would reuse instead of running them.

    Args:
        jobs: of a batch.
        results: folder for result files.
        executed: folder for executed copies and stamps.
        fingerprint: of the batch.

    Raises:
        FileNotFoundError: if a notebook does not exist.
        ValueError: if a notebook, its parameters or a name is not usable.
    """
    _check_jobs(jobs)
    prints = _fingerprints(jobs, fingerprint)
    return list(_finished(jobs, prints, Path(results).resolve(), Path(executed).resolve()).values())


def failures(outcomes: list[Outcome]) -> str:
    """Return what failed and why, with notebook, cell, parameters and executed copy, then how many of each cause.

    It is empty if nothing failed.

    Args:
        outcomes: of a batch.
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


def _check_jobs(jobs: list[Job]) -> None:
    names = [job.name for job in jobs]
    defaults: dict[Path, dict[str, Any]] = {}
    for job in jobs:
        if Path(job.name).name != job.name or job.name.startswith(".") or names.count(job.name) > 1:
            raise ValueError(f"each job needs a file name of its own: {job.name!r} is no such name, or given twice")
        if not job.notebook.is_file():
            raise FileNotFoundError(f"job {job.name!r}: there is no notebook at {job.notebook}")
        known = defaults[job.notebook] = defaults.get(job.notebook) or defaults_of(job.notebook)
        for name, value in job.parameters.items():
            check_parameter(job.notebook, known, name, value)


def sources() -> dict[str, str]:
    """Return the hash of each file of fwdlib that a result can depend on, by its path in the package."""
    package = Path(__file__).parents[1]
    paths = sorted(path for pattern in ("*.py", "*.mplstyle") for path in package.rglob(pattern))
    return {path.relative_to(package).as_posix(): _sha256(path) for path in paths}


def _fingerprints(jobs: list[Job], extra: str) -> dict[str, str]:
    from fwdlib import runtime

    versions = runtime.versions()
    content = {
        "fwdlib": sources(),
        "versions": [versions[name] for name in ("python", "torch")],
        "quick": runtime.is_quick(),
        "extra": extra,
    }
    return {job.name: _fingerprint(job, content) for job in jobs}


def _fingerprint(job: Job, content: dict[str, Any]) -> str:
    cells = nbformat.read(job.notebook, 4).cells  # not their outputs: running a notebook does not make it another
    content = content | {
        "cells": [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells],
        "parameters": job.parameters,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finished(jobs: list[Job], prints: dict[str, str], results: Path, executed: Path) -> dict[str, Outcome]:
    kept = [(job, _reusable(job, prints[job.name], results, executed)) for job in jobs]
    return {
        job.name: Outcome(job, "reused", 0.0, executed / f"{job.name}.ipynb", files)
        for job, files in kept
        if files is not None
    }


def _reusable(job: Job, fingerprint: str, results: Path, executed: Path) -> tuple[Path, ...] | None:
    try:
        stamp = json.loads((executed / f"{job.name}.json").read_text())
        fits = stamp["fingerprint"] == fingerprint and (executed / f"{job.name}.ipynb").is_file()
        fits = fits and all(_sha256(results / name) == digest for name, digest in stamp["results"].items())
        return tuple(results / name for name in stamp["results"]) if fits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no stamp, a damaged one, a result that is gone
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Here:
    """This machine, as the place where a batch runs."""

    num_jobs, stagger = 2, STAGGER

    def __init__(self) -> None:
        self.news: deque[str] = deque()

    def start(self, job: Job, results: Path, timeout: float, one_thread: bool, slot: int, progress: bool) -> Worker:
        """Start a process for the job."""
        worker = _Worker(job, results, timeout, one_thread, slot, progress)
        self.news.append(f"started  {job.name} ({worker.num_cells} cells)")
        return worker

    def check(self) -> None:
        """This machine is always there."""


class Worker:
    """A run of one notebook, seen from the batch: somewhere a folder fills, and is collected when the run has ended."""

    status: int | None = None  # that the process ended with
    is_lost = False  # with the machine that it was on

    def __init__(self, job: Job, results: Path, slot: int) -> None:
        self.job, self.slot, self.start, self.where = job, slot, time.monotonic(), ""
        self.num_cells = len(nbformat.read(job.notebook, 4).cells) + bool(job.parameters)  # papermill puts one in
        # In the folder of the results, so that a result is moved in one step: it is there whole or not at all.
        self.folder = Path(tempfile.mkdtemp(prefix=f".running-{os.getpid()}-{job.name}-", dir=results))
        self.staging = self.folder / "results"

    def has_ended(self) -> bool:
        """Tell whether the run is over and all that it left is in the folder."""
        raise NotImplementedError

    def collect(self, fingerprint: str, results: Path, executed: Path, owners: dict[Path, str]) -> Outcome:
        """Move what the ended process has left into place; ``owners`` tells whose result a file already is."""
        from fwdlib.results import write_json, write_text

        name, seconds, verdict = self.job.name, time.monotonic() - self.start, self.folder / "error.txt"
        last = (self.folder / "log.txt").read_text(errors="replace").strip().rpartition("\n")[2]
        killed = f"its process ended with status {self.status}: {last}"
        error = verdict.read_text(encoding="utf-8") if verdict.is_file() else killed
        staged = [path for path in sorted(self.staging.rglob("*")) if path.is_file()]
        home = self.job.results_in(results)
        targets = {path: home / path.relative_to(self.staging) for path in staged}
        taken = [f"{target.name}, a result of {owners[target]}" for target in targets.values() if target in owners]
        if taken and not error:
            error = f"it wrote {', '.join(taken)} in this same batch; give the two jobs different file names"
        # From here on, nothing in place counts until the new stamp is there.
        stamp, failed = executed / f"{name}.json", executed / "failed" / f"{name}.ipynb"
        stamp.unlink(missing_ok=True)
        failed.unlink(missing_ok=True)
        for path, target in {} if error else targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        copy, draft = failed if error else executed / f"{name}.ipynb", self.folder / "copy.ipynb"
        if draft.is_file():
            text = draft.read_text(encoding="utf-8")
            for old, new in ((draft, copy), (self.staging, home)):  # the copy names files where they are from now on
                text = text.replace(*(json.dumps(str(path), ensure_ascii=False)[1:-1] for path in (old, new)))
            write_text(copy, text)
        if error:
            return Outcome(self.job, "lost" if self.is_lost else "failed", seconds, copy, (), error)
        digests = {target.relative_to(results).as_posix(): _sha256(target) for target in targets.values()}
        write_json(stamp, {"fingerprint": fingerprint, "seconds": seconds, "results": digests})
        return Outcome(self.job, "done", seconds, copy, tuple(targets.values()))

    def remove(self) -> None:
        """End the run if it has not ended, and remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


class _Worker(Worker):
    """A process on this machine."""

    def __init__(self, job: Job, results: Path, timeout: float, one_thread: bool, slot: int, progress: bool) -> None:
        super().__init__(job, results, slot)
        self.process = start_process(self.folder, job.notebook, job.parameters, timeout, one_thread)
        hidden = not (progress and sys.stderr.isatty())
        bar = {"position": slot + 1, "leave": False, "disable": hidden, "bar_format": BAR}
        self.bar = tqdm(desc=job.name, total=self.num_cells, **bar)

    def has_ended(self) -> bool:
        """Tell whether the process has ended; if not, move its bar."""
        if not self.bar.disable and (self.folder / "cell.txt").exists():
            self.bar.n = int((self.folder / "cell.txt").read_text() or 0) + 1  # empty while it is being written
            self.bar.refresh()
        self.status = self.process.poll()
        return self.status is not None

    def remove(self) -> None:
        """End the process and its kernel if they are still there, and remove the folder."""
        end_process(self.process)
        self.bar.close()
        super().remove()


def start_process(
    folder: Path,
    notebook: Path,
    parameters: dict[str, Any],
    timeout: float,
    one_thread: bool,
    variables: dict[str, str] | None = None,
) -> subprocess.Popen:
    """Start the process that runs a notebook; all that it leaves will be in ``folder``.

    That is ``results/``, the executed ``copy.ipynb``, ``log.txt``, and at the end ``error.txt``, empty after a success.
    It ends with :func:`end_process`, or with this process.

    Args:
        folder: an empty one.
        notebook: to run.
        parameters: of the notebook.
        timeout: seconds, the start of the kernel included.
        one_thread: hold it to one thread.
        variables: for its environment, beside those of this process.
    """
    for name in ("results", "cwd", "runtime", "ipython"):
        (folder / name).mkdir()
    order = json.dumps({"notebook": str(notebook), "parameters": parameters, "timeout": timeout})
    command = [sys.executable, "-m", "fwdlib.runs.batch", str(folder), order]
    with (folder / "log.txt").open("w") as log:
        streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
        cwd, env = folder / "cwd", _environment(folder, one_thread) | (variables or {})  # cwd is empty: nothing found
        # In a session of its own, so that Ctrl-C reaches the batch alone, which then ends its workers.
        return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **streams)


def end_process(process: subprocess.Popen) -> None:
    """End a process of :func:`start_process`, and its kernel, if they are still there.

    Args:
        process: to end.
    """
    process.stdin.close()
    process.wait()


def _environment(folder: Path, one_thread: bool) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # the kernel knows its own
    for name in ("FWDLIB_DATA", "FWDLIB_CACHE"):
        if env.get(name):
            env[name] = str(Path(env[name]).expanduser().resolve())  # the kernel's working folder is another
    env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if one_thread else {}
    env |= {"JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "IPYTHONDIR": str(folder / "ipython")}
    # The kernel "python3" is this Python, not what the user's home calls so.
    return env | {"JUPYTER_PREFER_ENV_PATH": "1", "FWDLIB_RESULTS": str(folder / "results"), "PYTHONHASHSEED": "0"}


def _work(folder: Path, order: str) -> None:
    # The worker's side: runs in a process of its own, as `python -m fwdlib.runs.batch <folder> <order>`.
    tempfile.tempdir = str(folder)  # jupyter_client puts the kernel's connection file there
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    try:
        _execute(folder, **json.loads(order))
        error = ""
    except PapermillExecutionError as stop:
        first = stop.source.strip().partition("\n")[0]
        error = strip_color(f"cell {stop.exec_count}: {stop.ename}: {stop.evalue} (in: {first})")
    except Exception as stop:
        error = f"the notebook did not start: {type(stop).__name__}: {stop}"
    (folder / "error.part").write_text(error, encoding="utf-8")
    (folder / "error.part").replace(folder / "error.txt")  # its presence says that the run came to its end


def _end_with_parent(folder: Path) -> None:
    os.read(0, 1)  # returns when the batch closes the pipe or dies; sys.stdin would be locked at our own exit
    kernels = psutil.Process().children(recursive=True)
    for kernel in kernels:
        kernel.kill()
    psutil.wait_procs(kernels, timeout=3)  # so that none of them writes into the folder again
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _execute(folder: Path, notebook: str, parameters: dict[str, Any], timeout: float) -> None:
    copy, progress, deadline = str(folder / "copy.ipynb"), folder / "cell.txt", time.monotonic() + timeout
    options = {
        "kernel_name": "python3",
        "language": "python",
        "progress_bar": False,
        "on_cell_execute": lambda cell_index, **_: progress.write_text(str(cell_index)),
        "timeout_func": lambda _: max(0.1, deadline - time.monotonic()),  # 0 would mean no limit
        "iopub_timeout": 60,  # nbclient's 4 s for a cell's last output are short on a busy machine
    }
    for retries_left in reversed(range(1 + START_RETRIES)):
        try:
            papermill.execute_notebook(notebook, copy, parameters, **options)
            return
        except Exception as stop:
            if progress.exists() and not isinstance(stop, PapermillExecutionError):
                # A time-out or a dead kernel: papermill marks the copy only once the cell shows an error.
                late = f"the notebook took longer than {timeout:g} s" if time.monotonic() >= deadline else ""
                error = {"ename": type(stop).__name__, "evalue": late or str(stop).partition("\n")[0], "traceback": []}
                draft, index = nbformat.read(copy, 4), int(progress.read_text())
                draft.cells[index].outputs.insert(0, nbformat.v4.new_output("error", **error))
                draft.cells[index].execution_count = sum(cell.cell_type == "code" for cell in draft.cells[: index + 1])
                papermill.execute.raise_for_execution_errors(draft, copy)
            if progress.exists() or not retries_left:
                raise
            time.sleep(1)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2])
