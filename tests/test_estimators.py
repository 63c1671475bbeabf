"""Exact cases first, then closed forms within 5 sigma, then properties of random nets."""

import itertools
import math
import re
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from torch import nn

from fwdlib.estimators import backprop_gradient, forward_grad_, forward_gradient
from fwdlib.methods.projection import projected_gradient
from fwdlib.models import CNN, MLP, LogisticRegression, initialise
from fwdlib.objectives import BatchLoss, ClosureLoss, assign_gradients, params_of
from fwdlib.tangents import Replicates, sample_tangents

ALL = {
    "backprop": backprop_gradient,
    "forward": partial(forward_gradient, tangents="normal"),
    "forward, K = 3": partial(forward_gradient, num_tangents=3, tangents="normal"),
    "forward, blocks": partial(forward_gradient, blocks="parameter", tangents="normal"),
    "projected": projected_gradient,
    "projected, K = 3": partial(projected_gradient, num_tangents=3),
}


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


def unit_tangents(params, num_tangents, generator):
    """The P unit vectors, for exact cases: with them the sum of the estimates is the gradient."""
    eye = torch.eye(sum(p.numel() for p in params.values()), dtype=next(iter(params.values())).dtype)
    pieces = eye[:num_tangents].split([p.numel() for p in params.values()], dim=1)
    return {name: piece.reshape(-1, *p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}


def small_net(dtype=torch.float64, activation=nn.Tanh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2)).to(dtype)
    draw = torch.Generator().manual_seed(1)
    return model, torch.randn(6, 3, generator=draw, dtype=dtype), torch.randint(0, 2, (6,), generator=draw)


