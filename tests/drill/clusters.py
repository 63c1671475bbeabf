"""Faults of a Dask cluster: client, worker and scheduler killed, a worker that hangs."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.clusters import Dask, dask, runs_in
from tests.drill.batches import RUN, running_in, tiny
from tests.drill.harness import Trial, differing, item
from tests.notebook_files import content_of, stamp_times


@contextmanager
def cluster(trial: Trial, num_workers: int) -> Iterator[Dask]:
    folder = Path(tempfile.mkdtemp(prefix="dask-", dir=trial.folder))
    with dask(folder, **trial.environment(FWDLIB_DATA="")) as there:
        there.workers = [there.worker(str(number), "--no-nanny") for number in range(num_workers)]
        yield there


@item("whole", "A batch on a Dask cluster survives its client and its workers: no job is lost or there twice.")
def client_and_worker_killed(trial: Trial) -> str:
    """SIGKILL the client of a batch on a cluster, then a worker, at random moments; compare with a batch run here."""
    far, near, notebook = trial.folder / "far", trial.folder / "near", tiny(trial)
    command = (*RUN, notebook, "--set", "seed=0,1,2,3,4,5,6,7", "--output")
    with cluster(trial, 2) as there:
        client = trial.start(*command, far, "--scheduler", there.address)
        trial.until(lambda: stamp_times(far) and runs_in(there.folder))
        trial.pause(0, 1)
        trial.end(client, signal.SIGKILL)
        trial.until(lambda: not runs_in(there.folder), 20)
        kept = stamp_times(far)
        client = trial.start(*command, far, "--scheduler", there.address)
        trial.until(lambda: runs_in(there.folder) or client.poll() is not None)
        trial.pause(0, 1)
        trial.moments.choice(there.workers).kill()
        ended = trial.end(client)
    assert ended.code == 0, ended.said[-500:]
    assert kept.items() <= stamp_times(far).items(), "a finished job ran again"
    trial.run(*command, near)
    assert differing(content_of(far), content_of(near)) == []
    return f"{len(kept)} jobs were kept; in the end the same files as without a cluster"


@item("ends", "A batch ends with words when its scheduler is gone, and keeps what is finished.")
def scheduler_killed(trial: Trial) -> str:
    """SIGKILL the scheduler of a cluster while a batch runs."""
    output, gate = trial.folder / "out", trial.folder / "gate"
    command = (*RUN, tiny(trial), "--set", "seed=0,1", "--set", f"gate={gate}", "--output", output)
    with cluster(trial, 1) as there:
        client = trial.start(*command, "--scheduler", there.address)
        trial.until(lambda: runs_in(there.folder))
        trial.pause(0, 2)
        there.scheduler.kill()
        begun = time.monotonic()
        ended = trial.end(client, seconds=45)
        seconds = time.monotonic() - begun
        trial.until(lambda: not runs_in(there.folder), 30)
    assert ended.code == 1, ended.said
    assert "is gone. Everything finished so far is kept" in ended.said, ended.said
    assert "Traceback" not in ended.said, ended.said
    assert running_in(output) == []
    return f"said after {seconds:.0f} s; no job runs on"


# The command with shorter limits, so that the items take seconds.
HASTY = """\
import sys
from fwdlib import cli
from fwdlib.runs import cluster, notebook
notebook.OVERDUE, cluster.DESERTED_SECONDS = 5, 10
sys.exit(cli.main(sys.argv[1:]))"""


@item("ends", "`--timeout` holds also when the worker that has the job hangs, and a batch without workers ends.")
def workers_stopped_and_killed(trial: Trial) -> str:
    """SIGSTOP the only worker of a cluster while it runs a job with `--timeout 5`; the same with SIGKILL."""
    told, notebook = [], tiny(trial)
    for sent, words in {signal.SIGSTOP: "took longer than 5 s", signal.SIGKILL: "has had no worker for"}.items():
        output, gate = trial.folder / sent.name, trial.folder / "gate"
        command = (*RUN[2:], notebook, "--set", f"gate={gate}", "--timeout", "5", "--output", output)
        with cluster(trial, 1) as there:
            client = trial.start("-c", HASTY, *command, "--scheduler", there.address)
            trial.until(lambda there=there: runs_in(there.folder))
            there.workers[0].send_signal(sent)
            begun = time.monotonic()
            ended = trial.end(client, seconds=90)
            told.append(f"{sent.name}: after {time.monotonic() - begun:.0f} s")
        assert ended.code == 1, ended.said
        assert words in ended.said, ended.said
        assert "Traceback" not in ended.said, ended.said
        assert running_in(output) == []
    return f"ended with words; {', '.join(told)}"
