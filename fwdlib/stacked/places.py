"""The places where Python keeps the values that a model and its loss read."""

from __future__ import annotations

import array
import contextlib
import ctypes
import dis
import functools
import io
import logging
import random
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

MAX_VALUES = 20_000
SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
STANDARD = sys.stdlib_module_names - {"__main__"}
PACKAGES = {"torch", "torchvision", "numpy", "fwdlib", "sympy", "mpmath", "triton", "optree", "typing_extensions"}
"""With the standard library, the packages whose global variables and class attributes are taken as constants."""
HIDDEN = (
    *(Iterator, random.Random, np.random.Generator, np.random.RandomState, torch.Generator, weakref.ref),
    *(weakref.ProxyType, weakref.CallableProxyType, threading.local, array.array, bytearray, memoryview),
    *(MappingProxyType, ctypes.Structure.__base__),
)
REFUSED_IN_USE = (logging.Filterer, logging.LoggerAdapter, io.IOBase)
"""Objects whose use in the forward pass refuses the record, so that what they hold does not count."""
MANAGER = type(contextlib.contextmanager(lambda: iter(()))())
NOT_FOLLOWED = {
    *("_non_persistent_buffers_set", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}
"""Attributes of a module that forward does not read."""
IN_STATE = {"_parameters", "_buffers"}
"""Attributes of the model's own modules whose contents are compared as tensors."""
NOT_CALLED = {
    *("__init__", "__new__", "__del__", "__repr__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__"),
    *("__deepcopy__", "__copy__", "__init_subclass__"),
}
"""Methods that Python calls by itself, and not in the course of a forward pass: the first two make an object."""
BY_NAME = {"getattr", "hasattr", "setattr", "vars", "__dict__", "__getattribute__", "attrgetter", "methodcaller"}
"""What reads attributes whose names are strings."""

FLAT_WEIGHTS = {"_flat_weights", "_flat_weight_refs"}
"""Attributes of recurrent layers that hold their parameters once more; forward renews them after a change."""


def find_places(model: nn.Module, loss: Callable) -> tuple[list[Place], set[CodeType]]:
    """Return the places of all values that the model and the loss may read, and the code that was searched for them.

    Raises:
        TypeError: if there are too many, one is an iterator or a random generator, or a module is in TorchScript.
    """
    finder = _Finder(model)
    finder.visit(model, type(model).__name__)
    finder.visit(loss, getattr(loss, "__name__", "loss"))
    finder.visit(vars(nn.modules.module)["_global_forward_hooks"], "global forward hooks")
    finder.visit(vars(nn.modules.module)["_global_forward_pre_hooks"], "global forward hooks")
    return finder.finish(), finder.codes


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
    """A container of values: a dict, list, set, deque, array, ContextVar, the cells of a closure, or attributes.

    Args:
        name: for messages.
        owner: the container.
        keys: the keys or attributes that count; None for all.
    """

    def __init__(self, name: str, owner: Any, keys: Iterable[str] | None = None) -> None:
        self.name = name
        self._owner = owner
        self._keys = None if keys is None else sorted(keys)
        self.keys: Iterable = self._find_keys()
        """The keys of a dict as they are at the time."""
        self.values: Iterable = self._find_values()
        """The values as they are at the time."""

    def read(self) -> tuple[tuple, list]:
        """Return the keys and the values."""
        return tuple(self.keys), list(self.values)

    def _find_keys(self) -> Iterable:
        if self._keys is not None or not isinstance(self._owner, dict):
            return ()
        return self._owner if all(isinstance(key, SIMPLE) for key in self._owner) else _Some(_named, self._owner)

    def _find_values(self) -> Iterable:
        owner = self._owner
        if self._keys is not None:
            values = vars(owner) if isinstance(owner, type) else owner
            return _Some(values.get if values is not owner or isinstance(owner, dict) else self._get, self._keys)
        if isinstance(owner, dict):
            return owner.values()
        if isinstance(owner, np.ndarray):
            return _Some(lambda _: (owner.tobytes(), owner.shape, owner.dtype.str), [""])
        if isinstance(owner, tuple):
            return _Some(_contents, owner)
        return _Some(owner.get, [ABSENT]) if isinstance(owner, ContextVar) else owner

    def difference(self, before: tuple[tuple, list], after: tuple[tuple, list]) -> str | None:
        """Return the name of a value that is not the same in both results of :meth:`read`, or None."""
        for i, (a, b) in enumerate(zip(before[1], after[1], strict=False)):
            if not is_same(a, b):
                return self._name_of(i)
        return self.name if len(before[1]) != len(after[1]) or before[0] != after[0] else None

    def keep(self) -> Callable[[], None]:
        """Return a function that brings back the values that are here now."""
        owner, values = self._owner, list(self.values)
        if owner is sys.modules:  # an import is never undone
            return lambda: None
        if self._keys is not None:
            kept = {key: self._get(key) for key in self._keys}
            return lambda: [self._set(key, value) for key, value in kept.items()]
        if isinstance(owner, dict):
            items = dict(owner)
            return lambda: (owner.clear(), owner.update(items))
        if isinstance(owner, np.ndarray):
            return functools.partial(np.copyto, owner, owner.copy())
        if isinstance(owner, ContextVar):
            return lambda: None if owner.get(ABSENT) is values[0] else owner.set(*values)
        if isinstance(owner, tuple):
            return lambda: [setattr(cell, "cell_contents", value) for cell, value in zip(owner, values, strict=True)]
        return lambda: (owner.clear(), owner.update(values) if isinstance(owner, set) else owner.extend(values))

    def _get(self, key: str) -> Any:
        if isinstance(self._owner, dict):
            return self._owner.get(key, ABSENT)
        return (
            vars(self._owner).get(key, ABSENT) if isinstance(self._owner, type) else getattr(self._owner, key, ABSENT)
        )

    def _set(self, key: str, value: Any) -> None:
        owner = self._owner
        if self._get(key) is value:
            return
        if isinstance(owner, dict):
            owner.pop(key) if value is ABSENT else owner.update({key: value})
        else:
            delattr(owner, key) if value is ABSENT else setattr(owner, key, value)

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


ABSENT = object()


def _named(key: Any) -> Any:
    return key if isinstance(key, SIMPLE) else id(key)  # a tensor is not compared with ==


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.codes: set[CodeType] = set()
        self._modules = {*map(id, model.modules())}
        self._places: list[Place] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that their ids stay theirs
        self._queue: list[tuple[Any, str]] = []
        # the attributes that the code reads, and those that torch reads
        self._names = {"forward", "setup_context", "backward", "vjp", "jvp", "vmap"}
        self._by_name = False  # whether it computes names of attributes
        self._spaces: dict[int, type | ModuleType] = {}  # of which it reads these
        self._made: set[int] = set()  # classes of which it may make objects
        self._globals: dict[int, tuple[dict, set[str]]] = {}

    def visit(self, value: Any, name: str) -> None:
        """Note a value for :meth:`finish`."""
        is_plain = isinstance(value, SIMPLE) or (isinstance(value, Tensor) and not vars(value))
        if not is_plain and id(value) not in self._seen:
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
            for space in list(self._spaces.values()):
                for key in self._keys_of(space) & vars(space).keys():
                    self._visit_attribute(vars(space)[key], f"{space.__name__}.{key}")
        variables = [Place(of.get("__name__", "globals"), of, keys) for of, keys in self._globals.values() if keys]
        spaces = [(space, self._keys_of(space)) for space in self._spaces.values()]
        return [*self._places, *variables] + [
            Place(space.__name__, vars(space) if isinstance(space, ModuleType) else space, keys)
            for space, keys in spaces
            if keys
        ]

    def _keys_of(self, space: type | ModuleType) -> set[str]:
        # The attributes that count; of a class also those that it has from its bases, which it could hide.
        spaces = [space] if isinstance(space, ModuleType) else [x for x in space.__mro__ if id(x) in self._spaces]
        is_made = id(space) in self._made
        return {key for of in spaces for key, value in vars(of).items() if self._counts(key, value, is_made)}

    def _counts(self, key: str, value: Any, is_made: bool) -> bool:
        if key in self._names:
            return True
        is_special = key.startswith("__") and key.endswith("__")
        if isinstance(value, CODE):
            return is_special and (key not in NOT_CALLED or (is_made and key in ("__init__", "__new__")))
        return self._by_name and not is_special and not isinstance(value, (type, ModuleType))

    def _follow(self, value: Any, name: str) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            raise TypeError(f"{name} is in TorchScript")
        if isinstance(value, REFUSED_IN_USE):
            return
        if isinstance(value, HIDDEN):
            raise TypeError(f"{name} is a {type(value).__name__}, whose state cannot be followed")
        if isinstance(value, dict):
            self._add(value, name, value.items())
            for key in value:
                self.visit(key, name)
        elif isinstance(value, (list, deque, set, tuple, frozenset)):
            is_fixed = isinstance(value, (tuple, frozenset))
            self._add(value, name, (("[]", x) for x in value), is_fixed=is_fixed)
        elif isinstance(value, ContextVar):
            self._add(value, name, [("value", value.get(None))])
        elif isinstance(value, np.ndarray):
            self._places.append(Place(name, value))
            for x in value.flat if value.dtype.hasobject else ():
                self.visit(x, name)
        elif isinstance(value, FunctionType):
            return self._follow_function(value, name)
        elif isinstance(value, MethodType):
            self.visit(value.__func__, name)
            return self.visit(value.__self__, name)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.visit(part, name)
        elif isinstance(value, MANAGER):  # as a decorator it is made anew at each call
            return self.visit((value.func, value.args, value.kwds), name)
        elif isinstance(value, type):
            self._add_class(type(value))
            return self._add_class(value, is_made=True)
        elif isinstance(value, ModuleType):
            return self._add_space(value, value.__name__)
        if _has_attributes(value):
            self._follow_object(value, name)
        return None

    def _follow_object(self, value: Any, name: str) -> None:
        self._add_class(type(value))
        for kind in type(value).__mro__:
            if not is_library(kind.__module__) and (slots := vars(kind).get("__slots__")):
                slots = [slots] if isinstance(slots, str) else [slot for slot in slots if not slot.startswith("__")]
                self._places.append(Place(name, value, slots))
                for slot in slots:
                    self.visit(getattr(value, slot, None), f"{name}.{slot}")
        if not hasattr(value, "__dict__"):
            return
        skipped = NOT_FOLLOWED if isinstance(value, nn.Module) else set()
        if id(value) in self._modules:
            skipped = skipped | IN_STATE
            for tensors in (value._parameters, value._buffers):
                for key, x in tensors.items():
                    self.visit(x, f"{name}.{key}")
        if isinstance(value, nn.RNNBase):
            skipped = skipped | FLAT_WEIGHTS
            self._places.append(Place(name, vars(value), vars(value).keys() - FLAT_WEIGHTS))
        followed = [item for item in vars(value).items() if item[0] not in skipped]
        self._add(vars(value), name, followed, is_fixed=isinstance(value, nn.RNNBase))

    def _follow_function(self, function: FunctionType, name: str) -> None:
        variables = function.__globals__
        is_users = not is_library(variables.get("__name__"))
        if not is_users and is_library(function.__module__):  # and no function of a library that wraps a user's
            return
        if function.__closure__:
            self._places.append(Place(f"a variable that {name} encloses", function.__closure__))
            for variable, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
                value = _contents(cell)
                if variable == "__class__" and isinstance(value, type):  # what super() reads
                    self._add_class(value)
                else:
                    self.visit(value, name)
        for part in (function.__defaults__, function.__kwdefaults__, vars(function)):
            self.visit(part, name)
        if not is_users:
            return
        read = _names_in(function.__code__)
        self.codes |= read.codes
        self._names |= read.attributes
        self._by_name |= read.by_name
        self._read_globals(variables, read.variables & variables.keys())
        for module in read.imports:
            self._import(module, variables.get("__package__") or "")

    def _read_globals(self, variables: dict, keys: set[str]) -> None:
        self._globals.setdefault(id(variables), (variables, set()))[1].update(keys)
        for key in keys:
            self.visit(variables.get(key), key)

    def _import(self, module: str, package: str) -> None:
        # A relative import may mean a module of the package or of one that this is in: all that there are.
        parents = package.split(".") if package else []
        names = {".".join([*parents[:i], *filter(None, [module])]) for i in range(len(parents) + 1)}
        names = {name for name in names if not is_library(name) and (name == module or name in sys.modules)} - {""}
        self._read_globals(sys.modules, names)

    def _visit_attribute(self, value: Any, name: str) -> None:
        if isinstance(value, property):
            self.visit(value.fset, name)
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
            inner = name if key in ("[]", "_modules", "_parameters", "_buffers") else f"{name}.{key}"
            self.visit(value, inner)

    def _add_class(self, kind: type, *, is_made: bool = False) -> None:
        if is_library(kind.__module__) or id(kind) in (self._made if is_made else self._spaces):
            return
        for base in kind.__mro__:
            self._add_space(base, base.__module__)
            if is_made:
                self._made.add(id(base))
            if is_library(base.__module__) and base is not nn.Module:  # its code calls what the user's class defines
                for value in vars(base).values():
                    if isinstance(value, FunctionType):
                        self._names |= _names_in(value.__code__).attributes

    def _add_space(self, space: type | ModuleType, module: str) -> None:
        if not is_library(module):
            self._spaces[id(space)] = space


CODE = (FunctionType, property, classmethod, staticmethod, functools.cached_property)


def _has_attributes(value: Any) -> bool:
    # Whether an object may hold values in attributes.
    module = type(value).__module__
    if not is_library(module):
        return True
    if module.partition(".")[0] in PACKAGES:
        return isinstance(value, (nn.Module, Tensor, Distribution, Transform))
    return bool(getattr(value, "__dict__", None))


@functools.cache
def is_library(module: str | None) -> bool:
    """Return whether a module is of the standard library, torch, or another package that is taken as constant."""
    package = (module or "").partition(".")[0]
    return package in STANDARD or package in PACKAGES


class _Names(NamedTuple):
    variables: set[str]
    attributes: set[str]
    imports: set[str]
    by_name: bool
    codes: set[CodeType]


@functools.cache
def _names_in(code: CodeType) -> _Names:
    # The global variables, the attributes and the modules that the code reads or writes, and the code inside it.
    found = _Names(set(), set(), set(), False, {code})
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME"):
            found.variables.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            found.imports.add(instruction.argval)
        elif any(part in instruction.opname for part in ("ATTR", "METHOD", "IMPORT_FROM")):
            found.attributes.add(instruction.argval)
    by_name = not BY_NAME.isdisjoint(found.variables | found.attributes)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            *sets, inner_by_name, codes = _names_in(inner)
            by_name |= inner_by_name
            for own, its in zip((*found[:3], found.codes), (*sets, codes), strict=True):
                own |= its
    if by_name:
        found.attributes.update(x for x in code.co_consts if isinstance(x, str))
    return found._replace(by_name=by_name)
