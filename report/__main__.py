"""``python -m report``: run the notebooks, take the times, draw the figures, write the pages."""

from __future__ import annotations

import hashlib
import json
import shutil
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
    from report.output import Output
    from report.page.context import Results

# Everything else is imported where it is used: help must not wait for torch.
HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS, BUILT = HERE / "results", ROOT / "build" / "report"
TIMED = [HERE / "studies" / name for name in ("timings.py", "published_code.py")]  # the code that takes the times
NOTEBOOKS, PLAN = ROOT / "notebooks", HERE / "batches.toml"
PROG = "python -m report"


class BuildError(Exception):
    """The report cannot be made; the text says why and what to do."""


@dataclass
class Build:
    """Make the report from the six notebooks: results, figures, report.html and report.pdf, in build/report.

    FWDLIB_DATA names a folder with data sets. Without it they are downloaded, or substitutes take their place.
    """

    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """How many notebooks run at once. The times are taken afterwards, with nothing else running. (default: 2; with
    --scheduler as many as the cluster has threads)"""
    scheduler: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """Run the notebooks on a Dask cluster: the address of its scheduler, tcp://HOST:PORT or tls://HOST:PORT. Its
    workers need this same fwdlib, with the extra `cluster`, and the same data. The times are still taken here.
    (default: here)"""
    resume: bool = True
    """Keep the results of earlier builds whose notebook, parameters, fwdlib and data are still the same."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 900
    """For each notebook."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = BUILT
    """Where results/, figures/, executed/, report.html and report.pdf go: a new folder, or that of an earlier build.
    (default: build/report)"""
    studies: Annotated[Path, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = RESULTS
    """The results of the studies, which are not run here. (default: the committed ones, report/results)"""
    only_render: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run nothing: draw and write again from the results of an earlier build, or from the committed ones if there was
    none."""
    publish: tyro.conf.FlagCreatePairsOff[bool] = False
    """For maintainers: write the committed report, from real data only. The notebooks run in build/publish; then their
    results, the figures and the pages replace those in report/. With --only-render, only figures and pages do."""

    def run(self) -> list[Path]:
        """Build the report.

        Returns:
            The two pages.

        Raises:
            BuildError: if a notebook fails, or what is to be published may not be.
            OutputError: if the folder is in use, or has files that no build has written.
            OSError: if something cannot be read or written, or the cluster cannot be reached or is gone.
            ValueError: if a setting or a result is not usable.
        """
        from fwdlib.atomic import check_writable
        from report.output import hold

        if not self.publish:
            with hold(self.output) as output:
                if not self.only_render:
                    self._run(output)
                own = output.folder / "results"
                return self._render(own if own.is_dir() else RESULTS, output)
        if (self.output, self.studies) != (BUILT, RESULTS):
            raise BuildError("--publish takes no --output and no --studies: it writes report/, from report/results")
        records = RESULTS
        check_writable(HERE / "report.html")
        if not self.only_render:
            with hold(ROOT / "build" / "publish") as output:
                self._run(output)
                records = output.folder / "results"
        with hold(HERE) as output:
            return self._render(records, output)

    def _run(self, output: Output) -> None:
        """Run the notebooks and take the times."""
        plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
        names = list(plan["notebooks"])
        output.claim(f"{folder}/{name}.json" for folder in ("results", "executed") for name in (*names, "timings"))
        output.claim(f"{folder}/{name}.ipynb" for folder in ("executed", "executed/failed") for name in names)
        data = self._load_data()
        self._run_notebooks(output.folder, plan["notebooks"], data)
        self._take_times(output.folder, plan["timings"], data)

    def _render(self, records: Path, output: Output) -> list[Path]:
        """Draw and write from the results in a folder; to publish, check them, and put them in place, too."""
        from report.page import context
        from report.page.render import render

        say(f"drawing  from {records}")
        results = context.load_results(records, self.studies)
        if self.publish:
            _check_real(results)
            if records != RESULTS:
                (output.scratch / "results").mkdir(parents=True)
                for name in context.RECORDS:
                    shutil.copyfile(records / name, output.scratch / "results" / name)
        return render(results, output)

    def _load_data(self) -> str:
        """Load the data once, print where they come from, and return what identifies them as one text.

        Raises:
            BuildError: if a substitute was loaded and the report is to be published.
        """
        from fwdlib.archives import stay_offline_without_network
        from fwdlib.data import describe, load_kmnist, load_penguins

        found = [load_penguins(), load_kmnist()]
        stay_offline_without_network()
        for dataset in found:
            first, second, *_ = describe(dataset).splitlines()
            is_real = dataset.source.substitute_for is None
            say(f"data     {first}" if is_real else f"data     !!! {first}\n         !!! {second}")
            if self.publish and not is_real:
                raise BuildError(_refusal(dataset.source._asdict()))
        return ", ".join(f"{dataset.source.name} {dataset.source.fingerprint}" for dataset in found)

    def _run_notebooks(self, folder: Path, notebooks: dict[str, dict[str, Any]], data: str) -> None:
        from fwdlib.runs.batch import run_batch
        from fwdlib.runs.declarations import jobs_of
        from fwdlib.runs.jobs import failures

        with self._place() as place:
            outcomes = run_batch(
                jobs_of(notebooks, NOTEBOOKS),
                results=folder / "results",
                executed=folder / "executed",
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

    def _take_times(self, folder: Path, pairs: dict[str, int], data: str) -> None:
        """Measure both methods on every model, one after the other, unless the earlier times are still valid."""
        from fwdlib import runtime
        from fwdlib.results import load_run, write_json
        from report.page.context import TASKS, TIMINGS

        path, stamp = folder / "results" / TIMINGS, folder / "executed" / TIMINGS
        settings = {key: load_run(path.with_name(f"{task.forward}.json")).parameters for key, task in TASKS.items()}
        num_rounds = 1 if runtime.is_quick() else 5
        if runtime.is_quick():
            pairs = dict.fromkeys(pairs, 1)
        given = {"pairs": pairs, "settings": settings, "data": data, "versions": runtime.versions()}
        print_ = fingerprint(TIMED, given)
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


def _check_real(results: Results) -> None:
    """Check that all records were made in full, from real data.

    Raises:
        BuildError: if one was not; the message names it.
    """
    for record in [record for pair in results.records.values() for record in pair.values()]:
        if record.source["substitute_for"]:
            raise BuildError(f"{record.name}: {_refusal(record.source)}")
        if record.quick:
            raise BuildError(f"{record.name} was made in quick mode. Unset FWDLIB_QUICK and run it again.")


def _refusal(source: dict[str, Any]) -> str:
    return (
        f"the published report shows real data only, and this is {source['name']} in place of "
        f"{source['substitute_for']}. Set FWDLIB_DATA to a folder that has it, or connect to the network."
    )


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def sha256(path: Path) -> str:
    """Return the hash of a file, empty if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def fingerprint(files: list[Path], settings: dict[str, Any]) -> str:
    """Return a hash of some code of the report, of the files of fwdlib that it can reach, and of settings.

    Args:
        files: Python files of the report.
        settings: what else the results depend on.
    """
    from fwdlib.runs import stamps
    from fwdlib.runs.imports import Package

    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    content = {
        "settings": settings,
        "fwdlib": stamps.sources(Package(stamps.PACKAGE).files_of(code)),
        "report": [[path.name, sha256(path)] for path in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(stamp: Path) -> Any:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):  # missing or damaged
        return None


def main(args: list[str] | None = None) -> int:
    """Build the report and return the exit code: 0; 1 with a message; 130 when interrupted.

    Args:
        args: the words after ``python -m report``; default: those this process was started with.

    Raises:
        SystemExit: after printing help (code 0), or if the words make no command (code 2).
    """
    build = tyro.cli(Build, args=args, prog=PROG)
    start = time.monotonic()
    try:
        html, pdf = build.run()
        say(f"report   {time.monotonic() - start:.0f} s in all")
        print(pdf, html, sep="\n")
        return 0
    except KeyboardInterrupt:
        say(f"\n{PROG}: stopped. Finished results are kept; the same command continues from there.")
        return 130
    except Exception as error:
        from fwdlib.archives import DamagedFileError
        from fwdlib.atomic import message_of
        from report.output import OutputError

        if not isinstance(error, (BuildError, OutputError, OSError, ValueError, DamagedFileError)):
            raise
        say(f"\n{PROG}: {message_of(error)}")
    old = (HERE if build.publish else build.output) / "report.html"
    say(f"No report was made.{f' {old} is from an earlier build.' if old.is_file() else ''}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
