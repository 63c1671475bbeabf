"""The pass that carries duals, the registry of rules, functions without a rule, and functions that write in place."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fwdlib.estimators import backprop_gradient
from fwdlib.objectives import BatchLoss, ClosureLoss, params_of
from fwdlib.stacked.dual import Dual
from fwdlib.stacked.estimator import stacked_gradient, stacked_jvp
from fwdlib.stacked.forward_pass import RULES, Call, Pass, register_rule
from fwdlib.stacked.perturbations import PerExamplePerturbation, Perturbation
from fwdlib.tangents import normal, random_signs
from tests.forward.test_mode import BATCH
from tests.forward.test_mode import MODELS as MODELS_OF_FORWARD_MODE
from tests.stacked.against_backprop import INPUTS, Net, assert_as_backprop, by_the_pass
from tests.stacked.networks import CLASSES
from tests.stacked.rules.cases import assert_agrees_with_jvp

PARAMS = {"weight": torch.arange(12.0).reshape(4, 3)}


@pytest.fixture
def x():
    x = Dual(torch.arange(24.0).reshape(2, 4, 3))
    x.since = 10**9  # as if made in the pass of the test
    return x


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


LOSSES = {
    "mean": lambda y: y.square().mean(),
    "cross entropy": lambda y: F.cross_entropy(y, torch.tensor([0, 1, 2, 3])),
    "label smoothing": lambda y: F.cross_entropy(y, torch.tensor([0, 1, -100, 3]), label_smoothing=0.1),
    "probabilities": lambda y: F.cross_entropy(y, torch.full((4, 4), 0.25), reduction="sum"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_comes_with_the_pieces_of_its_examples(name):
    run = run_of(PerExamplePerturbation, num_tangents=2)
    with run:
        loss = LOSSES[name](F.linear(torch.ones(4, 3), PARAMS["weight"]))
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
    "a part of it detached": lambda x: x.detach() * 2 * x[:1],
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
    message = (
        r"igamma has a derivative for the backward pass and none for forward mode.*not implemented.*backprop_gradient"
    )
    with pytest.raises(NotImplementedError, match=message):
        estimate_of(Wrapped(lambda x: torch.igamma(x.exp(), torch.ones(2))))


def test_an_activation_that_is_kept_in_the_model_becomes_plain():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.state, self.kept = nn.Linear(3, 3), torch.zeros(5, 3), {"all": []}

        def forward(self, inputs):
            self.state = torch.tanh(self.linear(inputs) + self.state)
            self.kept["all"].append(self.state)
            return self.state

    model = Recurrent()
    estimate_of(model)
    assert type(model.state) is type(model.kept["all"][0]) is torch.Tensor
    estimate_of(model)
    assert (model.state + 1).isfinite().all()


def test_an_activation_that_a_closure_keeps_is_a_constant_after_the_pass_and_in_the_next():
    kept = []
    model = Wrapped(lambda x: kept.append(x) or x * 2)
    estimate_of(model)
    assert torch.equal(kept[0].argmax(1), kept[0].detach().argmax(1))

    draw = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(5, 3, generator=draw), nn.Parameter(torch.randn(3, 3, generator=draw))
    gru, states = nn.GRUCell(3, 3), [torch.zeros(5, 3)]
    gru.register_parameter("own", weight)

    def closure():
        states.append(gru(inputs @ weight, states[-1]))
        return torch.cat([states[-2], states[-1]]).square().mean()

    for num_tangents in (1, 3):
        params, last = params_of(gru), len(states) - 1
        tangents = normal(params, num_tangents, draw)
        loss, jvps = stacked_jvp(ClosureLoss(gru, closure), params, tangents)
        states[last] = states[last].detach()
        del states[last + 1 :]
        exact = backprop_gradient(ClosureLoss(gru, closure), params)
        torch.testing.assert_close(loss, exact.loss)
        expected = sum((exact.grads[name] * v).flatten(1).sum(1) for name, v in tangents.items())
        torch.testing.assert_close(jvps, expected, rtol=1e-4, atol=1e-6)
        del states[last + 1 :]
        stacked_jvp(ClosureLoss(gru, closure), params, tangents)  # leaves a state of its own for the next round


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


USES_OF_KEPT = {
    "an autograd function": lambda kept, y: Square.apply(kept).sum() + 0 * y.sum(),
    "the first argument": lambda kept, y: (kept * 2).sum() + 0 * y.sum(),
    "the second argument": lambda kept, y: (0 * y + kept).sum(),
    "metadata, then in place": lambda kept, y: 0 * y.mul_(len(kept) / kept.shape[0]).sum(),
    "written from": lambda kept, y: 0 * torch.zeros_like(y).copy_(kept).sum() + 0 * y.sum(),
    "into a part": lambda kept, y: _with_part(y, kept),
}


def _with_part(y, kept):
    y[1:] = kept[1:]
    return 0 * y.sum()


@pytest.mark.parametrize("name", USES_OF_KEPT)
def test_what_an_earlier_pass_has_computed_has_no_tangents(name):
    model, kept, inputs = nn.Linear(3, 3), [], torch.randn(2, 3)
    stacked_gradient(ClosureLoss(model, lambda: kept.append(model(inputs)) or kept[0].sum()), params_of(model))
    estimate = stacked_gradient(
        ClosureLoss(model, lambda: USES_OF_KEPT[name](kept[0], model(inputs))), params_of(model)
    )
    assert estimate.jvps.tolist() == [0]
    with pytest.raises(ValueError, match="does not depend"):
        stacked_gradient(ClosureLoss(model, lambda: kept[0].sum()), params_of(model))


def test_a_loss_of_an_earlier_pass_is_a_constant():
    model, kept, inputs = nn.Linear(3, 3), [], torch.randn(2, 3)

    def closure():
        kept.append(model(inputs).sum())
        return kept[0]

    stacked_gradient(ClosureLoss(model, closure), params_of(model))
    with pytest.raises(ValueError, match="does not depend"):
        stacked_gradient(ClosureLoss(model, closure), params_of(model))


def test_a_pass_inside_another_is_refused_if_it_reads_the_others_tensors():
    outer, inner, inputs = nn.Linear(3, 3), nn.Linear(3, 1), torch.randn(2, 3)
    v = normal(params_of(inner), 1, torch.Generator().manual_seed(0))
    reads = {
        "tensor": lambda: inner(outer(inputs)).sum(),
        "parameter": lambda: inner(inputs @ outer.weight).sum(),
        "nothing": lambda: inner(inputs).sum(),
    }

    def closure(name):
        along = stacked_jvp(ClosureLoss(inner, reads[name]), params_of(inner), v)[1]
        return outer(inputs).sum() * float(along)

    for name in ("tensor", "parameter"):
        with pytest.raises(NotImplementedError, match="a pass inside another one"):
            stacked_gradient(ClosureLoss(outer, lambda name=name: closure(name)), params_of(outer))
    assert stacked_gradient(ClosureLoss(outer, lambda: closure("nothing")), params_of(outer)).jvps.all()


def test_what_an_earlier_pass_has_computed_is_not_written_into():
    kept, model = [], nn.Linear(3, 3)

    def closure():
        kept.append(model(torch.ones(2, 3)))
        return kept[0].mul_(2).sum() + kept[-1].sum()

    stacked_gradient(ClosureLoss(model, closure), params_of(model))
    with pytest.raises(NotImplementedError, match=r"keep x\.detach\(\)"):
        stacked_gradient(ClosureLoss(model, closure), params_of(model))


def test_an_error_in_the_model_leaves_everything_as_it_was():
    def fails(x):
        torch.set_grad_enabled(False)
        with torch.no_grad():
            raise ValueError(f"not a scalar: {x.shape}")

    model = Wrapped(fails)
    with pytest.raises(ValueError, match="not a scalar"):
        estimate_of(model)
    assert torch.is_grad_enabled()
    assert torch._C._is_fwd_grad_enabled()
    assert all(p.requires_grad for p in model.parameters())
    assert (model.linear.weight + 1).grad_fn is not None


# grad mode


def target_under_no_grad(model, h):
    with torch.no_grad():
        target = model.c(h + 0.1)
    return model.c(h) - target


def changed_under_no_grad(model, h):
    h = h * 1
    with torch.no_grad():
        h.mul_(2)
        h[:, 0] = 0
        h[h < 0] *= 0.1
        with torch.enable_grad():
            h = h + model.c(h)
    return h


def buffer_assigned(model, h):
    with torch.no_grad():
        model.buffer = 0.9 * model.buffer + 0.1 * h
    return h - model.buffer


def buffer_changed(model, h):
    with torch.no_grad():
        model.buffer.mul_(0.9).add_(h, alpha=0.1)
    return h - model.buffer


def results_by_out(_, h):
    h, x = h * 1, torch.empty_like(h)
    with torch.no_grad():
        torch.mul(h, 2, out=x)
        torch.sin(h, out=h)
    return h * x


def the_same_tensor_under_no_grad(_, h):
    with torch.no_grad():
        y = h.double()  # torch returns h itself, which has a gradient
    return h.sin() * y


def set_as_a_function(model, h):
    torch.set_grad_enabled(False)
    y = model.c(h)
    torch.set_grad_enabled(True)
    return model.c(h) * y


def clamped_parameter(model, h):
    with torch.no_grad():
        model.w.clamp_(-0.5, 0.5)
    return h @ model.w


def in_inference_mode(model, h):
    with torch.inference_mode():
        y = model.c(h)
    return h + y.clone()


def function_under_no_grad(_, h):
    with torch.no_grad():
        y = NoForwardDerivative.apply(h)
    return h * y


GRAD_MODE = [
    *(target_under_no_grad, changed_under_no_grad, buffer_assigned, buffer_changed, results_by_out),
    *(the_same_tensor_under_no_grad, set_as_a_function, clamped_parameter, in_inference_mode, function_under_no_grad),
]


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("body", GRAD_MODE)
def test_tangents_are_cut_where_gradients_are(body, num_tangents):
    assert_as_backprop(lambda: Net(body), num_tangents)


def test_the_pass_is_in_grad_mode_wherever_it_is_called():
    seen = []
    with torch.no_grad():
        estimate_of(Wrapped(lambda x: seen.append((torch.is_grad_enabled(), x.requires_grad)) or x))
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        estimate_of(Wrapped(lambda x: seen.append((torch.is_grad_enabled(), x.requires_grad)) or x))
    assert seen == [(True, True)] * 2


# models, and what reaches torch below the function mode


CANNOT_FOLLOW = {
    "autograd.grad inside",
    "autograd.grad by the parameters",
    "torch.func.grad inside",
    "torch.func.jvp inside",
    "TorchScript",
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("name", MODELS_OF_FORWARD_MODE)
def test_models_are_right_or_refused(name, num_tangents, mode):
    def make():
        return MODELS_OF_FORWARD_MODE[name]().train(mode == "train")

    options = num_tangents, lambda model: F.cross_entropy(model(BATCH[0]), BATCH[1])
    if name not in CANNOT_FOLLOW:
        assert_as_backprop(make, *options)
        return
    with pytest.raises(NotImplementedError, match="engine='torch'"):
        by_the_pass(make, *options)


class Inside(torch.autograd.Function):
    """Backprop's derivative is not that of the calls in its forward."""

    @staticmethod
    def forward(ctx, x, context):
        with context():
            return x.sin().clone()

    @staticmethod
    def backward(ctx, g):
        return 3 * g, None


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return -g


class Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ones(6, 6, dtype=torch.float64)

    @staticmethod
    def backward(ctx, g):
        return g


def scripted(function, *tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)(*tensors)


def times_two(x):
    return x * 2


def product(x, y):
    return x @ y


def without_overrides(function, *tensors):
    with torch._C.DisableTorchFunction():
        return function(*tensors)


def in_a_thread(function, *tensors):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *tensors).result()


def filled(h):
    x = torch.zeros(6, 6, dtype=h.dtype)
    x[:] = h
    return x


def inner_step(model, h):
    params = dict(model.c.named_parameters())
    inner = torch.func.grad(lambda p: torch.func.functional_call(model.c, p, (INPUTS @ INPUTS.t(),)).square().mean())
    steps = inner(params)
    return torch.func.functional_call(model.c, {n: p - 0.1 * steps[n] for n, p in params.items()}, (h,))


BELOW = {
    "a Function of a filled tensor": lambda _, h: Constant.apply(filled(h)),
    "a script of an activation": lambda _, h: scripted(times_two, h),
    "a script of a parameter": lambda model, h: h * scripted(times_two, model.w),
    "a script of both": lambda model, h: scripted(product, h, model.w),
    "a script of a filled tensor": lambda _, h: scripted(times_two, filled(h)),
    "no overrides, a parameter": lambda model, h: h * without_overrides(times_two, model.w),
    "no overrides, an activation": lambda _, h: without_overrides(times_two, h),
    "a thread, a parameter": lambda model, h: h * in_a_thread(times_two, model.w),
    "a thread, an activation": lambda _, h: in_a_thread(times_two, h),
    "torch.func.vmap": lambda model, h: torch.func.vmap(model.c)(h),
    "torch.func.vmap over places": lambda _, h: torch.func.vmap(lambda i: h[i])(torch.arange(6)),
    "torch.func.vmap of a filled tensor": lambda _, h: torch.func.vmap(lambda row: row * 2)(filled(h)),
    "torch.func.vjp": lambda _, h: torch.func.vjp(torch.sin, h)[1](h.detach())[0],
    "torch.func.jacrev": lambda _, h: torch.func.jacrev(lambda x: x.sin().sum(0))(h).sum(1),
    "torch.func.hessian": lambda _, h: torch.func.hessian(lambda x: (x**3).sum())(h[0]) * h,
    "torch.func.grad under no_grad": lambda _, h: torch.no_grad()(torch.func.grad(lambda x: (x**3).sum()))(h) * h,
    "torch.func.grad by parameters": inner_step,
}


