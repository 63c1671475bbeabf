r"""What a step costs when several processes share it: a model with three numbers.

.. math:: t = c + m\,\lambda + 8\,b / w

c is the time that a process computes, m the number of messages that it sends one after the other, each of latency
:math:`\lambda`, b the number of bytes that it sends, w the bits per second of its link. Backprop's ring all-reduce of P
gradients of four bytes has :math:`m = 2(N - 1)` and :math:`b = 2(N - 1)/N \cdot 4P`, Patarasuk & Yuan 2009, *Bandwidth
optimal all-reduce algorithms for clusters of workstations*. K directional derivatives and the loss have
:math:`m = \sum_i (p_i - 1)`, where :math:`p_i` are the prime factors of N, see
:class:`fwdlib.trainer.exchange.Exchange`, and next to no bytes.

:mod:`fwdlib.bench.sharing` measures such steps, :mod:`fwdlib.bench.scaling_figures` draws both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from fwdlib.trainer.processes import prime_factors

NUM_TANGENTS = {"BP": 0, "FG-RANK1, K = 1": 1, "FG-RANK1, K = 16": 16}  # method -> K
BYTES_OF_A_NUMBER = 4


class Link(NamedTuple):
    """The connection of a process with the others."""

    seconds: float
    """Latency: the time of a message of no length."""
    bits_per_second: float


class Cost(NamedTuple):
    """What a process computes and sends in a step."""

    compute: float
    """Seconds without the exchange."""
    num_messages: int
    """Sent one after the other."""
    num_bytes: float

    def over(self, link: Link) -> float:
        """Return the seconds of the step. No part of the exchange overlaps with computation."""
        return self.compute + self.num_messages * link.seconds + 8 * self.num_bytes / link.bits_per_second


def cost(num_tangents: int, count: int, compute: float, num_params: int) -> Cost:
    """Return the modelled cost of a step.

    Args:
        num_tangents: K; 0 for backprop.
        count: N, the number of processes.
        compute: seconds that each process computes.
        num_params: P.
    """
    if num_tangents:
        num_messages = sum(prime - 1 for prime in prime_factors(count))
        return Cost(compute, num_messages, num_messages * BYTES_OF_A_NUMBER * (1 + num_tangents))
    return Cost(compute, 2 * (count - 1), 2 * (count - 1) / count * BYTES_OF_A_NUMBER * num_params)


def num_steps(num_tangents: int, num_params: int) -> float:
    """Return how many steps of the best length descend as far as one step along the exact gradient, on a round bowl.

    A step along the estimate descends as far as a step along the gradient, times the squared cosine between them. Its
    mean is 1 / (1 + (P - 1)/K) for tangents of unit variance and least second moment, such as rank-one tangents. All
    processes draw the same tangents, so N does not change it. The loss of a network curves in few directions only: most
    of the noise is then harmless, and fewer steps are enough.

    Args:
        num_tangents: K; 0 for backprop.
        num_params: P.
    """
    return 1 + (num_params - 1) / num_tangents if num_tangents else 1.0


def even_bandwidth(backprop: Cost, forward: Cost, latency: float, ratio: float) -> float:
    """Return the bits per second at which both methods descend as far in the same time.

    Over slower links forward gradients are ahead. The result is 0 if backprop is ahead over every link, as its
    gradients are then fewer bytes than the scalars of all the forward steps. It is infinite if forward gradients are
    ahead over every link.

    Args:
        backprop: the cost of its step.
        forward: the cost of a step of forward gradients.
        latency: of a message, in seconds.
        ratio: number of forward steps that descend as far as one step of backprop.
    """
    fixed = ratio * forward.over(Link(latency, math.inf)) - backprop.over(Link(latency, math.inf))
    bits = 8 * (backprop.num_bytes - ratio * forward.num_bytes)
    if bits <= 0:
        return 0.0
    return bits / fixed if fixed > 0 else math.inf


def predictions(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, float], dict[str, float]]:
    """Predict the steps over slowed links from the measurements without a limit.

    Those give the time that each number of processes computes, and the time of a message between two processes.

    Args:
        rows: as :func:`fwdlib.bench.sharing.measure_step` returns them.

    Returns:
        (count, megabits) -> method -> seconds of a step, for each slowed row whose number of processes was also
        measured without a limit; empty if two processes were not.
    """
    plain = {row["count"]: row for row in rows if not row["megabits"]}
    if 2 not in plain:
        return {}
    latency = statistics.median(plain[2]["exchange"])
    return {
        (row["count"], row["megabits"]): {
            name: _cost(plain[row["count"]], name, row["count"]).over(Link(latency, 1e6 * row["megabits"]))
            for name in NUM_TANGENTS
        }
        for row in rows
        if row["megabits"] and row["count"] in plain
    }


def on_paper(
    rows: Sequence[dict[str, Any]], counts: Sequence[int], gigabits: Sequence[float], latency: float
) -> list[dict[str, Any]]:
    """Apply the model to more processes, each with a whole batch of its own and as fast as the one measured here.

    Args:
        rows: as :func:`fwdlib.bench.sharing.measure_step` returns them; one has ``count`` 1.
        counts: numbers of processes.
        gigabits: rates of their links, per second.
        latency: of a message, in seconds.

    Returns:
        A dict for each rate and count: ``count``, ``gigabits``, and by method ``costs`` and ``seconds`` of a step.
    """
    alone, found = next(row for row in rows if row["count"] == 1), []
    for rate in gigabits:
        for count in counts:
            costs = {name: _cost(alone, name, count) for name in NUM_TANGENTS}
            seconds = {name: each.over(Link(latency, 1e9 * rate)) for name, each in costs.items()}
            found.append({"count": count, "gigabits": rate, "costs": costs, "seconds": seconds})
    return found


def _cost(row: dict[str, Any], name: str, count: int) -> Cost:
    return cost(NUM_TANGENTS[name], count, statistics.median(row["methods"][name]["alone"]), row["num_params"])
