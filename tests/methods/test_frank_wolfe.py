"""Each minimiser against brute force, the algorithm against its bounds, and the optimizer against the algorithm."""

import io
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from fwdlib.data import Dataset, Source
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.methods.frank_wolfe import (
    BALLS,
    DUALS,
    FrankWolfe,
    ball_norm,
    frank_wolfe,
    frank_wolfe_gap,
    l2_reach,
    linear_minimiser,
    shrink_into,
)
from fwdlib.models import LogisticRegression
from fwdlib.objectives import BatchLoss, assign_gradients, params_of
from fwdlib.trainer.session import TrainerSession
from fwdlib.training import train

NORMAL = partial(forward_gradient, tangents="normal")
ESTIMATORS = {"backprop": backprop_gradient, "forward": NORMAL, "stacked": forward_gradient}
FORMS = {"plain": False, "averaged": True}

# few values, so that there are ties and zeros
entries = st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0]) | st.floats(-5, 5, width=32)
vectors = st.integers(1, 6).flatmap(lambda size: arrays.arrays("float64", size, elements=entries)).map(torch.tensor)
matrices = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: arrays.arrays("float64", shape, elements=entries)
)
radii = st.floats(0.1, 10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def vertices(size, ball):
    if ball == "linf":
        return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)
    return torch.cat([torch.eye(size), -torch.eye(size)]).double()


def dual_norm(direction, ball):
    return torch.linalg.matrix_norm(direction, 2) if ball == "nuclear" else ball_norm(direction, DUALS[ball])


def direction_for(ball, seed=0):
    return normal(4, 3, seed=seed) if ball == "nuclear" else normal(5, seed=seed)


def run(gradient, start, num_steps, **options):
    points = frank_wolfe(gradient, start, **options)
    return [next(points) for _ in range(num_steps + 1)]


# the minimisers


@pytest.mark.parametrize(
    ("ball", "expected"), [("l1", [0.0, 2.0, 0.0]), ("l2", [-2 / 3, 4 / 3, -4 / 3]), ("linf", [-2.0, 2.0, -2.0])]
)
def test_minimisers_of_vectors(ball, expected):
    direction = torch.tensor([1.0, -2.0, 2.0 - 1e-3 * (ball == "l1")])
    torch.testing.assert_close(linear_minimiser(direction, ball, 2.0), torch.tensor(expected))


