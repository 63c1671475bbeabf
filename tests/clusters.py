"""A Dask cluster on this machine, and what runs and listens on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.processes import wait_until


def runs_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that run notebooks for the workers of the cluster in ``folder``, and their kernels."""
    place = str(folder / "dask-scratch-space")
    found = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [process for process, words in found if any(place in word for word in words)]


def listens_at(processes: list[psutil.Process]) -> set[str]:
    """Return the addresses at which the processes and all their children listen."""
    family = {child for process in processes for child in [process, *process.children(recursive=True)]}
    found = set()
    for each in family:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found |= {link.laddr.ip for link in each.net_connections() if link.status == "LISTEN"}
    return found


class Dask:
    """A scheduler and workers, each a process, with loopback as their only address."""

    def __init__(self, folder: Path, protocol: str = "tcp", **variables: str) -> None:
        self.folder, self.environment = folder, os.environ | {"FWDLIB_OFFLINE": "1"} | variables
        self.started: list[subprocess.Popen] = []
        file = folder / "scheduler.json"
        at = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--protocol", protocol]
        self.scheduler = self.start("scheduler", *at, "--scheduler-file", str(file))
        assert wait_until(lambda: file.is_file() and file.read_text().endswith("}"), 60)
        self.address = json.loads(file.read_text())["address"]
        assert self.address.startswith(f"{protocol}://127.0.0.1:")

    def start(self, *words: str) -> subprocess.Popen:
        log = (self.folder / f"log-{len(self.started)}.txt").open("w")
        with log:
            command = [sys.executable, "-m", "dask", *words]
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=self.folder)
        self.started.append(process)
        return process

    def restart_scheduler(self) -> None:
        self.scheduler.kill()
        self.scheduler.wait()
        host, port = self.address.rpartition("//")[2].split(":")
        self.scheduler = self.start("scheduler", "--host", host, "--port", port, "--dashboard-address", f"{host}:0")
        assert wait_until(lambda: listens_at([psutil.Process(self.scheduler.pid)]), 60)

    def worker(self, name: str, *words: str) -> subprocess.Popen:
        at = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--local-directory", str(self.folder)]
        return self.start("worker", self.address, *at, "--nthreads", "1", "--name", name, *words)

    def end(self) -> None:
        """Kill the scheduler and the workers; what runs for them ends by itself, or else is killed, too."""
        living = [psutil.Process(process.pid) for process in self.started if process.poll() is None]
        family = [each for process in living for each in process.children(recursive=True)]
        for process in self.started:
            process.kill()
            process.wait()
        wait_until(lambda: not runs_in(self.folder), 15)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@contextmanager
def dask(folder: Path, protocol: str = "tcp", **variables: str) -> Iterator[Dask]:
    there = Dask(folder, protocol, **variables)
    try:
        yield there
    finally:
        there.end()
