"""Gradients of long processes, as :func:`fwdlib.bench.memory.peak_bytes` starts them: built first, then measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fwdlib.bench import measuring, memory
from fwdlib.checks import check_choice
from fwdlib.estimators import GradientEstimate
from fwdlib.methods.process import ProcessLoss
from fwdlib.methods.processes import RECURRENT, reaction_diffusion, recurrent_layer, recurrent_parameters
from fwdlib.methods.reverse import reverse_gradient
from fwdlib.methods.sensitivity import online_gradient, sensitivity_gradient

METHODS = ("forward gradient", "backprop")
Work = Callable[[], GradientEstimate]


def simulation(method: str, num_steps: int, size: int = 64) -> Work:
    """Return the gradient of a partial differential equation by its five coefficients, as a call.

    Args:
        method: of :data:`METHODS`.
        num_steps: T.
        size: of the grid, in both directions.

    Raises:
        ValueError: if the method is none of these.
    """
    check_choice("method", method, METHODS)
    torch.set_num_threads(1)
    start = torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    coefficients = {"D": 0.6, "cx": 0.4, "cy": 0.2, "r": 0.3, "k": 0.1}
    params = {name: torch.tensor(value) for name, value in coefficients.items()}

    def work_of(num_steps: int) -> Work:
        process = ProcessLoss(reaction_diffusion(0.1), start, lambda u, p: u.square().mean(), num_steps)
        if method == "backprop":
            return lambda: reverse_gradient(process, params)
        return lambda: sensitivity_gradient(process, params, compiled=False, progress=None)

    _warm_up(work_of, method)
    return work_of(num_steps)


def recurrence(method: str, num_steps: int, num_units: int = 128, batch: int = 64) -> Work:
    """Return the gradient of an element-wise recurrent layer with a readout of ten classes, as a call.

    Args:
        method: of :data:`METHODS`.
        num_steps: T.
        num_units: N.
        batch: B.

    Raises:
        ValueError: if the method is none of these.
    """
    check_choice("method", method, METHODS)
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    params = recurrent_parameters(num_units, 10, draw)
    targets = torch.randint(0, 10, (batch,), generator=draw)

    def work_of(num_steps: int) -> Work:
        sequences = torch.rand(num_steps, batch, generator=torch.Generator().manual_seed(1))
        process = recurrent_layer(sequences, targets, num_units)
        if method == "backprop":
            return lambda: reverse_gradient(process, params)
        return lambda: online_gradient(process, params, elementwise=RECURRENT, compiled=False, progress=None)

    _warm_up(work_of, method)
    return work_of(num_steps)


def _warm_up(work_of: Callable[[int], Work], method: str) -> None:
    # What happens once, such as imports, is not counted. Backprop's own memory would be used again, and so hidden.
    for _ in range(1 if method == "backprop" else 4):
        work_of(2 if method == "backprop" else 120)()


def peaks(function: str, steps: Sequence[int]) -> dict[str, dict[int, float]]:
    """Measure the peak memory of both methods by the number of steps, each in a process of its own.

    Args:
        function: ``"simulation"`` or ``"recurrence"``.
        steps: values of T.

    Returns:
        For each method T -> MiB. Less than 1 counts as 1: a process's memory is not known more exactly.
    """
    name = f"fwdlib.bench.long_processes:{function}"

    def peak(method: str, num_steps: int) -> float:
        return max(1.0, memory.peak_bytes(name, {"method": method, "num_steps": num_steps}) / 2**20)

    return {method: {num_steps: peak(method, num_steps) for num_steps in steps} for method in METHODS}


def times_by_parameters(sides: Sequence[int], size: int = 64, num_steps: int = 20, seconds: float = 6.0) -> dict:
    """Time gradients by the growth of a partial differential equation that differs between square regions.

    Args:
        sides: regions in a row; P is its square.
        size: of the grid, divisible by all ``sides``.
        num_steps: T.
        seconds: as for :func:`fwdlib.bench.measuring.interleave`.

    Returns:
        For each method P -> milliseconds, the least of some rounds. Both run as they are written, not compiled.
    """
    others = {name: torch.tensor(value) for name, value in {"D": 0.6, "cx": 0.4, "cy": 0.2, "k": 0.1}.items()}
    advance, start = reaction_diffusion(0.1), torch.full((size, size), 0.1)

    def work(method: str, side: int) -> Work:
        def step(u: torch.Tensor, p: dict) -> torch.Tensor:
            growth = p["r"].repeat_interleave(size // side, 0).repeat_interleave(size // side, 1)
            return advance(u, others | {"r": growth})

        process, params = (
            ProcessLoss(step, start, lambda u, p: u.mean(), num_steps),
            {"r": torch.full((side, side), 0.3)},
        )
        if method == "backprop":
            return lambda: reverse_gradient(process, params)
        return lambda: sensitivity_gradient(process, params, compiled=False, progress=None)

    calls = {(method, side): work(method, side) for method in METHODS for side in sides}
    found = measuring.interleave(calls, seconds=seconds, min_rounds=1, max_rounds=5, block_seconds=0.0)
    return {m: {side**2: 1e3 * min(found[m, side]) for side in sides} for m in METHODS}
