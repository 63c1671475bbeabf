"""A forward pass with tangents, as far as torch's function modes do not show it.

A pass sees the calls of ``torch.autograd.Function`` and of scripts, for which torch has no override, and remembers what
it has refused: a model that catches the error must not hide it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import Function


class Refusal(NotImplementedError):
    """Something that forward mode cannot do right. The pass in which it is raised ends with it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        for each in _passes.stack[-1:] or _all:  # in a thread of the model's own, whose pass it is cannot be known
            each.refusals.append(self)


class NoTape(Refusal):
    """A model does something with a tape that forward mode does not keep."""


class _Running(NamedTuple):
    handler: Callable[[type[Function], tuple], Any]
    refusals: list[Refusal]


class _Passes(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Running] = []


_passes = _Passes()
_all: list[_Running] = []  # of all threads
_lock = threading.Lock()
_apply = Function.__dict__["apply"]


def _handled_apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    if _passes.stack and torch._C._is_fwd_grad_enabled() and torch.is_grad_enabled() and not kwargs:
        found = _passes.stack[-1].handler(cls, args)
        if found is not NotImplemented:
            return found
    return _apply.__get__(None, cls)(*args, **kwargs)


def _checked_call(kind: type) -> Callable:
    # The call of a script, refused where a grad mode that it sets would go unnoticed.
    call = kind.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _passes.stack:
            switch = next((word for word in OF_GRAD_MODE if word in _inlined(self)), None)
            if switch:
                raise NoTape(
                    f"{getattr(self, 'name', 'a function')} is in TorchScript and uses {OF_GRAD_MODE[switch]}, which "
                    f"acts on a tape that forward mode does not keep. Call the function in Python, without "
                    f"torch.jit, or use backprop_gradient."
                )
        return call(self, *args, **kwargs)

    return checked


@functools.lru_cache(maxsize=64)
def _inlined(script: Any) -> str:
    graph = script.graph.copy()
    torch._C._jit_pass_inline(graph)
    return str(graph)


OF_GRAD_MODE = {
    "autograd.grad_mode.no_grad": "torch.no_grad",
    "aten::is_grad_enabled": "torch.is_grad_enabled",
    "prim::requires_grad": "requires_grad",
    "aten::requires_grad_": "requires_grad_",
    "aten::is_leaf": "is_leaf",
    "aten::grad(": "grad",
}
"""What the graph of a script shows where it depends on grad mode or on a tape, and the word for it in the source."""
_SCRIPTS = torch._C.ScriptFunction, torch._C.ScriptMethod
_CALLS = [(kind, kind.__call__, _checked_call(kind)) for kind in _SCRIPTS]


def begin(handler: Callable[[type[Function], tuple], Any]) -> None:
    """Begin a pass in this thread. Until :func:`end`, ``handler(cls, args)`` answers the calls of ``cls.apply(*args)``.

    Torch has no override for them, nor for the call of a script, so both are replaced for as long as there is a pass.

    Args:
        handler: returns the result, or NotImplemented for what is not its business.
    """
    running = _Running(handler, [])
    _passes.stack.append(running)
    with _lock:
        _all.append(running)
        if len(_all) == 1:
            Function.apply = classmethod(_handled_apply)
            for kind, _, checked in _CALLS:
                kind.__call__ = checked


def end() -> list[Refusal]:
    """Undo the last :func:`begin`, and return what was refused since."""
    running = _passes.stack.pop()
    with _lock:
        _all.remove(running)
        if not _all:
            Function.apply = _apply
            for kind, call, _ in _CALLS:
                kind.__call__ = call
    return running.refusals


def raise_hidden(refusals: list[Refusal], error: BaseException | None) -> None:
    """Raise the first refusal where ``error``, what a pass ends with, hides it.

    Raises:
        Refusal: if there was one, and the model has caught it or raised another error in its place.
    """
    if refusals and (error is None or (isinstance(error, Exception) and not isinstance(error, NotImplementedError))):
        raise refusals[0] from error
