"""Backprop through all steps of a process, the rival of forward mode: plain, with checkpoints, or compiled."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fwdlib.checks import check_count
from fwdlib.estimators import GradientEstimate
from fwdlib.methods.process import ProcessLoss, Tree, is_inexact, parted
from fwdlib.objectives import requiring_grad
from fwdlib.tangents import Params, check_params

MAX_SHAPES = 256
"""How many forms of steps :func:`reverse_gradient` compiles before it gives up with an error."""


def reverse_gradient(
    objective: ProcessLoss, params: Params, *, num_checkpoints: int | None = None, num_compiled: int | None = None
) -> GradientEstimate:
    """Compute the gradient of a process by backprop through all its steps: the rival of forward mode.

    Args:
        objective: the process.
        params: the point.
        num_checkpoints: how many states are kept; the steps between them are computed again in the backward pass. None
            to keep everything. The square root of T needs least memory.
        num_compiled: how many steps ``torch.compile`` compiles together; None to run them as they are written.

    Returns:
        The exact gradient; ``jvps`` is empty.
    """
    check_params(params)
    leaves = {name: p.detach() for name, p in params.items()}
    advance, size, shapes = objective.advance, objective.num_steps, contextlib.nullcontext()
    if num_compiled is not None:
        shapes, size = many_shapes(), check_count("num_compiled", num_compiled)
        if objective.reverse is None:
            objective.reverse = torch.compile(partial(bare_steps, objective.step), dynamic=False)
        advance = objective.reverse

    def segment(state: Tree, first: int, last: int) -> tuple[Tree, Tensor | int]:
        # The state after some steps, and the loss there if there is one.
        for begin in range(first, last, size):
            end = min(begin + size, last)
            state = advance(state, leaves, 0, objective.inputs_between(begin, end), end - begin)
        return state, objective.loss_at(last, state, leaves) if last in moments else 0

    moments = objective.moments
    stride = objective.num_steps if num_checkpoints is None else -(-objective.num_steps // num_checkpoints)
    borders = sorted({*range(0, moments[-1], stride), *moments, 0})
    with requiring_grad(leaves.values()), shapes, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute")  # torch's compiler causes it itself
        if num_checkpoints is None:
            total, found = _through_all(objective, leaves, segment, borders)
        else:
            total, found = _by_segments(objective, leaves, segment, borders)
    return GradientEstimate(total, dict(zip(leaves, found, strict=True)), total.new_empty(0))


def many_shapes() -> contextlib.AbstractContextManager:
    """Return a context in which ``torch.compile`` compiles many forms of a function, and fails where they are too many.

    It counts the forms of all processes together, and otherwise runs them eagerly in silence from the ninth on.
    """
    return torch._dynamo.config.patch(recompile_limit=MAX_SHAPES, fail_on_recompile_limit_hit=True)


def bare_steps(step: Callable, state: Tree, params: Params, first: int, inputs: tuple, num_steps: int) -> Tree:
    """Do as :meth:`ProcessLoss.advance`, without its checks, which a compiler cannot follow."""
    for i in range(num_steps):
        state = step(state, params, *tree_map(lambda x, i=i: x[i], inputs))
    return state


Segment = Callable[[Tree, int, int], tuple[Tree, "Tensor | int"]]


@torch.enable_grad()
def _through_all(
    process: ProcessLoss, leaves: Params, segment: Segment, borders: list[int]
) -> tuple[Tensor, Sequence[Tensor]]:
    # One backward pass through everything.
    state, total = segment(process.start(leaves), 0, 0)
    for first, last in itertools.pairwise(borders):
        state, loss = segment(state, first, last)
        total = total + loss
    return total.detach(), torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)


def _by_segments(
    process: ProcessLoss, leaves: Params, segment: Segment, borders: list[int]
) -> tuple[Tensor, Sequence[Tensor]]:
    # Keeps the states at the borders, and runs each segment again in the backward pass. torch.utils.checkpoint does the
    # same by hooks that torch.func, which a step may use, does not allow.
    params, pairs = list(leaves.values()), list(itertools.pairwise(borders))
    with torch.no_grad():
        states = [process.start(leaves)]
        for first, last in pairs:
            states.append(segment(states[-1], first, last)[0])
    total, found = 0, [torch.zeros_like(p) for p in params]
    by_state = [torch.zeros_like(x) for x in parted(states.pop())[0]]  # the gradient by the state after a segment
    for first, last in reversed(pairs):
        values, spec = tree_flatten(states.pop())
        values = [x.detach().clone().requires_grad_(is_inexact(x)) for x in values]
        before = [x for x in values if x.requires_grad]
        with torch.enable_grad():
            after, loss = segment(tree_unflatten(values, spec), first, last)
            slopes = _slopes(after, loss, by_state, [*before, *params])
        total, by_state = total + (loss.detach() if isinstance(loss, Tensor) else loss), slopes[: len(before)]
        found = [f + g for f, g in zip(found, slopes[len(before) :], strict=True)]
    with torch.enable_grad():
        after, loss = segment(process.start(leaves), 0, 0)
        slopes = _slopes(after, loss, by_state, params)
    return (total + loss).detach(), [f + g for f, g in zip(found, slopes, strict=True)]


def _slopes(after: Tree, loss: Tensor | int, by_state: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    # The gradient by what goes into a segment, from the loss and the gradient by the state that comes out.
    for x, g in zip(parted(after)[0], by_state, strict=True):
        loss = loss + (x * g.conj()).real.sum()
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(loss, inputs, materialize_grads=True)
