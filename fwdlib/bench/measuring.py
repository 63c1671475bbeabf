"""What a training step costs: time, methods taking turns, and peak memory, each in a process of its own.

:func:`run` measures, and returns what is written as JSON; :func:`text` makes the table of it,
:mod:`fwdlib.bench.figures` the figures. What is compared is in :mod:`fwdlib.bench.compared`.
"""

from __future__ import annotations

import gc
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.compared import (
    LEARNING_RATE,
    METHODS,
    MODELS,
    Step,
    Task,
    Variant,
    find_task,
    make_step,
    perceptron,
    prepare,
    variants,
)
from fwdlib.checks import check_choice, check_count
from fwdlib.models import num_parameters
from fwdlib.results import interval_text
from fwdlib.statistics import Interval, paired_ratio

FORMAT = 1
NO_COMPILER = "no C++ compiler"
FORWARD = "forward"  # plain evaluation of the loss: what R is measured in
SWEPT = METHODS[:3]  # in the depth sweep
STEPS_OF_MEMORY = 3
BUSY = 0.7  # load average of the minute before


class Settings(NamedTuple):
    """How long and how much is measured."""

    seconds: float
    """For each model; to compile comes on top."""
    min_rounds: int
    max_rounds: int
    block_seconds: float
    """A method's turn takes at least this long."""
    width: int
    depths: tuple[int, ...]


FULL = Settings(12.0, 11, 60, 0.01, 1024, (1, 2, 5, 10, 20, 50, 100))
QUICK = Settings(1.0, 7, 15, 0.005, 256, (1, 10, 30))


# --- time ------------------------------------------------------------------------------------------------------------


