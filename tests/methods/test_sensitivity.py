"""Processes: exact gradients by every way there is, and what is refused."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from fwdlib import runtime
from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.methods.process import ProcessLoss
from fwdlib.methods.process_runs import MAX_CHUNK, find_step
from fwdlib.methods.reverse import reverse_gradient
from fwdlib.methods.sensitivity import online_gradient, sensitivities, sensitivity_gradient

DOUBLE = torch.float64
NEEDS_COMPILER = pytest.mark.skipif(not runtime.has_compiler(), reason="no C++ compiler")


def numbers(**values):
    return {name: torch.tensor(value, dtype=DOUBLE) for name, value in values.items()}


def lotka_volterra(num_steps=40, observations=None, num=None):
    """Prey and predators by the classical Runge-Kutta method; the start is a parameter, too."""

    def slope(z, p):
        return p["a"] * z[0] - p["b"] * z[0] * z[1], p["d"] * z[0] * z[1] - p["c"] * z[1]

    def step(z, p, h=0.05):
        def ahead(k, s):
            return tuple(x + s * y for x, y in zip(z, k, strict=True))

        one = slope(z, p)
        two = slope(ahead(one, h / 2), p)
        three = slope(ahead(two, h / 2), p)
        four = slope(ahead(three, h), p)
        each = zip(z, one, two, three, four, strict=True)
        return tuple(x + h / 6 * (a + 2 * b + 2 * c + d) for x, a, b, c, d in each)

    def start(p):
        return (
            (p["x"], p["y"])
            if num is None
            else (p["x"] * torch.linspace(0.5, 1, num, dtype=DOUBLE), p["y"].expand(num))
        )

    if observations is None:
        process = ProcessLoss(step, start, lambda z, p: (z[0] - z[1]).square().mean(), num_steps)
    else:
        loss = lambda z, p, seen: (z[0] - seen).square().mean() + p["a"] ** 2  # noqa: E731
        process = ProcessLoss(step, start, loss, num_steps, observations=observations)
    return process, numbers(a=0.55, b=0.028, c=0.8, d=0.024, x=30.0, y=4.0)


def inner_training(num_steps=12):
    """Learning rate, momentum and decay through the training of a small net: the step takes a gradient itself."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_steps, 8, 3, generator=draw, dtype=DOUBLE)
    targets = torch.randint(0, 2, (num_steps, 8), generator=draw)
    weights = {"w": torch.randn(2, 3, generator=draw, dtype=DOUBLE), "v": torch.zeros(2, dtype=DOUBLE)}

    def inner(w, x, y):
        return F.cross_entropy(F.linear(x, w["w"], w["v"]).tanh(), y)

    def step(state, p, batch):
        w, momenta, count = state
        grads = torch.func.grad(inner)(w, *batch)
        momenta = {k: p["momentum"] * momenta[k] + grads[k] + p["decay"] * w[k] for k in w}
        return {k: w[k] - p["rate"] * momenta[k] for k in w}, momenta, count + 1

    start = weights, {k: torch.zeros_like(w) for k, w in weights.items()}, torch.zeros((), dtype=torch.long)
    loss = lambda state, p: inner(state[0], inputs[0], targets[0]) * state[2]  # noqa: E731
    return ProcessLoss(step, start, loss, num_steps, inputs=(inputs, targets)), numbers(
        rate=0.1, momentum=0.9, decay=1e-2
    )


def heat(num_steps=20):
    """Diffusion and decay on a grid, from the state after several numbers of steps."""
    draw = torch.Generator().manual_seed(0)
    start = torch.rand(1, 1, 8, 8, generator=draw, dtype=DOUBLE)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=DOUBLE).reshape(1, 1, 3, 3)

    def step(u, p):
        return u + 0.1 * p["d"] * F.conv2d(F.pad(u, (1, 1, 1, 1), mode="circular"), kernel) - 0.1 * p["k"] * u**2

    seen = {t: torch.rand(1, 1, 8, 8, generator=draw, dtype=DOUBLE) for t in (0, 7, num_steps)}
    loss = lambda u, p, observed: (u - observed).square().mean()  # noqa: E731
    return ProcessLoss(step, start, loss, num_steps, observations=seen), numbers(d=0.7, k=0.3)


