"""Rules of sums, differences, products and quotients, element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fwdlib.stacked.dual import Dual, same_rows
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.stacked.rules.rows import broadcastable_rows, dual_of


@register_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Dual:
    """Add the rows; a constant changes the primal alone."""
    x, other = broadcastable_rows(run, x, other)
    return _add_rows(x, other if alpha == 1 else other * alpha)


@register_rule(torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
def sub(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Dual:
    """Subtract the rows."""
    x, other = broadcastable_rows(run, x, other)
    return _add_rows(x, -other if alpha == 1 else other * -alpha)


@register_rule(Tensor.__rsub__, torch.rsub)
def rsub(run: Pass, x: Any, other: Any, *, alpha: float = 1) -> Dual:
    """Subtract with the operands exchanged."""
    return sub(run, other, x, alpha=alpha)


@register_rule(torch.neg, torch.negative, Tensor.neg, Tensor.__neg__)
def neg(run: Pass, x: Any) -> Dual:
    """Negate all rows."""
    return Dual(-run.stack(x))


@register_rule(torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(run: Pass, x: Any, other: Any) -> Dual:
    """Apply the product rule; a constant scales all rows."""
    x, other = broadcastable_rows(run, x, other)
    if len(x) == 1 or len(other) == 1:
        return Dual(x * other)
    x, other = same_rows([x, other])
    return dual_of(x[0] * other[0], x[1:] * other[0] + x[0] * other[1:])


@register_rule(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.__truediv__)
def div(run: Pass, x: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """Apply the quotient rule."""
    if rounding_mode is not None:
        return NotImplemented
    x, other = broadcastable_rows(run, x, other)
    if len(other) == 1:
        return Dual(x / other)
    x, other = same_rows([x, other])
    y = x[0] / other[0]
    return dual_of(y, (x[1:] - y * other[1:]) / other[0])


@register_rule(Tensor.__rtruediv__, Tensor.__rdiv__)
def rdiv(run: Pass, x: Any, other: Any) -> Any:
    """Divide with the operands exchanged."""
    return div(run, other, x)


def _add_rows(x: Tensor, other: Tensor) -> Dual:
    if len(x) == len(other):
        return Dual(x + other)
    few, many = sorted((x, other), key=len)
    rows = len(few)
    shape = torch.broadcast_shapes(few.shape[1:], many.shape[1:])
    return Dual(torch.cat([few + many[:rows], many[rows:].expand(-1, *shape)]))
