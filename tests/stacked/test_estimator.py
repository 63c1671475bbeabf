"""The stacked pass as a user meets it: exact cases, steps of SGD, edge cases."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib import runtime
from fwdlib.data import Dataset
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.models import MLP
from fwdlib.objectives import BatchLoss, assign_gradients, params_of
from fwdlib.stacked.estimator import SGDStep, _GivenSigns, explain, stacked_jvp
from fwdlib.stacked.perturbations import PERTURBATIONS
from fwdlib.tangents import TANGENTS, random_signs
from fwdlib.training import train

STRUCTURED = list(PERTURBATIONS)
ALL = list(dict.fromkeys([*PERTURBATIONS, *TANGENTS]))
CLASSES = torch.tensor([0, 1, 1, 0, 1])


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


def small_net(*between, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return model, torch.randn(5, 3, dtype=dtype), CLASSES


def small_cnn():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(*layers).double(), torch.randn(5, 1, 4, 4, dtype=torch.float64), CLASSES


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def objective():
    return BatchLoss(*small_net())


@pytest.fixture
def params(objective):
    return params_of(objective.model)


# exact cases


@pytest.mark.parametrize("build", [small_net, small_cnn])
def test_unit_tangents_give_the_exact_gradient(build):
    objective = BatchLoss(*build())
    params = params_of(objective.model)
    sizes = [p.numel() for p in params.values()]
    rows = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    tangents = {name: row.reshape(-1, *p.shape) for (name, p), row in zip(params.items(), rows, strict=True)}
    loss, slopes = stacked_jvp(objective, params, tangents)
    exact = backprop_gradient(objective, params)
    torch.testing.assert_close(loss, exact.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(slopes, flat(exact.grads), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tangents", list(TANGENTS))
def test_written_out_tangents_give_what_forward_gradient_gives(objective, params, tangents):
    stacked, textbook = (  # rank-one ones are drawn as factors in both
        estimator(objective, params, num_tangents=3, tangents=tangents, generator=seeded())
        for estimator in (forward_gradient, partial(forward_gradient, tangents="normal"))
    )
    torch.testing.assert_close(stacked.jvps, textbook.jvps)
    torch.testing.assert_close(flat(stacked.grads), flat(textbook.grads))
    torch.testing.assert_close(stacked.loss, textbook.loss)


@pytest.mark.parametrize("tangents", ALL)
def test_protocol(objective, params, tangents):
    estimate = forward_gradient(objective, params, num_tangents=3, tangents=tangents, engine="stacked")
    assert (estimate.loss.shape, estimate.jvps.shape) == ((), (3,))
    assert {n: g.shape for n, g in estimate.grads.items()} == {n: p.shape for n, p in params.items()}
    assert not any(t.requires_grad for t in (estimate.loss, estimate.jvps, *estimate.grads.values()))


@pytest.mark.parametrize("tangents", ALL)
def test_params_elsewhere_than_in_the_model_give_the_same(objective, params, tangents):
    copies = {name: p.clone() for name, p in params.items()}
    with torch.no_grad():
        own = forward_gradient(objective, params, tangents=tangents, generator=seeded(), engine="stacked")
        expected = flat(own.grads)
        for p in objective.model.parameters():
            p.zero_()
    elsewhere = forward_gradient(objective, copies, tangents=tangents, generator=seeded(), engine="stacked")
    torch.testing.assert_close(elsewhere.loss, own.loss)
    torch.testing.assert_close(flat(elsewhere.grads), expected)


@pytest.mark.parametrize("tangents", ALL)
def test_running_statistics_advance_once_per_estimate(tangents):
    model, inputs, targets = small_net(nn.BatchNorm1d(4))
    twin, _, _ = small_net(nn.BatchNorm1d(4))
    forward_gradient(
        BatchLoss(model, inputs, targets), params_of(model), num_tangents=2, tangents=tangents, engine="stacked"
    )
    twin(inputs)
    for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


# steps


@pytest.mark.parametrize("tangents", ALL)
def test_a_step_by_factors_is_that_of_an_optimizer(objective, params, tangents):
    estimate = forward_gradient(
        objective, params, num_tangents=2, tangents=tangents, generator=seeded(), engine="stacked"
    )
    expected = {name: p - 0.1 * estimate.grads[name] for name, p in params.items()}
    for step in ("factors", "optimizer"):
        model, _, _ = small_net()
        if step == "factors":
            estimate.grads.add_to_(params_of(model), -0.1)
        else:
            assign_gradients(model, estimate.grads)
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        torch.testing.assert_close(params_of(model), expected)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9), torch.optim.Adafactor])
def test_any_optimizer_lowers_the_loss(optimizer):
    model, inputs, targets = small_net(dtype=torch.float32)
    objective, draw = BatchLoss(model, inputs, targets), seeded()
    optimizer = optimizer(model.parameters(), lr=0.05)
    before = objective(params_of(model))
    for _ in range(50):
        estimate = forward_gradient(objective, params_of(model), num_tangents=8, generator=draw)
        assign_gradients(model, estimate.grads)
        optimizer.step()
    assert objective(params_of(model)) < before


@pytest.mark.parametrize("tangents", STRUCTURED)
def test_eager_step_is_an_estimate_and_an_update(objective, params, tangents):
    twin, inputs, targets = small_net()
    step = SGDStep(twin, learning_rate=0.1, num_tangents=2, tangents=tangents, compiled=False, generator=seeded())
    draw = seeded()
    for learning_rate in (0.1, 0.02):
        step.learning_rate = learning_rate
        estimate = forward_gradient(
            objective, params, num_tangents=2, tangents=tangents, generator=draw, engine="stacked"
        )
        estimate.grads.add_to_(params, -learning_rate)
        torch.testing.assert_close(step(inputs, targets), estimate.loss)
        torch.testing.assert_close(params_of(twin), params)


# Tests that compile, 10 to 20 s each: one with everything around the step, and one of each family of tangents.
needs_compiler = pytest.mark.skipif(not runtime.has_compiler(), reason="no C++ compiler")
quiet = pytest.mark.filterwarnings("ignore")  # of torch's compiler, which are not for its users


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
    # all signs drawn at once, where the eager step may draw layer by layer
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
def test_in_the_training_loop_a_stack_of_seeds_is_the_seeds_one_by_one(tangents):
    draw = seeded()
    inputs, targets = torch.randn(30, 4, generator=draw), torch.randint(0, 3, (30,), generator=draw)
    data = Dataset(inputs[:20], targets[:20], inputs[20:], targets[20:], ("a", "b", "c"), "random")
    estimator = partial(forward_gradient, num_tangents=2, tangents=tangents, engine="stacked")
    stacked, single = (
        train(MLP, data, estimator, learning_rate=1e-3, max_iterations=4, seeds=(0, 1, 2), stacked=s, progress=None)
        for s in (True, False)
    )
    for many, one in zip(stacked.runs, single.runs, strict=True):
        assert many.train_loss == pytest.approx(one.train_loss, rel=1e-4)
    assert not math.isclose(single.runs[0].train_loss[0], single.runs[0].train_loss[-1], rel_tol=1e-6)


# edge cases


class NoForwardDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 2), function

    def forward(self, inputs):
        return self.function(self.linear(inputs))


def estimate_of(model, inputs=None, targets=CLASSES, loss=F.cross_entropy, **options):
    inputs = torch.randn(5, 3) if inputs is None else inputs
    return forward_gradient(BatchLoss(model, inputs, targets, loss), params_of(model), **options)


def test_an_autograd_function_is_refused():
    # its derivative is not that of the calls inside of it, and torch shows nothing else
    with pytest.raises(NotImplementedError, match=r"Tensor\.mul was called in the forward of .*register_rule"):
        estimate_of(Wrapped(NoForwardDerivative.apply))


def test_a_function_without_any_derivative_is_named():
    message = r"igamma has no rule in the stacked pass and no forward derivative.*register_rule.*torch says"
    with pytest.raises(NotImplementedError, match=message):
        estimate_of(Wrapped(lambda x: torch.igamma(x.exp(), torch.ones(2))))


def test_writing_tangents_into_a_plain_tensor_is_refused():
    def fill(x):
        y = torch.zeros(5, 2)
        y[:, 0] = x[:, 1]
        return y

    for function in (fill, lambda x: torch.zeros(5, 2).add_(x)):
        with pytest.raises(NotImplementedError, match=r"torch\.cat or torch\.stack"):
            estimate_of(Wrapped(function))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_refuses_parameters_without_a_tangent(dtype):
    model = nn.Linear(3, 2)
    objective = BatchLoss(model, torch.randn(5, 3), CLASSES)
    with pytest.raises(TypeError, match=r"params\['bias'\] must be a real floating tensor, got torch\."):
        forward_gradient(objective, {"bias": torch.zeros(2, dtype=dtype)})


def test_refuses_what_cannot_be_estimated(objective, params):
    with pytest.raises(TypeError, match=r"BatchLoss\(model, inputs, targets\), got function.*forward_gradient"):
        forward_gradient(lambda p: p["x"].sum(), {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="nothing to differentiate"):
        forward_gradient(objective, {})
    with pytest.raises(ValueError, match="params has 'other', which the model has not"):
        forward_gradient(objective, {"other": torch.ones(2)})
    with pytest.raises(ValueError, match="tangents must be one of 'rank-one', 'per-example', 'activity', 'normal'"):
        forward_gradient(objective, params, tangents="uniform", engine="stacked")
    with pytest.raises(ValueError, match="num_tangents must be a whole number of at least 1, got 0"):
        forward_gradient(objective, params, num_tangents=0)
    with pytest.raises(ValueError, match="empty batch"):
        estimate_of(nn.Linear(3, 2), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must return a scalar tensor, got \(5,\)"):
        estimate_of(nn.Linear(3, 2), loss=partial(F.cross_entropy, reduction="none"))


def test_refuses_tangents_that_do_not_fit(objective, params):
    tangents = {name: torch.zeros(2, *p.shape, dtype=p.dtype) for name, p in params.items()}
    for wrong in (None, torch.zeros(3, 4), torch.zeros(2, 3)):
        given = tangents | {"0.bias": wrong} if wrong is not None else {n: tangents[n] for n in ("0.weight",)}
        with pytest.raises(ValueError, match=r"tangents\['0.bias'\] must have shape \(2, 4\), got"):
            stacked_jvp(objective, params, given)


@pytest.mark.parametrize("tangents", ALL)
def test_a_loss_that_does_not_depend_on_the_parameters(tangents):
    estimate = estimate_of(nn.Linear(3, 2), loss=lambda x, _: x.detach().sum(), tangents=tangents, num_tangents=2)
    assert estimate.jvps.tolist() == [0, 0]
    assert not flat(estimate.grads).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tangents", ALL)
def test_a_loss_that_is_not_finite_is_returned(tangents, value):
    loss = estimate_of(nn.Linear(3, 2), torch.full((5, 3), value), tangents=tangents).loss
    assert not loss.isfinite()


@pytest.mark.parametrize("tangents", ALL)
def test_batch_of_one(tangents):
    # one tangent, one parameter of one element: the estimate is the gradient, for all signs
    model = nn.Linear(1, 1, bias=False)
    objective = BatchLoss(model, torch.tensor([[2.0]]), torch.tensor([[1.0]]), F.mse_loss)
    estimate = forward_gradient(objective, params_of(model), tangents=tangents, engine="stacked")
    if tangents != "normal":
        torch.testing.assert_close(
            estimate.grads["weight"], backprop_gradient(objective, params_of(model)).grads["weight"]
        )


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


@pytest.mark.parametrize("tangents", STRUCTURED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_type_of_the_parameters(tangents, dtype):
    model, inputs, targets = small_cnn()
    estimate = estimate_of(model.to(dtype), inputs.to(dtype), targets, tangents=tangents, num_tangents=2)
    assert {t.dtype for t in (estimate.loss, estimate.jvps, *estimate.grads.values())} == {dtype}


@pytest.mark.parametrize("tangents", STRUCTURED)
def test_how_the_parameters_lie_in_memory_changes_no_number(tangents):
    model, inputs, targets = small_cnn()
    plain = estimate_of(model, inputs, targets, tangents=tangents, generator=seeded())
    model.to(memory_format=torch.channels_last)
    inputs = inputs.to(memory_format=torch.channels_last)
    last = estimate_of(model, inputs, targets, tangents=tangents, generator=seeded())
    torch.testing.assert_close(flat(last.grads), flat(plain.grads))


def test_an_activation_that_is_kept_for_the_next_call_is_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.state = nn.Linear(3, 3), torch.zeros(5, 3)

        def forward(self, inputs):
            self.state = torch.tanh(self.linear(inputs) + self.state)
            return self.state

    model = Recurrent()
    estimate_of(model)
    with pytest.raises(RuntimeError, match=r"outside its pass.*Keep x\.detach\(\)"):
        model.state + 1


def test_explain_tells_what_has_no_rule_and_leaves_the_model_alone():
    model, inputs, _ = small_net(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Softsign())
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    table = explain(model, inputs)
    assert list(table[table["by"] == "torch.func.jvp"]["function"]) == ["torch.nn.functional.softsign"]
    assert list(table["shape"]) == [(5, 4)] * 5 + [(5, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


LAYERS_WITH_RULES = [
    (nn.Conv1d(3, 4, 3), (5, 3, 8)),
    (nn.Conv2d(3, 4, 3), (5, 3, 8, 8)),
    *((layer, (5, 4, 8)) for layer in (nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(2), nn.BatchNorm1d(4))),
    *((layer, (5, 4, 8, 8)) for layer in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2))),
    *((layer, (5, 4, 8, 8)) for layer in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(8), nn.Flatten())),
    *((layer, (5, 4)) for layer in (nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU())),
    *((layer, (5, 4)) for layer in (nn.ELU(), nn.LeakyReLU(), nn.Softplus(), nn.Dropout(), nn.Softmax(1))),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS_WITH_RULES, ids=lambda value: str(value))
def test_a_layer_of_torch_calls_functions_that_have_rules(layer, shape):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.layer = nn.Parameter(torch.zeros(())), layer

        def forward(self, inputs):
            return self.layer(inputs + self.shift)

    assert set(explain(Moved(), torch.randn(shape)).by) == {"rule"}


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("tangents", ["normal", "rank-one"])
def test_channels_last_changes_no_number(num_tangents, tangents):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(5 * 9, 3)).double()
    inputs, targets = torch.randn(6, 3, 10, 10, dtype=torch.float64), torch.arange(6) % 3

    def estimate():
        draw = torch.Generator().manual_seed(1)
        options = {"num_tangents": num_tangents, "tangents": tangents, "generator": draw}
        return forward_gradient(BatchLoss(model, inputs, targets), params_of(model), **options)

    first = estimate()
    model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    second = estimate()
    torch.testing.assert_close(second.jvps, first.jvps)
    torch.testing.assert_close(dict(second.grads), dict(first.grads))