def written_in_place(num_steps=10):
    """A step that fills a new state piece by piece, which torch's vmap does not allow."""

    def step(z, p):
        new = torch.empty_like(z)
        for i in range(3):
            new[i] = z[i - 1] * p["a"][i].cos()
        return new

    start = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    return ProcessLoss(step, start, lambda z, p: z.sum(), num_steps), numbers(a=[0.1, 0.2, 0.3])


def counted(num_steps=23):
    """A number, with a count of the steps beside it."""

    def step(state, p):
        z, count = state
        return z - 0.1 * p["a"] * z.sin() * count, count + 1

    start = torch.ones((), dtype=DOUBLE), torch.zeros((), dtype=torch.long)
    return ProcessLoss(step, start, lambda state, p: state[0] * state[1], num_steps), numbers(a=0.3)


def large(num_steps=7):
    """A state of so many numbers that few steps are compiled together."""
    start = torch.linspace(0, 1, 5_000, dtype=DOUBLE)
    step = lambda z, p: z + 0.1 * p["a"] * z.roll(1) - 0.1 * p["b"] * z  # noqa: E731
    return ProcessLoss(step, start, lambda z, p: z.square().mean(), num_steps), numbers(a=1.0, b=0.5)


PROCESSES = {
    "Lotka-Volterra": lotka_volterra,
    "several trajectories": partial(lotka_volterra, num=5),
    "observed on the way": partial(lotka_volterra, observations={0: 30.0, 13: 20.0, 33: 10.0}),
    "training": inner_training,
    "a PDE": heat,
    "in place": written_in_place,
    "a number and a count": counted,
    "a large state": large,
}


def assert_equal(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=tolerance)
    for name, g in expected.grads.items():
        torch.testing.assert_close(found.grads[name], g, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PROCESSES)
def test_forward_and_reverse_give_the_gradient_of_backprop(name):
    process, params = PROCESSES[name]()
    expected = backprop_gradient(process, params)
    assert_equal(sensitivity_gradient(process, params, compiled=False), expected)
    assert_equal(forward_gradient(process, params, tangents="unit"), expected)
    assert_equal(reverse_gradient(process, params), expected)
    for num_checkpoints in (1, 3, process.num_steps):
        assert_equal(reverse_gradient(process, params, num_checkpoints=num_checkpoints), expected)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_compiled_steps_give_the_same(name):
    process, params = PROCESSES[name]()
    expected = backprop_gradient(process, params)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the process runs")
        for _ in range(2):
            assert_equal(sensitivity_gradient(process, params, compiled=True), expected)
        others = {key: 1.01 * p for key, p in params.items()}
        assert_equal(sensitivity_gradient(process, others, compiled=True), backprop_gradient(process, others))
    if name != "training":
        assert_equal(reverse_gradient(process, params, num_compiled=2), expected)


@NEEDS_COMPILER
@pytest.mark.slow
def test_compiled_reverse_mode_does_not_run_eagerly_when_torch_has_compiled_many_shapes():
    process, params = lotka_volterra(num_steps=4)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):  # eager would raise
        for num_compiled in (1, 2, 4):
            assert_equal(
                reverse_gradient(process, params, num_compiled=num_compiled), backprop_gradient(process, params)
            )


def test_other_tangents_estimate_the_gradient():
    process, params = lotka_volterra()
    exact = backprop_gradient(process, params).grads
    draw = torch.Generator().manual_seed(0)
    found = sensitivity_gradient(process, params, tangents="normal", num_tangents=3, generator=draw, compiled=False)
    again = forward_gradient(process, params, tangents="normal", num_tangents=3, generator=draw.manual_seed(0))
    assert_equal(found, again)
    assert found.jvps.shape == (3,)
    assert not torch.allclose(found.grads["a"], exact["a"])


