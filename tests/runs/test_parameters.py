"""The parameters of a notebook: found with their defaults, and guarded by the types of these."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdlib.runs.parameters import check_parameter, defaults_of, parse

CELL = """\
seed: int = 0  # the first one
learning_rate = 1e-3
optimizer = "SGD"  # or 'Adam'
flag = False
threshold = None
sizes = [64, 64]
options = {"a": 1}
computed = 2 * 3"""
DEFAULTS = {"seed": 0, "learning_rate": 1e-3, "optimizer": "SGD", "flag": False, "threshold": None}
DEFAULTS |= {"sizes": [64, 64], "options": {"a": 1}, "computed": None}


def write_notebook(path: Path, *cells: str) -> Path:
    content = [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}) for source in cells]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=content, metadata={"kernelspec": kernel}), path)
    return path


def test_defaults_have_their_types_and_the_order_of_the_cell(tmp_path):
    found = defaults_of(write_notebook(tmp_path / "n.ipynb", CELL))
    assert found == DEFAULTS
    assert list(found) == list(DEFAULTS)
    assert [type(value) for value in found.values()] == [type(value) for value in DEFAULTS.values()]


@pytest.mark.parametrize("cells", [(), ("a = 1", "b = 2")])
def test_one_cell_holds_the_parameters(tmp_path, cells):
    with pytest.raises(ValueError, match=rf"n.ipynb has {len(cells)} cells tagged 'parameters'; a batch needs exactly"):
        defaults_of(write_notebook(tmp_path / "n.ipynb", *cells))


def test_a_notebook_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no notebook at {tmp_path / 'n.ipynb'}")):
        defaults_of(tmp_path / "n.ipynb")


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("7", 3, 7),
        ("-1", 0, -1),
        ("1e-3", 0.1, 1e-3),
        ("1", 0.1, 1.0),
        ("inf", 0.1, float("inf")),
        ("1", "SGD", "1"),
        ("None", "SGD", "None"),
        ("true", False, True),
        ("False", True, False),
        ("0.3", None, 0.3),
        ("None", None, None),
        ("true", None, True),
        ("Adam", None, "Adam"),
    ],
)
def test_a_word_is_read_by_the_type_of_the_default(text, default, value):
    assert repr(parse(text, default)) == repr(value)  # unlike ==, tells 1, 1.0 and True apart


@pytest.mark.parametrize(("text", "default"), [("few", 3), ("1.5", 3), ("fast", 0.1), ("1", False), ("[1]", [2])])
def test_a_word_of_another_type_stays_a_word_and_is_refused(text, default):
    assert parse(text, default) == text
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        check_parameter(Path("n.ipynb"), {"name": default}, "name", text)


@given(value=st.integers() | st.floats(allow_nan=False) | st.booleans())
def test_what_python_prints_is_read_back(value):
    for default in (type(value)(1), None) if value not in (float("inf"), -float("inf")) else (0.5,):
        assert repr(parse(str(value), default)) == repr(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 4), ("learning_rate", 0.5), ("optimizer", ""), ("flag", True), ("sizes", []), ("options", {})]
    + [(name, value) for name in ("threshold", "computed") for value in (1, 0.5, "x", True, None, [1], {"b": 2})],
)
def test_values_of_the_right_type_pass(name, value):
    assert check_parameter(Path("n.ipynb"), DEFAULTS, name, value) is value


def test_a_whole_number_stands_for_a_float():
    found = check_parameter(Path("n.ipynb"), DEFAULTS, "learning_rate", 1)
    assert (found, type(found)) == (1.0, float)


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("seed", 0.5, "a whole number, as its default 0, got 0.5"),
        ("seed", True, "a whole number, as its default 0, got True"),
        ("seed", None, "a whole number, as its default 0, got None"),
        ("learning_rate", True, "a number, as its default 0.001, got True"),
        ("learning_rate", "1e-3", "a number, as its default 0.001, got '1e-3'"),
        ("optimizer", 1, "a text, as its default 'SGD', got 1"),
        ("flag", 1, "true or false, as its default False, got 1"),
        ("sizes", 1, "a list, as its default [64, 64], got 1"),
        ("options", [], "a table, as its default {'a': 1}, got []"),
        ("threshold", 1j, "or None, as its default None, got 1j"),
    ],
)
def test_values_of_another_type_are_refused_with_what_is_taken(name, value, takes):
    with pytest.raises(ValueError, match=re.escape(f"parameter {name!r} of n.ipynb takes ")) as caught:
        check_parameter(Path("n.ipynb"), DEFAULTS, name, value)
    assert str(caught.value).endswith(takes)


def test_an_unknown_parameter_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"n.ipynb has no parameter 'lr'; it has seed, learning_rate, optimizer"):
        check_parameter(Path("n.ipynb"), DEFAULTS, "lr", 0.1)
    with pytest.raises(ValueError, match="it has none"):
        check_parameter(Path("n.ipynb"), {}, "lr", 0.1)
