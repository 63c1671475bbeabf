"""The command line, ``python -m fwdlib {doctor,data,train,bench,run}``.

A subcommand is a dataclass: its fields are the arguments, its docstring is the help, and ``run()`` returns the exit
code. To add one, write it and name it in ``COMMANDS``. Import what it needs inside ``run()``: help must not wait for
torch.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, Union

import tyro

from fwdlib.atomic import check_own, check_writable, message_of, naming, write_bytes
from fwdlib.checks import check_count
from fwdlib.doctor import PROG, Doctor
from fwdlib.trainer import settings

if TYPE_CHECKING:
    from fwdlib.runs.jobs import Job, Outcome
    from fwdlib.runs.places import Place

RUN_MARK = ".fwdlib-run"  # in a folder that `run` writes to
ABOUT = "Gradients without backpropagation: forward gradients beside backprop."


def main(args: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 0 for success, 1 with a message on stderr, 130 after Ctrl-C.

    Args:
        args: the words after ``python -m fwdlib``. Default: those of this process.

    Raises:
        SystemExit: after printing help (code 0), or if the words are not a command (code 2).
    """
    return _run(tyro.cli(COMMANDS, args=args, prog=PROG, description=ABOUT, config=(tyro.conf.OmitSubcommandPrefixes,)))


def _run(command: Doctor | ListData | FetchData | Train | Bench | Run) -> int:
    code = 1
    try:
        return command.run()
    except ImportError as error:
        message = f"{error}. `{PROG} doctor` lists what is missing."
    except KeyboardInterrupt as stop:
        message, code = str(stop) or "stopped", 130
    except Exception as error:
        if not _is_expected(error):
            raise
        message = message_of(error)
    print(f"{PROG}: {message}", file=sys.stderr)
    return code


def _is_expected(error: Exception) -> bool:
    """Tell whether the user can correct this error, so that the message is enough and a traceback would hide it."""
    from fwdlib.archives import DamagedFileError

    return isinstance(error, (ValueError, OSError, DamagedFileError))


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class ListData:
    """Show all data sets, their licences, and where each would be loaded from now."""

    def run(self) -> int:
        """Print the table. This asks hosts whether they answer, but downloads nothing."""
        from fwdlib import data

        where = data.available()
        rows = [("data set", "licence", "would now come from")]
        rows += [(name, licence, where[name]) for name, (licence, _) in data.CREDITS.items()]
        for name, licence, place in rows:
            print(f"{name:<14}{licence:<15}{place}")
        print(f"\nTo download a data set into the cache: {PROG} data fetch NAME")
        print("FWDLIB_DATA names a folder with data in torchvision's layout. fwdlib never writes to it.")
        return 0


@dataclass
class FetchData:
    """Download data sets into the cache folder, unless FWDLIB_DATA or the cache already has them.

    FWDLIB_CACHE names another cache folder. Files with the published hash are not downloaded again.
    """

    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="")
    ]
    """Names of data sets, for example KMNIST CIFAR10. `python -m fwdlib data` lists them."""

    def run(self) -> int:
        """Fetch the data sets one after the other; go on after a failure.

        Raises:
            ValueError: if a name is unknown, or none is given.
        """
        from fwdlib import data
        from fwdlib.checks import check_choice

        known = {name.casefold(): name for name in data.FETCHABLE}
        names = [known.get(name.casefold(), name) for name in self.names]
        if not names:
            raise ValueError(f"fetch needs the NAME of a data set: {', '.join(data.FETCHABLE)}")
        for name in names:  # check all names before the first download
            check_choice("NAME", name, data.FETCHABLE)
        failed = False
        for name in names:
            try:
                print(f"{name}: ready in {data.fetch(name)}")
            except (OSError, data.DamagedFileError) as error:
                failed = True
                print(f"{PROG}: {message_of(error)}", file=sys.stderr)
        return int(failed)


@dataclass
class Data:
    """Show the data sets and where they would come from, or download some of them."""

    action: Annotated[ListData, tyro.conf.subcommand("list")] | Annotated[FetchData, tyro.conf.subcommand("fetch")] = (
        field(default_factory=ListData)
    )

    def run(self) -> int:
        """Run the action; by default, list the data sets."""
        return self.action.run()


