"""The model of a step against what it must be."""

from __future__ import annotations

import math

import pytest
import torch

from fwdlib.bench import scaling
from fwdlib.bench.scaling import NUM_TANGENTS, Cost, Link, cost, even_bandwidth, num_steps
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.models import initialise
from fwdlib.objectives import BatchLoss, params_of

P = 1000


def test_a_step_is_computation_messages_and_bytes():
    assert Cost(0.01, 6, 1000).over(Link(0.001, 8e5)) == pytest.approx(0.01 + 0.006 + 0.01)


@pytest.mark.parametrize(
    ("tangents", "count", "messages", "num_bytes"),
    [(0, 1, 0, 0), (0, 2, 2, 4 * P), (0, 4, 6, 6 * P), (16, 4, 2, 2 * 17 * 4), (1, 1000, 15, 15 * 8), (1, 1, 0, 0)],
)
def test_what_is_sent(tangents, count, messages, num_bytes):
    found = cost(tangents, count, 0.5, P)
    assert (found.compute, found.num_messages) == (0.5, messages)
    assert found.num_bytes == pytest.approx(num_bytes)


def test_the_number_of_steps_is_one_over_the_mean_squared_cosine():
    draw = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(8, 5, generator=draw), torch.randint(3, (8,), generator=draw)
    objective = BatchLoss(initialise(lambda: torch.nn.Linear(5, 3), 0), inputs, targets)
    params = params_of(objective.model)
    exact = torch.cat([g.flatten() for g in backprop_gradient(objective, params).grads.values()])
    num_params, num_draws, k = len(exact), 4000, 4
    squares = []
    for _ in range(num_draws):
        grads = forward_gradient(objective, params, num_tangents=k, generator=draw).grads
        g = torch.cat([grads[name].flatten() for name in params])
        # descent of the best step along g is (g . exact)^2 / (2 L |g|^2); means of both, as the length is chosen once
        squares.append(((g @ exact) ** 2, (g @ g) * (exact @ exact), g @ exact / (exact @ exact)))
    descent = (sum(s[2] for s in squares) / num_draws) ** 2 / (sum(s[1] for s in squares) / num_draws)
    descent = descent * (exact @ exact) ** 2
    # at one length for all, the descent is (E g . exact)^2 / E|g|^2, and E g is the gradient
    assert 1 / descent == pytest.approx(num_steps(k, num_params), rel=0.1)
    assert num_steps(0, num_params) == 1


def test_at_the_even_bandwidth_both_get_as_far_in_the_same_time():
    backprop, forward = cost(0, 10, 0.01, 10**6), cost(16, 10, 0.02, 10**6)
    even = even_bandwidth(backprop, forward, 1e-4, 100)
    link = Link(1e-4, even)
    assert backprop.over(link) == pytest.approx(100 * forward.over(link))
    assert even_bandwidth(backprop._replace(compute=1e9), forward, 1e-4, 100) == math.inf


@pytest.mark.parametrize("count", [2, 10, 1000])
@pytest.mark.parametrize("tangents", [1, 16])
def test_in_a_round_bowl_the_scalars_add_up_to_no_less_than_the_gradients(count, tangents):
    # K numbers in each of P/K steps are the P numbers of the gradient
    backprop, forward = cost(0, count, 0.01, 10**6), cost(tangents, count, 0.01, 10**6)
    assert num_steps(tangents, 10**6) * forward.num_bytes >= 4 * 10**6
    assert even_bandwidth(backprop, forward, 1e-4, num_steps(tangents, 10**6)) == 0


def row(count, megabits, seconds):
    methods = {name: {"seconds": [seconds], "alone": [seconds], "bytes": 1, "segments": 1} for name in NUM_TANGENTS}
    return {"count": count, "megabits": megabits, "methods": methods, "exchange": [0.001], "num_params": P}


def test_predictions_see_no_slowed_link():
    rows = [row(1, None, 0.01), row(2, None, 0.02), row(2, 8, 99.0), row(4, 8, 99.0)]
    found = scaling.predictions(rows)
    assert list(found) == [(2, 8)]  # of four processes nobody knows how long they compute
    assert found[2, 8]["BP"] == pytest.approx(0.02 + 2 * 0.001 + 8 * 4 * P / 8e6)
    assert found[2, 8]["FG-RANK1, K = 16"] == pytest.approx(0.02 + 0.001 + 8 * 68 / 8e6)
    assert scaling.predictions(rows[2:]) == {}


def test_on_paper():
    rows = scaling.on_paper([row(1, None, 0.01)], (10,), (1,), 1e-4)
    (only,) = rows
    assert only["seconds"]["BP"] == pytest.approx(0.01 + 18e-4 + 8 * 1.8 * 4 * P / 1e9)
    assert only["costs"]["FG-RANK1, K = 16"] == cost(16, 10, 0.01, P)
