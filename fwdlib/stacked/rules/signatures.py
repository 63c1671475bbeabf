"""Registration of rules: a rule gets only calls that its signature describes. All others go without a rule."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from fwdlib.stacked.forward_pass import Pass, Rule, register_rule

NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x2": "other"}
"""The names that torch's built-in functions also take, as NumPy has them."""
NUMPY_NAMES_OF_FIRST = ("x", "a", "x1")


def rule_of(*functions: Callable, **names: str) -> Callable[[Rule], Rule]:
    """Register a rule by :func:`~fwdlib.stacked.forward_pass.register_rule`, for the calls that fit its signature.

    The parameters of the rule, after the pass, have the order and the names of torch's function. Its first parameter
    may have any name, and is torch's ``input``.

    Args:
        functions: the torch functions.
        names: further names of parameters in torch -> the name in the rule.

    Returns:
        A decorator that returns the rule unchanged.
    """

    def register(rule: Rule) -> Rule:
        for function in functions:
            register_rule(function)(_checked(rule, function, names))
        return rule

    return register


def _checked(rule: Rule, function: Callable, names: dict[str, str]) -> Rule:
    _, first, *rest = inspect.signature(rule).parameters.values()
    positional = [p.name for p in (first, *rest) if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in (first, *rest) if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    passes_on = any(p.kind is p.VAR_KEYWORD for p in rest)  # to torch's function, which knows its own arguments
    limit = None if any(p.kind is p.VAR_POSITIONAL for p in rest) else len(positional)
    known = {p.name: p.name for p in rest} | {"input": first.name}
    if not isinstance(function, FunctionType):
        known |= {ours: theirs for ours, theirs in NUMPY_NAMES.items() if theirs in known}
        known |= dict.fromkeys(NUMPY_NAMES_OF_FIRST, first.name)
    known |= names

    @functools.cache
    def names_for(num_args: int, *given: str) -> tuple[str, ...] | None:
        # The rule's names of the keywords given with so many arguments; None if the call does not fit.
        ours = tuple(known.get(name, name if passes_on else "") for name in given)
        if limit is not None and num_args > limit:
            return None
        if "" in ours or len({*ours}) < len(ours) or any(name in ours for name in positional[:num_args]):
            return None
        return ours if all(name in ours for name in required[num_args:]) else None

    @functools.wraps(rule)
    def checked(run: Pass, *args: Any, **kwargs: Any) -> Any:
        if "out" in kwargs and kwargs["out"] is None:
            del kwargs["out"]
        names = names_for(len(args), *kwargs)
        if names is None:
            return NotImplemented
        return rule(run, *args, **dict(zip(names, kwargs.values(), strict=True))) if names else rule(run, *args)

    return checked
