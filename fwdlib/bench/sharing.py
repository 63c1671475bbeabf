"""What a step costs when several processes share it: measured on this machine, over its own links or slowed ones.

:mod:`fwdlib.bench.scaling` has the model that predicts it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fwdlib import runtime
from fwdlib.atomic import write_bytes
from fwdlib.bench import links
from fwdlib.bench.scaling import NUM_TANGENTS
from fwdlib.bench.shared_steps import POWER_SGD, make_step
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.models import initialise, num_parameters
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.steps import take_step
from fwdlib.trainer.distributed import DataParallelGradient, joined, start
from fwdlib.trainer.networks import fully_connected
from fwdlib.trainer.processes import Processes

RIVALS = tuple(map(POWER_SGD.format, (1, 4)))  # backprop that exchanges less
BATCH_SIZE = 64  # of all processes together
PLAIN_STEPS = 2  # of PowerSGD, at first
LEARNING_RATE = 1e-6  # small: only times are measured


def measure_step(
    count: int, megabits: float | None = None, *, slow: bool = False, num_rounds: int = 7, seconds: float = 0.3
) -> dict[str, Any]:
    """Measure a step of the network 784-800-800-10 by each method, shared among processes on this machine.

    Args:
        count: number of processes, each with one thread.
        megabits: rate of each process's link, per second and direction; None for no limit.
        slow: run the processes in network namespaces, see :mod:`fwdlib.bench.links`; else they use the loopback device.
        num_rounds: rounds in which the methods take turns.
        seconds: least time that a method steps in a round; at least one step.

    Returns:
        ``methods``: method -> ``seconds``, the time of a step with SGD, one number a round; ``alone``, the same without
        an exchange, while the other processes also work; ``bytes`` and ``segments``, what the first process sends.
        Between several processes also :data:`RIVALS`, without ``alone``.
        ``exchange``: the time of exchanging one number, one number a round. ``num_params``, ``count``, ``megabits``.

    Raises:
        OSError: if links cannot be slowed here.
        RuntimeError: if a process fails.
    """
    with tempfile.TemporaryDirectory(prefix="fwdlib-") as folder:
        path = Path(folder) / "found.json"
        given = (str(path), str(num_rounds), str(seconds))
        if slow:
            links.run([sys.executable, "-m", "fwdlib.bench.sharing", *given], count, megabits)
        elif count == 1:
            work(*given)
        else:
            start(count, work, *given)
        return json.loads(path.read_text()) | {"count": count, "megabits": megabits}


def work(path: str, num_rounds: str, seconds: str) -> None:
    """Measure in one of the processes. The first one writes the result to ``path``, as JSON."""
    runtime.keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with joined(torch.device("cpu")) as processes:
            found = _measure(processes, int(num_rounds), float(seconds))
            if processes.rank == 0:
                write_bytes(Path(path), json.dumps(found).encode())
    finally:
        torch.set_num_threads(threads)


Call = tuple[str, str]  # a method or the exchange, and what of it is timed


def _measure(processes: Processes, num_rounds: int, seconds: float) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(BATCH_SIZE, 784, generator=draw), torch.randint(10, (BATCH_SIZE,), generator=draw)
    model = initialise(fully_connected, 0)
    objective = BatchLoss(model, processes.share(inputs), processes.share(targets), processes.loss)
    calls = _calls(processes, objective)
    sent: dict[Call, tuple[int, int]] = {}
    num_calls: dict[Call, int] = {}
    for key, call in calls.items():
        for _ in range(PLAIN_STEPS + 1):
            call()
        before, begun = links.traffic() if processes.size > 1 else None, time.perf_counter()
        call()
        taken = time.perf_counter() - begun
        sent[key] = links.traffic().since(before) if before else (0, 0)
        num_calls[key] = processes.from_first(lambda taken=taken: max(1, round(seconds / taken)))  # the same in all
    found: dict[Call, list[float]] = {key: [] for key in calls}
    for _ in range(num_rounds):
        for key, call in calls.items():
            if processes.size > 1:
                dist.barrier()
            begun = time.perf_counter()
            for _ in range(num_calls[key]):
                call()
            found[key].append((time.perf_counter() - begun) / num_calls[key])
    methods = {}
    for name in (*NUM_TANGENTS, *RIVALS):
        if (name, "seconds") in sent:
            num_bytes, num_segments = sent[name, "seconds"]
            times = {kind: found[name, kind] for kind in ("seconds", "alone") if (name, kind) in found}
            methods[name] = times | {"bytes": num_bytes, "segments": num_segments}
    exchange = found.get(("exchange", "seconds"), [])
    return {"num_params": num_parameters(model), "methods": methods, "exchange": exchange}


def _calls(processes: Processes, shared: BatchLoss) -> dict[Call, Callable[[], object]]:
    # Steps of each method with the exchange and without it, and the exchange of one number.
    alone = BatchLoss(shared.model, shared.inputs, shared.targets, F.cross_entropy)
    backprop = DataParallelGradient() if processes.size > 1 else backprop_gradient
    calls: dict[Call, Callable[[], object]] = {}
    for name, num_tangents in NUM_TANGENTS.items():
        forward = partial(forward_gradient, num_tangents=num_tangents)
        calls[name, "seconds"] = _step(shared, forward if num_tangents else backprop)
        calls[name, "alone"] = _step(alone, forward if num_tangents else backprop_gradient)
    if processes.size > 1:
        for name in RIVALS:
            step = make_step(name, initialise(fully_connected, 0), LEARNING_RATE, processes)
            calls[name, "seconds"] = partial(step, shared.inputs, shared.targets)
        calls["exchange", "seconds"] = partial(processes.exchange.mean, torch.zeros(1))
    return calls


def _step(objective: BatchLoss, estimator: Estimator) -> Callable[[], object]:
    params = params_of(objective.model)
    optimizer = torch.optim.SGD(list(params.values()), lr=LEARNING_RATE, fused=True)
    return lambda: take_step(optimizer, params, estimator(objective, params).grads)


if __name__ == "__main__":
    work(*sys.argv[1:])
