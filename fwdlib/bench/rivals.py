"""What else a user short of memory or time would take.

Backprop that updates inside its backward pass, with and without checkpoints; derivatives from two evaluations of the
loss; and other packages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fwdlib.objectives import params_of

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, fused=True),
    "momentum": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "Adam": partial(torch.optim.Adam, fused=True),
}
"""Torch's optimizers in their fastest form."""
CHECKPOINTS: dict[str, Callable[[int], int]] = {
    "in-backward": lambda num_parts: 1,
    "2 checkpoints": lambda num_parts: min(2, num_parts),
    "√L checkpoints": lambda num_parts: round(math.sqrt(num_parts)),
    "L checkpoints": lambda num_parts: num_parts,
}
"""Name of a rival -> the number of segments for a model of L parts; activations are kept inside the last one alone."""
RADIUS = 1e-3
"""How far two-point differences go, as in MeZO (Malladi et al. 2023)."""

Step = Callable[[], Tensor]


def parts_of(model: nn.Module) -> list[nn.Module]:
    """Return a chain cut into parts, each of which begins with a module that has parameters; another model is one."""
    if not isinstance(model, nn.Sequential):
        return [model]
    parts: list[list[nn.Module]] = []
    for module in model:
        if not parts or any(True for _ in module.parameters()):
            parts.append([])
        parts[-1].append(module)
    return [nn.Sequential(*part) for part in parts]


def segments_of(model: nn.Module, num_segments: int) -> list[nn.Sequential]:
    """Return a chain cut into segments of about the same number of parts."""
    parts = parts_of(model)
    bounds = [round(i * len(parts) / num_segments) for i in range(num_segments + 1)]
    return [nn.Sequential(*parts[a:b]) for a, b in itertools.pairwise(bounds)]


def in_backward(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    learning_rate: float,
    name: str = "in-backward",
    optimizer: str = "",
) -> Step:
    """Return a step of backprop that updates each parameter as soon as its gradient is there, and drops the gradient.

    Args:
        model: its parameters keep the hooks that do so.
        inputs: a batch.
        targets: its targets.
        learning_rate: the learning rate.
        name: one of :data:`CHECKPOINTS`.
        optimizer: one of :data:`OPTIMIZERS`; empty for the update of plain SGD by hand.
    """
    optimizers = {p: OPTIMIZERS[optimizer]([p], lr=learning_rate) for p in model.parameters()} if optimizer else {}

    def update(p: Tensor) -> None:
        if optimizers:
            optimizers[p].step()
        else:
            with torch.no_grad():
                p.add_(p.grad, alpha=-learning_rate)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    if name == "in-backward":
        segments: Sequence[nn.Module] = [model]
    else:
        segments = segments_of(model, CHECKPOINTS[name](len(parts_of(model))))

    def step() -> Tensor:
        x = inputs
        for segment in segments[:-1]:
            x = checkpoint(segment, x, use_reentrant=False, preserve_rng_state=False)
        loss = F.cross_entropy(segments[-1](x), targets)
        loss.backward()
        return loss.detach()

    return step


def two_point(model: nn.Module, inputs: Tensor, targets: Tensor, learning_rate: float) -> Step:
    """Return a step of SGD along the difference of two losses, as MeZO takes it (Malladi et al. 2023).

    Its direction is drawn from one seed, anew each time that it is needed, so it takes no memory of its own.
    """
    params, seeds, draw = params_of(model), torch.Generator().manual_seed(0), torch.Generator(inputs.device)

    def move(seed: int, length: float) -> None:
        draw.manual_seed(seed)
        for p in params.values():
            p.add_(torch.randn(p.shape, generator=draw, device=p.device, dtype=p.dtype), alpha=length)

    @torch.no_grad()
    def step() -> Tensor:
        seed = int(torch.randint(2**62, (), generator=seeds))
        move(seed, RADIUS)
        above = F.cross_entropy(model(inputs), targets)
        move(seed, -2 * RADIUS)
        below = F.cross_entropy(model(inputs), targets)
        slope = float(above - below) / (2 * RADIUS)
        move(seed, RADIUS - learning_rate * slope)
        return (above + below) / 2

    return step


def torchzero(model: nn.Module, inputs: Tensor, targets: Tensor, learning_rate: float) -> Step:
    """Return a step of torchzero's forward gradient, if the package is installed.

    Raises:
        ImportError: if it is not.
    """
    import torchzero as tz

    optimizer = tz.Optimizer(model.parameters(), tz.m.ForwardGradient(), tz.m.LR(learning_rate))

    def closure(backward: bool = True) -> Tensor:
        loss = F.cross_entropy(model(inputs), targets)
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    return lambda: optimizer.step(closure)
