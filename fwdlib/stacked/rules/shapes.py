"""Rules of functions that move, join or cut entries, or convert their type."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fwdlib.forward.mode import repeats
from fwdlib.stacked.dual import Dual, primals_of, same_rows
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.stacked.rules.rows import dual_of, row_axis, rows_along, with_axes
from fwdlib.stacked.rules.signatures import rule_of


@rule_of(torch.flatten, Tensor.flatten)
def flatten(run: Pass, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Flatten axes of each row; the axis of rows stays."""
    if not (_is_integer(start_dim) and _is_integer(end_dim)):
        return NotImplemented
    stack = run.stack(x)
    if stack.dim() == 1:
        return Dual(stack.unsqueeze(1)) if {start_dim, end_dim} <= {0, -1} else NotImplemented
    return Dual(stack.flatten(row_axis(start_dim, stack), row_axis(end_dim, stack)))


@rule_of(torch.unflatten, Tensor.unflatten)
def unflatten(run: Pass, x: Any, dim: int, sizes: Any) -> Any:
    """Cut an axis of each row into several."""
    sizes = _sizes((sizes,), None)
    if not _is_integer(dim) or not sizes:
        return NotImplemented
    stack = run.stack(x)
    return Dual(stack.unflatten(row_axis(dim, stack), tuple(sizes)))


@rule_of(torch.reshape, Tensor.reshape, Tensor.view, shape="size")
def reshape(run: Pass, x: Any, *sizes: Any, size: Any = None) -> Any:
    """Reshape each row. An integer view of the memory is a constant."""
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype) and not sizes[0].is_floating_point:
        return NotImplemented if sizes[0].is_complex else run.stack(x)[0].view(sizes[0])
    sizes = _sizes(sizes, size)
    if sizes is None:
        return NotImplemented
    stack = run.stack(x)
    return Dual(stack.reshape(len(stack), *_known(stack.shape[1:], sizes)))


@rule_of(torch.transpose, Tensor.transpose)
def transpose(run: Pass, x: Any, dim0: int, dim1: int) -> Any:
    """Exchange two axes of each row."""
    if x.dim() == 0 or not (_is_integer(dim0) and _is_integer(dim1)):
        return NotImplemented
    stack, first = rows_along(run, x, dim0)
    _, second = rows_along(run, x, dim1)
    return Dual(stack.transpose(first, second))


@rule_of(torch.swapaxes, Tensor.swapaxes)
def swapaxes(run: Pass, x: Any, axis0: int, axis1: int) -> Any:
    """Exchange two axes of each row."""
    return transpose(run, x, axis0, axis1)


@rule_of(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)
def transposed(run: Pass, x: Any) -> Any:
    """Transpose each row, if it is a matrix."""
    stack = run.stack(x)
    if stack.dim() != 3:
        return NotImplemented
    run.mix_examples()
    return Dual(stack.transpose(1, 2))


@rule_of(torch.permute, Tensor.permute)
def permute(run: Pass, x: Any, *sizes: Any, dims: Any = None) -> Any:
    """Permute the axes of each row."""
    dims = _sizes(sizes, dims)
    if dims is None:
        return NotImplemented
    stack = run.stack(x)
    axes = [row_axis(dim, stack) for dim in dims]
    if axes[:1] != [1]:
        run.mix_examples()
    return Dual(stack.permute(0, *axes))


@rule_of(torch.unsqueeze, Tensor.unsqueeze)
def unsqueeze(run: Pass, x: Any, dim: int) -> Any:
    """Insert an axis of length 1 into each row."""
    if not _is_integer(dim):
        return NotImplemented
    stack = run.stack(x)
    axis = row_axis(dim, stack, is_new=True)
    if axis == 1:
        run.mix_examples()
    return Dual(stack.unsqueeze(axis))