def fixed(matrix):
    """A sampler of the rows of ``matrix``, cut by parameter."""

    def sample(params, num_tangents, generator):
        pieces = matrix[:num_tangents].split([p.numel() for p in params.values()], dim=1)
        return {name: piece.reshape(-1, *p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}

    return sample


def slope_of(gradient):
    """A linear objective with this gradient."""
    return lambda params: (params["x"] * gradient).sum()


def project(gradient, matrix, **options):
    """The projection of a vector onto the span of the rows of ``matrix``."""
    options = {"num_tangents": len(matrix), "tangents": fixed(matrix), **options}
    return projected_gradient(slope_of(gradient), {"x": torch.zeros_like(gradient)}, **options).grads["x"]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def objective():
    return BatchLoss(*small_net())


@pytest.fixture
def params(objective):
    return params_of(objective.model)


# exact cases


def test_backprop_is_what_autograd_gives(objective, params):
    estimate = backprop_gradient(objective, params)
    objective(dict(objective.model.named_parameters())).backward()
    for name, p in objective.model.named_parameters():
        assert torch.equal(estimate.grads[name], p.grad)
    assert estimate.jvps.shape == (0,)


@pytest.mark.parametrize("build", [LogisticRegression, MLP, CNN])
def test_forward_gradient_on_unit_tangents_is_exact(build):
    model = initialise(build, 0).double()
    draw = torch.Generator().manual_seed(0)
    shape = (2, 1, 28, 28) if build is CNN else (5, 4)
    objective = BatchLoss(model, torch.rand(shape, generator=draw, dtype=torch.float64), torch.arange(shape[0]) % 3)
    # for the CNN the parameters of the convolutions alone: 51 000 passes would take minutes
    params = {name: p for name, p in params_of(model).items() if build is not CNN or name.startswith("conv")}
    num = sum(p.numel() for p in params.values())
    estimate = forward_gradient(objective, params, num_tangents=num, tangents=unit_tangents, chunk_size=100)
    expected = backprop_gradient(objective, params)
    torch.testing.assert_close(flat(estimate.grads) * num, flat(expected.grads), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(estimate.jvps, flat(expected.grads), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(estimate.loss, expected.loss)


FUNCTIONS = {  # of params {"a": (3,), "b": (2, 3), "c": ()}: what a user writes for a few parameters
    "a loop": lambda p: sum((p["c"] * step * (p["a"] * p["b"][0]).sin()).sum() for step in range(1, 5)),
    "filled piece by piece": lambda p: _filled(p).square().sum(),
    "in place": lambda p: p["b"].clone().mul_(p["a"]).add_(p["c"]).exp().mean(),
    "a linear layer": lambda p: (
        torch.nn.functional.linear(torch.eye(3, dtype=p["a"].dtype), p["b"]).tanh().sum() + p["c"]
    ),
    "a solve": lambda p: (
        torch.linalg.solve(torch.eye(3, dtype=p["a"].dtype) + p["a"].outer(p["a"]), p["b"].T).sum() * p["c"]
    ),
    "no_grad inside": lambda p: (p["a"] * p["b"].detach()).sum() * p["c"],
    "a parameter itself": lambda p: p["c"],
    "a branch on values": lambda p: (p["a"] if p["c"].item() > 0 else p["b"][0]).pow(3).sum(),
    "autograd inside": lambda p: _inner_gradient(p).sum() * p["c"],
}


def _filled(p):
    found = torch.zeros(3, 2, dtype=p["a"].dtype)
    for i in range(3):
        found[i] = p["a"][i] * p["b"][:, i] + p["c"]
    return found


def _inner_gradient(p):
    return torch.func.grad(lambda a: (a.sin() * p["b"]).sum())(p["a"])


@pytest.mark.parametrize("engine", ["auto", "stacked", "torch"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_unit_tangents_give_the_gradient_of_a_plain_function(name, engine):
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3,), "b": (2, 3), "c": ()}
    params = {key: torch.rand(shape, generator=draw, dtype=torch.float64) for key, shape in shapes.items()}
    exact = backprop_gradient(FUNCTIONS[name], params)
    if engine == "stacked" and name == "autograd inside":
        with pytest.raises(NotImplementedError, match=r"torch\.func transform"):
            forward_gradient(FUNCTIONS[name], params, tangents="unit", engine=engine)
        return
    estimate = forward_gradient(FUNCTIONS[name], params, tangents="unit", engine=engine)
    assert_near(estimate.grads, exact.grads)
    assert_near({"loss": estimate.loss}, {"loss": exact.loss})
    assert_near({"jvps": estimate.jvps}, {"jvps": flat(exact.grads)})
    sampled = sample_tangents(params, 4, "rademacher", draw)
    several = forward_gradient(FUNCTIONS[name], params, num_tangents=4, tangents=lambda *_: sampled, engine=engine)
    along = sum((v * exact.grads[key]).reshape(4, -1).sum(1) for key, v in sampled.items())
    assert_near({"jvps": several.jvps}, {"jvps": along})


def assert_near(found, expected):
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)


def test_tangents_that_go_one_by_one_see_the_same_random_numbers():
    def noisy(p):  # vmap refuses to write y into x, whose derivative is the same along all tangents
        return ((p["x"] ** 0).clone().add_(p["y"]) * float(np.random.rand()) * torch.rand(())).sum()

    params = {name: torch.ones(2, dtype=torch.float64) for name in "xy"}
    gradient = forward_gradient(noisy, params, tangents="unit", engine="torch").grads["y"]
    assert gradient[0] == gradient[1] != 0


@pytest.mark.parametrize("engine", ["auto", "stacked", "torch"])
def test_unit_tangents_give_the_gradient_of_a_model(objective, params, engine):
    estimate = forward_gradient(objective, params, tangents="unit", engine=engine)
    assert_near(dict(estimate.grads), backprop_gradient(objective, params).grads)


def test_refuses_another_number_of_unit_tangents(objective, params):
    with pytest.raises(ValueError, match="there are 26 unit tangents, one for each number in params, got 3"):
        forward_gradient(objective, params, tangents="unit", num_tangents=3)
    with pytest.raises(ValueError, match=r"37 GiB; they are for few parameters"):
        forward_gradient(lambda p: p["x"].sum(), {"x": torch.zeros(100_000)}, tangents="unit")


def test_estimate_is_jvp_times_tangent(objective, params):
    def fixed(params, num_tangents, generator):
        draw = torch.Generator().manual_seed(5)
        return {n: torch.randn(num_tangents, *p.shape, generator=draw, dtype=p.dtype) for n, p in params.items()}

    tangent = {name: v[0] for name, v in fixed(params, 1, None).items()}
    estimate = forward_gradient(objective, params, tangents=fixed)
    slope = flat(backprop_gradient(objective, params).grads) @ flat(tangent)
    torch.testing.assert_close(estimate.jvps, slope.reshape(1))
    torch.testing.assert_close(flat(estimate.grads), slope * flat(tangent))


def test_blocks_take_one_derivative_per_tensor(objective, params):
    def ones(params, num_tangents, generator):
        return {n: torch.ones(num_tangents, *p.shape, dtype=p.dtype) for n, p in params.items()}

    estimate = forward_gradient(objective, params, tangents=ones, blocks="parameter")
    exact = backprop_gradient(objective, params).grads
    assert estimate.jvps.shape == (1, 4)
    for i, name in enumerate(params):
        torch.testing.assert_close(estimate.jvps[0, i], exact[name].sum())
        torch.testing.assert_close(estimate.grads[name], exact[name].sum() * torch.ones_like(params[name]))


def test_jvps_of_blocks_add_up_to_the_joint_one(objective, params):
    joint, blocks = (
        forward_gradient(
            objective, params, num_tangents=3, blocks=b, generator=torch.Generator().manual_seed(0), tangents="normal"
        )
        for b in ("joint", "parameter")
    )
    torch.testing.assert_close(blocks.jvps.sum(1), joint.jvps)


@pytest.mark.parametrize("blocks", ["joint", "parameter"])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunks_change_no_number(objective, params, blocks, chunk_size):
    whole, chunked = (
        forward_gradient(
            objective,
            params,
            num_tangents=5,
            blocks=blocks,
            chunk_size=c,
            generator=torch.Generator().manual_seed(0),
            tangents="normal",
        )
        for c in (None, chunk_size)
    )
    torch.testing.assert_close(flat(chunked.grads), flat(whole.grads), rtol=1e-12, atol=1e-14)


def test_chunks_change_no_number_of_the_projection(objective, params):
    whole, chunked = (
        projected_gradient(objective, params, num_tangents=5, chunk_size=c, generator=torch.Generator().manual_seed(0))
        for c in (None, 2)
    )
    torch.testing.assert_close(flat(chunked.grads), flat(whole.grads), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_same_numbers_inside_vmap(objective, params, name):
    estimator = ALL[name]
    if name != "backprop":
        estimator = partial(estimator, tangents=unit_tangents)  # the same tangents, drawn nowhere
    stacked = {key: torch.stack([p, 2 * p]) for key, p in params.items()}
    both = torch.func.vmap(lambda p: estimator(objective, p))(stacked)
    for i in range(2):
        alone = estimator(objective, {key: p[i] for key, p in stacked.items()})
        torch.testing.assert_close(both.loss[i], alone.loss)
        torch.testing.assert_close(both.jvps[i], alone.jvps)
        for key in params:
            torch.testing.assert_close(both.grads[key][i], alone.grads[key])


@pytest.mark.parametrize("name", ALL)
def test_protocol(objective, params, name):
    estimate = ALL[name](objective, params)
    assert estimate.loss.shape == ()
    assert {n: g.shape for n, g in estimate.grads.items()} == {n: p.shape for n, p in params.items()}
    assert not any(t.requires_grad for t in (estimate.loss, estimate.jvps, *estimate.grads.values()))


def test_forward_gradient_builds_no_graph(objective):
    seen = []

    def watched(params):
        loss = objective(params)
        with torch._C.DisableTorchFunction():  # in the pass, tensors with tangents say that they require a gradient
            seen.append(loss.requires_grad)
        return loss

    forward_gradient(watched, dict(objective.model.named_parameters()), tangents="normal")
    assert seen == [False]


def test_a_parameter_that_the_objective_does_not_use_gets_zero_where_its_derivative_is_taken_alone():
    params = {"used": torch.tensor([2.0]), "unused": torch.tensor([3.0])}
    for estimator in (backprop_gradient, partial(forward_gradient, blocks="parameter", tangents="normal")):
        assert estimator(lambda p: (p["used"] ** 2).sum(), params).grads["unused"] == 0
    # a joint tangent gives it the noise of the others; a constant objective has no slope at all
    assert forward_gradient(lambda p: (p["used"] ** 2).sum(), params, tangents="normal").grads["unused"] != 0
    assert forward_gradient(lambda p: torch.tensor(1.0), params, tangents="normal").jvps == 0


def test_shared_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)).double()
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    objective = BatchLoss(model, torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1]))
    params = params_of(model)
    estimate = forward_gradient(objective, params, num_tangents=9, tangents=unit_tangents)
    objective.loss(model(objective.inputs), objective.targets).backward()
    torch.testing.assert_close(9 * estimate.grads["0.weight"], model[0].weight.grad)
    assert list(estimate.grads) == ["0.weight"]


