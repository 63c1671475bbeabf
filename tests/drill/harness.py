"""Items of the drill, how one is tried, and what is counted after each: nothing of it may be left."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
MARK = "FWDLIB_DRILL"  # environment variable of all processes of an item, inherited by whatever they start
PATIENCE = 10.0  # seconds that processes get to end after an item
RESTS = re.compile(r"\.part$|^\.running-|^\.made-|^\.download-")  # the project's own unfinished files and folders
KEPT = ("torchelastic_", "torchinductor_", "dask-scratch-space")  # what torch and Dask leave in the temporary folder
KINDS = {  # the sections of the page
    "whole": "What is atomic",
    "yours": "Whose files are touched",
    "locked": "What is locked",
    "ends": "What ends, and when",
    "said": "What is never silent",
    "listens": "What listens where",
    "executed": "What is executed",
    "trusted": "What is trusted",
}


class Skipped(Exception):
    """This machine does not permit what an item needs; the text says what."""


class Item(NamedTuple):
    """One fault, and the promise that it tries."""

    kind: str
    promise: str
    short: bool
    work: Callable[[Trial], str]

    @property
    def name(self) -> str:
        return self.work.__name__

    @property
    def done(self) -> str:
        return " ".join(self.work.__doc__.split()).removesuffix(".")


ITEMS: dict[str, Item] = {}


def item(kind: str, promise: str, *, short: bool = False) -> Callable[[Callable[[Trial], str]], Callable[[Trial], str]]:
    """Make a function an item of the drill.

    Args:
        kind: one of KINDS.
        promise: what is expected, in a sentence for the page.
        short: whether it belongs to the short form.
    """

    def register(work: Callable[[Trial], str]) -> Callable[[Trial], str]:
        assert kind in KINDS
        same = ITEMS.get(work.__name__)  # pytest imports a module twice, under two names
        assert not same or same.work.__code__ == work.__code__, f"two items are called {work.__name__}"
        ITEMS[work.__name__] = Item(kind, promise, short, work)
        return work

    return register


class Ended(NamedTuple):
    """A process that has ended: its code, and all that it has printed."""

    code: int
    said: str


@dataclass
class Trial:
    """One try of an item: a folder, moments drawn from a seed, and processes that can all be found again."""

    folder: Path
    moments: random.Random
    short: bool = False
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[tuple[subprocess.Popen, Path]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Return an environment with quick settings, no data, no network, and folders of this item alone."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("FWDLIB_")}
        ours |= {MARK: self.mark, "TMPDIR": str(self.temporary), "PYTHONPATH": f"{light(self.folder.parent)}:{ROOT}"}
        ours |= {"FWDLIB_QUICK": "1", "FWDLIB_OFFLINE": "1", "FWDLIB_CACHE": str(self.folder / "cache")}
        ours |= {"FWDLIB_RESULTS": str(self.folder / "default"), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        ours |= {"TORCHINDUCTOR_CACHE_DIR": str(self.folder.parent / "compiled")}  # outlives a process on purpose
        return {name: value for name, value in (ours | changes).items() if value is not None}

    def start(self, *words: object, before: tuple[object, ...] = (), **changes: str | None) -> subprocess.Popen:
        """Start ``python WORDS`` in a session of its own, so that a signal reaches it alone.

        Args:
            words: after ``python``.
            before: a program that starts it, with its arguments.
            changes: of the environment.
        """
        log = self.folder / f"log-{len(self.started)}.txt"
        command = [*map(str, before), sys.executable, *map(str, words)]
        with log.open("w") as stream:
            options = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream, "start_new_session": True}
            options |= {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment(**changes), **options)
        self.started.append((process, log))
        return process

    def end(self, process: subprocess.Popen, sent: signal.Signals | None = None, seconds: float = 120) -> Ended:
        """Wait for a process, after a signal if one is given.

        Raises:
            AssertionError: if it does not end in time.
        """
        if sent is not None:
            process.send_signal(sent)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s: {self.said(process)[-300:]}") from None
        return Ended(code, self.said(process))

    def said(self, process: subprocess.Popen) -> str:
        """Return what a process has printed so far."""
        return dict(self.started)[process].read_text(errors="replace")

    def run(self, *words: object, code: int | None = 0, seconds: float = 120, **options: str | None) -> Ended:
        """Run ``python WORDS`` to its end.

        Raises:
            AssertionError: if it ends with another code than ``code``, or prints a traceback.
        """
        ended = self.end(self.start(*words, **options), seconds=seconds)
        assert code is None or ended.code == code, f"exit code {ended.code}, not {code}: {ended.said[-800:]}"
        assert "Traceback" not in ended.said, f"a traceback: {ended.said[-800:]}"
        return ended

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait until a condition is true.

        Raises:
            AssertionError: if that takes longer, or all processes of the item have ended before.
        """
        ended = lambda: self.started and all(process.poll() is not None for process, _ in self.started)  # noqa: E731
        wait_until(lambda: condition() or ended(), seconds)
        if not wait_until(condition, min(seconds, 20)):
            said = "; ".join(log.read_text(errors="replace")[-300:] for _, log in self.started)
            raise AssertionError(f"waited {seconds:.0f} s in vain; the processes said: {said}")

    def pause(self, low: float, high: float) -> float:
        """Sleep for a random time; return the seconds."""
        seconds = self.moments.uniform(low, high)
        time.sleep(seconds)
        return seconds

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of this item, also those whose parents are dead."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def all_end(self, seconds: float = 5) -> float:
        """Wait until no process of this item runs; return the seconds.

        Raises:
            AssertionError: if that takes longer.
        """
        begun = time.monotonic()
        if not wait_until(lambda: not self.processes(), seconds):
            raise AssertionError(f"still running after {seconds:.0f} s: {', '.join(map(_name, self.processes()))}")
        return time.monotonic() - begun

    def give_up(self, folder: Path) -> None:
        """Remove the folder of a command that was killed and is not started again, which would remove what it left."""
        shutil.rmtree(folder, ignore_errors=True)

    def rests(self) -> list[str]:
        """End what still runs, and return what the item has left: processes, temporary and half-finished files."""
        wait_until(lambda: not self.processes(), PATIENCE)
        left = [f"process {_name(process)}" for process in self.processes()]
        while running := self.processes():
            for process in running:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
        for process, _ in self.started:
            process.wait()
        temporary = [path.name for path in self.temporary.iterdir() if not path.name.startswith(KEPT)]
        left += [f"temporary {name}" for name in temporary]
        left += [f"unfinished {path.name}" for path in self.folder.rglob("*") if RESTS.search(path.name)]
        return left


