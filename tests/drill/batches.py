"""Faults of ``run`` and of the timings: killed, two at once, other process namespaces, the clock, leaks."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from tests.drill.harness import Skipped, Trial, differing, item
from tests.drill.trainings import TRAIN, date_ahead, epochs_in
from tests.notebook_files import content_of, stamp_times, write_notebook
from tests.report.records import make_results

RUN = ("-m", "fwdlib", "run", "--notebook")
TELL = """\
import os, tempfile, time
from pathlib import Path
folder = Path(os.environ["FWDLIB_RESULTS"])
(folder / "bytes.bin").write_bytes(bytes([seed, 0, 255]))
kept = tempfile.mkdtemp()"""
WAIT = "while gate and not Path(gate).exists():\n    time.sleep(0.05)"
NAMESPACE = ("--pid", "--fork", "--mount-proc", "--kill-child")


def tiny(trial: Trial) -> Path:
    """Write a notebook that leaves three bytes, and then waits for the file ``gate``."""
    return write_notebook(trial.folder / "tiny.ipynb", "seed = 0\ngate = ''", TELL, WAIT)


def running_in(output: Path) -> list[Path]:
    """Return the folders of the jobs that run."""
    return list((output / "results").glob(".running-*"))


def unshared(*words: str) -> tuple[str, ...]:
    """Return the command that starts a program with namespaces of its own.

    Raises:
        Skipped: if this machine does not permit it.
    """
    for command in (("unshare", *words), ("unshare", "--map-root-user", *words)):
        try:
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
        except FileNotFoundError:
            break
    raise Skipped(f"unshare {' '.join(words)} is not permitted here")


@item(
    "whole",
    "What a batch has finished is kept, whenever and however it is ended. The same command makes the same files as one "
    "that was not disturbed, and leaves nothing unfinished.",
    short=True,
)
def batch_killed(trial: Trial) -> str:
    """End `run` of six notebooks by SIGKILL, SIGTERM and SIGINT at random moments, and run it again."""
    whole, killed, told = trial.folder / "whole", trial.folder / "killed", []
    command = (*RUN, tiny(trial), "--set", "seed=0,1,2,3,4,5", "--output")
    beside = trial.start(*command, whole)
    for sent in [signal.SIGKILL] if trial.short else [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL]:
        process = trial.start(*command, killed, "--jobs", "1")
        trial.until(lambda: running_in(killed) or len(stamp_times(killed)) == 6)
        trial.pause(0, 2.5)
        trial.end(process, sent)
        assert trial.end(beside).code == 0  # before all processes are counted
        trial.all_end(12)
        # A job whose process had not yet begun to listen leaves its folder, which goes at the next start.
        assert sent != signal.SIGINT or running_in(killed) == []
        told.append(f"{sent.name} after {len(stamp_times(killed))} jobs")
    before = stamp_times(killed)
    trial.run(*command, killed)
    assert before.items() <= stamp_times(killed).items(), "a finished job ran again"
    assert running_in(killed) == []
    assert differing(content_of(killed), content_of(whole)) == []
    return f"the same files; {', '.join(told)}"


TIME = """\
import sys
from pathlib import Path
from report.__main__ import Build
Build()._take_times(Path(sys.argv[1]), dict.fromkeys(("logistic", "mlp", "cnn"), 1), "data")"""


@item("whole", "Times count only when all of them are taken: a timing pass that is killed leaves no stamp.")
def timings_killed(trial: Trial) -> str:
    """SIGKILL the timing pass of a report twice at random moments, and take the times again."""
    results, stamp = make_results(trial.folder / "results"), trial.folder / "executed" / "timings.json"
    old = (results / "timings.json").read_bytes()
    for _ in range(2):
        process = trial.start("-c", TIME, trial.folder)
        trial.until(lambda process=process: "pair" in trial.said(process))  # its bar
        trial.pause(0, 1)
        trial.end(process, signal.SIGKILL)
        assert not stamp.exists(), "a stamp without all times"
        assert (results / "timings.json").read_bytes() == old
    trial.run("-c", TIME, trial.folder)
    assert stamp.is_file()
    assert set(json.loads((results / "timings.json").read_text())["tasks"]) == {"logistic", "mlp", "cnn"}
    assert "reused   timings" in trial.run("-c", TIME, trial.folder).said
    return "no stamp after the kills; the third pass was whole, and was reused"


@item("locked", "Two batches may share a folder: neither touches the running jobs of the other.")
def two_batches(trial: Trial) -> str:
    """Start a second `run` on the same folder and notebooks while the first one runs."""
    output, gate = trial.folder / "out", trial.folder / "gate"
    command = (*RUN, tiny(trial), "--set", "seed=0,1", "--set", f"gate={gate}", "--output")
    first = trial.start(*command, output)
    trial.until(lambda: len(running_in(output)) == 2)
    second = trial.start(*command, output)
    trial.until(lambda: len(running_in(output)) == 4)
    gate.touch()
    assert trial.end(first).code == trial.end(second).code == 0
    trial.run(*command, trial.folder / "whole")
    assert differing(content_of(output), content_of(trial.folder / "whole")) == []
    return "both ended with exit code 0 and the files of one alone"


@item("locked", "Locks, not process numbers, tell the living from the dead: also from inside a container.", short=True)
def other_namespace(trial: Trial) -> str:
    """Share a folder between a `run` here and one in another process namespace, both ways; the same with `train`."""
    inside, notebook = unshared(*NAMESPACE), tiny(trial)
    for number, (first_in, second_in) in enumerate([(inside, ()), ((), inside)]):
        output, gate = trial.folder / f"out-{number}", trial.folder / f"gate-{number}"
        first = trial.start(*RUN, notebook, "--set", f"gate={gate}", "--output", output, before=first_in)
        trial.until(lambda output=output: running_in(output))
        trial.run(*RUN, notebook, "--set", "seed=1", "--output", output, before=second_in)
        assert running_in(output), "the second removed the folder of the first"
        gate.touch()
        assert trial.end(first).code == 0, trial.said(first)
        if trial.short:
            return "the live folder was left alone"
    folder = trial.folder / "train"
    first = trial.start(*TRAIN, "--epochs", "500", "--log-dir", folder, before=inside)
    trial.until(lambda: epochs_in(folder) >= 1)
    assert "in use by process" in trial.run(*TRAIN, "--epochs", "1", "--log-dir", folder, code=1).said
    trial.end(first, signal.SIGKILL)
    trial.all_end()
    trial.give_up(folder)
    return "live folders were left alone both ways; the second `train` was refused"


@item("whole", "Whether a result is reused does not depend on any date.")
def clock_set_back_in_batch(trial: Trial) -> str:
    """Date the files of a batch a day ahead, run it again, then change its notebook."""
    output, notebook = trial.folder / "out", tiny(trial)
    command = (*RUN, notebook, "--output", output)
    trial.run(*command)
    date_ahead(trial.folder)
    assert "reused   tiny" in trial.run(*command).said
    notebook.write_text(notebook.read_text().replace("255", "254"))
    assert "done     tiny" in trial.run(*command).said
    assert (output / "results" / "bytes.bin").read_bytes() == bytes([0, 0, 254])
    return "reused, and after the change run again"


@item("listens", "The kernels of notebooks listen on 127.0.0.1 alone.", short=True)
def notebooks_listen(trial: Trial) -> str:
    """Look at all sockets of `run` while a notebook runs."""
    output, gate = trial.folder / "out", trial.folder / "gate"
    process = trial.start(*RUN, tiny(trial), "--set", f"gate={gate}", "--output", output)
    trial.until(lambda: list((output / "results").glob(".running-*/results/bytes.bin")))
    links = [link for each in trial.processes() for link in each.net_connections() if link.status == "LISTEN"]
    gate.touch()
    assert trial.end(process).code == 0
    assert {link.laddr.ip for link in links} == {"127.0.0.1"}, links
    return f"{len(links)} sockets, all at 127.0.0.1"


LEAKS = """\
import gc, json, os, sys, tempfile, threading
from pathlib import Path
import psutil
from fwdlib.runs.batch import run_batch
from fwdlib.runs.jobs import Job
folder, me, counts = Path(sys.argv[1]), psutil.Process(), []
for number in range(int(sys.argv[2])):
    jobs = [Job(folder / "tiny.ipynb", {"seed": number})]
    (outcome,) = run_batch(jobs, results=folder / f"r{number}", executed=folder / "executed", progress=False)
    assert outcome.status == "done", outcome.error
    gc.collect()
    numbers = len(me.children(recursive=True)), me.num_fds(), threading.active_count()
    counts.append([*numbers, len(os.listdir(tempfile.gettempdir()))])
print(json.dumps(counts))"""


@item("ends", "A process that runs many batches keeps no process, file, thread or temporary folder of them.")
def batches_leak(trial: Trial) -> str:
    """Run 20 batches in one process, and count after each."""
    tiny(trial)
    counts = json.loads(trial.run("-c", LEAKS, trial.folder, "20", seconds=300).said.splitlines()[-1])
    assert counts[-1] == counts[0], f"processes, file descriptors, threads, temporary folders: {counts}"
    return f"after the first and the last batch: {counts[-1]} processes, descriptors, threads, temporary folders"
