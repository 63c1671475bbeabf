"""The checker: what it prints for each kind of answer; only a stub may raise."""

import pytest
import torch

from fwdlib.exercises import check


def square(x):
    return x * x


def same(x):
    return x


def stub(x):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("answer", "cases", "said"),
    [
        (square, [((3,), 9), ((torch.tensor([1.0, 2.0]),), torch.tensor([1.0, 4.0]))], "square: right."),
        (pow, [((3, 2), 9)], "pow: right."),
        (square, [((torch.tensor(3.0, requires_grad=True),), 9.0)], "square: right."),
        (same, [((torch.tensor(2),), 2.0), ((2,), torch.tensor(2.0, dtype=torch.float16))], "same: right."),
        *((square, [((3.0,), wrong)], "square: not right yet. ") for wrong in (8.0, torch.tensor([9.0]), float("nan"))),
        (square, [((2.0,), 4.0), ((3.0,), 8.0)], "square: not right yet"),  # one wrong case is enough
        *((same, [((no,), 9.0)], "same: not right yet") for no in (None, "nine", [[1, 2], [3]], object())),
        (stub, [((1.0,), 1.0)], "stub: not solved yet"),
    ],
)
def test_what_is_said_of_an_answer(answer, cases, said, capsys):
    check(answer, cases)
    out = capsys.readouterr().out.strip()
    assert out.startswith(said)
    assert out.endswith("right.") == said.endswith("right.")


def wrong(given, expected):
    check(same, [((given,), expected)])


ROW = torch.tensor([1.0, -2.0, 4.0])


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        (7.25, 8.0, "For the arguments (7.25), what it returns is too small."),
        (-8.0, 8.0, "has the wrong sign"),
        (0.0, 8.0, "is 0"),
        (float("inf"), 8.0, "is not finite"),
        (ROW, ROW[:2], "has shape (3,), not (2,)"),
        (3 * ROW, ROW, "off by the same factor"),
        (ROW + torch.tensor([0, 0, 1]), ROW, "(a tensor of shape (3,)), what it returns is right in 2 of 3"),
        (torch.tensor([[1.0, 2.0], [3.0, 5.0]]).T, torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "transpose"),
        (ROW, {"w": ROW}, "it returns a value of type Tensor, not a dictionary"),
        ({"v": ROW}, {"w": ROW}, "its keys are ['v'], not ['w']"),
        ({"w": -ROW}, {"w": ROW}, "has the wrong sign (at 'w')"),
    ],
)
def test_it_says_in_what_way_an_answer_is_wrong(given, expected, said, capsys):
    wrong(given, expected)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected", "secret"), [(7.25, 8.5, "8.5"), (2 * ROW, ROW, "-2"), (ROW + 1, ROW, "4")]
)
def test_it_does_not_give_the_right_number_away(given, expected, secret, capsys):
    wrong(given, expected)
    out = capsys.readouterr().out
    assert "not right yet" in out
    assert secret not in out


def test_a_dictionary_of_tensors_is_compared_by_name(capsys):
    wrong({"a": ROW, "b": 2 * ROW}, {"b": 2 * ROW, "a": ROW})
    assert capsys.readouterr().out.strip() == "same: right."


def test_any_other_error_of_the_answer_is_the_student_s_to_see():
    with pytest.raises(ZeroDivisionError):
        check(lambda x: x / 0, [((1.0,), 1.0)])


@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "right"),
    [(1.0001, 1.0, 1e-3, True), (1.01, 1.0, 1e-3, False), (1010.0, 1000.0, 0.02, True), (1e-4, 0.0, 1e-3, True)],
)
def test_tolerance_is_relative_and_absolute(given, expected, tolerance, right, capsys):
    check(same, [((given,), expected)], tolerance=tolerance)
    assert capsys.readouterr().out.startswith("same: right." if right else "same: not right yet")
