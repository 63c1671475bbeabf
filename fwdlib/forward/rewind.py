"""Undo what a forward pass did to a model, where it has to run again: for another tangent, or in the other engine."""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fwdlib.objectives import holds_more, modules_of
from fwdlib.tangents import AnyGenerator

ONE_PASS = "A single tangent needs one pass, and so does fwdlib.forward_gradient(..., engine='stacked')."
UNCHANGED = {type(None), bool, int, float, complex, str, bytes, type, FunctionType, MethodType, BuiltinFunctionType}
UNCHANGED |= {ModuleType, nn.Parameter, torch.dtype, torch.device, torch.Size}
DEPTH = 5
"""How far inside one another attributes, containers and objects are kept."""
MOST_OBJECTS, MOST_ENTRIES, MOST_BYTES = 5_000, 10_000, 2**20
"""Beyond these numbers of objects in all and in one container, and bytes of one array inside another object, what a
module holds is taken for data, and not for state."""


class Rewind:
    """The state that a forward pass advances. :meth:`__call__` restores it.

    It is the random numbers of torch, numpy and Python, a model's buffers, and what its modules keep as attributes:
    numbers, tensors, arrays, generators, containers and objects, also inside one another. What a closure keeps outside
    the model is not among it. Parameters are not copied: where the pass changes one, as a momentum encoder does,
    restoring is refused.

    Args:
        model: the module.
        generator: where the tangents come from, beside torch's global generators.
        written: parameters that the pass itself writes into, and not the model.
        only_torch: the random numbers of torch alone, on all devices; those of numpy and Python take 50 microseconds.
    """

    def __init__(
        self,
        model: nn.Module,
        generator: AnyGenerator = None,
        *,
        written: Iterable[Tensor] = (),
        only_torch: bool = False,
    ) -> None:
        self._model, self._seen = model, {id(p) for p in written}
        self._places: list[tuple[Tensor, tuple[int, int], Tensor | None]] = []  # of parameters
        self._containers: list[tuple[Any, Collection]] = []
        self._values: list[tuple[Any, Any]] = []  # tensors and arrays
        self._states: list[tuple[Callable, Any]] = []  # of random generators
        for one in [] if generator is None else getattr(generator, "generators", [generator]):
            self._keep(one, 1)
        for module in modules_of(model):
            self._keep_module(module)
        self._keep_random(only_torch)

    def others_have_drawn(self) -> bool:
        """Return whether numpy's or Python's global generator has advanced since; of ``only_torch`` it is not known."""
        python, numpy = self._of_others
        _, key, *place = np.random.get_state()
        return random.getstate() != python or place != [*numpy[2:]] or not np.array_equal(key, numpy[1])

    def _keep_random(self, only_torch: bool) -> None:
        self._states.append((torch.set_rng_state, torch.get_rng_state()))
        if torch.cuda.is_initialized():
            tensors = itertools.chain(self._model.parameters(), self._model.buffers())
            own = {x.device for x in tensors if x.is_cuda}
            for device in range(torch.cuda.device_count()) if only_torch else own:
                restore = functools.partial(torch.cuda.set_rng_state, device=device)
                self._states.append((restore, torch.cuda.get_rng_state(device)))
        if not only_torch:
            self._of_others = random.getstate(), np.random.get_state()
            self._states += zip((random.setstate, np.random.set_state), self._of_others, strict=True)

    def _keep_module(self, module: nn.Module) -> None:
        held = module.__dict__
        self._seen.add(id(module))
        self._containers.append((held, held.copy()))
        for name in CHANGING:
            if isinstance(value := held.get(name), dict):  # in TorchScript they are none
                self._containers.append((value, value.copy() if value else ()))
        if holds_more(module):
            for name, value in held.items():
                if name not in OWN and type(value) not in UNCHANGED:
                    self._keep(value, DEPTH)
        for p in module._parameters.values():
            if p is not None and id(p) not in self._seen:
                self._places.append((p, _place(p), _first_bytes(p) if _is_plain(p) else None))
        for x in module._buffers.values():
            self._keep(x, DEPTH)

    def _keep(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in UNCHANGED or not depth or id(value) in self._seen or len(self._seen) > MOST_OBJECTS:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.requires_grad and not isinstance(value, nn.Parameter) and _is_state(value, depth):
                self._values.append((value, value.clone()))
        elif isinstance(value, (dict, list, deque, set)):
            self._containers.append((value, (dict if isinstance(value, dict) else list)(value) if value else ()))
            self._keep_all(value.values() if isinstance(value, dict) else value, depth)
        elif isinstance(value, tuple):
            if not UNCHANGED.issuperset(map(type, value)):
                self._keep_all(value, depth)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and _is_state(value, depth):
                self._values.append((value, value.copy()))
        elif isinstance(value, torch.Generator):
            self._states.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._states.append((value.setstate, value.getstate()))
        elif isinstance(value, np.random.RandomState):
            self._states.append((value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._states.append((lambda state: setattr(bits, "state", state), bits.state))
        elif isinstance(value, nn.Module):
            self._keep_module(value)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._keep(value.__dict__, depth)

    def _keep_all(self, values: Collection, depth: int) -> None:
        if len(values) <= MOST_ENTRIES:
            for each in values:
                self._keep(each, depth - 1)

    @torch.no_grad()
    def __call__(self) -> None:
        """Restore.

        Raises:
            NotImplementedError: if a parameter was changed.
        """
        for holder, before in self._containers:
            if _ids(holder) == _ids(before):
                continue  # some dicts let nobody change them
            holder.clear()
            (holder.extend if isinstance(holder, (list, deque)) else holder.update)(before)
        for p, place, first in self._places:
            if _place(p) != place or (first is not None and not torch.equal(_first_bytes(p), first)):
                name = next((name for name, own in self._model.named_parameters() if own is p), "that it had")
                raise NotImplementedError(
                    f"the pass changes the parameter {name!r}, and was to run again, for another tangent or in another "
                    f"engine. Change it before or after the pass, or make it a buffer. {ONE_PASS}"
                )
        for value, before in self._values:
            if isinstance(value, Tensor):
                value.copy_(before)
            else:
                value[...] = before
        for restore, state in self._states:
            restore(state)


OWN = frozenset(nn.Module().__dict__)
CHANGING = "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"
"""What every module has, and those of it that a pass changes."""


def _is_state(value: Tensor | np.ndarray, depth: int) -> bool:
    size = value.numel() * value.element_size() if isinstance(value, Tensor) else value.nbytes
    return depth == DEPTH or size <= MOST_BYTES


def _ids(holder: Collection) -> list[int]:
    return [*map(id, itertools.chain(holder, holder.values()) if isinstance(holder, dict) else holder)]


def _place(p: Tensor) -> tuple[int, int]:
    return p._version, p.data_ptr()


def _is_plain(p: Tensor) -> bool:
    return not p.requires_grad and p.layout is torch.strided and not p.is_meta and p.numel() > 0


def _first_bytes(p: Tensor) -> Tensor:
    # The first number of a frozen parameter, which p.data.mul_(0.9) changes without a new version.
    return p.detach().as_strided((1,), (1,)).clone().view(torch.uint8)
