"""The step of SGD: an estimate and an update, eager and compiled."""

import array
import copy
import functools
import inspect
import io
import itertools
import logging
import os
import pathlib
import pickle
import random
import re
import sys
import threading
import time
import warnings
import weakref
from collections import UserDict, deque
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fwdlib import runtime
from fwdlib.objectives import BatchLoss, ClosureLoss, params_of
from fwdlib.stacked import step as step_module
from fwdlib.stacked.estimator import stacked_gradient
from fwdlib.stacked.guarded import FULL, MAX_GRAPHS
from fwdlib.stacked.perturbations import PERTURBATIONS
from fwdlib.stacked.step import SGDStep
from tests.stacked.networks import CLASSES, seeded, small_cnn, small_net

STRUCTURED = list(PERTURBATIONS)
needs_compiler = pytest.mark.skipif(not runtime.has_compiler(), reason="no C++ compiler")
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's compiler


@pytest.fixture
def recorded(monkeypatch):
    """Run the recorded graph as it is: whether it is right does not depend on the compiler, which takes seconds."""
    import torch._inductor

    monkeypatch.setattr(runtime, "has_compiler", lambda: True)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, examples, options: graph)


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", -5, "learning_rate must be a finite number above 0, got -5"),
        ("num_tangents", 0, "num_tangents must be a whole number of at least 1, got 0"),
        ("tangents", "foo", "tangents must be one of 'rank-one', 'per-example', 'activity', got 'foo'"),
    ],
)
def test_options_are_checked_whenever_they_are_set(name, value, message):
    step = SGDStep(nn.Linear(3, 2), learning_rate=0.1, compiled=False)
    with pytest.raises(ValueError, match=message):
        setattr(step, name, value)
    with pytest.raises(ValueError, match=message):
        SGDStep(nn.Linear(3, 2), **{"learning_rate": 0.1, name: value}, compiled=False)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_are_refused_also_after_compilation(recorded, register):
    model, inputs, targets = small_net()
    step = SGDStep(model, learning_rate=0.1)
    for _ in range(3):
        step(inputs, targets)
    before = {name: p.clone() for name, p in params_of(model).items()}
    handle = getattr(next(model.parameters()), register)(lambda _: None)
    with pytest.raises(NotImplementedError, match="a parameter has a hook"):
        step(inputs, targets)
    torch.testing.assert_close(params_of(model), before, rtol=0, atol=0)
    handle.remove()
    step(inputs, targets)
    step.learning_rate = 0.0  # at the end of a schedule
    before = {name: p.clone() for name, p in params_of(model).items()}
    step(inputs, targets)
    torch.testing.assert_close(params_of(model), before, rtol=0, atol=0)
    frozen = next(model.parameters()).requires_grad_(False)
    frozen._backward_hooks = {0: None}  # torch registers none on a frozen parameter, but freezing keeps them
    step(inputs, targets)


SETTINGS = SimpleNamespace(scale=1.0)
SCALE = 1.0


class Schedule:
    """An object of the user's own that a model asks for a number."""

    def __init__(self):
        self.t = 1

    def value(self):
        return 1 / self.t


class OtherSchedule(Schedule):
    """A class that only its base leads to."""

    def value(self):
        return SCALE


class Net(nn.Module):
    """Two layers with ``body(self, hidden)`` between them, and values of all kinds for it."""

    factor = 1.0

    def __init__(self, body=lambda self, h: h, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)
        self.body = body
        self.t, self.scale, self.limits, self.schedule = 0, 1.0, [1.0], Schedule()
        self.array = np.ones(1)
        self.register_buffer("mean", torch.zeros(4, dtype=dtype))
        self.mask = torch.ones(4, dtype=dtype)

    def forward(self, x):
        return self.last(self.body(self, self.first(x)))


def batch_of(dtype=torch.float64, size=5):
    torch.manual_seed(1)
    return torch.randn(size, 3, dtype=dtype), CLASSES[:size]


def take_steps(model, step, batches, before_step):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    losses = []
    for i, batch in enumerate(batches):
        before_step(model, i)
        losses.append(step(*batch))
    return losses, model.state_dict(), model.__dict__.get("t"), torch.rand(()), random.random(), np.random.rand()


def compare(make=Net, batches=4, before_step=lambda model, i: None, loss=F.cross_entropy, rtol=0, atol=0, **options):
    """Take the same steps without a graph and, where the step finds one right, with it; ``options`` are those of both.

    Returns how many graphs there were, and the warnings.
    """
    batches = [batch_of()] * batches if isinstance(batches, int) else batches
    results, steps = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for compiled in (False, None):
            model = make()
            steps.append(SGDStep(model, loss, learning_rate=0.1, compiled=compiled, generator=seeded(), **options))
            results.append(take_steps(model, steps[-1], batches, before_step))
    torch.testing.assert_close(*results, rtol=rtol, atol=atol)
    messages = [str(w.message) for w in caught if "SGDStep" in str(w.message)]
    return num_graphs_of(steps[1]), messages


def num_graphs_of(step):
    return 0 if step._graphs is None else step._graphs.num_graphs


