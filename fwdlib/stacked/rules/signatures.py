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

    @functools.wraps(rule)
    def checked(run: Pass, *args: Any, **kwargs: Any) -> Any:
        if limit is not None and len(args) > limit:
            return NotImplemented
        if kwargs:
            if kwargs.get("out", 0) is None:
                del kwargs["out"]
            given = {known.get(name, name if passes_on else ""): value for name, value in kwargs.items()}
            if "" in given or len(given) < len(kwargs) or any(name in given for name in positional[: len(args)]):
                return NotImplemented
            if not all(name in given for name in required[len(args) :]):
                return NotImplemented
            return rule(run, *args, **given)
        if len(args) < len(required):
            return NotImplemented
        return rule(run, *args)

    return checked
