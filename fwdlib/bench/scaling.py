r"""What a step costs when several processes share it: measured, and predicted by a model with three numbers.

.. math:: t = c + m\,\lambda + 8\,b / w

c is the time that a process computes, m the number of messages that it sends one after the other, each of which takes
the latency :math:`\lambda`, b the bytes that it sends, w the bits that its link carries in a second. Backprop's ring
all-reduce of P gradients of four bytes has :math:`m = 2(N - 1)` and :math:`b = 2(N - 1)/N \cdot 4P`, Patarasuk & Yuan
2009, *Bandwidth optimal all-reduce algorithms for clusters of workstations*. K directional derivatives and the loss
take :math:`m = \sum_i (p_i - 1)` for N with the prime factors :math:`p_i`, see
:class:`fwdlib.trainer.distributed.Exchange`, and next to no bytes.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fwdlib import runtime
from fwdlib.atomic import write_bytes
from fwdlib.bench import links
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.models import fully_connected, initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.gradients import Gradients
from fwdlib.trainer.distributed import DataParallelGradient, prime_factors, processes, start
from fwdlib.trainer.processes import Workers

METHODS = {"BP": 0, "FG-RANK1, K = 1": 1, "FG-RANK1, K = 16": 16}  # with the number of tangents
BATCH_SIZE = 64  # of all processes together
BYTES_OF_A_NUMBER = 4
LEARNING_RATE = 1e-6  # small: what is measured here are times


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    count: int, megabits: float | None = None, *, slow: bool = False, num_rounds: int = 7, seconds: float = 0.3
) -> dict[str, Any]:
    """Measure a step of the network 784-800-800-10 by each method, shared among processes on this machine.

    Args:
        count: of processes, each with one thread.
        megabits: a second, that the link of each carries either way; None for what the machine gives.
        slow: whether the processes run in namespaces of their own, see :mod:`fwdlib.bench.links`; else they talk over
            the loopback device.
        num_rounds: in which the methods take turns.
        seconds: that a method steps in a round, at least one step.

    Returns:
        ``methods``: method -> ``seconds``, a step's with SGD, one number a round; ``alone``, the same without any
        exchange, but at the same time in all processes; ``bytes`` and ``segments``, what the first process sends.
        ``exchange``: seconds of an exchange of one number, one number a round. ``num_params``, ``count``, ``megabits``.

    Raises:
        OSError: if links cannot be slowed here.
        RuntimeError: if a process fails.
    """
    with tempfile.TemporaryDirectory(prefix="fwdlib-") as folder:
        path = Path(folder) / "found.json"
        given = (str(path), str(num_rounds), str(seconds))
        if slow:
            links.run([sys.executable, "-m", "fwdlib.bench.scaling", *given], count, megabits)
        elif count == 1:
            work(*given)
        else:
            start(count, work, *given)
        return json.loads(path.read_text()) | {"count": count, "megabits": megabits}


def work(path: str, num_rounds: str, seconds: str) -> None:
    """Measure in one of the processes; the first writes what it finds to ``path``, as JSON."""
    runtime.keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with processes(torch.device("cpu")) as workers:
            found = _measure(workers, int(num_rounds), float(seconds))
            if workers.rank == 0:
                write_bytes(Path(path), json.dumps(found).encode())
    finally:
        torch.set_num_threads(threads)


def _measure(workers: Workers, num_rounds: int, seconds: float) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(BATCH_SIZE, 784, generator=draw), torch.randint(10, (BATCH_SIZE,), generator=draw)
    model = initialise(fully_connected, 0)
    shared = BatchLoss(model, workers.share(inputs), workers.share(targets), workers.loss)
    alone = BatchLoss(model, shared.inputs, shared.targets, F.cross_entropy)
    backprop = DataParallelGradient() if workers.size > 1 else backprop_gradient
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, num_tangents in METHODS.items():
        forward = partial(forward_gradient, num_tangents=num_tangents)
        calls[name, "seconds"] = _step(shared, forward if num_tangents else backprop)
        calls[name, "alone"] = _step(alone, forward if num_tangents else backprop_gradient)
    if workers.size > 1:
        calls["exchange", "seconds"] = partial(workers.exchange.mean, torch.zeros(1))

    sent, num_calls = {}, {}
    for key, call in calls.items():
        call()
        before, begun = links.traffic() if workers.size > 1 else None, time.perf_counter()
        call()
        taken = time.perf_counter() - begun
        sent[key] = links.traffic().since(before) if before else (0, 0)
        num_calls[key] = workers.from_first(lambda taken=taken: max(1, round(seconds / taken)))  # as many in all
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(num_rounds):
        for key, call in calls.items():
            if workers.size > 1:
                dist.barrier()
            begun = time.perf_counter()
            for _ in range(num_calls[key]):
                call()
            found[key].append((time.perf_counter() - begun) / num_calls[key])
    return {
        "num_params": sum(p.numel() for p in model.parameters()),
        "methods": {
            name: {
                "seconds": found[name, "seconds"],
                "alone": found[name, "alone"],
                "bytes": sent[name, "seconds"][0],
                "segments": sent[name, "seconds"][1],
            }
            for name in METHODS
        },
        "exchange": found.get(("exchange", "seconds"), []),
    }


def _step(objective: BatchLoss, estimator: Estimator) -> Callable[[], object]:
    params = params_of(objective.model)
    optimizer = torch.optim.SGD(list(params.values()), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        grads = estimator(objective, params).grads
        if isinstance(grads, Gradients):  # as train() takes a step of SGD
            grads.add_to_(params, -LEARNING_RATE)
            return
        for name, p in params.items():
            p.grad = grads[name]
        optimizer.step()

    return step


# --- the model -------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """What connects each process with the others."""

    seconds: float
    """Latency: what a message takes however short it is."""
    bits_per_second: float


class Cost(NamedTuple):
    """What a process computes and sends in a step."""

    compute: float
    """Seconds without any exchange."""
    num_messages: int
    """One after the other."""
    num_bytes: float

    def over(self, link: Link) -> float:
        """Return the seconds of the step, no exchange being hidden behind computation."""
        return self.compute + self.num_messages * link.seconds + 8 * self.num_bytes / link.bits_per_second


def cost(num_tangents: int, count: int, compute: float, num_params: int) -> Cost:
    """Return what a step costs by the model.

    Args:
        num_tangents: K; 0 for backprop.
        count: N, processes.
        compute: seconds that each computes.
        num_params: P.
    """
    if num_tangents:
        num_messages = sum(prime - 1 for prime in prime_factors(count))
        return Cost(compute, num_messages, num_messages * BYTES_OF_A_NUMBER * (1 + num_tangents))
    return Cost(compute, 2 * (count - 1), 2 * (count - 1) / count * BYTES_OF_A_NUMBER * num_params)


def num_steps(num_tangents: int, num_params: int) -> float:
    """Return how many steps of the best length descend as far as one along the exact gradient, on a round bowl.

    The descent of such a step is that along the gradient times the squared cosine between estimate and gradient. For
    tangents of unit variance and least second moment, rank-one ones among them, that is 1 / (1 + (P - 1)/K) on average.
    All processes draw the same tangents, so their number does not change it. Where the loss curves in few directions
    only, as those of networks do, most of the noise is harmless, and it takes fewer.

    Args:
        num_tangents: K; 0 for backprop.
        num_params: P.
    """
    return 1 + (num_params - 1) / num_tangents if num_tangents else 1.0


def even_bandwidth(backprop: Cost, forward: Cost, latency: float, ratio: float) -> float:
    """Return the bits per second at which both methods get as far in the same time; below it the other is ahead.

    0 where backprop is ahead over any link: where its gradients are fewer bytes than the scalars of all the steps that
    it spares. Infinite where forward gradients are.

    Args:
        backprop: its step.
        forward: that of forward gradients.
        latency: seconds.
        ratio: steps of forward gradients for one of backprop's.
    """
    fixed = ratio * forward.over(Link(latency, math.inf)) - backprop.over(Link(latency, math.inf))
    bits = 8 * (backprop.num_bytes - ratio * forward.num_bytes)
    if bits <= 0:
        return 0.0
    return bits / fixed if fixed > 0 else math.inf


def predictions(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, float], dict[str, float]]:
    """Return what the model says of the slowed links among measurements, from those that are not slowed.

    These tell how long each number of processes computes, and how long a message between two of them takes.

    Args:
        rows: as :func:`measure` returns them; what lacks its row without a limit, or that of two processes, is left
            out.

    Returns:
        (count, megabits) -> method -> seconds of a step.
    """
    plain = {row["count"]: row for row in rows if not row["megabits"]}
    if 2 not in plain:
        return {}
    latency = statistics.median(plain[2]["exchange"])
    return {
        (row["count"], row["megabits"]): {
            name: _cost(plain[row["count"]], name, row["count"]).over(Link(latency, 1e6 * row["megabits"]))
            for name in METHODS
        }
        for row in rows
        if row["megabits"] and row["count"] in plain
    }


def on_paper(
    rows: Sequence[dict[str, Any]], counts: Sequence[int], gigabits: Sequence[float], latency: float
) -> list[dict[str, Any]]:
    """Carry the model to more processes, each with a whole batch of its own and as fast as one is here.

    Args:
        rows: as :func:`measure` returns them, that of one process among them.
        counts: numbers of processes.
        gigabits: a second, that their links carry.
        latency: seconds of a message.

    Returns:
        A dict for each: ``count``, ``gigabits``, and by method ``costs`` and ``seconds`` of a step.
    """
    alone, found = next(row for row in rows if row["count"] == 1), []
    for rate in gigabits:
        for count in counts:
            costs = {name: _cost(alone, name, count) for name in METHODS}
            seconds = {name: each.over(Link(latency, 1e9 * rate)) for name, each in costs.items()}
            found.append({"count": count, "gigabits": rate, "costs": costs, "seconds": seconds})
    return found


def _cost(row: dict[str, Any], name: str, count: int) -> Cost:
    return cost(METHODS[name], count, statistics.median(row["methods"][name]["alone"]), row["num_params"])


if __name__ == "__main__":
    work(*sys.argv[1:])