def branch(self, h):
    return h if h.detach().mean() > 0 else -h


def item(self, h):
    return h / max(1.0, h.detach().abs().max().item())


def integer(self, h):
    for _ in range(int(h.detach().abs().max()) + 1):
        h = h.tanh()
    return h


def listed(self, h):
    return h * sum(h.detach().flatten().tolist())


def through_numpy(self, h):
    return h * float(np.abs(h.detach().numpy()).max())


def nonzero(self, h):
    return h + len(torch.nonzero(h.detach() > 0))


def masked(self, h):
    return h + h.detach()[h.detach() > 0].mean()


def unique(self, h):
    return h * len(torch.unique(h.detach().round()))


def printing(self, h):
    print("hidden")
    return h


def logged(self, h):
    logging.getLogger(__name__).warning("hidden")
    return h


def own_noise(self, h):
    return h + torch.rand(h.shape, generator=torch.Generator(), dtype=h.dtype)


def seeded_noise(self, h):
    return h + torch.rand(h.shape, generator=seeded(), dtype=h.dtype)


def python_random(self, h):
    return h * random.random()


ARRAY = array.array("d", [1.0])


def shrink(self, h):
    self.last.weight.data.clamp_(-0.3, 0.3)
    return h


def scaled_by_code_that_no_name_leads_to(self, h):
    return h * next(iter(type(self.schedule).__subclasses__()))().value()


def shuffled(self, h):
    values = [1.0, 2.0, 3.0]
    random.shuffle(values)
    return h * values[0]


def numpy_random(self, h):
    return h * np.random.rand()


def flip(self, h):
    self.scale = -self.scale
    return h * self.scale


@torch.jit.script
def scripted_branch(x):
    if bool(x.sum() > 0):
        x = x.sin()
    return x


