"""What models do to tape, grad mode, memory and state, in every engine: backprop's numbers, or a refusal."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fwdlib.estimators import forward_grad_, forward_gradient
from fwdlib.objectives import ClosureLoss, params_of
from tests.stacked.against_backprop import Net, loss_of, tangents_of

HELD = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)


def by_gradient(model, h):
    """A gradient without a graph is a constant (VAT)."""
    x = h.detach().clone().requires_grad_()
    return model.c(h + torch.autograd.grad(model.c(x).square().sum(), x)[0])


def with_graph(model, h):
    x = h.detach().clone().requires_grad_()
    return model.c(h + torch.autograd.grad(model.c(x).square().sum(), x, create_graph=True)[0])


def under_no_grad(model, h):
    with torch.no_grad():
        slope = torch.func.grad(lambda z: (z**3).sum())(h)
    return h * slope


def in_inference_mode(model, h):
    with torch.inference_mode():
        seen = h.view(36)
    return h * seen.clone().view(6, 6)


def frozen_for_a_while(model, h):
    model.c.requires_grad_(False)
    y = model.c(h)
    model.c.requires_grad_(True)
    return y + model.c(h)


def frozen_before(model, h):
    y = model.c(h)
    model.c.requires_grad_(True)
    return y


def expanded(write):
    def body(model, h):
        y = h[:1].expand(6, 6).contiguous()
        write(y)
        return h + y

    return body


def write_into_expanded(model, h):
    y = h[:1].clone().expand(2, 6).select(0, 1)
    first = h[:1] * 1
    row = first.expand(2, 6).select(0, 1)
    row.mul_(2)
    return h + y + first


def detached_in_place(model, h):
    y = h * 1
    y.detach_()
    first = y[0]
    y += h
    return h + first


def written_after_detach(model, h):
    y = h * 1
    y.detach_()
    y[0].add_(h[1])
    return h * y


class Subclass(torch.Tensor):
    pass


def filled_subclass(model, h):
    y = torch.zeros_like(h.detach()).as_subclass(Subclass)
    y.copy_(h)
    return (y * 2).as_subclass(torch.Tensor)


def nested_checkpoints(model, h):
    inner = lambda z: checkpoint(model.c, z, use_reentrant=False).tanh()  # noqa: E731
    return checkpoint(inner, h, use_reentrant=False) @ model.w


def momentum(model, h):
    with torch.no_grad():
        model.frozen.mul_(0.5).add_(model.w, alpha=0.5)
    return h @ model.frozen


def deque(model, h):
    model.queue.append(model.queue[-1] * 1.5)
    return h * model.queue[-1]


def hooked_activation(model, h):
    y = h + HELD
    y.register_hook(lambda g: 2 * g)
    return y


def hooked_module(model, h):
    handle = model.c.register_full_backward_pre_hook(lambda module, g: (2 * g[0],))
    try:
        return model.c(h)
    finally:
        handle.remove()


def reduced_in_place(model, h):
    return (h * 1).index_reduce_(0, torch.tensor([0, 0]), h[:2], "mean")


def retained(model, h):
    h.retain_grad()
    return h


BODIES = {
    "autograd.grad without a graph": by_gradient,
    "autograd.grad with a graph": with_graph,
    "torch.func.grad under no_grad": under_no_grad,
    "a view made in inference mode": in_inference_mode,
    "asks whether an activation requires a gradient": lambda model, h: h * 2 if h.requires_grad else h,
    "asks whether an activation is a leaf": lambda model, h: h * 2 if h.is_leaf else h,
    "asks whether an activation has a tape": lambda model, h: h if h.grad_fn is None else h * 2,
    "parameters frozen for a while": frozen_for_a_while,
    "parameters frozen before": frozen_before,
    "an entry of an expanded tensor's copy": expanded(lambda y: y[0].zero_()),
    "a part of an expanded tensor's copy": expanded(lambda y: y[:, 2:4].mul_(3)),
    "an expanded tensor's copy": expanded(lambda y: y.mul_(2)),
    "a copy of overlapping windows": lambda model, h: F.pad(h.unfold(1, 2, 1).contiguous().mul_(2).sum(2), (1, 0)),
    "a function without a rule of an expanded tensor": lambda model, h: h + h[:1].expand(6, 6).erf().cumsum(0),
    "views of an expanded tensor": lambda model, h: (
        h * h[:1].expand(6, 6).expand_as(h) + h[:, 1:2].expand(6, 6).movedim(0, 1).adjoint().narrow(0, 1, 1)
    ),
    "more views of an expanded tensor": lambda model, h: h[:1].expand(6, 6).select(0, 3) + h * (
        torch.einsum("ij->ji", h[:1].broadcast_to(6, 6)).diagonal() + model.w[:1].expand(6, 6).swapdims(0, 1)
    ),
    "a view of an expanded tensor, written into": write_into_expanded,
    "a product of an expanded tensor": lambda model, h: torch.einsum("bi,ci->bc", model.w[:1].expand(6, 6), h),
    "detach_, then a view": detached_in_place,
    "a view after detach_": written_after_detach,
    "a subclass filled": filled_subclass,
    "checkpoints in a checkpoint": nested_checkpoints,
    "a momentum encoder": momentum,
    "a state that is no tensor": deque,
    "a hook of an activation": hooked_activation,
    "a hook of a module, for a while": hooked_module,
    "in place, without a forward derivative": reduced_in_place,
    "retain_grad": retained,
    "requires_grad_ of an activation": lambda model, h: (h * 1).requires_grad_().mul_(2),
    "PReLU at 0": lambda model, h: F.prelu((h - h.detach()) * model.c(h), torch.tensor([0.25], dtype=h.dtype)),
    "a weighted l1_loss": lambda model, h: h * F.l1_loss(h, h.detach() * 0, weight=model.w.detach().abs()),
    "all classes ignored": lambda model, h: (
        h
        + F.cross_entropy(h, torch.full((6,), -100)).nan_to_num()
        + F.cross_entropy(h, torch.full((6,), -100), label_smoothing=0.1).nan_to_num()
    ),
    "amax without self": lambda model, h: h.scatter_reduce(
        0, torch.zeros(6, 6, dtype=torch.long), h, "amax", include_self=False
    ),
    "numpy by force": lambda model, h: h * float(h.numpy(force=True).sum()),
}
REFUSED = {
    # by an engine, some of them for several tangents alone
    "torch": {
        "asks whether an activation has a tape",
        "parameters frozen for a while",
        "a momentum encoder",
        "a state that is no tensor",
        "a hook of an activation",
        "a hook of a module, for a while",
        "in place, without a forward derivative",
        "a weighted l1_loss",
    },
    "stacked": {
        "a view of an expanded tensor, written into",
        "autograd.grad without a graph",
        "autograd.grad with a graph",
        "torch.func.grad under no_grad",
        "asks whether an activation has a tape",
        "a subclass filled",
        "a hook of an activation",
        "a hook of a module, for a while",
        "a weighted l1_loss",
    },
}


def make(name):
    torch.manual_seed(0)
    model = Net(BODIES[name])
    model.frozen = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    model.queue = collections.deque([1.0])
    if name == "parameters frozen before":
        model.c.requires_grad_(False)
    return model.double()


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("engine", ["torch", "stacked", "auto"])
@pytest.mark.parametrize("name", BODIES)
def test_the_derivative_is_backprops_or_refused(name, engine, num_tangents):
    other, model = make(name), make(name)
    params = params_of(model)
    tangents = tangents_of(params, num_tangents)
    loss = loss_of(other)
    loss.backward()
    own = dict(other.named_parameters())
    expected = sum((v * own[n].grad).flatten(1).sum(1) for n, v in tangents.items() if own[n].grad is not None)
    refusal = None
    try:
        found = forward_gradient(
            ClosureLoss(model, lambda: loss_of(model)),
            params,
            num_tangents=num_tangents,
            tangents=lambda *_: tangents,
            engine=engine,
        )
    except NotImplementedError as error:
        refusal = error
    if refusal is not None:
        assert name in REFUSED["torch"] | REFUSED["stacked"], refusal
        assert engine == "auto" or name in REFUSED[engine], refusal
        return
    assert_close(found.loss, loss.detach())
    assert_close(found.jvps, expected, rtol=1e-9, atol=1e-10)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    assert_close(dict(model.named_parameters()), own)
    assert model.queue == other.queue


def test_a_hook_of_all_modules_is_refused():
    model = nn.Linear(2, 1)
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        with pytest.raises(NotImplementedError, match="for all modules"):
            forward_grad_(model, lambda: model(torch.ones(1, 2)).sum())
    finally:
        handle.remove()


def test_learned_queries_for_each_example_train_by_default():
    queries, layer = nn.Parameter(torch.randn(1, 4, 8)), nn.Linear(8, 8)
    model, x = nn.ParameterDict({"queries": queries}), torch.randn(5, 6, 8)
    model.layer = layer
    forward_grad_(
        model,
        lambda: torch.einsum("bqd,bkd->bqk", queries.expand(5, -1, -1), layer(x)).square().mean(),
    )
    assert queries.grad.shape == queries.shape