# the projection, exact cases


@pytest.mark.parametrize("more", [0, 1, 10])
@pytest.mark.parametrize("seed", range(10))
def test_projection_on_as_many_tangents_as_parameters_is_the_gradient(objective, params, more, seed):
    num = sum(p.numel() for p in params.values()) + more
    draw = torch.Generator().manual_seed(seed)
    estimate = projected_gradient(objective, params, num_tangents=num, generator=draw)
    exact = flat(backprop_gradient(objective, params).grads)
    assert (flat(estimate.grads) - exact).norm() <= 1e-10 * exact.norm()
    assert estimate.jvps.shape == (num,)


@pytest.mark.parametrize("num", [1, 5, 26])
def test_projection_on_orthonormal_tangents_is_their_scaled_sum(objective, params, num):
    options = {"num_tangents": num, "tangents": "orthonormal"}
    projected, rescaled, mean = (
        flat(estimator(objective, params, generator=torch.Generator().manual_seed(0), **options).grads)
        for estimator in (
            projected_gradient,
            partial(projected_gradient, rescale="unbiased"),
            partial(forward_gradient, tangents="normal"),
        )
    )
    torch.testing.assert_close(projected, num / 26 * mean, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(rescaled, mean, rtol=1e-10, atol=1e-14)


def test_projection_on_a_line_is_the_shadow(objective, params):
    v = randn(26)
    exact = flat(backprop_gradient(objective, params).grads)
    estimate = projected_gradient(objective, params, tangents=fixed(v[None]))
    torch.testing.assert_close(flat(estimate.grads), (exact @ v) / (v @ v) * v)


def test_projection_agrees_with_least_squares():
    gradient, matrix = randn(20), randn(7, 20, seed=1)
    nearest = torch.linalg.lstsq(matrix.T, gradient[:, None]).solution[:, 0] @ matrix
    torch.testing.assert_close(project(gradient, matrix), nearest, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spoil", ["repeated", "zero", "sum", "short", "more than P"])
def test_projection_on_dependent_tangents_is_that_on_their_span(dtype, spoil):
    gradient, matrix = randn(12, dtype=dtype), randn(3, 12, seed=1, dtype=dtype)
    spoilt = {
        "repeated": torch.cat([matrix, -2 * matrix]),
        "zero": torch.cat([torch.zeros(1, 12, dtype=dtype), matrix, torch.zeros(1, 12, dtype=dtype)]),
        "sum": torch.cat([matrix, matrix.sum(0, keepdim=True)]),
        "short": matrix * torch.tensor([1.0, 1e-12, 1e9], dtype=dtype)[:, None],
        "more than P": randn(40, 12, seed=2, dtype=dtype),
    }[spoil]
    expected = gradient if spoil == "more than P" else project(gradient, matrix)
    tolerance = {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps * gradient.norm().item()}
    torch.testing.assert_close(project(gradient, spoilt), expected, **tolerance)


def test_what_is_rescaled_is_divided_by_the_rank_not_by_the_number_of_tangents():
    gradient, matrix = randn(12), randn(3, 12, seed=1)
    twice = torch.cat([matrix, matrix])
    torch.testing.assert_close(project(gradient, twice, rescale="unbiased"), 4 * project(gradient, matrix))
    assert torch.equal(project(gradient, torch.zeros(2, 12), rescale="unbiased"), torch.zeros(12, dtype=torch.float64))


def test_projection_takes_parameters_of_several_types():
    params = {"half": torch.zeros(4, dtype=torch.bfloat16), "double": torch.zeros(3, dtype=torch.float64)}
    estimate = projected_gradient(
        lambda p: p["half"].sum().double() + 2 * p["double"].sum(),
        params,
        num_tangents=9,
        generator=torch.Generator().manual_seed(0),
    )
    assert {name: g.dtype for name, g in estimate.grads.items()} == {name: p.dtype for name, p in params.items()}
    torch.testing.assert_close(
        flat(estimate.grads).double(), torch.tensor([1.0] * 4 + [2.0] * 3).double(), rtol=0.05, atol=0
    )


def test_projection_in_single_precision_survives_tangents_that_are_nearly_alike():
    # at an angle of 3e-4 their Gram matrix has the condition number 4e7: one in single precision has nothing left of it
    gradient, matrix = randn(50, dtype=torch.float32), randn(2, 50, seed=1, dtype=torch.float32)
    alike = torch.stack([matrix[0], matrix[0] + 3e-4 * matrix[1]])
    exact = project(gradient.double(), alike.double())
    assert (project(gradient, alike) - exact).norm() < 1e-2 * exact.norm()
    gram = alike @ alike.T
    naive = torch.linalg.inv(gram) @ (alike @ gradient) @ alike
    assert (naive - exact).norm() > 0.1 * exact.norm()


# the state of BatchNorm and Dropout


@pytest.mark.parametrize("name", ALL)
def test_running_statistics_advance_once_per_estimate(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(6, 3)
    ALL[name](BatchLoss(model, inputs, torch.zeros(6, dtype=torch.long)), params_of(model))
    twin(inputs)
    for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("name", ALL)
def test_evaluation_mode_leaves_running_statistics_alone(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ALL[name](BatchLoss(model, torch.randn(6, 3), torch.zeros(6, dtype=torch.long)), params_of(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_all_tangents_see_one_dropout_mask(chunk_size):
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    objective = BatchLoss(model, torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.long))
    params = params_of(model)
    num = sum(p.numel() for p in params.values())
    torch.manual_seed(3)
    estimate = forward_gradient(objective, params, num_tangents=num, tangents=unit_tangents, chunk_size=chunk_size)
    torch.manual_seed(3)
    one_mask = backprop_gradient(objective, params)
    torch.testing.assert_close(num * flat(estimate.grads), flat(one_mask.grads))


# closed forms, 5 sigma


@pytest.mark.parametrize(("tangents", "spread"), [("normal", +1), ("rademacher", -1)])
@pytest.mark.parametrize("num_tangents", [1, 4])
@pytest.mark.parametrize("blocks", ["joint", "parameter"])
def test_mean_and_variance_agree_with_the_closed_forms(objective, params, tangents, spread, num_tangents, blocks):
    # E g = grad f, and E|g - grad f|^2 = (P + 1)/K |grad f|^2 (normal) or (P - 1)/K |grad f|^2 (rademacher), per block
    num_draws = 4000
    exact = flat(backprop_gradient(objective, params).grads)
    draws = Replicates([torch.Generator().manual_seed(seed) for seed in range(num_draws)])
    estimator = partial(
        forward_gradient, objective, params, num_tangents=num_tangents, tangents=tangents, blocks=blocks
    )
    grads = torch.func.vmap(lambda index: estimator(generator=draws.at(index)).grads)(draws.indices)
    estimates = torch.cat([grad.flatten(1) for grad in grads.values()], dim=1)
    sizes = [p.numel() for p in params.values()] if blocks == "parameter" else [len(exact)]
    squares = torch.stack([piece.square().sum() for piece in exact.split(sizes)])
    counts = torch.tensor(sizes, dtype=torch.float64)
    expected = ((counts + spread) / num_tangents * squares).sum()

    errors = (estimates - exact).square().sum(1)
    # the spread of the measured mean square is itself measured: 4000 draws give it to a few per cent
    assert (errors.mean() - expected).abs() < 5 * errors.std() / math.sqrt(num_draws)
    standard_error = estimates.std(0) / math.sqrt(num_draws)
    assert ((estimates.mean(0) - exact).abs() < 5 * standard_error).all()


P_LARGE = 20


def many_estimates(estimator, num_draws=4000):
    """Estimates of a gradient of length 1 in 20 dimensions, not along an axis: (num_draws, 20), and the gradient."""
    gradient = torch.arange(1, P_LARGE + 1, dtype=torch.float64)
    gradient = gradient / gradient.norm()
    params, draws = {"x": torch.zeros_like(gradient)}, Replicates([torch.Generator().manual_seed(0)] * num_draws)
    estimate = partial(estimator, slope_of(gradient), params)
    return torch.func.vmap(lambda index: estimate(generator=draws.at(index)).grads["x"])(draws.indices), gradient


def assert_mean(values, expected):
    """Five standard errors of the mean; where the values do not vary, rounding."""
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() <= 5 * error + 1e-10).all(), (values.mean(0), expected, error)


@pytest.mark.parametrize("num", [1, 3, 8, P_LARGE])
@pytest.mark.parametrize(("tangents", "spread"), [("normal", 1), ("rademacher", -1), ("orthonormal", None)])
def test_second_moments_of_the_mean_agree_with_the_closed_forms(tangents, spread, num):
    estimates, gradient = many_estimates(partial(forward_gradient, num_tangents=num, tangents=tangents))
    error = P_LARGE / num - 1 if spread is None else (P_LARGE + spread) / num
    assert_mean(estimates, gradient)
    assert_mean((estimates - gradient).square().sum(1), error)
    assert_mean(estimates.square().sum(1), 1 + error)
    if tangents != "rademacher":
        cosine = num / (P_LARGE + num - 1) if tangents == "normal" else num / P_LARGE
        assert_mean((estimates @ gradient / estimates.norm(dim=1)).square(), cosine)


@pytest.mark.parametrize(
    ("tangents", "num"),
    [
        *itertools.product(["normal", "orthonormal"], [1, 3, 8, P_LARGE]),
        ("normal", P_LARGE + 5),
        *itertools.product(
            ["rademacher"], [1, 3]
        ),  # three of them in 20 dimensions are dependent once in 200 000 times
    ],
)
@pytest.mark.parametrize("rescale", [None, "unbiased"])
def test_moments_and_cosine_of_the_projection_agree_with_the_closed_forms(tangents, num, rescale):
    estimator = partial(projected_gradient, num_tangents=num, tangents=tangents, rescale=rescale)
    estimates, gradient = many_estimates(estimator)
    part = min(num / P_LARGE, 1)
    size = 1 / part if rescale else part
    assert_mean(estimates, gradient if rescale else part * gradient)
    assert_mean(estimates.square().sum(1), size)
    assert_mean((estimates - gradient).square().sum(1), size - 1 if rescale else 1 - size)
    lengths = estimates.norm(dim=1).clamp(min=1e-30)  # an estimate of signs may be zero, at a right angle to all
    assert_mean((estimates @ gradient / lengths).square(), part)


@pytest.mark.parametrize(("rescale", "factor"), [(None, 0.75), ("unbiased", 1.0)])
def test_signs_that_may_be_dependent_have_their_expected_rank_in_the_bias(rescale, factor):
    # in two dimensions two sign vectors are so every other time: the expected rank is 1.5
    params, gradient = {"x": torch.zeros(2, dtype=torch.float64)}, torch.tensor([3.0, 1.0], dtype=torch.float64)
    draws = Replicates([torch.Generator().manual_seed(0)] * 4000)
    options = {"num_tangents": 2, "tangents": "rademacher", "rescale": rescale}
    estimate = partial(projected_gradient, slope_of(gradient), params, **options)
    estimates = torch.func.vmap(lambda index: estimate(generator=draws.at(index)).grads["x"])(draws.indices)
    assert_mean(estimates, factor * gradient)


# properties


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    activation=st.sampled_from([nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU]),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    blocks=st.sampled_from(["joint", "parameter"]),
)
def test_jvp_is_the_slope_by_finite_differences(widths, activation, batch, seed, blocks):
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    model = nn.Sequential(*layers).double()
    objective = BatchLoss(model, torch.randn(batch, widths[0]).double(), torch.zeros(batch, dtype=torch.long))
    params = params_of(model)
    tangent = {name: torch.randn_like(p) for name, p in params.items()}
    estimate = forward_gradient(
        objective, params, tangents=lambda p, k, g: {n: v[None] for n, v in tangent.items()}, blocks=blocks
    )
    step = 1e-5
    ahead, behind = ({n: p + sign * step * tangent[n] for n, p in params.items()} for sign in (1, -1))
    slope = (objective(ahead) - objective(behind)) / (2 * step)
    torch.testing.assert_close(estimate.jvps.sum(), slope, rtol=1e-5, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(
    num_params=st.integers(1, 12),
    num_tangents=st.integers(1, 15),
    seed=st.integers(0, 2**31),
    tangents=st.sampled_from(["normal", "rademacher"]),
)
def test_projecting_shortens_and_twice_is_once(num_params, num_tangents, seed, tangents):
    draw = torch.Generator().manual_seed(seed)
    gradient = torch.randn(num_params, generator=draw, dtype=torch.float64)
    matrix = sample_tangents({"x": gradient}, num_tangents, tangents, draw)["x"]
    once = project(gradient, matrix)
    tolerance = 1e-8 * gradient.norm()
    assert once.norm() <= gradient.norm() + tolerance
    assert (project(once, matrix) - once).norm() <= tolerance
    assert (matrix @ (gradient - once)).abs().max() <= tolerance * matrix.norm()  # the rest is at right angles to all


@settings(max_examples=50, deadline=None)
@given(num_params=st.integers(1, 12), num_tangents=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_projection_depends_on_the_span_alone(num_params, num_tangents, seed):
    draw = torch.Generator().manual_seed(seed)
    gradient = torch.randn(num_params, generator=draw, dtype=torch.float64)
    matrix = torch.randn(num_tangents, num_params, generator=draw, dtype=torch.float64)
    lengths = torch.linalg.svdvals(matrix)
    assume(lengths[-1] > 1e-2 * lengths[0])  # what is nearly dependent counts as dependent, sooner or later
    mixing = torch.linalg.qr(torch.randn(num_tangents, num_tangents, generator=draw, dtype=torch.float64))[0]
    mixing = mixing * torch.logspace(-1.5, 1.5, num_tangents, dtype=torch.float64)  # invertible, and no rotation
    difference = project(gradient, mixing @ matrix) - project(gradient, matrix)
    assert difference.norm() <= 1e-6 * gradient.norm()


# bad input


def test_refuses_bad_options(objective, params):
    with pytest.raises(ValueError, match="num_tangents must be a whole number of at least 1, got 0"):
        forward_gradient(objective, params, num_tangents=0, tangents="normal")
    with pytest.raises(ValueError, match=r"tangents must be one of 'normal', 'rademacher', .*'activity', got"):
        forward_gradient(objective, params, tangents="gaussian")
    with pytest.raises(ValueError, match="blocks must be one of 'joint', 'parameter', got 'layer'"):
        forward_gradient(objective, params, blocks="layer", tangents="normal")
    with pytest.raises(ValueError, match="chunk_size must be a whole number of at least 1, got 0"):
        forward_gradient(objective, params, chunk_size=0, tangents="normal")
    with pytest.raises(ValueError, match="rescale must be one of 'unbiased', got 'longer'"):
        projected_gradient(objective, params, rescale="longer")
    with pytest.raises(ValueError, match="chunk_size must be a whole number of at least 1, got 0"):
        projected_gradient(objective, params, chunk_size=0)
    with pytest.raises(ValueError, match="num_tangents must be at most 26, the number of parameters"):
        projected_gradient(objective, params, num_tangents=27, tangents="orthonormal")


@pytest.mark.parametrize("name", ALL)
def test_refuses_what_has_no_gradient(name):
    with pytest.raises(TypeError, match=r"params\['n'\] must be a real floating tensor, got torch.int64"):
        ALL[name](lambda p: p["n"].sum(), {"n": torch.arange(3)})
    with pytest.raises(ValueError, match="params is empty"):
        ALL[name](lambda p: torch.tensor(0.0), {})
    with pytest.raises(ValueError, match=r"the objective must return a scalar tensor, got \(3,\)"):
        ALL[name](lambda p: p["x"] ** 2, {"x": torch.ones(3)})


@pytest.mark.parametrize("name", ALL)
def test_refuses_a_complex_loss(name):
    model = nn.Linear(3, 2)
    for objective, params in (
        (lambda p: (p["x"] * (1 + 2j)).sum(), {"x": torch.ones(3)}),
        (ClosureLoss(model, lambda: model(torch.ones(4, 3)).sum() * 1j), params_of(model)),
    ):
        with pytest.raises(ValueError, match=r"must return a real number, got torch\.complex64"):
            ALL[name](objective, params)


@pytest.mark.parametrize("tangents", ["rank-one", "normal", "rademacher"])
@pytest.mark.parametrize("engine", ["stacked", "torch"])
def test_a_sum_of_many_tangents_does_not_overflow_in_half_precision(engine, tangents):
    model, inputs = nn.Linear(300, 2).half(), torch.ones(4, 300, dtype=torch.half)
    objective = ClosureLoss(model, lambda: (model(inputs) * 40).sum())
    estimate = forward_gradient(objective, params_of(model), num_tangents=64, tangents=tangents, engine=engine)
    assert all(gradient.isfinite().all() for gradient in estimate.grads.values())


@pytest.mark.parametrize("name", ALL)
def test_a_non_finite_loss_is_returned_not_hidden(name):
    estimate = ALL[name](lambda p: p["x"].log().sum(), {"x": torch.tensor([-1.0])})
    assert estimate.loss.isnan()


def test_refuses_a_name_that_the_model_has_not(objective, params):
    with pytest.raises(ValueError, match=r"params has 'wieght', .*; it has 0\.weight, 0\.bias"):
        forward_gradient(objective, {**params, "wieght": torch.zeros(2)}, tangents="normal")


def test_refuses_a_sampler_that_returns_other_shapes(objective, params):
    with pytest.raises(ValueError, match=r"must give '0\.weight' a tensor of the shape \(2, 4, 3\), got \(7, 4, 3\)"):
        forward_gradient(
            objective,
            params,
            num_tangents=2,
            tangents=lambda p, k, g: {n: torch.ones(7, *v.shape) for n, v in p.items()},
        )
    with pytest.raises(ValueError, match=r"the shape \(1, 4, 3\), got None"):
        forward_gradient(objective, params, tangents=lambda p, k, g: {})


def test_a_constant_objective_has_no_gradient():
    params = {"x": torch.ones(3)}
    for estimator in ALL.values():
        assert torch.equal(estimator(lambda p: torch.tensor(2.0), params).grads["x"], torch.zeros(3))


def test_tangents_are_drawn_in_the_widest_dtype():
    params = {"half": torch.zeros(2, dtype=torch.bfloat16), "double": torch.zeros(10_000, dtype=torch.float64)}
    estimate = forward_gradient(lambda p: p["double"].sum() + p["half"].sum().double(), params, tangents="normal")
    assert estimate.grads["double"].unique().numel() > 9_990
    assert estimate.grads["half"].dtype == torch.bfloat16


HOOKED = {
    "backprop": backprop_gradient,
    "torch": partial(forward_gradient, tangents="normal", engine="torch"),
    "stacked": partial(forward_gradient, engine="stacked", num_tangents=3),
    "auto": partial(forward_gradient, num_tangents=3),
    "blocks": partial(forward_gradient, blocks="parameter"),
    "projected": partial(projected_gradient, num_tangents=3),
}


@pytest.mark.parametrize("name", HOOKED)
def test_a_model_whose_loss_is_a_constant_is_refused_as_backward_refuses_it(name):
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    inputs = torch.randn(5, 4)
    closures = {
        "detached": lambda: model(inputs).detach().sum(),
        "of another model": lambda: other(inputs).sum(),
        "of indices": lambda: model(inputs).argmax(1).double().mean(),
    }
    for closure in closures.values():
        with pytest.raises(ValueError, match="does not depend on the model's trainable parameters"):
            HOOKED[name](ClosureLoss(model, closure), params_of(model))


@pytest.mark.parametrize("name", list(HOOKED)[1:])
def test_modules_that_act_in_a_backward_pass_are_refused(name, tmp_path):
    inputs = torch.randn(5, 4)
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"):
        model = nn.Sequential(nn.Linear(4, 3))
        handle = getattr(model[0], register)(lambda *_: None)
        objective = ClosureLoss(model, lambda model=model: model(inputs).sum())
        with pytest.raises(NotImplementedError, match=r"Linear has backward hooks.*handle\.remove\(\)"):
            HOOKED[name](objective, params_of(model))
        handle.remove()
        HOOKED[name](objective, params_of(model))

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = type("Own", (nn.parallel.DistributedDataParallel,), {})(nn.Linear(4, 3))
        with pytest.raises(NotImplementedError, match=r"Own averages gradients.*model\.module"):
            HOOKED[name](ClosureLoss(model, lambda: model(inputs).sum()), params_of(model))
    finally:
        torch.distributed.destroy_process_group()


def test_a_subset_of_parameters_that_a_batch_does_not_use_has_no_gradient():
    experts, inputs = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]), torch.randn(5, 4)
    unused = {name: p for name, p in params_of(experts).items() if name.startswith("1.")}
    for estimator in HOOKED.values():
        found = estimator(ClosureLoss(experts, lambda: experts[0](inputs).sum()), unused)
        assert not any(g.any() for g in found.grads.values())


def test_inputs_without_an_axis_of_examples():
    objective = BatchLoss(nn.Embedding(3, 4), torch.tensor(2), torch.tensor(1))
    for estimator in HOOKED.values():
        assert estimator(objective, params_of(objective.model)).loss > 0


@pytest.mark.parametrize("name", HOOKED)
def test_an_empty_batch_is_refused(name):
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="inputs is an empty batch"):
        HOOKED[name](BatchLoss(model, torch.zeros(0, 4), torch.zeros(0).long()), params_of(model))


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("tangents", ["normal", "rank-one", "per-example", "activity"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast in the closure", "autocast around all"])
def test_half_precision_gives_gradients_of_the_dtype_of_the_parameters(precision, tangents, num_tangents):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = torch.randn(16, 1, 4, 4), torch.arange(16) % 3
    if (dtype := getattr(torch, precision, None)) is not None:
        model, inputs = model.to(dtype), inputs.to(dtype)
    inner, outer = (torch.autocast("cpu", torch.bfloat16, enabled=precision.endswith(of)) for of in ("closure", "all"))

    def closure():
        with inner:
            logits = model(inputs)
        return F.cross_entropy(logits.float(), targets)

    how = {"tangents": tangents, "num_tangents": num_tangents, "num_examples": 16}
    rounds = 300
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for _ in range(rounds):
        with outer:
            forward_grad_(model, closure, **how)
        for total, p in zip(totals, model.parameters(), strict=True):
            assert p.grad.dtype == p.dtype
            total += p.grad.float() / rounds
    model.zero_grad()
    closure().backward()
    exact = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    mean = torch.cat([total.flatten() for total in totals])
    bound = ((len(exact) + 2) / num_tangents / rounds) ** 0.5  # relative error of normal tangents, the largest of all
    assert (mean - exact).norm() < (1.5 * bound + 0.05) * exact.norm()


def test_forward_grad_leaves_no_gradient_of_an_earlier_step_in_a_frozen_layer():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.ones(2, 4)
    forward_grad_(model, lambda: model(inputs).square().mean())
    model[0].requires_grad_(False)
    forward_grad_(model, lambda: model(inputs).square().mean())
    assert all(p.grad is None for p in model[0].parameters())
    assert all(p.grad is not None for p in model[2].parameters())


@pytest.mark.parametrize("tangents", ["rank-one", "normal"])
def test_logits_that_a_closure_keeps_can_be_used_after_it(tangents):
    model, kept = nn.Linear(4, 3), []
    inputs = torch.randn(5, 4)
    forward_grad_(model, lambda: kept.append(model(inputs)) or kept[-1].square().mean(), tangents=tangents)
    assert torch.equal(kept[-1].argmax(1), model(inputs).argmax(1))
    assert not (kept[-1] * 2).requires_grad


WRONG = [
    (lambda m, c: forward_grad_(m, c()), TypeError, "closure must be a function that computes the loss"),
    (lambda m, c: forward_grad_(c, m), TypeError, "model must be an nn.Module, got function"),
    (lambda m, c: forward_grad_([m], c), TypeError, "got list; put several models into an nn.ModuleList"),
    (lambda m, c: forward_grad_(m, lambda: {"loss": c()}), ValueError, r"got dict;.*such as output\.loss"),
    (lambda m, c: forward_grad_(m, c, generator=0), TypeError, r"generator must be a torch\.Generator.*got 0"),
    (lambda m, c: forward_grad_(m, c, tangents=None), ValueError, "'per-example', 'activity', got None"),
    (lambda m, c: forward_grad_(m, c, tangents="unit", num_tangents=5), ValueError, "leave num_tangents out"),
    (lambda m, c: forward_gradient(lambda p: c(), m), TypeError, r"params must be a dict.*params_of\(model\)"),
    (
        lambda m, c: forward_grad_(m, c, tangents=lambda p, k, g: {n: v[None].numpy() for n, v in p.items()}),
        ValueError,
        r"the shape \(1, 3, 4\), got ndarray",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments_are_named(call, error, message):
    model = nn.Linear(4, 3)
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        call(model, lambda: model(torch.ones(2, 4)).square().mean())


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_of_parameters_change_their_gradients_as_in_backprop(name):
    model = nn.Linear(4, 3)
    mask = torch.arange(12).view(3, 4) % 2
    seen, order = [], []
    model.weight.register_hook(lambda grad: grad * mask)
    model.weight.register_hook(lambda grad: seen.append(grad))
    model.weight.register_post_accumulate_grad_hook(lambda p: order.append(p.grad.clone()))
    objective = BatchLoss(model, torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
    estimate = HOOKED[name](objective, params_of(model))
    assert torch.equal(estimate.grads["weight"] != 0, mask == 1)
    assert len(seen) == 1
    assign_gradients(model, estimate.grads)
    assert torch.equal(order[0], estimate.grads["weight"])
