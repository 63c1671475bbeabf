import math

import pytest

from fwdlib.checks import (
    MAX_SEED,
    check_choice,
    check_count,
    check_fraction,
    check_inserted,
    check_positive,
    check_seed,
)


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, -math.inf, "0.1", None, True])
def test_check_positive_refuses(value):
    with pytest.raises(ValueError, match=r"learning_rate must be a finite number above 0, got") as error:
        check_positive("learning_rate", value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True])
def test_check_count_refuses(value):
    with pytest.raises(ValueError, match=r"num_tangents must be a whole number of at least 1, got"):
        check_count("num_tangents", value)


@pytest.mark.parametrize("value", [-1, 0.5, True, 2**32, 10**20])
def test_check_seed_refuses(value):
    with pytest.raises(ValueError, match=rf"seed must be .*, got {value}"):
        check_seed(value)
    assert check_seed(MAX_SEED) == MAX_SEED


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_check_fraction_refuses(value):
    with pytest.raises(ValueError, match=r"alpha must be between 0 and 1, got"):
        check_fraction("alpha", value)


def test_check_choice_lists_what_is_allowed():
    with pytest.raises(ValueError, match=r"blocks must be one of 'joint', 'parameter', got 'layer'"):
        check_choice("blocks", "layer", ("joint", "parameter"))


def test_checks_return_the_value():
    assert check_positive("x", 1e-3) == 1e-3
    assert check_count("x", 3) == 3
    assert check_choice("x", "a", "ab") == "a"
    assert [check_fraction("x", value) for value in (0, 0.5, 1)] == [0, 0.5, 1]


def test_inserted_parameters_may_run_again():
    cells = ["", "import sys", "seed = 0\nnum_seeds = 20  # of them", "# Parameters\nnum_seeds = 3\n", "x = 1"]
    check_inserted([*cells, cells[3]])
    check_inserted([])
    for inserted in ("seeed = 1", "num_seeds = 0", "num_seeds = 1.5", "num_seeds = 'few'"):
        with pytest.raises(ValueError, match=r"no parameter 'seeed'; it has seed, num_seeds|num_seeds must be a whole"):
            check_inserted([*cells[:3], f"# Parameters\n{inserted}"])


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate = -0.1  # of all",
        "learning_rate = '0.1'",
        "threshold = 0",
        "max_iterations = 0",
        "num_iterations = 1e3",
        "num_tangents = 0",
        "seed = -1",
        "blocks = 'layer'",
    ],
)
def test_a_value_out_of_range_is_refused_where_a_reader_or_papermill_has_set_it(line):
    name = line.partition(" ")[0].removeprefix("data_")
    for cells in ([line], ["\n".join([f"{name} = 1", "x = 2"]), f"# Parameters\n{line}"]):
        with pytest.raises(ValueError, match=name):
            check_inserted(cells)


def test_a_value_that_the_reader_has_corrected_is_forgotten():
    check_inserted(["learning_rate = -1", "print(In)", "learning_rate = 0.1", "print(In)"])


def test_values_in_range_and_values_that_are_computed_pass():
    check_inserted(["seed = 0\nlearning_rate = 1e-3\nthreshold = None\nblocks = 'joint'", "num_tangents = len(x)"])
