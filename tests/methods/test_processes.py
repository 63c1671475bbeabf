"""The processes against what they are published or documented to be."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.estimators import backprop_gradient
from fwdlib.methods import tinynet
from fwdlib.methods.process import ProcessLoss
from fwdlib.methods.processes import (
    RECURRENT,
    lorenz,
    lotka_volterra,
    reaction_diffusion,
    recurrent_layer,
    recurrent_parameters,
    runge_kutta,
    training,
)
from fwdlib.methods.sensitivity import online_gradient, sensitivity_gradient

DOUBLE = torch.float64


def test_runge_kutta_is_of_order_four():
    errors = []
    for num_steps in (10, 20):
        step, z = runge_kutta(lambda z, p: -p["rate"] * z, 1 / num_steps), torch.ones((), dtype=DOUBLE)
        for _ in range(num_steps):
            z = step(z, {"rate": torch.tensor(2.0, dtype=DOUBLE)})
        errors.append(abs(z.item() - torch.exp(torch.tensor(-2.0, dtype=DOUBLE)).item()))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.15)


def test_lotka_volterra_keeps_its_invariant():
    params = {k: torch.tensor(v, dtype=DOUBLE) for k, v in {"a": 0.55, "b": 0.028, "c": 0.8, "d": 0.024}.items()}

    def invariant(x, y):
        return params["d"] * x - params["c"] * x.log() + params["b"] * y - params["a"] * y.log()

    state = before = torch.tensor(30.0, dtype=DOUBLE), torch.tensor(4.0, dtype=DOUBLE)
    step = runge_kutta(lotka_volterra, 0.01)
    for _ in range(1000):
        state = step(state, params)
    torch.testing.assert_close(invariant(*state), invariant(*before), rtol=1e-7, atol=0)


def test_lorenz_rests_where_it_should():
    rho, root = torch.tensor(28.0, dtype=DOUBLE), torch.tensor(8 / 3 * 27, dtype=DOUBLE).sqrt()
    slope = lorenz((root, root, rho - 1), {"rho": rho})
    torch.testing.assert_close(torch.stack(slope), torch.zeros(3, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_a_wave_decays_and_moves_as_the_equation_says():
    # A small wave of one frequency on a level u = 0: growth r - k, diffusion, flow.
    size, num_steps, h = 64, 200, 0.01
    k = 2 * torch.pi / size
    x = torch.arange(size, dtype=DOUBLE)
    values = {"D": 0.8, "cx": 1.5, "cy": 0.0, "r": 0.3, "k": 0.1}
    params = {name: torch.tensor(value, dtype=DOUBLE) for name, value in values.items()}
    u, step = 1e-6 * torch.sin(k * x).expand(size, size), reaction_diffusion(h)
    for _ in range(num_steps):
        u = step(u, params)
    time = num_steps * h
    growth = 0.2 - 0.8 * 2 * (1 - torch.cos(torch.tensor(k)))
    expected = 1e-6 * torch.exp(growth * time) * torch.sin(k * x - 1.5 * torch.sin(torch.tensor(k)) * time)
    torch.testing.assert_close(u[0], expected, rtol=0, atol=5e-9)


def test_training_is_that_of_torchs_sgd():
    draw = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(7, 5, 3, generator=draw, dtype=DOUBLE), torch.randint(0, 2, (7, 5), generator=draw)
    model = nn.Linear(3, 2, dtype=DOUBLE)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(w, x, y):
        return F.cross_entropy(F.linear(x, w["weight"], w["bias"]), y)

    process = training(loss, weights, inputs, targets, lambda w: loss(w, inputs[0], targets[0]))
    values = {"rate": 0.2, "momentum": 0.7, "decay": 0.03}
    params = {name: torch.tensor(value, dtype=DOUBLE) for name, value in values.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.7, weight_decay=0.03)
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(process(params), F.cross_entropy(model(inputs[0]), targets[0]).detach())
    found, exact = sensitivity_gradient(process, params, compiled=False), backprop_gradient(process, params)
    torch.testing.assert_close(found.grads, exact.grads, rtol=1e-12, atol=1e-14)


def test_the_derivative_goes_forward_through_backprop_from_scratch():
    # tinynet's backward pass is a program like any other: duals go through it, and its gradients are filled with them.
    draw = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(6, 5, 3, generator=draw, dtype=DOUBLE),
        torch.randn(6, 5, 2, generator=draw, dtype=DOUBLE),
    )
    net = tinynet.Sequential(
        tinynet.Linear(3, 4, generator=draw, dtype=DOUBLE),
        tinynet.Tanh(),
        tinynet.Linear(4, 2, generator=draw, dtype=DOUBLE),
    )
    weights = {name: p.clone() for name, p in net.params.items()}

    def of(w):
        copy, criterion = deepcopy(net), tinynet.MSELoss()
        for name, p in w.items():
            layer, _, key = name.partition(".")
            copy.layers[int(layer)].params[key] = p
        return copy, criterion

    def step(w, p, batch):
        copy, criterion = of(w)
        criterion(copy(batch[0]), batch[1])
        copy.backward(criterion.backward())
        return {name: w[name] - p["rate"] * copy.grads[name] for name in w}

    def loss(w, p):
        copy, criterion = of(w)
        return criterion(copy(inputs[0]), targets[0])

    def by_autograd(w, x, y):
        return F.mse_loss(F.linear(torch.tanh(F.linear(x, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"]), y)

    rate = {"rate": torch.tensor(0.1, dtype=DOUBLE)}
    process = ProcessLoss(step, weights, loss, 6, inputs=(inputs, targets))
    found = sensitivity_gradient(process, rate, compiled=False)
    twin = training(by_autograd, weights, inputs, targets, lambda w: by_autograd(w, inputs[0], targets[0]))
    others = {"momentum": torch.zeros((), dtype=DOUBLE), "decay": torch.zeros((), dtype=DOUBLE)}
    exact = backprop_gradient(twin, rate | others)
    torch.testing.assert_close(found.loss, exact.loss)
    torch.testing.assert_close(found.grads["rate"], exact.grads["rate"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("every", [None, 4])
def test_the_recurrent_layer_is_differentiated_while_the_sequence_comes_in(every):
    draw = torch.Generator().manual_seed(0)
    sequences, targets = torch.rand(10, 6, generator=draw, dtype=DOUBLE), torch.randint(0, 3, (6,), generator=draw)
    process = recurrent_layer(sequences, targets, 8, every=every)
    params = recurrent_parameters(8, 3, draw, DOUBLE)
    found = online_gradient(process, params, elementwise=RECURRENT, compiled=False)
    exact = backprop_gradient(process, params)
    torch.testing.assert_close(found.loss, exact.loss)
    torch.testing.assert_close(found.grads, exact.grads, rtol=1e-12, atol=1e-14)
