"""The checker: what it prints for each kind of answer; only a stub may raise."""

import pytest
import torch

from fwdlib.exercises import check


def said(capsys):
    return capsys.readouterr().out.strip()


def square(x):
    return x * x


def test_a_right_answer(capsys):
    check(square, [((3,), 9), ((torch.tensor([1.0, 2.0]),), torch.tensor([1.0, 4.0]))])
    assert said(capsys) == "square: right."


def test_several_arguments(capsys):
    def add(x, y):
        return x + y

    check(add, [((1, 2), 3)])
    assert said(capsys) == "add: right."


@pytest.mark.parametrize("expected", [8.0, torch.tensor([9.0, 9.0]), torch.tensor([9.0]), float("nan")])
def test_a_wrong_value_or_shape(capsys, expected):
    check(square, [((3.0,), expected)])
    out = said(capsys)
    assert out.startswith("square: not right yet. ")
    assert "right." not in out


def test_one_wrong_case_is_enough(capsys):
    check(square, [((2.0,), 4.0), ((3.0,), 8.0)])
    assert said(capsys).startswith("square: not right yet")


def test_the_wrong_numbers_are_shown(capsys):
    check(square, [((3.0,), 8.0)])
    assert "9.0" in said(capsys)


@pytest.mark.parametrize("nonsense", [None, "nine", [[1, 2], [3]], object()])
def test_nonsense_is_not_right_and_no_crash(capsys, nonsense):
    def answer():
        return nonsense

    check(answer, [((), 9.0)])
    assert said(capsys).startswith("answer: not right yet")


def test_a_stub_is_no_error(capsys):
    def slope(x):
        raise NotImplementedError

    check(slope, [((1.0,), 1.0)])
    assert said(capsys).startswith("slope: not solved yet")


def test_any_other_error_of_the_answer_is_the_student_s_to_see():
    def slope(x):
        return x / 0

    with pytest.raises(ZeroDivisionError):
        check(slope, [((1.0,), 1.0)])


def test_tolerance_is_relative_and_absolute(capsys):
    def near(x):
        return x

    for given, expected, tolerance, right in (
        (1.0001, 1.0, 1e-3, True),
        (1.01, 1.0, 1e-3, False),
        (1010.0, 1000.0, 0.02, True),
        (1e-4, 0.0, 1e-3, True),
    ):
        check(near, [((given,), expected)], tolerance=tolerance)
        assert said(capsys).startswith("near: right." if right else "near: not right yet")


def test_types_do_not_matter(capsys):
    def answer(x):
        return x

    check(answer, [((torch.tensor(2),), 2.0), ((2,), torch.tensor(2.0, dtype=torch.float16))])
    assert said(capsys) == "answer: right."


def test_an_answer_with_a_graph(capsys):
    check(square, [((torch.tensor(3.0, requires_grad=True),), 9.0)])
    assert said(capsys) == "square: right."
