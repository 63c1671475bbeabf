"""What a training step costs: its time, with the methods taking turns, and its peak memory, in a new process."""

from __future__ import annotations

import copy
import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlib import runtime
from fwdlib.bench import memory, networks
from fwdlib.bench.compared import (
    COMPARED,
    OWN_MODEL,
    PEERS,
    Step,
    Task,
    Variant,
    find_task,
    make_step,
    perceptron,
    prepare,
)
from fwdlib.checks import check_choice, check_count
from fwdlib.models import num_parameters

NO_COMPILER = "no C++ compiler"
FORWARD = "forward"  # the plain evaluation of the loss, by which R divides
STEPS_OF_MEMORY = 3


def interleave(
    methods: dict[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 60,
    block_seconds: float = 0.01,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time calls that take turns, so that a slow moment of the machine hits all of them alike.

    Each round shuffles the calls. Each call runs once untimed, then as often as it takes to fill ``block_seconds``. A
    call that takes longer than ten blocks goes without the untimed run: what ran before hardly changes its time.

    Args:
        methods: name -> call. Each call has run before, so that no first-time work is timed.
        seconds: no round starts after this time, once there are ``min_rounds``.
        min_rounds: least number of rounds.
        max_rounds: greatest number of rounds.
        block_seconds: least duration of a turn.
        synchronize: waits until the device has finished its work.
        clock: what the time of a call is read from; ``time.process_time`` does not count other programs.

    Returns:
        For each name the seconds per call, one number a round, so that ratios can be taken within a round.

    Raises:
        ValueError: if a number of rounds is below 1.
    """
    check_count("min_rounds", min_rounds)
    check_count("max_rounds", max_rounds, min_rounds)

    def timed(call: Callable[[], object], repeats: int) -> float:
        synchronize()
        start = clock()
        for _ in range(repeats):
            call()
        synchronize()
        return (clock() - start) / repeats

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
    device: torch.device,
    batch: int | None,
    show: Callable[[str], object],
    **timing: Any,
) -> dict[str, Any]:
    """Time steps of a model, and the plain evaluation of its loss.

    Args:
        task: the model and its batch.
        forms: returns the variants to time, given the model.
        device: where to run them.
        batch: number of examples; None for the task's own.
        show: called with what is being done, for a progress bar.
        timing: options of :func:`interleave`.

    Returns:
        ``title, batch, num_params``; ``seconds``, variant -> a list by round; ``compile_seconds``, what the first two
        calls of a compiled variant took; ``skipped``, variant -> reason; and
        ``reference``, the fastest variant of backprop by the median. ``"one graph"`` does not count as a reference,
        for torch does not offer it.
    """
    torch.compiler.reset()  # torch counts how often it has compiled a function, and gives up at the eighth time
    model, inputs, targets = prepare(task, device, batch)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    methods: dict[str, Step] = {FORWARD: evaluate}
    skipped: dict[str, str] = {}
    compile_seconds: dict[str, float] = {}
    has_compiler = runtime.has_compiler()
    for variant in forms(model):
        show(str(variant))
        if variant.compiled and not has_compiler:
            skipped[str(variant)] = NO_COMPILER
            continue
        try:
            own = copy.deepcopy(model) if variant.method in OWN_MODEL else model
            step = make_step(variant, own, inputs, targets)
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "SGDStep runs as with compiled=False")  # not timed as compiled
                for _ in range(2):  # a compiled step compiles at its first or second call
                    step()
            methods[str(variant)] = step
            if variant.compiled:
                compile_seconds[str(variant)] = time.perf_counter() - started
        except Exception as error:  # a compiler or a peer may raise anything; the others can still be timed
            is_ours = not variant.compiled and variant.method not in PEERS
            if is_ours and not isinstance(error, torch.OutOfMemoryError):
                raise
            skipped[str(variant)] = reason_of(error)
    show("timing")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = interleave(methods, synchronize=synchronize, **timing)
    candidates = [name for name in seconds if name.startswith("backprop") and not re.search("one graph| with ", name)]
    return {
        "title": task.title,
        "batch": len(inputs),
        "num_params": num_parameters(model),
        "reference": min(candidates, key=lambda name: np.median(seconds[name])),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "skipped": skipped,
    }


def reason_of(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def measure_memory(
    name: str, methods: Sequence[str], device: torch.device | str = "cpu", batch: int | None = None
) -> dict[str, int]:
    """Return the bytes that an eager step of each method needs at its peak beyond model and batch, in a new process.

    Args:
        name: of the model, as :func:`find_task` takes it.
        methods: some of :data:`COMPARED`.
        device: where the steps run, see :func:`fwdlib.bench.memory.peak_bytes`.
        batch: number of examples; None for the task's own.

    Raises:
        ValueError: if name or a method is unknown.
        RuntimeError: if the process fails; the message says why.
    """
    find_task(name)
    for method in methods:
        check_choice("method", method, COMPARED)
    arguments = {"methods": methods, "name": name, "device": str(device), "batch": batch}
    return dict(zip(methods, memory.peaks_bytes("fwdlib.bench.measuring:_steps", arguments, device), strict=True))


def _steps(methods: Sequence[str], **where: Any) -> list[Callable[[], None]]:
    return [steps_to_measure(partial(make_step, Variant(method)), **where) for method in methods]


def steps_to_measure(
    make: Callable[[nn.Module, Tensor, Tensor], Callable[[], object]],
    name: str,
    device: str = "cpu",
    batch: int | None = None,
) -> Callable[[], None]:
    """Return a few training steps of a model, as :func:`fwdlib.bench.memory.peak_bytes` needs them.

    A tiny model takes the same steps first. It loads libraries and starts threads, which are not what a step needs.

    Args:
        make: makes the step from a model, its inputs and its targets.
        name: of the model, as :func:`find_task` takes it.
        device: where the steps run.
        batch: number of examples; None for the task's own.
    """

    def take_steps(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        step = make(model, inputs, targets)
        for _ in range(STEPS_OF_MEMORY):
            step()
        model.zero_grad()  # what is left would be there before the next piece of work

    task = find_task(name)
    if task.vocabulary:
        tiny = Task("tiny transformer", lambda: networks.gpt(4, 8, 8, 1), 2, (8,), 4, vocabulary=4)
    elif len(task.shape) == 1:
        tiny = Task("tiny MLP", lambda: perceptron(8, 8, 2), 4, (8,), 2)
    else:
        tiny = Task("tiny CNN", lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), 4, (1, 8, 8), 72)
    take_steps(*prepare(tiny, device))
    return partial(take_steps, *prepare(task, device, batch))
