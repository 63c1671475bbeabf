"""Recordings: a replay does what the function does."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from fwdlib.stacked.recording import MOST, Recording
from fwdlib.trainer.networks import fully_connected


def test_replays_a_backward_pass_at_other_values_and_shapes():
    model = fully_connected(4, 2, 5, 3).double()
    names = [name for name, _ in model.named_parameters()]
    recording = Recording()

    def gradients(inputs, *values):
        leaves = {name: value.detach().requires_grad_() for name, value in zip(names, values, strict=True)}
        with torch.enable_grad():
            loss = functional_call(model, leaves, (inputs,)).square().sum()
            return torch.autograd.grad(loss, list(leaves.values()))

    calls = []
    for size in (6, 6, 7, 6):
        inputs, values = torch.randn(size, 4).double(), [torch.randn_like(p) for p in model.parameters()]
        with torch.no_grad():
            replayed = recording(lambda *values: calls.append(0) or gradients(*values), inputs, *values)
        torch.testing.assert_close(replayed, gradients(inputs, *values), rtol=0, atol=0)
    assert len(calls) == 2  # one for each size of the batch


def test_recording_is_not_a_call():
    recording, counter = Recording(), torch.zeros(1)

    def count(counter):
        return counter.add_(1), torch.rand(3)

    torch.manual_seed(0)
    drawn = [recording(count, counter)[1] for _ in range(3)]
    torch.manual_seed(0)
    assert counter.item() == 3
    torch.testing.assert_close(drawn, [torch.rand(3) for _ in range(3)], rtol=0, atol=0)


@pytest.mark.parametrize("is_double", [True, False])
def test_a_branch_belongs_in_the_key(is_double):
    recording, x = Recording(), torch.ones(2)

    def maybe_double(x):
        return (2 * x if is_double else x + 0,)

    first = recording(maybe_double, x, key=is_double)
    is_double = not is_double
    assert torch.equal(recording(maybe_double, x, key=is_double)[0], 3 - first[0])
    assert torch.equal(recording(maybe_double, x, key=not is_double)[0], first[0])


def test_a_new_recording_replaces_the_oldest():
    recording, calls = Recording(), []

    def function(x):
        calls.append(x.shape)
        return (x + 1,)

    for key in [*range(MOST + 1), MOST, 0]:
        recording(function, torch.ones(1), key=key)
    assert len(calls) == MOST + 2  # the first recording was dropped and made again


def test_another_layout_is_another_recording():
    recording = Recording()
    wide = torch.arange(48.0).reshape(2, 3, 8)
    for x in (
        wide[:, :, ::2],
        wide[:, :, :4].contiguous(),
        wide[:, :, :4].contiguous().transpose(1, 2),
        wide[:, :, :4],
    ):
        (found,) = recording(lambda x: (x.flatten(1) + 1,), x)
        assert torch.equal(found, x.flatten(1) + 1)


def test_only_calls_that_compute_nothing_are_left_out():
    recording, drawn = Recording(), torch.zeros(2, 3)

    def function(x, drawn):
        drawn.copy_(torch.rand(2, 3))  # does not change the result, but must still run
        torch.rand(5)
        x.new_zeros(4)
        across = x.t()
        return across.t().view(2, 3).unsqueeze(0)[0], across, x.view(3, 2), x.detach().view(6) + torch.rand(6)

    x = torch.randn(2, 3)
    for _ in range(2):
        torch.manual_seed(0)
        expected, expected_drawn = function(x, other := torch.zeros(2, 3)), other
        torch.manual_seed(0)
        found = recording(function, x, drawn)
        assert [(y.shape, y.stride()) for y in found] == [(y.shape, y.stride()) for y in expected]
        assert all(map(torch.equal, (*found, drawn), (*expected, expected_drawn)))
        x = x + 1
