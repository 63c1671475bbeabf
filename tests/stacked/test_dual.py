"""Duals, the pass that carries them, and the registry of rules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.dual import METADATA, RULES, Call, Dual, Pass, pad_rows, primals_of
from fwdlib.stacked.estimator import register_rule, stacked_jvp
from fwdlib.stacked.perturbations import PerExamplePerturbation, Perturbation
from fwdlib.tangents import random_signs

PARAMS = {"weight": torch.arange(12.0).reshape(4, 3)}


@pytest.fixture
def x():
    return Dual(torch.arange(24.0).reshape(2, 4, 3))


def run_of(kind=Perturbation, params=PARAMS, num_examples=4, calls=None, num_tangents=1):
    return Pass(kind(params, num_tangents, num_examples, random_signs), params, calls)


def test_dual_looks_like_its_primal(x):
    assert (x.shape, x.dtype, x.device, x.ndim) == ((4, 3), torch.float32, torch.device("cpu"), 2)
    assert (x.size(1), x.dim(), x.numel(), len(x)) == (3, 2, 12, 4)
    assert x.is_floating_point()
    assert [x.requires_grad, x.is_complex(), x.is_cuda] == [False] * 3
    assert x.is_cpu
    assert repr(x) == "Dual(shape=(4, 3), num_tangents=1)"
    assert torch.equal(x.primal, x.stack[0])
    assert torch.equal(x.tangents, x.stack[1:])


def test_metadata_is_the_same_inside_a_pass(x):
    with run_of():
        assert (x.shape, x.dtype, len(x), x.is_cpu) == ((4, 3), torch.float32, 4, True)
    assert not METADATA & RULES.keys()


def test_dual_is_refused_outside_its_pass(x):
    with pytest.raises(RuntimeError, match=r"torch\.exp was called on a dual tensor outside its pass"):
        torch.exp(x)


def test_only_what_has_to_do_with_tangents_is_recorded(x):
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


def test_pad_rows_adds_zero_tangents_and_primals_of_takes_them_away(x):
    assert torch.equal(pad_rows(x.stack, 3)[:2], x.stack)
    assert not pad_rows(x.stack, 3)[2].any()
    found = primals_of({"a": [x, 1], "b": (x,)})
    assert torch.equal(found["a"][0], x.primal)
    assert found["a"][1] == 1
    assert not isinstance(found["b"][0], Dual)


@pytest.mark.parametrize("mixes", [lambda y: y.mean(0), lambda y: y.t(), lambda y: y[:2], lambda y: y.cumsum(1)])
def test_what_was_perturbed_before_examples_mix_gets_the_weight_of_the_whole_loss(mixes):
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