@pytest.mark.parametrize("num_tangents", [1, 2])
@pytest.mark.parametrize("name", BELOW)
def test_what_the_pass_cannot_see_is_refused_with_the_way_out(name, num_tangents):
    with pytest.raises(NotImplementedError, match="engine='torch'"):
        by_the_pass(lambda: Net(BELOW[name]), num_tangents)


SEEN = {
    "no_grad in a Function": lambda _, h: Inside.apply(h, torch.no_grad),
    "enable_grad in a Function": lambda _, h: Inside.apply(h, torch.enable_grad),
    "a Function that returns its input": lambda _, h: Same.apply(h),
    "a Function that returns a constant": lambda _, h: h * Constant.apply(h),
    "a Function of a parameter": lambda model, h: h * Constant.apply(model.w),
    "torch.func.vmap of plain tensors": lambda _, h: h * torch.func.vmap(lambda i: i * 2)(torch.arange(6)),
    "torch.func.functional_call": lambda model, h: torch.func.functional_call(model.c, {"weight": model.w * 2}, (h,)),
    "a script of constants": lambda model, h: h * torch.no_grad()(scripted)(times_two, model.w),
    "a checkpoint": lambda model, h: checkpoint(lambda x: F.dropout(model.c(x), 0.3), h, use_reentrant=False),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_the_pass_can_see_is_right(name):
    assert_as_backprop(lambda: Net(SEEN[name]))


def test_an_input_that_requires_a_gradient_changes_nothing():
    inputs = INPUTS.clone().requires_grad_()
    assert_as_backprop(lambda: Net(lambda model, h: h), loss_of=lambda model: model(inputs * 2).square().mean())


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_part_runs_as_it_was_written():
    assert_as_backprop(lambda: Net(lambda model, h: torch.compile(model.c, backend="eager")(h)))
