"""A Dask cluster as the place where a batch runs: the same jobs, each on whatever worker is free.

The loop of :mod:`fwdlib.runs.batch` stays the only one that writes results. A job travels as the notebook's text; the Dask
worker that gets it starts the very process that a batch starts here, watches it, and sends back the folder that it
left. So a notebook never runs in a Dask worker itself, and dies with it: the pipe between the two closes.

Whatever becomes of the client, a worker notices at its own end: a job that nobody waits for any more is ended. A job
whose worker died is given to another by the scheduler, as often as its ``allowed-failures`` has it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
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

from fwdlib.runs import batch
from fwdlib.runs.batch import Job, PlaceError, Worker

CONNECT_SECONDS = 10
PING_SECONDS = 2
SILENCE_SECONDS = 20  # without an answer, and the scheduler counts as gone
# By name, so that the scheduler, through which it all passes, can do without fwdlib.
CALL = "__import__('fwdlib.runs.cluster', fromlist=['run']).run(order)"
Order = dict[str, Any]

# --- the client's side -----------------------------------------------------------------------------------------------


class Cluster:
    """A Dask cluster, for :func:`fwdlib.runs.batch.run_batch`; a context manager, because it holds a connection.

    Args:
        scheduler: its address, ``"tcp://host:port"`` or ``"tls://host:port"``; the certificates for TLS are those of
            Dask's own configuration.

    Raises:
        PlaceError: if there is no scheduler at that address, or none that talks to us.
    """

    num_jobs, stagger = None, 0.0  # the scheduler has the queue, by which a cluster that can grow knows that it should

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
        self.sent: dict[str, _Remote] = {}
        self.client.subscribe_topic(self._name, self._on_start)
        self._pings = asyncio.run_coroutine_threadsafe(self._ping(), self.client.loop.asyncio_loop)
        threads = self.client.nthreads().values()
        size = f"{len(threads)} workers, {sum(threads)} threads" if threads else "no worker yet; the jobs wait for one"
        self.news.append(f"cluster  {scheduler}: {size}")

    def __enter__(self) -> Cluster:
        """Return the cluster."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the connection up; what still runs for it is ended by the workers."""
        self._pings.cancel()
        if self._is_gone():  # we have said so, or shall; Dask would add the traceback of its attempts to get it back
            logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        # What a close that takes too long leaves behind would be told by asyncio, after our last words.
        self.client.loop.asyncio_loop.set_exception_handler(lambda *_: None)
        with suppress(TimeoutError):
            self.client.close(timeout=5)

    def start(self, job: Job, results: Path, timeout: float, one_thread: bool, slot: int, progress: bool) -> Worker:
        """Send a job. On a cluster each has one thread; and there is one bar, that of all jobs."""
        if self._state is None:
            from fwdlib import data

            self._state = _code_state() | {"data": data.lacking()}
        remote = _Remote(job, results, slot, self.scheduler)
        self.sent[job.name] = remote
        # Under one name and with numbers, Dask takes the jobs for a group, and holds back those that cannot run yet.
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
        """Find out whether the scheduler is still there.

        Raises:
            PlaceError: if it is not.
        """
        if self._is_gone():
            raise PlaceError(GONE.format(self.scheduler))

    def _is_gone(self) -> bool:
        return self.client.status != "running" or time.monotonic() - self._heard > SILENCE_SECONDS

    async def _ping(self) -> None:
        # A connection that breaks is noticed by itself; this is for a scheduler that hangs, or a network that is cut.
        while True:
            with suppress(OSError):  # once is no silence
                await self.client.scheduler.identity(n_workers=0)
                self._heard = time.monotonic()
            await asyncio.sleep(PING_SECONDS)

    def _on_start(self, event: tuple[float, dict[str, str]]) -> None:
        remote, worker = self.sent[event[1]["job"]], event[1]["name"]
        if remote.where:
            self.news.append(f"again    {remote.job.name} on {worker}; it was lost{remote.where}")
        else:
            self.news.append(f"started  {remote.job.name} ({remote.num_cells} cells) on {worker}")
        remote.where = f" on {worker}"


async def _greet(scheduler: str) -> None:
    # Dask's Client waits for ever for one that takes a connection and says nothing. One that failed leaves a thread
    # behind, and when it is collected while another starts, it waits for the lock that the other holds, and both hang.
    args = distributed.Security().get_connection_args("client")
    connection = distributed.comm.connect(scheduler, timeout=CONNECT_SECONDS, **args)
    await (await asyncio.wait_for(connection, CONNECT_SECONDS)).close()


