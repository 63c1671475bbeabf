"""Rules of sums and means."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.rules.rows import dual_of, is_half, row_axis
from fwdlib.stacked.rules.signatures import rule_of


@rule_of(torch.mean, Tensor.mean)
def mean(run: Pass, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Take the mean of each row."""
    return _reduce(run, x, dim, keepdim, dtype, is_mean=True)


@rule_of(torch.sum, Tensor.sum)
def sum_(run: Pass, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Sum each row."""
    return _reduce(run, x, dim, keepdim, dtype, is_mean=False)


def _reduce(run: Pass, x: Any, dim: Any, keepdim: bool, dtype: torch.dtype | None, *, is_mean: bool) -> Any:
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        reduce = torch.mean if is_mean else torch.sum
        return reduce(run.stack(x)[0], dim, keepdim, dtype=dtype)
    dims = [] if dim is None else dim if isinstance(dim, (tuple, list)) else [dim]
    if not all(isinstance(d, (int, np.integer)) for d in dims):
        return NotImplemented
    stack = run.stack(x) if dtype is None else run.stack(x).to(dtype)
    if stack.dim() == 1 and len(dims) and tuple(dims) not in ((0,), (-1,)):
        return NotImplemented
    axes = [row_axis(d, stack) for d in dims] if stack.dim() > 1 else []
    if len(set(axes)) < len(axes):
        return NotImplemented
    if len(axes) in (0, stack.dim() - 1) and not keepdim:
        return _total(run, x, stack, is_mean=is_mean)
    axes = axes or list(range(1, stack.dim()))
    if not axes:
        return _total(run, x, stack, is_mean=is_mean)
    if 1 in axes:
        run.mix_examples()
    return Dual(stack.mean(axes, keepdim) if is_mean else stack.sum(axes, keepdim))


def _total(run: Pass, x: Any, stack: Tensor, *, is_mean: bool) -> Dual:
    value = stack[0].mean() if is_mean else stack[0].sum()
    tangents = stack[1:]
    if stack.dim() == 1:
        return dual_of(value, tangents)
    dtype = torch.float32 if is_half(stack) else None
    if not run.is_batch(x):
        tangents = tangents.flatten(1).sum(1, dtype=dtype)
    else:
        pieces = tangents.flatten(2).sum(2, dtype=dtype) if stack.dim() > 2 else tangents.to(dtype or stack.dtype)
        tangents = run.split_examples(pieces)
    return dual_of(value, tangents / stack[0].numel() if is_mean else tangents)
