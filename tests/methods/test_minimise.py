"""Descents against loops written out here, stacks against single runs, and how replicates end."""

import itertools
import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fwdlib import runtime
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.methods.functions import as_objective, beale, rosenbrock, sphere, styblinski_tang
from fwdlib.methods.minimise import minimise, step_of

minimise = partial(minimise, progress=None)
NORMAL = partial(forward_gradient, tangents="normal")
START = torch.tensor([0.0, 0.5], dtype=torch.float64)


def test_with_backprop_it_is_gradient_descent():
    found = minimise(
        beale, START, backprop_gradient, learning_rate=0.01, num_iterations=50, every=20, keep_trajectories=True
    )
    x, points = START, [START]
    for _ in range(50):
        x = x - 0.01 * torch.func.grad(beale)(x)
        points.append(x)
    assert found.steps.tolist() == [0, 20, 40, 50]
    expected = torch.stack([points[i] for i in (0, 20, 40, 50)])
    torch.testing.assert_close(found.trajectories[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.values[0], torch.stack([beale(p) for p in expected]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.points[0], expected[-1], rtol=1e-12, atol=1e-12)
    assert (found.status, found.iterations.tolist()) == (["completed"], [50])


def test_with_forward_gradients_it_is_the_loop_of_the_paper():
    found = minimise(beale, START, NORMAL, learning_rate=0.01, num_iterations=30, seeds=[7])
    x, draw = START, runtime.generator(7)
    for _ in range(30):
        x = x - 0.01 * forward_gradient(as_objective(beale), {"x": x}, generator=draw, tangents="normal").grads["x"]
    assert torch.equal(found.points[0], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [beale, rosenbrock, sphere, styblinski_tang])
def test_replicates_of_a_stack_are_single_runs(function, dtype):
    how = {"learning_rate": 1e-4, "num_iterations": 40, "every": 7, "keep_trajectories": True}
    start = START.to(dtype)
    stack = minimise(function, start, NORMAL, seeds=[3, 1, 4], **how)
    for i, seed in enumerate([3, 1, 4]):
        alone = minimise(function, start, NORMAL, seeds=[seed], **how)
        assert stack.values.dtype == alone.values.dtype == dtype
        torch.testing.assert_close(stack.values[i], alone.values[0])
        torch.testing.assert_close(stack.trajectories[i], alone.trajectories[0])
        torch.testing.assert_close(stack.points[i], alone.points[0])
    assert not torch.equal(stack.points[0], stack.points[1])


@pytest.mark.parametrize("of_each", [False, True])
def test_a_start_may_be_part_of_another_tensor(of_each):
    how = {"learning_rate": 0.01, "num_iterations": 2, "seeds": [0, 1]}
    table = torch.stack([-START, START])
    start = table[1].expand(2, 2) if of_each else table[1]
    expected = minimise(beale, START, NORMAL, **how).points
    assert torch.equal(minimise(beale, start, NORMAL, **how).points, expected)
    assert torch.equal(table, torch.stack([-START, START]))


def test_each_replicate_may_have_a_learning_rate_and_a_start_of_its_own():
    rates, starts = [0.1, 0.2, 0.4], torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = minimise(sphere, starts, backprop_gradient, learning_rate=rates, num_iterations=5, seeds=[0, 0, 0])
    factors = torch.tensor([(1 - 2 * rate) ** 5 for rate in rates]).unsqueeze(1)
    torch.testing.assert_close(found.points, starts * factors)


def test_the_same_seed_draws_the_same_tangents_at_every_learning_rate():
    found = minimise(sphere, START, NORMAL, learning_rate=[0.1, 0.1, 0.1], num_iterations=9, seeds=[5, 5, 6])
    assert torch.equal(found.values[0], found.values[1])
    assert not torch.equal(found.values[0], found.values[2])


def test_a_replicate_that_diverges_is_taken_out_and_the_others_go_on():
    rates = [0.01, 3.0, 0.05]
    found = minimise(
        styblinski_tang, START, backprop_gradient, learning_rate=rates, num_iterations=60, seeds=[0] * 3, every=4
    )
    assert found.status == ["completed", "diverged", "completed"]
    first = int(found.values[1].isinf().nonzero()[0])
    assert found.values[1, first:].isinf().all()
    assert not found.values.isnan().any()
    assert found.iterations.tolist() == [60, found.steps[first], 60]
    for i in (0, 2):
        alone = minimise(styblinski_tang, START, backprop_gradient, learning_rate=rates[i], num_iterations=60, every=4)
        torch.testing.assert_close(found.values[i], alone.values[0])


def test_a_replicate_that_reaches_the_threshold_stops_there():
    found = minimise(
        sphere,
        torch.tensor([1.0]),
        backprop_gradient,
        learning_rate=[0.25, 0.01, 0.4],
        num_iterations=8,
        seeds=[0, 0, 0],
        threshold=1e-2,
        keep_trajectories=True,
    )
    assert found.status == ["reached", "completed", "reached"]
    assert found.iterations.tolist() == [4, 8, 2]  # 4**-4 and 25**-2 are the first below
    torch.testing.assert_close(found.values[0], torch.tensor([0.25 ** min(i, 4) for i in range(9)]))
    torch.testing.assert_close(found.trajectories[2, :, 0], torch.tensor([0.2 ** min(i, 2) for i in range(9)]))
    torch.testing.assert_close(found.points[:, 0], torch.tensor([0.5**4, 0.98**8, 0.2**2]))


def test_when_all_have_stopped_no_more_steps_are_taken():
    calls = []

    def counted(objective, params):
        calls.append(1)
        return backprop_gradient(objective, params)

    found = minimise(
        sphere, START, counted, learning_rate=0.5, num_iterations=1000, threshold=1e-6, every=10, seeds=[0, 1]
    )
    assert len(calls) == 11
    assert found.iterations.tolist() == [10, 10]
    assert found.values.shape == (2, 101)
    assert found.values[:, 1:].eq(found.values[:, 1:2]).all()


def test_the_last_value_counts_where_the_iterations_are_no_multiple_of_the_records():
    found = minimise(sphere, START, backprop_gradient, learning_rate=0.1, num_iterations=7, every=5)
    assert found.steps.tolist() == [0, 5, 7]
    torch.testing.assert_close(found.values[0], 0.25 * torch.tensor([0.64**i for i in (0, 5, 7)], dtype=torch.float64))


@given(
    n=st.integers(1, 5),
    num=st.integers(1, 6),
    every=st.integers(1, 12),
    num_iterations=st.integers(1, 30),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_on_the_sphere_every_replicate_shrinks_by_its_own_rate(n, num, every, num_iterations, data):
    rates = data.draw(st.lists(st.floats(0.01, 0.99), min_size=num, max_size=num))
    starts = torch.randn(num, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    found = minimise(
        sphere,
        starts,
        backprop_gradient,
        learning_rate=rates,
        num_iterations=num_iterations,
        seeds=[0] * num,
        every=every,
    )
    factors = (1 - 2 * torch.tensor(rates, dtype=torch.float64)).unsqueeze(1) ** (2 * found.steps)
    torch.testing.assert_close(found.values, starts.square().sum(1, keepdim=True) * factors, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be a whole number of at least 1, got 0"),
        ({"every": 0}, "every must be a whole number"),
        ({"seeds": []}, "the number of seeds must be a whole number of at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0, got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, got nan"),
        ({"learning_rate": [0.1, 0.2, 0.3]}, r"a row for each of the 2 seeds, got \(3,\)"),
        ({"start": torch.zeros(3, 2)}, r"start must be of shape \(n,\), or have a row for each of the 2 seeds, got"),
        ({"start": torch.zeros(3)}, r"beale takes a point of shape \(2,\), got \(3,\)"),
    ],
    ids=["no steps", "no records", "no seeds", "negative rate", "no rate", "rates", "starts", "point"],
)
def test_says_what_is_wrong(change, message):
    how = {"start": START, "learning_rate": 0.1, "num_iterations": 3, "seeds": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        minimise(beale, how.pop("start"), backprop_gradient, **how)


def test_refuses_whole_numbers():
    with pytest.raises(TypeError, match=r"params\['start'\] must be a real floating tensor, got torch\.int64"):
        minimise(sphere, torch.tensor([1, 2]), backprop_gradient, learning_rate=0.1, num_iterations=1)


# what is made of it


def test_thinned_records_are_dense_at_the_start_and_keep_both_ends():
    found = minimise(beale, START, NORMAL, learning_rate=0.01, num_iterations=200, seeds=[0, 1], keep_trajectories=True)
    thinned = found.thinned(20)
    steps = thinned["steps"]
    assert (steps[:4], steps[-1]) == ([0, 1, 2, 3], 200)
    assert len(steps) <= 20
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert max(b / a for a, b in itertools.pairwise(steps[3:])) < 1.6
    assert thinned["values"] == found.values[:, steps].tolist()
    assert thinned["paths"] == found.trajectories[:, steps].tolist()


def test_thinned_records_of_rare_ones_are_those_that_there_are():
    found = minimise(beale, START, backprop_gradient, learning_rate=0.01, num_iterations=50, every=20)
    assert found.thinned() == {"steps": [0, 20, 40, 50], "values": found.values.tolist()}


def test_a_step_to_be_timed_calls_the_estimator_and_stays_where_it_is():
    seen = []

    def spy(objective, params):
        seen.append(params["x"])
        return backprop_gradient(objective, params)

    step = step_of(beale, START, spy)
    step()
    step()
    torch.testing.assert_close(seen[1], START, rtol=0, atol=1e-9)
    assert not torch.equal(seen[1], START)
