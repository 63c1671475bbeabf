"""Shapes, numbers of parameters, laws of the initial parameters, logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.models import CNN, MLP, LogisticRegression, initialise, num_parameters

INPUTS = {LogisticRegression: (5, 4), MLP: (5, 4), CNN: (5, 1, 28, 28)}
CLASSES = {LogisticRegression: 3, MLP: 3, CNN: 10}
MODELS = list(INPUTS)


def inputs_for(build):
    return torch.rand(INPUTS[build], generator=torch.Generator().manual_seed(0))


def many_parameters(build, num):
    return torch.cat([torch.cat([p.detach().flatten() for p in initialise(build, i).parameters()]) for i in range(num)])


@pytest.mark.parametrize("build", MODELS)
def test_one_row_of_logits_for_each_input(build):
    assert initialise(build, 0)(inputs_for(build)).shape == (5, CLASSES[build])


@pytest.mark.parametrize(("build", "num"), [(LogisticRegression, 15), (MLP, 867), (CNN, 50_986)])
def test_number_of_parameters(build, num):
    assert num_parameters(build()) == num


def test_number_of_parameters_leaves_out_frozen_ones():
    model = LogisticRegression()
    model.linear.bias.requires_grad_(False)
    assert num_parameters(model) == 12


def test_sizes_can_be_changed():
    assert LogisticRegression(7, 5)(torch.zeros(2, 7)).shape == (2, 5)
    assert MLP(7, 5)(torch.zeros(2, 7)).shape == (2, 5)
    assert CNN(5)(torch.zeros(2, 1, 28, 28)).shape == (2, 5)


@pytest.mark.parametrize("build", MODELS)
def test_outputs_are_logits(build):
    # Whatever is linear in the last layer: a softmax, a logarithm or an activation after it would not double.
    model = initialise(build, 0)
    before = model(inputs_for(build))
    with torch.no_grad():
        for p in list(model.children())[-1].parameters():
            p.mul_(2)
    torch.testing.assert_close(model(inputs_for(build)), 2 * before)


def test_mlp_has_relu_between_its_layers():
    model, inputs = initialise(MLP, 0), inputs_for(MLP)
    expected = nn.Sequential(model.fc1, nn.ReLU(), model.fc2, nn.ReLU(), model.fc3)(inputs)
    assert torch.equal(model(inputs), expected)


def test_cnn_is_two_convolutions_a_pool_and_two_layers():
    model, inputs = initialise(CNN, 1), inputs_for(CNN)
    layers = [model.conv1, nn.ReLU(), model.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), model.fc1, nn.ReLU()]
    assert torch.equal(model(inputs), nn.Sequential(*layers, model.fc2)(inputs))


def test_logistic_parameters_are_standard_normal():
    values = many_parameters(LogisticRegression, 400).double()
    n = len(values)
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(values.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)  # the variance of x^4 is 105 - 9


def test_logistic_bias_is_drawn_too():
    biases = torch.cat([initialise(LogisticRegression, i).linear.bias.detach() for i in range(400)])
    assert abs(biases.square().mean() - 1) < 5 * math.sqrt(2 / len(biases))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_mlp_parameters_are_uniform_between_minus_one_and_one(part):
    layers = [layer for i in range(40) for layer in initialise(MLP, i).children()]
    for values in (torch.cat([getattr(layer, part).detach().flatten() for layer in layers[i::3]]) for i in range(3)):
        n = len(values)
        assert values.abs().max() <= 1
        assert values.min() < -0.9
        assert values.max() > 0.9
        assert abs(values.mean()) < 5 / math.sqrt(3 * n)
        assert abs(values.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


def test_cnn_starts_as_torch_s_own_layers_do():
    torch.manual_seed(3)
    expected = [nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1), nn.Linear(784, 64), nn.Linear(64, 10)]
    expected = [p for layer in expected for p in layer.parameters()]
    for p, q in zip(initialise(CNN, 3).parameters(), expected, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("build", MODELS)
def test_a_seed_fixes_the_initial_parameters(build):
    first, again, other = (list(initialise(build, seed).parameters()) for seed in (5, 5, 6))
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(first, other, strict=True))


def test_initialise_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    initialise(MLP, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_initialise_takes_any_function():
    model = initialise(lambda: nn.Linear(2, 2), 0)
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.Linear(2, 2).weight)


@pytest.mark.parametrize("build", MODELS)
def test_every_parameter_gets_a_gradient(build):
    # seed 1: with seed 0 the CNN starts with a dead first layer, see notebook 3a
    model = initialise(build, 1)
    F.cross_entropy(model(inputs_for(build)), torch.arange(5) % 3).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