def light(folder: Path) -> Path:
    """Return a folder with a module that spares each kernel the 1.7 s in which jsonschema builds a grammar for URLs."""
    place = folder / "light"
    place.mkdir(exist_ok=True)
    (place / "rfc3987_syntax.py").write_text("raise ImportError")
    return place


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} ({' '.join(process.cmdline())[:80]})"
    return f"{process.pid} (ended)"


class Verdict(NamedTuple):
    """How an item went."""

    state: str  # "ok", "FAILED" or "skipped"
    happened: str
    seconds: float


def attempt(chosen: Item, folder: Path, seed: int, short: bool) -> Verdict:
    """Try an item in a new folder, remove the folder, and count what is left."""
    before, begun = _own(), time.monotonic()
    folder.mkdir()
    trial = Trial(folder, random.Random(f"{seed} {chosen.name}"), short)
    state = "FAILED"
    try:
        happened = chosen.work(trial)
        state = "ok"
    except Skipped as reason:
        state, happened = "skipped", str(reason)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        happened = f"{type(error).__name__}: {str(error) or place.line} ({Path(place.filename).name}, {place.lineno})"
    finally:  # also after Ctrl-C
        left = trial.rests()
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        left.append("a folder that cannot be removed")
    if not wait_until(lambda: all(here <= there for here, there in zip(_own(), before, strict=True)), 5):
        left.append(f"file descriptors and threads {_own()}, before {before}")
    if left:
        state, happened = "FAILED", f"{happened}; LEFT: {', '.join(left)}"
    return Verdict(state, " ".join(happened.split()), time.monotonic() - begun)


def _own() -> tuple[int, int]:
    return psutil.Process().num_fds(), threading.active_count()


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder for the items, with a short path, as sockets in it must have one."""
    with tempfile.TemporaryDirectory(prefix="drill-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return all files of a folder with their modes and bytes, empty folders included."""
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Return the names at which two mappings differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
