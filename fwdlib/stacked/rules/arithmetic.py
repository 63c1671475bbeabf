"""Rules of sums, differences, products and quotients, element by element.

A constant, a number or a tensor without tangents, meets the rows as it is: torch then chooses the type of the result,
and the precision of the number, as it does for the primal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwdlib.stacked.dual import Dual, same_rows
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.rules.rows import dual_of, with_axes
from fwdlib.stacked.rules.signatures import rule_of

CONSTANTS = (Tensor, int, float, complex, np.number, np.bool_)


@rule_of(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Any:
    """Add the rows; a constant changes the primal alone."""
    return _sum(run, torch.add, x, other, alpha)


@rule_of(torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
def sub(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Any:
    """Subtract the rows."""
    return _sum(run, torch.sub, x, other, alpha)


@rule_of(Tensor.__rsub__, torch.rsub)
def rsub(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Any:
    """Subtract with the operands exchanged."""
    return _sum(run, torch.sub, other, x, alpha)


@rule_of(torch.neg, torch.negative, Tensor.neg, Tensor.__neg__)
def neg(run: Pass, x: Any) -> Dual:
    """Negate all rows."""
    return Dual(-run.stack(x))


@rule_of(torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(run: Pass, x: Any, other: Any) -> Any:
    """Apply the product rule; a constant scales all rows."""
    if not run.has_tangents(x):  # in this order, which decides on the layout of the result
        stack = _rows_beside(run, other, x)
        return NotImplemented if stack is None else Dual(x * stack)
    if not run.has_tangents(other):
        stack = _rows_beside(run, x, other)
        return NotImplemented if stack is None else Dual(stack * other)
    x, other, a, b = _both_rows(run, x, other)
    return dual_of(x[0] * other[0], a[1:] * b[0] + a[0] * b[1:])


@rule_of(torch.div, torch.divide, Tensor.div, torch.true_divide, Tensor.__truediv__)
def div(run: Pass, x: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """Apply the quotient rule."""
    if rounding_mode is not None:
        return NotImplemented
    if not run.has_tangents(other):
        stack = _rows_beside(run, x, other)
        return NotImplemented if stack is None else Dual(stack / other)
    if not run.has_tangents(x):
        stack = _rows_beside(run, other, x)
        if stack is None:
            return NotImplemented
        primal = run.stack(other)[0]
        y = x / primal if isinstance(x, Tensor) else primal.reciprocal() * x
        return dual_of(y, stack[1:] * (-y / stack[0]))
    x, other, a, b = _both_rows(run, x, other)
    y = x[0] / other[0]
    return dual_of(y, (a[1:] - y * b[1:]) / b[0])


@rule_of(Tensor.__rtruediv__, Tensor.__rdiv__)
def rdiv(run: Pass, x: Any, other: Any) -> Any:
    """Multiply by the reciprocal, as torch does."""
    if run.has_tangents(x):
        stack = run.stack(x)
        y = stack[0].reciprocal()
        return mul(run, dual_of(y, stack[1:] * -(y * y)), other)
    return mul(run, x.reciprocal(), other)


def _sum(run: Pass, function: Callable, x: Any, other: Any, alpha: float) -> Any:
    # torch.add or torch.sub
    if isinstance(alpha, Tensor):
        return NotImplemented
    if run.has_tangents(x) and run.has_tangents(other):
        x, other, a, b = _both_rows(run, x, other)
        if x.dtype == other.dtype:
            return Dual(function(a, b, alpha=alpha))
        return dual_of(function(x[0], other[0], alpha=alpha), function(a[1:], b[1:], alpha=alpha))
    if run.has_tangents(x):
        stack = _rows_beside(run, x, other)
        if stack is None:
            return NotImplemented
        return dual_of(function(run.stack(x)[0], other, alpha=alpha), stack[1:])
    stack = _rows_beside(run, other, x)
    if stack is None:
        return NotImplemented
    primal = run.stack(other)[0]
    if function is torch.sub:
        return dual_of(torch.rsub(primal, x, alpha=alpha), stack[1:] * -alpha)
    scale = (lambda rows: rows) if alpha == 1 else (lambda rows: rows * alpha)
    return dual_of(x + scale(primal), scale(stack[1:]))


def _rows_beside(run: Pass, x: Any, constant: Any) -> Tensor | None:
    # The rows of x, which broadcast against the constant and have a type that keeps torch's. None for other objects.
    if not isinstance(constant, CONSTANTS):
        return None
    stack = run.stack(x)
    if isinstance(constant, Tensor):
        if constant.dtype != stack.dtype:
            stack = stack.to(torch.result_type(stack[0], constant))
        if constant.dim() >= stack.dim():
            stack = _spread(run, x, stack, constant.dim())
    return stack


def _both_rows(run: Pass, x: Any, other: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The rows of both, and as many rows of both with as many axes, which broadcast against each other.
    stacks = a, b = run.stack(x), run.stack(other)
    num_axes = max(a.dim(), b.dim()) - 1
    spread = [_spread(run, value, stack, num_axes) for value, stack in zip((x, other), stacks, strict=True)]
    if a.dtype != b.dtype:
        spread = [stack.to(torch.promote_types(a.dtype, b.dtype)) for stack in spread]
    return *stacks, *(spread if len(spread[0]) == len(spread[1]) else same_rows(spread))


def _spread(run: Pass, x: Any, stack: Tensor, num_axes: int) -> Tensor:
    if isinstance(x, Dual) and 1 < stack.dim() <= num_axes and run.is_batch(x):
        run.mix_examples()  # broadcasting moves the axis of the examples
    return with_axes(stack, num_axes)
