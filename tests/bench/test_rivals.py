"""Rivals take the steps that they are said to take."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fwdlib.bench.compared import find_task, perceptron, prepare
from fwdlib.bench.rivals import CHECKPOINTS, OPTIMIZERS, in_backward, parts_of, segments_of, two_point


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=draw), torch.randint(3, (6,), generator=draw)


def after_backprop(model, inputs, targets, optimizer, steps=2):
    model = copy.deepcopy(model)
    optimizer = optimizer(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_updates_inside_the_backward_pass_are_those_after_it(name, batch):
    model = perceptron(4, 8, 8, 8, 3)
    expected = after_backprop(model, *batch, lambda params: torch.optim.SGD(params, 0.1))
    step = in_backward(model, *batch, 0.1, name)
    for _ in range(2):
        step()
    torch.testing.assert_close(list(model.parameters()), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_parameter_has_an_optimizer_of_its_own(optimizer, batch):
    model = perceptron(4, 8, 3)
    expected = after_backprop(model, *batch, lambda params: OPTIMIZERS[optimizer](params, lr=0.1))
    step = in_backward(model, *batch, 0.1, optimizer=optimizer)
    for _ in range(2):
        step()
    torch.testing.assert_close(list(model.parameters()), expected)


def test_a_part_begins_with_parameters_and_segments_hold_all_parts():
    model = perceptron(4, 8, 8, 8, 3)
    assert [len(part) for part in parts_of(model)] == [2, 2, 2, 1]
    for num_segments in (1, 2, 3, 4):
        segments = segments_of(model, num_segments)
        assert len(segments) == num_segments
        assert [m for s in segments for part in s for m in part] == list(model)


def test_two_point_moves_along_one_direction_by_the_slope(batch):
    model = perceptron(4, 8, 3).double()
    inputs, targets = batch[0].double(), batch[1]
    before = [p.detach().clone() for p in model.parameters()]
    gradient = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))
    loss = two_point(model, inputs, targets, 1e-3)()
    change = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    # -rate (g . z) z: along g it is -rate (g . z)^2, and its length is rate |g . z| |z|
    along = sum((c * g).sum() for c, g in zip(change, gradient, strict=True))
    assert along < 0
    draw = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0))))
    z = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in before]
    slope = sum((a * g).sum() for a, g in zip(z, gradient, strict=True))
    for c, direction in zip(change, z, strict=True):
        torch.testing.assert_close(c, -1e-3 * slope * direction, rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(loss, F.cross_entropy(_with(model, before)(inputs), targets), rtol=1e-3, atol=0)


def _with(model, values):
    model = copy.deepcopy(model)
    for p, value in zip(model.parameters(), values, strict=True):
        p.data = value
    return model


@pytest.mark.parametrize("name", ["vit", "gpt", "resnet18", "mobilenet-v3"])
def test_networks_are_chains_that_train_in_backward_with_checkpoints(name):
    model, inputs, targets = prepare(find_task(name), batch=2)
    assert len(parts_of(model)) > 3
    before = [p.detach().clone() for p in model.parameters()]
    step = in_backward(model, inputs, targets, 0.1, "√L checkpoints")
    losses = [step(), step()]  # torchvision's transformer begins with a head of zeros, so only that changes at first
    assert torch.stack(losses).isfinite().all()
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert sum(changed) >= 0.8 * len(changed)