class _Remote(Worker):
    """A run on a worker of the cluster; its folder fills at once, when the answer is here."""

    future: Future[dict[str, Any]]

    def __init__(self, job: Job, results: Path, slot: int, scheduler: str) -> None:
        super().__init__(job, results, slot)
        self.scheduler = scheduler
        self.staging.mkdir()

    def has_ended(self) -> bool:
        """Tell whether an answer is here; if so, unpack it.

        Raises:
            PlaceError: if the scheduler is gone, or has a worker that cannot run our jobs.
        """
        if not self.future.done():
            return False
        if self.future.cancelled():  # not by us
            raise PlaceError(GONE.format(self.scheduler))
        error = self.future.exception()
        if isinstance(error, ImportError):
            raise PlaceError(f"a worker of {self.scheduler} lacks what a job needs: {error}. {ADVICE}")
        if error:
            self.is_lost = isinstance(error, distributed.KilledWorker)
            lost = f"lost: each of {error.allowed_failures + 1} workers that had it died" if self.is_lost else ""
            text = lost or f"its worker could not run it: {type(error).__name__}: {error}"
            for name, content in {"log.txt": "", "error.txt": text}.items():
                (self.folder / name).write_text(content, encoding="utf-8")
            return True
        answer = self.future.result()
        if "refused" in answer:
            raise PlaceError(f"worker {answer['worker']} is not like this machine: {answer['refused']}. {ADVICE}")
        self._unpack(**answer)
        return True

    def _unpack(self, worker: str, seconds: float, status: int, folder: str, files: dict[str, bytes]) -> None:
        self.where, self.status, self.start = f" on {worker}", status, time.monotonic() - seconds
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        copy = self.folder / "copy.ipynb"
        if copy.is_file():  # it names its files where they were on the worker
            text = copy.read_text(encoding="utf-8")
            for old, new in ((f"{folder}/notebook.ipynb", self.job.notebook), (folder, self.folder)):
                text = text.replace(*(json.dumps(str(path), ensure_ascii=False)[1:-1] for path in (old, new)))
            copy.write_text(text, encoding="utf-8")

    def remove(self) -> None:
        """Take the job back if it has not ended, and remove the folder."""
        self.future.cancel()
        super().remove()


NO_DATA = "it has no {} (if this machine alone could download that: set FWDLIB_OFFLINE=1 here)"
GONE = (
    "the Dask scheduler at {} is gone. Everything finished so far is kept; when it is back, the same command runs what "
    "is missing"
)
ADVICE = (
    "Install there the wheel and the versions that are here, point FWDLIB_DATA to the same data, or take the worker "
    "away. What was finished is kept; the same command goes on"
)


def _without_outputs(notebook: Path) -> str:
    # papermill clears them anyhow, and they are most of the file.
    content = nbformat.read(notebook, 4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(content)


def _variables() -> dict[str, str]:
    """What the user has set for this batch and not for a machine."""
    offline = {"FWDLIB_OFFLINE": "1"} if os.environ.get("FWDLIB_OFFLINE", "") not in ("", "0") else {}
    return {"FWDLIB_QUICK": os.environ.get("FWDLIB_QUICK", "")} | offline


# --- the worker's side -----------------------------------------------------------------------------------------------

_STARTING = threading.Lock()  # the jobs of a worker with several threads start one after the other


def run(order: Order) -> dict[str, Any]:
    """Run a job on the Dask worker that this is called on, and return what it left, or why it is refused.

    Args:
        order: that :class:`Cluster` has sent.

    Raises:
        RuntimeError: if nobody waits for it any more; nobody sees this.
    """
    worker = distributed.get_worker()
    key, name = worker.get_current_task(), str(worker.name)
    with _STARTING:
        if refused := _difference(order["state"], order["variables"]):
            return {"worker": name, "refused": refused}
        time.sleep(batch.STAGGER)
    worker.log_event(order["topic"], {"job": order["name"], "name": name})
    with tempfile.TemporaryDirectory(prefix="fwdlib-", dir=worker.local_directory, ignore_cleanup_errors=True) as path:
        folder, begun = Path(path).resolve(), time.monotonic()
        notebook = folder / "notebook.ipynb"
        notebook.write_text(order["notebook"], encoding="utf-8")
        how = {"timeout": order["timeout"], "one_thread": True, "variables": order["variables"]}
        process = batch.start_process(folder, notebook, order["parameters"], **how)
        try:
            while process.poll() is None:
                task = worker.state.tasks.get(key)
                if task is None or task.state == "cancelled" or worker.status.name in ("closing", "closed", "failed"):
                    raise RuntimeError(f"{order['name']} was given up by its client, or this worker is closing")
                time.sleep(0.1)
        finally:
            batch.end_process(process)
        left = [folder / kept for kept in ("copy.ipynb", "log.txt", "error.txt")]
        left += [path for path in sorted((folder / "results").rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in left if path.is_file()}
        seconds = time.monotonic() - begun
    return {"worker": name, "seconds": seconds, "status": process.returncode, "folder": str(folder), "files": files}


def _code_state() -> dict[str, Any]:
    versions = {"Python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    return {"code": batch.sources(), "versions": versions}


def _difference(wanted: dict[str, Any], variables: dict[str, str]) -> str:
    """Return in what this worker differs from the client so that results could, too; empty if in nothing."""
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
    if not texts:  # only then is there a fwdlib that can be asked
        lacking = set(_lacking_data(tuple(variables.items())))
        missing, surplus = sorted(lacking - {*wanted["data"]}), sorted({*wanted["data"]} - lacking)
        texts += [NO_DATA.format(", ".join(missing))] if missing else []
        texts += [f"it has {', '.join(surplus)}, which this machine has not"] if surplus else []
        if texts:
            _lacking_data.cache_clear()  # somebody will mend it
    return "; ".join(texts)


@functools.cache
def _lacking_data(variables: tuple[tuple[str, str], ...]) -> list[str]:
    # In a process of its own: a Dask worker has no use for torch.
    code = "import json; from fwdlib import data; print(json.dumps(data.lacking()))"
    environment = os.environ | dict(variables)
    asked = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(asked.stdout.splitlines()[-1])