def interleave(
    methods: dict[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 60,
    block_seconds: float = 0.01,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time calls that take turns, so that a slow moment of the machine hits all of them alike.

    In each round, in an order drawn anew, each is called once untimed, then as often as fills ``block_seconds``. (The
    untimed call is left out where one takes longer than ten blocks: there what ran before it does not matter.)

    Args:
        methods: name -> call, warm: what the first one does beyond the others is done.
        seconds: no round starts after this time, once there are ``min_rounds``.
        min_rounds: at least.
        max_rounds: at most.
        block_seconds: least duration of a turn.
        synchronize: waits until the device has done what it was asked for.

    Returns:
        For each name the seconds per call, one number a round, so that ratios can be taken within a round.

    Raises:
        ValueError: if a number of rounds is below 1.
    """
    check_count("min_rounds", min_rounds)
    check_count("max_rounds", max_rounds, min_rounds)

    def timed(call: Callable[[], object], repeats: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - start) / repeats

    once = {name: min(timed(call, 1) for _ in range(2)) for name, call in methods.items()}
    repeats = {name: max(1, math.ceil(block_seconds / max(duration, 1e-7))) for name, duration in once.items()}
    found: dict[str, list[float]] = {name: [] for name in methods}
    shuffle, started = random.Random(0), time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > seconds:
            break
        for name in shuffle.sample(list(methods), len(methods)):
            if once[name] < 10 * block_seconds:
                methods[name]()
            found[name].append(timed(methods[name], repeats[name]))
    return found


def measure_time(
    task: Task,
    forms: Callable[[nn.Module], Iterable[Variant]],
    settings: Settings,
    device: torch.device,
    batch: int | None = None,
    show: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Time steps of a model, and the plain evaluation of its loss.

    Args:
        task: the model.
        forms: from the model to what is timed.
        settings: how long.
        device: where.
        batch: instead of the task's own.
        show: told what is going on.

    Returns:
        ``title, batch, num_params, seconds`` (lists by round), ``skipped`` (variant -> reason), and ``reference``, the
        variant of backprop with the least median that torch offers; ``"one graph"``, made by hand, is not one of them.
    """
    torch.compiler.reset()  # it counts compilations of one function, and gives up at the eighth
    model, inputs, targets = prepare(task, device, batch)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    methods: dict[str, Step] = {FORWARD: evaluate}
    skipped: dict[str, str] = {}
    has_compiler = runtime.has_compiler()
    for variant in forms(model):
        show(str(variant))
        if variant.compiled and not has_compiler:
            skipped[str(variant)] = NO_COMPILER
            continue
        try:
            step = make_step(variant, model, inputs, targets)
            step()  # compiles
            methods[str(variant)] = step
        except Exception as error:  # whatever a compiler may raise; the other variants can still be timed
            if not variant.compiled and not isinstance(error, torch.OutOfMemoryError):
                raise
            skipped[str(variant)] = _reason(error)
    show("timing")
    seconds = interleave(
        methods,
        seconds=settings.seconds,
        min_rounds=settings.min_rounds,
        max_rounds=settings.max_rounds,
        block_seconds=settings.block_seconds,
        synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
    )
    candidates = [name for name in seconds if name.startswith("backprop") and "one graph" not in name]
    return {
        "title": task.title,
        "batch": len(inputs),
        "num_params": num_parameters(model),
        "reference": min(candidates, key=_median_of(seconds)),
        "seconds": seconds,
        "skipped": skipped,
    }


def _median_of(seconds: dict[str, list[float]]) -> Callable[[str], float]:
    return lambda name: float(np.median(seconds[name]))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(name: str, method: str, device: torch.device | str = "cpu", batch: int | None = None) -> int:
    """Return the bytes that a step needs at its peak beyond model and batch, measured in a new process.

    Args:
        name: of the model, as :func:`find_task` takes it.
        method: one of :data:`METHODS`, eager.
        device: on CUDA the allocator's peak counts, else that of the process's resident memory.
        batch: number of examples; None for the task's own.

    Raises:
        ValueError: if name or method is unknown.
        RuntimeError: if it cannot be measured; the message says why.
    """
    task = find_task(name)
    check_choice("method", method, METHODS)
    words = ["memory", name, method, str(device), str(task.batch if batch is None else batch)]
    command = [sys.executable, "-m", "fwdlib.bench.measuring", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        ending = f"ended with code {ended.returncode}"  # minus 9 where the system was out of memory
        raise RuntimeError((ended.stderr.strip().splitlines() or [ending])[-1])
    return int(ended.stdout.split()[-1])


def _memory_of(name: str, method: str, device: str, batch: str) -> int:
    # In the process of its own. Another model warms up first: libraries and thread pools are not what a step needs.
    task = find_task(name)
    tiny = perceptron(8, 8, 2) if len(task.shape) == 1 else nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
    draw = torch.randn(4, *((8,) if len(task.shape) == 1 else (1, 8, 8)), device=device)
    _train(method, tiny.to(device), draw, torch.zeros(4, dtype=torch.long, device=device))
    batch_of_task = prepare(task, device, int(batch))
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _train(method, *batch_of_task)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before, peak = _resident_memory()
    _train(method, *batch_of_task)
    return peak() - before


def _train(method: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    step = make_step(Variant(method), model, inputs, targets)
    for _ in range(STEPS_OF_MEMORY):
        step()


def _resident_memory() -> tuple[int, Callable[[], int]]:
    """Return the memory of this process in bytes, and a function that returns its peak from now on."""
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


# --- all of it -------------------------------------------------------------------------------------------------------


def run(
    *,
    device: str = "cpu",
    models: Sequence[str] | None = None,
    batch: int | None = None,
    memory: bool = True,
    depth: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """Measure all of it and return the numbers, to be saved as JSON.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        models: names of :data:`MODELS`; None for all.
        batch: instead of each model's own.
        memory: whether to measure that, too.
        depth: whether to sweep the depth of an MLP, too.
        quick: less of all; only to see that everything runs.

    Returns:
        ``format, quick, environment, load`` (the machine's, before), ``settings, models`` (name -> as
        :func:`measure_time` returns it, with ``memory``, bytes by method) and ``depth``, such an entry for each number
        of layers.

    Raises:
        ValueError: if an argument is not one of those allowed.
    """
    on = runtime.resolve_device(device)
    check_choice("device", on.type, ("cpu", "cuda"))
    names = list(MODELS if models is None else dict.fromkeys(models))
    for name in names:
        check_choice("models", name, MODELS)
    if batch is not None:
        check_count("batch", batch)
    settings = QUICK if quick else FULL
    layers = settings.depths if depth else ()
    runtime.keep_freed_memory()
    found: dict[str, Any] = {
        "format": FORMAT,
        "quick": quick,
        "environment": runtime.environment(on),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "settings": {**settings._asdict(), "depths": list(layers), "learning_rate": LEARNING_RATE, "batch": batch},
        "models": {},
        "depth": {},
    }
    of_model = () if quick else METHODS
    total = len(names) + len(layers) + memory * (len(names) * len(of_model) + len(layers) * len(SWEPT))
    with tqdm(total=total, desc="bench", unit="measurement") as bar:

        def measure(name: str, forms: Callable[[nn.Module], Iterable[Variant]], methods: Sequence[str]) -> dict:
            def show(text: str) -> None:
                bar.set_description(f"{name}: {text}")

            result = measure_time(find_task(name), forms, settings, on, batch, show)
            gc.collect()
            bar.update()
            for method in methods if memory else ():
                show(f"memory of {method}")
                try:
                    result.setdefault("memory", {})[method] = measure_memory(name, method, on, batch)
                except RuntimeError as error:
                    result["skipped"][f"memory of {method}"] = _reason(error)
                bar.update()
            return result

        for name in names:
            found["models"][name] = measure(name, lambda model: variants(model, quick=quick), of_model)
        for n in layers:
            found["depth"][str(n)] = measure(f"{n}x{settings.width}", lambda _: map(Variant, SWEPT), SWEPT)
    return found


def default_path(device: str, *, quick: bool = False, batch: int | None = None, partial: bool = False) -> Path:
    """Return where a result goes: ``report/results/bench-cpu.json`` of the checkout for a whole one, in full.

    Args:
        device: that it was measured on.
        quick: what the others add to the name, so that no committed result is overwritten by less.
        batch: likewise.
        partial: likewise.
    """
    words = ["bench", torch.device(device).type, *([f"batch{batch}"] if batch is not None else [])]
    words += ["partial"] * partial + ["quick"] * quick
    return (runtime.project_root() or Path.cwd()) / "report" / "results" / f"{'-'.join(words)}.json"


# --- the table -------------------------------------------------------------------------------------------------------


def text(found: dict[str, Any]) -> str:
    """Return what was measured as a table for the terminal.

    Args:
        found: as :func:`run` returns it.
    """
    lines = []
    if found["load"] > BUSY:
        lines.append(
            f"The machine was busy (load {found['load']:.1f} before the start): no time below can be trusted.\n"
        )
    if any(NO_COMPILER in entry["skipped"].values() for entry in found["models"].values()):
        lines.append("No C++ compiler was found: compiled variants are skipped.\n")
    for entry in found["models"].values():
        lines += [*_model_lines(entry), ""]
    if found["depth"]:
        lines += _depth_lines(found)
    return "\n".join(lines).rstrip() + "\n"


def _model_lines(entry: dict[str, Any]) -> Iterator[str]:
    seconds, reference, memory = entry["seconds"], entry["reference"], entry.get("memory", {})
    yield f"{entry['title']}, batch {entry['batch']}, {entry['num_params']} parameters"
    rows = [("", "step [ms]", "R", "ratio to fastest backprop", "memory [MB]")]
    for name, values in seconds.items():
        ratio = "" if name == FORWARD else interval_text(paired_ratio(values, seconds[reference]), "{:.2f}")
        method, _, mode = name.partition(", ")
        megabytes = f"{memory[method] / 1e6:.1f}" if method in memory and mode == "eager" else ""
        rows.append((name, _milliseconds(values), _relative(values, seconds[FORWARD]), ratio, megabytes))
    yield from _aligned(rows)
    for name, reason in entry["skipped"].items():
        if reason != NO_COMPILER:
            yield f"  skipped {name}: {reason}"
    best = min((name for name in seconds if name != FORWARD and "backprop" not in name), key=_median_of(seconds))
    one_graph = str(Variant("backprop", compiled=True, form="one graph"))
    against = [reference, *([one_graph] if one_graph in seconds else [])]
    ratios = [f"{interval_text(paired_ratio(seconds[best], seconds[name]), '{:.2f}')} of {name}" for name in against]
    yield f"  fastest forward gradient: {best}; {'; '.join(ratios)}"


def _depth_lines(found: dict[str, Any]) -> Iterator[str]:
    batch = next(iter(found["depth"].values()))["batch"]
    yield f"MLP of n layers of width {found['settings']['width']}, batch {batch}: R, memory [MB]"
    rows = [("layers", "forward [ms]", *SWEPT, *(f"{method} [MB]" for method in SWEPT))]
    for layers, entry in found["depth"].items():
        seconds, memory = entry["seconds"], entry.get("memory", {})
        relative = [
            _relative(seconds[key], seconds[FORWARD]) if (key := f"{method}, eager") in seconds else "-"
            for method in SWEPT
        ]
        megabytes = [f"{memory[method] / 1e6:.1f}" if method in memory else "-" for method in SWEPT]
        rows.append((layers, _milliseconds(seconds[FORWARD]), *relative, *megabytes))
    yield from _aligned(rows)


def _milliseconds(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return interval_text(Interval(1e3 * low, 1e3 * middle, 1e3 * high), "{:.3g}")


def _relative(values: Sequence[float], forward: Sequence[float]) -> str:
    return f"{paired_ratio(values, forward).estimate:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  " + "  ".join([first.ljust(widths[0]), *cells]).rstrip()


if __name__ == "__main__":
    print(_memory_of(*sys.argv[2:]))
