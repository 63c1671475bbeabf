"""The parameters of a notebook: found with their defaults, and guarded by the types of these."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdlib.runs.parameters import check_parameter, defaults_of, parse, split
from tests.notebook_files import write_notebook

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


def test_defaults_have_their_types_and_the_order_of_the_cell(tmp_path):
    found = defaults_of(write_notebook(tmp_path / "n.ipynb", CELL))
    assert found == DEFAULTS
    assert list(found) == list(DEFAULTS)
    assert [type(value) for value in found.values()] == [type(value) for value in DEFAULTS.values()]


def test_a_default_may_take_several_lines_and_lines_of_ipython_are_skipped(tmp_path):
    cell = "sizes = [\n    64,\n    32,\n]\n%matplotlib inline\nif True:\n    !ls\n    hidden = 1\na, b = 1, 2"
    assert defaults_of(write_notebook(tmp_path / "n.ipynb", cell)) == {"sizes": [64, 32]}


def test_a_notebook_without_a_kernel_is_one_of_python_and_one_of_another_language_is_refused(tmp_path):
    assert defaults_of(write_notebook(tmp_path / "n.ipynb", "a = 1", kernel=None)) == {"a": 1}
    kernel = {"name": "ir", "display_name": "R", "language": "R"}
    with pytest.raises(ValueError, match=r"n.ipynb is for a kernel of R; only Python"):
        defaults_of(write_notebook(tmp_path / "n.ipynb", "a = 1", kernel=kernel))


def test_a_cell_that_is_no_python_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cell tagged 'parameters' of .*n.ipynb is no Python"):
        defaults_of(write_notebook(tmp_path / "n.ipynb", "a = = 1"))


def test_one_cell_holds_the_parameters(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", None, "a = 1")
    with pytest.raises(ValueError, match=r"n.ipynb has 0 cells tagged 'parameters'; a batch needs exactly"):
        defaults_of(path)
    two = nbformat.read(write_notebook(path, "a = 1"), 4)
    two.cells.append(nbformat.v4.new_code_cell("b = 2", metadata={"tags": ["parameters"]}))
    nbformat.write(two, path)
    with pytest.raises(ValueError, match=r"n.ipynb has 2 cells tagged 'parameters'; a batch needs exactly"):
        defaults_of(path)


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
        ("[1, 2]", None, [1, 2]),
        ("[1]", [2], [1]),
        ("{'a': 2}", {"a": 1}, {"a": 2}),
        ("'a, b'", "SGD", "a, b"),
        ("don't", "SGD", "don't"),
        ("(1, 2)", "SGD", "(1, 2)"),
    ],
)
def test_a_word_is_read_by_the_type_of_the_default(text, default, value):
    assert repr(parse(text, default)) == repr(value)  # unlike ==, tells 1, 1.0 and True apart


@pytest.mark.parametrize(("text", "default"), [("few", 3), ("1.5", 3), ("fast", 0.1), ("1", False), ("few", [2])])
def test_a_word_of_another_type_stays_a_word_and_is_refused(text, default):
    assert parse(text, default) == text
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        check_parameter(Path("n.ipynb"), {"name": default}, "name", text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", [""]),
        ("1,,2", ["1", "", "2"]),
        ("(1,2)", ["(1,2)"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("[[1,2],(3,{4:5,6:7})],8", ["[[1,2],(3,{4:5,6:7})]", "8"]),
        ("'a,b',\"c,]\"", ["'a,b'", '"c,]"']),
        ("['a]', 'b']", ["['a]', 'b']"]),
        ("don't,won't", ["don't", "won't"]),
    ],
)
def test_commas_in_brackets_and_quotes_do_not_separate(text, words):
    assert split(text) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(1,2", "')' is missing at the end of '(1,2'"),
        ("[1,(2]", "']' closes no bracket in '[1,(2]'"),
        ("1)", "')' closes no bracket in '1)'"),
        ("'a,b", '"\'" is missing at the end of'),
    ],
)
def test_a_bracket_or_quote_that_is_not_closed_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split(text)


def test_a_quote_after_a_backslash_ends_no_text():
    assert split(r"""{'\'"': 0.0},'a\'b,c'""") == [r"""{'\'"': 0.0}""", r"'a\'b,c'"]


@given(values=st.lists(st.lists(st.integers() | st.text()) | st.dictionaries(st.text(), st.floats(allow_nan=False))))
def test_lists_and_tables_are_read_back(values):
    texts = [repr(value) for value in values]
    if values and "inf" not in "".join(texts):
        assert [parse(word, None) for word in split(",".join(texts))] == values


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
        ("threshold", (1, 2), "or None, as its default None, got (1, 2)"),
        ("threshold", [1, (2, 3)], "or None, as its default None, got [1, (2, 3)]"),
        ("options", {1: 2}, "a table, as its default {'a': 1}, got {1: 2}"),
    ],
)
def test_values_of_another_type_are_refused_with_what_is_taken(name, value, takes):
    with pytest.raises(ValueError, match=re.escape(f"parameter {name!r} of n.ipynb takes ")) as caught:
        check_parameter(Path("n.ipynb"), DEFAULTS, name, value)
    assert str(caught.value).endswith(takes)


def test_a_parameter_of_a_kind_that_papermill_cannot_pass_on_cannot_be_set():
    with pytest.raises(ValueError, match=re.escape("'tup' of n.ipynb cannot be set: its default (1, 2) is a tuple")):
        check_parameter(Path("n.ipynb"), {"tup": (1, 2)}, "tup", [1, 2])


def test_an_unknown_parameter_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"n.ipynb has no parameter 'lr'; it has seed, learning_rate, optimizer"):
        check_parameter(Path("n.ipynb"), DEFAULTS, "lr", 0.1)
    with pytest.raises(ValueError, match="it has none"):
        check_parameter(Path("n.ipynb"), {}, "lr", 0.1)