def test_the_derivatives_of_the_state_are_given_at_each_moment():
    process, params = lotka_volterra(observations={5: 0.0, 9: 0.0})
    ones = {name: torch.ones(1, dtype=DOUBLE) for name in params}
    moments = list(sensitivities(process, params, ones, compiled=False))
    assert [m.num_steps for m in moments] == [5, 9]
    near = {name: p + 1e-6 for name, p in params.items()}
    for moment, moved in zip(moments, sensitivities(process, near, ones, compiled=False), strict=True):
        for x, y, slope in zip(moment.state, moved.state, moment.tangents, strict=True):
            torch.testing.assert_close(slope[0], (y - x) / 1e-6, rtol=1e-4, atol=1e-6)


# Programs of a few lines: each changes a state of two tensors.
LINES = {
    "mix": lambda x, y, p: (x + 0.1 * p["a"] * y, y - 0.1 * x),
    "damp": lambda x, y, p: (x * torch.sigmoid(p["b"]), y * 0.9),
    "turn": lambda x, y, p: (x.cos() * p["a"], y.sin() + p["b"]),
    "shift": lambda x, y, p: (x.roll(1), y.flip(0) * p["a"]),
    "pool": lambda x, y, p: (x - x.mean() * p["b"], y / (1 + y.square().sum())),
    "multiply": lambda x, y, p: ((p["a"] * torch.outer(x, y)).tanh().sum(0), y),
    "write": lambda x, y, p: (_written(x, y, p), y),
    "branch": lambda x, y, p: (torch.where(x > y, x * p["a"], y), torch.maximum(x, y * p["b"])),
    "cut": lambda x, y, p: (x.detach() * p["a"] + y, y),
}


def _written(x, y, p):
    z = x.clone()
    z[1:] += p["b"] * y[:-1]
    return z


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(LINES)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.integers(1, 10),
    st.integers(0, 2**31),
)
def test_random_programs(lines, num_steps, seen, num_checkpoints, seed):
    draw = torch.Generator().manual_seed(seed)
    start = tuple(torch.randn(4, generator=draw, dtype=DOUBLE) for _ in range(2))
    params = {name: torch.randn((), generator=draw, dtype=DOUBLE) for name in "ab"}

    def step(state, p):
        for line in lines:
            state = LINES[line](*state, p)
        return state

    observations = {min(t, num_steps): torch.randn(4, generator=draw, dtype=DOUBLE) for t in seen}
    loss = lambda z, p, observed: (z[0] - observed).square().sum() + z[1].sum()  # noqa: E731
    process = ProcessLoss(step, start, loss, num_steps, observations=observations)
    expected = backprop_gradient(process, params)
    assert_equal(sensitivity_gradient(process, params, compiled=False), expected, 1e-10)
    assert_equal(reverse_gradient(process, params, num_checkpoints=num_checkpoints), expected, 1e-10)


# Element-wise recurrence


def recurrent(step=None, units=6, num_steps=9, seen=(4, 9)):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_steps, 5, 1, generator=draw, dtype=DOUBLE)
    inputs[:4] = 0
    shapes = {"a": (units,), "b": (units,), "c": (units,), "w": (3, units), "v": (3,)}
    params = {name: torch.randn(shape, generator=draw, dtype=DOUBLE) for name, shape in shapes.items()}
    step = step or (lambda h, p, x: torch.tanh(p["a"] * h + p["b"] * x + p["c"]))
    targets = {t: torch.randint(0, 3, (5,), generator=draw) for t in seen}
    loss = lambda h, p, y: F.cross_entropy(F.linear(h, p["w"], p["v"]), y)  # noqa: E731
    start = torch.zeros(5, units, dtype=DOUBLE)
    return ProcessLoss(step, start, loss, num_steps, inputs=inputs, observations=targets), params


def test_three_tangents_are_exact_for_any_number_of_units():
    for units in (1, 6, 50):
        process, params = recurrent(units=units)
        found = online_gradient(process, params, elementwise=("a", "b", "c"), compiled=False)
        assert_equal(found, backprop_gradient(process, params))


