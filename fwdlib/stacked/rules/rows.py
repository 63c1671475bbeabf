"""What the rules do with rows: join them to a dual, give them equal axes, find an axis of a tensor among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fwdlib.stacked.dual import Dual, joined, pad_rows
from fwdlib.stacked.forward_pass import Pass


def dual_of(primal: Tensor, tangents: Tensor, *, are_new: bool = False) -> Dual:
    """Join a primal and its tangents, which must broadcast to ``(R, *primal.shape)`` and get the primal's type.

    Args:
        primal: shape (...).
        tangents: its tangents.
        are_new: whether nobody else has both: they are joined when a rule first needs the stack.
    """
    if tangents.shape[1:] != primal.shape:
        tangents = tangents.expand(-1, *primal.shape)
    if tangents.dtype != primal.dtype:
        tangents = tangents.to(primal.dtype)
    if torch.is_grad_enabled():
        return Dual.of(primal, tangents.detach() if tangents.requires_grad else tangents)
    return Dual.of(primal, tangents, keeps_primal=False) if are_new else Dual(joined(primal, tangents))


def parts_of(run: Pass, x: Any) -> tuple[Tensor, Tensor]:
    """Return the primal of ``x`` and its tangents (R, ...), for a rule that needs no stack."""
    if isinstance(x, Dual):
        return x.parts
    stack = run.stack(x)
    return stack[0], stack[1:]


def by_rows(kernel: Callable[..., Tensor], tangents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply a kernel of a backward pass, which takes one gradient, to each tangent."""
    rows = [kernel(row, *args, **kwargs) for row in tangents.unbind()]
    if len(rows) == 1:
        return rows[0].unsqueeze(0)
    return torch.stack(rows) if rows else tangents


def padded_rows(run: Pass, x: Any) -> Tensor:
    """Return 1 + K rows of ``x``: a constant gets zero tangents, so that a rule can add others to them."""
    return pad_rows(run.stack(x), 1 + run.perturbation.num_tangents)


def with_axes(stack: Tensor, num_axes: int) -> Tensor:
    """Return the stack with axes of length 1 after the axis of rows, so that each row has ``num_axes`` axes."""
    missing = num_axes - (stack.dim() - 1)
    return stack.reshape(len(stack), *[1] * missing, *stack.shape[1:]) if missing > 0 else stack


def row_axis(dim: int, stack: Tensor, *, is_new: bool = False) -> int:
    """Return the axis of a stack that is axis ``dim`` of each row.

    Args:
        dim: the axis, from the front or, if negative, from the back.
        stack: the stack.
        is_new: whether the axis is inserted.

    Raises:
        IndexError: if the rows do not have this axis.
    """
    num_axes = stack.dim() - 1 + is_new
    if not -num_axes <= dim < num_axes:
        raise IndexError(f"dim must be from {-num_axes} to {num_axes - 1}, got {dim}")
    return dim + 1 if dim >= 0 else dim + num_axes + 1


def rows_along(run: Pass, x: Any, dim: int) -> tuple[Tensor, int]:
    """Return the rows of ``x`` and the axis that ``dim`` is in them, for a rule whose function mixes along ``dim``."""
    stack = run.stack(x)
    return stack, axis_along(run, stack, dim)


def axis_along(run: Pass, stack: Tensor, dim: int) -> int:
    """Return the axis that ``dim`` is in a stack, for such a rule."""
    axis = row_axis(dim, stack)
    if axis == 1:
        run.mix_examples()
    return axis


def per_axis(value: Any, num_axes: int) -> tuple[int, ...]:
    """Return an option such as a stride as a tuple with one number for each axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * num_axes if len(values) == 1 else values


def is_half(x: Tensor) -> bool:
    """Return whether sums of numbers of this type are to be computed in float32, as torch does."""
    return (x.parts[1] if isinstance(x, Dual) else x).dtype in (torch.float16, torch.bfloat16)


def is_autocast(x: Tensor) -> bool:
    """Return whether torch chooses the type in which a function of ``x`` is computed."""
    return torch.is_autocast_enabled(x.device.type)