@rule_of(torch.squeeze, Tensor.squeeze)
def squeeze(run: Pass, x: Any, dim: Any = None) -> Any:
    """Remove axes of length 1 from each row."""
    stack = run.stack(x)
    dims = range(stack.dim() - 1) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    if not all(map(_is_integer, dims)) or (stack.dim() == 1 and len(dims)):
        return NotImplemented
    axes = tuple(axis for axis in (row_axis(d, stack) for d in dims) if stack.shape[axis] == 1)
    return Dual(stack.squeeze(axes) if axes else stack)


@rule_of(Tensor.expand)
def expand(run: Pass, x: Any, *sizes: Any, size: Any = None) -> Any:
    """Expand each row."""
    sizes = _sizes(sizes, size)
    if sizes is None:
        return NotImplemented
    stack = run.stack(x)
    if len(sizes) > stack.dim() - 1:
        if any(s == -1 for s in sizes[: len(sizes) - stack.dim() + 1]):
            return NotImplemented
        run.mix_examples()
    return Dual(with_axes(stack, len(sizes)).expand(len(stack), *sizes))


@register_rule(Tensor.__getitem__)
def getitem(run: Pass, x: Any, index: Any) -> Any:
    """Index each row, by integers, slices, None, ... and at most one tensor or list."""
    index = index if isinstance(index, tuple) else (index,)
    if not run.has_tangents(x) or not all(map(_is_index, index)):
        return NotImplemented
    lists = [isinstance(i, (Tensor, list)) for i in index]
    if any(lists) and sum(lists) + sum(map(_is_integer, index)) > 1:
        return NotImplemented  # the place of the new axis depends on the indices between the index arrays
    stack = run.stack(x)
    whole = not index or (isinstance(index[0], slice) and index[0] == slice(None))
    if not whole and (index[0] is not Ellipsis or len(index) > stack.dim() - 1):
        run.mix_examples()
    return Dual(stack[(slice(None), *index)])


def _is_index(i: Any) -> bool:
    if isinstance(i, Tensor):
        return not isinstance(i, Dual) and not i.is_floating_point() and i.dim() > 0
    if isinstance(i, list):
        return all(type(entry) is int for entry in i) or all(type(entry) is bool for entry in i)
    return i is None or i is Ellipsis or isinstance(i, slice) or _is_integer(i)


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


@rule_of(torch.cat, torch.concat, torch.concatenate, tensors="tensors")
def cat(run: Pass, tensors: Any, dim: int = 0) -> Any:
    """Join each row with its counterparts. Like torch, skip tensors of shape (0,) beside others with more axes."""
    stacks = _rows_of_all(run, tensors, dim)
    if stacks is None:
        return NotImplemented
    dtypes = {stack.dtype for stack in stacks}
    stacks = [stack for stack in stacks if stack.dim() != 2 or stack.shape[1]] or stacks[:1]
    if len(dtypes) > 1:
        dtype = torch.cat([torch.empty(0, dtype=dtype) for dtype in dtypes]).dtype
        stacks = [stack.to(dtype) for stack in stacks]
    axis = row_axis(dim, stacks[0])
    if axis == 1:
        run.mix_examples()
    return Dual(torch.cat(same_rows(stacks), axis))


@rule_of(torch.stack, tensors="tensors")
def stack(run: Pass, tensors: Any, dim: int = 0) -> Any:
    """Join each row with its counterparts along a new axis."""
    stacks = _rows_of_all(run, tensors, dim)
    if stacks is None:
        return NotImplemented
    axis = row_axis(dim, stacks[0], is_new=True)
    if axis == 1:
        run.mix_examples()
    return Dual(torch.stack(same_rows(stacks), axis))


def _rows_of_all(run: Pass, tensors: Any, dim: Any) -> list[Tensor] | None:
    if not isinstance(tensors, (tuple, list)) or not _is_integer(dim):
        return None
    return [run.stack(x) for x in tensors] if all(isinstance(x, Tensor) for x in tensors) else None


