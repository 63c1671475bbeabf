"""One writer per folder. A lock belongs to a process and ends with it, also when it is killed."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".fwdlib-lock"
HOLDER = ".fwdlib-lock-holder.txt"
MADE = ".made-"  # begins the name of a temporary folder until it has its lock
MAKING = 60  # seconds after which a folder that has no lock yet is that of a dead process


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
def temporary_folder(parent: Path, kind: str, label: str = "") -> Iterator[Path]:
    """Make a folder that this process holds for the duration of a ``with`` block, and remove it then.

    If the process is killed, :func:`remove_leftovers` removes it.

    Args:
        parent: an existing folder.
        kind: begins the folder's name, ``.<kind>-<host>-<label>...``.
        label: the rest of its name, to tell it from others.
    """
    made = Path(tempfile.mkdtemp(prefix=f"{MADE}{kind}-{socket.gethostname()}-{label}-", dir=parent))
    with held(made):
        folder = made.rename(made.with_name(made.name.replace(MADE, ".", 1)))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, kind: str, remove: Callable[[Path], object] = shutil.rmtree) -> None:
    """Remove the temporary folders of one kind whose processes were killed.

    A living process holds a lock in each, whatever its number and wherever it runs. Folders of other machines stay, as
    a lock on a shared disk may not reach so far.

    Args:
        parent: of the folders.
        kind: of the folders.
        remove: removes one.
    """
    name, now = f"{kind}-{socket.gethostname()}-*", time.time()
    for folder in [*parent.glob(f".{name}"), *parent.glob(f"{MADE}{name}")]:
        with suppress(OSError):  # in use, or its own process renames or removes it at this moment
            if folder.name.startswith(MADE) and now - folder.stat().st_mtime < MAKING:
                continue
            with held(folder):
                remove(folder)
