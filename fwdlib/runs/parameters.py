"""The parameters of a notebook: which there are, with which defaults, and what may stand in for a default.

Not those of a model, which are ``params`` everywhere. papermill finds them in the cell tagged ``parameters``; it takes
whatever it is given, and so these checks are ours.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import nbformat
import papermill

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a table",
    type(None): "a number, a text, true, false, a list, a table or None",
}


def defaults_of(notebook: Path) -> dict[str, Any]:
    """Return a notebook's parameters with their defaults, in the order of its cell; None for one that is no literal.

    Args:
        notebook: its path.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not have exactly one cell tagged ``parameters``.
    """
    if not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook at {notebook}")
    tagged = sum("parameters" in cell.metadata.get("tags", []) for cell in nbformat.read(notebook, 4).cells)
    if tagged != 1:  # without one, papermill would put the values on top, and the defaults below would win
        raise ValueError(f"{notebook} has {tagged} cells tagged 'parameters'; a batch needs exactly one")
    return {name: literal(found["default"]) for name, found in papermill.inspect_notebook(str(notebook)).items()}


def literal(source: str, otherwise: Any = None) -> Any:
    """Return the value that a Python literal stands for, or ``otherwise`` if ``source`` is none.

    Args:
        source: for example ``"0.1"``, ``"'SGD'"``, ``"None"``.
        otherwise: for what is no literal.

    Example:
        >>> literal("1e-3"), literal("2 * n"), literal("Adam", "Adam")
        (0.001, None, 'Adam')
    """
    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError, TypeError):
        return otherwise


def parse(text: str, default: Any) -> Any:
    """Return what a word of a command line stands for in the place of ``default``; the word itself if for nothing.

    Args:
        text: the word.
        default: of the parameter; where it is None, the word is read as a Python literal, if it is one.

    Example:
        >>> parse("1", 0.5), parse("1", "SGD"), parse("true", False), parse("none", None), parse("few", 3)
        (1.0, '1', True, None, 'few')
    """
    words = {"true": True, "false": False, "none": None}
    if isinstance(default, bool) or (default is None and text.lower() in words):
        return words.get(text.lower(), text)
    if default is None:
        return literal(text, text)
    try:
        return type(default)(text) if isinstance(default, (int, float)) else text
    except ValueError:
        return text


def check_parameter(notebook: Path, defaults: dict[str, Any], name: str, value: Any) -> Any:
    """Return ``value`` if ``notebook`` takes it: the parameter exists and its default is of the same type.

    A whole number is taken for a float, as one. A parameter whose default is None takes anything that JSON can hold.
    papermill itself only warns of a name that the notebook does not know, and runs on with the default; and a string
    "1e-3" in a number's place would fail somewhere deep inside the notebook, or not at all.

    Args:
        notebook: for the message.
        defaults: its parameters, by :func:`defaults_of`.
        name: of the parameter.
        value: for it.

    Raises:
        ValueError: if there is no such parameter, or it takes another type.
    """
    if name not in defaults:
        raise ValueError(f"{notebook} has no parameter {name!r}; it has {', '.join(defaults) or 'none'}")
    default = defaults[name]
    kind = type(default) if type(default) in KINDS else type(None)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind and not (kind is type(None) and type(value) in KINDS):
        raise ValueError(
            f"parameter {name!r} of {notebook} takes {KINDS[kind]}, as its default {default!r}, got {value!r}"
        )
    return value
