"""What a step reads besides its batch: the Python values and the tensors that a model and its loss refer to.

A recorded step is right only as long as these are the same. :class:`State` finds them once, and after that notices a
change in microseconds: it compares identities, in loops that run in C.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, compress, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fwdlib.forward.mode import REQUIRES_GRAD
from fwdlib.forward.rewind import Rewind
from fwdlib.stacked.places import find_places, is_alike, is_same
from fwdlib.tangents import Params


class State:
    """The values that a step of ``model`` with ``loss`` reads, as they are when it is made.

    These are the attributes of modules and of objects of the user's classes, the contents of containers, closures, and
    the global variables and class attributes that the code of ``forward`` and of the loss names. Other parameters and
    buffers may take the places of the model's: they are compared by shape, strides, dtype, device and
    ``requires_grad``, and by which of them are one tensor.

    Args:
        model: the module.
        loss: the loss function.

    Raises:
        TypeError: if there are values that cannot be followed.
    """

    def __init__(self, model: nn.Module, loss: Callable) -> None:
        self._model, self._loss = model, loss
        modules = list(model.modules())
        self._slots = [slots.values() for m in modules for slots in (m._parameters, m._buffers)]
        self._places, self.codes = find_places(model, loss)
        """Where the values are, and the user's code that was searched for them."""
        values = [place.read() for place in self._places]
        filled = [bool(of) for _, of in values]
        self._views = [*compress((place.values for place in self._places), filled)]
        self._empty = [place.values for place, is_filled in zip(self._places, filled, strict=True) if not is_filled]
        self._dicts = [place.keys for place in compress(self._places, filled) if place.keys != ()]
        self._keys = [*map(tuple, self._dicts)]
        self._read_values(values)
        self._take(_Tensors(model, self._slots, self._plain))

    def is_current(self, model: nn.Module, loss: Callable) -> bool:
        """Return whether these are the same, with the same values."""
        if model is not self._model or loss is not self._loss:
            return False
        if (
            any(self._empty)
            or [*map(id, chain.from_iterable(self._views))] != self._ids
            or [*map(tuple, self._dicts)] != self._keys
        ):
            values = [place.read() for place in self._places]
            if not _are_same(self._values, values):
                return False
            self._read_values(values)
        if self._identify_tensors() != self._tensor_ids:
            found = _Tensors(self._model, self._slots, self._plain)
            if found.layout != self._found.layout:
                return False
            self._take(found)
        return True

    @property
    def trainable(self) -> Params:
        """The parameters that a step trains, by name."""
        return self._found.trainable

    @property
    def frozen(self) -> Params:
        """The other parameters, by name."""
        return self._found.frozen

    @property
    def buffers(self) -> Params:
        """The buffers, by name."""
        return self._found.buffers

    @property
    def tensors(self) -> list[Tensor]:
        """All of these, in this order."""
        return self._found.all

    @property
    def share_memory(self) -> bool:
        """Whether two of them overlap in memory."""
        return self._found.share_memory

    def equals(self, other: State) -> bool:
        """Return whether the values of both are the same."""
        return (
            self._model is other._model
            and self._loss is other._loss
            and self._found.layout == other._found.layout
            and _are_same(self._values, other._values, is_alike)
        )

    def difference(self, other: State) -> str:
        """Return the name of something that is not the same in both."""
        differences = (
            place.difference(one, two)
            for place, one, two in zip(self._places, self._values, other._values, strict=False)
        )
        others = "an attribute" if self._found.layout == other._found.layout else "a parameter, buffer or other tensor"
        return next((name for name in differences if name is not None), others)

    @contextmanager
    def kept(self) -> Iterator[Callable[[], str | None]]:
        """Undo at the end what the code inside does to the values, to buffers, and to random numbers.

        Yields:
            A function that returns the name of something that the code has changed so far, or None.
        """
        rewind, python, numpy = Rewind(self._model, only_torch=True), random.getstate(), np.random.get_state()
        plain = [(x, x._version, x.detach().clone()) for x in self._plain if not x.is_inference()]
        undo = [place.keep() for place in self._places]

        def changed() -> str | None:
            after = [place.difference(values, place.read()) for place, values in self._pairs()]
            is_drawn = python != random.getstate() or repr(numpy) != repr(np.random.get_state())
            after.append("the state of Python's or numpy's random numbers" if is_drawn else None)
            return next((name for name in after if name is not None), None)

        try:
            yield changed
        finally:
            for (place, values), put_back in zip(self._pairs(), undo, strict=True):
                if not _are_same([values], [place.read()]):
                    put_back()
            for module in self._model.modules():
                if isinstance(module, nn.RNNBase):
                    module._init_flat_weights()
            for x, version, value in plain:
                if x._version != version:
                    with torch.no_grad():
                        x.copy_(value)
            random.setstate(python)
            np.random.set_state(numpy)
            rewind()

    def _pairs(self) -> list[tuple[Any, tuple]]:
        return list(zip(self._places, self._values, strict=True))

    def _read_values(self, values: list[tuple[tuple, list]]) -> None:
        self._values = values
        self._ids = [*map(id, chain.from_iterable(of for _, of in values))]
        self._plain = [x for _, of in values for x in of if isinstance(x, Tensor)]

    def _take(self, found: _Tensors) -> None:
        self._found = found
        self._tensor_ids = self._identify_tensors()

    def _identify_tensors(self) -> list:
        tensors = self._found.described
        return [
            *map(id, chain.from_iterable(self._slots)),
            *map(Tensor.data_ptr, tensors),
            *map(REQUIRES_GRAD, tensors),
            *map(Tensor.size, tensors),
            *map(Tensor.stride, tensors),
            *map(DTYPE, tensors),
        ]


DTYPE = Tensor.dtype.__get__


class _Tensors:
    # The parameters and buffers of a model, and all of them, and of the plain tensors, that a graph depends on.
    def __init__(self, model: nn.Module, slots: list[Iterable], plain: list[Tensor]) -> None:
        named = dict(model.named_parameters())
        self.trainable = {name: p for name, p in named.items() if p.requires_grad}
        self.frozen = {name: p for name, p in named.items() if not p.requires_grad}
        self.buffers = dict(model.named_buffers())
        self.all = [*self.trainable.values(), *self.frozen.values(), *self.buffers.values()]
        self.share_memory = share_memory(self.all)
        plain = [x for x in plain if x.layout is torch.strided]
        self.described = [*self.all, *plain]
        ids = [*map(id, chain.from_iterable(slots))]
        described = [
            (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg()) for x in self.described
        ]
        # a graph takes plain tensors as they are: one that moves in memory is another one
        self.layout = described, [*map(ids.index, ids)], self.share_memory, [*map(Tensor.data_ptr, plain)]


def share_memory(tensors: list[Tensor]) -> bool:
    """Return whether two of the tensors overlap in memory."""
    spans = sorted((x.data_ptr(), x.data_ptr() + _num_bytes(x)) for x in tensors if x.numel())
    return any(begin < end for (_, end), (begin, _) in pairwise(spans))


def _num_bytes(x: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _are_same(ones: list[tuple], others: list[tuple], compare: Callable = is_same) -> bool:
    return len(ones) == len(others) and all(
        keys == other_keys and len(one) == len(other) and all(map(compare, one, other))
        for (keys, one), (other_keys, other) in zip(ones, others, strict=True)
    )
