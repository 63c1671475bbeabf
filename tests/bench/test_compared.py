"""Models, variants, and the step that each variant takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fwdlib.bench import compared
from fwdlib.bench.compared import MODELS, Variant, find_task, make_step, prepare, variants
from fwdlib.bench.rivals import CHECKPOINTS, OPTIMIZERS
from fwdlib.models import num_parameters


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("penguins-logistic", 15),
        ("penguins-mlp", 867),
        ("mnist-logistic", 7850),
        ("mnist-mlp", 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 10250),
        ("kmnist-cnn", 50986),
        ("paper-cnn", 640 + 3 * (64 * 64 * 9 + 64) + 3136 * 1024 + 1024 + 10250),
        ("3x16", 3 * (16 * 16 + 16) + 170),
    ],
)
def test_models(name, num_params):
    task = find_task(name)
    model, inputs, targets = prepare(task, batch=2)
    assert num_parameters(model) == num_params
    assert model.training
    assert model(inputs).shape == (2, task.num_classes)
    assert targets.max() < task.num_classes


@pytest.mark.parametrize("name", ["mnist", "20x", "x256", "-1x8", "20x256x3"])
def test_unknown_models_are_answered_with_the_known(name):
    with pytest.raises(ValueError, match=name) as error:
        find_task(name)
    assert all(known in str(error.value) for known in MODELS)


def test_signals_keep_their_size_through_a_hundred_layers():
    model, inputs, _ = prepare(find_task("100x64"))
    for module in model:
        inputs = module(inputs)
        assert 1e-3 < inputs.std() < 1e3


def test_all_forms_are_there_once():
    keys = [str(variant) for variant in variants(nn.Conv2d(1, 1, 1))]
    assert len(set(keys)) == len(keys)
    both = (
        "backprop",
        "backprop channels_last",
        "rank-one",
        "rank-one channels_last",
        "per-example",
        "activity",
    )
    expected = {f"{name}, {mode}" for name in both for mode in ("eager", "compiled")}
    expected |= {"forward gradient, eager", "backprop one graph, compiled", "two-point, eager"}
    expected |= {"rank-one K=4, eager", "rank-one K=16, eager"}
    expected |= {f"{name}, eager" for name in CHECKPOINTS}
    expected |= {f"{name} with {optimizer}, eager" for name in compared.DROPPED_IN for optimizer in OPTIMIZERS}
    assert set(keys) == expected
    assert "torchzero, eager" in map(str, variants(nn.Linear(1, 1), peers=True))
    assert not any("channels_last" in str(variant) for variant in variants(nn.Linear(1, 1)))


def test_of_a_large_model_three_forms_are_compiled():
    large = variants(nn.Sequential(*[nn.Linear(1, 1) for _ in range(40)]))
    assert {str(v) for v in large if v.compiled} == {
        "backprop, compiled",
        "backprop one graph, compiled",
        "rank-one, compiled",
    }
    assert {str(v) for v in variants(nn.Linear(1, 1)) if not v.compiled} == {str(v) for v in large if not v.compiled}


def test_quick_is_less_and_compiles_less():
    full, quick = variants(nn.Linear(1, 1)), variants(nn.Linear(1, 1), quick=True)
    assert set(quick) < set(full)
    assert {variant.method for variant in quick if variant.compiled} == {"backprop", "rank-one"}
    assert {variant.method for variant in quick} == set(compared.COMPARED)
    assert not any(variant.optimizer for variant in quick)


@pytest.mark.parametrize("name", ["vit", "gpt", "resnet18", "mobilenet-v3"])
def test_networks_that_people_use_are_trained_by_both_kinds_of_step(name):
    model, inputs, targets = prepare(find_task(name), batch=8)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = [make_step(Variant(method), model, inputs, targets)() for method in ("backprop", "rank-one")]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", compared.COMPARED)
def test_a_step_trains_the_model_in_place(method, monkeypatch):
    model, inputs, targets = prepare(find_task("penguins-mlp"), batch=6)
    monkeypatch.setattr(compared, "LEARNING_RATE", 1e-3)
    before = copy.deepcopy(model.state_dict())
    loss = make_step(Variant(method), model, inputs, targets)()
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(_at(before)(inputs), targets).item(), rel=1e-4)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _at(state) -> nn.Module:
    model = find_task("penguins-mlp").build()
    model.load_state_dict(state)
    return model


def test_backprop_takes_the_step_of_gradient_descent(monkeypatch):
    monkeypatch.setattr(compared, "LEARNING_RATE", 0.1)
    model, inputs, targets = prepare(find_task("kmnist-cnn"), batch=3)
    other = copy.deepcopy(model)
    loss = nn.functional.cross_entropy(other(inputs), targets)
    grads = torch.autograd.grad(loss, list(other.parameters()))
    make_step(Variant("backprop"), model, inputs, targets)()
    for p, q, grad in zip(model.parameters(), other.parameters(), grads, strict=True):
        torch.testing.assert_close(p, q - 0.1 * grad)


def test_channels_last_works_on_a_copy():
    model, inputs, targets = prepare(find_task("kmnist-cnn"), batch=2)
    pointers = [p.data_ptr() for p in model.parameters()]
    make_step(Variant("backprop", form="channels_last"), model, inputs, targets)()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())


def test_the_learning_rate_leaves_parameters_where_they_are():
    model, inputs, targets = prepare(find_task("penguins-mlp"))
    before = copy.deepcopy(model.state_dict())
    for method in compared.COMPARED:
        for p in model.parameters():
            p._post_accumulate_grad_hooks = None  # of the method before
        step = make_step(Variant(method), model, inputs, targets)
        for _ in range(5):
            step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-4)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("norm", [False, True])
def test_backprop_in_one_graph_takes_the_steps_of_sgd(norm, monkeypatch):
    monkeypatch.setattr(compared, "LEARNING_RATE", 0.1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 3))
    inputs, targets, twin = torch.randn(5, 6), torch.randint(3, (5,)), copy.deepcopy(model)
    step = make_step(Variant("backprop", compiled=True, form="one graph"), model, inputs, targets)
    plain = make_step(Variant("backprop"), twin, inputs, targets)
    for _ in range(3):
        torch.testing.assert_close(step(), plain())
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
