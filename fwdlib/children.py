"""Child processes that never outlive their parent: the only place of the project that starts processes.

A child is the leader of a session of its own, so that Ctrl-C reaches the parent alone, which then decides. Its input is
the read end of a pipe, and only the parent holds the write end. The system closes that when the parent ends, for
whatever reason, SIGKILL included. A shell in the child's process group waits for this and kills the group.

It needs a POSIX shell: Linux or macOS. A descendant that starts a session of its own, as a Jupyter kernel does, is not
in the group: whoever starts it must end it, in the time that ``grace`` gives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# The shell starts a copy of itself that watches, then becomes the program: with its own process id $$, and the pipe as
# input. `read` returns when the pipe closes. $0 is the grace in tenths of a second. `kill -KILL 0` kills the group.
WATCH = 'read _; n=0; while [ $n -lt "$0" ] && kill -0 $$; do sleep 0.1; n=$((n + 1)); done; kill -KILL 0'
SCRIPT = f'exec 3<&0; {{ {WATCH}; }} <&3 >/dev/null 2>&1 & exec "$@" 3<&-'


class Child(subprocess.Popen):
    """A process made by :func:`start`. As a context manager, it ends when the block ends."""

    grace: float
    """Seconds between the end of the parent, or the call of :func:`end`, and SIGKILL."""

    def let_go(self) -> None:
        """Close the pipe; the child ends within its grace."""
        self._pipe.close()

    def __exit__(self, *error: Any) -> None:
        """End the process and close its streams."""
        end(self)
        super().__exit__(*error)


def start(
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    grace: float = 0,
    **popen: Any,
) -> Child:
    """Start a program that ends when this process ends, together with all processes of its group.

    Args:
        arguments: the program and its arguments.
        environment: all variables of the child. Default: those of this process.
        folder: the child's working folder. Default: that of this process.
        grace: seconds that the child gets to clean up before SIGKILL; it learns of them by :func:`when_parent_ends`.
        popen: further options of :class:`subprocess.Popen`, except ``stdin``, which is the pipe.

    Returns:
        The process. Call :func:`end` when it is no longer needed, even if the program itself has ended: processes that
        it left behind may still run.

    Example:
        >>> child = start(["sh", "-c", "sleep 60 & exit 3"])
        >>> child.wait()
        3
        >>> end(child)  # the sleeping process, too
    """
    command = ["/bin/sh", "-c", SCRIPT, str(round(10 * grace)), *map(str, arguments)]
    options = popen | {"stdin": subprocess.PIPE, "start_new_session": True}
    child = Child(command, env=environment, cwd=folder, **options)
    child.grace = grace
    child._pipe, child.stdin = child.stdin, None  # out of the hands of communicate(), which would close it
    return child


def end(child: Child) -> None:
    """End a process and its group: the pipe closes, and what still runs after the grace gets SIGKILL.

    It does nothing to a child that has ended completely.

    Args:
        child: the process.
    """
    child.let_go()
    with suppress(subprocess.TimeoutExpired):
        child.wait(child.grace)
    with suppress(ProcessLookupError, PermissionError):  # nobody is left, or on macOS only a zombie
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run(
    arguments: Sequence[str | Path], *, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its exit code and what it printed, as text.

    Args:
        arguments: the program and its arguments.
        timeout: seconds.
        options: further options of :func:`start`. By default, stdout and stderr are both captured.

    Raises:
        TimeoutExpired: if the program takes longer; it is ended.
    """
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(arguments, text=True, **(streams | options)) as child:
        out, errors = child.communicate(timeout=timeout)
    return subprocess.CompletedProcess(child.args, child.returncode, out, errors)


def when_parent_ends(clean_up: Callable[[], None]) -> None:
    """Call a function when the parent has ended or lets go of this process, then end this process.

    For a program that was started by :func:`start`, at its very beginning.

    Args:
        clean_up: called in a thread of its own. It has ``grace`` seconds.
    """
    _end_after(lambda: os.read(0, 1), clean_up)  # sys.stdin would be locked when the interpreter exits


def end_with_parent(clean_up: Callable[[], None] = lambda: None) -> None:
    """End this process within a second of its parent's end, for a program that :func:`start` has not started.

    Args:
        clean_up: called before that, in a thread of its own.
    """
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)

    _end_after(wait, clean_up)


def _end_after(wait: Callable[[], object], clean_up: Callable[[], None]) -> None:
    # Wait in a thread, then end this process.
    def end() -> None:
        wait()
        try:
            clean_up()
        finally:
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()
