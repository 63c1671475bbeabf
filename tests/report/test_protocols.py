"""The departures of the published code do what they are named for, and what follows from them follows from the data."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fwdlib.data import Dataset
from fwdlib.estimators import backprop_gradient
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.statistics import Interval
from report import names
from report.sections import protocols as comparison
from report.studies import protocols
from report.studies.common import RESULTS
from report.studies.published_code import published_backprop_step, published_step


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    inputs, tests = torch.randn(12, 4, generator=draw), torch.randn(5, 4, generator=draw)
    return Dataset(inputs, torch.arange(12) % 3, tests, torch.arange(5) % 3, tuple("abc"), None)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def runs(iterations, status="reached", accuracy=0.9, loss=0.3):
    number = len(iterations)
    return {
        "learning_rate": 0.1,
        "seed": list(range(number)),
        "status": [status] * number,
        "iterations": iterations,
        "train_loss_start": [1.0] * number,
        "train_loss": [loss] * number,
        "test_loss": [loss] * number,
        "accuracy_start": [0.3] * number,
        "accuracy": [accuracy] * number,
    }


def test_standardised_tangents_have_mean_zero_and_variance_one_and_their_components_are_not_independent():
    params = {"weight": torch.zeros(3, 4, dtype=torch.float64), "bias": torch.zeros(3, dtype=torch.float64)}
    v = protocols.standardised(params, 4000, torch.Generator().manual_seed(0))
    assert v["weight"].shape == (4000, 3, 4)
    for name, p in params.items():
        rows = v[name].flatten(1)
        assert_close(rows.mean(1), torch.zeros_like(rows[:, 0]))
        assert_close(rows.square().sum(1), torch.full_like(rows[:, 0], p.numel() - 1))
    products = v["bias"][:, 0] * v["bias"][:, 1]
    assert abs(products.mean() + 1 / 3) < 5 * products.std() / len(products) ** 0.5


def test_on_the_test_set_from_the_second_call_on(data, model):
    objective, params = BatchLoss(model, data.train_inputs, data.train_targets), params_of(model)
    estimator = protocols.on_the_test_set(data)
    first, second = estimator(objective, params), estimator(objective, params)
    assert_close(first.grads, backprop_gradient(objective, params).grads)
    of_tests = BatchLoss(model, data.test_inputs, data.test_targets)
    assert_close(second, backprop_gradient(of_tests, params))


def test_a_second_softmax_bounds_the_loss_from_below(data, model):
    objective = BatchLoss(model, data.train_inputs, data.train_targets)
    loss = protocols.with_double_softmax(objective, params_of(model)).loss
    assert_close(loss, F.cross_entropy(model(data.train_inputs).softmax(1), data.train_targets).detach())
    with torch.no_grad():  # all of class 0, and certain of it
        model.bias.copy_(torch.tensor([1e3, 0.0, 0.0]))
    certain = BatchLoss(model, data.train_inputs, torch.zeros_like(data.train_targets))
    assert_close(protocols.with_double_softmax(certain, params_of(model)).loss.item(), math.log((math.e + 2) / math.e))


@pytest.mark.parametrize("name", protocols.MODELS)
def test_the_first_form_of_each_method_has_no_departure(name):
    for forms in protocols.as_published(protocols.FULL, name).values():
        first, *others = forms
        assert first == names.AS_PUBLISHED
        assert forms[first].learning_rate == protocols.MODELS[name].learning_rate
        assert forms[first].options == {}
        assert names.AS_PUBLISHED not in others


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_published_iteration_descends(data, model, one_by_one):
    params = params_of(model)
    objective = BatchLoss(model, data.train_inputs, data.train_targets)
    before = objective(params)
    stepped = published_backprop_step(model, data, 0.05, one_by_one)(params)
    assert objective({name: p.detach() for name, p in stepped.items()}) < before
    if not one_by_one:
        exact = backprop_gradient(objective, params).grads
        assert_close({n: p.detach() for n, p in stepped.items()}, {n: p - 0.05 * exact[n] for n, p in params.items()})
    assert published_step(model, data, 0.05, per_tensor=True)(params).keys() == params.keys()


@pytest.mark.parametrize(
    ("iterations", "verdict"), [([10] * 9, "faster"), ([1000] * 9, "slower"), ([50, 200] * 5, "unclear")]
)
def test_the_conclusion_follows_from_iterations_and_step(iterations, verdict):
    backprop, step = runs([100] * len(iterations)), Interval(0.95, 1.0, 1.05)
    found = comparison._pair(backprop, runs(iterations), step, 0.3)
    assert found["verdict"] == verdict
    assert found["num_seeds"] == len(iterations)


def test_a_slower_step_turns_the_conclusion():
    backprop, forward = runs([100] * 9), runs([50] * 9)
    assert comparison._pair(backprop, forward, Interval(0.9, 1.0, 1.1), 0.3)["verdict"] == "faster"
    assert comparison._pair(backprop, forward, Interval(3.9, 4.0, 4.1), 0.3)["verdict"] == "slower"


def test_equally_many_iterations_say_nothing_of_which_arrives_first():
    pair = comparison._pair(runs([100] * 9, "completed"), runs([100] * 9, "completed"), Interval(0.5, 0.5, 0.5), None)
    assert pair["total"].high < 1
    assert pair["verdict"] is None


def test_who_diverges_at_the_tuned_rate_is_told_with_what_half_of_it_gives():
    found = comparison.load(RESULTS)
    content, seconds = found["models"]["cnn"], found["steps"]["seconds"]["cnn"]
    method, best = "forward gradient", comparison._best(content, "forward gradient")
    tuned = content["fair"][method][str(best)]
    for status, told in (("completed", False), ("diverged", True)):
        tuned |= {"status": [status] * len(tuned["seed"]), "train_loss": [1.0] * len(tuned["seed"])}
        unstable = comparison._model("cnn", content, seconds)["unstable"]
        assert (method in unstable) == told
    assert unstable[method]["learning_rate"] == tuned["learning_rate"] / 2


@pytest.mark.parametrize(("forward", "backprop", "gap"), [("nan", 2.0, math.inf), (2.5, 2.0, 0.5), ("nan", "inf", 0.0)])
def test_a_loss_that_diverged_is_behind_any_other(forward, backprop, gap):
    pair = comparison._pair(
        runs([9] * 9, "completed", loss=backprop), runs([9] * 9, "completed", loss=forward), Interval(1, 1, 1), None
    )
    assert pair["loss_gap"].estimate == gap


def test_who_never_arrives_takes_for_ever():
    found = comparison._pair(runs([100] * 9), runs([100] * 9, "not reached"), Interval(1, 1, 1), 0.3)
    assert found["iterations"].estimate == math.inf
    assert (found["forward"]["arrived"], found["verdict"]) == (0, "slower")


def test_the_cost_of_a_learning_rate_is_what_arrives():
    assert protocols._cost(runs([3, 1, 2]), has_threshold=True) == 2
    assert protocols._cost(runs([1, 1, 1], "not reached"), has_threshold=True) == math.inf
    assert protocols._cost(runs([1, 1, 1], "completed", loss=0.5), has_threshold=False) == 0.5
    assert protocols._cost(runs([1, 1, 1], "diverged", loss=0.5), has_threshold=False) == math.inf


def test_section_and_study_have_the_same_models_and_methods():
    assert names.MODELS == tuple(protocols.MODELS) == tuple(comparison.TITLES)
    assert tuple(protocols.METHODS) == names.METHODS
    assert protocols.FULL.models.keys() == protocols.SHORT.models.keys() == protocols.MODELS.keys()


@pytest.mark.parametrize("name", protocols.MODELS)
def test_the_committed_trainings_can_be_continued(name, monkeypatch):
    written = []
    monkeypatch.setattr(protocols, "_train", None)  # nothing is trained again
    monkeypatch.setattr(protocols, "_statements", lambda *_: {})
    monkeypatch.setattr(protocols, "write_json", lambda file, found: written.append(file))
    found = protocols.measure_model(protocols.FULL, RESULTS, name)
    assert found["fair"].keys() == protocols.METHODS.keys()
    assert written == [RESULTS / "protocols" / f"{name}.json"]


def test_a_model_that_was_not_measured_is_named(tmp_path):
    found = comparison.load(RESULTS)
    del found["models"]["cnn"]
    assert comparison.context(found)["missing"] == {"cnn": "Convolutional network"}
