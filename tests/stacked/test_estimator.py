"""The stacked estimate: exact cases, steps of optimizers, edge cases."""

import math
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.data import Dataset
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.models import MLP
from fwdlib.objectives import BatchLoss, ClosureLoss, assign_gradients, params_of
from fwdlib.stacked.estimator import stacked_gradient, stacked_jvp
from fwdlib.stacked.perturbations import PERTURBATIONS
from fwdlib.tangents import TANGENTS
from fwdlib.training import train
from tests.stacked.networks import CLASSES, flat, seeded, small_cnn, small_net

STRUCTURED = list(PERTURBATIONS)
ALL = list(dict.fromkeys([*PERTURBATIONS, *TANGENTS]))


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
def test_both_engines_give_the_same_estimate_from_the_same_tangents(objective, params, tangents):
    stacked, textbook = (  # both draw rank-one tangents as factors
        forward_gradient(objective, params, num_tangents=3, tangents=tangents, generator=seeded(), engine=engine)
        for engine in ("stacked", "torch")
    )
    torch.testing.assert_close(stacked.jvps, textbook.jvps)
    torch.testing.assert_close(flat(stacked.grads), flat(textbook.grads))
    torch.testing.assert_close(stacked.loss, textbook.loss)


@pytest.mark.parametrize("tangents", ALL)
def test_protocol(objective, params, tangents):
    estimate = stacked_gradient(objective, params, num_tangents=3, tangents=tangents)
    assert (estimate.loss.shape, estimate.jvps.shape) == ((), (3,))
    assert {n: g.shape for n, g in estimate.grads.items()} == {n: p.shape for n, p in params.items()}
    assert not any(t.requires_grad for t in (estimate.loss, estimate.jvps, *estimate.grads.values()))


@pytest.mark.parametrize("tangents", ALL)
def test_copies_of_the_parameters_give_the_same_estimate(objective, params, tangents):
    copies = {name: p.clone() for name, p in params.items()}
    with torch.no_grad():
        own = stacked_gradient(objective, params, tangents=tangents, generator=seeded())
        expected = flat(own.grads)
        for p in objective.model.parameters():
            p.zero_()
    elsewhere = stacked_gradient(objective, copies, tangents=tangents, generator=seeded())
    torch.testing.assert_close(elsewhere.loss, own.loss)
    torch.testing.assert_close(flat(elsewhere.grads), expected)


@pytest.mark.parametrize("tangents", ALL)
def test_running_statistics_advance_once_per_estimate(tangents):
    model, inputs, targets = small_net(nn.BatchNorm1d(4))
    twin, _, _ = small_net(nn.BatchNorm1d(4))
    stacked_gradient(BatchLoss(model, inputs, targets), params_of(model), num_tangents=2, tangents=tangents)
    twin(inputs)
    for buffer, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


# steps


@pytest.mark.parametrize("tangents", ALL)
def test_a_step_by_factors_equals_the_step_of_an_optimizer(objective, params, tangents):
    estimate = stacked_gradient(objective, params, num_tangents=2, tangents=tangents, generator=seeded())
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
        estimate = stacked_gradient(objective, params_of(model), num_tangents=8, generator=draw)
        assign_gradients(model, estimate.grads)
        optimizer.step()
    assert objective(params_of(model)) < before


@pytest.mark.parametrize("tangents", STRUCTURED)
def test_the_training_loop_gives_the_same_numbers_for_all_seeds_at_once_and_one_by_one(tangents):
    draw = seeded()
    inputs, targets = torch.randn(30, 4, generator=draw), torch.randint(0, 3, (30,), generator=draw)
    data = Dataset(inputs[:20], targets[:20], inputs[20:], targets[20:], ("a", "b", "c"), "random")
    estimator = partial(stacked_gradient, num_tangents=2, tangents=tangents)
    stacked, single = (
        train(MLP, data, estimator, learning_rate=1e-3, max_iterations=4, seeds=(0, 1, 2), together=s, progress=None)
        for s in (True, False)
    )
    for many, one in zip(stacked.runs, single.runs, strict=True):
        assert many.train_loss == pytest.approx(one.train_loss, rel=1e-4)
    assert not math.isclose(single.runs[0].train_loss[0], single.runs[0].train_loss[-1], rel_tol=1e-6)


# edge cases


