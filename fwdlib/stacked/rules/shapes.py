"""Rules of functions that move, join or cut entries, or convert their type."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fwdlib.stacked.dual import Dual, primals_of, same_rows
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.stacked.rules.rows import row_axis, rows_along, with_axes


@register_rule(torch.flatten, Tensor.flatten)
def flatten(run: Pass, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Flatten axes of each row; the axis of rows stays."""
    stack = run.stack(x)
    if stack.dim() == 1:
        return Dual(stack.unsqueeze(1))
    return Dual(stack.flatten(row_axis(start_dim), row_axis(end_dim)))


@register_rule(torch.reshape, Tensor.reshape, Tensor.view)
def reshape(run: Pass, x: Any, *shape: Any, **kwargs: Any) -> Any:
    """Reshape each row."""
    shape = kwargs.get("shape", shape)
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = shape[0]
    if isinstance(shape, torch.dtype):
        return NotImplemented
    stack = run.stack(x)
    return Dual(stack.reshape(len(stack), *_known(stack.shape[1:], shape)))


@register_rule(torch.transpose, torch.swapaxes, Tensor.transpose, Tensor.swapaxes)
def transpose(run: Pass, x: Any, dim0: int, dim1: int) -> Dual:
    """Exchange two axes of each row."""
    stack, first = rows_along(run, x, dim0)
    _, second = rows_along(run, x, dim1)
    return Dual(stack.transpose(first, second))


@register_rule(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)
def transposed(run: Pass, x: Any) -> Any:
    """Transpose each row, if it is a matrix."""
    stack = run.stack(x)
    if stack.dim() != 3:
        return NotImplemented
    run.mix_examples()
    return Dual(stack.transpose(1, 2))


@register_rule(torch.permute, Tensor.permute)
def permute(run: Pass, x: Any, *dims: Any, **kwargs: Any) -> Dual:
    """Permute the axes of each row."""
    dims = kwargs.get("dims", dims)
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    stack = run.stack(x)
    axes = [dim % (stack.dim() - 1) for dim in dims]
    if axes[:1] != [0]:
        run.mix_examples()
    return Dual(stack.permute(0, *(axis + 1 for axis in axes)))


@register_rule(torch.unsqueeze, Tensor.unsqueeze)
def unsqueeze(run: Pass, x: Any, dim: int) -> Dual:
    """Insert an axis of length 1 into each row."""
    stack = run.stack(x)
    if dim in (0, -stack.dim()):
        run.mix_examples()
    return Dual(stack.unsqueeze(row_axis(dim)))


@register_rule(torch.squeeze, Tensor.squeeze)
def squeeze(run: Pass, x: Any, dim: Any = None) -> Dual:
    """Remove axes of length 1 from each row."""
    stack = run.stack(x)
    shape = stack.shape[1:]
    dims = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = [d % len(shape) for d in dims] if shape else []
    axes = tuple(axis + 1 for axis in axes if shape[axis] == 1)
    return Dual(stack.squeeze(axes) if axes else stack)


@register_rule(Tensor.expand)
def expand(run: Pass, x: Any, *sizes: Any) -> Dual:
    """Expand each row."""
    sizes = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    stack = run.stack(x)
    if len(sizes) > stack.dim() - 1:
        run.mix_examples()
    return Dual(with_axes(stack, len(sizes)).expand(len(stack), *sizes))


@register_rule(Tensor.__getitem__)
def getitem(run: Pass, x: Any, index: Any) -> Any:
    """Index each row."""
    index = index if isinstance(index, tuple) else (index,)
    lists = [isinstance(i, (Tensor, list)) for i in index]
    if any(isinstance(i, Dual) for i in index) or (any(lists) and sum(lists) + sum(type(i) is int for i in index) > 1):
        return NotImplemented  # the place of the new axis depends on the indices between the index arrays
    stack = run.stack(x)
    whole = not index or (isinstance(index[0], slice) and index[0] == slice(None))
    if not whole and (index[0] is not Ellipsis or len(index) > stack.dim() - 1):
        run.mix_examples()
    return Dual(stack[(slice(None), *index)])


@register_rule(Tensor.__setitem__)
def setitem(run: Pass, x: Any, index: Any, value: Any) -> Any:
    """Set entries of every row; the tangents of a constant are zero."""
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Dual):
        raise NotImplementedError(
            "an entry of a tensor without tangents would be set to a value that has tangents. Build the tensor with "
            "torch.cat or torch.stack."
        )
    values = run.stack(value) if isinstance(value, Tensor) else [value]
    if isinstance(value, Dual):
        run.mix_examples()  # the index may put an example in the place of another
    for i, row in enumerate(x.stack):
        row[index] = values[i] if i < len(values) else 0
    return None


@register_rule(torch.cat, torch.concat, torch.concatenate)
def cat(run: Pass, tensors: Any, dim: int = 0) -> Dual:
    """Join each row with its counterparts."""
    stacks = same_rows([run.stack(x) for x in tensors])
    if dim in (0, 1 - stacks[0].dim()):
        run.mix_examples()
    return Dual(torch.cat(stacks, row_axis(dim)))


@register_rule(torch.stack)
def stack(run: Pass, tensors: Any, dim: int = 0) -> Dual:
    """Join each row with its counterparts along a new axis."""
    stacks = same_rows([run.stack(x) for x in tensors])
    if dim in (0, -stacks[0].dim()):
        run.mix_examples()
    return Dual(torch.stack(stacks, row_axis(dim)))


@register_rule(torch.chunk, Tensor.chunk)
def chunk(run: Pass, x: Any, chunks: int, dim: int = 0) -> tuple[Dual, ...]:
    """Cut all rows in the same way."""
    stack, axis = rows_along(run, x, dim)
    return tuple(Dual(piece) for piece in stack.chunk(chunks, axis))


@register_rule(torch.split, Tensor.split)
def split(run: Pass, x: Any, split_size: Any, dim: int = 0) -> tuple[Dual, ...]:
    """Cut all rows in the same way."""
    stack, axis = rows_along(run, x, dim)
    return tuple(Dual(piece) for piece in stack.split(split_size, axis))


@register_rule(Tensor.clone, torch.clone)
def clone(run: Pass, x: Any, **_: Any) -> Dual:
    """Copy all rows."""
    return Dual(run.stack(x).clone())


@register_rule(Tensor.contiguous)
def contiguous(run: Pass, x: Any, **_: Any) -> Dual:
    """Do nothing: no rule depends on the order of the rows in memory."""
    return Dual(run.stack(x))


def _conversion(*functions: Callable) -> None:
    """Register conversions of the type. They are linear; integers have no tangents."""
    for function in functions:

        def rule(run: Pass, x: Any, *args: Any, _function: Callable = function, **kwargs: Any) -> Any:
            kwargs.pop("memory_format", None)  # no rule depends on it
            stack = run.stack(x)
            if not args and not kwargs and _function in (Tensor.to, Tensor.type):
                return Dual(stack) if _function is Tensor.to else stack.type()
            rows = _function(stack, *primals_of(args), **primals_of(kwargs))
            return Dual(rows) if rows.is_floating_point() or rows.is_complex() else rows[0]

        register_rule(function)(rule)


_conversion(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)


def _known(shape: Sequence[int], wanted: Sequence[int]) -> list[int]:
    # Replace -1 by its size, which torch cannot infer for an empty tensor once the axis of rows comes first.
    if -1 not in wanted:
        return list(wanted)
    rest = math.prod(size for size in wanted if size != -1)
    return [math.prod(shape) // rest if size == -1 and rest else size for size in wanted]
