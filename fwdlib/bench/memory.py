"""Peak memory of a piece of work, measured in a new process: in this one, everything that ran before would count."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fwdlib import children

M_MMAP_THRESHOLD = -3  # as glibc numbers it


def peak_bytes(function: str, arguments: Mapping[str, object], device: torch.device | str = "cpu") -> int:
    """Return the bytes that a piece of work needs at its peak, measured in a new process.

    The process calls ``function(**arguments)``. That loads libraries, builds what the work needs, and returns the work
    as a callable. Only the memory that the callable takes beyond that is counted.

    Args:
        function: ``"package.module:name"``.
        arguments: by name; JSON must be able to hold them.
        device: on CUDA, the allocator's peak counts; elsewhere, the peak of the process's resident memory.

    Raises:
        RuntimeError: if the process fails; the message is its last line on stderr, or its exit code.
    """
    return _run(function, arguments, device)[-1]


def peaks_bytes(function: str, arguments: Mapping[str, object], device: torch.device | str = "cpu") -> list[int]:
    """Return the bytes of several pieces of work, one after another in one new process.

    Before each, memory that was freed goes back to the system. So what they share, such as what they compile, is made
    once and counts for none.

    Args:
        function: as for :func:`peak_bytes`, but it returns a list of callables.
        arguments: as for :func:`peak_bytes`.
        device: as for :func:`peak_bytes`.

    Raises:
        RuntimeError: as :func:`peak_bytes`.
    """
    return _run(function, arguments, device)


def _run(function: str, arguments: Mapping[str, object], device: torch.device | str) -> list[int]:
    command = [sys.executable, "-m", "fwdlib.bench.memory", function, json.dumps(arguments), str(device)]
    ended = children.run(command)
    if ended.returncode:
        ending = f"ended with code {ended.returncode}"  # -9 if the system was out of memory
        raise RuntimeError((ended.stderr.strip().splitlines() or [ending])[-1])
    return [int(word) for word in ended.stdout.splitlines()[-1].split()]


def _peak_of(work: Callable[[], object], device: str) -> int:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before, peak = _resident_memory()
    work()
    return peak() - before


def _resident_memory() -> tuple[int, Callable[[], int]]:
    # The memory of this process in bytes, and a function that returns its peak from now on.
    if _forget_peak():
        return _status("VmRSS"), lambda: _status("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    return peak(), peak


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return False
    return True


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _main(function: str, arguments: str, device: str) -> None:
    _give_back_at_once()
    module, _, name = function.partition(":")
    work = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    if callable(work):
        print(_peak_of(work, device))
        return
    found = []
    for one in work:
        gc.collect()
        _give_back()
        found.append(_peak_of(one, device))
    print(*found)


def _give_back_at_once() -> None:
    # Each large tensor has pages of its own, so what is counted is what is alive, and not gaps between tensors.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**16)


def _give_back() -> None:
    # What the allocator keeps would hide that the next piece of work needs it, too.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
