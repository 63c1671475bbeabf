"""Models made of blocks and what the tests of their rules share."""

import math

import torch
from torch import nn

from fwdlib.estimators import backprop_gradient
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.dual import Dual
from fwdlib.training import make_optimizer

TARGETS = torch.tensor([0, 2, 1, 2, 0, 1])
FIXED = make_optimizer("SGD", 1e-300)  # with it feedback stays as it is


class Chain(nn.Module):
    """Modules one after the other, each a block."""

    def __init__(self, *modules):
        super().__init__()
        self.chain = nn.ModuleList(modules)

    def blocks(self):
        return list(self.chain)

    def forward(self, inputs):
        for module in self.chain:
            inputs = module(inputs)
        return inputs


class Shifted(nn.Module):
    """tanh of a linear map, plus a parameter of its own for each unit and example: the gradient of that is delta."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.linear, self.shift = nn.Linear(fan_in, fan_out), nn.Parameter(torch.zeros(6, fan_out))

    def forward(self, inputs):
        return torch.tanh(self.linear(inputs)) + self.shift


def mlp(*norm):
    torch.manual_seed(0)
    hidden = nn.Linear(4, 5), *norm, nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid()
    return nn.Sequential(*hidden, nn.Linear(4, 3)).double(), torch.randn(6, 4, dtype=torch.float64)


def cnn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(model, nn.Linear(8, 3)).double(), torch.randn(6, 1, 8, 8, dtype=torch.float64)


def relu_net():
    torch.manual_seed(0)
    hidden = nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(6, 3)).double(), torch.randn(6, 4, dtype=torch.float64)


MODELS = {"MLP": mlp, "CNN": cnn}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Border(nn.Module):
    """Lets nothing pass that could carry an error back."""

    def forward(self, inputs):
        rows = inputs.stack if isinstance(inputs, Dual) else inputs
        assert not rows.requires_grad, "an error could be carried back"
        return inputs


def grads_of(estimator, model, inputs, **options):
    return estimator(BatchLoss(model, inputs, TARGETS), params_of(model), **options).grads


def exact(model, inputs):
    return backprop_gradient(BatchLoss(model, inputs, TARGETS), params_of(model)).grads


def assert_within_5_sigma(samples, expected):
    # samples (N, ...); with thousands of values compared, 5 sigma is passed by chance less than once in 500 runs
    error = (samples.mean(0) - expected).abs()
    sigma = samples.std(0) / math.sqrt(len(samples))
    assert (error <= 5 * sigma + 1e-12).all(), (error / sigma).max()


def randomise(estimator, scale=0.3):
    draw = seeded(7)
    for feedback in estimator.feedback:
        feedback.data.copy_(scale * torch.randn(feedback.shape, generator=draw, dtype=feedback.dtype))
    return estimator
