"""Checks the answers to the notebooks' exercises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def check(answer: Callable[..., Any], cases: Iterable[tuple[tuple, Any]], tolerance: float = 1e-4) -> None:
    """Print whether ``answer`` returns the expected value for each case. An unsolved exercise raises no error.

    Args:
        answer: the student's function; its stub raises NotImplementedError.
        cases: pairs of a tuple of arguments and the expected value, a number or a tensor.
        tolerance: relative and absolute.

    Example:
        >>> def double(x):
        ...     return x + x
        >>> check(double, [((2.0,), 4.0), ((3.0,), 6.0)])
        double: right.
    """
    name = answer.__name__
    for arguments, expected in cases:
        try:
            given = answer(*arguments)
        except NotImplementedError:
            print(f"{name}: not solved yet; replace `raise NotImplementedError` by your answer.")
            return
        expected = torch.as_tensor(expected, dtype=torch.float64)
        try:
            given = torch.as_tensor(given, dtype=torch.float64)
            torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            print(f"{name}: not right yet. {str(error).strip()}")
            return
    print(f"{name}: right.")
