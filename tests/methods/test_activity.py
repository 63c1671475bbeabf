"""Activity perturbation: exact cases, unbiasedness and closed-form variances within 5 sigma, and what is refused."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.methods.activity import ActivityForwardGradient, ControlVariateForwardGradient
from fwdlib.methods.feedback import ForwardDirectFeedbackAlignment
from fwdlib.objectives import BatchLoss, params_of
from tests.methods.chains import (
    FIXED,
    MODELS,
    TARGETS,
    Chain,
    Shifted,
    assert_within_5_sigma,
    cnn,
    exact,
    grads_of,
    mlp,
    randomise,
    relu_net,
    seeded,
)


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("tangents", ["rademacher", "normal"])
def test_without_a_residual_the_control_variate_is_fdfa(num_tangents, tangents):
    found = []
    for rule in (ForwardDirectFeedbackAlignment, partial(ControlVariateForwardGradient, alpha=0.0)):
        model, inputs = mlp(nn.BatchNorm1d(5))
        estimator = rule(model, inputs, num_tangents=num_tangents, tangents=tangents)
        draw = seeded()
        found.append([grads_of(estimator, model, inputs, generator=draw) for _ in range(3)])
    assert all(torch.equal(a[name], b[name]) for a, b in zip(*found, strict=True) for name in a)


@pytest.mark.parametrize("tangents", ["rademacher", "normal"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("make", MODELS)
def test_the_control_variate_is_unbiased_at_any_feedback(make, scale, tangents):
    model, inputs = MODELS[make]()
    options = {"optimizer": FIXED, "num_tangents": 20, "tangents": tangents}
    estimator = randomise(ControlVariateForwardGradient(model, inputs, **options), scale)
    draw, expected = seeded(), exact(model, inputs)
    estimates = [grads_of(estimator, model, inputs, generator=draw) for _ in range(150)]
    for name, grad in expected.items():
        assert_within_5_sigma(torch.stack([estimate[name] for estimate in estimates]), grad)


@pytest.mark.parametrize("weights", ["example", "batch"])
def test_without_feedback_the_control_variate_is_the_forward_gradient_of_the_activities(weights):
    model, inputs = cnn()
    options = {"num_tangents": 3, "weights": weights}
    rules = (
        ActivityForwardGradient(model, inputs, **options),
        ControlVariateForwardGradient(model, inputs, optimizer=FIXED, **options),
    )
    model[0][1] = nn.Sigmoid()  # behind which every unit has a gradient
    found = [rule(BatchLoss(model, inputs, TARGETS), params_of(model), generator=seeded()) for rule in rules]
    torch.testing.assert_close(*(dict(estimate.grads) | {"": estimate.jvps} for estimate in found))


@pytest.mark.parametrize("make", [cnn, relu_net], ids=["CNN", "ReLU"])
def test_the_forward_gradient_of_the_activities_is_unbiased(make):
    model, inputs = make()
    estimator, draw, expected = ActivityForwardGradient(model, inputs, num_tangents=20), seeded(), exact(model, inputs)
    estimates = [grads_of(estimator, model, inputs, generator=draw) for _ in range(150)]
    for name, grad in expected.items():
        assert_within_5_sigma(torch.stack([estimate[name] for estimate in estimates]), grad)


@pytest.mark.parametrize("num_tangents", [1, 4])
def test_only_units_that_a_relu_lets_through_add_noise(num_tangents):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    model[0].bias.data[20:] = -100.0
    inputs = torch.randn(6, 4, dtype=torch.float64)
    outputs = model[:2](inputs).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(F.cross_entropy(model[2](outputs), TARGETS), outputs)
    live = outputs.detach() != 0
    v = (slopes * live).square()
    closed_form = ((v.sum(1, keepdim=True) - v) * live).sum(0) / num_tangents
    estimator, draw = ActivityForwardGradient(model, inputs, num_tangents=num_tangents, recorded=True), seeded()
    found = torch.stack([grads_of(estimator, model, inputs, generator=draw)["0.bias"] for _ in range(800)])
    assert_within_5_sigma((found - exact(model, inputs)["0.bias"]).square(), closed_form)
    assert not found[:, 20:].any()


def test_weighting_the_batch_is_unbiased_where_batchnorm_mixes_the_examples():
    model, inputs = mlp()
    model.insert(3, nn.BatchNorm1d(4).double())  # behind the first block, whose activations it mixes
    draw, expected, z = seeded(), exact(model, inputs), {}
    for weights in ("batch", "example"):
        estimator = ControlVariateForwardGradient(model, inputs, optimizer=FIXED, num_tangents=20, weights=weights)
        randomise(estimator)
        found = torch.stack([grads_of(estimator, model, inputs, generator=draw)["0.weight"] for _ in range(400)])
        sigma = found.std(0) / math.sqrt(len(found))
        z[weights] = ((found.mean(0) - expected["0.weight"]) / sigma).abs().max()
    assert z["batch"] < 5
    assert z["example"] > 10  # the bias that the docstring owns up to


@pytest.mark.parametrize(("tangents", "of_own"), [("rademacher", -1), ("normal", 1)])
@pytest.mark.parametrize("num_tangents", [1, 4])
def test_the_variance_is_that_of_the_residual(tangents, of_own, num_tangents):
    torch.manual_seed(0)
    model = Chain(Shifted(4, 5), Shifted(5, 7), nn.Linear(7, 3)).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    options = {"optimizer": FIXED, "num_tangents": num_tangents, "tangents": tangents}
    estimator = randomise(ControlVariateForwardGradient(model, inputs, **options))
    expected = exact(model, inputs)
    biased = grads_of(randomise(ForwardDirectFeedbackAlignment(model, inputs, optimizer=FIXED)), model, inputs)
    deltas = [f"chain.{i}.shift" for i in range(2)]
    residuals = {name: expected[name] - biased[name] for name in deltas}
    total = sum(residual.square().sum(1) for residual in residuals.values())  # (B,)
    draw = seeded()
    found = [grads_of(estimator, model, inputs, generator=draw) for _ in range(800)]
    for name in deltas:
        squares = torch.stack([(of_draw[name] - expected[name]).square().sum(1) for of_draw in found])
        residual = residuals[name]
        closed_form = residual.shape[1] * total + of_own * residual.square().sum(1)
        assert_within_5_sigma(squares, closed_form / num_tangents)


@pytest.mark.parametrize("num_tangents", [1, 3])
def test_recorded_the_control_variate_follows_alpha_and_weights(num_tangents):
    model, inputs = mlp()
    options = {"alpha": 0.9, "alpha_decay": 0.9, "num_tangents": num_tangents}
    rules = [ControlVariateForwardGradient(model, inputs, **options, recorded=r) for r in (False, True)]
    for weights in ("example", "example", "batch"):
        found = []
        for rule in rules:
            rule.weights = weights
            found.append(grads_of(rule, model, inputs, generator=seeded()))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_alpha_decays_and_comes_back():
    model, inputs = mlp()
    estimator = ControlVariateForwardGradient(model, inputs, alpha=0.8, alpha_decay=0.5)
    for expected in (0.8, 0.4, 0.2):
        assert estimator.alpha == pytest.approx(expected)
        grads_of(estimator, model, inputs)
    estimator.reset()
    assert estimator.alpha == 0.8


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"alpha": 1.5}, "alpha must be between 0 and 1, got 1.5"),
        ({"alpha_decay": -1}, "alpha_decay must be between 0 and 1, got -1"),
        ({"weights": "all"}, "weights must be one of 'example', 'batch'"),
        ({"tangents": "rank-one"}, "tangents must be one of 'rademacher', 'normal'"),
        ({"num_tangents": 0}, "num_tangents must be a whole number of at least 1"),
    ],
)
def test_refuses_options(option, message):
    with pytest.raises(ValueError, match=message):
        ControlVariateForwardGradient(*mlp(), **option)
