"""Files that exist whole or not at all. The project writes every result of a run this way."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path


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
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # NamedTemporaryFile makes private files
        temporary.replace(path)
    except OSError as error:
        todo = "free some space" if error.errno == errno.ENOSPC else "choose a folder you can write to"
        todo += f" ({advice})" if advice else ""
        raise OSError(error.errno, f"could not write {path}: {error.strerror}. To go on, {todo}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def message_of(error: Exception) -> str:
    """Return the text of an error, for a user.

    Args:
        error: any. The text of our own OSErrors is their ``strerror``; those of Python also need the file's name.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error) or type(error).__name__
