"""Perturbations are unbiased and have the second moments of their docstrings, within 5 sigma of 2000 draws."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.objectives import BatchLoss, ClosureLoss, assign_gradients, params_of
from fwdlib.stacked.estimator import stacked_gradient
from fwdlib.stacked.perturbations import PERTURBATIONS
from fwdlib.tangents import Replicates, rank_one
from tests.stacked.networks import flat

NUM_DRAWS = 2000
STRUCTURED = list(PERTURBATIONS)
ALL = [*STRUCTURED, "normal"]


class Made(nn.Module):
    """A model of some parts, made anew for each seed, and a forward pass over them."""

    def __init__(self, forward, parts):
        super().__init__()
        for name, part in parts().items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, inputs):
        return self.run(self, inputs)


class Build(NamedTuple):
    shape: tuple[int, ...]  # of a batch
    forward: Callable
    parts: Callable

    def __call__(self):
        return Made(self.forward, self.parts)


def layers(**sizes):
    """Return what makes linear layers of these sizes, by name."""
    return lambda: {name: nn.Linear(*size) for name, size in sizes.items()}


MLP = Build((3, 3), lambda m, x: m.last(torch.tanh(m.first(x))), layers(first=(3, 4), last=(4, 2)))
CNN = Build(
    (3, 1, 4, 4),
    lambda m, x: m.last(torch.relu(m.second(torch.tanh(m.first(x)))).flatten(1)),
    lambda: {
        "first": nn.Conv2d(1, 2, 3, padding=1),
        "second": nn.Conv2d(2, 2, 2, stride=2, dilation=2),
        "last": nn.Linear(2, 2),
    },
)


def objective_of(build, targets=None, loss=F.cross_entropy):
    torch.manual_seed(0)
    model = build().double()
    inputs = torch.randn(build.shape, dtype=torch.float64)
    return BatchLoss(model, inputs, torch.tensor([0, 1, 1]) if targets is None else targets, loss)


def estimates_of(objective, tangents, num_tangents=1):
    """Return independent estimates, (NUM_DRAWS, P), each with its own generator, in one vmap."""
    draws = Replicates([torch.Generator().manual_seed(seed) for seed in range(NUM_DRAWS)])
    options = {"num_tangents": num_tangents, "tangents": tangents, "engine": "stacked"}
    estimator = partial(forward_gradient, objective, params_of(objective.model), **options)
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
@pytest.mark.parametrize("build", [MLP, CNN], ids=["MLP", "CNN"])
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


def words(model, inputs):
    x = model.table((inputs > 0).long()).mean(1) * F.softplus(model.scale)
    return F.linear(x, model.table.weight)


def centred(model, inputs):
    x = model.first(inputs)
    return model.last(torch.tanh(x - 2 * x.mean()))


SQUARE = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
TWO = layers(first=(2, 2), last=(2, 2))
MODELS = {
    # It has few parameters, so that a bias from examples treated as independent would exceed the noise.
    "BatchNorm": Build(
        (3, 2),
        lambda m, x: 3 * m.norm(m.first(x)),
        lambda: {"first": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2, affine=False, track_running_stats=False)},
    ),
    # The last reshape joins the axes of examples and positions; the loss is one of single positions.
    "positions": Build(
        (3, 2, 2), lambda m, x: m.last(torch.tanh(m.first(x)).reshape(-1, 3)), layers(first=(2, 3), last=(3, 2))
    ),
    "groups": Build(
        (3, 2, 3),
        lambda m, x: m.last(torch.tanh(m.first(x)).flatten(1)),
        lambda: {"first": nn.Conv1d(2, 4, 2, groups=2), "last": nn.Linear(8, 2)},
    ),
    # An embedding whose weight is also that of the last layer, with a learned scale.
    "words": Build((3, 2), words, lambda: {"table": nn.Embedding(3, 2), "scale": nn.Parameter(torch.tensor(0.7))}),
    "a layer used twice": Build((3, 2), lambda m, x: m.last(m.first(torch.tanh(m.first(x)))), TWO),
    # The mean over all entries is subtracted from each.
    "centred": Build((3, 2), centred, TWO),
    # Broadcasting moves the axis of the examples to the end and puts another axis of the same length in its place.
    "all pairs": Build(
        (3, 2), lambda m, x: m.last(torch.tanh(m.first(x).flatten() - x[:, :1])), layers(first=(2, 1), last=(3, 2))
    ),
    # There are as many heads as examples, and axis 0 is the axis of the heads.
    "heads": Build(
        (3, 2),
        lambda m, x: (m.first(x) @ m.heads)[:, 0],
        lambda: {"first": nn.Linear(2, 2), "heads": nn.Parameter(torch.randn(3, 2, 2))},
    ),
    # Sums of products that keep the axis of the examples, sum over it, and move it.
    "einsum": Build((3, 2), lambda m, x: m.last(torch.einsum("bi,ij->bj", torch.tanh(m.first(x)), SQUARE)), TWO),
    "einsum over examples": Build(
        (3, 2),
        lambda m, x: m.last((lambda h: torch.einsum("bi,ci,bj->cj", h, h, x))(torch.tanh(m.first(x)))),
        TWO,
    ),
    "einsum that moves": Build(
        (3, 2),
        lambda m, x: torch.einsum("bi,jb->jb", m.last(torch.tanh(m.first(x))), x.t()).t(),
        TWO,
    ),
    # One number for all units.
    "a bias that is broadcast": Build(
        (3, 2),
        lambda m, x: m.last(torch.tanh(F.linear(x, m.first.weight, m.shift))),
        lambda: {"shift": nn.Parameter(torch.tensor([0.3])), **TWO()},
    ),
    # A layer is applied to a parameter, which has no axis of examples.
    "conditioned": Build(
        (3, 2),
        lambda m, x: m.last(torch.tanh(x + m.first(m.code))),
        lambda: {"code": nn.Parameter(torch.randn(2)), **TWO()},
    ),
}


def test_bias_of_a_layer_that_is_applied_to_a_vector_has_a_sign_of_its_own_for_each_unit():
    model = nn.Linear(2, 8)
    objective = ClosureLoss(model, lambda: model(torch.ones(2)).square().sum(), num_examples=3)
    estimate = stacked_gradient(objective, params_of(model), tangents="activity")
    torch.testing.assert_close(estimate.grads["bias"].abs(), estimate.jvps.abs().expand(8))


@pytest.mark.parametrize("tangents", ["per-example", "activity"])
@pytest.mark.parametrize("name", MODELS)
def test_unbiased_if_examples_mix_or_a_parameter_is_used_outside_of_a_single_layer(name, tangents):
    objective = objective_of(MODELS[name], torch.tensor([0, 1, 1, 0, 1, 0]) if name == "positions" else None)
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


@pytest.mark.parametrize("tangents", ALL)
@pytest.mark.parametrize("use", ["add", "write", "assign"])
def test_a_gradient_that_was_read_can_be_changed_in_place(use, tangents):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    objective, params = BatchLoss(model, torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])), params_of(model)
    grads = stacked_gradient(objective, params, 2, tangents).grads
    expected = {name: 3 * gradient.clone() if "0." in name else gradient.clone() for name, gradient in grads.items()}
    if use == "assign":
        assign_gradients(model, grads)
        for p in model[0].parameters():
            p.grad.mul_(3)
        assert_equal(dict(grads), expected)
        return
    for name in ("0.weight", "0.bias"):
        grads[name].mul_(3)
    found = {name: torch.zeros_like(p) for name, p in params.items()}
    if use == "add":
        grads.add_to_(found, -0.5)
        expected = {name: -0.5 * gradient for name, gradient in expected.items()}
    else:
        grads.write_to_(found)
    assert_equal(found, expected)


def assert_equal(found, expected):
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0)


class Reused(nn.Module):
    """Two layers, and something that happens to what the second one has read."""

    def __init__(self, after):
        super().__init__()
        self.first, self.second, self.after = nn.Linear(3, 4), nn.Linear(4, 2), after
        self.register_buffer("memory", torch.ones(5, 4))

    def forward(self, inputs):
        h = self.first(inputs)
        return self.after(self, h, self.second(h) + self.second(self.memory))


AFTER = {
    "mul_": lambda m, h, y: y + h.mul_(3)[:, :2],
    "of a view": lambda m, h, y: (h.view(-1).mul_(3), y + h[:, :2])[1],
    "setitem": lambda m, h, y: (h.__setitem__(0, 0.0), y + h[:, :2])[1],
    "relu_": lambda m, h, y: y + F.relu_(h)[:, :2],
    "buffer": lambda m, h, y: (m.memory.copy_(h.detach()), y)[1],
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("after", AFTER)
def test_an_activation_that_changes_after_its_use_is_refused_as_backprop_refuses_it(after, copied):
    model, inputs = Reused(AFTER[after]), torch.randn(5, 3)
    objective = BatchLoss(model, inputs, torch.tensor([0, 1, 1, 0, 1]))
    params = {name: p.clone() if copied else p for name, p in params_of(model).items()}
    with pytest.raises(NotImplementedError, match=r"of the shape \(5, 4\) was changed in place"):
        dict(forward_gradient(objective, params, tangents="activity").grads)
    if after != "buffer":  # backprop shows the second one of two uses
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            objective.run().backward()
    dict(forward_gradient(objective, params, tangents="per-example").grads)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3))])
def test_a_batch_that_is_written_over_before_the_gradient_is_read_is_refused(layer):
    model, inputs = nn.Sequential(layer, nn.Flatten()), torch.randn(5, 3)
    objective = BatchLoss(model, inputs, torch.tensor([0, 1, 1, 0, 1]))
    read, unread = (forward_gradient(objective, params_of(model), tangents="activity").grads for _ in range(2))
    before = {name: gradient.clone() for name, gradient in read.items()}
    inputs.zero_()
    assert_equal(read, before)
    with pytest.raises(NotImplementedError, match="was changed in place"):
        dict(unread)


class OfItsWeight(nn.Module):
    """The second layer reads the memory of the first one's weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, inputs):
        return self.first(inputs) @ self.second(self.first.weight.detach())


@pytest.mark.parametrize("tangents", STRUCTURED)
def test_adding_by_factors_reads_what_it_needs_before_it_writes(tangents):
    model = OfItsWeight().double()
    objective, params = BatchLoss(model, torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])), params_of(model)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    grads, same = (stacked_gradient(objective, params, 1, tangents, draw).grads for draw in draws)
    expected = {name: p - 0.5 * same[name] for name, p in params.items()}
    grads.add_to_(params, -0.5)
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-12)