def estimate_of(model, inputs=None, targets=CLASSES, loss=F.cross_entropy, **options):
    inputs = torch.randn(5, 3) if inputs is None else inputs
    return stacked_gradient(BatchLoss(model, inputs, targets, loss), params_of(model), **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_refuses_parameters_without_a_tangent(dtype):
    model = nn.Linear(3, 2)
    objective = BatchLoss(model, torch.randn(5, 3), CLASSES)
    with pytest.raises(TypeError, match=r"params\['bias'\] must be a real floating tensor, got torch\."):
        stacked_gradient(objective, {"bias": torch.zeros(2, dtype=dtype)})


def test_refuses_what_cannot_be_estimated(objective, params):
    with pytest.raises(ValueError, match=r"need the layers of a model .* BatchLoss\(model, inputs, targets\)"):
        stacked_gradient(lambda p: p["x"].sum(), {"x": torch.ones(2)}, tangents="activity")
    with pytest.raises(ValueError, match="nothing to differentiate"):
        stacked_gradient(objective, {})
    with pytest.raises(ValueError, match="params has 'other'"):
        stacked_gradient(objective, {"other": torch.ones(2)})
    with pytest.raises(ValueError, match="tangents must be one of 'rank-one', 'per-example', 'activity', 'normal'"):
        stacked_gradient(objective, params, tangents="uniform")
    with pytest.raises(ValueError, match="num_tangents must be a whole number of at least 1, got 0"):
        stacked_gradient(objective, params, num_tangents=0)
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
    with pytest.raises(ValueError, match="does not depend on the model's trainable parameters: it was detached"):
        estimate_of(nn.Linear(3, 2), loss=lambda x, _: x.detach().sum(), tangents=tangents, num_tangents=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tangents", ALL)
def test_a_loss_that_is_not_finite_is_returned(tangents, value):
    loss = estimate_of(nn.Linear(3, 2), torch.full((5, 3), value), tangents=tangents).loss
    assert not loss.isfinite()


@pytest.mark.parametrize("tangents", ALL)
def test_batch_of_one(tangents):
    # with one tangent and one parameter of one element, the estimate is the gradient whatever the signs
    model = nn.Linear(1, 1, bias=False)
    objective = BatchLoss(model, torch.tensor([[2.0]]), torch.tensor([[1.0]]), F.mse_loss)
    estimate = stacked_gradient(objective, params_of(model), tangents=tangents)
    if tangents != "normal":
        torch.testing.assert_close(
            estimate.grads["weight"], backprop_gradient(objective, params_of(model)).grads["weight"]
        )


@pytest.mark.parametrize("tangents", STRUCTURED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_type_of_the_parameters(tangents, dtype):
    model, inputs, targets = small_cnn()
    estimate = estimate_of(model.to(dtype), inputs.to(dtype), targets, tangents=tangents, num_tangents=2)
    assert {t.dtype for t in (estimate.loss, estimate.jvps, *estimate.grads.values())} == {dtype}


@pytest.mark.parametrize("tangents", STRUCTURED)
def test_the_memory_format_of_the_parameters_changes_no_number(tangents):
    model, inputs, targets = small_cnn()
    plain = estimate_of(model, inputs, targets, tangents=tangents, generator=seeded())
    model.to(memory_format=torch.channels_last)
    inputs = inputs.to(memory_format=torch.channels_last)
    last = estimate_of(model, inputs, targets, tangents=tangents, generator=seeded())
    torch.testing.assert_close(flat(last.grads), flat(plain.grads))


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
        return stacked_gradient(BatchLoss(model, inputs, targets), params_of(model), **options)

    first = estimate()
    model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    second = estimate()
    torch.testing.assert_close(second.jvps, first.jvps)
    torch.testing.assert_close(dict(second.grads), dict(first.grads))


# the fallback of engine="auto"


class Physics(nn.Module):
    """A derivative by the inputs, which the stacked engine refuses, after a dropout and a layer with statistics."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 2))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x.clone().requires_grad_()
        u = self.net(x)
        return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :2]


def physics():
    torch.manual_seed(0)
    return Physics().double(), torch.randn(5, 3, dtype=torch.float64), CLASSES


@pytest.mark.parametrize("generator", [None, seeded])
def test_auto_falls_back_on_the_torch_engine_along_the_same_tangents(generator):
    def estimate(engine):
        model, inputs, targets = physics()
        objective, options = BatchLoss(model, inputs, targets), {} if generator is None else {"generator": seeded()}
        found = [forward_gradient(objective, params_of(model), engine=engine, num_tangents=2, **options) for _ in "ab"]
        return [(e.loss, e.jvps, dict(e.grads)) for e in found], dict(model.named_buffers()), torch.rand(1), model.calls

    *auto, num_calls = estimate("auto")
    *by_torch, expected_calls = estimate("torch")
    torch.testing.assert_close(auto, by_torch)
    assert num_calls == expected_calls == 2


def test_no_other_estimate_falls_back():
    for options in ({"engine": "stacked"}, {"tangents": "per-example"}, {"tangents": "activity"}):
        model, inputs, targets = physics()
        with pytest.raises(NotImplementedError, match=r"torch\.autograd\.grad.*engine='torch'"):
            forward_gradient(BatchLoss(model, inputs, targets), params_of(model), **options)


def test_a_part_in_torchscript_is_refused_before_the_pass():
    model = nn.Sequential(nn.BatchNorm1d(3), torch.jit.script(nn.Linear(3, 2)))
    with pytest.raises(NotImplementedError, match=r"TorchScript.*was scripted or traced"):
        estimate_of(model)
    assert not model[0].running_mean.any()


Pair = namedtuple("Pair", ["one", "other"])


@dataclass
class Held:
    """What a model keeps."""

    hidden: torch.Tensor


KEPT = {
    "tuple": lambda h: (h, 1),
    "namedtuple": lambda h: Pair(1, h),
    "largest": lambda h: h.max(1),
    "OrderedDict": lambda h: OrderedDict(h=h),
    "defaultdict": lambda h: defaultdict(list, {"h": [h]}),
    "dataclass": Held,
    "namespace": lambda h: SimpleNamespace(h=(h, [h])),
    "nest": lambda h: [{"h": (h, deque([h]))}],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_model_keeps_holds_plain_tensors(name):
    class Keeping(nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            self.kept = KEPT[name](h)
            return h

    model = Keeping(3, 3)
    loss = forward_gradient(ClosureLoss(model, lambda: model(torch.ones(4, 3)).square().sum()), params_of(model)).loss
    model(torch.ones(4, 3))
    expected = model.kept
    forward_gradient(ClosureLoss(model, lambda: model(torch.ones(4, 3)).square().sum()), params_of(model))
    seen, queue = [], [model.kept]
    while queue:
        value = queue.pop()
        if isinstance(value, torch.Tensor):
            seen.append(value)
        queue += value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list, deque)) else ()
        queue += vars(value).values() if isinstance(value, (Held, SimpleNamespace)) else ()
    assert loss > 0
    assert seen
    assert {type(value) for value in seen} == {torch.Tensor}
    assert type(model.kept) is type(expected)
