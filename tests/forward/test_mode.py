"""Forward mode follows what a model does for reverse mode: the jvp is backprop's gradient along the tangent."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fwdlib.estimators import backprop_gradient, forward_grad_, forward_gradient
from fwdlib.methods.projection import projected_gradient
from fwdlib.objectives import BatchLoss, ClosureLoss, params_of
from tests.stacked.against_backprop import seed_all

BATCH = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3


class Target(nn.Module):
    """A branch under no_grad, as the target network of BYOL."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            target = self.net(x + 0.1)
        return self.head(self.net(x)) - target


class Overwritten(Target):
    """An activation that is changed under no_grad, which backprop does not see."""

    def forward(self, x):
        h = self.net(x)
        with torch.no_grad():
            h.mul_(2)
            with torch.enable_grad():
                h = h + self.head(h)
        return h


class Views(Target):
    """Views that are made under no_grad, of an activation and of a parameter."""

    def forward(self, x):
        h = self.net(x)
        with torch.no_grad():
            seen, (first, *_), weight = h.view(2, -1, 3).flatten(0, 1), h.unbind(1), self.head.weight.t()
        return self.head(h) * seen + (h * first.unsqueeze(1)) @ weight


class Cached(Target):
    """A tensor with tangents, a counter and a list that the model keeps from one pass to the next."""

    def __init__(self):
        super().__init__()
        self.cache, self.count, self.seen = {}, 0, []

    def forward(self, x):
        self.count += 1
        self.seen.append(self.count)
        if "weight" not in self.cache:
            self.cache["weight"] = self.head.weight.tanh()
        return F.linear(self.net(x), self.cache["weight"]) / self.count + len(self.seen)