class Squared(torch.autograd.Function):
    """A function with a derivative for the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


ITEM = "depends on the values of a tensor, as .item()"
CANNOT_FOLLOW = "torch's compiler cannot follow the Python code"
RANDOM = f"Python's random numbers|{CANNOT_FOLLOW}"  # some versions of torch trace these functions, some do not


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (branch, ITEM),
        (item, ITEM),
        (integer, ITEM),
        (listed, CANNOT_FOLLOW),
        (through_numpy, CANNOT_FOLLOW),
        (nonzero, ITEM),
        (masked, ITEM),
        (unique, ITEM),
        (printing, CANNOT_FOLLOW),
        (logged, CANNOT_FOLLOW),
        (own_noise, CANNOT_FOLLOW),
        (seeded_noise, CANNOT_FOLLOW),
        (lambda self, h: h * len(os.getenv("HOME")), "os.getenv"),
        (lambda self, h: h * pathlib.Path("/").exists(), CANNOT_FOLLOW),
        (lambda self, h: h * (time.time() > 0), CANNOT_FOLLOW),
        (lambda self, h: h * globals()["SCALE"], CANNOT_FOLLOW),
        (lambda self, h: h * (1 + self.mask._version % 2), ITEM),
        (python_random, RANDOM),
        (shuffled, RANDOM),
        (lambda self, h: h * random.sample([1.0, 2.0], 1)[0], RANDOM),
        (lambda self, h: h * float(self.array[0]), CANNOT_FOLLOW),
        pytest.param(
            lambda self, h: h * len(self.array),
            CANNOT_FOLLOW,
            marks=pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 takes the length for a constant"),
        ),
        (lambda self, h: h * ARRAY[0], CANNOT_FOLLOW),
        (shrink, "x.data"),
        (numpy_random, CANNOT_FOLLOW),
        (lambda self, h: h + scripted_branch(h.detach()), ITEM),
        (lambda self, h: Squared.apply(h), "torch.autograd.Function"),
    ],
)
def test_what_a_graph_cannot_hold_runs_without_one_after_one_warning(recorded, body, cause):
    # two shapes of batch, and the model, its buffers and all random numbers end as without compiling
    num_graphs, messages = compare(lambda: Net(body), [batch_of(), batch_of(size=4)] * 3)
    assert num_graphs == 0
    assert len(messages) == 1
    assert messages[0].startswith("SGDStep runs as with compiled=False, because ")
    assert any(one in messages[0] for one in cause.split("|"))


def with_part(part):
    def make():
        model = Net(lambda self, h: h + self.part(h.detach()))
        model.part = part()
        return model

    return make


@quiet
def test_values_that_cannot_be_followed_are_refused(recorded):
    num_graphs, (message,) = compare(with_part(lambda: torch.jit.script(nn.Tanh())))
    assert num_graphs == 0
    assert re.search("torch.jit.script|ScriptModule", message)

    def drawing():
        model = Net(lambda self, h: h + torch.randn(h.shape, generator=self.draw, dtype=h.dtype))
        model.draw = seeded()
        return model

    def python_drawing():
        model = Net(lambda self, h: h * self.draw.random())
        model.draw = random.Random(0)
        return model

    for make in drawing, python_drawing:
        num_graphs, messages = compare(make)
        assert (num_graphs, len(messages)) == (0, 1)


def test_a_part_that_torch_has_compiled_is_traced_with_the_rest(recorded):
    assert compare(with_part(lambda: torch.compile(nn.Tanh(), backend="eager"))) == (1, [])


def test_other_threads_seed_and_print_while_a_step_is_recorded(recorded):
    done, errors, num_lines = threading.Event(), [], 0

    def work():
        nonlocal num_lines
        while not done.is_set():
            try:
                torch.manual_seed(0)
                print("line")
            except BaseException as error:
                errors.append(error)
            num_lines += 1
            time.sleep(0.001)

    with redirect_stdout(io.StringIO()) as printed:
        thread = threading.Thread(target=work)
        thread.start()
        step = SGDStep(Net(), learning_rate=0.1)
        for _ in range(3):
            step(*batch_of())
        done.set()
        thread.join()
    assert errors == []
    assert printed.getvalue().count("line") == num_lines > 0
    assert num_graphs_of(step) == 1


FALLBACK = "SGDStep runs as with compiled=False, because {}."


def anneal(self, h):
    self.t += 1
    return h / self.t


def late_change(self, h):
    self.t += 1
    return h if self.t < 5 else -h


def append(self, h):
    self.limits.append(1.0)
    return h * len(self.limits)


def assign_plain(self, h):
    self.mask = 0.9 * self.mask + 0.1 * h.detach().mean(0)
    return h - self.mask


@pytest.mark.parametrize("body", [anneal, late_change, append])
def test_a_counter_in_forward_is_right_in_each_step(recorded, body):
    num_graphs, messages = compare(lambda: Net(body), MAX_GRAPHS + 3)
    assert num_graphs == MAX_GRAPHS
    assert messages == [FALLBACK.format(FULL)]


def test_an_iterator_in_forward_is_right_in_each_step(recorded):
    def counting():
        model = Net(lambda self, h: h / next(self.count))
        model.count = itertools.count(1)
        return model

    num_graphs, messages = compare(counting, 5)
    assert num_graphs == (0 if messages else 4)  # some versions of torch do not trace it


def test_a_deque_keeps_its_greatest_length(recorded):
    def remembering():
        model = Net(remember)
        model.last_means = deque(maxlen=2)
        return model

    num_graphs, (message,) = compare(remembering, 6)
    assert num_graphs == 0
    assert "changes a deque" in message


def remember(self, h):
    self.last_means.append(h.detach().mean(0))
    return h - torch.stack(list(self.last_means)).mean(0)


def test_steps_in_threads_leave_torchs_compiler_as_it_was(recorded):
    def work():
        step = SGDStep(Net(), learning_rate=0.1)
        for _ in range(6):
            step(*batch_of())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert compare(Net) == (1, [])


def test_a_value_that_forward_turns_over_has_two_graphs(recorded):
    assert compare(lambda: Net(flip), 6) == (2, [])


@pytest.mark.parametrize("compiled", [False, None])
def test_an_empty_batch_is_refused_in_each_step(recorded, compiled):
    step = SGDStep(Net(), learning_rate=0.1, compiled=compiled)
    for _ in range(4):
        with pytest.raises(ValueError, match="inputs is an empty batch"):
            step(X[:0], Y[:0])


class Scaled(nn.Linear):
    """A layer that asks an object of its own, with methods of all kinds."""

    def __init__(self):
        super().__init__(4, 4, dtype=torch.float64)
        self.helper = Helper()

    def forward(self, h):
        helper = self.helper
        h = helper.method(self.inherited(super().forward(h))) * helper.value
        return Fresh().method(helper.of_class(helper.static(helper(h))))

    def inherited(self, h):
        return h.tanh()


class ScaledMore(Scaled):
    """One whose methods are those of its base."""


def decorated(method):
    @functools.wraps(method)
    def run(self, h):
        return method(self, h)

    return run


class Helper:
    """An object whose class changes."""

    @property
    def value(self):
        return 2.0

    @staticmethod
    def static(h):
        return h + 1

    @classmethod
    def of_class(cls, h):
        return h * 2

    @decorated
    def method(self, h):
        return h - 1

    def __call__(self, h):
        return h * 3


class Fresh:
    """A class of which forward makes an object."""

    def method(self, h):
        return h


METHODS = [
    (Scaled, "forward", lambda self, h: h),
    (ScaledMore, "forward", lambda self, h: -h),  # which had none of its own
    (Scaled, "inherited", lambda self, h: h.sin()),
    (ScaledMore, "inherited", lambda self, h: h.sin()),
    (ScaledMore, "__call__", lambda self, h: h.cos()),
    (nn.Linear, "forward", lambda self, h: F.linear(h, self.weight)),
    (Helper, "value", property(lambda self: 5.0)),
    (Helper, "static", staticmethod(lambda h: h.exp())),
    (Helper, "of_class", classmethod(lambda cls, h: h.exp())),
    (Helper, "method", lambda self, h: h.sin()),
    (Helper, "__call__", lambda self, h: h.sin()),
    (Fresh, "method", lambda self, h: h.sin()),
]


@pytest.mark.parametrize(("cls", "name", "method"), METHODS, ids=[f"{cls.__name__}.{name}" for cls, name, _ in METHODS])
def test_a_method_of_a_class_that_is_replaced_is_noticed(recorded, cls, name, method):
    with pytest.MonkeyPatch.context() as patch:

        def change(model, i):
            if i in (0, 6):
                patch.undo()
            if i == 3:
                patch.setattr(cls, name, method, raising=False)

        num_graphs, messages = compare(with_part(ScaledMore), 9, change)
    assert messages == []
    assert num_graphs >= 2


def test_results_that_lru_cache_keeps(recorded):
    @functools.lru_cache
    def noise(size):
        return torch.rand(size, dtype=torch.float64)

    def make():
        noise.cache_clear()
        return Net(lambda self, h: h * noise(4))

    num_graphs, (message,) = compare(make)
    assert num_graphs == 0
    assert "calls test_results_that_lru_cache_keeps.<locals>.noise, whose results functools.lru_cache keeps" in message


def test_a_function_of_python_that_somebody_has_put_under_lru_cache(recorded):
    cached = functools.lru_cache(inspect.signature)  # torch asks the function itself when forward assigns a buffer
    assert compare(lambda: Net(assign_buffer)) == (1, [])
    del cached


def test_the_learning_rate_is_not_rounded(recorded):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))  # too coarse to move
            self.last = nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, x):
            return self.last(self.gate.double() * x)

    def loss(logits, targets):
        return 0.01 * F.cross_entropy(logits, targets)

    assert compare(Gated, loss=loss, rtol=1e-14, atol=1e-14) == (1, [])


@pytest.mark.parametrize("tangents", STRUCTURED)
@pytest.mark.parametrize("make", [small_net, small_cnn])
def test_a_graph_draws_the_signs_in_the_same_order(recorded, tangents, make):
    _, *batch = make()
    found = compare(lambda: make()[0], [batch] * 3, tangents=tangents, num_tangents=3, rtol=1e-12, atol=1e-12)
    assert found == (1, [])


def test_more_shapes_than_graphs_leave_the_graphs_in_use(recorded):
    batches = [(X.repeat(size, 1), Y.repeat(size)) for size in range(1, MAX_GRAPHS + 5)] * 3
    assert compare(Net, batches) == (MAX_GRAPHS, [FALLBACK.format(FULL)])
    step = SGDStep(Net(), learning_rate=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches:
            step(*batch)
    with torch.no_grad():
        has_graph = [step._compiled(batch) is not None for batch in batches[: MAX_GRAPHS + 1]]
    assert has_graph == [True] * MAX_GRAPHS + [False]


def test_hooks_of_all_modules_are_noticed(recorded):
    handles = []

    def before_step(model, i):
        if i == 3:
            handles.append(nn.modules.module.register_module_forward_hook(lambda module, args, y: 2 * y))
        if i == 5:
            handles.pop().remove()

    num_graphs, (message,) = compare(Net, 7, before_step)
    assert num_graphs == 1
    assert "a hook is registered for all modules" in message


def test_torchs_compiler_switched_off(recorded):
    step = SGDStep(Net(), learning_rate=0.1)
    eager = SGDStep(Net(), learning_rate=0.1, compiled=False)
    for one in step, eager:
        one.generator = seeded()
    with torch.compiler.set_stance("force_eager"):
        for _ in range(4):
            assert step(*batch_of()) == eager(*batch_of())
    torch.testing.assert_close(params_of(step.model), params_of(eager.model), rtol=0, atol=0)


def set_global(value):
    globals()["SCALE"] = value


class Slope(nn.LeakyReLU):
    """A part of torch with a property of the user's."""

    @property
    def negative_slope(self):
        return SCALE

    @negative_slope.setter
    def negative_slope(self, value):
        pass


