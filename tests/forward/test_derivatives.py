"""Derivatives of functions with several results along several tangents."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fwdlib.estimators import forward_grad_, forward_gradient
from fwdlib.forward.derivatives import pushforward, repeated_pushforward, unrolled_pushforward
from fwdlib.objectives import ClosureLoss, params_of


def test_all_ways_to_push_tangents_forward_give_the_same():
    draw = torch.Generator().manual_seed(0)
    point = {"x": torch.rand(4, generator=draw), "a": torch.rand((), generator=draw), "unused": torch.ones(2)}
    tangents = {name: torch.randn(3, *x.shape, generator=draw) for name, x in point.items()}
    count = torch.tensor([1, 2])

    def function(some):
        return [some["x"].sin() * some["a"], some["a"].exp(), some["x"].detach()], [count + 1]

    values, slopes, others = pushforward(function, point, tangents)
    every = [tuple(point)] * 3
    for found in (
        repeated_pushforward(function, point, tangents),
        unrolled_pushforward(function, point, tangents, every),
    ):
        torch.testing.assert_close(found, (values, slopes, others))
    torch.testing.assert_close(
        slopes[0][1], point["x"].cos() * tangents["x"][1] * point["a"] + values[0] / point["a"] * tangents["a"][1]
    )


class Half(torch.autograd.Function):
    """In the old form, which no transform of torch.func takes."""

    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, g):
        return g / 2


FUNCTIONS = {
    # of parameters a (3,) and b (2, 2), with what vmap, a dual level or a missing tape stops
    "asks for a tape": lambda p: p["a"].sum() if (p["a"] * 2).requires_grad else p["b"].sum(),
    "torch.func.jvp": lambda p: torch.func.jvp(lambda x: (x * p["a"]) ** 3, (p["a"],), (p["a"],))[1].sum(),
    "autograd.grad": lambda p: torch.autograd.grad((p["b"] ** 3).sum(), p["b"], create_graph=True)[0].sum(),
    "numpy": lambda p: p["a"].sum() * float(p["b"].detach().numpy().sum()),
    "a function in the old form": lambda p: Half.apply(p["b"]).square().sum(),
    "a copy": lambda p: (copy.deepcopy(p["a"]).detach() * p["a"]).sum(),
    "filled piece by piece": lambda p: filled(p).square().sum(),
}


def filled(p):
    y = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        y[i] = p["a"][i] * p["b"].sum()
    return y


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_functions(name, engine, num_tangents):
    draw = torch.Generator().manual_seed(0)
    point = {"a": torch.randn(3, generator=draw).double(), "b": torch.randn(2, 2, generator=draw).double()}
    tangents = {n: torch.randn(num_tangents, *p.shape, generator=draw).double() for n, p in point.items()}
    leaves = {n: p.clone().requires_grad_() for n, p in point.items()}
    loss = FUNCTIONS[name](leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    expected = sum((v * g).flatten(1).sum(1) for v, g in zip(tangents.values(), grads, strict=True))
    found = forward_gradient(
        FUNCTIONS[name], point, num_tangents=num_tangents, tangents=lambda *_: tangents, engine=engine
    )
    assert_close((found.loss, found.jvps), (loss.detach(), expected))


def test_what_was_computed_from_parameters_before_the_pass_is_refused():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    before = layer.weight * 2
    objective = ClosureLoss(layer, lambda: (layer(x) @ before).sum())
    for num_tangents in (1, 2):
        with pytest.raises(NotImplementedError, match="'weight' before the pass"):
            forward_gradient(objective, params_of(layer), num_tangents=num_tangents, tangents="normal", engine="torch")


def test_a_frozen_parameter_may_be_among_those_of_the_estimate():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    model[0].requires_grad_(False)
    params = {name: p.detach() for name, p in model.named_parameters()}
    objective = ClosureLoss(model, lambda: model(torch.ones(1, 2).double()).sum())
    same = {n: torch.randn(3, *p.shape, generator=torch.Generator().manual_seed(1)).double() for n, p in params.items()}
    one, other = (
        forward_gradient(objective, params, num_tangents=3, tangents=lambda *_: same, engine=engine)
        for engine in ("torch", "stacked")
    )
    assert_close(one.jvps, other.jvps)


class Frozen(dict):
    """A dict that nobody may change."""

    def update(self, *_, **__):
        raise TypeError("frozen")


def test_what_a_pass_does_not_change_is_left_alone():
    model = nn.Linear(2, 1)
    model.config, model.masks = Frozen(size=1), [torch.eye(2).to_sparse()]
    forward_gradient(
        ClosureLoss(model, lambda: model(torch.ones(1, 2)).sum()), params_of(model), num_tangents=2, engine="torch"
    )
    assert model.config == {"size": 1}


def test_a_parameter_whose_entries_share_memory_is_refused():
    model = nn.Module()
    model.p = nn.Parameter(torch.ones(1, 3).expand(2, 3))
    with pytest.raises(NotImplementedError, match="'p' share memory"):
        forward_grad_(model, lambda: model.p.square().sum(), engine="torch")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_returned(value):
    layer = nn.Linear(2, 1)
    objective = ClosureLoss(layer, lambda: layer(torch.full((1, 2), value)).sum())
    found = forward_gradient(objective, params_of(layer), num_tangents=3, tangents="normal", engine="torch")
    assert not found.loss.isfinite()
