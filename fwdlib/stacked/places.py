"""The places where Python keeps the values that a model and its loss read."""

from __future__ import annotations

import dis
import functools
import random
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_VALUES = 20_000
SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
LIBRARIES = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "fwdlib"} - {"__main__"}
"""Packages whose global variables and class attributes are taken as constants."""
HIDDEN = (Iterator, random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
NOT_FOLLOWED = {
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}
"""Attributes of a module that forward does not read, or whose contents are compared as tensors."""

FLAT_WEIGHTS = {"_flat_weights", "_flat_weight_refs"}
"""Attributes of recurrent layers that hold their parameters once more; forward renews them after a change."""


def find_places(model: nn.Module, loss: Callable) -> list[Place]:
    """Return the places of all values that the model and the loss may read.

    Raises:
        TypeError: if there are too many, one is an iterator or a random generator, or a module is in TorchScript.
    """
    finder = _Finder()
    finder.visit(model, type(model).__name__)
    finder.visit(loss, getattr(loss, "__name__", "loss"))
    finder.visit(vars(nn.modules.module)["_global_forward_hooks"], "global forward hooks")
    finder.visit(vars(nn.modules.module)["_global_forward_pre_hooks"], "global forward hooks")
    return finder.finish()


def is_same(a: Any, b: Any) -> bool:
    """Return whether two values are one object, or equal simple values (numbers, strings, ...) or tuples of these."""
    if a is b or type(a) is not type(b):
        return a is b
    if type(a) is tuple:
        return len(a) == len(b) and all(map(is_same, a, b))
    return isinstance(a, SIMPLE) and (a == b or (a != a and b != b))


def is_alike(a: Any, b: Any) -> bool:
    """Return whether two values are the same or containers of one kind, whose contents are in places of their own."""
    return is_same(a, b) or (type(a) is type(b) and isinstance(a, (list, dict, set, deque, np.ndarray)))


class Place:
    """A container of values: a dict, list, set, deque, array, the cells of a closure, or the attributes of an object.

    Args:
        name: for messages.
        owner: the container.
        keys: the keys or attributes that count; None for all.
    """

    def __init__(self, name: str, owner: Any, keys: Iterable[str] | None = None) -> None:
        self.name = name
        self._owner = owner
        self._keys = None if keys is None else sorted(keys)
        self.values: Iterable = self._find_values()
        """The values as they are at the time."""

    def _find_values(self) -> Iterable:
        owner = self._owner
        if self._keys is not None:
            return _Some(functools.partial(_get, owner), self._keys)
        if isinstance(owner, dict):
            return owner.values()
        if isinstance(owner, np.ndarray):
            return _Some(lambda _: owner.tobytes(), [""])
        if isinstance(owner, tuple):
            return _Some(_contents, owner)
        return owner

    def difference(self, before: list, after: list) -> str | None:
        """Return the name of a value that is not the same in both lists of values, or None."""
        for i, (a, b) in enumerate(zip(before, after, strict=False)):
            if not is_same(a, b):
                return self._name_of(i)
        return self.name if len(before) != len(after) else None

    def keep(self) -> Callable[[], None]:
        """Return a function that brings back the values that are here now."""
        owner, values = self._owner, list(self.values)
        if self._keys is not None:
            return lambda: [_set(owner, key, value) for key, value in zip(self._keys, values, strict=True)]
        if isinstance(owner, dict):
            items = dict(owner)
            return lambda: (owner.clear(), owner.update(items))
        if isinstance(owner, np.ndarray):
            return functools.partial(np.copyto, owner, owner.copy())
        if isinstance(owner, tuple):
            return lambda: [setattr(cell, "cell_contents", value) for cell, value in zip(owner, values, strict=True)]
        return lambda: (owner.clear(), owner.update(values) if isinstance(owner, set) else owner.extend(values))

    def _name_of(self, i: int) -> str:
        if self._keys is not None:
            return f"{self.name}.{self._keys[i]}"
        if isinstance(self._owner, dict):
            return f"{self.name}.{list(self._owner)[i]}" if i < len(self._owner) else self.name
        return self.name


class _Some:
    # An iterable of what a function returns for each key, looked up anew each time.
    def __init__(self, get: Callable, keys: Iterable) -> None:
        self._get, self._keys = get, keys

    def __iter__(self) -> Iterator:
        return map(self._get, self._keys)


def _get(owner: Any, key: str) -> Any:
    if isinstance(owner, dict):
        return owner.get(key)
    return vars(owner).get(key) if isinstance(owner, type) else getattr(owner, key, None)


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[key] = value
    elif _get(owner, key) is not value:
        setattr(owner, key, value)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


class _Finder:
    def __init__(self) -> None:
        self._places: list[Place] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that their ids stay theirs
        self._queue: list[tuple[Any, str]] = []
        self._names = {"forward", "__call__", "__getattr__"}  # attributes that the code reads
        self._namespaces: dict[str, Any] = {}  # classes and modules, of which it reads these

    def visit(self, value: Any, name: str) -> None:
        """Note a value for :meth:`finish`."""
        if not isinstance(value, (*SIMPLE, Tensor)) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._queue.append((value, name))

    def finish(self) -> list[Place]:
        """Follow all values that were visited, and return the places.

        Raises:
            TypeError: as :func:`find_places`.
        """
        while self._queue:
            while self._queue:
                self._follow(*self._queue.pop())
                if len(self._seen) > MAX_VALUES:
                    raise TypeError(f"the model and the loss refer to more than {MAX_VALUES:,} Python objects")
            for name, space in list(self._namespaces.items()):
                for key in self._names & vars(space).keys():
                    self._visit_attribute(vars(space)[key], f"{name}.{key}")
        spaces = ((name, space, self._names & vars(space).keys()) for name, space in self._namespaces.items())
        return self._places + [
            Place(name, vars(space) if isinstance(space, ModuleType) else space, keys)
            for name, space, keys in spaces
            if keys
        ]

    def _follow(self, value: Any, name: str) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            raise TypeError(f"{name} is in TorchScript")
        if isinstance(value, HIDDEN):
            raise TypeError(f"{name} is a {type(value).__name__}, whose state cannot be followed")
        if isinstance(value, dict):
            self._add(value, name, value.items())
        elif isinstance(value, (list, deque, set, tuple, frozenset)):
            is_fixed = isinstance(value, (tuple, frozenset))
            self._add(value, name, (("[]", x) for x in value), is_fixed=is_fixed)
        elif isinstance(value, np.ndarray):
            self._places.append(Place(name, value))
        elif isinstance(value, FunctionType):
            self._follow_function(value, name)
        elif isinstance(value, MethodType):
            self.visit(value.__func__, name)
            self.visit(value.__self__, name)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.visit(part, name)
        elif isinstance(value, (type, ModuleType)):
            self._add_namespace(value)
        elif isinstance(value, (nn.Module, SimpleNamespace, Namespace)) or not _is_library(type(value).__module__):
            self._follow_object(value, name)

    def _follow_object(self, value: Any, name: str) -> None:
        for kind in type(value).__mro__:
            self._add_namespace(kind)
            if not _is_library(kind.__module__) and (slots := vars(kind).get("__slots__")):
                slots = [slots] if isinstance(slots, str) else [slot for slot in slots if not slot.startswith("__")]
                self._places.append(Place(name, value, slots))
                for slot in slots:
                    self.visit(getattr(value, slot, None), f"{name}.{slot}")
        if isinstance(value, nn.RNNBase):
            keys = vars(value).keys() - FLAT_WEIGHTS
            self._places.append(Place(name, vars(value), keys))
            for key in keys - NOT_FOLLOWED:
                self.visit(vars(value)[key], f"{name}.{key}")
        elif hasattr(value, "__dict__"):
            is_module = isinstance(value, nn.Module)
            followed = (item for item in vars(value).items() if not (is_module and item[0] in NOT_FOLLOWED))
            self._add(vars(value), name, followed)

    def _follow_function(self, function: FunctionType, name: str) -> None:
        if _is_library(function.__module__):
            return
        if function.__closure__:
            self._places.append(Place(f"a variable that {name} encloses", function.__closure__))
            for cell in function.__closure__:
                self.visit(_contents(cell), name)
        for part in (function.__defaults__, function.__kwdefaults__, vars(function)):
            self.visit(part, name)
        variables = function.__globals__
        read, attributes = _names_in(function.__code__)
        self._names |= attributes
        if found := read & variables.keys():
            self._places.append(Place(function.__module__, variables, found))
            for key in found:
                self.visit(variables[key], key)

    def _visit_attribute(self, value: Any, name: str) -> None:
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        elif isinstance(value, functools.cached_property):
            value = value.func
        self.visit(value, name)

    def _add(self, owner: Any, name: str, items: Iterable[tuple[Any, Any]], *, is_fixed: bool = False) -> None:
        if not is_fixed:
            self._places.append(Place(name, owner))
        for key, value in items:
            inner = name if key in ("[]", "_modules") else f"{name}.{key}"
            self.visit(value, inner)

    def _add_namespace(self, space: type | ModuleType) -> None:
        name = space.__name__ if isinstance(space, ModuleType) else space.__module__
        if not _is_library(name):
            self._namespaces[space.__name__] = space


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES


@functools.cache
def _names_in(code: CodeType) -> tuple[set[str], set[str]]:
    # The global variables and the attributes that the code reads or writes.
    variables, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME"):
            variables.add(instruction.argval)
        elif "ATTR" in instruction.opname or "METHOD" in instruction.opname:
            attributes.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found = _names_in(inner)
            variables |= found[0]
            attributes |= found[1]
    return variables, attributes
