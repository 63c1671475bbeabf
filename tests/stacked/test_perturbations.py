"""Perturbations are unbiased and have the second moments of their docstrings, within 5 sigma of 2000 draws."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.perturbations import PERTURBATIONS
from fwdlib.tangents import Replicates, rank_one

NUM_DRAWS = 2000
STRUCTURED = list(PERTURBATIONS)
ALL = [*STRUCTURED, "normal"]


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


class MLP(nn.Module):
    shape = (3, 3)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs)))


class CNN(nn.Module):
    shape = (3, 1, 4, 4)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 2, stride=2, dilation=2)
        self.last = nn.Linear(2, 2)

    def forward(self, inputs):
        return self.last(torch.relu(self.second(torch.tanh(self.first(inputs)))).flatten(1))


def objective_of(build, targets=None, loss=F.cross_entropy):
    torch.manual_seed(0)
    model = build().double()
    inputs = torch.randn(build.shape, dtype=torch.float64)
    return BatchLoss(model, inputs, torch.tensor([0, 1, 1]) if targets is None else targets, loss)


def estimates_of(objective, tangents, num_tangents=1):
    """Return independent estimates, (NUM_DRAWS, P), each with its own generator, in one vmap."""
    draws = Replicates([torch.Generator().manual_seed(seed) for seed in range(NUM_DRAWS)])
    estimator = partial(
        forward_gradient,
        objective,
        params_of(objective.model),
        num_tangents=num_tangents,
        tangents=tangents,
        engine="stacked",
    )
    grads = torch.func.vmap(lambda index: estimator(generator=draws.at(index)).grads)(draws.indices)
    return torch.cat([grad.reshape(NUM_DRAWS, -1) for grad in grads.values()], 1)


def assert_unbiased(estimates, exact):
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    assert (standard_error > 0).any()
    assert ((estimates.mean(0) - exact).abs() <= 5 * standard_error + 1e-12).all()


def gradient(objective):
    return flat(backprop_gradient(objective, params_of(objective.model)).grads)


def gradients_of_examples(objective):
    """Return each example's contribution to the gradient of the mean loss, (B, P)."""
    parts = zip(objective.inputs.split(1), objective.targets.split(1), strict=True)
    found = [gradient(BatchLoss(objective.model, x, y, objective.loss)) for x, y in parts]
    return torch.stack(found) / len(found)


def activity_variance(objective):
    """Compute the closed form, with the map M_n from outputs to parameters of each layer and example as a matrix."""
    model, variance = objective.model, 0.0
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for x, y in zip(objective.inputs.split(1), objective.targets.split(1), strict=True):
        seen: list = []
        note = partial(lambda seen, _, args, out: seen.append((args[0], out)), seen)
        hooks = [layer.register_forward_hook(note) for layer in layers]
        loss = objective.loss(model(x), y) / len(objective.inputs)
        slopes = torch.autograd.grad(loss, [out for _, out in seen])  # D_n, layer by layer
        for hook in hooks:
            hook.remove()
        of_all = sum(slope.square().sum() for slope in slopes)
        for layer, (inputs, outputs), slope in zip(layers, seen, slopes, strict=True):
            again = layer(inputs.detach())
            for p in layer.parameters():
                rows = torch.eye(outputs.numel(), dtype=torch.float64).reshape(-1, *outputs.shape)
                columns = [torch.autograd.grad(again, p, row, retain_graph=True)[0].flatten() for row in rows]
                to_kernel, slope_n = torch.stack(columns, 1), slope.flatten()  # M_n, D_ln
                variance += to_kernel.square().sum() * of_all + (to_kernel @ slope_n).square().sum()
                variance -= 2 * (to_kernel.square().sum(0) * slope_n.square()).sum()
    return variance.detach()


def closed_form(objective, tangents, num_tangents):
    exact = gradient(objective)
    square, size = exact.square().sum(), len(exact)
    excess = {
        "rank-one": lambda: (size - 1) * square,
        "normal": lambda: (size + 1) * square,
        "per-example": lambda: (size - 1) * gradients_of_examples(objective).square().sum(),
        "activity": lambda: activity_variance(objective),
    }[tangents]()
    return square + excess / num_tangents


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("tangents", ALL)
@pytest.mark.parametrize("build", [MLP, CNN])
def test_mean_and_second_moment_agree_with_the_closed_forms(build, tangents, num_tangents):
    objective = objective_of(build)
    estimates = estimates_of(objective, tangents, num_tangents)
    assert_unbiased(estimates, gradient(objective))
    squares = estimates.square().sum(1)
    error = squares.std() / math.sqrt(NUM_DRAWS)
    assert (squares.mean() - closed_form(objective, tangents, num_tangents)).abs() < 5 * error


def test_closed_form_of_a_linear_layer_is_that_of_its_map():
    # sum_n (q |D_n|^2 - |D_ln|^2) |x_n|^2, of one layer without a bias, where M_n u = u x_n^T
    objective = objective_of(MLP)
    model = objective.model
    for name in ("first", "last"):
        getattr(model, name).bias = None
    hidden = torch.tanh(model.first(objective.inputs)).detach().requires_grad_()
    logits = model.last(hidden)
    last, upper = torch.autograd.grad(F.cross_entropy(logits, objective.targets), [logits, hidden])
    first = upper * (1 - hidden**2)  # the derivative by what comes out of the first layer
    of_all = first.square().sum(1) + last.square().sum(1)
    variance = sum(
        ((slope.shape[1] * of_all - slope.square().sum(1)) * inputs.square().sum(1)).sum()
        for slope, inputs in ((first, objective.inputs), (last, hidden))
    )
    torch.testing.assert_close(activity_variance(objective), variance.detach())