def test_complex_states_and_several_tensors():
    def step(state, p, x):
        z, h = state
        z = torch.exp(torch.complex(-p["a"].abs(), p["b"])) * z + x
        return z, 0.5 * h + z.real * p["c"]

    process, params = recurrent(step)
    process.initial = torch.zeros(5, 6, dtype=torch.complex128), torch.zeros(5, 6, dtype=DOUBLE)
    process.loss = lambda s, p, y: F.cross_entropy(F.linear(s[1] + s[0].imag, p["w"], p["v"]), y)
    found = online_gradient(process, params, elementwise=("a", "b", "c"), compiled=False)
    assert_equal(found, backprop_gradient(process, params))


@pytest.mark.parametrize(
    ("step", "elementwise", "words"),
    [
        (lambda h, p, x: torch.tanh(h @ torch.outer(p["a"], p["b"]) + x + p["c"]), "abc", "not element-wise"),
        (lambda h, p, x: torch.tanh(p["a"] * h.roll(1, 1) + p["b"] * x + p["c"]), "abc", "not element-wise"),
        (lambda h, p, x: torch.tanh(p["a"] * h + p["b"] * x + p["c"]), "ab", "uses a parameter that"),
        (lambda h, p, x: torch.tanh(p["a"] * h + p["b"] * x + p["c"]), "abz", "must name parameters"),
    ],
)
def test_refuses_steps_that_are_not_elementwise(step, elementwise, words):
    process, params = recurrent(step)
    with pytest.raises(ValueError, match=words):
        online_gradient(process, params, elementwise=tuple(elementwise), compiled=False)


MIXED = {
    "sum": lambda z, p: z * p["a"].sum(),
    "flip": lambda z, p: z * p["a"].flip(0).sigmoid(),
    "roll": lambda z, p: z * p["a"].roll(1).sigmoid(),
    "state": lambda z, p: z.flip(-1) * p["a"].sigmoid(),
    "little": lambda z, p: z * p["a"].sigmoid() + 1e-3 * p["a"].sum(),
    "of a small state": lambda z, p: 1e-7 * p["a"].sum() + 0 * z,
}


@pytest.mark.parametrize("units", range(2, 9))
@pytest.mark.parametrize("mixed", MIXED)
def test_refuses_steps_that_mix_few_units_in_any_pattern(mixed, units):
    params = {"a": torch.linspace(0.2, 0.5, units, dtype=DOUBLE), "w": torch.ones(units, dtype=DOUBLE)}
    start = torch.full((3, units), 0.5, dtype=DOUBLE)
    process = ProcessLoss(MIXED[mixed], start, lambda z, p: (z * p["w"]).square().sum(), 4)
    with pytest.raises(ValueError, match="not element-wise"):
        online_gradient(process, params, elementwise=["a"], compiled=False)


# What is refused


def test_a_process_that_diverges_is_said_to():
    process = ProcessLoss(lambda z, p: z * z * p["a"], torch.ones((), dtype=DOUBLE), lambda z, p: z, 20)
    with pytest.raises(FloatingPointError, match=r"state is inf after 10 of 20 steps, with a = 3\. .*smaller steps"):
        sensitivity_gradient(process, numbers(a=3.0), compiled=False)


def test_a_parameter_outside_its_domain_is_said_to_be():
    process = ProcessLoss(lambda z, p: z + p["a"].log(), torch.ones((), dtype=DOUBLE), lambda z, p: z, 20)
    with pytest.raises(FloatingPointError, match=r"nan after 1 of 20 steps, with a = -1\. .* domain"):
        sensitivity_gradient(process, numbers(a=-1.0), compiled=False)
    process = ProcessLoss(lambda z, p: z, torch.zeros((), dtype=DOUBLE), lambda z, p: (z + p["a"]).sqrt(), 2)
    with pytest.raises(FloatingPointError, match="the loss there or its derivative is not"):
        sensitivity_gradient(process, numbers(a=0.0), compiled=False)
    process = ProcessLoss(lambda z, p: z, torch.zeros((), dtype=DOUBLE), lambda z, p: (z * p["a"]).sqrt(), 2)
    assert sensitivity_gradient(process, numbers(a=1.0), compiled=False).grads["a"] == 0  # whatever a is


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda z, p: torch.cat([z, z]) * p["a"], r"Step 1 made state \(4,\) float64 of state \(2,\) float64"),
        (lambda z, p: (z * p["a"]).float(), r"made state \(2,\) float32 of state \(2,\) float64"),
        (lambda z, p: (z * p["a"], z), r"made state\[0\] \(2,\) float64, state\[1\]"),
        (lambda z, p: None, "a step must return a state like the one it got"),
    ],
)
def test_a_step_that_changes_the_layout_is_refused(step, words):
    process = ProcessLoss(step, torch.ones(2, dtype=DOUBLE), lambda z, p: z.sum(), 3)
    for gradient in (partial(sensitivity_gradient, compiled=False), reverse_gradient, backprop_gradient):
        with pytest.raises(ValueError, match=words):
            gradient(process, numbers(a=1.0))


