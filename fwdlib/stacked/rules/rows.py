"""What the rules do with rows: join them to a dual, give them equal axes, find an axis of a tensor among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fwdlib.stacked.dual import Dual, pad_rows
from fwdlib.stacked.forward_pass import Pass


def dual_of(primal: Tensor, tangents: Tensor) -> Dual:
    """Join a primal and its tangents, which must broadcast to ``(R, *primal.shape)``."""
    if tangents.shape[1:] != primal.shape:
        tangents = tangents.expand(-1, *primal.shape)
    if torch.is_grad_enabled():
        return Dual.of(primal, tangents.detach() if tangents.requires_grad else tangents)
    if primal.dim() != 4 or not len(primal):
        return Dual(torch.cat([primal.unsqueeze(0), tangents]))
    # Along the axis of the examples torch.cat recognises channels_last and keeps it.
    return Dual(torch.cat([primal, *tangents.unbind()]).unflatten(0, (1 + len(tangents), len(primal))))


def padded_rows(run: Pass, x: Any) -> Tensor:
    """Return 1 + K rows of ``x``: a constant gets zero tangents, so that a rule can add others to them."""
    return pad_rows(run.stack(x), 1 + run.perturbation.num_tangents)


def broadcastable_rows(run: Pass, x: Any, other: Any) -> tuple[Tensor, Tensor]:
    """Return the rows of both arguments, with the same number of axes, so that they broadcast against each other."""
    like = x if isinstance(x, Tensor) else other
    stacks = []
    for value in (x, other):
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=None if isinstance(value, complex) else like.dtype, device=like.device)
        stacks.append(run.stack(value))
    if stacks[0].dtype != stacks[1].dtype:  # a scalar tensor does not widen the type, but its row would
        dtype = torch.result_type(stacks[0][0], stacks[1][0])
        stacks = [stack.to(dtype) for stack in stacks]
    num_axes = max(stack.dim() for stack in stacks) - 1
    for value, stack in zip((x, other), stacks, strict=True):
        if isinstance(value, Dual) and 1 < stack.dim() <= num_axes and run.is_batch(value):
            run.mix_examples()  # broadcasting moves the axis of the examples
    return tuple(with_axes(stack, num_axes) for stack in stacks)


def with_axes(stack: Tensor, num_axes: int) -> Tensor:
    """Return the stack with axes of length 1 after the axis of rows, so that each row has ``num_axes`` axes."""
    missing = num_axes - (stack.dim() - 1)
    return stack.reshape(len(stack), *[1] * missing, *stack.shape[1:]) if missing > 0 else stack


def row_axis(dim: int) -> int:
    """Return the axis of a stack that is axis ``dim`` of each row."""
    return dim + 1 if dim >= 0 else dim


def rows_along(run: Pass, x: Any, dim: int) -> tuple[Tensor, int]:
    """Return the rows of ``x`` and the axis that ``dim`` is in them, for a rule whose function mixes along ``dim``."""
    stack = run.stack(x)
    axis = row_axis(dim)
    if axis % stack.dim() == 1:
        run.mix_examples()
    return stack, axis


def per_axis(value: Any, num_axes: int) -> tuple[int, ...]:
    """Return an option such as a stride as a tuple with one number for each axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * num_axes if len(values) == 1 else values
