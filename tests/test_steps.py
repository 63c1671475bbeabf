import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.estimators import forward_grad_
from fwdlib.stacked.gradients import Gradients
from fwdlib.steps import forward_step_

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD, maximize": partial(torch.optim.SGD, lr=0.1, maximize=True),
    "SGD, weight decay": partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "SGD, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, a tensor as rate": lambda params: torch.optim.SGD(params, lr=torch.tensor(0.1)),
    "Adam": partial(torch.optim.Adam, lr=0.01, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
}
TANGENTS = {
    "rank-one": {},
    "rank-one, K = 3": {"num_tangents": 3},
    "activity": {"tangents": "activity", "num_examples": 5},
    "normal": {"tangents": "normal"},
    "by blocks": {"tangents": "normal", "blocks": "parameter"},
}


class Tied(nn.Module):
    """One weight in two places, and one parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs)))


MODELS = {
    "MLP": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
    "tied": Tied,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten()),
}


@pytest.fixture
def made(request):
    torch.manual_seed(0)
    model = MODELS[getattr(request, "param", "MLP")]().double()
    inputs, targets = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    return model, lambda of: lambda: F.cross_entropy(of(inputs), targets)


def by_hand(model, closure, optimizer, **how):
    loss = forward_grad_(model, closure, **how)
    optimizer.step()
    return loss


def both(made, optimizer, *, before=lambda model, optimizer: None, between=lambda model, step: None, steps=4, **how):
    """Take the same steps in both ways, and return the models."""
    models = []
    for step in (by_hand, forward_step_):
        model = copy.deepcopy(made[0])
        of = optimizer(model) if optimizer.__name__ == "of_model" else optimizer(model.parameters())
        before(model, of)
        generator = torch.Generator().manual_seed(1)
        for i in range(steps):
            step(model, made[1](model), of, generator=generator, **how)
            between(model, i)
        models.append(model)
    return models


def assert_alike(models, start):
    states = [dict(model.named_parameters()) for model in models]
    for name, p in states[0].items():
        torch.testing.assert_close(states[1][name], p, rtol=1e-10, atol=1e-12)
    assert any(not torch.equal(p, start.get_parameter(name)) for name, p in states[0].items())


@pytest.mark.parametrize("made", MODELS, indirect=True)
@pytest.mark.parametrize("tangents", TANGENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_that_of_the_optimizer_with_the_gradient_in_grad(made, optimizer, tangents):
    make = OPTIMIZERS[optimizer]
    assert_alike(both(made, lambda params: make(params), **TANGENTS[tangents]), made[0])


def test_plain_sgd_writes_no_gradient_out_and_others_write_over_the_last(made, monkeypatch):
    model, closure = made[0], made[1](made[0])
    sgd, adam = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model.parameters())
    with monkeypatch.context() as patched:
        patched.setattr(Gradients, "__getitem__", None)
        forward_step_(model, closure, sgd, num_tangents=2)
    assert all(p.grad is None for p in model.parameters())
    forward_step_(model, closure, adam)
    kept = [p.grad for p in model.parameters()]
    before = [grad.clone() for grad in kept]
    forward_step_(model, closure, adam)
    for p, grad, value in zip(model.parameters(), kept, before, strict=True):
        assert p.grad is grad
        assert not torch.equal(grad, value)


class Scaled(nn.Module):
    """A layer with a temperature, a parameter without axes, and a bias that is broadcast."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)
        self.scale, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return self.scale * F.linear(inputs, self.layer.weight, self.bias)


@pytest.mark.parametrize("tangents", TANGENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_of_all_shapes(made, optimizer, tangents):
    torch.manual_seed(0)
    model = Scaled().double()
    make = OPTIMIZERS[optimizer]
    assert_alike(both((model, made[1]), lambda params: make(params), **TANGENTS[tangents]), model)


def of_groups(model):
    return torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}], 0.1)