# --- train -----------------------------------------------------------------------------------------------------------


T = TypeVar("T")
Group = Annotated[T, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff]  # a part of the help page
Words = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]  # an option that can be repeated
PLAIN = {"help_behavior_hint": ""}  # no "(default: None)": the text names the default


@dataclass
class Train:
    """Train an image classifier by backprop, forward gradients or direct feedback, all in the same way.

    A progress bar shows loss, test accuracy and images per second. The last line gives the test accuracy and the folder
    of the files. Ctrl-C stops the training at any time; --resume continues it.
    """

    task: Group[settings.Task] = field(default_factory=settings.Task)
    method: Group[settings.Method] = field(default_factory=settings.Method)
    steps: Group[settings.Steps] = field(default_factory=settings.Steps)
    running: Group[settings.Execution] = field(default_factory=settings.Execution)

    def run(self) -> int:
        """Train, and print the test accuracy.

        Raises:
            ValueError: if a setting is out of its range.
            KeyboardInterrupt: if it is stopped; the message says how to continue.
        """
        asked = settings.Settings(**vars(self.task), **vars(self.method), **vars(self.steps), **vars(self.running))

        from fwdlib import runtime
        from fwdlib.trainer import experiment, processes

        if asked.processes > 1:
            if processes.num_started() == 1:
                return self._start(asked)
            if asked.processes != processes.num_started():
                raise ValueError(f"--processes {asked.processes}, but torchrun has started {processes.num_started()}")
        runtime.keep_freed_memory()
        if asked.device.startswith("cuda"):
            runtime.use_determinism()
        try:
            record = experiment.run(asked)
        except processes.AlreadyReportedError:
            return 1
        except KeyboardInterrupt:
            if processes.num_started() > 1 and not processes.is_first():
                return 130
            raise KeyboardInterrupt(self._stopped(asked)) from None
        if not processes.is_first():
            return 0
        accuracy = f"test accuracy {100 * record['epochs'][-1]['test_accuracy']:.2f} %"
        if asked.dry_run:
            print(f"It works: one step, {accuracy} of {record['num_test']} images. Nothing was written.")
        else:
            print(f"{accuracy} after epoch {record['epochs'][-1]['epoch']}; files in {experiment.folder_of(asked)}")
        return 0

    def _start(self, asked: settings.Settings) -> int:
        # Each process runs the same command and prints its own errors.
        from fwdlib.trainer import distributed

        try:
            distributed.start(asked.processes, _exit_with, self)
        except distributed.ChildError as end:
            if end.code > 0:
                return end.code
            raise OSError(f"{end}; {self._stopped(asked)}") from end
        except KeyboardInterrupt:
            return 130
        return 0

    @staticmethod
    def _stopped(asked: settings.Settings) -> str:
        return "stopped" + (
            "" if asked.dry_run else "; the same command with --resume goes on from the last whole epoch"
        )


def _exit_with(command: Train) -> None:
    sys.exit(_run(command))