def test_refuses_what_cannot_be_a_process():
    make = partial(ProcessLoss, lambda z, p: z, torch.zeros(2), lambda z, p, o: z.sum())
    with pytest.raises(ValueError, match="num_steps must be a whole number"):
        make(0)
    with pytest.raises(
        ValueError, match=r"inputs\[1\] must be a tensor of shape \(3, ...\), a row for each step, got \(2,\)"
    ):
        make(3, inputs=(torch.zeros(3), torch.zeros(2)))
    with pytest.raises(ValueError, match=r"observations\[2\] has nan at \[1\]"):
        make(3, observations={2: torch.tensor([0.0, torch.nan])})
    with pytest.raises(ValueError, match="from 0 to 3, got 4"):
        make(3, observations={4: torch.zeros(2)})
    with pytest.raises(TypeError, match=r"observations must be a dict .*got list"):
        make(3, observations=[torch.zeros(2)] * 3)
    assert make(3, observations={np.int64(3): torch.zeros(2), 1: torch.ones(2)}).moments == [1, 3]
    with pytest.raises(ValueError, match="observations is empty"):
        make(3, observations={})
    with pytest.raises(TypeError, match=r"the initial state\[1\] must be a tensor, got float"):
        backprop_gradient(ProcessLoss(lambda z, p: z, (torch.zeros(2), 1.0), lambda z, p: z.sum(), 3), numbers(a=1.0))
    with pytest.raises(TypeError, match="needs a ProcessLoss, got function"):
        sensitivity_gradient(lambda p: p["a"], numbers(a=1.0))
    with pytest.raises(TypeError, match="generator must be"):
        sensitivity_gradient(make(3, observations={3: torch.zeros(2)}), numbers(a=1.0), generator=3)
    with pytest.raises(ValueError, match="must return a real number"):
        sensitivity_gradient(ProcessLoss(lambda z, p: z, torch.zeros(2), lambda z, p: z.sum() * 1j, 3), numbers(a=1.0))
    with pytest.raises(ValueError, match="must return a scalar tensor"):
        sensitivity_gradient(ProcessLoss(lambda z, p: z, torch.zeros(2), lambda z, p: z, 3), numbers(a=1.0))


@pytest.mark.parametrize("place", ["start", "step", "loss"])
@pytest.mark.parametrize("gradient", [sensitivity_gradient, reverse_gradient, backprop_gradient])
def test_a_parameter_that_is_not_given_is_named(gradient, place):
    process = ProcessLoss(
        lambda z, p: z * p["far" if place == "step" else "a"],
        (lambda p: torch.ones(2, dtype=DOUBLE) * p["far"]) if place == "start" else torch.ones(2, dtype=DOUBLE),
        lambda z, p: z.sum() * p["far" if place == "loss" else "a"],
        3,
    )
    with pytest.raises(ValueError, match="looked up 'far' and did not find it; params has a"):
        gradient(process, numbers(a=1.0))


@NEEDS_COMPILER
@pytest.mark.slow
def test_what_cannot_be_compiled_runs_as_written_and_says_why():
    def step(z, p):
        return z * p["a"] if z.item() < 100 else z * p["b"]

    process = ProcessLoss(step, torch.ones((), dtype=DOUBLE), lambda z, p: z, 12)
    params = numbers(a=2.0, b=0.5)
    with pytest.warns(
        UserWarning, match="the process runs as with compiled=False, because .* depends on the values of a tensor"
    ):
        found = sensitivity_gradient(process, params, compiled=True)
    assert_equal(found, backprop_gradient(process, params))


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_value_that_the_step_reads_may_change_between_two_runs():
    size = {"h": 0.1}
    process = ProcessLoss(
        lambda z, p: z - size["h"] * p["a"] * z, torch.ones(3, dtype=DOUBLE), lambda z, p: z.sum(), 2 * MAX_CHUNK + 1
    )
    for h in (0.1, 0.2, 0.1):
        size["h"] = h
        assert_equal(
            sensitivity_gradient(process, numbers(a=1.0), compiled=True), backprop_gradient(process, numbers(a=1.0))
        )


