"""The folder that a build writes to: one build at a time, and no file is touched that a build has not written.

A list in the folder (``report-manifest.json``) names the files that builds have written there. Only these are replaced
or removed. Files move into place together, once all of them are made; if one cannot, all stay as they were.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fwdlib.atomic import check_writable, naming, write_bytes
from fwdlib.locks import held

MANIFEST = "report-manifest.json"
HIDDEN = ".report-build"  # holds the lock, its holder's name, and the files that are not yet in place


class OutputError(Exception):
    """A build may not write to a folder; the text says why and what to do."""


class Output:
    """A folder that this process may write to; :func:`hold` returns it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / HIDDEN / "files"
        """What :meth:`place` moves into the folder."""
        self.before = folder / HIDDEN / "before"

    def written(self) -> set[str]:
        """Return the files that builds have written here, relative to the folder.

        Raises:
            OutputError: if the list is damaged.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            return set()
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_inside(name) for name in names):
            raise OutputError(f"{path} is not a list of the files of a build; name another folder")
        return set(names)

    def claim(self, names: Iterable[str]) -> None:
        """Add files to the list, before they are written.

        Raises:
            OutputError: if one of them is there and no build has written it.
            OSError: if the list cannot be written.
        """
        written, names = self.written(), set(names)
        strange = [name for name in sorted(names - written) if os.path.lexists(self.folder / name)]
        if strange:
            raise OutputError(
                f"{self.folder} has files that no build has written, where this build writes its own: "
                f"{', '.join(strange)}. Move them away, or name another folder."
            )
        self._list(written | names)

    def place(self) -> None:
        """Move all files from ``scratch`` into the folder, or none.

        Files of earlier builds in the same subfolders are removed, if this build has not made them again.

        Raises:
            OutputError: if a file is in the way that no build has written.
            OSError: if a file cannot be moved.
        """
        names = {path.relative_to(self.scratch).as_posix() for path in self.scratch.rglob("*") if path.is_file()}
        self.claim(names)
        parents = {PurePosixPath(name).parent for name in names} - {PurePosixPath()}
        stale = {name for name in self.written() - names if PurePosixPath(name).parent in parents}
        copies = self.scratch.with_name("copies")
        replaced = [name for name in names | stale if (self.folder / name).is_file()]
        for name in replaced:
            (copies / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.folder / name, copies / name)
        if replaced:
            copies.rename(self.before)
        try:
            for name in names:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.scratch / name).replace(self.folder / name)
            for name in stale:
                (self.folder / name).unlink(missing_ok=True)
        except BaseException:  # Ctrl-C, too
            for name in names.difference(replaced):
                (self.folder / name).unlink(missing_ok=True)
            self.restore()
            raise
        shutil.rmtree(self.before, ignore_errors=True)
        self._list(self.written() - stale)

    def restore(self) -> None:
        """Put back the files that a :meth:`place` which did not end has replaced or removed; else do nothing."""
        for path in [path for path in self.before.rglob("*") if path.is_file()]:
            path.replace(self.folder / path.relative_to(self.before))

    def _list(self, names: set[str]) -> None:
        path = self.folder / MANIFEST
        if not path.is_file() or self.written() != names:
            write_bytes(path, f"{json.dumps(sorted(names), indent=1)}\n".encode())


@contextmanager
def hold(folder: Path) -> Iterator[Output]:
    """Keep other builds out of a folder while this one writes to it.

    Args:
        folder: a new or empty one, or one that builds have written to. It is made if it is not there.

    Yields:
        The folder.

    Raises:
        OutputError: if the folder has files and no list of a build.
        InUseError: if another build holds it.
        OSError: if the folder cannot be written to.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a folder; name another one")
    others = sorted({path.name for path in folder.iterdir()} - {HIDDEN}) if folder.is_dir() else []
    if others and not (folder / MANIFEST).is_file():
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise OutputError(f"{folder} has files that no build has written ({some}); name a new or an empty folder")
    check_writable(folder / MANIFEST)
    hidden = folder / HIDDEN
    hidden.mkdir(parents=True, exist_ok=True)
    with naming(folder), held(hidden, shown=folder):
        try:
            output = Output(folder)
            output.restore()  # after a build that was killed
            _clear(hidden)
            output.claim([])
            yield output
        finally:
            _clear(hidden)


def _clear(hidden: Path) -> None:
    for name in ("files", "copies", "before"):
        shutil.rmtree(hidden / name, ignore_errors=True)


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