# --- bench -----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Measure the time and peak memory of a training step, by backprop and by forward gradients.

    Also of MLPs over their depth, their width and the batch. Run nothing else on the machine meanwhile. It prints a
    table and writes all numbers to a JSON file.
    """

    quick: bool = False
    """Take few measurements, in a few minutes: to see that everything runs, with rough numbers."""
    device: str = "cpu"
    """cpu or cuda."""
    models: tuple[str, ...] = ()
    """Measure only these models, for example mnist-mlp paper-cnn. A wrong name lists all."""
    memory: bool = True
    """Measure the peak memory of a step, those of a model in a process of their own."""
    sweeps: bool = True
    """Measure MLPs of 1 to 100 layers, of increasing width, and with increasing batches."""
    batch: int | None = None
    """Examples in a batch. (default: each model's own)"""
    threads: int | None = None
    """Threads of torch. (default: as many as torch takes)"""
    peers: bool = False
    """Time other packages with forward gradients, too, as far as they are installed: torchzero."""
    out: Path | None = None
    """The JSON file. (default: build/bench-DEVICE.json, with -quick or -partial in its name if it is)"""

    def run(self) -> int:
        """Measure, print and save.

        Raises:
            OSError: if the file cannot be written, which is tried first, or is somebody else's.
            ValueError: if an option has a value that is not allowed.
        """
        from fwdlib.bench import benchmark, table
        from fwdlib.results import write_json

        partial = bool(self.models) or not (self.memory and self.sweeps)
        options = {"quick": self.quick, "batch": self.batch, "threads": self.threads}
        path = self.out or benchmark.default_path(self.device, partial=partial, **options)
        path = path.expanduser()
        check_writable(path)
        check_own(path.parent, [path.name], path.name, ("format", "environment", "models", "depth"))
        found = benchmark.run(
            device=self.device,
            models=self.models or None,
            memory=self.memory,
            sweeps=self.sweeps,
            peers=self.peers,
            **options,
        )
        print(table.text(found), flush=True)
        write_json(path, found)
        print(f"All numbers: {path}")
        return 0


# --- run -------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Run notebooks over grids of parameters, and put the results of all seeds into one table.

    For example, `--notebook 1b --set learning_rate=0.05,0.1,0.2 --set num_tangents=1,4 --seeds 20` makes six jobs of 20
    seeds each.

    The same command again runs only jobs that are missing, or whose code, versions or data have changed. Ctrl-C loses
    only the jobs that are running. A job that fails does not stop the others: at the end, all failures are listed with
    their cells, the table has the jobs that succeeded, and the exit code is 1.
    """

    notebook: Annotated[Words, tyro.conf.arg(metavar="NAME [NAME ...]", **PLAIN)] = ()
    """One or several notebooks: the beginning of a name, such as 1b, or a path. A wrong name lists all."""
    settings: Annotated[Words, tyro.conf.arg(name="set", metavar="PARAMETER=VALUE,...", **PLAIN)] = ()
    """Values for a parameter, of the type of its default in the notebook; with several parameters, all combinations
    run. A value may be a list, such as [1,2]; put a text with commas in quotes. A wrong name lists all."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N", **PLAIN)] = None
    """Seeds in each job, the same as `--set num_seeds=N`. A notebook trains its seeds side by side, much faster than
    one job per seed. The first seed is the notebook's own, or that of `--set seed=`. (default: the notebook's)"""
    batches: Annotated[Path | None, tyro.conf.arg(metavar="FILE", **PLAIN)] = None
    """Take notebooks and parameters from the tables [notebooks.NAME] of this TOML file instead, such as
    report/batches.toml: `learning_rate = 0.1` is a value, `learning_rate = [0.1, 0.2]` a grid."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", **PLAIN)] = None
    """Jobs that run at once. Above 1, each has one core, and the times in the table are not timings. (default: 2; with
    --scheduler, as many as the cluster has threads)"""
    scheduler: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", **PLAIN)] = None
    """Run the jobs on a Dask cluster: the address of its scheduler, tcp://HOST:PORT or tls://HOST:PORT. Its workers
    need this same fwdlib, with the extra `cluster`, and the same data. Times are not timings. (default: here)"""
    to: Literal["csv", "json", "parquet"] = "csv"
    """Format of the table; parquet needs pyarrow."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR", **PLAIN)] = None
    """Folder for the table of this command's jobs, and for results/ and executed/, which also keep those of earlier
    commands. (default: results/run, in quick mode results/run-quick)"""
    resume: bool = True
    """Reuse results of earlier commands whose notebook, parameters, code, versions and data are still the same."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 900
    """Limit for each job."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only list the jobs, and which of them are already done."""

    def run(self) -> int:
        """Check everything, run what is missing, write the table, list the failures.

        Raises:
            OSError: if the folder cannot be written to, which is tried first, or has files of somebody else.
            ValueError: if the words are not a batch, or the table cannot be written in that format.
            PlaceError: if the cluster cannot be reached, or is gone; the message says how to go on.
            KeyboardInterrupt: if it is stopped; the message says how to go on.
        """
        from fwdlib import runtime
        from fwdlib.runs import batch, declarations, jobs, places, tables

        tables.check_format(self.to)
        if self.jobs is not None:
            check_count("num_jobs", self.jobs)
        asked = self._jobs()
        output = (self.output or runtime.results_dir() / ("run-quick" if runtime.is_quick() else "run")).expanduser()
        if not self.dry_run:
            if self.output:  # the folder of our own needs no mark
                check_own(output, (f"table.{self.to}", "results", "executed"), RUN_MARK)
            for name in (f"table.{self.to}", "results/record.json", "executed/copy.ipynb"):
                check_writable(output / name)
        missing = declarations.get_data(asked)
        for reason in missing.values():
            print(f"{reason} A notebook that has a SUBSTITUTE uses it.", file=sys.stderr)
        where = {
            "results": output / "results",
            "executed": output / "executed",
            "fingerprint": f"without {', '.join(missing)}" if missing else "",
        }
        if self.dry_run:
            done = {outcome.job.name for outcome in batch.finished(asked, **where)} if self.resume else set()
            for job in asked:
                print(f"{'done' if job.name in done else 'to run':<8}{job.name}")
            print(f"{len(asked)} jobs, {len(asked) - len(done)} to run, with results in {output}")
            return 0
        write_bytes(output / RUN_MARK, b"`python -m fwdlib run` writes here.\n")
        how = {"num_jobs": self.jobs, "resume": self.resume, "timeout": self.timeout}
        try:
            with self._place() as place, naming(output):
                outcomes = batch.run_batch(asked, **where, **how, place=place)
        except places.PlaceError:
            self._save(batch.finished(asked, **where), len(asked), output)
            raise
        except KeyboardInterrupt:
            self._save(batch.finished(asked, **where), len(asked), output)
            again = "" if self.resume else ", without --no-resume,"
            raise KeyboardInterrupt(f"stopped. What was finished is kept; the same command{again} goes on") from None
        failed = jobs.failures(outcomes)
        print(failed, file=sys.stderr, end="\n" if failed else "", flush=True)
        self._save(outcomes, len(asked), output)
        return int(bool(failed))

    def _jobs(self) -> list[Job]:
        from fwdlib import runtime
        from fwdlib.runs import declarations

        names, settings = (tuple(itertools.chain(*words)) for words in (self.notebook, self.settings))
        if bool(names) == bool(self.batches):
            raise ValueError("run takes either --notebook NAME ... or --batches FILE, which declares notebooks")
        if self.batches and (settings or self.seeds is not None):
            raise ValueError(f"{self.batches} sets its own parameters: --set and --seeds go only with --notebook")
        file = self.batches.expanduser().resolve() if self.batches else None
        root = (file and runtime.project_root(file.parent)) or runtime.project_root()
        folder = root and root / "notebooks"
        if file:
            return declarations.jobs_of(declarations.read_declaration(file), folder)
        return declarations.jobs_of(declarations.declaration_of(names, settings, self.seeds, folder), folder)

    def _place(self) -> AbstractContextManager[Place | None]:
        if self.scheduler is None:
            return nullcontext()
        from fwdlib.runs.cluster import Cluster

        return Cluster(self.scheduler)

    def _save(self, outcomes: list[Outcome], num_jobs: int, output: Path) -> None:
        from fwdlib.runs import tables

        path, frame = output / f"table.{self.to}", tables.table(outcomes)
        tables.write_table(frame, path)
        print(f"{len(frame)} rows, from {frame['job'].nunique()} of {num_jobs} jobs, in {path}")
        ended = [outcome.job.name for outcome in outcomes if not outcome.error]
        if silent := [name for name in ended if name not in set(frame["job"])]:
            advice = "A notebook leaves a record by calling results.save_run"
            print(f"No row for {', '.join(silent)}: no record was left. {advice}", file=sys.stderr)
        for (real, used), rows in frame.groupby(["substitute_for", "data"]):
            names = ", ".join(dict.fromkeys(rows["job"]))
            print(
                f"SUBSTITUTE: {names} used {used} in place of {real}; these are no results on {real}", file=sys.stderr
            )


COMMANDS = Union[Doctor, Data, Train, Bench, Run]  # noqa: UP007  # for X | Y, tyro imports typeguard: 0.2 s
