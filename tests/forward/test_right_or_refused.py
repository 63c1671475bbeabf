"""What models do to tape, grad mode, memory and state, in every engine: backprop's numbers, or a refusal."""

from __future__ import annotations

import collections
import contextlib
import random
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fwdlib.estimators import forward_grad_, forward_gradient
from fwdlib.objectives import ClosureLoss, params_of
from tests.stacked.against_backprop import Net, loss_of, seed_all, tangents_of

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


def momentum_by_data(model, h):
    model.frozen.data.mul_(0.5).add_(model.w.data, alpha=0.5)
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


def memo(model, h):
    """What a model computes once, and keeps where a later pass finds it."""
    if not hasattr(model, "position"):
        model.register_buffer("position", model.w * 2)
    if "k" not in model.state.kept["inner"]:
        model.state.kept["inner"]["k"] = model.w * 3
    if not hasattr(model.c, "length"):
        model.c.length = model.c.weight.norm()
    return h @ model.position + h @ model.state.kept["inner"]["k"] / model.c.length


KEPT = weakref.WeakKeyDictionary()


def memo_outside(model, h):
    if model not in KEPT:
        KEPT[model] = model.w * 2
    return h @ KEPT[model]


def states(model, h):
    """Everything that a model may count or draw from."""
    state = model.state
    state.n += 1
    state.kept["list"].append(state.n)
    model.queue.append(state.n)
    state.array += 1
    model.drop.p *= 0.5
    model.add_module(f"l{len(model._modules)}", nn.Identity())
    drawn = torch.rand((), generator=state.generator, dtype=h.dtype) + state.numbers.random() + state.python.random()
    return h * drawn * state.n * float(state.array.sum()) * random.random() * np.random.rand() + model.drop.p


def refused_by_stacked(body):
    """After a body, what the stacked engine refuses, so that ``auto`` runs the model again."""
    return lambda model, h: torch.func.vmap(lambda row: row * 2)(body(model, h))


def caught(model, h):
    try:
        return h * 2 if h.grad_fn is not None else h
    except RuntimeError:
        return h * 5


def caught_hook(model, h):
    y = h + HELD
    with contextlib.suppress(Exception):
        y.register_hook(lambda g: 2 * g)
    return y


def caught_transform(model, h):
    try:
        return torch.func.vmap(lambda row: row * 2)(h)
    except Exception:
        return h


def in_thread(model, h):
    found = {}
    thread = threading.Thread(target=lambda: found.update(y=h.tanh() * 2))
    thread.start()
    thread.join()
    return found["y"] + 1


def own_dual_level(model, h):
    with forward_ad.dual_level():
        return h * forward_ad.unpack_dual(forward_ad.make_dual(h.detach(), h.detach()).sin()).tangent


class Logged(torch.autograd.Function):
    """Writes into a list, and draws random numbers in its backward pass."""

    @staticmethod
    def forward(ctx, x, log):
        log.append(1)
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * 2 + 0 * torch.rand_like(g), None


def logged(model, h):
    return Logged.apply(h, model.state.kept["list"]) * len(model.state.kept["list"]) * torch.rand(())


bound = Logged.apply


@torch.jit.script
def script(x: torch.Tensor):
    with torch.no_grad():
        y = x * 2
    return y * x


@torch.jit.script
def asking_script(x: torch.Tensor):
    if x.requires_grad:
        return x * 2
    return x


class State:
    """What a module may hold that is no tensor."""

    def __init__(self):
        self.n = 1
        self.kept = {"inner": {}, "list": []}
        self.array = np.ones(2)
        self.generator = torch.Generator().manual_seed(5)
        self.numbers = np.random.default_rng(5)
        self.python = random.Random(5)

    def __eq__(self, other):
        return (self.n, self.kept["list"], self.array.tolist()) == (other.n, other.kept["list"], other.array.tolist())

    __hash__ = None


BODIES = {
    "kept from the first pass": memo,
    "kept outside the model": memo_outside,
    "states": states,
    "states, and the other engine": refused_by_stacked(states),
    "a refusal that the model catches": caught,
    "a hook that the model tries": caught_hook,
    "a transform that the model tries": caught_transform,
    "a thread": in_thread,
    "a function that writes into a list, and draws in its backward pass": logged,
    "a bound function": lambda model, h: bound(h, []),
    "a script with no_grad": lambda model, h: script(h),
    "a script that asks for a tape": lambda model, h: asking_script(h),
    "a Parameter of an activation": lambda model, h: h * nn.Parameter(h),
    "torch.func.linearize": lambda model, h: torch.func.linearize(torch.sin, h)[1](h),
    "forward AD of its own": own_dual_level,
    "torch.cond": lambda model, h: torch.cond(h.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (h,)),
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
    "more views of an expanded tensor": lambda model, h: (
        h[:1].expand(6, 6).select(0, 3)
        + h * (torch.einsum("ij->ji", h[:1].broadcast_to(6, 6)).diagonal() + model.w[:1].expand(6, 6).swapdims(0, 1))
    ),
    "a view of an expanded tensor, written into": write_into_expanded,
    "a product of an expanded tensor": lambda model, h: torch.einsum("bi,ci->bc", model.w[:1].expand(6, 6), h),
    "detach_, then a view": detached_in_place,
    "a view after detach_": written_after_detach,
    "a subclass filled": filled_subclass,
    "checkpoints in a checkpoint": nested_checkpoints,
    "a momentum encoder": momentum,
    "a momentum encoder by .data": momentum_by_data,
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
        "a momentum encoder by .data",
        "kept outside the model",
        "a refusal that the model catches",
        "a hook that the model tries",
        "a bound function",
        "a script with no_grad",
        "a script that asks for a tape",
        "torch.cond",
        "torch.func.linearize",
        "forward AD of its own",
        "a state that is no tensor",
        "a hook of an activation",
        "a hook of a module, for a while",
        "in place, without a forward derivative",
        "a weighted l1_loss",
    },
    "stacked": {
        "a refusal that the model catches",
        "a hook that the model tries",
        "a transform that the model tries",
        "states, and the other engine",
        "a thread",
        "a bound function",
        "a script with no_grad",
        "a script that asks for a tape",
        "a Parameter of an activation",
        "torch.cond",
        "torch.func.linearize",
        "forward AD of its own",
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
    model.state, model.drop = State(), nn.Dropout(0.5)
    if name == "parameters frozen before":
        model.c.requires_grad_(False)
    return model.double()


@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:The .grad attribute", "ignore:Attempted to insert")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("engine", ["torch", "stacked", "auto"])
@pytest.mark.parametrize("name", BODIES)
def test_the_derivative_is_backprops_or_refused(name, engine, num_tangents):
    other, model = make(name), make(name)
    params = params_of(model)
    tangents = tangents_of(params, num_tangents)
    seed_all(3)
    loss = loss_of(other)
    following = torch.rand(3), random.random(), np.random.rand()
    loss.backward()
    own = dict(other.named_parameters())
    expected = sum((v * own[n].grad).flatten(1).sum(1) for n, v in tangents.items() if own[n].grad is not None)
    refusal = None
    seed_all(3)
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
    assert (model.queue, model.state) == (other.queue, other.state)
    assert [*dict(model.named_modules())] == [*dict(other.named_modules())]
    assert_close((torch.rand(3), random.random(), np.random.rand()), following)


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
