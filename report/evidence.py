"""``python -m report.evidence``: all that the report rests on, from nothing, in half an hour on two cores.

The studies of the report take some twenty hours of a core. Here each runs in a short form, with fewer seeds, steps and
cases (their ``SHORT`` settings), two at a time; then, with nothing beside them, what takes times; then the six
notebooks, and the page. It all goes into a folder of its own, so that no committed result is touched. At the end each
claim's verdict stands beside the committed one. A short form has wider intervals: an inconclusive verdict is no
objection, a reversed one is.

    python -m report.evidence              # into evidence/
    python -m report.evidence elsewhere
    python -m report.evidence --scheduler tcp://127.0.0.1:8786    # the notebooks on a Dask cluster

A cluster runs the six notebooks. The studies and all times stay on this machine: a study is one process, which writes
its file after each of its runs and reads it to go on.

What an interrupt leaves is gone on from, by the same code; by other code nothing would be seen of the change.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from report import names
from report.__main__ import fingerprint, say, sha256
from report.page import context as page_context

HERE = Path(__file__).parent
FOLDER = HERE.parent / "evidence"
REPORT = [sys.executable, "-m", "report"]
TOGETHER = [  # modules and their words, the longest first
    *(["protocols", "cnn"], ["feedback", "MNIST-2x800"], ["tangents"], ["feedback", "MNIST-cnn"]),
    *(["frank_wolfe", "tuning", "training", "convergence"], ["protocols", "logistic", "mlp"]),
    *(["functions", "descents", "divergence", "growth"], ["scratch", "agreement", "training"], ["descent"]),
    *(["feedback", "FashionMNIST-2x800"], ["frank_wolfe", "memory"]),
]
ALONE = [
    ["functions", "steps"],
    ["scratch", "steps"],
    ["protocols", "steps"],
    ["feedback", "steps"],
    ["scaling"],
]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class StudyError(Exception):
    """A study ended with an error; the text says which, and its last words."""


def rebuild(folder: Path = FOLDER, scheduler: str | None = None) -> None:
    """Run all studies in short form, the notebooks and the page, and print the verdicts beside the committed ones.

    Args:
        folder: for all of it. What an interrupted rebuild has finished there is kept.
        scheduler: address of that of a Dask cluster, for the notebooks.

    Raises:
        StudyError: if a study fails.
        OSError: if the folder cannot be written, or the cluster cannot be reached.
    """
    if scheduler:
        from fwdlib.runs.cluster import Cluster

        with Cluster(scheduler):  # it is wanted last, but a wrong address should be told first
            pass
    start, folder = time.monotonic(), folder.expanduser().resolve()
    results, logs = folder / "results", folder / "logs"
    for each in (results, logs):
        each.mkdir(parents=True, exist_ok=True)
    stamp, code = folder / "code.txt", fingerprint({path.name: sha256(path) for path in sorted(HERE.glob("*.py"))})
    if stamp.is_file() and stamp.read_text() != code:
        raise StudyError(f"{folder} was begun with other code, and says nothing about this one: delete it")
    stamp.write_text(code)
    (results / names.SHORT_FORM).touch()
    run([study(words, results) for words in TOGETHER], logs, at_once=2)
    timed = [study(words, results) for words in ALONE]
    bench = [sys.executable, "-m", "fwdlib", "bench", "--quick", "--out", str(results / "bench-cpu.json")]
    page = [*REPORT, "--output", str(folder), *(["--scheduler", scheduler] if scheduler else [])]
    run([*timed, bench, page], logs, at_once=1)
    say(f"rebuilt in {(time.monotonic() - start) / 60:.1f} minutes: {folder / 'report.html'}")
    print(*compare(verdicts_of(HERE / "results"), verdicts_of(results)), sep="\n")


def study(words: list[str], results: Path) -> list[str]:
    """Return the command that runs a study in short form.

    Args:
        words: its module, and the parts to measure.
        results: folder to write to.
    """
    module, *parts = words
    return [*REPORT[:2], f"report.studies.{module}", *parts, "--short", "--folder", str(results)]


def run(commands: Iterable[list[str]], logs: Path, *, at_once: int) -> None:
    """Run commands, so many at once, each with a log of its own; when one fails, or at Ctrl-C, end the others.

    Args:
        commands: in the order in which they start.
        logs: folder for what the commands print.
        at_once: how many run beside each other; above 1, each is held to one thread.

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
                    process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                running.append((name, log, time.monotonic(), process))
            for entry in [entry for entry in running if entry[3].poll() is not None]:
                running.remove(entry)
                name, log, begun, process = entry
                if process.returncode:
                    last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
                    raise StudyError(f"{name} ended with code {process.returncode}; the end of {log}:\n{last}")
                say(f"done     {name} in {time.monotonic() - begun:.0f} s")
            time.sleep(0.2)
    finally:
        for *_, process in running:
            process.terminate()
        for *_, process in running:
            process.wait()


def verdicts_of(results: Path) -> dict[str, str]:
    """Return the outcome of each claim that can be judged by the results in a folder.

    Args:
        results: the folder.
    """
    findings = page_context.context(page_context.load(results))["claims"]
    return {f"{finding.claim.text} ({finding.claim.source})": finding.outcome for finding in findings}


def compare(committed: dict[str, str], short: dict[str, str]) -> Iterator[str]:
    """Give a line for each claim, and one that sums up.

    Args:
        committed: outcomes by claim.
        short: those of the rebuild.
    """
    turned = 0
    for text, outcome in committed.items():
        again = short.get(text, "not judged")
        is_turned = {outcome, again} == {"holds", "fails"}
        turned += is_turned
        yield f"{'!' if is_turned else ' '} {outcome:8} {again:10} {text}"
    same = sum(short.get(text) == outcome for text, outcome in committed.items())
    yield f"{same} of {len(committed)} verdicts come out the same in short form; {turned} the other way round."


def main(words: list[str]) -> int:
    """Rebuild as ``words`` say, ``[folder] [--scheduler address]``; return 0, 1 with a message, 130 if interrupted."""
    scheduler = None
    if "--scheduler" in words[:-1]:
        at = words.index("--scheduler")
        scheduler, words = words[at + 1], words[:at] + words[at + 2 :]
    if len(words) > 1 or any(word.startswith("-") for word in words):
        say(__doc__)
        return 0 if words in (["-h"], ["--help"]) else 2
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # or what runs would go on without us
    try:
        rebuild(*map(Path, words[:1]), scheduler=scheduler)
    except KeyboardInterrupt:
        say("\nStopped. What was finished is kept; the same command goes on from there.")
        return 130
    except (StudyError, OSError) as error:
        say(f"\nreport.evidence: {error}")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
