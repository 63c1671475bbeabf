"""The parameters of a notebook: their names and defaults, and which values may replace a default.

These are not the parameters of a model, which are ``params`` everywhere. A notebook sets them in the cell tagged
``parameters``; papermill inserts the values of a run after it. papermill takes any name and any value, so the checks
are made here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a table",
    type(None): "a number, a text, true, false, a list, a table or None",
}
BRACKETS = {"(": ")", "[": "]", "{": "}"}


def defaults_of(notebook: Path) -> dict[str, Any]:
    """Return a notebook's parameters with their defaults, in the order of its cell; None for one that is no literal.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no Python notebook with exactly one cell tagged ``parameters``.
    """
    if not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook at {notebook}")
    content = nbformat.read(notebook, 4)
    language = content.metadata.get("kernelspec", {}).get("language", "python")
    if language != "python":
        raise ValueError(f"{notebook} is for a kernel of {language}; only Python notebooks can run here")
    sources = [cell.source for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(sources) != 1:  # without one, papermill would put the values on top, and the defaults below would win
        raise ValueError(f"{notebook} has {len(sources)} cells tagged 'parameters'; a batch needs exactly one")
    try:
        statements = ast.parse(without_magics(sources[0])).body
    except SyntaxError as error:
        raise ValueError(f"the cell tagged 'parameters' of {notebook} is no Python: {error}") from error
    found: dict[str, Any] = {}
    for statement in statements:
        match statement:
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value) if value:
                found[name] = literal(value)
    return found


def without_magics(code: str) -> str:
    """Return the code of a notebook's cell with ``pass`` in place of IPython's own lines, ``%pip ...`` or ``!ls``."""
    return re.sub(r"^([ \t]*)[%!].*", r"\1pass", code, flags=re.MULTILINE)


def literal(source: str | ast.expr, otherwise: Any = None) -> Any:
    """Return the value of a Python literal, or ``otherwise`` if ``source`` is none.

    Example:
        >>> literal("1e-3"), literal("2 * n"), literal("Adam", "Adam")
        (0.001, None, 'Adam')
    """
    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError, TypeError):
        return otherwise


def split(text: str) -> list[str]:
    """Split the values of a command line at the commas that are in no brackets and no quotes.

    Args:
        text: ``"value,value,..."``. A quote counts where a value starts, or inside brackets.

    Raises:
        ValueError: if a bracket or a quote is not closed.

    Example:
        >>> split("0.1, Adam,[1, 2],(3,4),{'a,b': 5},'x,y',don't")
        ['0.1', 'Adam', '[1, 2]', '(3,4)', "{'a,b': 5}", "'x,y'", "don't"]
    """
    words, expected, quote, escaped = [""], [], "", False
    for character in text:
        if escaped:
            escaped = False
        elif quote:
            escaped = character == "\\"  # as in a Python literal
            quote = "" if character == quote else quote
        elif character in "'\"" and (expected or not words[-1].strip()):
            quote = character
        elif character in BRACKETS:
            expected.append(BRACKETS[character])
        elif character in BRACKETS.values() and (not expected or expected.pop() != character):
            raise ValueError(f"{character!r} closes no bracket in {text!r}; put a text that holds it in quotes")
        if character == "," and not (quote or expected):
            words.append("")
        else:
            words[-1] += character
    if quote or expected:
        raise ValueError(f"{quote or expected[-1]!r} is missing at the end of {text!r}")
    return [word.strip() for word in words]


def parse(text: str, default: Any) -> Any:
    """Return the value that a word of a command line means for a parameter with this default.

    A word that cannot be read as the default's type is returned as it is, for :func:`check_parameter` to refuse.

    Args:
        text: the word.
        default: of the parameter. Where it is None, the word is read as a Python literal if it is one.

    Example:
        >>> parse("1", 0.5), parse("1", "SGD"), parse("true", False), parse("none", None), parse("few", 3)
        (1.0, '1', True, None, 'few')
        >>> parse("[1, 2]", [8]), parse("'a, b'", "SGD")
        ([1, 2], 'a, b')
    """
    words = {"true": True, "false": False, "none": None}
    if isinstance(default, bool) or (default is None and text.lower() in words):
        return words.get(text.lower(), text)
    if isinstance(default, str):
        return literal(text, text) if re.fullmatch(r"'.*'|\".*\"", text) else text
    if isinstance(default, (int, float)):
        try:
            return type(default)(text)
        except ValueError:
            return text
    return literal(text, text)


def check_parameter(notebook: Path, defaults: dict[str, Any], name: str, value: Any) -> Any:
    """Return ``value`` if ``notebook`` takes it: the parameter exists and its default is of the same type.

    A whole number is accepted for a float and converted. A parameter whose default is None takes everything that JSON
    can hold. papermill itself only warns of a name that the notebook does not know, and runs with the default; and the
    string "1e-3" in place of a number would fail somewhere deep inside the notebook, or not at all.

    Raises:
        ValueError: if there is no such parameter, or it takes another type.
    """
    if name not in defaults:
        raise ValueError(f"{notebook} has no parameter {name!r}; it has {', '.join(defaults) or 'none'}")
    default = defaults[name]
    kind = type(default)
    if kind not in KINDS:
        raise ValueError(
            f"parameter {name!r} of {notebook} cannot be set: its default {default!r} is a {kind.__name__}, which "
            f"papermill cannot pass on. Make the default a list there"
        )
    if kind is float and type(value) is int:
        return float(value)
    if not _is_json(value) or (type(value) is not kind and default is not None):
        raise ValueError(
            f"parameter {name!r} of {notebook} takes {KINDS[kind]}, as its default {default!r}, got {value!r}"
        )
    return value


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return all(map(_is_json, value)) if isinstance(value, list) else type(value) in KINDS