class Made:
    """Objects that read a global variable where Python calls them."""

    def __init__(self):
        self.scale = SCALE

    def __getitem__(self, i):
        return SCALE

    def __enter__(self):
        return SCALE

    def __exit__(self, *args):
        pass


sys.modules["settings_of_this_test"] = IMPORTED = ModuleType("settings_of_this_test")
TABLE, ITEMS, MADE, SLOPE, EVENT = {}, UserDict(), Made(), Slope(), threading.Event()
OTHER = nn.Linear(4, 4, dtype=torch.float64)


def imports(self, h):
    from settings_of_this_test import scale

    return h * scale


def enters(self, h):
    with MADE as scale:
        return h * scale


def rename_key(value):
    TABLE.clear()
    TABLE[value] = True


def rename_attribute(model, value):
    for name in ("flag_a", "flag_b"):
        vars(model).pop(name, None)
    setattr(model, "flag_a" if value > 1 else "flag_b", True)


VARIABLE = ContextVar("VARIABLE", default=1.0)
LOGGER = logging.getLogger("tests.step")


@contextmanager
def managed():
    yield


@managed()
def under_a_manager(h):
    if h is None:
        LOGGER.warning("never")
    return h * VARIABLE.get()


LOCAL = threading.local()
CHANGES = {
    "context variable": (lambda self, h: under_a_manager(h), lambda model, value: VARIABLE.set(value)),
    "key": (lambda self, h: h * max(TABLE), lambda model, value: rename_key(value)),
    "name": (lambda self, h: 2 * h if hasattr(self, "flag_a") else h, rename_attribute),
    "thread local": (lambda self, h: h * LOCAL.scale, lambda model, value: setattr(LOCAL, "scale", value)),
    "weak reference": (
        lambda self, h: h * weakref.ref(self.schedule)().t,
        lambda model, value: setattr(model.schedule, "t", value),
    ),
    "environment": (
        lambda self, h: h * len(os.environ["OF_THIS_TEST"]),
        lambda model, value: os.environ.update(OF_THIS_TEST="a" * int(2 * value)),
    ),
    "import": (imports, lambda model, value: setattr(IMPORTED, "scale", value)),
    "making": (lambda self, h: h * Made().scale, lambda model, value: set_global(value)),
    "indexing": (lambda self, h: h * MADE[0], lambda model, value: set_global(value)),
    "entering": (enters, lambda model, value: set_global(value)),
    "overriding": (lambda self, h: SLOPE(h), lambda model, value: set_global(value)),
    "by name": (lambda self, h: h * getattr(Net, f"{'fac'}tor"), lambda model, value: setattr(Net, "factor", value)),
    "user dict": (lambda self, h: h * ITEMS["scale"], lambda model, value: ITEMS.update(scale=value)),
    "event": (
        lambda self, h: -h if EVENT.is_set() else h,
        lambda m, value: (EVENT.set if value > 1 else EVENT.clear)(),
    ),
    "other module": (
        lambda self, h: OTHER(h),
        lambda model, value: setattr(OTHER, "weight", nn.Parameter(value * torch.ones(4, 4, dtype=torch.float64))),
    ),
    "other data": (
        lambda self, h: OTHER(h),
        lambda model, value: setattr(
            OTHER.weight, "data", (value * torch.arange(16.0, dtype=torch.float64)).view(4, 4).t()
        ),
    ),
    "attribute": (lambda self, h: h * self.scale, lambda model, value: setattr(model, "scale", value)),
    "list": (lambda self, h: h * self.limits[0], lambda model, value: model.limits.__setitem__(0, value)),
    "object": (lambda self, h: h * self.schedule.value(), lambda model, value: setattr(model.schedule, "t", value)),
    "class": (lambda self, h: h * self.factor, lambda model, value: setattr(Net, "factor", value)),
    "global": (lambda self, h: h * SCALE, lambda model, value: set_global(value)),
    "settings": (lambda self, h: h * SETTINGS.scale, lambda model, value: setattr(SETTINGS, "scale", value)),
    "plain tensor": (lambda self, h: h * self.mask, lambda model, value: setattr(model, "mask", value * torch.ones(4))),
    "body": (lambda self, h: h, lambda model, value: setattr(model, "body", (lambda self, h: h * value))),
}


