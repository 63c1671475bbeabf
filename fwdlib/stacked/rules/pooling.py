"""Rules of pooling."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.rules.rows import dual_of, per_axis
from fwdlib.stacked.rules.signatures import rule_of
from fwdlib.tangents import is_traced


def _max_pool(*functions: Callable, pool: Callable, num_axes: int) -> None:
    """Register maximum pooling: the result takes the tangents of the entry that is the maximum."""

    def rule(
        run: Pass,
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        stack = run.stack(x)
        kernel, padding, dilation = (per_axis(value, num_axes) for value in (kernel_size, padding, dilation))
        stride = kernel if stride in (None, (), []) else per_axis(stride, num_axes)
        is_small = math.prod(kernel) <= 9 and not (any(padding) or ceil_mode or return_indices)
        if is_small and is_traced() and not torch.is_grad_enabled():
            return _maximum_of_slices(stack, kernel, stride, dilation)
        y, where = pool(stack[0], kernel, stride, padding, dilation, ceil_mode)
        dual = dual_of(y, _entries(stack[1:], where, num_axes))
        return (dual, where) if return_indices else dual

    rule_of(*functions)(rule)

    @rule_of(pool)
    @functools.wraps(rule)
    def with_indices(run: Pass, *args: Any, **kwargs: Any) -> Any:
        return rule(run, *args, **kwargs | {"return_indices": True})


def _entries(tangents: Tensor, where: Tensor, num_axes: int) -> Tensor:
    # The tangents (R, ...) of the maxima, which are at the places `where` on the last axes.
    if where.dim() == 4 and where.is_contiguous(memory_format=torch.channels_last):
        flat = tangents.movedim(2, -1).flatten(2, 3)  # (R, B, positions, channels), in memory order
        places = where.movedim(1, -1).flatten(1, 2).expand(len(tangents), -1, -1, -1)
        return flat.gather(2, places).unflatten(2, where.shape[2:]).movedim(-1, 2)
    flat = tangents.flatten(-num_axes)
    places = where.flatten(-num_axes).expand(*flat.shape[:-1], -1)
    return flat.gather(-1, places).reshape(-1, *where.shape)


def _maximum_of_slices(stack: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Dual:
    # Compare one slice of the stack for each place in the window. A compiler fuses these elementwise functions.
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(stack.shape[-len(kernel) :], kernel, stride, dilation, strict=True)
    ]
    y: Any = None
    for places in itertools.product(*map(range, kernel)):
        starts = [place * d for place, d in zip(places, dilation, strict=True)]
        slices = [slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, stride, counts, strict=True)]
        other, others = stack[(0, ..., *slices)], stack[(slice(1, None), ..., *slices)]
        if y is None:
            y, tangents = other, others
        else:
            tangents = torch.where(other > y, others, tangents)
            y = torch.maximum(y, other)  # nan stays visible
    return dual_of(y, tangents)


_max_pool(F.max_pool1d, torch.max_pool1d, pool=F.max_pool1d_with_indices, num_axes=1)
_max_pool(F.max_pool2d, torch.max_pool2d, pool=F.max_pool2d_with_indices, num_axes=2)


def _linear_pool(*functions: Callable) -> None:
    """Register a linear pooling function, which pools all rows as one batch."""

    def rule(run: Pass, x: Any, *args: Any, **kwargs: Any) -> Dual:
        stack = run.stack(x)
        if stack.dim() < 3:
            return NotImplemented
        pooled = functions[0](stack.flatten(0, 1), *args, **kwargs)
        return Dual(pooled.reshape(*stack.shape[:2], *pooled.shape[1:]))

    rule_of(*functions)(rule)


_linear_pool(F.avg_pool1d)
_linear_pool(F.avg_pool2d)
_linear_pool(F.avg_pool3d)
_linear_pool(F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d)
_linear_pool(F.adaptive_avg_pool2d)
_linear_pool(F.adaptive_avg_pool3d)