def of_a_part(model):
    return torch.optim.SGD(model[2].parameters(), 0.1)


@pytest.mark.parametrize("optimizer", [of_groups, of_a_part])
def test_groups_and_parameters_that_the_optimizer_does_not_have(made, optimizer):
    def of_model(model):
        return optimizer(model)

    models = both(made, of_model)
    assert_alike(models, made[0])
    if optimizer is of_a_part:
        assert torch.equal(models[1][0].weight, made[0][0].weight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_of_the_optimizer_that_the_model_does_not_have_stand_still_as_after_zero_grad(made, optimizer):
    model, other = made[0], nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    make = OPTIMIZERS[optimizer]
    forward_step_(model, made[1](model), make([*model.parameters(), other]))
    assert other.tolist() == [1, 1]
    assert other.grad is None


def clip(optimizer, *_):
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 0.01)


HOOKS = {
    "before a step": lambda model, optimizer: optimizer.register_step_pre_hook(clip),
    "after a step": lambda model, optimizer: optimizer.register_step_post_hook(
        lambda *_: model[0].weight.data.mul_(0.5)
    ),
    "of a gradient": lambda model, optimizer: model[0].weight.register_hook(lambda grad: 3 * grad),
    "after a gradient": lambda model, optimizer: model[2].bias.register_post_accumulate_grad_hook(
        lambda p: p.grad.mul_(2)
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_hooks_are_called(made, optimizer, hook):
    make = OPTIMIZERS[optimizer]
    models = both(made, lambda params: make(params), before=HOOKS[hook])
    assert_alike(models, made[0])
    without = both(made, lambda params: make(params))[1]
    assert any(not torch.equal(p, q) for p, q in zip(models[1].parameters(), without.parameters(), strict=True))


def test_a_scheduler_counts_the_steps(made):
    def before(model, optimizer):
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))

    schedulers = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = both(made, sgd, before=before, between=lambda m, i: schedulers[-1].step())
    assert_alike(models, made[0])
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr() == [0.1 / 16]


def sgd(params):
    return torch.optim.SGD(params, 0.1)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_layer_that_is_frozen_on_the_way_stands_still(made, optimizer):
    make = OPTIMIZERS[optimizer]

    def between(model, i):
        if i == 1:
            model[0].requires_grad_(False)
            frozen.append(model[0].weight.clone())

    frozen = []
    models = both(made, lambda params: make(params), between=between)
    assert_alike(models, made[0])
    assert torch.equal(models[1][0].weight, frozen[1])


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_in_half_precision(made, precision):
    models = []
    for step in (by_hand, forward_step_):
        model = copy.deepcopy(made[0]).to(precision)
        inputs, generator = torch.ones(2, 4, dtype=precision), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            step(model, lambda m=model, x=inputs: m(x).float().square().mean(), optimizer, generator=generator)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_what_is_in_grad_and_cannot_be_written_over_is_replaced(made):
    model, closure = made[0], made[1](made[0])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model[0].weight.grad = torch.zeros(8, 4).double().to_sparse()
    model[2].bias.grad = torch.zeros(3).double().requires_grad_()
    forward_step_(model, closure, optimizer)
    assert all(p.grad.layout == torch.strided and not p.grad.requires_grad for p in model.parameters())


def test_wrong_arguments_are_named(made):
    model, closure = made[0], made[1](made[0])
    with pytest.raises(TypeError, match=r"optimizer must be one of torch\.optim, got type"):
        forward_step_(model, closure, torch.optim.SGD)
    with pytest.raises(TypeError, match="closure must be a function"):
        forward_step_(model, closure(), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times"):
        forward_step_(model, lambda: pytest.fail("it was evaluated"), torch.optim.LBFGS(model.parameters()))
    with torch.inference_mode(), pytest.raises(NotImplementedError, match="call it outside"):
        forward_step_(model, closure, torch.optim.SGD(model.parameters(), 0.1))