def test_the_square_of_a_rank_one_tangent_is_the_number_of_parameters():
    # so each estimate has |g|^2 = P d^2, d being its derivative
    objective = objective_of(CNN)
    params = params_of(objective.model)
    assert (flat({n: v[0] for n, v in rank_one(params).items()}).square().sum()) == len(flat(params))
    for seed in range(5):
        estimate = forward_gradient(objective, params, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(flat(estimate.grads).square().sum(), len(flat(params)) * estimate.jvps[0] ** 2)


# models that mix examples, or use a parameter outside of a single layer


class Normed(nn.Module):
    """It has few parameters, so that a bias from examples treated as independent would exceed the noise."""

    shape = (3, 2)

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False, track_running_stats=False)

    def forward(self, inputs):
        return 3 * self.norm(self.first(inputs))


class Positions(nn.Module):
    """The last reshape joins the axes of examples and positions; the loss is one of single positions."""

    shape = (3, 2, 2)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs)).reshape(-1, 3))


class Groups(nn.Module):
    shape = (3, 2, 3)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 4, 2, groups=2), nn.Linear(8, 2)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs)).flatten(1))


class Words(nn.Module):
    """An embedding whose weight is also that of the last layer, with a learned scale."""

    shape = (3, 2)

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(3, 2), nn.Parameter(torch.tensor(0.7))

    def forward(self, inputs):
        x = self.table((inputs > 0).long()).mean(1) * F.softplus(self.scale)
        return F.linear(x, self.table.weight)


class Twice(nn.Module):
    shape = (3, 2)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, inputs):
        return self.last(self.first(torch.tanh(self.first(inputs))))


class Centred(nn.Module):
    """The mean over all entries is subtracted from each."""

    shape = (3, 2)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, inputs):
        x = self.first(inputs)
        return self.last(torch.tanh(x - 2 * x.mean()))


class AllPairs(nn.Module):
    """Broadcasting moves the axis of the examples to the end and puts another axis of the same length in its place."""

    shape = (3, 2)

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 1), nn.Linear(3, 2)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs).flatten() - inputs[:, :1]))


class Heads(nn.Module):
    """There are as many heads as examples, and axis 0 is the axis of the heads."""

    shape = (3, 2)

    def __init__(self):
        super().__init__()
        self.first, self.heads = nn.Linear(2, 2), nn.Parameter(torch.randn(3, 2, 2))

    def forward(self, inputs):
        return (self.first(inputs) @ self.heads)[:, 0]


class Conditioned(nn.Module):
    """A layer is applied to a parameter, which has no axis of examples."""

    shape = (3, 2)

    def __init__(self):
        super().__init__()
        self.code, self.first, self.last = nn.Parameter(torch.randn(2)), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, inputs):
        return self.last(torch.tanh(inputs + self.first(self.code)))


MODELS = [Normed, Positions, Groups, Words, Twice, Centred, AllPairs, Heads, Conditioned]


@pytest.mark.parametrize("tangents", ["per-example", "activity"])
@pytest.mark.parametrize("build", MODELS)
def test_unbiased_if_examples_mix_or_a_parameter_is_used_outside_of_a_single_layer(build, tangents):
    objective = objective_of(build, torch.tensor([0, 1, 1, 0, 1, 0]) if build is Positions else None)
    assert_unbiased(estimates_of(objective, tangents), gradient(objective))


def penalised(logits, targets):
    loss = logits.mean(0).square().sum()
    loss += F.cross_entropy(logits, targets) * (1 + logits.square().mean())
    return loss


@pytest.mark.parametrize(
    "loss", [penalised, lambda x, y: F.cross_entropy(x, y, reduction="none").square().sum().sqrt()]
)
@pytest.mark.parametrize("tangents", ["per-example", "activity"])
def test_unbiased_for_losses_that_are_not_a_mean_over_examples(loss, tangents):
    objective = objective_of(MLP, loss=loss)
    assert_unbiased(estimates_of(objective, tangents), gradient(objective))


@pytest.mark.parametrize("weighting", [{"reduction": "sum"}, {"ignore_index": 1}, {"weight": torch.tensor([1.0, 3.0])}])
def test_weights_of_examples_are_those_of_the_loss(weighting):
    # the derivatives of the examples sum to the derivative of the loss
    weighting = {key: value.double() if key == "weight" else value for key, value in weighting.items()}
    objective = objective_of(MLP, loss=partial(F.cross_entropy, **weighting))
    assert_unbiased(estimates_of(objective, "per-example"), gradient(objective))


@pytest.mark.parametrize("tangents", ALL)
def test_an_unused_or_frozen_parameter_has_no_gradient(tangents):
    objective = objective_of(MLP)
    model = objective.model
    model.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.first.bias.requires_grad_(False)
    objective = BatchLoss(model, objective.inputs, objective.targets)
    grads = forward_gradient(objective, params_of(model), tangents=tangents, engine="stacked").grads
    assert "first.bias" not in grads
    assert tangents == "normal" or not grads["idle"].any()  # normal tangents cover unused parameters, too


@pytest.mark.parametrize("tangents", ALL)
def test_adding_by_factors_equals_adding_the_full_gradients(tangents):
    objective = objective_of(CNN)
    params = params_of(objective.model)
    estimate = forward_gradient(objective, params, num_tangents=2, tangents=tangents, engine="stacked")
    target = {name: p.clone() for name, p in params.items()}
    estimate.grads.add_to_(target, -0.1)
    for name, p in params.items():
        torch.testing.assert_close(target[name], p - 0.1 * estimate.grads[name])
