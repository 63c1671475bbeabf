"""Checks the answers to the notebooks' exercises, and says what is wrong with one without giving the right one away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def check(answer: Callable[..., Any], cases: Iterable[tuple[tuple, Any]], tolerance: float = 1e-4) -> None:
    """Print whether ``answer`` returns the expected value for each case. An unsolved exercise raises no error.

    Of a wrong answer it says for which arguments it is wrong and in what way: shape, sign, scale, order, or entries.

    Args:
        answer: the student's function; its stub raises NotImplementedError.
        cases: pairs of a tuple of arguments and the expected value: a number, a tensor, or a dictionary of tensors.
        tolerance: relative and absolute.

    Example:
        >>> def double(x):
        ...     return -x - x
        >>> check(double, [((2.0,), 4.0), ((3.0,), 6.0)])
        double: not right yet. For the arguments (2.0), what it returns has the wrong sign.
    """
    name = answer.__name__
    for arguments, expected in cases:
        try:
            given = answer(*arguments)
        except NotImplementedError:
            print(f"{name}: not solved yet; replace `raise NotImplementedError` by your answer.")
            return
        if wrong := _what_is_wrong(given, expected, tolerance):
            print(f"{name}: not right yet. For the arguments ({', '.join(map(_short, arguments))}), {wrong}.")
            return
    print(f"{name}: right.")


def _what_is_wrong(given: Any, expected: Any, tolerance: float) -> str:
    # "" for a right answer; otherwise a sentence that does not hold the right number.
    if isinstance(expected, Mapping):
        if not isinstance(given, Mapping):
            return f"it returns {_kind(given)}, not a dictionary"
        if given.keys() != expected.keys():
            return f"its keys are {sorted(given)}, not {sorted(expected)}"
        found = {key: _what_is_wrong(given[key], expected[key], tolerance) for key in expected}
        return next((f"{wrong} (at {key!r})" for key, wrong in found.items() if wrong), "")
    expected = torch.as_tensor(expected, dtype=torch.float64)
    try:
        given = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return f"it returns {_kind(given)}, not a number or a tensor"
    if given.shape != expected.shape:
        return f"what it returns has shape {tuple(given.shape)}, not {tuple(expected.shape)}"
    if not given.isfinite().all() and expected.isfinite().all():
        return "what it returns is not finite"
    if _is_close(given, expected, tolerance):
        return ""
    return f"what it returns {_manner(given, expected, tolerance)}"


def _manner(given: Tensor, expected: Tensor, tolerance: float) -> str:
    if not given.any():
        return "is 0"
    if _is_close(-given, expected, tolerance):
        return "has the wrong sign"
    if expected.ndim == 0:
        return "is too large" if given > expected else "is too small"
    if expected.numel() > 1 and expected.any():
        scale = (given * expected).sum() / given.square().sum()
        if _is_close(scale * given, expected, tolerance):
            return "points the right way but has the wrong length: every entry is off by the same factor"
    if expected.ndim == 2 and given.T.shape == expected.shape and _is_close(given.T, expected, tolerance):
        return "is the transpose of the right one"
    right = torch.isclose(given, expected, rtol=tolerance, atol=tolerance).sum()
    return f"is right in {right} of {expected.numel()} entries"


def _is_close(given: Tensor, expected: Tensor, tolerance: float) -> bool:
    return torch.allclose(given, expected, rtol=tolerance, atol=tolerance)


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" if len(repr(value)) > 40 else repr(value)
