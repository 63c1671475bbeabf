"""The dual batch: a value and its derivatives along R directions, which go through a model together.

A :class:`Dual` looks like the tensor that a model's ``forward`` expects. Inside it is one stack of 1 + R rows: the
primal, then one tangent for each direction. A :class:`~fwdlib.stacked.forward_pass.Pass` computes with duals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from fwdlib.forward.mode import METADATA, REQUIRES_GRAD
from fwdlib.forward.passes import Refusal


class Passes:
    """The passes of this process: each has a number, and a dual keeps that of the latest pass before it was made."""

    latest = 0
    alive: ClassVar[set[int]] = set()
    _numbers = itertools.count(1)

    @classmethod
    def begin(cls) -> int:
        """Return the number of a new pass."""
        number = cls.latest = next(cls._numbers)
        cls.alive.add(number)
        return number

    @classmethod
    def end(cls, number: int) -> None:
        """Forget a pass: its duals have no tangents any more."""
        cls.alive.discard(number)


class Dual(Tensor):
    """A tensor with tangents. Its shape, dtype and device are those of its primal.

    After its pass it is a constant: torch's functions use its primal.

    Args:
        stack: shape (1 + R, ...): the primal, then R tangents.
    """

    since: int
    """The number of the latest pass that had begun."""
    _rows: Tensor | None
    _parts: tuple[Tensor, Tensor] | None
    _keeps_primal = False
    is_view_of_parameter = False
    """Whether the primal shares memory with a parameter, so that a write into one is seen in the other."""

    @staticmethod
    def __new__(cls, stack: Tensor) -> Dual:
        """Make a dual from its rows."""
        return cls._make(stack.shape[1:], stack, stack, None)

    @classmethod
    def of(cls, primal: Tensor, tangents: Tensor, *, keeps_primal: bool = True) -> Dual:
        """Make a dual from its two parts. They are joined when :attr:`stack` is first read.

        Args:
            primal: shape (...).
            tangents: shape (R, ...).
            keeps_primal: whether the primal itself is wanted, which has a tape; if not, nobody else has the parts, and
                they are joined as soon as one of them is read on its own.
        """
        self = cls._make(primal.shape, primal, None, (primal, tangents))
        self._keeps_primal = keeps_primal
        return self

    def as_view_of_parameter(self, primal: Tensor) -> Dual:
        """Return a dual with these tangents and a primal that shares memory with a parameter."""
        view = Dual.of(primal, self.tangents)
        view.is_view_of_parameter = True
        return view

    @classmethod
    def _make(cls, shape: torch.Size, like: Tensor, rows: Tensor | None, parts: tuple[Tensor, Tensor] | None) -> Dual:
        # It requires a gradient, so the tape reveals what C++ code or a torch.autograd.Function computes from it.
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device, requires_grad=True)
        self._rows, self._parts = rows, parts
        self.since = Passes.latest
        return self

    @property
    def stack(self) -> Tensor:
        """All rows, shape (1 + R, ...)."""
        if self._rows is None:
            rows = joined(*self._parts)
            if self.is_view_of_parameter:
                return rows
            self.stack = rows
        return self._rows

    @stack.setter
    def stack(self, rows: Tensor) -> None:
        self._rows, self._parts = rows, None

    @property
    def primal(self) -> Tensor:
        """The value, an ordinary tensor."""
        return self._parts[0] if self._parts and self._keeps_primal else self.stack[0]

    @property
    def tangents(self) -> Tensor:
        """The derivatives, shape (R, ...)."""
        return self._parts[1] if self._parts and self._keeps_primal else self.stack[1:]

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The primal and the tangents, to compute with. They may be no views of :attr:`stack`."""
        return self._parts or (self._rows[0], self._rows[1:])

    @property
    def constant(self) -> Tensor:
        """The value without any derivative, also by autograd's tape."""
        return self.primal.detach()

    def is_over(self) -> bool:
        """Return whether its pass has ended."""
        return not any(number <= self.since for number in tuple(Passes.alive))

    def __repr__(self) -> str:
        if self.is_over():
            return repr(self.constant)
        return f"Dual(shape={tuple(self.stack.shape[1:])}, num_tangents={len(self.stack) - 1})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Inside a pass torch calls Pass.__torch_function__ first, so this runs only outside.
        kwargs = kwargs or {}
        if func == REQUIRES_GRAD and args[0].is_over():
            return False
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (given := _as_constants(args, kwargs)) is not None:
            return func(*given[0], **given[1])
        raise Refusal(
            f"{function_name(func)} was called on a tensor with tangents outside its pass, in another thread. "
            f"{OTHER_ENGINE}"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        if (given := _as_constants(args, kwargs or {})) is not None:
            return func(*given[0], **given[1])
        raise Refusal(
            f"{func} reached a tensor with tangents from below torch's function overrides: by TorchScript, a "
            f"torch.func transform, or code in C++. The stacked engine cannot see such calls. {OTHER_ENGINE}"
        )


def _as_constants(args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    # The arguments with constants in place of duals; None if the pass of one goes on.
    if not all(x.is_over() for x in tree_leaves((args, kwargs)) if isinstance(x, Dual)):
        return None
    return tree_map(lambda x: x.constant if isinstance(x, Dual) else x, (args, kwargs))


OTHER_ENGINE = "Use fwdlib.forward_gradient(..., engine='torch')."


def joined(primal: Tensor, tangents: Tensor) -> Tensor:
    """Return a primal (...) and its tangents (R, ...) as one stack, with the primal's order of axes in memory.

    Torch keeps this order in most functions, and on it depends where ``reshape`` and ``contiguous`` copy.
    """
    if primal.is_contiguous():
        return torch.cat([primal.unsqueeze(0), tangents])
    order = sorted(range(primal.dim()), key=primal.stride, reverse=True)
    rows = torch.cat([primal.permute(order).unsqueeze(0), tangents.permute(0, *[axis + 1 for axis in order])])
    return rows.permute(0, *[order.index(axis) + 1 for axis in range(primal.dim())])


def pad_rows(stack: Tensor, num_rows: int) -> Tensor:
    """Return ``stack`` with zero tangents added until it has ``num_rows`` rows; a missing row means zero."""
    if len(stack) == num_rows:
        return stack
    return torch.cat([stack, stack.new_zeros(num_rows - len(stack), *stack.shape[1:])])


def same_rows(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Return all ``stacks`` with as many rows as the longest."""
    num_rows = max(map(len, stacks))
    return [pad_rows(stack, num_rows) for stack in stacks]


def primal_of(x: Any) -> Any:
    """Return the primal of a dual, and anything else unchanged."""
    return x.primal if isinstance(x, Dual) else x


def primals_of(tree: Any) -> Any:
    """Return a nest of lists, tuples and dicts with every dual replaced by its primal."""
    return tree_map(primal_of, tree, is_leaf=is_size)


def is_size(x: Any) -> bool:
    """Return whether ``x`` is a ``torch.Size``, which must not become another tuple: ``x.new(size)`` reads both."""
    return isinstance(x, torch.Size)


def function_name(func: Callable) -> str:
    """Return torch's name of a function, for example ``torch.nn.functional.linear``."""
    return resolve_name(func) or f"{getattr(func, '__module__', None)}.{getattr(func, '__name__', func)}"
