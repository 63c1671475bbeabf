"""Rows of embedding tables that no gradient reaches, because every look-up has them as ``padding_idx``.

Backprop gives such a row a gradient of zero. Along a random tangent a forward gradient would give it noise, and train
it, so its tangent has to be zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SIGNATURES = {
    F.embedding: inspect.signature(F.embedding),
    F.embedding_bag: inspect.signature(F.embedding_bag),
    torch.embedding: inspect.signature(lambda weight, indices, padding_idx=-1, *args, **kwargs: None),
}


class Padding:
    """How one forward pass uses its parameters: which it only looks rows up in, and with which row as padding."""

    def __init__(self) -> None:
        self._rows: dict[str, set[int]] = {}

    def look_up(self, name: str, row: int | None) -> None:
        """Note a look-up in the table ``name`` with ``row``, not negative, as padding; None for no padding."""
        rows = set() if row is None else {row}
        self._rows[name] = self._rows.get(name, rows) & rows

    def read(self, name: str) -> None:
        """Note any other use of the parameter ``name``, by which each of its rows may have a gradient."""
        self._rows[name] = set()

    def note(self, func: Callable, args: tuple, kwargs: Mapping[str, Any], names: Mapping[int, str]) -> None:
        """Note a call of a torch function.

        Args:
            func: the function.
            args: its arguments.
            kwargs: its arguments.
            names: the parameters' names by ``id``.
        """
        if func in _SIGNATURES:
            bound = _SIGNATURES[func].bind(*args, **kwargs).arguments
            table, row = bound.pop("weight"), bound.get("padding_idx")
            if (name := names.get(id(table))) is not None:
                is_torch = func is torch.embedding and row is not None and row < 0
                self.look_up(name, None if row is None or is_torch else row % len(table))
            args, kwargs = tuple(bound.values()), {}
        self._read_all(args, names)
        if kwargs:
            self._read_all(kwargs.values(), names)

    def _read_all(self, values: Any, names: Mapping[int, str]) -> None:
        for value in values:
            if id(value) in names:
                self.read(names[id(value)])
            elif isinstance(value, (list, tuple)):
                self._read_all(value, names)

    def rows(self) -> dict[str, list[int]]:
        """Return the rows without a gradient, by the name of their table."""
        return {name: sorted(rows) for name, rows in self._rows.items() if rows}


def without_rows(tangents: Tensor, rows: list[int]) -> Tensor:
    """Return tangents (K, q, ...) with zeros in some of the q rows."""
    return tangents.index_fill(1, torch.tensor(rows, device=tangents.device), 0)