def test_minimiser_of_a_diagonal_matrix_is_its_largest_entry():
    direction = torch.tensor([[1.0, 0.0, 0.0], [0.0, -3.0, 0.0]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    torch.testing.assert_close(linear_minimiser(direction, "nuclear", 2.0), expected)


@pytest.mark.parametrize("ball", ["l1", "linf"])
@settings(max_examples=60, deadline=None)
@given(direction=vectors, radius=radii)
def test_no_vertex_is_lower(ball, direction, radius):
    found = linear_minimiser(direction, ball, radius)
    lowest = (radius * vertices(len(direction), ball) @ direction).min()
    assert ball_norm(found, ball) <= radius * (1 + 1e-12)
    torch.testing.assert_close(found @ direction, lowest, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ball", ["l2", "nuclear"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), radius=radii, seed=st.integers(0, 1000))
def test_no_point_of_the_surface_is_lower(ball, data, radius, seed):
    direction = data.draw(vectors) if ball == "l2" else torch.tensor(data.draw(matrices))
    found = linear_minimiser(direction, ball, radius)
    value = (found * direction).sum()
    points = normal(200, *direction.shape, seed=seed)
    norms = ball_norm(points, ball).reshape(200, *[1] * direction.dim())
    others = (radius * points / norms * direction).flatten(1).sum(1)
    assert ball_norm(found, ball) <= radius * (1 + 1e-12)
    assert value <= others.min() + 1e-9
    torch.testing.assert_close(value, -radius * dual_norm(direction, ball), rtol=1e-9, atol=1e-12)


def test_equal_entries_share_the_radius_and_zero_gives_the_centre():
    torch.testing.assert_close(
        linear_minimiser(torch.tensor([1.0, -2.0, 2.0, 0.0]), "l1", 3.0), torch.tensor([0.0, 1.5, -1.5, 0.0])
    )
    assert linear_minimiser(torch.tensor([1.0, 0.0]), "linf", 3.0).tolist() == [-3.0, 0.0]
    for ball in BALLS:
        assert not linear_minimiser(torch.zeros(3, 2), ball, 3.0).any()


def test_what_is_not_a_number_stays_so():
    direction = torch.tensor([1.0, math.nan, 3.0])
    for ball in ("l1", "l2"):
        assert linear_minimiser(direction, ball, 1.0).isnan().all()
    assert linear_minimiser(direction, "linf", 1.0).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("ball", BALLS)
def test_leading_axes_are_a_stack(ball):
    stack = torch.stack([direction_for(ball, seed) for seed in range(6)]).unflatten(0, (2, 3))
    stack[0, 1] = 0
    together = linear_minimiser(stack, ball, 2.0)
    gaps = frank_wolfe_gap(stack, together, ball, 2.0)
    assert gaps.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(together[i, j], linear_minimiser(stack[i, j], ball, 2.0))
    mapped = torch.func.vmap(torch.func.vmap(lambda d: linear_minimiser(d, ball, 2.0)))(stack)
    torch.testing.assert_close(mapped, together)


@pytest.mark.parametrize("shape", [(300, 270), (270, 300), (2, 270, 260)], ids=["tall", "wide", "stack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_matrices_get_the_top_singular_pair_without_a_whole_decomposition(shape, dtype):
    direction = normal(*shape).to(dtype)
    found = linear_minimiser(direction, "nuclear", 2.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    value, largest = (found * direction).sum((-2, -1)), torch.linalg.matrix_norm(direction, 2)
    torch.testing.assert_close(value, -2 * largest, rtol=tolerance, atol=0)
    norms = ball_norm(found, "nuclear")
    torch.testing.assert_close(norms, torch.full_like(norms, 2), rtol=tolerance, atol=0)
    assert torch.equal(found, linear_minimiser(direction, "nuclear", 2.0))
    assert not linear_minimiser(torch.zeros(shape, dtype=dtype), "nuclear", 2.0).any()


def test_large_matrices_of_rank_one():
    left, right = normal(300), normal(280, seed=1)
    found = linear_minimiser(left.outer(right), "nuclear", 1.0)
    torch.testing.assert_close(found, -left.outer(right) / (left.norm() * right.norm()))


# the gap


@pytest.mark.parametrize("ball", ["l1", "linf"])
@settings(max_examples=40, deadline=None)
@given(grad=vectors, radius=radii, seed=st.integers(0, 1000))
def test_gap_is_the_largest_over_the_vertices(ball, grad, radius, seed):
    x = normal(len(grad), seed=seed)
    x = x * (radius / ball_norm(x, ball)).clamp(max=1)
    values = (x - radius * vertices(len(grad), ball)) @ grad
    gap = frank_wolfe_gap(grad, x, ball, radius)
    torch.testing.assert_close(gap, values.max(), rtol=1e-10, atol=1e-10)
    assert gap >= -1e-10


@pytest.mark.parametrize("ball", BALLS)
def test_gap_is_the_slope_towards_the_minimiser_and_bounds_the_error(ball):
    goal = 3 * direction_for(ball)
    x = 0.1 * direction_for(ball, seed=1)
    x = x * (1 / ball_norm(x, ball)).clamp(max=1)
    grad = x - goal
    gap = frank_wolfe_gap(grad, x, ball, 1.0)
    torch.testing.assert_close(gap, (grad * (x - linear_minimiser(grad, ball, 1.0))).sum())
    best = run(lambda x: x - goal, x, 3000, ball=ball, radius=1.0, averaged=False)[-1]
    error = 0.5 * ((x - goal).square().sum() - (best - goal).square().sum())
    assert 0 < error <= gap
    assert frank_wolfe_gap(best - goal, best, ball, 1.0) < 1e-2 * gap


# the algorithm


def test_two_steps_by_hand():
    goal = torch.tensor([3.0, 1.0])
    zero, first, second = run(lambda x: x - goal, torch.zeros(2), 2, ball="l1", radius=1.0, averaged=False)
    assert zero.tolist() == [0.0, 0.0]
    assert first.tolist() == [1.0, 0.0]  # all the way: 2/(0 + 2)
    assert second.tolist() == [1.0, 0.0]  # it is the optimum


@pytest.mark.parametrize("options", [{}, {"offset": 3.0, "power": 0.5}], ids=["default", "other"])
def test_averaged_steps_have_the_weights_of_mokhtari_and_others(options):
    grads, average = normal(20, 3), torch.zeros(3).double()
    given, offset, power = iter(grads), options.get("offset", 8), options.get("power", 2 / 3)
    points = run(lambda _: next(given), torch.zeros(3).double(), 20, ball="l2", radius=1.0, **options)
    for k, (grad, x, following) in enumerate(zip(grads, points[:-1], points[1:], strict=True)):
        rho = (offset / (k + offset)) ** power  # 1 at first: the first gradient counts whole
        average = (1 - rho) * average + rho * grad
        torch.testing.assert_close(following, x + 2 / (k + offset) * (-average / average.norm() - x))


@pytest.mark.parametrize("ball", BALLS)
def test_with_the_gradient_the_error_keeps_below_the_bound_of_jaggi(ball):
    # f - f* <= 2 C / (k + 2), with C at most the squared diameter, for f = |x - goal|^2 / 2
    goal = 2 * direction_for(ball)
    start = torch.zeros_like(goal)
    points = run(lambda x: x - goal, start, 400, ball=ball, radius=1.0, averaged=False)
    errors = torch.stack([0.5 * (x - goal).square().sum() for x in points])
    optimum = errors[-1] - frank_wolfe_gap(points[-1] - goal, points[-1], ball, 1.0)  # at most this
    diameter = {"l1": 2.0, "l2": 2.0, "linf": 2 * math.sqrt(goal.numel()), "nuclear": 2.0}[ball]
    bounds = 2 * diameter**2 / (torch.arange(1, 401) + 2)
    assert (errors[1:] - optimum <= bounds).all()


@settings(max_examples=25, deadline=None)
@given(direction=vectors, jvp=st.floats(0.01, 100), sign=st.sampled_from([-1, 1]), ball=st.sampled_from(BALLS[:3]))
def test_of_a_jvp_a_vertex_sees_the_sign_alone(direction, jvp, sign, ball):
    expected = sign * linear_minimiser(direction, ball, 1.0)
    torch.testing.assert_close(linear_minimiser(sign * jvp * direction, ball, 1.0), expected)


@pytest.mark.parametrize(("num_params", "reach"), [(1, 1.0), (2, 2 / math.pi), (3, 0.5)])
def test_reach_in_few_dimensions(num_params, reach):
    assert l2_reach(num_params) == pytest.approx(reach)


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_mean_vertex_of_a_forward_gradient(ball):
    # l2: -E|u_1| n; linf: -(2/pi) arcsin(n), the covariance of the signs of two normal numbers; n = grad/|grad|
    grad, num_draws = normal(7), 40_000
    n = grad / grad.norm()
    v = torch.randn(num_draws, 7, generator=seeded(1), dtype=torch.float64)
    found = linear_minimiser((v @ grad)[:, None] * v, ball, 1.0)
    expected = -l2_reach(7) * n if ball == "l2" else -2 / math.pi * n.arcsin()
    standard_error = found.std(0) / math.sqrt(num_draws)
    assert ((found.mean(0) - expected).abs() < 5 * standard_error).all()


def forward_from(goal, seed=0):
    draw = seeded(seed)

    def gradient(x):
        v = torch.randn(x.shape, generator=draw, dtype=x.dtype)
        return ((x - goal) * v).sum(-1, keepdim=True) * v

    return gradient


def test_plain_settles_at_its_reach_and_averaged_goes_on():
    goal = torch.tensor([2.0, 0, 0, 0, 0], dtype=torch.float64)
    start = torch.zeros(100, 5, dtype=torch.float64)
    ends = {}
    for name, averaged in FORMS.items():
        points = run(forward_from(goal), start, 4000, ball="l2", radius=1.0, averaged=averaged)
        ends[name] = [points[400], points[-1]]
    early, late = (x[:, 0] for x in ends["plain"])
    # the mean of 100 runs is at the reach: 5 sigma, and what the curvature of the sphere does to a noisy mean
    assert (late.mean() - l2_reach(5)).abs() < 5 * late.std() / math.sqrt(100) + 2e-3
    gaps = {name: [frank_wolfe_gap(x - goal, x, "l2", 1.0).median() for x in pair] for name, pair in ends.items()}
    assert gaps["plain"][1] > 0.8 * gaps["plain"][0]
    assert gaps["averaged"][1] < 0.5 * gaps["averaged"][0]
    assert gaps["averaged"][1] < 0.1 * gaps["plain"][1]
    assert early.std() > late.std()


def test_plain_finds_an_optimum_within_its_reach():
    goal = torch.full((5,), 0.5 * l2_reach(5) / math.sqrt(5), dtype=torch.float64)
    points = run(forward_from(goal), torch.zeros(50, 5).double(), 4000, ball="l2", radius=1.0, averaged=False)
    errors = [(x - goal).norm(dim=-1).median() for x in (points[40], points[400], points[4000])]
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.3 * errors[1]


def test_on_the_l1_ball_k_steps_leave_k_entries():
    goal = 3 * normal(50)
    points = run(forward_from(goal), torch.zeros(50).double(), 20, ball="l1", radius=1.0)
    assert [int((x != 0).sum()) <= k for k, x in enumerate(points)] == [True] * 21
    assert (points[20] != 0).sum() > 5  # noise chooses another entry in nearly every step


# the optimizer


def tensors_for(ball):
    return [nn.Parameter(torch.zeros(4, 3).double())] + (
        [] if ball == "nuclear" else [nn.Parameter(torch.zeros(2).double()), nn.Parameter(torch.zeros(()).double())]
    )


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ball", BALLS)
def test_optimizer_has_the_numbers_of_the_algorithm(ball, form):
    params = tensors_for(ball)
    options = {"ball": ball, "radius": 3.0, "averaged": FORMS[form]}
    optimizer = FrankWolfe(params, **options)
    grads = [normal(sum(p.numel() for p in params), seed=seed) for seed in range(6)]
    start = torch.zeros(4, 3).double() if ball == "nuclear" else flat(params)
    given = iter(grads)
    expected = run(lambda x: next(given).reshape(x.shape), start, 6, **options)
    for grad, x in zip(grads, expected[1:], strict=True):
        for p, part in zip(params, grad.split([p.numel() for p in params]), strict=True):
            p.grad = part.reshape(p.shape)
        optimizer.step()
        torch.testing.assert_close(flat(params), x.flatten(), rtol=1e-12, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(
    ball=st.sampled_from(BALLS),
    averaged=st.booleans(),
    radius=radii,
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_iterates_stay_in_the_ball(ball, averaged, radius, seed, scale, dtype):
    draw = seeded(seed)
    params = [nn.Parameter(torch.randn(t.shape, generator=draw, dtype=dtype)) for t in tensors_for(ball)]
    optimizer = FrankWolfe(shrink_into(params, ball, radius), ball=ball, radius=radius, averaged=averaged)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for _ in range(12):
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=draw, dtype=dtype)
        optimizer.step()
        joined = params[0].detach() if ball == "nuclear" else flat(params)
        assert ball_norm(joined, ball) <= radius * (1 + tolerance)


def test_a_group_is_one_ball_and_groups_have_their_own():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    groups = [{"params": [a, b]}, {"params": [c], "ball": "linf", "radius": 5.0, "averaged": True}]
    optimizer = FrankWolfe(groups, ball="l1", radius=2.0, averaged=False)
    a.grad, b.grad, c.grad = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -3.0]), torch.tensor([1.0, -1.0])
    optimizer.step()
    assert (a.tolist(), b.tolist(), c.tolist()) == ([0.0, 0.0], [0.0, 2.0], [-1.25, 1.25])
    assert [group["offset"] for group in optimizer.param_groups] == [2.0, 8.0]


def test_a_nuclear_ball_takes_a_convolution_as_a_matrix():
    weight = nn.Parameter(torch.zeros(4, 2, 3, 3))
    optimizer = FrankWolfe([weight], ball="nuclear", radius=2.0, averaged=False)
    weight.grad = torch.randn(4, 2, 3, 3, generator=seeded())
    optimizer.step()
    assert torch.linalg.matrix_rank(weight.detach().flatten(1)) == 1
    torch.testing.assert_close((weight * weight.grad).sum(), -2 * torch.linalg.matrix_norm(weight.grad.flatten(1), 2))


def test_missing_gradients():
    a, b, c = (nn.Parameter(torch.full((1,), 0.5)) for _ in range(3))
    optimizer = FrankWolfe([{"params": [a, b]}, {"params": [c]}], ball="l1", radius=1.0)
    a.grad = torch.tensor([1.0])
    optimizer.step()
    assert a.item() < 0.5
    assert b.item() == 0.5 * (1 - 2 / 8)  # as with a gradient of zero: the vertex is elsewhere
    assert c.item() == 0.5
    assert c not in optimizer.state


def test_closure_and_learning_by_a_loop_of_one_s_own():
    model = LogisticRegression(2, 2)
    inputs = torch.tensor([[1.0, 0.0], [-1.0, 0.5]]).repeat(4, 1)
    targets = torch.tensor([0, 1]).repeat(4)
    optimizer = FrankWolfe(shrink_into(model.parameters(), "l2", 4.0), ball="l2", radius=4.0)

    def closure():
        estimate = backprop_gradient(BatchLoss(model, inputs, targets), params_of(model))
        assign_gradients(model, estimate.grads)
        return estimate.loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_goes_on_where_it_was(form):
    def fresh():
        params = tensors_for("l1")
        return params, FrankWolfe(params, ball="l1", radius=2.0, averaged=FORMS[form])

    def steps(params, optimizer, seeds):
        for seed in seeds:
            for i, p in enumerate(params):
                p.grad = normal(*p.shape, seed=10 * seed + i)
            optimizer.step()

    whole, optimizer = fresh()
    steps(whole, optimizer, range(8))
    first, optimizer = fresh()
    steps(first, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    second, optimizer = fresh()
    for p, other in zip(second, first, strict=True):
        p.data.copy_(other)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    steps(second, optimizer, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert optimizer.state[second[0]]["step"] == 8
    assert ("average" in optimizer.state[second[0]]) == FORMS[form]


def test_shrinking_keeps_ratios_and_leaves_alone_what_is_inside():
    outside = [torch.tensor([3.0, -4.0]), torch.tensor(1.0)]
    shrink_into(outside, "l2", 1.0)
    torch.testing.assert_close(flat(outside), torch.tensor([3.0, -4.0, 1.0]) / math.sqrt(26))
    inside = [torch.tensor([0.3, -0.4]), torch.zeros(2)]
    assert shrink_into(inside, "l2", 1.0)[0].tolist() == pytest.approx([0.3, -0.4])
    shrunk = shrink_into([normal(4, 3)], "nuclear", 0.5)
    torch.testing.assert_close(ball_norm(shrunk[0], "nuclear"), torch.tensor(0.5).double())


# in the training loop


@pytest.fixture
def blobs():
    labels = torch.arange(90) % 3
    inputs = torch.randn(3, 4, generator=seeded(1))[labels] + 0.1 * torch.randn(90, 4, generator=seeded(2))
    source = Source("blobs", "made up", None, "0", "free", "nobody", 0)
    return Dataset(inputs[:60], labels[:60], inputs[60:], labels[60:], ("a", "b", "c"), source)


def build():
    model = LogisticRegression()
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_trains_with_every_kind_of_estimator(blobs, estimator):
    make = partial(FrankWolfe, ball="l1", radius=20.0)
    options = {"optimizer": make, "max_iterations": 150, "evaluate_every": 50, "seeds": [0, 1], "progress": None}
    history = train(build, blobs, ESTIMATORS[estimator], **options)
    assert history.together == 1  # a ball is around all entries: seeds cannot share one
    assert all(run.test_errors[-1] <= 3 < run.test_errors[0] for run in history.runs)
    assert all(flat(params.values()).abs().sum() <= 20.0001 for params in history.params)
    with pytest.raises(ValueError, match="together=True is not possible here: the optimizer is not one of the elem"):
        train(build, blobs, ESTIMATORS[estimator], together=True, **options)


def test_a_checkpoint_resumes_bit_for_bit(blobs, tmp_path):
    options = {"optimizer": partial(FrankWolfe, ball="l1", radius=20.0), "evaluate_every": 10, "progress": None}
    whole = train(build, blobs, NORMAL, max_iterations=40, **options)
    file = tmp_path / "checkpoint.pt"
    train(build, blobs, NORMAL, max_iterations=20, session=TrainerSession(file), **options)
    resumed = train(build, blobs, NORMAL, max_iterations=40, session=TrainerSession(file, resume=True), **options)
    assert all(torch.equal(p, resumed.params[0][name]) for name, p in whole.params[0].items())


# bad input


def test_refuses_what_is_no_ball():
    with pytest.raises(ValueError, match="ball must be one of 'l1', 'l2', 'linf', 'nuclear', got 'l0'"):
        linear_minimiser(torch.ones(2), "l0", 1.0)
    for function in (linear_minimiser, lambda d, ball, radius: frank_wolfe_gap(d, d, ball, radius)):
        with pytest.raises(ValueError, match="radius must be a finite number above 0, got 0"):
            function(torch.ones(2), "l1", 0)
        with pytest.raises(ValueError, match=r"the nuclear ball takes matrices, got \(2,\)"):
            function(torch.ones(2), "nuclear", 1.0)
        with pytest.raises(ValueError, match=r"the l2 ball takes vectors, got \(\)"):
            function(torch.tensor(1.0), "l2", 1.0)
    with pytest.raises(ValueError, match="num_params must be a whole number of at least 1, got 0"):
        l2_reach(0)


def test_refuses_a_start_outside():
    message = r"must lie in the l1 ball of radius 1, its norm is 3: start at zero, or scale it with shrink_into"
    with pytest.raises(ValueError, match=message):
        FrankWolfe([nn.Parameter(torch.tensor([1.0, -2.0]))], ball="l1", radius=1.0)
    with pytest.raises(ValueError, match=message):
        next(frank_wolfe(lambda x: x, torch.tensor([1.0, -2.0]), ball="l1", radius=1.0))
    with pytest.raises(ValueError, match="its norm is nan"):
        FrankWolfe([nn.Parameter(torch.tensor([math.nan]))], ball="l2", radius=1.0)


def test_refuses_bad_options_and_keeps_no_bad_group():
    weight = nn.Parameter(torch.zeros(2, 2))
    for options, message in (
        ({"ball": "l3", "radius": 1.0}, "ball must be one of"),
        ({"radius": -1.0}, "radius must be a finite number above 0, got -1.0"),
        ({"radius": 1.0, "offset": 1.0}, "offset must be at least 2, .* 2/offset of the way, got 1"),
        ({"radius": 1.0, "power": 1.5}, "power must be at most 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            FrankWolfe([weight], **options)
    with pytest.raises(ValueError, match=r"takes one matrix, got \(2, 2\), \(2,\): give each matrix a group of its"):
        FrankWolfe([weight, nn.Parameter(torch.zeros(2))], ball="nuclear", radius=1.0)
    optimizer = FrankWolfe([weight], radius=1.0)
    with pytest.raises(ValueError, match="radius"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "radius": 0.0})
    assert len(optimizer.param_groups) == 1