FIRST = ["attribute", "object", "global", "key", "name", "import", "indexing", "overriding", "other module"]


@pytest.mark.parametrize("kind", FIRST + [pytest.param(k, marks=pytest.mark.slow) for k in CHANGES if k not in FIRST])
def test_a_value_that_the_user_changes_is_noticed(recorded, kind):
    body, change = CHANGES[kind]
    values = 2.0, 0.5
    seen = {2.0: 3, 0.5: 3}

    def before_step(model, i):
        if i in (0, 3):
            change(model, values[i // 3])

    num_graphs, messages = compare(lambda: Net(body), sum(seen.values()), before_step)
    assert messages == []
    assert num_graphs == (1 if kind in ("other module", "other data", "plain tensor") else 2)  # a graph reads tensors


def test_a_value_that_the_user_changes_back_finds_its_graph_again(recorded):
    num_graphs, messages = compare(
        lambda: Net(lambda self, h: h * self.scale), 8, lambda model, i: setattr(model, "scale", float(i % 4 < 2))
    )
    assert (num_graphs, messages) == (2, [])


@pytest.mark.parametrize("kind", [tuple, list])
def test_equal_values_in_a_new_container_are_the_same(recorded, kind):
    def set_limits(model, i):
        model.limits = kind([1.0 if i < 6 else 2.0])

    assert compare(lambda: Net(lambda self, h: h * self.limits[0]), 12, set_limits) == (2, [])


def test_what_the_loss_reads_is_noticed(recorded):
    weights = {"of loss": 1.0}

    def loss(logits, targets):
        return weights["of loss"] * F.cross_entropy(logits, targets)

    num_graphs, messages = compare(Net, 6, lambda model, i: weights.update({"of loss": 1.0 + (i > 2)}), loss)
    assert (num_graphs, messages) == (2, [])


def test_options_of_the_step_that_are_set_later(recorded):
    def scaled(logits, targets):
        return 2 * F.cross_entropy(logits, targets)

    (model, step), (twin, eager) = (
        (model := Net(), SGDStep(model, learning_rate=0.1, compiled=compiled, generator=seeded()))
        for compiled in (None, False)
    )
    for name, value in (("num_tangents", 3), ("loss", scaled), ("learning_rate", 0.2)):
        for one in (step, eager):
            setattr(one, name, value)
        for _ in range(3):
            torch.testing.assert_close(step(*batch_of()), eager(*batch_of()), rtol=0, atol=0)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_a_batch_that_shares_memory_with_the_model(recorded):
    def loss(model, batch):
        return F.mse_loss(model.first.weight, batch)

    model = Net()
    step = SGDStep(model, loss, learning_rate=0.1)
    step(model.first.weight.detach())
    with pytest.warns(UserWarning, match="share memory") as caught:
        step(model.first.weight.detach())
    assert caught[0].filename == __file__


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def register_hook(model):
    model[0].register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[1].eval(),
        lambda model: model.eval(),
        lambda model: setattr(model[2], "p", 0.1),
        lambda model: model[0].weight.requires_grad_(False),
        register_hook,
    ],
    ids=["one in eval", "all in eval", "dropout p", "frozen", "hook"],
)
def test_a_change_of_the_modules_is_noticed(recorded, change):
    num_graphs, messages = compare(sequential, 6, lambda model, i: change(model) if i == 3 else None)
    assert (num_graphs, messages) == (2, [])


