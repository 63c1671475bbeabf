"""``python -m report.evidence``: make everything that the report rests on again, in half an hour on two cores.

The studies of the report take some twenty hours of a core. Here each runs in a short form (its ``SHORT`` settings, with
fewer seeds, steps and cases), two at a time. What is timed follows, with nothing else running; then the six notebooks
and the page. All results go to ``build/evidence``, so no committed result changes. At the end, each verdict is printed
beside the committed one. A short form has wider intervals: an inconclusive verdict is no objection, a reversed one is.

A cluster runs the notebooks. The studies and all times stay on this machine: a study is one process, which saves its
file after each of its runs and continues from it.

After an interruption, the same command continues, if the code is still the same.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fwdlib import children
from fwdlib.atomic import message_of
from report import names
from report.__main__ import HERE, RESULTS, ROOT, fingerprint, say
from report.output import OutputError, hold
from report.page.context import build_context, load_results

PROG = "python -m report.evidence"
REPORT = [sys.executable, "-m", "report"]
TOGETHER = [  # modules and their parts, the longest first
    *(["protocols", "cnn"], ["feedback", "MNIST-2x800"], ["tangents"], ["feedback", "MNIST-cnn"]),
    *(["frank_wolfe", "tuning", "training", "convergence"], ["protocols", "logistic", "mlp"]),
    *(["functions", "descents", "divergence", "growth"], ["scratch", "agreement", "training"], ["descent"]),
    *(["feedback", "FashionMNIST-2x800", "KMNIST-2x800", "MNIST-M-1-16", *names.DEPTHS], ["frank_wolfe", "memory"]),
]
ALONE = [
    ["functions", "steps"],
    ["scratch", "steps"],
    ["protocols", "steps"],
    ["feedback", "steps"],
    ["scaling"],
    ["sensitivity"],
    ["budget"],
    ["traffic"],
]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class StudyError(Exception):
    """A study ended with an error; the text says which, and its last words."""


@dataclass
class Evidence:
    """Run every study in a short form, the notebooks and the page, and print the verdicts beside the committed ones."""

    folder: tyro.conf.Positional[Path] = ROOT / "build" / "evidence"
    """A new folder, or one to continue in."""
    scheduler: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None
    """Run the notebooks on a Dask cluster: the address of its scheduler."""

    def run(self) -> None:
        """Do it.

        Raises:
            StudyError: if a study fails, or the folder has results of other code.
            OutputError: if the folder is in use, or has files of somebody else.
            OSError: if the folder cannot be written, or the cluster cannot be reached.
        """
        if self.scheduler:
            from fwdlib.runs.cluster import Cluster

            with Cluster(self.scheduler):  # it is needed last, but a wrong address is reported first
                pass
        start = time.monotonic()
        with hold(self.folder) as output:
            folder = output.folder
            results, logs = folder / "results", folder / "logs"
            for each in (results, logs):
                each.mkdir(exist_ok=True)
            check_code(folder / "code.txt")
            (results / names.SHORT_FORM).touch()
            run([study(words, results) for words in TOGETHER], logs, at_once=2)
            bench = [sys.executable, "-m", "fwdlib", "bench", "--quick", "--out", str(results / names.BENCH)]
            page = [*REPORT, "--output", str(folder / "report"), "--studies", str(results)]
            page += ["--scheduler", self.scheduler] if self.scheduler else []
            run([*(study(words, results) for words in ALONE), bench, page], logs, at_once=1)
            verdicts = verdicts_of(folder / "report" / "results", results)
        say(f"rebuilt in {(time.monotonic() - start) / 60:.1f} minutes: {folder / 'report' / 'report.html'}")
        print(*compare(verdicts_of(RESULTS), verdicts), sep="\n")


def check_code(stamp: Path) -> None:
    """Write down which code the results in a folder come from, or check that it is still the same.

    Args:
        stamp: the file.

    Raises:
        StudyError: if the code is another one.
    """
    code = fingerprint(sorted(HERE.rglob("*.py")), {})
    if stamp.is_file() and stamp.read_text() != code:
        raise StudyError(f"{stamp.parent} was begun with other code and says nothing about this code: delete it")
    stamp.write_text(code)


def study(words: list[str], results: Path) -> list[str]:
    """Return the command that runs a study in short form."""
    module, *parts = words
    return [sys.executable, "-m", f"report.studies.{module}", *parts, "--short", "--folder", str(results)]


def run(commands: Iterable[list[str]], logs: Path, *, at_once: int) -> None:
    """Run commands, each with a log of its own. When one fails, or at Ctrl-C, end the others.

    Args:
        commands: in the order in which they start.
        logs: folder for what the commands print.
        at_once: how many run at the same time; above 1, each is held to one thread.

    Raises:
        StudyError: if one ends with an error.
    """
    waiting, running = list(commands), []
    environment = os.environ | (ONE_THREAD if at_once > 1 else {})
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                command = waiting.pop(0)
                name = " ".join(word for word in command[2:] if not word.startswith(("-", "/")))
                log = logs / (re.sub(r"[^\w.]+", "-", name)[:80] + ".txt")
                say(f"started  {name}")
                with log.open("w") as stream:
                    child = children.start(command, environment=environment, stdout=stream, stderr=stream)
                running.append((name, log, time.monotonic(), child))
            for entry in [entry for entry in running if entry[3].poll() is not None]:
                name, log, begun, child = entry
                children.end(child)
                running.remove(entry)
                if child.returncode:
                    last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
                    raise StudyError(f"{name} ended with code {child.returncode}; the end of {log}:\n{last}")
                say(f"done     {name} in {time.monotonic() - begun:.0f} s")
            time.sleep(0.2)
    finally:
        for *_, child in running:
            children.end(child)


def verdicts_of(records: Path, studies: Path | None = None) -> dict[str, str]:
    """Return the outcome of each claim that can be judged.

    Args:
        records: folder of the notebooks' records and the timings.
        studies: folder of the studies' results. Default: the same one.
    """
    findings = build_context(load_results(records, studies))["claims"]
    return {f"{finding.claim.text} ({finding.claim.source})": finding.outcome for finding in findings}


def compare(committed: dict[str, str], short: dict[str, str]) -> Iterator[str]:
    """Give a line for each claim, and a last one that sums up."""
    num_reversed = 0
    for text, outcome in committed.items():
        again = short.get(text, "not judged")
        is_reversed = {outcome, again} == {"holds", "fails"}
        num_reversed += is_reversed
        yield f"{'!' if is_reversed else ' '} {outcome:12} {again:12} {text}"
    same = sum(short.get(text) == outcome for text, outcome in committed.items())
    yield f"{same} of {len(committed)} verdicts are the same in short form; {num_reversed} reversed."


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0; 1 with a message; 130 when interrupted.

    Args:
        args: the words after ``python -m report.evidence``; default: those this process was started with.
    """
    evidence = tyro.cli(Evidence, args=args, prog=PROG, description=__doc__)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        evidence.run()
    except KeyboardInterrupt:
        say("\nStopped. Finished results are kept; the same command continues from there.")
        return 130
    except (StudyError, OutputError, OSError) as error:
        say(f"\n{PROG}: {message_of(error)}")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
