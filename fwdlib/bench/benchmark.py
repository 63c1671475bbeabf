"""The whole benchmark, ``python -m fwdlib bench``: what is measured of which models, and where the result goes.

:mod:`fwdlib.bench.table` makes a table of the result, :mod:`fwdlib.bench.figures` makes figures.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.compared import COMPARED, COMPILED, LEARNING_RATE, MODELS, SWEPT, Variant, find_task, variants
from fwdlib.bench.measuring import measure_memory, measure_time, reason_of
from fwdlib.checks import check_choice, check_count

FORMAT = 1
SWEEPS = ("depth", "width", "batch")  # of MLPs; also keys of the result
LAYERS, WIDTH = 4, 256  # of the MLPs whose width and batch are varied


class Extent(NamedTuple):
    """How long and how much is measured."""

    seconds: float
    """For each model; compiling comes on top."""
    min_rounds: int
    max_rounds: int
    block_seconds: float
    """A method's turn takes at least this long."""
    width: int
    """Of the layers of the MLPs whose depth is varied."""
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    """Of an MLP with :data:`LAYERS` layers."""
    batches: tuple[int, ...]
    """Of an MLP with :data:`LAYERS` layers of width :data:`WIDTH`."""

    @property
    def timing(self) -> dict[str, float]:
        """What :func:`fwdlib.bench.measuring.interleave` takes."""
        return {name: getattr(self, name) for name in ("seconds", "min_rounds", "max_rounds", "block_seconds")}


FULL = Extent(8.0, 9, 60, 0.01, 1024, (1, 2, 5, 10, 20, 50, 100), (16, 64, 256, 1024), (1, 8, 64, 512))
QUICK = Extent(1.0, 7, 15, 0.005, 256, (1, 10, 30), (), ())


def run(
    *,
    device: str = "cpu",
    models: Sequence[str] | None = None,
    batch: int | None = None,
    memory: bool = True,
    sweeps: bool = True,
    quick: bool = False,
    peers: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure everything and return the numbers, to be saved as JSON.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        models: names of :data:`MODELS`; None for all.
        batch: number of examples; None for each model's own.
        memory: whether to measure peak memory.
        sweeps: whether to measure MLPs of increasing depth and width, and with increasing batches.
        quick: measure less, only to see that everything runs.
        peers: time other packages, too, as far as they are installed.
        threads: of torch; None for what it takes by itself.

    Returns:
        ``format, quick, environment, load`` (of the machine, before the start), ``settings``; ``models``, name -> what
        :func:`measure_time` returns with ``memory``, the bytes by method; ``depth``, ``width`` and ``batch``, such an
        entry for each value of these.

    Raises:
        ValueError: if an argument is not allowed; the message lists what is.
    """
    on = runtime.resolve_device(device)
    check_choice("device", on.type, ("cpu", "cuda"))
    names = list(MODELS if models is None else dict.fromkeys(models))
    for name in names:
        check_choice("models", name, MODELS)
    if batch is not None:
        check_count("batch", batch)
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads))
    extent = QUICK if quick else FULL
    varied = _varied(extent, batch) if sweeps else {}
    of_models = COMPARED if memory and not quick else ()  # methods whose memory is measured
    of_sweeps = SWEPT if memory else ()
    runtime.keep_freed_memory()
    found: dict[str, Any] = {
        "format": FORMAT,
        "quick": quick,
        "environment": runtime.environment(on),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "settings": {
            **extent.timing,
            "width": extent.width,
            "mlp": {"layers": LAYERS, "width": WIDTH},
            "learning_rate": LEARNING_RATE,
            "batch": batch,
        },
        "models": {},
        **{sweep: {} for sweep in SWEEPS},
    }
    total = len(names) * (1 + bool(of_models)) + sum(map(len, varied.values())) * (1 + bool(of_sweeps))
    with tqdm(total=total, desc="bench", unit="measurement") as bar:
        measure = partial(_measure, extent, on, bar)
        for name in names:
            found["models"][name] = measure(name, batch, partial(variants, quick=quick, peers=peers), of_models)
        for sweep, mlps in varied.items():
            forms = [Variant(method) for method in SWEPT]
            forms += [Variant(method, compiled=True) for method in COMPILED if sweep != "depth"]
            for value, (name, examples) in mlps.items():
                found[sweep][str(value)] = measure(name, examples, lambda _, forms=forms: forms, of_sweeps)
    return found


def _varied(extent: Extent, batch: int | None) -> dict[str, dict[int, tuple[str, int | None]]]:
    # For each sweep and value the name of the MLP and its batch.
    return {
        "depth": {n: (f"{n}x{extent.width}", batch) for n in extent.depths},
        "width": {n: (f"{LAYERS}x{n}", batch) for n in extent.widths},
        "batch": {n: (f"{LAYERS}x{WIDTH}", n) for n in extent.batches},
    }


def _measure(
    extent: Extent,
    device: torch.device,
    bar: tqdm,
    name: str,
    batch: int | None,
    forms: Callable[[nn.Module], Iterable[Variant]],
    methods: Sequence[str],
) -> dict[str, Any]:
    def show(text: str) -> None:
        bar.set_description(f"{name}: {text}")

    found = measure_time(find_task(name), forms, device, batch, show, **extent.timing)
    gc.collect()
    bar.update()
    if methods:
        show("memory")
        try:
            found["memory"] = measure_memory(name, methods, device, batch)
        except RuntimeError as error:
            found["skipped"]["memory"] = reason_of(error)
        bar.update()
    return found


def default_path(
    device: str, *, quick: bool = False, batch: int | None = None, partial: bool = False, threads: int | None = None
) -> Path:
    """Return where a result goes; ``build/bench-cpu.json`` in the checkout if the result is complete.

    Every restriction adds a word to the file's name, so that no committed result is overwritten by less.

    Args:
        device: where it was measured.
        quick: whether less was measured.
        batch: the number of examples, if it was given.
        partial: whether models, memory or sweeps were left out.
        threads: the number of threads, if it was given.
    """
    words = ["bench", device.partition(":")[0], *([f"batch{batch}"] if batch is not None else [])]
    words += [f"threads{threads}"] if threads is not None else []
    words += ["partial"] * partial + ["quick"] * quick
    return (runtime.project_root() or Path.cwd()) / "build" / f"{'-'.join(words)}.json"