def reload(model):
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)


def new_layer(model):
    torch.manual_seed(5)
    model.last = nn.Linear(4, 2, dtype=torch.float64)


def new_data(model):
    model.last.weight.data = 2 * model.last.weight.data


def new_bias(model):
    model.last.bias = nn.Parameter(torch.ones(2, dtype=torch.float64))


def turned(model):
    model.last.weight.data = model.last.weight.data.t().contiguous().t()
    model.first.weight.data = model.first.weight.data.flip(0)[:4]


def narrowed(model):
    model.first.weight.data, model.first.bias.data = model.first.weight.data[:2], model.first.bias.data[:2]
    model.mean.data, model.last.weight.data = model.mean.data[:2], model.last.weight.data[:, :2].contiguous()


CASES = [(reload, 1), (new_layer, 1), (new_data, 1), (new_bias, 1), (turned, 2), (narrowed, 2)]


@pytest.mark.parametrize(("change", "num_graphs"), CASES)
def test_tensors_that_take_the_places_of_others_are_trained(recorded, change, num_graphs):
    found = compare(Net, 6, lambda model, i: change(model) if i == 3 else None)
    assert found == (num_graphs, [])


@pytest.mark.parametrize("compiled", [False, None])
def test_the_model_moves_after_load_state_dict_with_assign(recorded, compiled):
    model = Net()
    step = SGDStep(model, learning_rate=0.1, compiled=compiled)
    step(*batch_of())
    step(*batch_of())
    reload(model)
    before = model.first.weight.clone()
    step(*batch_of())
    assert not torch.equal(before, model.first.weight)


def square():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()


SHARE = "two of the model's tensors, or one and the batch, share memory"


def test_weights_that_are_tied_later(recorded):
    def tie(model, i):
        if i == 3:
            model[2].weight = model[0].weight

    def share(model, i):
        if i == 3:
            model[2].weight.data = model[0].weight.data

    assert compare(square, 6, tie) == (2, [])
    assert compare(square, 6, share) == (1, [FALLBACK.format(SHARE)])


def test_another_dtype(recorded):
    batches = [batch_of(torch.float32)] * 3 + [batch_of()] * 3
    found = compare(lambda: Net(dtype=torch.float32), batches, lambda model, i: model.double() if i == 3 else None)
    assert found == (2, [])
    assert compare(lambda: Net(dtype=torch.bfloat16), [batch_of(torch.bfloat16)] * 3) == (1, [])


SQUARE = torch.arange(16.0, dtype=torch.float64).reshape(4, 4) / 10


def assign_buffer(self, h):
    self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
    return h - self.mean


def update_buffer(self, h):
    self.mean.mul_(0.9).add_(h.detach().mean(0))
    return h - self.mean


def update_plain(self, h):
    self.mask.mul_(0.9).add_(h.detach().mean(0))
    return h - self.mask


def lazily(self, h):
    if not hasattr(self, "cache"):
        self.cache = torch.randn(4, dtype=h.dtype)
    return h + self.cache


def checkpointed(self, h):
    return checkpoint(torch.tanh, h, use_reentrant=False)


def derivative(self, h):
    h0 = h.detach().requires_grad_()
    return h + torch.autograd.grad(h0.sin().sum(), h0)[0]


def autocast_inside(self, h):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return h + (h.detach().float() @ torch.ones(4, 4)).to(h.dtype)


@pytest.mark.parametrize(
    "body",
    [
        lambda self, h: F.dropout(h, 0.5, self.training),
        lambda self, h: h + torch.randn_like(h.detach()),
        assign_buffer,
        update_buffer,
        update_plain,
        assign_plain,
        scaled_by_code_that_no_name_leads_to,
        lazily,
        checkpointed,
        lambda self, h: h + torch.func.vmap(torch.sin)(h.detach()),
        autocast_inside,
        lambda self, h: torch.einsum("bi,ij->bj", h, SQUARE),
        lambda self, h: torch.einsum("bi,ij", h, SQUARE),  # without a rule
        lambda self, h: torch.fft.fft(h).real,
    ],
)
def test_what_a_graph_can_hold_is_as_without_one(recorded, body):
    assert compare(lambda: Net(body), 5) == (1, [])


