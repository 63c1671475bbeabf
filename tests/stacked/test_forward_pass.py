"""The pass that carries duals, the registry of rules, functions without a rule, and functions that write in place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.dual import Dual
from fwdlib.stacked.estimator import stacked_gradient, stacked_jvp
from fwdlib.stacked.forward_pass import RULES, Call, Pass, register_rule
from fwdlib.stacked.perturbations import PerExamplePerturbation, Perturbation
from fwdlib.tangents import random_signs
from tests.stacked.networks import CLASSES
from tests.stacked.rules.cases import assert_agrees_with_jvp

PARAMS = {"weight": torch.arange(12.0).reshape(4, 3)}


@pytest.fixture
def x():
    return Dual(torch.arange(24.0).reshape(2, 4, 3))


def run_of(kind=Perturbation, params=PARAMS, num_examples=4, calls=None, num_tangents=1):
    return Pass(kind(params, num_tangents, num_examples, random_signs), params, calls)


def test_metadata_is_the_same_inside_a_pass(x):
    with run_of():
        assert (x.shape, x.dtype, len(x), x.is_cpu) == ((4, 3), torch.float32, 4, True)


def test_only_calls_on_tensors_with_tangents_are_recorded(x):
    calls = []
    with run_of(calls=calls):
        F.relu(torch.ones(3))
        F.relu(x)
        F.softsign(PARAMS["weight"])
        x.argmax()
    assert calls == [
        Call("torch.nn.functional.relu", (4, 3), True),
        Call("torch.nn.functional.softsign", (4, 3), False),
        Call("torch.Tensor.argmax", None, True),
    ]


def test_rows_of_parameters_duals_and_plain_tensors(x):
    run = run_of(num_tangents=2)
    assert run.stack(x) is x.stack
    assert run.stack(torch.ones(3)).shape == (1, 3)
    rows = run.stack(PARAMS["weight"])
    assert torch.equal(rows[0], PARAMS["weight"])
    assert torch.equal(rows[1:], run.perturbation.dense("weight"))
    assert (run.name_of(PARAMS["weight"]), run.name_of(x)) == ("weight", None)
    assert run.has_tangents(x)
    assert run.has_tangents(PARAMS["weight"])
    assert not run.has_tangents(torch.ones(3))


@pytest.mark.parametrize("mixes", [lambda y: y.mean(0), lambda y: y.t(), lambda y: y[:2], lambda y: y.cumsum(1)])
def test_perturbations_before_examples_mix_get_the_weight_of_the_whole_loss(mixes):
    def uses(f):
        run = run_of(PerExamplePerturbation)
        with run:
            f(F.linear(torch.ones(4, 3), PARAMS["weight"]))
        return [use.is_per_example for use in run.perturbation.uses]

    assert uses(lambda y: y.relu().flatten(1).sum(1)) == [True]
    assert uses(mixes) == [False]


def test_a_loss_comes_with_the_pieces_of_its_examples():
    run = run_of(PerExamplePerturbation, num_tangents=2)
    with run:
        loss = F.linear(torch.ones(4, 3), PARAMS["weight"]).square().mean()
    total, pieces = loss.stack[1:3], loss.stack[3:].reshape(2, 4)
    torch.testing.assert_close(total, pieces.sum(1))
    assert [use.is_per_example for use in run.perturbation.uses] == [True]


def test_own_rule_is_used_and_may_decline():
    def swish(x, slope=1.0):
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(swish, (x,), x, slope)
        return x * torch.sigmoid(slope * x)

    seen = []

    @register_rule(swish)
    def rule(run, x, slope):
        seen.append(slope)
        if slope != 1:
            return NotImplemented
        stack = run.stack(x)
        s = torch.sigmoid(stack[0])
        return Dual(torch.cat([(stack[0] * s)[None], stack[1:] * (s + stack[0] * s * (1 - s))]))

    try:
        for slope in (1.0, 2.0):
            torch.manual_seed(0)
            model = nn.Linear(3, 2).double()
            loss = lambda y, _, slope=slope: swish(y, slope).mean()  # noqa: E731
            objective = BatchLoss(model, torch.randn(4, 3, dtype=torch.float64), None, loss)
            params = params_of(model)
            tangents = {name: torch.randn(1, *p.shape, dtype=p.dtype) for name, p in params.items()}
            expected = torch.func.jvp(objective, (params,), ({name: v[0] for name, v in tangents.items()},))[1]
            torch.testing.assert_close(stacked_jvp(objective, params, tangents)[1][0], expected)
    finally:
        del RULES[swish]
    assert seen == [1.0, 2.0]


# functions without a rule, and functions that write in place


def in_place(f):
    def call(x):
        y = x * 1
        f(y)
        return y

    return call


def add_to_itself(x):
    y = x * 1
    y += x
    y *= x
    return y


def write_through_a_view(x):
    y = x * 1
    y.view(-1).add_(x.flatten())
    y[:, 0] += y[:, 1]
    y.t().mul_(2)
    return y


MODELS = {
    "softsign": F.softsign,
    "var": lambda x: x.var(1),
    "amax": lambda x: x.amax(0),
    "maximum and its place": lambda x: x.max(1),
    "topk": lambda x: x.topk(2).values,
    "cumsum": lambda x: x.cumsum(0),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "fft": lambda x: torch.fft.fft(x).abs(),
    "unpacked": lambda x: sum(row * i for i, row in enumerate(x)),
    "vectors": lambda x: x[0] @ x[1],
    "where": lambda x: torch.where(x > 0, x, x.exp()),
    "norm": lambda x: F.normalize(x).norm(),
    "log sigmoid": F.logsigmoid,
    "relu_": in_place(lambda y: y.relu_()),
    "torch.relu_": in_place(torch.relu_),
    "F.relu inplace": in_place(lambda y: F.relu(y, inplace=True)),
    "F.hardswish inplace": in_place(lambda y: F.hardswish(y, inplace=True)),
    "ELU inplace": in_place(nn.ELU(inplace=True)),
    "zero_": in_place(lambda y: y.zero_()),
    "copy_": in_place(lambda y: y.copy_(y.sin())),
    "clamp_": in_place(lambda y: y.clamp_(-0.5, 0.5)),
    "masked_fill_": in_place(lambda y: y.masked_fill_(y > 0, 2)),
    "+= and *=": add_to_itself,
    "through views": write_through_a_view,
    "a copy stays": lambda x: (lambda y, z: (y.mul_(2), z))(x * 1, (x * 1).clone())[1],
    "input by name": lambda x: F.softmax(input=x, dim=1),
    "scalar tensors do not widen": lambda x: x.float() * torch.tensor(2.0, dtype=torch.float64),
    "a mean over everything": lambda x: x.mean(),
    "centred by a mean over everything": lambda x: (x - x.mean()).square(),
    "nothing of it": lambda x: x.detach() * 2,
    "sqrt of the number of features": lambda x: x / x.shape[-1] ** 0.5,
}


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_functions_without_a_rule_and_in_place_ones_agree_with_forward_mode(name, num_tangents):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, inputs):
            return MODELS[name](self.linear(inputs))

    torch.manual_seed(0)
    assert_agrees_with_jvp(Model(), torch.randn(4, 3, dtype=torch.float64), num_tangents=num_tangents)


# refusals


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


def estimate_of(model):
    return stacked_gradient(BatchLoss(model, torch.randn(5, 3), CLASSES), params_of(model))


def test_an_autograd_function_is_refused():
    # the pass sees only the calls inside the function, whose derivative need not be the function's own
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
    with pytest.raises(RuntimeError, match=r"outside its pass.*keep x\.detach\(\)"):
        model.state + 1
