"""``python -m report``: run the notebooks, take the times, draw the figures, write the pages."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import tomllib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from fwdlib.runs.places import Place

# The rest is imported where it is used: help must not wait for torch.
HERE = Path(__file__).parent
ROOT = HERE.parent
NOTEBOOKS, PLAN = ROOT / "notebooks", HERE / "batches.toml"
PROG = "python -m report"


class BuildError(Exception):
    """The report cannot be made; the text says why and what to do."""


@dataclass
class Build:
    """Regenerate the report from the six notebooks: results, figures, report.html and report.pdf.

    FWDLIB_DATA names a folder with data sets; without one they are downloaded, or substitutes take their place.
    """

    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """How many notebooks run at once. The times are taken afterwards, one after the other. (default: 2; with
    --scheduler as many as the cluster has threads)"""
    scheduler: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """Run the notebooks on a Dask cluster: the address of its scheduler, tcp://HOST:PORT or tls://HOST:PORT. Its
    workers need this same fwdlib, with the extra `cluster`, and the same data. The times are taken here all the same.
    (default: here)"""
    resume: bool = True
    """Keep the results of earlier builds whose notebook, parameters, fwdlib and data are still the same."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 900
    """For each notebook."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = HERE
    """Where results/, figures/, executed/, report.html and report.pdf go."""
    only_render: tyro.conf.FlagCreatePairsOff[bool] = False
    """Draw and write again from the results that are there; run nothing."""

    def run(self) -> None:
        """Build the report.

        Raises:
            BuildError: if a notebook fails or a result is missing.
            OSError: if something cannot be read or written, or the cluster cannot be reached or is gone.
            ValueError: if a setting is not usable.
        """
        start = time.monotonic()
        self.output = self.output.expanduser().resolve()
        if not self.only_render:
            plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
            data = self._load_data()
            self._run_notebooks(plan["notebooks"], data)
            self._take_times(plan["timings"], data)
        say("rendering")
        from report.page import context as page_context
        from report.page import render

        pages = render.render(page_context.load(self.output / "results"), self.output)
        say(f"report   {time.monotonic() - start:.0f} s in all")
        print(*pages, sep="\n")

    def _load_data(self) -> str:
        """Load the data once, say where it is from, and return what it depends on as one text."""
        from fwdlib.archives import found_no_network
        from fwdlib.data import describe, load_kmnist, load_penguins

        found = [load_penguins(), load_kmnist()]
        if found_no_network():
            os.environ["FWDLIB_OFFLINE"] = "1"  # the notebooks' processes need not find out again
        for dataset in found:
            first, second, *_ = describe(dataset).splitlines()
            is_real = dataset.source.substitute_for is None
            say(f"data     {first}" if is_real else f"data     !!! {first}\n         !!! {second}")
        return ", ".join(f"{dataset.source.name} {dataset.source.fingerprint}" for dataset in found)

    def _run_notebooks(self, notebooks: dict[str, dict[str, Any]], data: str) -> None:
        from fwdlib.runs.batch import run_batch
        from fwdlib.runs.declarations import jobs_of
        from fwdlib.runs.jobs import failures

        with self._place() as place:
            outcomes = run_batch(
                jobs_of(notebooks, NOTEBOOKS),
                results=self.output / "results",
                executed=self.output / "executed",
                num_jobs=self.jobs,
                resume=self.resume,
                timeout=self.timeout,
                fingerprint=data,
                place=place,
            )
        if failed := failures(outcomes):
            raise BuildError(failed)

    def _place(self) -> AbstractContextManager[Place | None]:
        if self.scheduler is None:
            return nullcontext()
        from fwdlib.runs.cluster import Cluster

        return Cluster(self.scheduler)

    def _take_times(self, pairs: dict[str, int], data: str) -> None:
        """Measure both methods on every model, one after the other, unless what is there is still valid."""
        from fwdlib import runtime
        from fwdlib.results import load_run, write_json
        from report.page.context import TASKS, TIMINGS

        path, stamp = self.output / "results" / TIMINGS, self.output / "executed" / TIMINGS
        settings = {key: load_run(path.with_name(f"{task.forward}.json")).parameters for key, task in TASKS.items()}
        num_rounds = 1 if runtime.is_quick() else 5
        if runtime.is_quick():
            pairs = dict.fromkeys(pairs, 1)
        print_ = fingerprint({"pairs": pairs, "settings": settings, "data": data, "versions": runtime.versions()})
        if self.resume and _read(stamp) == {"fingerprint": print_, "result": sha256(path)}:
            say("reused   timings")
            return
        say("started  timings, with nothing beside them")
        from report.studies.timings import measure

        start, found = time.monotonic(), {}
        for key, num_seeds in pairs.items():
            measured = measure({key: settings[key]}, num_seeds=num_seeds, num_rounds=num_rounds)
            measured["tasks"] = found.get("tasks", {}) | measured["tasks"]
            found = measured
        stamp.unlink(missing_ok=True)  # from here on nothing counts until the new one is there
        write_json(path, found)
        write_json(stamp, {"fingerprint": print_, "result": sha256(path)})
        say(f"done     timings in {time.monotonic() - start:.1f} s")


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def sha256(path: Path) -> str:
    """Return the hash of a file, empty if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def fingerprint(settings: dict[str, Any]) -> str:
    """Return a hash of the settings and of all code that the times depend on."""
    sources = [
        *sorted((ROOT / "fwdlib").rglob("*.py")),
        HERE / "studies" / "timings.py",
        HERE / "studies" / "published_code.py",
    ]
    content = {"settings": settings, "sources": {path.relative_to(ROOT).as_posix(): sha256(path) for path in sources}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(stamp: Path) -> Any:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):  # none there, or a damaged one
        return None


def main(args: list[str] | None = None) -> int:
    """Build the report and return the exit code: 0; 1 with a message; 130 when interrupted.

    Args:
        args: the words after ``python -m report``; default: those this process was started with.

    Raises:
        SystemExit: after printing help (code 0), or if the words make no command (code 2).
    """
    build = tyro.cli(Build, args=args, prog=PROG)
    try:
        build.run()
        return 0
    except KeyboardInterrupt:
        say(f"\n{PROG}: stopped. What was finished is kept; the same command goes on from there.")
        return 130
    except Exception as error:
        from fwdlib.archives import DamagedFileError

        if not isinstance(error, (BuildError, OSError, ValueError, DamagedFileError)):
            raise
        ours = isinstance(error, OSError) and error.strerror and error.filename is None  # its strerror says it all
        say(f"\n{PROG}: {error.strerror if ours else error}")
    old = build.output / "report.html"
    say(f"No report was made.{f' {old} is from an earlier build.' if old.is_file() else ''}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
