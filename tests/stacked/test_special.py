"""Functions of autograd and of a tensor's memory, called on tensors with tangents."""

import copy

import pytest
import torch
from torch import nn

from tests.stacked.against_backprop import Net, assert_as_backprop, by_the_pass


def frozen_for_a_while(model, h):
    model.c.requires_grad_(False)
    y = model.c(h)
    model.c.requires_grad_(True)
    return y


def asks(model, h):
    answers = torch.is_grad_enabled(), h.requires_grad, model.w.requires_grad, not h.detach().requires_grad
    return h * (2 if all(answers) else 0)


def plain_tape(_, h):
    x = torch.arange(36.0, dtype=h.dtype).view(6, 6).requires_grad_()
    return torch.autograd.grad(x.square().sum(), x, create_graph=True)[0] * h


RIGHT = {
    "what requires a gradient": asks,
    "a layer that is copied": lambda model, h: copy.deepcopy(model.c)(h),
    "requires_grad_": lambda _, h: h.requires_grad_() * 2,
    "retain_grad": lambda _, h: (h.retain_grad(), h * 2)[1],
    "autograd.grad of plain tensors": plain_tape,
    "a parameter that is drawn anew": lambda model, h: h @ nn.init.ones_(model.w),
    "addresses": lambda _, h: (h.data_ptr(), h.untyped_storage(), h.storage_offset(), h * 2)[-1],
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right(name):
    assert_as_backprop(lambda: Net(RIGHT[name]))


def gradient_by_the_input(_, h):
    x = torch.ones(6, 6, dtype=h.dtype, requires_grad=True)
    return torch.autograd.grad((h * x).sum(), x, create_graph=True)[0]


REFUSED = {
    "torch.autograd.grad": gradient_by_the_input,
    "torch.Tensor.backward": lambda _, h: (h.sum().backward(), h)[1],
    "torch.Tensor.register_hook": lambda _, h: (h.register_hook(lambda g: g * 2), h)[1],
    "torch.autograd.functional": lambda _, h: torch.autograd.functional.jacobian(
        lambda z: z.sin().sum(0), h, create_graph=True
    ).sum(1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_tape_is_refused_with_the_way_out(name):
    with pytest.raises(NotImplementedError, match=r"keeps no tape.*engine='torch'"):
        by_the_pass(lambda: Net(REFUSED[name]))


def test_a_layer_that_is_frozen_in_the_pass_gets_no_derivative():
    *expected, _ = by_the_pass(
        lambda: Net(lambda model, h: nn.functional.linear(h, model.c.weight.detach(), model.c.bias.detach()))
    )
    *found, model = by_the_pass(lambda: Net(frozen_for_a_while))
    torch.testing.assert_close(found, expected)
    assert all(p.requires_grad for p in model.parameters())


def test_an_activation_cannot_stop_to_require_a_gradient():
    with pytest.raises(RuntimeError, match=r"x\.detach\(\)"):
        by_the_pass(lambda: Net(lambda _, h: h.requires_grad_(False)))
