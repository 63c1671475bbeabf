"""Files that exist whole or not at all. The project writes every result of a run this way."""

from __future__ import annotations

import errno
import glob
import json
import os
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

WRITING = 3600  # seconds that nobody needs to write a file
FULL = (errno.ENOSPC, errno.EDQUOT)
OF_THE_DISK = (*FULL, errno.EFBIG, errno.EROFS, errno.EIO)  # Python does not say at which file they occurred


def write_bytes(path: Path, content: bytes | memoryview, advice: str = "") -> None:
    """Write ``content`` to a temporary file beside ``path``, and move it into place once it is safely on the disk.

    Args:
        path: of the file; its folder is made if needed.
        content: its new content.
        advice: added to the message of an error, in brackets.

    Raises:
        OSError: if that fails; the message names the file and says what to do. The old file is left in place, and no
            temporary file remains.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path.parent, path.name, content, path)
    except OSError as error:
        _fail(error, path, advice)


def check_writable(path: Path) -> None:
    """Try whether a file could be written, and leave nothing behind. A long command calls it before it begins.

    Args:
        path: of the file. Neither it nor its folder need exist.

    Raises:
        OSError: if it cannot be written; the message names the file and says what to do.
    """
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        _write(folder, path.name, b"tried")
    except OSError as error:
        _fail(error, path)


def _write(folder: Path, name: str, content: bytes | memoryview, target: Path | None = None) -> None:
    # Write a temporary file; move it to ``target``, or remove it.
    for left in folder.glob(f".{glob.escape(name)}.*.part") if target else ():
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > WRITING:  # of a process that was killed while it wrote
                left.unlink()
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target:
            temporary.chmod(0o644)  # NamedTemporaryFile makes private files
            temporary.replace(target)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_own(folder: Path, names: Iterable[str], mark: str, keys: Collection[str] = ()) -> None:
    """Check that none of the files that a command is to write belongs to somebody else.

    Args:
        folder: of the files; it need not exist.
        names: of the files, or of folders of files.
        mark: name of a file that is in the folder if an earlier command has written there.
        keys: what the mark has, if it is a JSON file that somebody else may have, too.

    Raises:
        FileExistsError: if a file is there, and no mark.
    """
    strange = [name for name in names if os.path.lexists(folder / name)]
    if strange and not _is_marked(folder / mark, keys):
        raise FileExistsError(
            f"{folder} has files that no such command has written, where this one writes its own: "
            f"{', '.join(strange)}. Move them away, or name another place"
        )


def _is_marked(mark: Path, keys: Collection[str]) -> bool:
    try:
        return mark.is_file() and (not keys or set(keys) <= set(json.loads(mark.read_text(encoding="utf-8"))))
    except (ValueError, TypeError):  # no JSON, or a number
        return False


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Let errors of the disk in a ``with`` block name the folder that the block writes to.

    Raises:
        OSError: in place of one that names no file, such as that of a full disk.
    """
    try:
        yield
    except OSError as error:
        is_nameless = error.filename is None and error.errno in OF_THE_DISK
        if is_nameless and error.strerror == os.strerror(error.errno):  # not one of ours, which name their file
            _fail(error, folder)
        raise


def _fail(error: OSError, path: Path, advice: str = "") -> NoReturn:
    todo = "free some space" if error.errno in FULL else "choose a folder you can write to"
    todo += f" ({advice})" if advice else ""
    raise OSError(error.errno, f"could not write {path}: {error.strerror}. To go on, {todo}") from error


def message_of(error: Exception) -> str:
    """Return the text of an error, for a user.

    Args:
        error: any. The text of our own OSErrors is their ``strerror``; those of Python also need the file's name.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error) or type(error).__name__
