"""Notebooks x parameters through papermill: each in a process of its own, resumable, nothing half-written.

One loop starts the jobs, watches them and collects their results. It needs no threads: all that it exchanges with a job
lies in the job's folder.
"""

from __future__ import annotations

import io
import sys
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fwdlib.checks import check_count, check_positive
from fwdlib.locks import remove_leftovers
from fwdlib.runs import notebook, stamps
from fwdlib.runs.jobs import Job, Outcome, check_jobs
from fwdlib.runs.places import RUNNING, Here, Place, RunningJob

JOBS_BAR = "{n_fmt} of {total_fmt} jobs |{bar:20}| {elapsed}"


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

    A notebook finds an empty folder in ``FWDLIB_RESULTS``. Once it has succeeded, its files move from there to
    ``results`` (see :class:`Job`), the executed copy to ``executed/<name>.ipynb``, and last of all a stamp to
    ``executed/<name>.json``: without it nothing counts as a result of this job. A failure moves no result and removes
    the stamp; older result files stay, but no later batch reuses them. Times taken with ``num_jobs`` above 1 are not
    timings.

    Args:
        jobs: what to run.
        results: folder for result files.
        executed: folder for executed copies and stamps.
        num_jobs: how many run at once; above 1, each is held to one thread. Default: 2 here, and as many as a cluster
            has threads for.
        resume: reuse what an earlier batch made if its stamp is valid: see :func:`fwdlib.runs.stamps.fingerprints`.
        timeout: seconds for a whole notebook, the start of its kernel included.
        fingerprint: stands for whatever else the results depend on, such as the data.
        progress: show a bar of jobs, one per notebook that runs here (in a terminal), and a line per start and end, on
            stderr.
        place: where they run; default: here.

    Returns:
        One outcome per job, in the order of the jobs.

    Raises:
        FileNotFoundError: if a notebook does not exist; before anything runs.
        ValueError: if a notebook, its parameters or a name cannot be used; before anything runs.
        OSError: if results cannot be written.
        PlaceError: if the place is gone. What was finished is kept.
    """
    if num_jobs is not None:
        check_count("num_jobs", num_jobs)
    check_positive("timeout", timeout)
    check_jobs(jobs)
    results, executed = Path(results).resolve(), Path(executed).resolve()
    results.mkdir(parents=True, exist_ok=True)
    remove_leftovers(results, RUNNING, notebook.discard)

    say = partial(tqdm.write, file=sys.stderr if progress else io.StringIO())  # goes above the bars
    hidden = not (progress and sys.stderr.isatty())
    prints = stamps.fingerprints(jobs, fingerprint)
    outcomes = _reused(jobs, prints, results, executed) if resume else {}
    for name in outcomes:
        say(f"reused   {name}")

    place = place or Here()
    room = num_jobs or place.num_jobs or max(1, len(jobs))
    waiting, next_start = [job for job in jobs if job.name not in outcomes], 0.0
    running: list[RunningJob] = []
    bar = tqdm(total=len(jobs), initial=len(outcomes), leave=False, disable=hidden, bar_format=JOBS_BAR)
    try:
        while waiting or running:
            place.check()
            while waiting and len(running) < room and time.monotonic() >= next_start:
                slot = min(set(range(room)) - {each.slot for each in running})
                running.append(place.start(waiting.pop(0), results, timeout, room > 1, slot, progress))
                next_start = time.monotonic() + place.stagger
            while place.news:
                say(place.news.popleft())
            for ended in [each for each in running if each.has_ended()]:
                name = ended.job.name
                owners = {path: other for other, outcome in outcomes.items() for path in outcome.results}
                outcomes[name] = ended.collect(prints[name], results, executed, owners)
                ended.remove()
                running.remove(ended)
                say(_line(outcomes[name], ended.where))
                bar.update()
            time.sleep(0.1)
    finally:  # some still run after Ctrl-C, or when a folder cannot be written
        bar.close()
        for each in running:
            each.remove()
    return [outcomes[job.name] for job in jobs]


def finished(jobs: list[Job], *, results: Path, executed: Path, fingerprint: str = "") -> list[Outcome]:
    """Return the jobs that :func:`run_batch` with the same arguments would reuse instead of running them.

    Raises:
        FileNotFoundError: if a notebook does not exist.
        ValueError: if a notebook, its parameters or a name cannot be used.
    """
    check_jobs(jobs)
    prints = stamps.fingerprints(jobs, fingerprint)
    return list(_reused(jobs, prints, Path(results).resolve(), Path(executed).resolve()).values())


def _reused(jobs: list[Job], prints: dict[str, str], results: Path, executed: Path) -> dict[str, Outcome]:
    found = [(job, stamps.valid_results(job, prints[job.name], results, executed)) for job in jobs]
    return {
        job.name: Outcome(job, "reused", 0.0, executed / f"{job.name}.ipynb", files)
        for job, files in found
        if files is not None
    }


def _line(outcome: Outcome, where: str) -> str:
    if outcome.error:
        return f"{outcome.status.upper():<9}{outcome.job.name}{where}: {outcome.error}"
    return f"done     {outcome.job.name} in {outcome.seconds:.1f} s{where}"
