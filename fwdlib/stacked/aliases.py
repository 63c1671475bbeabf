"""Memory that several tensors share, in a pass: what is written into one of them is seen in the others.

- :class:`Filled` holds the tangents of plain tensors, for models that fill a tensor piece by piece. A tensor and its
  views share one buffer of tangents, as they share their memory.
- :class:`Doubtful` knows the results that may share memory with a dual or not: ``reshape`` and ``contiguous`` view some
  layouts and copy others, and the layout of a dual is not always that of torch's tensor.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fwdlib.forward.passes import Refusal
from fwdlib.stacked.dual import OTHER_ENGINE, Dual
from fwdlib.tangents import is_transformed


def root_of(x: Tensor) -> Tensor:
    """Return the tensor that a plain tensor is a view of, as autograd sees it: ``detach()`` begins a new root."""
    return x._base if x._is_view() else x


def memory_of(x: Tensor) -> int:
    """Return a number that identifies the memory of a plain tensor."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage()._cdata


class Filled:
    """The tangents of plain tensors that tangents have been written into.

    Args:
        num_tangents: R.
    """

    def __init__(self, num_tangents: int) -> None:
        self._num_tangents = num_tangents
        self._buffers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __contains__(self, x: Tensor) -> bool:
        return root_of(x) in self._buffers

    def tangents(self, x: Tensor) -> Tensor:
        """Return the tangents (R, ...) of ``x`` (...), to read and to write; zero if it had none so far.

        Raises:
            Refusal: if its tangents cannot be kept.
        """
        root = root_of(x)
        if root not in self._buffers:
            self._begin(root)
        buffer = self._buffers[root]
        size = x.untyped_storage().nbytes() // buffer.element_size()
        if x.dtype != buffer.dtype or x.is_conj() or x.is_neg() or size != buffer.shape[1]:
            raise Refusal(
                f"a tensor with tangents, of {buffer.dtype}, was resized or is viewed as {x.dtype} or conjugated: the "
                f"stacked engine cannot follow it. {OTHER_ENGINE}"
            )
        return buffer.as_strided((len(buffer), *x.shape), (buffer.stride(0), *x.stride()), x.storage_offset())

    def _begin(self, root: Tensor) -> None:
        if is_transformed() or root.layout is not torch.strided:
            raise Refusal(
                f"tangents were written into a tensor that had none, and inside torch.func.vmap or for sparse tensors "
                f"the stacked engine cannot keep them. Use torch.cat or torch.stack, train one seed at a time "
                f"(stacked=False), or use another engine. {OTHER_ENGINE}"
            )
        size = root.untyped_storage().nbytes() // root.element_size()
        self._buffers[root] = root.new_zeros(self._num_tangents, size)
        with torch.enable_grad():
            root.as_strided((0,), (1,)).copy_(FILLED)

    def forget(self, x: Tensor) -> None:
        """Drop the tangents of ``x``; not those of a tensor that it is a view of."""
        self._buffers.pop(x, None)

    def release(self) -> None:
        """Make all filled tensors plain again."""
        for root in list(self._buffers):
            root.detach_()


FILLED = torch.empty(0, requires_grad=True)
"""Filled tensors require a gradient by it, so the tape reveals what C++ code computes from them."""


class Doubtful:
    """Pairs of duals that share memory in torch or in the pass, and perhaps not in both.

    After one of a pair has been written into, the values of the other are in doubt, and reading them is refused.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[weakref.ref, weakref.ref, str]] = []
        self._stale: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.has_stale = False
        """Whether any values are in doubt."""

    def add(self, source: Dual, result: Dual, name: str) -> None:
        """Note that ``result`` may share memory with ``source``. From here on its own views belong to it alone."""
        result.stack = result.stack.detach()
        self._pairs.append((weakref.ref(root_of(source.stack)), weakref.ref(result.stack), name))

    def write(self, target: Dual) -> None:
        """Note that ``target`` is written into."""
        self._pairs = [pair for pair in self._pairs if pair[0]() is not None and pair[1]() is not None]
        root = root_of(target.stack)
        seen, queue = {id(root)}, deque([root])
        while queue:
            for other, name in self._partners(queue.popleft()):
                if id(other) not in seen:
                    seen.add(id(other))
                    queue.append(other)
                    self._stale[other] = name
                    self.has_stale = True

    def check(self, x: Dual) -> None:
        """Refuse to read a dual whose values are in doubt.

        Raises:
            Refusal: if they are.
        """
        if (name := self._stale.get(root_of(x.stack))) is not None:
            raise Refusal(
                f"a tensor was used after its {name} was written into in place, or the other way round. Whether both "
                f"share memory depends on their layout, which the stacked engine does not always keep as torch does. "
                f"Use .view(...) to share memory or .clone() not to, or write out of place. {OTHER_ENGINE}"
            )

    def _partners(self, root: Tensor) -> Iterator[tuple[Tensor, str]]:
        for first, second, name in self._pairs:
            if first() is root:
                yield second(), name
            elif second() is root:
                yield first(), name


_VIEWS = (
    *("view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "unflatten", "contiguous", "real", "imag"),
    *("transpose", "swapaxes", "swapdims", "t", "adjoint", "permute", "movedim", "moveaxis", "diagonal"),
    *("unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "atleast_1d", "atleast_2d", "atleast_3d"),
    *("select", "narrow", "unfold", "as_strided", "view_as_real", "__getitem__", "__iter__", "unbind", "chunk"),
    *("split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split", "hsplit", "vsplit", "dsplit"),
)
VIEWS = {f for name in _VIEWS for f in (getattr(torch, name, None), getattr(Tensor, name, None)) if callable(f)}
VIEWS |= {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
"""Functions that return views, at least of some tensors."""

MAY_SHARE = {
    *(torch.reshape, Tensor.reshape, Tensor.reshape_as, torch.flatten, Tensor.flatten, torch.ravel, Tensor.ravel),
    Tensor.contiguous,
}
"""Functions that return a view for some layouts of their argument, and a copy for others."""
