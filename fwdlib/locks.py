"""One writer per folder. A lock belongs to a process and ends with it, also when it is killed."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".fwdlib-lock"
HOLDER = ".fwdlib-lock-holder.txt"
MADE = ".made-"  # a temporary folder has this name until it has its lock


class InUseError(OSError):
    """Another process writes to the folder; the text says who, since when, and what to do."""


@contextmanager
def held(folder: Path, *, patience: float = 0, shown: Path | None = None) -> Iterator[None]:
    """Keep other processes out of a folder, for the duration of a ``with`` block.

    Args:
        folder: an existing one. The lock is a hidden file in it.
        patience: seconds to wait for another process to let go.
        shown: the folder that the message names. Default: ``folder``.

    Raises:
        InUseError: if another process holds the folder.
        OSError: if the folder cannot be written to.
    """
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=patience, poll_interval=0.1)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise InUseError(f"{shown or folder} is in use by {who}; wait for it to end, or name another folder") from None
    try:
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder that this process holds for the duration of a ``with`` block, and remove it then.

    If the process is killed, :func:`remove_leftovers` removes it.

    Args:
        parent: an existing folder.
        name: of the kind of folder: the new one is called ``.<name>-<host>-...``.
    """
    made = Path(tempfile.mkdtemp(prefix=f"{MADE}{name}-{socket.gethostname()}-", dir=parent))
    with held(made):
        folder = made.rename(made.with_name(made.name.replace(MADE, ".", 1)))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, name: str, remove: Callable[[Path], object] = shutil.rmtree) -> None:
    """Remove the temporary folders of processes that were killed.

    A living process holds a lock in each, whatever its number and wherever it runs. Folders of other machines stay, as
    a lock on a shared disk may not reach so far.

    Args:
        parent: of the folders.
        name: of their kind.
        remove: removes a folder.
    """
    for folder in parent.glob(f".{name}-{socket.gethostname()}-*"):
        with suppress(InUseError, FileNotFoundError), held(folder):
            remove(folder)