@rule_of(torch.chunk, Tensor.chunk)
def chunk(run: Pass, x: Any, chunks: int, dim: int = 0) -> Any:
    """Cut all rows in the same way."""
    if x.dim() == 0 or not _is_integer(dim):
        return NotImplemented
    stack, axis = rows_along(run, x, dim)
    return tuple(Dual(piece) for piece in stack.chunk(chunks, axis))


@rule_of(torch.split, Tensor.split, split_size_or_sections="split_size", tensor="x")
def split(run: Pass, x: Any, split_size: Any, dim: int = 0) -> Any:
    """Cut all rows in the same way."""
    if x.dim() == 0 or not _is_integer(dim):
        return NotImplemented
    stack, axis = rows_along(run, x, dim)
    return tuple(Dual(piece) for piece in stack.split(split_size, axis))


@rule_of(torch.unbind, Tensor.unbind)
def unbind(run: Pass, x: Any, dim: int = 0) -> Any:
    """Cut all rows in the same way, into slices."""
    if x.dim() == 0 or not _is_integer(dim):
        return NotImplemented
    stack, axis = rows_along(run, x, dim)
    return tuple(Dual(piece) for piece in stack.unbind(axis))


@rule_of(Tensor.clone, torch.clone)
def clone(run: Pass, x: Any, *, memory_format: Any = None) -> Dual:
    """Copy all rows, and lay each out in memory as torch does."""
    stack = run.stack(x)
    if memory_format is None and stack.is_contiguous():
        return Dual(stack.clone())
    return dual_of(stack[0].clone(memory_format=memory_format), stack[1:])


@rule_of(Tensor.contiguous)
def contiguous(run: Pass, x: Any, memory_format: Any = None) -> Dual:
    """Copy all rows where each is laid out in another way, or where entries share memory."""
    stack, memory_format = run.stack(x), memory_format or torch.contiguous_format
    if stack[0].is_contiguous(memory_format=memory_format) and not _overlaps(stack):
        return Dual(stack)
    return dual_of(stack[0].contiguous(memory_format=memory_format), stack[1:])


def _overlaps(stack: Tensor) -> bool:
    return repeats(stack[0]) or (not stack.is_contiguous() and torch._debug_has_internal_overlap(stack) != 0)


def _conversion(*functions: Callable) -> None:
    """Register conversions of the type. They are linear; integers have no tangents."""
    for function in functions:

        def rule(run: Pass, x: Any, *args: Any, _function: Callable = function, **kwargs: Any) -> Any:
            memory_format = kwargs.pop("memory_format", None)
            stack = run.stack(x)
            if not args and not kwargs and _function is Tensor.type:
                return stack.type()
            is_format_alone = not args and not kwargs and _function is Tensor.to
            rows = stack if is_format_alone else _function(stack, *primals_of(args), **primals_of(kwargs))
            if memory_format is not None:
                return dual_of(rows[0].to(memory_format=memory_format), rows[1:])
            return Dual(rows) if rows.is_floating_point() or rows.is_complex() else rows[0]

        register_rule(function)(rule)


_conversion(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)
_conversion(Tensor.cdouble, Tensor.cfloat, Tensor.chalf)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def _sizes(given: tuple, named: Any) -> Sequence[int] | None:
    # Sizes or axes that are given one by one, or as one sequence by place or by name; None for anything else.
    if named is not None:
        given = None if given else named
    elif len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    return given if isinstance(given, (tuple, list)) and all(map(_is_integer, given)) else None


def _known(shape: Sequence[int], wanted: Sequence[int]) -> list[int]:
    # Replace -1 by its size, which torch cannot infer for an empty tensor once the axis of rows comes first.
    if -1 not in wanted or 0 not in shape:
        return list(wanted)
    rest = math.prod(size for size in wanted if size != -1)
    return [math.prod(shape) // rest if size == -1 and rest else size for size in wanted]