def set_weight(net, weight):
    net.weight = torch.nn.Parameter(weight)


def set_data(net, weight):
    net.weight.data = weight.t()


@pytest.mark.parametrize(
    "change", [set_weight, set_data, lambda net, w: net.load_state_dict({"weight": w}, assign=True)]
)
def test_a_net_that_the_step_calls_may_get_other_weights(monkeypatch, change):
    import torch._inductor

    monkeypatch.setattr(runtime, "has_compiler", lambda: True)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, examples, options: graph)  # as it was recorded
    net = torch.nn.Linear(2, 2, bias=False, dtype=DOUBLE)
    process = ProcessLoss(
        lambda z, p: z + 0.1 * p["a"] * net(z).tanh(), torch.ones(2, dtype=DOUBLE), lambda z, p: z.square().sum(), 6
    )
    for factor in (1.0, -1.0, 2.0):
        change(net, factor * torch.arange(4, dtype=DOUBLE).view(2, 2))
        found = sensitivity_gradient(process, numbers(a=1.0), compiled=True)
        assert_equal(found, backprop_gradient(process, numbers(a=1.0)))


def test_a_step_that_writes_into_the_state_is_refused_and_leaves_the_initial_one():
    def step(state, p):
        z, count = state
        count.add_(1)
        return z * (1 + 0.01 * p["a"] * count), count

    initial = torch.ones(2, dtype=DOUBLE), torch.zeros((), dtype=torch.int64)
    process = ProcessLoss(step, initial, lambda s, p: s[0].sum(), 3)
    with pytest.raises(ValueError, match="a step must return a new state"):
        sensitivity_gradient(process, numbers(a=1.0), compiled=False)
    assert initial[1] == 0


def test_backprop_through_steps_in_place_leaves_the_initial_state():
    initial = torch.ones(2, dtype=DOUBLE)
    process = ProcessLoss(lambda z, p: z.mul_(1 + p["a"]), initial, lambda z, p: z.sum(), 3)
    found = [backprop_gradient(process, numbers(a=1.0)) for _ in range(2)]
    assert_equal(found[0], found[1])
    assert initial.tolist() == [1, 1]
    assert found[0].grads["a"] == 2 * 3 * 4


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_process_on_other_data_is_as_a_new_one_and_compiled_once(compiled):
    def process_of(inputs, target):
        step = lambda z, p, x: torch.tanh(p["a"] * z + x)  # noqa: E731
        loss = lambda z, p, o: (z - o).square().sum()  # noqa: E731
        return step, torch.zeros(2), loss, 4, {"inputs": inputs, "observations": {4: target}}

    first, second = (torch.arange(8.0).view(4, 2) / 10 * sign for sign in (1, -1))
    *given, data = process_of(first, torch.ones(2))
    process, params = ProcessLoss(*given, **data), {"a": torch.tensor(0.5)}
    sensitivity_gradient(process, params, compiled=compiled)
    compiled_steps = find_step(process, params, process.start(params), trace=False)
    other = process.on(second, {4: torch.zeros(2)})
    found = sensitivity_gradient(other, params, compiled=compiled)
    *given, data = process_of(second, torch.zeros(2))
    expected = sensitivity_gradient(ProcessLoss(*given, **data), params, compiled=False)
    torch.testing.assert_close(found.grads, expected.grads)
    assert find_step(other, params, other.start(params), trace=False) is compiled_steps
    assert (compiled_steps is not None) == compiled
    with pytest.raises(ValueError, match=r"the same numbers of steps, \[4\], got \[3\]"):
        process.on(observations={3: torch.zeros(2)})


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_process_that_shares_programs_may_have_other_gaps_between_its_observations():
    def process(num_steps):
        return ProcessLoss(lambda z, p: z - 0.1 * p["a"] * z, torch.ones((), dtype=DOUBLE), lambda z, p: z, num_steps)

    first, second = process(4), process(7)
    second.programs = first.programs
    for one in (first, second):
        assert_equal(sensitivity_gradient(one, numbers(a=1.0), compiled=True), backprop_gradient(one, numbers(a=1.0)))


