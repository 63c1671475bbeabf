"""The test functions: their minima, values and derivatives, and the shapes that they take."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fwdlib.methods.functions import as_objective, beale, rosenbrock, sphere, styblinski_tang

MINIMA = {
    beale: ([3.0, 0.5], 0.0),
    rosenbrock: ([1.0] * 6, 0.0),
    sphere: ([0.0] * 4, 0.0),
    styblinski_tang: ([-2.903534027771177] * 5, -39.16616570377142 * 5),
}
FUNCTIONS = {function.__name__: function for function in MINIMA}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_minimum_is_where_it_is_said_to_be(name):
    point, value = MINIMA[FUNCTIONS[name]]
    point = torch.tensor(point, dtype=torch.float64)
    torch.testing.assert_close(FUNCTIONS[name](point), torch.tensor(value, dtype=torch.float64))
    torch.testing.assert_close(torch.func.grad(FUNCTIONS[name])(point), torch.zeros_like(point), rtol=0, atol=1e-10)
    assert torch.linalg.eigvalsh(torch.func.hessian(FUNCTIONS[name])(point)).min() > 0


@pytest.mark.parametrize("name", FUNCTIONS)
@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=2))
@settings(max_examples=50, deadline=None)
def test_nowhere_is_it_lower(name, values):
    value = FUNCTIONS[name](torch.tensor(values, dtype=torch.float64))
    assert value >= (2 * -39.16616570377142 if name == "styblinski_tang" else 0) - 1e-12


@given(values=st.lists(st.floats(-3, 3), min_size=2, max_size=9))
@settings(max_examples=30, deadline=None)
def test_rosenbrock_and_beale_are_those_of_scipy_and_of_the_books(values):
    point = torch.tensor(values, dtype=torch.float64)
    assert rosenbrock(point).item() == pytest.approx(scipy.optimize.rosen(values))
    assert torch.func.grad(rosenbrock)(point).numpy() == pytest.approx(scipy.optimize.rosen_der(np.array(values)))
    x, y = values[:2]
    books = sum((c - x * (1 - y ** (i + 1))) ** 2 for i, c in enumerate((1.5, 2.25, 2.625)))
    assert beale(point[:2]).item() == pytest.approx(books)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_go_through_vmap_row_by_row(name):
    points = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([FUNCTIONS[name](point) for point in points])
    torch.testing.assert_close(torch.func.vmap(FUNCTIONS[name])(points), rows)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_reverse_mode_agree_on_them(name):
    draw = torch.Generator().manual_seed(0)
    point, tangent = (torch.randn(2, dtype=torch.float64, generator=draw) for _ in range(2))
    objective = as_objective(FUNCTIONS[name])
    _, jvp = torch.func.jvp(objective, ({"x": point},), ({"x": tangent},))
    torch.testing.assert_close(jvp, torch.func.grad(objective)({"x": point})["x"] @ tangent)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("beale", (3,), r"shape \(2,\), got \(3,\)"),
        ("beale", (1, 2), r"shape \(2,\), got \(1, 2\)"),
        ("rosenbrock", (1,), r"shape \(n,\) with n at least 2, got \(1,\)"),
        ("sphere", (), r"shape \(n,\) with n at least 1, got \(\)"),
        ("sphere", (0,), r"shape \(n,\) with n at least 1, got \(0,\)"),
        ("styblinski_tang", (2, 2), r"shape \(n,\) with n at least 1, got \(2, 2\)"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, wanted):
    with pytest.raises(ValueError, match=f"{name} takes a point of {wanted}"):
        FUNCTIONS[name](torch.zeros(shape))
