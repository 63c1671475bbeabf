"""Guided tangents: exact cases in float64 against autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.data import Dataset
from fwdlib.methods.blocks import blocks_of
from fwdlib.methods.guided import GuidedForwardGradient
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.training import make_optimizer, train
from tests.methods.chains import MODELS, TARGETS, Border, Chain, Shifted, exact, grads_of, relu_net, seeded

FIXED = make_optimizer("SGD", 1e-300)
ALL_MODELS = MODELS | {"ReLU": relu_net}


def with_heads(model, inputs, **options):
    estimator = GuidedForwardGradient(model, inputs, **options)
    draw = seeded(7)
    estimator.matrix.copy_(0.3 * torch.randn(estimator.matrix.shape, generator=draw, dtype=torch.float64))
    return estimator


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("make", ALL_MODELS)
def test_each_block_gets_the_projection_of_its_gradient_on_that_of_its_local_loss(make, recorded):
    model, inputs = ALL_MODELS[make]()
    estimator = with_heads(model, inputs, optimizer=FIXED, recorded=recorded)
    *hidden, readout = blocks_of(copy.deepcopy(model))
    outputs, activation = [], inputs
    for block in hidden:
        activation = block(activation)
        outputs.append(activation)
    gradients = torch.autograd.grad(F.cross_entropy(readout(activation), TARGETS), outputs)
    expected, activation = {}, inputs
    for block, gradient, weight in zip(blocks_of(model), gradients, estimator.feedback, strict=False):
        output = block(activation.detach())
        leaf = output.detach().requires_grad_()
        features = leaf if leaf.dim() == 2 else leaf.flatten(2).mean(2)
        (proposal,) = torch.autograd.grad(F.cross_entropy(features @ weight.flatten(1).t(), TARGETS), leaf)
        product, square = ((a * proposal).flatten(1).sum(1) for a in (gradient, proposal))
        delta = (product / square).reshape(-1, *[1] * (output.dim() - 1)) * proposal
        parameters = list(block.parameters())
        for p, grad in zip(parameters, torch.autograd.grad(output, parameters, delta), strict=True):
            expected[p] = grad
        activation = output
    grads = grads_of(estimator, model, inputs)
    for name, p in list(model.named_parameters())[:-2]:
        torch.testing.assert_close(grads[name], expected[p], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("make", ALL_MODELS)
def test_the_readout_is_exact_and_the_loss_is_the_model_s(make):
    model, inputs = ALL_MODELS[make]()
    expected = exact(copy.deepcopy(model), inputs)
    estimate = with_heads(model, inputs)(BatchLoss(model, inputs, TARGETS), params_of(model))
    torch.testing.assert_close(estimate.loss, F.cross_entropy(model(inputs), TARGETS).detach())
    for name in list(expected)[-2:]:
        torch.testing.assert_close(estimate.grads[name], expected[name], rtol=1e-10, atol=1e-14)


def test_a_head_that_is_the_rest_of_the_network_makes_the_gradient_exact():
    torch.manual_seed(0)
    model = Chain(Shifted(4, 6), nn.Linear(6, 3, bias=False)).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    estimator = GuidedForwardGradient(model, inputs, optimizer=FIXED)
    estimator.matrix.copy_(model.chain[1].weight)
    expected = exact(copy.deepcopy(model), inputs)
    for name, grad in grads_of(estimator, model, inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-14)


def test_the_jvps_are_the_derivatives_along_the_proposals():
    model, inputs = relu_net()
    estimator = with_heads(model, inputs, optimizer=FIXED)
    jvps = estimator(BatchLoss(model, inputs, TARGETS), params_of(model)).jvps
    assert jvps.shape == (2,)
    assert (jvps > -1e-2).all()
    estimator.matrix.zero_()  # proposes nothing
    estimate = estimator(BatchLoss(model, inputs, TARGETS), params_of(model))
    assert not estimate.jvps.any()
    assert not estimate.grads["0.weight"].any()


def test_no_error_is_carried_back_from_block_to_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Border(), nn.Linear(5, 5), nn.Tanh(), Border(), nn.Linear(5, 3))
    inputs = torch.randn(6, 4)
    assert grads_of(GuidedForwardGradient(model, inputs), model, inputs)["0.weight"].isfinite().all()


def test_it_trains_a_network():
    def build():
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    inputs = torch.eye(4)[[0, 1, 2, 0, 1, 2]] + 0.1 * torch.randn(6, 4, generator=seeded())
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    data = Dataset(inputs, targets, inputs, targets, ("a", "b", "c"), None)
    estimator = GuidedForwardGradient(build(), inputs, optimizer=make_optimizer("Adam", 0.01))
    history = train(build, data, estimator, learning_rate=0.5, max_iterations=200, progress=None)
    assert history.runs[0].train_loss[-1] < 0.05
    assert history.runs[0].test_errors[-1] == 0