@NEEDS_COMPILER
@pytest.mark.slow
def test_compiled_steps_are_checked_again_when_a_value_that_they_read_changes():
    mixes = {"on": False}
    process = ProcessLoss(
        lambda z, p: p["a"] * (z.flip(-1) if mixes["on"] else z), torch.rand(2, 3), lambda z, p: z.square().sum(), 6
    )
    params = {"a": torch.rand(3)}
    for _ in range(2):
        found = online_gradient(process, params, elementwise=("a",), compiled=True)
        torch.testing.assert_close(found.grads, backprop_gradient(process, params).grads)
    mixes["on"] = True
    with pytest.raises(ValueError, match="not element-wise"):
        online_gradient(process, params, elementwise=("a",), compiled=True)


def test_an_observation_of_the_start_alone_takes_no_step():
    process = ProcessLoss(
        lambda z, p: z * p["k"], lambda p: p["k"] * 2, lambda z, p, seen: (z - seen) ** 2, 24, observations={0: 0.1}
    )
    for compiled in {False, runtime.has_compiler()}:
        assert_equal(
            sensitivity_gradient(process, numbers(k=0.5), compiled=compiled),
            backprop_gradient(process, numbers(k=0.5)),
        )


STEPS_THAT_CHANGE = {
    "list": lambda seen: lambda z, p: (seen.append(1.0), z * (1 + 0.1 * p["a"]))[1],
    "counter": lambda seen: lambda z, p: (seen.append(seen[-1] + 1), z * (1 + 0.1 * p["a"] / seen[-1]))[1],
    "tensor": lambda seen: lambda z, p: z * (1 + 0.1 * p["a"]) + seen[0].add_(0.01),
    "random": lambda seen: lambda z, p: z * (1 + 0.1 * p["a"] * random.random()),
}


@pytest.mark.parametrize("kind", STEPS_THAT_CHANGE)
def test_a_step_that_changes_something_else_is_not_compiled(monkeypatch, kind):
    import torch._inductor

    monkeypatch.setattr(runtime, "has_compiler", lambda: True)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, examples, options: graph)
    found = []
    for compiled in (False, True):
        seen = [torch.zeros((), dtype=DOUBLE) if kind == "tensor" else 0.0]
        random.seed(0)
        process = ProcessLoss(STEPS_THAT_CHANGE[kind](seen), torch.ones(2, dtype=DOUBLE), lambda z, p: z.sum(), 6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append((sensitivity_gradient(process, numbers(a=1.0), compiled=compiled), len(seen)))
    assert ["the process runs as with compiled=False" in str(w.message) for w in caught] == [True]
    (one, num), (other, other_num) = found
    torch.testing.assert_close(one.grads, other.grads, rtol=0, atol=0)
    assert num == other_num


def test_a_process_can_be_copied_after_it_was_compiled(monkeypatch):
    import torch._inductor

    monkeypatch.setattr(runtime, "has_compiler", lambda: True)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, examples, options: graph)
    process = ProcessLoss(Decay(), torch.ones(2, dtype=DOUBLE), total, 6)
    params = numbers(a=1.0)
    expected = sensitivity_gradient(process, params, compiled=True)
    for copied in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        copied.step.rate = 0.2
        assert_equal(sensitivity_gradient(copied, params, compiled=True), backprop_gradient(copied, params))
    assert_equal(sensitivity_gradient(process, params, compiled=True), expected)


class Decay:
    """A step with a number of its own."""

    rate = 0.1

    def __call__(self, z, p):
        """Take a step."""
        return z - self.rate * p["a"] * z


def total(z, p):
    return z.sum()