def test_a_derivative_inside_the_model(recorded):
    num_graphs, messages = compare(lambda: Net(derivative), 5)
    assert num_graphs == (0 if messages else 1)  # some versions of torch do not trace it


def test_a_plain_tensor_that_the_user_writes_into(recorded):
    found = compare(
        lambda: Net(lambda self, h: h * self.mask), 6, lambda model, i: model.mask.mul_(2) if i == 3 else None
    )
    assert found == (1, [])


def inference_tensor():
    with torch.inference_mode():
        return batch_of()[0].clone()


X, Y = batch_of()
BATCHES = {
    "requires grad": (X.clone().requires_grad_(), Y),
    "inference": (inference_tensor(), Y),
    "transposed": (X.t().contiguous().t(), Y),
    "probabilities": (X, torch.softmax(torch.randn(5, 2, dtype=X.dtype), 1)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_inputs_and_targets_of_any_kind(recorded, kind):
    assert compare(Net, [BATCHES[kind]] * 3) == (1, [])


def test_shapes_and_strides_have_graphs_of_their_own(recorded):
    assert compare(Net, [batch_of(size=size) for size in (5, 4, 5, 4, 3, 5)]) == (2, [])
    assert compare(Net, [(X, Y)] * 2 + [BATCHES["transposed"]] * 2 + [(X, Y)]) == (2, [])
    assert compare(square, [(X, X)] * 3, loss=F.mse_loss) == (1, [])  # the inputs are the targets


@pytest.mark.parametrize("inputs", [X[:1].expand(5, 3), torch.ones(5, 6, dtype=X.dtype)[:, ::2]])
def test_inputs_with_gaps_or_overlaps_run_without_a_graph(recorded, inputs):
    message = FALLBACK.format("a tensor has gaps or overlaps in memory; use .contiguous()")
    assert compare(Net, [(inputs, Y)] * 3) == (0, [message])


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu"), torch.inference_mode])
def test_contexts_around_the_step(recorded, context):
    model, twin = Net(dtype=torch.float32), Net(dtype=torch.float32)
    batch = batch_of(torch.float32)
    step, eager = (
        SGDStep(m, learning_rate=0.1, compiled=c, generator=seeded()) for m, c in ((model, None), (twin, False))
    )
    with context(), pytest.warns(UserWarning, match="is called under torch.autocast or torch.inference_mode"):
        losses = [(step(*batch), eager(*batch)) for _ in range(3)]
    for one, other in losses:
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def weighted(model, batch):
    return F.cross_entropy(model(batch["inputs"]) * batch["scale"], batch["labels"][0])


def as_dict(scale):
    return {"inputs": X, "labels": [Y], "scale": scale, "mask": None}


def test_a_batch_of_any_kind_with_a_loss_of_the_model_and_the_batch(recorded):
    assert compare(Net, [(as_dict(2.0),)] * 3 + [(as_dict(3.0),)] * 3, loss=weighted) == (2, [])
    objective = ClosureLoss(model := Net(), lambda: weighted(model, as_dict(2.0)))
    expected = stacked_gradient(objective, params_of(model), generator=seeded())
    assert torch.equal(SGDStep(model, weighted, learning_rate=0.1, generator=seeded())(as_dict(2.0)), expected.loss)


def test_numbers_in_the_batch_that_keep_changing_run_without_graphs(recorded):
    batches = [(as_dict(float(i)),) for i in range(MAX_GRAPHS + 4)] + [(as_dict(2.0),)] * 2
    assert compare(Net, batches, loss=weighted) == (MAX_GRAPHS, [FALLBACK.format(FULL)])


@pytest.mark.parametrize("view", [torch.conj, lambda x: x.conj().imag], ids=["conjugate", "negative"])
def test_a_batch_that_is_a_view_of_its_conjugate(recorded, view):
    z = torch.complex(X, X.flip(0))
    plain = z if view is torch.conj else z.imag.contiguous()
    message = "a tensor is a view that conjugates or negates another; use .resolve_conj() or .resolve_neg()"
    batches = [(plain, Y)] * 3 + [(view(z).reshape(plain.shape), Y)] * 2

    def loss(model, batch):
        x, labels = batch
        return F.cross_entropy(model(x.real.clone() + (x.imag if x.is_complex() else 0)), labels)

    found = compare(Net, [(batch,) for batch in batches], loss=loss)
    assert found == (1, [FALLBACK.format(message)])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_a_copy_of_a_compiled_step_trains_its_own_model(recorded, copied):
    torch.manual_seed(0)
    step = SGDStep(nn.Linear(3, 2), learning_rate=0.1)
    batch = batch_of(torch.float32)
    for _ in range(3):
        step(*batch)
    before, twin = step.model.weight.clone(), copied(step)
    for _ in range(3):
        twin(*batch)
    assert torch.equal(step.model.weight, before)
    assert not torch.equal(twin.model.weight, before)
    assert num_graphs_of(twin) == 1


def test_batches_that_a_graph_cannot_take(recorded):
    def loss(model, batch):
        return F.cross_entropy(model(batch["inputs"].to_dense()), torch.as_tensor(batch["labels"]))

    arrays, sparse = {"inputs": X, "labels": Y.numpy()}, {"inputs": X.to_sparse(), "labels": Y}
    num_graphs, (message,) = compare(Net, [(arrays,)] * 3, loss=loss)
    assert num_graphs == 0
    assert CANNOT_FOLLOW in message
    num_graphs, (message,) = compare(Net, [(sparse,)] * 3, loss=loss)
    assert num_graphs == 0
    assert "sparse" in message


def test_a_batch_that_the_forward_pass_writes_into(recorded):
    def writing(model, batch):
        return F.cross_entropy(model(batch["inputs"].add_(0.0)), batch["labels"])

    batch = {"inputs": X.clone(), "labels": Y}
    assert compare(Net, [(batch,)] * 3, loss=writing) == (1, [])


@pytest.mark.parametrize("tangents", ["per-example", "activity"])
def test_the_number_of_examples_of_a_batch(tangents):
    step = SGDStep(Net(), weighted, learning_rate=0.1, tangents=tangents, compiled=False)
    assert step(as_dict(2.0)).shape == ()
    with pytest.raises(ValueError, match=f"'{tangents}' tangents need the number of examples"):
        step(as_dict(2.0) | {"mask": torch.ones(2)})


def test_a_step_refuses_other_arguments():
    step = SGDStep(Net(), learning_rate=0.1, compiled=False)
    with pytest.raises(TypeError, match=r"step\(batch\) needs a loss of the model and the batch"):
        step(as_dict(2.0))
    with pytest.raises(TypeError, match=r"a step takes \(inputs, targets\) or one batch, got 3"):
        step(X, Y, Y)


def test_an_error_of_the_model_is_the_models(recorded):
    step = SGDStep(Net(), learning_rate=0.1)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            step(torch.randn(5, 7, dtype=torch.float64), Y)


def test_a_large_step_is_compiled_on_request_alone(recorded, monkeypatch):
    monkeypatch.setattr(step_module, "MAX_OPERATIONS", 40)
    num_graphs, (message,) = compare(Net)
    assert num_graphs == 0
    assert re.search(r"compiling it takes long \(\d+ operations, about \d+ s\); pass compiled=True", message)
    step = SGDStep(Net(), learning_rate=0.1, compiled=True)
    step(*batch_of())
    with pytest.warns(UserWarning, match=r"SGDStep compiles a large step: \d+ operations, about \d+ s"):
        step(*batch_of())


def test_a_very_large_step_is_noticed_early(recorded, monkeypatch):
    monkeypatch.setattr(step_module, "MAX_OPERATIONS", 1)
    num_graphs, (message,) = compare(Net)
    assert num_graphs == 0
    assert "compiling it takes long (8 operations or more)" in message


def test_a_compiler_that_fails(recorded, monkeypatch):
    import torch._inductor

    def fail(*args, **kwargs):
        raise RuntimeError("g++: internal error")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    assert compare(Net) == (0, [FALLBACK.format("RuntimeError: g++: internal error")])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.last = nn.GRU(1, 4, batch_first=True).double(), nn.Linear(4, 2).double()

    def forward(self, x):
        return self.last(self.gru(x.unsqueeze(-1))[0][:, -1])


def test_a_recurrent_net_keeps_its_weights(recorded):
    model = Recurrent()
    step = SGDStep(model, learning_rate=0.1)
    for _ in range(3):
        step(*batch_of())
    assert num_graphs_of(step) == 1
    assert all(a is b for a, b in zip(model.gru._flat_weights, model.gru.parameters(), strict=True))
    assert compare(Recurrent, 5, lambda model, i: reload(model) if i == 3 else None) == (2, [])


# The tests that compile.


@needs_compiler
@quiet
def test_compiled_step_does_what_the_eager_one_does():
    def make():
        return small_net(nn.BatchNorm1d(4), nn.Dropout(0.5))[0]

    assert compare(make, rtol=1e-7, atol=1e-7) == (1, [])  # dropout draws the same masks


@needs_compiler
@quiet
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tangents", "make"), [("per-example", small_net), ("activity", small_cnn), ("rank-one", small_cnn)]
)
def test_compiled_step_does_what_the_eager_one_does_with_the_same_signs(tangents, make):
    _, *batch = make()
    found = compare(lambda: make()[0], [batch] * 3, tangents=tangents, num_tangents=2, rtol=1e-7, atol=1e-7)
    assert found == (1, [])


@needs_compiler
@quiet
@pytest.mark.slow
def test_a_recurrent_net_compiles():
    num_graphs, messages = compare(Recurrent, 3, rtol=1e-6, atol=1e-6)
    assert (num_graphs, messages) == (1, [])


@needs_compiler
@quiet
@pytest.mark.slow
@pytest.mark.parametrize("body", [assign_buffer, update_plain, checkpointed, autocast_inside])
def test_what_a_graph_can_hold_compiles(body):
    assert compare(lambda: Net(body), 3, rtol=1e-6, atol=1e-6) == (1, [])


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
