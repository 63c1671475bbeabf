"""Which of torch's functions write into their first argument, and which function computes the same without writing.

Torch's schemas say it, not the names: ``normal_`` has no counterpart, although ``torch.normal`` exists, and
``requires_grad_`` writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket


class InPlace(NamedTuple):
    """What a function does to its first argument."""

    counterpart: Callable | None
    """The function that returns the same values and writes nothing; None if torch has none."""
    moves: bool = False
    """Whether it changes the shape or the place in memory of its first argument, in place of its entries."""
    is_known: bool = True
    """Whether it writes into nothing else, and is torch's own."""


def in_place(func: Callable) -> InPlace | None:
    """Return what ``func`` does to its first argument; None if it writes nothing."""
    if func is Tensor.__setitem__:
        return InPlace(None)
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        counterpart = getattr(Tensor, f"__{name[3:]}", None) if name.startswith("__i") else None
        return counterpart and InPlace(counterpart)
    if isinstance(func, OpOverload):
        overloads = [func]
    else:
        packet = func if isinstance(func, OpOverloadPacket) else getattr(torch.ops.aten, name, None)
        is_named_so = isinstance(func, OpOverloadPacket) or (name.endswith("_") and not name.endswith("__"))
        overloads = [getattr(packet, o) for o in packet.overloads()] if is_named_so and packet is not None else []
    written = {i for overload in overloads for i in _written(overload)}
    if not written:
        return None
    if written != {0} or not overloads[0].name().startswith("aten::"):
        return InPlace(None, is_known=False)
    moves = any(torch.Tag.inplace_view in o.tags or o.name() in ("aten::set_", "aten::resize_as_") for o in overloads)
    return InPlace(None if moves else _counterpart(overloads), moves)


def _written(overload: OpOverload) -> list[int]:
    arguments = enumerate(overload._schema.arguments)
    return [i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write and not a.kwarg_only]


def _counterpart(overloads: list[OpOverload]) -> Callable | None:
    # The function of the same name without the underscore, if it takes the same arguments and draws nothing at random.
    name = overloads[0]._schema.name.removeprefix("aten::").removesuffix("_")
    packet = getattr(torch.ops.aten, name, None)
    signatures = [_arguments(getattr(packet, o)) for o in packet.overloads()] if packet is not None else []
    for overload in overloads:
        if torch.Tag.nondeterministic_seeded in overload.tags:
            return None
        if str(overload._schema.arguments[0].type) == "Tensor" and _arguments(overload) not in signatures:
            return None
    return next((getattr(home, name) for home in (Tensor, torch) if hasattr(home, name)), packet)


def _arguments(overload: OpOverload) -> list[tuple]:
    _, *rest = overload._schema.arguments
    return [(a.name, str(a.type), a.has_default_value() and a.default_value) for a in rest]
