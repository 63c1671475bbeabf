"""The step of SGD: an estimate and an update, eager and compiled."""

import pytest
import torch
from torch import nn

from fwdlib import runtime
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.estimator import stacked_gradient
from fwdlib.stacked.perturbations import PERTURBATIONS
from fwdlib.stacked.step import SGDStep, _GivenSigns
from fwdlib.tangents import random_signs
from tests.stacked.networks import CLASSES, seeded, small_cnn, small_net

STRUCTURED = list(PERTURBATIONS)


@pytest.mark.parametrize("tangents", STRUCTURED)
def test_eager_step_is_an_estimate_and_an_update(tangents):
    objective = BatchLoss(*small_net())
    params = params_of(objective.model)
    twin, inputs, targets = small_net()
    step = SGDStep(twin, learning_rate=0.1, num_tangents=2, tangents=tangents, compiled=False, generator=seeded())
    draw = seeded()
    for learning_rate in (0.1, 0.02):
        step.learning_rate = learning_rate
        estimate = stacked_gradient(objective, params, num_tangents=2, tangents=tangents, generator=draw)
        estimate.grads.add_to_(params, -learning_rate)
        torch.testing.assert_close(step(inputs, targets), estimate.loss)
        torch.testing.assert_close(params_of(twin), params)


# The tests that compile take 10 to 20 s each: one of a whole step, and one for each kind of tangents.
needs_compiler = pytest.mark.skipif(not runtime.has_compiler(), reason="no C++ compiler")
quiet = pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler, which users cannot act on


@needs_compiler
@quiet
def test_compiled_step_does_what_the_eager_one_does():
    models = [small_net(nn.BatchNorm1d(4))[0] for _ in range(2)]
    eager, compiled = (
        SGDStep(model, learning_rate=0.1, compiled=c, generator=seeded())
        for model, c in zip(models, (False, None), strict=True)
    )
    assert compiled.compiled
    _, inputs, targets = small_net()
    for learning_rate, size in ((0.1, 5), (0.02, 5), (0.02, 4)):  # another rate; another shape, compiled anew
        eager.learning_rate = compiled.learning_rate = learning_rate
        losses = [step(inputs[:size], targets[:size]) for step in (eager, compiled)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(model.state_dict() for model in models))
    assert models[1][1].num_batches_tracked == 3


@needs_compiler
@quiet
@pytest.mark.parametrize(
    ("tangents", "make"), [("per-example", small_net), ("activity", small_cnn), ("rank-one", small_cnn)]
)
def test_compiled_step_does_what_the_eager_one_does_with_the_same_signs(tangents, make):
    (model, inputs, targets), (twin, _, _) = (make() for _ in range(2))
    step = SGDStep(model, learning_rate=0.1, num_tangents=2, tangents=tangents, generator=seeded())
    step(inputs, targets)
    # the compiled step draws all signs at once, the eager step may draw layer by layer
    ((_, num_signs),) = step._graphs.values()
    signs = _GivenSigns(random_signs((num_signs,), inputs, seeded()))
    eager = SGDStep(twin, learning_rate=0.1, num_tangents=2, tangents=tangents, compiled=False)
    with torch.no_grad():
        eager._step(params_of(twin), {}, inputs, targets, 0.1, signs)
    torch.testing.assert_close(params_of(model), params_of(twin))
    assert signs.used == num_signs


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(runtime, "has_compiler", lambda: False)
    model, inputs, targets = small_net()
    assert SGDStep(model, learning_rate=0.1)(inputs, targets).shape == ()
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler.*compiled=False"):
        SGDStep(model, learning_rate=0.1, compiled=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
        ({"learning_rate": 1, "num_tangents": 0}, "num_tangents must be a whole number of at least 1"),
        ({"learning_rate": 1, "tangents": "normal"}, "tangents must be one of 'rank-one', 'per-example', 'activity'"),
    ],
)
def test_step_refuses(option, message):
    with pytest.raises(ValueError, match=message):
        SGDStep(nn.Linear(3, 2), compiled=False, **option)


@pytest.mark.parametrize("tangents", STRUCTURED)
def test_a_frozen_parameter_stays_and_a_shared_one_moves_once(tangents):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = SGDStep(model, learning_rate=0.1, tangents=tangents, compiled=False)
    step(torch.randn(5, 3), CLASSES)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["0.weight", "0.bias", "2.bias"]
