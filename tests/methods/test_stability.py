"""Theory against its closed forms and against single steps; measured divergence against both."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.integrate import quad

from fwdlib import runtime
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.methods.functions import beale, rosenbrock, sphere, styblinski_tang
from fwdlib.methods.stability import (
    divergence,
    fractions_diverged,
    growth,
    limits_at,
    mean_square_limit,
    measure_growth,
)
from fwdlib.tangents import Replicates

NORMAL = partial(forward_gradient, tangents="normal")
fractions_diverged = partial(fractions_diverged, progress=None)


@pytest.mark.parametrize("num_tangents", [1, 3, 16])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_limit_of_equal_curvatures_is_the_closed_form(n, num_tangents):
    found = mean_square_limit([3.0] * n, num_tangents)
    assert found == pytest.approx(2 * num_tangents / ((n + num_tangents + 1) * 3.0))


def test_limit_approaches_that_of_backprop():
    assert mean_square_limit([5.0, 1.0], 10**6) == pytest.approx(2 / 5.0, rel=1e-4)


def test_directions_without_curvature_do_not_count():
    assert mean_square_limit([7.0, 1e-9, 1e-9]) == pytest.approx(2 / (3 * 7.0), rel=1e-6)


def second_moments(curvatures, rate, num_tangents):
    """Return the matrix that takes the second moments of one step to those of the next, as the docstring has it."""
    h, k = torch.tensor(curvatures, dtype=torch.float64), num_tangents
    return torch.diag(1 - 2 * rate * h + (1 + 1 / k) * rate**2 * h**2) + rate**2 / k * h.square().expand(len(h), -1)


@given(curvatures=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), num_tangents=st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_at_the_limit_the_second_moments_neither_grow_nor_shrink(curvatures, num_tangents):
    limit = mean_square_limit(curvatures, num_tangents)
    radius = torch.linalg.eigvals(second_moments(curvatures, limit, num_tangents)).abs().max()
    assert radius.item() == pytest.approx(1, abs=1e-8)
    for factor in (0.5, 0.99):
        assert torch.linalg.eigvals(second_moments(curvatures, factor * limit, num_tangents)).abs().max() < 1
    assert torch.linalg.eigvals(second_moments(curvatures, 1.01 * limit, num_tangents)).abs().max() > 1


@pytest.mark.parametrize("num_tangents", [1, 4])
def test_second_moments_of_a_step_are_those_of_the_docstring(num_tangents):
    curvatures, rate, num = torch.tensor([4.0, 1.0, 0.3], dtype=torch.float64), 0.2, 20_000
    point = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    replicates = Replicates([runtime.generator(seed) for seed in range(num)])
    params = {"x": point.expand(num, 3)}

    def quadratic(params):
        return (curvatures * params["x"] ** 2).sum() / 2

    def step(params, index):
        draw = replicates.at(index)
        return point - rate * NORMAL(quadratic, params, num_tangents=num_tangents, generator=draw).grads["x"]

    squares = torch.func.vmap(step)(params, replicates.indices).square()
    expected = second_moments(curvatures.tolist(), rate, num_tangents) @ point.square()
    assert ((squares.mean(0) - expected).abs() < 5 * squares.std(0) / math.sqrt(num)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "the number of curvatures must be a whole number of at least 1, got 0"),
        (([1.0, -2.0],), "a curvature must be a finite number above 0, got -2.0"),
        (([1.0], 0), "num_tangents must be a whole number of at least 1, got 0"),
    ],
    ids=["none", "negative", "no tangents"],
)
def test_limit_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_square_limit(*arguments)


# growth


def test_mean_growth_is_one_at_the_limit_and_typical_growth_is_less():
    for n in (1, 2, 10):
        limit = mean_square_limit([2.0] * n)
        factors = growth(torch.tensor([limit], dtype=torch.float64), n=n, generator=torch.Generator().manual_seed(0))
        assert factors["mean"].item() == pytest.approx(1)
        assert factors["typical"].item() < 1
        assert factors["backprop"].item() == pytest.approx((1 - 2 * limit) ** 2)


def test_typical_growth_in_one_dimension_is_the_integral():
    def integrand(z):
        return math.log((1 - 0.5 * z**2) ** 2) * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    pole = math.sqrt(2)
    exact = 2 * (quad(integrand, 0, pole)[0] + quad(integrand, pole, 12)[0])
    found = growth(torch.tensor([0.5]), curvature=1.0, n=1, generator=torch.Generator().manual_seed(0))["typical"]
    assert math.log(found) == pytest.approx(exact, abs=5 * 1.5 / math.sqrt(200_000))  # the logarithm spreads by 1.3


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_typical_growth_in_two_dimensions_is_the_integral_over_the_length_of_the_tangent(rate):
    # with v = r (cos t, sin t) and s = a r^2 / 2 the factor is |1 - s - s e^(-2it)|^2, whose logarithm has by Jensen's
    # formula the mean 2 log max(|1 - s|, s) over the angle; r^2 / 2 is exponentially distributed
    a = 2 * rate
    near = quad(lambda u: math.log(1 - a * u) * math.exp(-u), 0, 1 / (2 * a))[0]
    far = quad(lambda u: math.log(a * u) * math.exp(-u), 1 / (2 * a), 50)[0]
    found = growth(torch.tensor([rate]), generator=torch.Generator().manual_seed(0))["typical"]
    assert math.log(found) == pytest.approx(2 * (near + far), abs=5 * 1.5 / math.sqrt(200_000))


def test_measured_growth_is_that_of_the_theory():
    rates = torch.tensor([0.1, 0.25, 0.4], dtype=torch.float64)
    theory = growth(rates, n=3, generator=torch.Generator().manual_seed(0))
    rows = measure_growth(rates, n=3, num_seeds=40, num_iterations=50, progress=None)
    for row, rate, mean, typical in zip(rows, rates, theory["mean"], theory["typical"], strict=True):
        assert row["rate"] == rate
        assert 0 < row["error"] < 0.1 * row["mean"]
        assert abs(row["mean"] - mean) < 5 * row["error"]
        assert math.log(row["typical"] / typical) == pytest.approx(0, abs=5 * 1.5 / math.sqrt(2000))


def test_growth_says_what_is_wrong():
    with pytest.raises(ValueError, match="curvature must be a finite number above 0, got 0"):
        growth(torch.ones(1), curvature=0)
    with pytest.raises(ValueError, match="n must be a whole number of at least 1, got 0"):
        growth(torch.ones(1), n=0)


# measured


def test_backprop_on_a_quadratic_diverges_from_two_over_the_largest_curvature_on():
    def quadratic(point):
        return (point.new_tensor([4.0, 1.0, 0.5]) * point**2).sum() / 2

    limits = limits_at(quadratic, torch.zeros(3))
    assert limits["backprop"] == pytest.approx(0.5)
    rates = [limits["backprop"] * factor for factor in (0.2, 0.98, 1.02, 2.0)]
    assert fractions_diverged(quadratic, torch.ones(3), backprop_gradient, rates) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("function", "start", "minimum"),
    [
        (beale, [0.0, 0.5], [3.0, 0.5]),
        (rosenbrock, [-1.0, 0.0], [1.0, 1.0]),
        (sphere, [-1.0, -1.0], [0.0, 0.0]),
        (styblinski_tang, [0.0, 0.0], [-2.903534, -2.903534]),
    ],
)
def test_half_the_limit_is_safe_and_ten_times_the_limit_of_backprop_is_not(function, start, minimum):
    start, minimum = (torch.tensor(point, dtype=torch.float64) for point in (start, minimum))
    limits = limits_at(function, minimum)
    for estimator, limit in ((backprop_gradient, limits["backprop"]), (NORMAL, limits["forward gradient"])):
        rates = [limit / 2, 10 * limits["backprop"]]
        assert fractions_diverged(function, start, estimator, rates, seeds=range(6), num_iterations=200) == [0, 1]


def test_forward_gradients_diverge_where_backprop_does_not():
    start = torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert fractions_diverged(beale, start, backprop_gradient, [0.035]) == [0]
    assert fractions_diverged(beale, start, NORMAL, [0.035], seeds=range(10), num_iterations=400)[0] > 0.5


def test_parts_are_those_of_the_seeds_one_by_one():
    start, rates, seeds = torch.tensor([0.0, 0.5], dtype=torch.float64), [0.02, 0.03, 0.05], [0, 1, 2]
    how = {"num_iterations": 100}
    together = fractions_diverged(beale, start, NORMAL, rates, seeds=seeds, **how)
    alone = [fractions_diverged(beale, start, NORMAL, rates, seeds=[seed], **how) for seed in seeds]
    assert together == torch.tensor(alone).mean(0).tolist()


def test_parts_need_rates():
    with pytest.raises(ValueError, match="the number of rates must be a whole number of at least 1, got 0"):
        fractions_diverged(sphere, torch.ones(2), backprop_gradient, [])


def test_a_saddle_has_no_limit():
    with pytest.raises(ValueError, match="a curvature must be a finite number above 0, got -"):
        limits_at(lambda point: point[0] ** 2 - point[1] ** 2, torch.zeros(2))


def test_divergence_has_rates_on_both_sides_of_the_limits():
    start, minimum = torch.tensor([[0.0, 0.5], [3.0, 0.5]], dtype=torch.float64)
    found = divergence(beale, start, minimum, seeds=range(4), num_iterations=150, progress=None)
    assert found["limits"] == limits_at(beale, minimum)
    assert found["rates"][6] == found["limits"]["backprop"]
    assert found["rates"][0] < found["limits"]["forward gradient"] / 2
    for parts in found["diverged"].values():
        assert (parts[0], parts[-1], len(parts)) == (0, 1, len(found["rates"]))
    assert set(found["diverged"]["backprop"]) == {0, 1}
    assert sum(found["diverged"]["forward gradient"]) > sum(found["diverged"]["backprop"])
