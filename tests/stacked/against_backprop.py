"""The comparison of the stacked pass with backprop along the same tangents, for models that are given by a body."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.objectives import ClosureLoss, params_of
from fwdlib.stacked.estimator import stacked_jvp

INPUTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CLASSES = torch.arange(6) % 3


class Net(nn.Module):
    """A linear layer, a body ``(model, hidden) -> hidden`` of shape (6, 6), and another linear layer."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.c, self.body = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 6), body
        self.w = nn.Parameter(torch.randn(6, 6))
        self.kept = []
        self.register_buffer("buffer", torch.zeros(6, 6))

    def forward(self, x):
        return self.b(self.body(self, self.a(x)))


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def loss_of(model):
    return F.cross_entropy(model(INPUTS), CLASSES)


def tangents_of(params, num_tangents):
    draw = torch.Generator().manual_seed(1)
    return {n: torch.randn(num_tangents, *p.shape, generator=draw, dtype=p.dtype) for n, p in params.items()}


def by_backprop(make, num_tangents=2, loss_of=loss_of):
    """Return the loss of a new model, its derivatives along random tangents, and the model."""
    torch.manual_seed(0)
    model = make().double()
    tangents = tangents_of(params_of(model), num_tangents)
    seed_all(2)
    loss = loss_of(model)
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return (
        loss.detach(),
        sum((v * g).reshape(num_tangents, -1).sum(1) for v, g in zip(tangents.values(), grads, strict=True)),
        model,
    )


def by_the_pass(make, num_tangents=2, loss_of=loss_of):
    """Return the same, from the stacked pass."""
    torch.manual_seed(0)
    model = make().double()
    params = params_of(model)
    seed_all(2)
    return *stacked_jvp(ClosureLoss(model, lambda: loss_of(model)), params, tangents_of(params, num_tangents)), model


def assert_as_backprop(make, num_tangents=2, loss_of=loss_of):
    """Compare the pass with backprop, and what both leave in the model."""
    *expected, other = by_backprop(make, num_tangents, loss_of)
    *found, model = by_the_pass(make, num_tangents, loss_of)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    torch.testing.assert_close(model.state_dict(), other.state_dict())
    for buffer, wanted in zip(model.buffers(), other.buffers(), strict=True):
        assert type(buffer) is torch.Tensor
        assert not buffer.requires_grad
        torch.testing.assert_close(buffer, wanted.detach())
    assert torch.is_grad_enabled()
    assert torch._C._is_fwd_grad_enabled()
