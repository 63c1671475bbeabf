"""A notebook in a process of its own, which leaves all its files in one folder and removes it when its parent ends.

The batch, or a Dask worker, calls :func:`start`; the process itself runs :func:`main`.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fwdlib import children

# papermill and nbformat take a second; they are imported once the process listens for its parent's end.
START_RETRIES = 2  # kernels that start at the same time can race for ports
GRACE = 10.0  # seconds to end the kernel and remove the folder
OVERDUE = 30.0  # seconds after the time-out, in which a process that does not hang has ended its kernel and itself
HANGS = "the notebook took longer than {:g} s, and then did not end: its process hangs, or was stopped"


def start(
    folder: Path,
    notebook: Path,
    parameters: dict[str, Any],
    timeout: float,
    one_thread: bool,
    variables: dict[str, str] | None = None,
) -> children.Child:
    """Start a process that runs a notebook; it puts everything into ``folder``.

    That is ``results/``, the executed ``copy.ipynb``, ``log.txt``, and at the end ``error.txt``, empty after a success.
    If it is ended before, by :func:`fwdlib.children.end` or with this process, it ends its kernel and removes the
    folder.

    Args:
        folder: an empty one.
        notebook: to run.
        parameters: of the notebook.
        timeout: seconds, the start of the kernel included.
        one_thread: hold it to one thread.
        variables: for its environment, in addition to those of this process.
    """
    for name in ("results", "cwd", "runtime", "ipython"):
        (folder / name).mkdir()
    (folder / "tmp").symlink_to(tempfile.mkdtemp(prefix="fwdlib-"))  # a short path, as sockets in it must have one
    order = json.dumps({"notebook": str(notebook), "parameters": parameters, "timeout": timeout})
    command = [sys.executable, "-m", "fwdlib.runs.notebook", folder, order]
    environment = _environment(folder, one_thread) | (variables or {})
    options = {"environment": environment, "folder": folder / "cwd", "grace": GRACE}  # an empty working folder
    with (folder / "log.txt").open("w") as log:
        return children.start(command, stdout=log, stderr=subprocess.STDOUT, **options)


def end_overdue(process: children.Child, folder: Path, timeout: float, begun: float) -> None:
    """End a process, and its kernel, if it is long past its time-out; ``error.txt`` says so.

    Args:
        process: that :func:`start` returned.
        folder: of the job.
        timeout: seconds.
        begun: when it started, by ``time.monotonic()``.
    """
    if time.monotonic() - begun < timeout + OVERDUE:
        return
    with suppress(psutil.NoSuchProcess):
        for kernel in psutil.Process(process.pid).children(recursive=True):  # each in a session of its own
            kernel.kill()
    (folder / "error.txt").write_text(HANGS.format(timeout), encoding="utf-8")
    process.kill()


def _environment(folder: Path, one_thread: bool) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # the kernel sets its own
    for name in ("FWDLIB_DATA", "FWDLIB_CACHE"):
        if env.get(name):
            env[name] = str(Path(env[name]).expanduser().resolve())  # the kernel's working folder is another
    env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if one_thread else {}
    env |= {"JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "IPYTHONDIR": str(folder / "ipython")}
    # What a notebook leaves half done when it is ended goes with the job, but what torch has compiled is for the next.
    env |= {"TMPDIR": str((folder / "tmp").resolve())}
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")))
    # The kernel "python3" is this Python, not a kernel of that name in the user's home.
    return env | {"JUPYTER_PREFER_ENV_PATH": "1", "FWDLIB_RESULTS": str(folder / "results"), "PYTHONHASHSEED": "0"}


# --- in the process itself -------------------------------------------------------------------------------------------


def main(folder: Path, order: str) -> None:
    """Run the notebook that ``order`` names, with parameters and timeout, as JSON.

    It writes ``error.txt`` last: a process that left no such file was killed.
    """
    tempfile.tempdir = str(folder)  # jupyter_client puts the kernel's connection file there
    ending = threading.Event()
    children.when_parent_ends(lambda: _clean_up(folder, ending))
    from papermill.exceptions import PapermillExecutionError, strip_color

    try:
        _execute(folder, **json.loads(order))
        error = ""
    except PapermillExecutionError as stop:
        first = stop.source.strip().partition("\n")[0]
        error = strip_color(f"cell {stop.exec_count}: {stop.ename}: {stop.evalue} (in: {first})")
    except Exception as stop:
        error = f"the notebook did not start: {type(stop).__name__}: {stop}"
    if ending.is_set():  # the kernel was killed by _clean_up, which is about to end this process
        time.sleep(GRACE)
    discard_temporary(folder)  # now: a Dask worker may be killed before it does
    (folder / "error.part").write_text(error, encoding="utf-8")
    (folder / "error.part").replace(folder / "error.txt")


def _clean_up(folder: Path, ending: threading.Event) -> None:
    ending.set()
    kernels = psutil.Process().children(recursive=True)  # each in a session of its own
    for kernel in kernels:
        kernel.kill()
    psutil.wait_procs(kernels, timeout=GRACE / 2)  # so that none of them writes into the folder again
    while folder.exists():  # papermill may write the executed copy at the same time
        discard(folder)


def discard(folder: Path) -> None:
    """Remove a job's folder and its temporary one."""
    discard_temporary(folder)
    shutil.rmtree(folder, ignore_errors=True)


def discard_temporary(folder: Path) -> None:
    """Remove the folder in which a job puts its temporary files."""
    shutil.rmtree((folder / "tmp").resolve(), ignore_errors=True)


def _execute(folder: Path, notebook: str, parameters: dict[str, Any], timeout: float) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    copy, progress, deadline = folder / "copy.ipynb", folder / "cell.txt", time.monotonic() + timeout
    options = {
        "kernel_name": "python3",
        "language": "python",
        "progress_bar": False,
        "on_cell_execute": lambda cell_index, **_: progress.write_text(str(cell_index)),
        "timeout_func": lambda _: max(0.1, deadline - time.monotonic()),  # 0 would mean no limit
        "iopub_timeout": 60,  # nbclient's 4 s for a cell's last output are short on a busy machine
    }
    for retries_left in reversed(range(1 + START_RETRIES)):
        left = max(1, min(60, round(deadline - time.monotonic())))  # for the start of the kernel
        try:
            papermill.execute_notebook(notebook, str(copy), parameters, start_timeout=left, **options)
            return
        except Exception as stop:
            has_started = progress.exists()
            if has_started and not isinstance(stop, PapermillExecutionError):
                late = f"the notebook took longer than {timeout:g} s" if time.monotonic() >= deadline else ""
                _mark_failure(copy, int(progress.read_text()), stop, late or str(stop).partition("\n")[0])
            if has_started or not retries_left or time.monotonic() >= deadline:
                raise
            time.sleep(1)


def _mark_failure(copy: Path, index: int, stop: Exception, reason: str) -> None:
    """Put a time-out or the death of the kernel into the cell where it happened, and raise papermill's error for it."""
    import nbformat
    from papermill.execute import raise_for_execution_errors

    draft = nbformat.read(copy, 4)
    cell = draft.cells[index]
    error = {"ename": type(stop).__name__, "evalue": reason, "traceback": []}
    cell.outputs.insert(0, nbformat.v4.new_output("error", **error))
    cell.execution_count = sum(each.cell_type == "code" for each in draft.cells[: index + 1])
    raise_for_execution_errors(draft, str(copy))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
