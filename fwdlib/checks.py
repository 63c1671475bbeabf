"""Checks of arguments. Each checks one thing; its message names the argument, its value and what is allowed."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

MAX_SEED = 2**32 - 1  # the largest that numpy and scikit-learn take


def check_positive(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number above zero.

    Raises:
        ValueError: if it is zero, negative, not finite or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return value


def check_count(name: str, value: int, minimum: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least ``minimum``.

    Raises:
        ValueError: if it is smaller or not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    return value


def check_seed(value: int) -> int:
    """Return ``value`` if it can be the seed of a run.

    Raises:
        ValueError: if it is negative, above ``MAX_SEED`` or not an integer.
    """
    if check_count("seed", value, minimum=0) > MAX_SEED:
        raise ValueError(f"seed must be at most {MAX_SEED}, got {value!r}")
    return value


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` if it is between 0 and 1, both included.

    Raises:
        ValueError: if it is not.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return value


def check_choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises:
        ValueError: if it is not; the message lists ``allowed``.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _check_threshold(name: str, value: float | None) -> None:
    if value is not None:
        check_positive(name, value)


RANGES: dict[str, Callable[[str, Any], object]] = {  # of the parameters that notebooks share
    "learning_rate": check_positive,
    **dict.fromkeys(("num_seeds", "num_iterations", "max_iterations", "num_tangents"), check_count),
    **dict.fromkeys(("seed", "data_seed"), lambda _name, value: check_seed(value)),
    "threshold": _check_threshold,
    "blocks": lambda name, value: check_choice(name, value, ("joint", "parameter")),
}


def check_inserted(cells: Sequence[str]) -> None:
    r"""Check a notebook's parameters: those that papermill has inserted, and those that a reader has changed.

    papermill only warns of a name that the notebook does not know, and runs with the default. A value that makes no
    sense would stop the notebook only where it is used, perhaps after minutes.

    Args:
        cells: the code of a notebook. Inserted parameters are a cell of their own after the notebook's parameters, and
            in Jupyter a reader may run it again later.

    Raises:
        ValueError: if the notebook has no parameter of a name, or a value is out of its range.

    Example:
        >>> check_inserted(["num_seeds = 20", "# Parameters\nnum_seeds = 3"])
        >>> check_inserted(["num_seeds = 20", "# Parameters\nnmu_seeds = 3"])
        Traceback (most recent call last):
            ...
        ValueError: this notebook has no parameter 'nmu_seeds'; it has num_seeds
    """
    known: dict[str, str] = {}
    for cell in cells:
        given = dict(re.findall(r"^(\w+) *= *(.*)$", cell, re.MULTILINE))
        if cell.startswith("# Parameters\n") and (strange := [name for name in given if name not in known]):
            raise ValueError(f"this notebook has no parameter {strange[0]!r}; it has {', '.join(known)}")
        known |= given
    for name in known.keys() & RANGES.keys():  # the last value: a reader may have corrected one and run the cell again
        try:
            value = ast.literal_eval(known[name])
        except (ValueError, SyntaxError):  # computed: no parameter
            continue
        RANGES[name](name, value)