class Shuffled(nn.Module):
    """Random numbers of Python and of numpy."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.net(x) * random.random()
        return self.head(h) if np.random.rand() < 0.5 else h


class Physics(nn.Module):
    """Derivatives by the input inside the model, by the tape."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        x = x.clone().requires_grad_()
        u = self.net(x)
        (du,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
        return u + du.sum(1, keepdim=True)


class Meta(Physics):
    """A step of gradient descent inside the model, by its own parameters."""

    def forward(self, x):
        weight = self.net[0].weight
        (step,) = torch.autograd.grad(F.linear(x, weight).square().mean(), weight, create_graph=True)
        return self.net[2](F.linear(x, weight - 0.1 * step))


class Functional(Physics):
    """The same by torch.func."""

    def forward(self, x):
        return self.net(x) + torch.func.grad(lambda q: self.net(q).square().sum())(x).sum(1, keepdim=True)


class Directional(Physics):
    """Forward mode inside forward mode."""

    def forward(self, x):
        return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(torch.stack([x, x.flip(0)], 1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.layer = nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(self.layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.up(torch.stack([x, x.flip(0)], 1))).mean(1))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(checkpoint(self.net, x, use_reentrant=False))


class Filled(nn.Module):
    """A plain tensor that is filled piece by piece."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 3)

    def forward(self, x):
        out = x.new_zeros(len(x), 2, 3)
        out[:, 0] = self.cell(torch.cat([x, out[:, 1]], 1)).tanh()
        out[:, 1] = self.cell(torch.cat([x, out[:, 0]], 1)).tanh()
        return out[:, 1]


def shared():
    act = nn.PReLU()
    return nn.Sequential(nn.Linear(5, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 3))


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3))


MODELS = {
    "a target under no_grad": Target,
    "an activation changed under no_grad": Overwritten,
    "views made under no_grad": Views,
    "what a module keeps": Cached,
    "other random numbers": Shuffled,
    "autograd.grad by the parameters": Meta,
    "autograd.grad inside": Physics,
    "torch.func.grad inside": Functional,
    "torch.func.jvp inside": Directional,
    "LSTM": Recurrent,
    "attention": Attention,
    "checkpointing": Checkpointed,
    "filled piece by piece": Filled,
    "a shared module": shared,
    "TorchScript": scripted,
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3)),
    "weight_norm of the whole": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(5, 8), dim=None),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(8, 3), dim=-1),
    ),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Linear(8, 3)),
    "spectral_norm, old": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(5, 8)), nn.Linear(8, 3)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "Dropout": lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 3)),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def state_of(model):
    return {name: id(p) for name, p in model.named_parameters()}, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_jvp_is_the_gradient_along_its_tangent(name, num_tangents, mode):
    model = make(name).train(mode == "train")
    other = copy.deepcopy(model) if name != "TorchScript" else make(name).train(mode == "train")
    params, before = params_of(model), state_of(model)
    draw = torch.Generator().manual_seed(1)
    tangents = {n: torch.randn(num_tangents, *p.shape, generator=draw, dtype=p.dtype) for n, p in params.items()}
    seed_all(2)
    loss = F.cross_entropy(other(BATCH[0]), BATCH[1])
    grads = dict(zip(params, torch.autograd.grad(loss, list(other.parameters()), materialize_grads=True), strict=True))
    seed_all(2)
    objective = ClosureLoss(model, lambda: F.cross_entropy(model(BATCH[0]), BATCH[1]))
    estimate = forward_gradient(
        objective, params, num_tangents=num_tangents, tangents=lambda *_: tangents, engine="torch"
    )
    assert_close(estimate.loss, loss.detach())
    expected = sum((tangents[n] * grads[n]).reshape(num_tangents, -1).sum(1) for n in params)
    assert_close(estimate.jvps, expected, rtol=1e-9, atol=1e-10)
    assert state_of(model) == before
    for (n, buffer), wanted in zip(model.named_buffers(), other.buffers(), strict=True):
        assert type(buffer) is torch.Tensor, n
        assert_close(buffer, wanted.detach(), msg=f"the buffer {n} is not as an ordinary forward pass leaves it")


@pytest.mark.parametrize("name", ["a target under no_grad", "an activation changed under no_grad"])
def test_as_many_tangents_as_parameters_give_the_gradient_of_backprop(name):
    model = make(name)
    objective, params = BatchLoss(model, *BATCH), params_of(model)
    size = sum(p.numel() for p in params.values())
    assert_close(
        projected_gradient(objective, params, num_tangents=size).grads, backprop_gradient(objective, params).grads
    )


def test_parameters_elsewhere_are_taken_as_well():
    model = make("a shared module")
    objective, elsewhere = BatchLoss(model, *BATCH), {n: p + 1 for n, p in params_of(model).items()}
    tangents = {n: torch.ones(2, *p.shape, dtype=p.dtype) for n, p in elsewhere.items()}
    exact = backprop_gradient(objective, elsewhere)
    estimate = forward_gradient(objective, elsewhere, num_tangents=2, tangents=lambda *_: tangents, engine="torch")
    assert_close(estimate.jvps, sum(g.sum() for g in exact.grads.values()).expand(2))
    assert_close(estimate.loss, exact.loss)


class Asking(torch.autograd.Function):
    """A solver that differentiates by those parameters that require a gradient, as an adjoint method does."""

    @staticmethod
    def forward(ctx, layer, x, *params):
        ctx.layer, ctx.x, ctx.params = layer, x, params
        return layer(x)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            return None, None, *torch.autograd.grad(ctx.layer(ctx.x), ctx.params, g)


def test_a_solver_that_asks_which_parameters_require_a_gradient_loses_none():
    model = nn.Linear(5, 3).double()

    def closure():
        params = [p for p in model.parameters() if p.requires_grad]
        assert len(params) == 2
        return Asking.apply(model, BATCH[0], *params).square().mean()

    objective, params = ClosureLoss(model, closure), params_of(model)
    tangents = {n: torch.ones(1, *p.shape, dtype=p.dtype) for n, p in params.items()}
    exact = backprop_gradient(objective, params).grads
    estimate = forward_gradient(objective, params, tangents=lambda *_: tangents, engine="torch")
    assert_close(estimate.jvps, sum(g.sum() for g in exact.values()).reshape(1))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"num_tangents": 3, "tangents": "normal"}, {"engine": "torch"}])
def test_forward_grad_fills_the_gradients_of_any_model(options):
    model = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Bilinear(5, 5, 3)}).double()
    batch = {"one": BATCH[0], "two": BATCH[0].flip(0), "targets": BATCH[1]}

    def closure():
        logits = model["a"](batch["one"]) + model["b"](batch["one"], batch["two"])
        return F.cross_entropy(logits, batch["targets"])

    draw = torch.Generator().manual_seed(0)
    loss = forward_grad_(model, closure, generator=draw, **options)
    assert not loss.requires_grad
    assert_close(loss, closure().detach())
    draw.manual_seed(0)
    estimate = forward_gradient(ClosureLoss(model, closure), params_of(model), generator=draw, **options)
    assert_close({n: p.grad for n, p in model.named_parameters()}, dict(estimate.grads))


class HookedAtFirst(nn.Module):
    """Registers a hook in its first pass, and remembers that it has, as models that record their outputs do."""

    def __init__(self):
        super().__init__()
        self.layer, self.hooked = nn.Linear(5, 3).double(), False

    def forward(self, x):
        if not self.hooked:
            self.layer.register_forward_hook(lambda module, args, output: output * 2)
            self.hooked = True
        return self.layer(x)


def test_a_hook_that_the_first_pass_registers_is_there_once():
    torch.manual_seed(0)
    model = HookedAtFirst()
    objective = BatchLoss(model, *BATCH)
    size = sum(p.numel() for p in model.parameters())
    estimate = projected_gradient(objective, params_of(model), num_tangents=size, chunk_size=1)
    assert len(model.layer._forward_hooks) == 1
    torch.testing.assert_close(dict(estimate.grads), dict(backprop_gradient(objective, params_of(model)).grads))
