"""Rules of sums and means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.stacked.rules.rows import dual_of, row_axis


@register_rule(torch.mean, Tensor.mean)
def mean(run: Pass, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Take the mean of each row."""
    return _reduce(run, x, dim, keepdim, dtype, is_mean=True)


@register_rule(torch.sum, Tensor.sum)
def sum_(run: Pass, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Sum each row."""
    return _reduce(run, x, dim, keepdim, dtype, is_mean=False)


def _reduce(run: Pass, x: Any, dim: Any, keepdim: bool, dtype: torch.dtype | None, *, is_mean: bool) -> Any:
    if dtype is not None:
        return NotImplemented
    stack = run.stack(x)
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if dims:
        axes = [row_axis(d) for d in dims]
        if {axis % stack.dim() for axis in axes} == set(range(1, stack.dim())) and not keepdim:
            dims = []
        else:
            if any(axis % stack.dim() == 1 for axis in axes):
                run.mix_examples()
            return Dual(stack.mean(axes, keepdim) if is_mean else stack.sum(axes, keepdim))
    if keepdim:
        return NotImplemented
    value = stack[0].mean() if is_mean else stack[0].sum()
    if stack.dim() == 1:
        return Dual(stack)
    if not run.is_batch(x):
        tangents = stack[1:].flatten(1).sum(1)
    else:
        tangents = run.split_examples(stack[1:].flatten(2).sum(2) if stack.dim() > 2 else stack[1:])
    return dual_of(value, tangents / stack[0].numel() if is_mean else tangents)
