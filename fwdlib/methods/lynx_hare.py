"""The pelts of lynxes and hares that the Hudson's Bay Company traded, 1900 to 1920: the classical predator and prey.

Compiled in P. Howard, *Modeling basics* (Texas A&M University, 2009). B. Carpenter, *Predator-Prey Population Dynamics:
the Lotka-Volterra model in Stan* (2018), fits the equations of Lotka and Volterra to them, with log-normal errors.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

PUBLISHED = {"a": 0.55, "b": 0.028, "c": 0.80, "d": 0.024}
"""Carpenter's posterior means, by the names of :func:`fwdlib.methods.processes.lotka_volterra`."""


class Pelts(NamedTuple):
    """Pelts by year, in thousands."""

    years: Tensor
    """Integers, shape (21,)."""
    hare: Tensor
    """The prey, float64, shape (21,)."""
    lynx: Tensor
    """The predators, float64, shape (21,)."""


def load_lynx_hare() -> Pelts:
    """Read the file that comes with fwdlib.

    Returns:
        The years and the pelts of both kinds.

    Example:
        >>> load_lynx_hare().hare[:3]
        tensor([30.0000, 47.2000, 70.2000], dtype=torch.float64)
    """
    lines = files("fwdlib.methods").joinpath("lynx_hare.csv").read_text(encoding="utf-8").split()
    rows = torch.tensor([[float(x) for x in line.split(",")] for line in lines[1:]], dtype=torch.float64)
    years, lynx, hare = rows.unbind(1)
    return Pelts(years.long(), hare, lynx)
