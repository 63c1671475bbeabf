"""A Dask cluster as the place where a batch runs: the same jobs, each on a worker that is free.

Only the loop of :mod:`fwdlib.runs.batch`, in the client, writes results. It sends the text of the notebook. The Dask
worker starts the same process for it that a batch starts here, watches it, and sends back the files. So a notebook
never runs inside a Dask worker, but its process ends with the worker: see :mod:`fwdlib.children`.

A worker ends a job that nobody waits for any more, whatever happened to the client. If a worker dies, the scheduler
gives its job to another one, at most ``allowed-failures`` times (a setting of Dask).
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
import logging
import math
import os
import platform
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import distributed
import nbformat

from fwdlib import children
from fwdlib.runs import notebook, stamps
from fwdlib.runs.jobs import Job
from fwdlib.runs.places import STAGGER, PlaceError, RunningJob, replace_paths

CONNECT_SECONDS = 10
PING_SECONDS = 2
SILENCE_SECONDS = 20  # without an answer; then the scheduler counts as gone
DESERTED_SECONDS = 120  # without a worker, where there were some; then they count as gone
# As text, so that the scheduler, which forwards it, needs no fwdlib.
CALL = "__import__('fwdlib.runs.cluster', fromlist=['run']).run(order)"
Order = dict[str, Any]

# --- the client's side -----------------------------------------------------------------------------------------------


class Cluster:
    """A Dask cluster, for :func:`fwdlib.runs.batch.run_batch`; a context manager, because it holds a connection.

    Args:
        scheduler: its address, ``"tcp://host:port"`` or ``"tls://host:port"``. Dask's own configuration names the
            certificates for TLS.

    Raises:
        PlaceError: if no scheduler answers at that address.
    """

    num_jobs, stagger = None, 0.0  # all jobs wait at the scheduler: a cluster that can grow does so by its queue

    def __init__(self, scheduler: str) -> None:
        self.scheduler, self.news = scheduler, deque()
        try:
            asyncio.run(_greet(scheduler))
            self.client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False, name="fwdlib")
        except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last two: TLS without certificates
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise PlaceError(
                f"no Dask scheduler answers at {scheduler} ({reason}). Is the address right, can this machine reach "
                f"it, and does it speak {'TLS, with certificates that fit' if 'tls://' in scheduler else 'plain TCP'}? "
                f"To start one here: dask scheduler --host 127.0.0.1 --dashboard-address 127.0.0.1:8787"
            ) from error
        self._executor = self.client.get_executor(pure=False)
        self._name = f"fwdlib-{uuid.uuid4().hex[:8]}"
        self._num_sent, self._heard, self._state = 0, time.monotonic(), None
        self._seen = math.inf  # when there was a worker last; one that never had any may take as long as it likes
        self.sent: dict[str, RemoteJob] = {}
        self.client.subscribe_topic(self._name, self._on_start)
        self._pings = asyncio.run_coroutine_threadsafe(self._ping(), self.client.loop.asyncio_loop)
        threads = self.client.nthreads().values()
        size = f"{len(threads)} workers, {sum(threads)} threads" if threads else "no worker yet; the jobs wait for one"
        self.news.append(f"cluster  {scheduler}: {size}")

    def __enter__(self) -> Cluster:
        """Return the cluster itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection; the workers end the jobs that still run for it."""
        self._pings.cancel()
        if self._is_gone():  # the user is told so; Dask would add the traceback of its attempts to connect again
            logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        # If closing takes too long, asyncio would report unfinished tasks after our own last line.
        self.client.loop.asyncio_loop.set_exception_handler(lambda *_: None)
        with suppress(TimeoutError):
            self.client.close(timeout=5)

    def start(self, job: Job, results: Path, timeout: float, one_thread: bool, slot: int, progress: bool) -> RunningJob:
        """Send a job. On a cluster each job has one thread, and there is one bar for all jobs."""
        if self._state is None:
            from fwdlib import data

            self._state = _code_state() | {"data": data.lacking()}
        remote = RemoteJob(job, results, timeout, slot, self.scheduler)
        self.sent[job.name] = remote
        # With one name and a number each, Dask treats the jobs as a group and holds back those that cannot run yet.
        key, self._num_sent = (self._name, self._num_sent), self._num_sent + 1
        order = {
            "name": job.name,
            "notebook": _without_outputs(job.notebook),
            "parameters": job.parameters,
            "timeout": timeout,
            "state": self._state,
            "variables": _variables(),
            "topic": self._name,
        }
        remote.future = self._executor.submit(eval, CALL, {"order": order}, key=key)
        return remote

    def check(self) -> None:
        """Check that the scheduler is still there.

        Raises:
            PlaceError: if it is gone, or all its workers are and do not come back.
        """
        if self._is_gone():
            raise PlaceError(GONE.format(self.scheduler))
        if (seconds := time.monotonic() - self._seen) > DESERTED_SECONDS:
            raise PlaceError(DESERTED.format(self.scheduler, seconds))

    def _is_gone(self) -> bool:
        return self.client.status != "running" or time.monotonic() - self._heard > SILENCE_SECONDS

    async def _ping(self) -> None:
        # Dask notices a broken connection; this notices a scheduler that hangs and a network that is cut.
        while True:
            with suppress(OSError):  # a single failure does not matter
                about = await self.client.scheduler.identity(n_workers=1)
                self._heard = time.monotonic()
                if about["workers"]:
                    self._seen = self._heard
            await asyncio.sleep(PING_SECONDS)

    def _on_start(self, event: tuple[float, dict[str, str]]) -> None:
        remote, worker = self.sent[event[1]["job"]], event[1]["name"]
        if remote.where:
            self.news.append(f"again    {remote.job.name} on {worker}; it was lost{remote.where}")
        else:
            self.news.append(f"started  {remote.job.name} ({remote.num_cells} cells) on {worker}")
        remote.where, remote.begun = f" on {worker}", time.monotonic()


async def _greet(scheduler: str) -> None:
    # Dask's Client waits for ever for a server that accepts a connection and says nothing. And a Client that failed
    # leaves a thread behind: if it is garbage-collected while another Client starts, both wait for one lock and hang.
    args = distributed.Security().get_connection_args("client")
    connection = distributed.comm.connect(scheduler, timeout=CONNECT_SECONDS, **args)
    await (await asyncio.wait_for(connection, CONNECT_SECONDS)).close()


class RemoteJob(RunningJob):
    """A job on a worker of the cluster; its folder fills when the answer comes."""

    future: Future[dict[str, Any]]

    def __init__(self, job: Job, results: Path, timeout: float, slot: int, scheduler: str) -> None:
        super().__init__(job, results, timeout, slot)
        self.scheduler = scheduler
        self.staging.mkdir()

    def has_ended(self) -> bool:
        """Tell whether the answer has come, and unpack it.

        Raises:
            PlaceError: if the scheduler is gone, or a worker cannot run our jobs.
        """
        if not self.future.done():
            is_overdue = bool(self.where) and time.monotonic() - self.begun > self.timeout + 2 * notebook.OVERDUE
            if is_overdue:  # a worker that does not hang would have ended it
                self._fail(notebook.HANGS.format(self.timeout))
            return is_overdue
        if self.future.cancelled():  # not by us
            raise PlaceError(GONE.format(self.scheduler))
        error = self.future.exception()
        if isinstance(error, ImportError):
            raise PlaceError(f"a worker of {self.scheduler} lacks a package that a job needs: {error}. {ADVICE}")
        if error:
            self.is_lost = isinstance(error, distributed.KilledWorker)
            lost = f"lost: each of {error.allowed_failures + 1} workers that had it died" if self.is_lost else ""
            self._fail(lost or f"its worker could not run it: {type(error).__name__}: {error}")
            return True
        answer = self.future.result()
        if "refused" in answer:
            raise PlaceError(f"worker {answer['worker']} is not like this machine: {answer['refused']}. {ADVICE}")
        self._unpack(**answer)
        return True

    def _fail(self, text: str) -> None:
        for name, content in {"log.txt": "", "error.txt": text}.items():
            (self.folder / name).write_text(content, encoding="utf-8")

    def _unpack(self, worker: str, seconds: float, status: int, folder: str, files: dict[str, bytes]) -> None:
        self.where, self.status, self.begun = f" on {worker}", status, time.monotonic() - seconds
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        copy = self.folder / "copy.ipynb"
        if copy.is_file():  # it has the paths of the worker
            paths = {f"{folder}/notebook.ipynb": self.job.notebook, folder: self.folder}
            copy.write_text(replace_paths(copy, paths), encoding="utf-8")

    def remove(self) -> None:
        """Cancel the job if it has not ended, and remove the folder."""
        self.future.cancel()
        super().remove()


NO_DATA = "it has no {} (if only this machine can download that, set FWDLIB_OFFLINE=1 here)"
GONE = (
    "the Dask scheduler at {} is gone. Everything finished so far is kept; when the scheduler is back, the same "
    "command runs what is missing"
)
DESERTED = (
    "the Dask scheduler at {} has had no worker for {:.0f} s. Everything finished so far is kept; when there are "
    "workers again, the same command runs what is missing"
)
ADVICE = (
    "Install the wheel and the versions of this machine there, point FWDLIB_DATA to the same data, or remove the "
    "worker. Everything finished so far is kept; the same command goes on"
)


def _without_outputs(path: Path) -> str:
    # papermill clears the outputs anyway, and they are most of the file.
    content = nbformat.read(path, 4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(content)


def _variables() -> dict[str, str]:
    """Return the variables that the user has set for this batch, not for a machine."""
    offline = {"FWDLIB_OFFLINE": "1"} if os.environ.get("FWDLIB_OFFLINE", "") not in ("", "0") else {}
    return {"FWDLIB_QUICK": os.environ.get("FWDLIB_QUICK", "")} | offline


# --- the worker's side -----------------------------------------------------------------------------------------------

_STARTING = threading.Lock()  # the jobs of a worker with several threads start one after the other


def run(order: Order) -> dict[str, Any]:
    """Run a job on this Dask worker, and return its files, or why the worker refuses it.

    Raises:
        RuntimeError: if nobody waits for the job any more. Nobody sees this error.
    """
    worker = distributed.get_worker()
    key, name = worker.get_current_task(), str(worker.name)
    with _STARTING:
        if refused := _difference(order["state"], order["variables"]):
            return {"worker": name, "refused": refused}
        time.sleep(STAGGER)
    worker.log_event(order["topic"], {"job": order["name"], "name": name})
    with tempfile.TemporaryDirectory(prefix="fwdlib-", dir=worker.local_directory, ignore_cleanup_errors=True) as made:
        folder, begun = Path(made).resolve(), time.monotonic()
        path = folder / "notebook.ipynb"
        path.write_text(order["notebook"], encoding="utf-8")
        how = {"timeout": order["timeout"], "one_thread": True, "variables": order["variables"]}
        process = notebook.start(folder, path, order["parameters"], **how)
        try:
            while process.poll() is None:
                task = worker.state.tasks.get(key)
                if task is None or task.state == "cancelled" or worker.status.name in ("closing", "closed", "failed"):
                    raise RuntimeError(f"the client gave up {order['name']}, or this worker is closing")
                notebook.end_overdue(process, folder, order["timeout"], begun)
                time.sleep(0.1)
        finally:
            children.end(process)
            notebook.discard_temporary(folder)
        left = [folder / kept for kept in ("copy.ipynb", "log.txt", "error.txt")]
        left += [path for path in sorted((folder / "results").rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in left if path.is_file()}
        seconds = time.monotonic() - begun
    return {"worker": name, "seconds": seconds, "status": process.returncode, "folder": str(folder), "files": files}


def _code_state() -> dict[str, Any]:
    versions = {"Python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    return {"code": stamps.sources(), "versions": versions}


def _difference(wanted: dict[str, Any], variables: dict[str, str]) -> str:
    """Return how this worker differs from the client in what could change results; empty if it does not."""
    here = _code_state()
    texts = [
        f"{name} is {here['versions'][name]} there and {version} here"
        for name, version in wanted["versions"].items()
        if here["versions"][name] != version
    ]
    code, others = here["code"], wanted["code"]
    if changed := sorted(path for path in code.keys() | others.keys() if code.get(path) != others.get(path)):
        more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        texts.append(f"its fwdlib is another ({changed[0]}{more})")
    if not texts:  # only the same fwdlib can be asked about its data
        lacking = set(_lacking_data(tuple(variables.items())))
        missing, surplus = sorted(lacking - {*wanted["data"]}), sorted({*wanted["data"]} - lacking)
        texts += [NO_DATA.format(", ".join(missing))] if missing else []
        texts += [f"it has {', '.join(surplus)}, which this machine has not"] if surplus else []
        if texts:
            _lacking_data.cache_clear()  # ask again next time: somebody may have added it
    return "; ".join(texts)


@functools.cache
def _lacking_data(variables: tuple[tuple[str, str], ...]) -> list[str]:
    # In a process of its own: a Dask worker needs no torch.
    code = "import json; from fwdlib import data; print(json.dumps(data.lacking()))"
    asked = children.run([sys.executable, "-c", code], environment=os.environ | dict(variables))
    if asked.returncode:
        raise RuntimeError(f"looking for data sets failed: {asked.stderr.strip()}")
    return json.loads(asked.stdout.splitlines()[-1])
