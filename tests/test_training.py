"""How a run ends, what is recorded of it, a stack and single runs alike, what is refused."""

import math
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib import training
from fwdlib.data import Dataset, Source
from fwdlib.estimators import GradientEstimate, backprop_gradient, forward_gradient
from fwdlib.models import CNN, MLP, LogisticRegression, initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.gradients import Gradients
from fwdlib.training import OPTIMIZERS, evaluate, make_optimizer

NORMAL = partial(forward_gradient, tangents="normal")
SEEDS = (3, 0, 5)
ESTIMATORS = {
    "backprop": backprop_gradient,
    "forward, joint": partial(forward_gradient, num_tangents=2, tangents="normal"),
    "forward, parameter": partial(forward_gradient, blocks="parameter", tangents="rademacher"),
}


@pytest.fixture(scope="module")
def data():
    """Three overlapping classes in four dimensions: 60 rows to train on, 30 to test on."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(90) % 3
    centres = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    inputs = centres[targets] + 0.3 * torch.randn(90, 4, generator=draw)
    source = Source("blobs", "a test", None, "", "", "", 0)
    return Dataset(inputs[:60], targets[:60], inputs[60:], targets[60:], ("a", "b", "c"), source)


@pytest.fixture
def train(data):
    defaults = {"learning_rate": 0.1, "max_iterations": 10, "progress": None}

    def call(build=LogisticRegression, estimator=backprop_gradient, **options):
        if callable(options.get("optimizer")):
            options.setdefault("learning_rate", None)
        return training.train(build, data, estimator, **(defaults | options))

    return call


def train_loss(build, data, params):
    model = initialise(build, 0)
    return BatchLoss(model, data.train_inputs, data.train_targets)(params).item()


def assert_same_runs(history, other, rtol=1e-4):
    assert [run.seed for run in history.runs] == [run.seed for run in other.runs]
    for run, expected in zip(history.runs, other.runs, strict=True):
        assert (run.status, run.iterations) == (expected.status, expected.iterations)
        for name in ("train_loss", "test_loss"):
            values, wanted = torch.tensor(getattr(run, name)), torch.tensor(getattr(expected, name))
            torch.testing.assert_close(values, wanted, rtol=rtol, atol=1e-5, equal_nan=True)
        assert run.test_errors == expected.test_errors
    for params, expected in zip(history.params, other.params, strict=True):
        torch.testing.assert_close(params, expected, rtol=rtol, atol=1e-4, equal_nan=True)


# how a run ends


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("stacked", [True, False])
def test_a_run_stops_at_the_first_loss_that_reaches_the_threshold(train, estimator, stacked):
    history = train(estimator=estimator, threshold=0.6, max_iterations=500, seeds=SEEDS, together=stacked)
    for run in history.runs:
        assert run.status == "reached"
        assert run.train_loss[-1] <= 0.6
        assert min(run.train_loss[:-1]) > 0.6
        assert run.iterations == len(run.train_loss) - 1 > 0


@pytest.mark.parametrize("stacked", [True, False])
def test_a_threshold_that_is_met_at_the_start_takes_no_iteration(train, stacked):
    history = train(threshold=100.0, seeds=(0, 1), together=stacked)
    for run, params in zip(history.runs, history.params, strict=True):
        assert (run.status, run.iterations, len(run.train_loss), run.step_seconds) == ("reached", 0, 1, [])
        initial = params_of(initialise(LogisticRegression, run.seed))
        assert all(torch.equal(params[name], initial[name]) for name in initial)
    assert history.seconds == 0


@pytest.mark.parametrize(
    ("step", "max_iterations", "status"), [(3, 5, "reached"), (5, 5, "reached"), (5, 4, "not reached")]
)
def test_a_loss_equal_to_the_threshold_reaches_it_also_with_the_last_step(train, step, max_iterations, status):
    losses = train(max_iterations=5).runs[0].train_loss
    run = train(threshold=losses[step], max_iterations=max_iterations).runs[0]
    assert (run.status, run.iterations) == (status, min(step, max_iterations))


@pytest.mark.parametrize(("threshold", "status"), [(None, "completed"), (1e-6, "not reached")])
def test_a_run_ends_after_max_iterations(train, threshold, status):
    for run in train(threshold=threshold, max_iterations=7, seeds=(0, 1)).runs:
        assert (run.status, run.iterations, len(run.train_loss)) == (status, 7, 8)


def test_a_run_that_diverges_is_recorded_up_to_the_loss_that_is_not_finite(train):
    run = train(MLP, learning_rate=1e30).runs[0]
    assert run.status == "diverged"
    assert run.iterations == len(run.train_loss) - 1 == len(run.test_loss) - 1 == 1
    assert math.isfinite(run.train_loss[0])
    assert not math.isfinite(run.train_loss[-1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_value_that_is_not_finite_reaches_a_threshold(train, value):
    def broken(objective, params):
        return backprop_gradient(objective, params)._replace(loss=torch.tensor(value))

    run = train(estimator=broken, threshold=0.5).runs[0]
    assert (run.status, run.iterations) == ("diverged", 0)


class Exploding(LogisticRegression):
    """Gradient descent on the cubed parameter overshoots further at each step, if it starts far out: with seed 0."""

    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.tensor(100.0 if torch.initial_seed() == 0 else 0.1))

    def forward(self, inputs):
        return super().forward(inputs) + self.root**3 * torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("every", [1, 3, 7])
def test_the_others_of_a_stack_go_on_by_their_schedule_when_one_diverges(train, every):
    options = {"build": Exploding, "learning_rate": 0.05, "max_iterations": 40, "seeds": SEEDS, "threshold": 0.9}
    together, alone = (train(together=s, evaluate_every=every, **options) for s in (True, False))
    first, exploded, last = together.runs
    assert exploded.status == "diverged" != first.status == last.status
    assert 0 < exploded.iterations < 40
    assert every == 1 or exploded.iterations % every
    assert all(run.iterations % every == 0 or run.iterations == 40 for run in (first, last))
    assert_same_runs(together, alone)


def test_logits_that_are_nan_are_misclassified():
    model = nn.Linear(2, 3)
    params = {"weight": torch.full((3, 2), math.nan), "bias": torch.zeros(3)}
    assert evaluate(model, params, torch.ones(5, 2), torch.zeros(5, dtype=torch.long))[1] == 5


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_an_optimizer_with_hooks_runs_them_also_where_updates_come_from_factors(train, register):
    calls = []

    def make(params):
        optimizer = torch.optim.SGD(params, lr=0.01)
        getattr(optimizer, register)(lambda *args: calls.append(1))
        return optimizer

    train(MLP, forward_gradient, learning_rate=None, optimizer=make, max_iterations=3)
    assert len(calls) == 3


# a stack and single runs


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize(
    "optimizer",
    [
        make_optimizer("SGD", 0.02),
        make_optimizer("SGD", 0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
        make_optimizer("Adam", 0.02),
    ],
    ids=["SGD", "momentum", "Adam"],
)
@pytest.mark.parametrize("build", [LogisticRegression, MLP])
def test_a_stack_gives_the_numbers_of_single_runs(train, build, estimator, optimizer):
    stacked, single = (
        train(build, estimator, optimizer=optimizer, seeds=SEEDS, max_iterations=6, together=s) for s in (True, False)
    )
    assert (stacked.together, single.together) == (3, 1)
    assert_same_runs(stacked, single)
    first = stacked.runs[0].train_loss
    assert len(set(first)) == 7  # it moved
    assert all(first != run.train_loss for run in stacked.runs[1:])  # seeds differ


def test_a_stack_of_convolutions_is_possible_and_gives_the_same_numbers():
    draw = torch.Generator().manual_seed(0)
    images, targets = torch.rand(6, 1, 28, 28, generator=draw), torch.arange(6) % 3
    data = Dataset(images, targets, images[:2], targets[:2], tuple("abc"), None)
    call = partial(training.train, CNN, data, NORMAL, learning_rate=1e-3, max_iterations=2, progress=None)
    stacked, default = call(seeds=(1, 2), together=True), call(seeds=(1, 2))
    assert (stacked.together, default.together) == (2, 1)
    assert_same_runs(stacked, default)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_same_call_gives_the_same_numbers(train, estimator, stacked):
    first, second = (train(MLP, estimator, seeds=(0, 1), together=stacked, max_iterations=4) for _ in range(2))
    assert [run.train_loss for run in first.runs] == [run.train_loss for run in second.runs]


def test_a_seed_has_the_same_numbers_in_whatever_company(train):
    alone = train(MLP, NORMAL, seeds=(5,))
    among = train(MLP, NORMAL, seeds=(9, 5, 1))
    assert alone.runs[0].train_loss == pytest.approx(among.runs[1].train_loss, rel=1e-4)


def test_two_methods_start_from_the_same_parameters(train):
    first, second = (train(MLP, e, seeds=SEEDS) for e in (backprop_gradient, NORMAL))
    for run, other in zip(first.runs, second.runs, strict=True):
        assert run.train_loss[0] == pytest.approx(other.train_loss[0], rel=1e-5)
        assert run.train_loss[1] != pytest.approx(other.train_loss[1], rel=1e-5)


# the history


def test_the_loss_follows_gradient_descent(train, data):
    run = train(max_iterations=3, learning_rate=0.3).runs[0]
    model = initialise(LogisticRegression, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for i in range(4):
        loss = F.cross_entropy(model(data.train_inputs), data.train_targets)
        logits = model(data.test_inputs)
        assert run.train_loss[i] == pytest.approx(loss.item(), rel=1e-5)
        assert run.test_loss[i] == pytest.approx(F.cross_entropy(logits, data.test_targets).item(), rel=1e-5)
        assert run.test_errors[i] == (logits.argmax(1) != data.test_targets).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("stacked", [True, False])
def test_series_have_a_value_before_the_first_step_and_after_each(train, stacked):
    history = train(seeds=(4, 2), together=stacked, max_iterations=5)
    assert [run.seed for run in history.runs] == [4, 2]
    for run in history.runs:
        assert len(run.train_loss) == len(run.test_loss) == len(run.test_errors) == run.iterations + 1 == 6
        assert len(run.step_seconds) == (0 if stacked else 5)
        assert all(isinstance(errors, int) for errors in run.test_errors)
    assert history.num_test == 30
    assert history.together == (2 if stacked else 1)
    if not stacked:
        assert history.seconds == pytest.approx(sum(sum(run.step_seconds) for run in history.runs))
    assert history.seconds > 0


def test_a_single_seed_has_times_even_where_a_stack_was_asked_for(train):
    history = train(seeds=(0,), together=True)
    assert (history.together, len(history.runs[0].step_seconds)) == (1, 10)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("threshold", [0.6, None])
def test_params_are_those_that_gave_the_last_training_loss(train, data, stacked, threshold):
    history = train(threshold=threshold, max_iterations=100, seeds=range(5), together=stacked)
    for run, params in zip(history.runs, history.params, strict=True):
        assert {name: p.shape for name, p in params.items()} == {"linear.weight": (3, 4), "linear.bias": (3,)}
        assert train_loss(LogisticRegression, data, params) == pytest.approx(run.train_loss[-1], rel=1e-6)


def test_the_timer_leaves_out_the_evaluation(train, monkeypatch):
    def slow(*args):
        time.sleep(0.1)
        return evaluate(*args)

    monkeypatch.setattr(training, "evaluate", slow)
    start = time.perf_counter()
    history = train(max_iterations=4)
    assert time.perf_counter() - start > 0.5  # it was slow
    assert sorted(history.runs[0].step_seconds)[1] < 0.1  # all but the first few, on a busy machine
    assert train(max_iterations=4, seeds=(0, 1), together=True).seconds < 0.4


def test_the_timer_has_the_estimate_and_the_step(train):
    def slow(objective, params):
        time.sleep(0.05)
        return backprop_gradient(objective, params)

    class SlowSGD(torch.optim.SGD):
        def step(self, closure=None):
            time.sleep(0.05)
            return super().step(closure)

    history = train(estimator=slow, optimizer=partial(SlowSGD, lr=0.1), max_iterations=3)
    assert min(history.runs[0].step_seconds) >= 0.1


# estimators and models of one's own


@pytest.mark.parametrize("stacked", [True, False])
def test_an_estimator_without_a_generator(train, stacked):
    def signs_only(objective, params):
        estimate = backprop_gradient(objective, params)
        return GradientEstimate(estimate.loss, {name: g.sign() for name, g in estimate.grads.items()}, estimate.jvps)

    history = train(estimator=signs_only, seeds=(0, 1), together=stacked, max_iterations=1)
    for run, params in zip(history.runs, history.params, strict=True):
        initial = params_of(initialise(LogisticRegression, run.seed))
        for name, p in params.items():
            torch.testing.assert_close((p - initial[name]).abs(), torch.full_like(p, 0.1))


def test_an_object_with_a_generator_gets_each_seed_s_own(train):
    class Recorder:
        def __init__(self):
            self.generators = []

        def __call__(self, objective, params, *, generator=None):
            self.generators.append(generator)
            return backprop_gradient(objective, params)

    recorder = Recorder()
    train(estimator=recorder, seeds=(3, 4), together=False, max_iterations=2)
    assert len(recorder.generators) == 6
    assert recorder.generators[0] is recorder.generators[2]
    assert recorder.generators[0].initial_seed() != recorder.generators[3].initial_seed()


def with_dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def with_batchnorm():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def with_frozen():
    model = MLP()
    model.fc1.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("build", "reason"), [(with_dropout, "Dropout"), (with_batchnorm, "buffers"), (with_frozen, "frozen parameters")]
)
def test_models_that_cannot_be_stacked_run_one_after_the_other(train, build, reason):
    for estimator in (backprop_gradient, NORMAL):
        history = train(build, estimator, seeds=(0, 1), max_iterations=3, learning_rate=0.01)
        assert history.together == 1
        again = train(build, estimator, seeds=(1,), max_iterations=3, learning_rate=0.01)
        assert again.runs[0].train_loss == history.runs[1].train_loss  # whatever ran before
    with pytest.raises(ValueError, match=rf"together=True is not possible here: .*{reason}"):
        train(build, seeds=(0, 1), together=True)


class WithState(LogisticRegression):
    """Its parameters are not all that a seed draws."""

    def __init__(self, make):
        super().__init__()
        self.state = make()

    def forward(self, inputs):
        state = self.state[0] if isinstance(self.state, (list, tuple)) else self.state
        return state(super().forward(inputs)) if callable(state) else super().forward(inputs) * state


def of_two(one, other):
    return one if torch.rand(()) > 0.5 else other


STATES = {
    "tensor": lambda: torch.rand(1),
    "number": lambda: torch.rand(()).item(),
    "list": lambda: [torch.rand(1)],
    "function": lambda: of_two(torch.tanh, torch.relu),
    "module": lambda: of_two(nn.Tanh, nn.ReLU)(),
    "attribute of a module": lambda: nn.LeakyReLU(torch.rand(()).item()),
    "parameter that is not registered": lambda: (nn.Parameter(torch.rand(1)),),
}


@pytest.mark.parametrize("state", STATES)
def test_models_that_differ_in_more_than_their_parameters_run_one_after_the_other(train, state):
    build, options = partial(WithState, STATES[state]), {"seeds": (0, 1, 2, 3), "max_iterations": 3}
    history = train(build, **options)
    assert history.together == 1
    assert_same_runs(history, train(build, together=False, **options))
    with pytest.raises(ValueError, match=r"together=True is not possible here: the models of two seeds differ"):
        train(build, together=True, **options)


@pytest.mark.parametrize(
    "build",
    [
        partial(WithState, lambda: torch.ones(1)),
        partial(WithState, lambda: [2.0, {"a": (None, "b")}]),
        partial(WithState, nn.ReLU),
        partial(WithState, lambda: torch.tanh),
    ],
)
def test_models_whose_attributes_are_the_same_run_together(train, build):
    options = {"seeds": (0, 1, 2), "max_iterations": 3}
    history = train(build, **options)
    assert history.together == 3
    assert_same_runs(history, train(build, together=False, **options))


def test_frozen_parameters_stay(train):
    history = train(with_frozen, max_iterations=2)
    assert "fc1.weight" not in history.params[0]
    assert {"fc1.bias", "fc2.weight"} < set(history.params[0])


def test_dropout_draws_a_new_mask_at_each_step_and_another_for_each_seed(train):
    # With a vanishing learning rate the loss changes by the masks alone.
    runs = train(with_dropout, seeds=(0, 1), learning_rate=1e-20, max_iterations=4).runs
    assert all(len(set(run.train_loss)) == 5 for run in runs)
    assert all(len(set(run.test_loss)) == 1 for run in runs)


def test_training_leaves_the_global_generator_alone(train):
    for build, stacked in ((LogisticRegression, True), (LogisticRegression, False), (with_dropout, False)):
        before = torch.random.get_rng_state()
        train(build, NORMAL, seeds=(0, 1), together=stacked, max_iterations=2)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_batchnorm_is_evaluated_with_the_statistics_of_training(train, data):
    history = train(with_batchnorm, max_iterations=1, learning_rate=1e-20)
    model = initialise(with_batchnorm, 0)
    expected = []
    for _ in range(2):
        expected.append(F.cross_entropy(model.eval()(data.test_inputs), data.test_targets).item())
        model.train()(data.train_inputs)  # one forward pass, as one estimate has
    assert expected[0] != pytest.approx(expected[1])
    assert history.runs[0].test_loss == pytest.approx(expected, rel=1e-5)


# optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_a_step_or_says_why_not(train, name):
    call = partial(train, MLP, optimizer=name, learning_rate=0.01, max_iterations=2)
    if name == "Muon":  # made for matrices alone
        with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
            call()
        return
    losses = call().runs[0].train_loss
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", training.ELEMENTWISE)
def test_every_elementwise_optimizer_is_stacked_and_gives_the_numbers_of_single_runs(train, name):
    options = {"optimizer": name, "learning_rate": 0.01, "seeds": (0, 1), "max_iterations": 4}
    history = train(MLP, **options)
    assert history.together == 2
    assert_same_runs(history, train(MLP, together=False, **options))


@pytest.mark.parametrize("optimizer", ["Adafactor", make_optimizer("Adafactor", 0.01)])
def test_an_optimizer_that_is_not_elementwise_is_not_stacked(train, optimizer):
    assert train(optimizer=optimizer, seeds=(0, 1), max_iterations=1).together == 1
    with pytest.raises(ValueError, match="together=True is not possible here: the optimizer is not one of the element"):
        train(optimizer=optimizer, seeds=(0, 1), together=True)


class Clipping:
    """Optimizers that clip by the norm of all gradients together."""

    class SGD(torch.optim.SGD):
        def step(self, closure=None):
            clip(self)
            return super().step(closure)

    @staticmethod
    def hooked(params):
        optimizer = torch.optim.SGD(params, 0.5)
        optimizer.register_step_pre_hook(clip)
        return optimizer


def clip(optimizer, *_):
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.01)


@pytest.mark.parametrize("optimizer", [partial(Clipping.SGD, lr=0.5), Clipping.hooked], ids=["subclass", "hook"])
def test_an_optimizer_that_clips_is_not_stacked(train, optimizer):
    history = train(optimizer=optimizer, seeds=(0, 1))
    assert history.together == 1
    assert_same_runs(history, train(optimizer=optimizer, seeds=(0, 1), together=False))
    with pytest.raises(ValueError, match="together=True is not possible here: the optimizer"):
        train(optimizer=optimizer, seeds=(0, 1), together=True)


def test_options_reach_the_optimizer():
    made = make_optimizer("SGD", 0.2, momentum=0.9)([torch.zeros(2)])
    assert isinstance(made, torch.optim.SGD)
    assert (made.param_groups[0]["lr"], made.param_groups[0]["momentum"]) == (0.2, 0.9)


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate must be a finite number above 0, got -0.1"),
        ({"learning_rate": None}, "learning_rate must be a finite number above 0, got None"),
        ({"optimizer": "sgd"}, "optimizer must be one of .*'Adam'.*'SGD', got 'sgd'"),
        ({"optimizer": "LBFGS"}, "optimizer must be one of .*'SGD', got 'LBFGS'"),
        ({"device": "tpu"}, "device must be one of 'cpu'.*, got 'tpu'"),
        ({"max_iterations": 0}, "max_iterations must be a whole number of at least 1, got 0"),
        ({"threshold": -0.3}, "threshold must be a finite number above 0, got -0.3"),
        ({"progress_every": 0}, "progress_every must be a whole number of at least 1, got 0"),
        ({"test_batch_size": 0}, "test_batch_size must be a whole number of at least 1, got 0"),
        ({"seeds": ()}, "the number of seeds must be a whole number of at least 1, got 0"),
        ({"seeds": 5}, "seeds must be a list of whole numbers, .*, got 5"),
        ({"seeds": (-1,)}, "seed must be a whole number of at least 0, got -1"),
        ({"seeds": (1.5,)}, "seed must be a whole number of at least 0, got 1.5"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "ReduceLROnPlateau needs a loss .*"),
        ({"batch_size": 61}, "batch_size must be at most the 60 training examples, got 61"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be a whole number of at least 1, got 0"),
        ({"batch_size": 5, "together": True, "seeds": (0, 1)}, ".*each seed draws its own batches.*"),
        (
            {"optimizer": make_optimizer("SGD", 0.1), "learning_rate": 0.2},
            "learning_rate goes with an optimizer .*",
        ),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(train, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(**options)


@pytest.mark.parametrize("wrong", [lambda y: y.double(), lambda y: y.unsqueeze(1), lambda y: F.one_hot(y)])
def test_targets_that_are_no_class_indices_are_refused(data, wrong):
    data = data._replace(train_targets=wrong(data.train_targets))
    with pytest.raises(ValueError, match=r"train_targets must be class indices, integers of shape \(N,\), got torch"):
        training.train(
            LogisticRegression, data, backprop_gradient, optimizer="SGD", learning_rate=0.1, max_iterations=1
        )


def test_a_bar_is_drawn_only_where_it_has_a_name(train, capsys):
    train(max_iterations=2)
    assert capsys.readouterr() == ("", "")
    train(max_iterations=2, progress="1b")
    out, err = capsys.readouterr()
    assert out == ""
    assert "1b" in err


# evaluate


@pytest.mark.parametrize("build", [LogisticRegression, with_dropout, with_batchnorm])
@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_is_the_loss_and_the_errors_in_evaluation_mode(data, build, mode):
    model = initialise(build, 0).train()
    model(data.train_inputs)  # moves BatchNorm's statistics
    model.train(mode)
    params = {name: 2 * p for name, p in params_of(model).items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss, errors = evaluate(model, params, data.test_inputs, data.test_targets)
    assert model.training == mode
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    model.eval()
    logits = torch.func.functional_call(model, params, data.test_inputs)
    assert torch.equal(loss, F.cross_entropy(logits, data.test_targets))
    assert errors.item() == sum(row.argmax() != target for row, target in zip(logits, data.test_targets, strict=True))
    assert not loss.requires_grad


def test_evaluate_restores_each_module_s_own_mode(data):
    model = with_batchnorm()
    model[1].eval()  # as one does with a BatchNorm that is not to be trained
    evaluate(model, params_of(model), data.test_inputs, data.test_targets)
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_evaluate_restores_the_mode_after_an_error(data):
    model = LogisticRegression()
    with pytest.raises(RuntimeError):
        evaluate(model, params_of(model), torch.zeros(2, 7), torch.zeros(2, dtype=torch.long))
    assert model.training


def test_a_stack_that_shrinks_goes_on_as_its_seeds_would_alone(train):
    options = {"optimizer": "Adam", "learning_rate": 0.05, "threshold": 0.5, "max_iterations": 300, "seeds": range(9)}
    stacked, alone = (train(LogisticRegression, NORMAL, together=s, **options) for s in (True, False))
    ends = sorted(run.iterations for run in alone.runs)
    assert ends[0] < ends[4] < ends[-1]  # it has shrunk more than once
    assert_same_runs(stacked, alone)


def test_a_stack_says_why_it_cannot_draw(train):
    class Functional(LogisticRegression):
        def forward(self, inputs):
            return torch.nn.functional.dropout(super().forward(inputs), 0.5, self.training)

    with pytest.raises(ValueError, match="pass together=False"):
        train(Functional, seeds=(0, 1))
    assert len(train(Functional, seeds=(0, 1), together=False).runs) == 2

    class Noisy(LogisticRegression):
        def forward(self, inputs):
            return super().forward(inputs) + (0 if self.training else torch.randn(3))

    with pytest.raises(ValueError, match=r"in evaluation mode.*pass together=False"):
        train(Noisy, seeds=(0, 1))
    assert len(train(Noisy, seeds=(0, 1), together=False).runs) == 2


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_an_estimator_that_returns_no_estimate_is_refused(train, seeds):
    with pytest.raises(TypeError, match="must return a GradientEstimate, got tuple"):
        train(estimator=lambda objective, params: (objective(params), params), seeds=seeds)


# batches


def test_batches_are_drawn_without_replacement_and_anew_in_each_pass(train, data):
    seen = []

    def estimator(objective, params):
        seen.append(objective.inputs)
        return backprop_gradient(objective, params)

    train(estimator=estimator, batch_size=25, max_iterations=4)
    assert [len(batch) for batch in seen] == [25] * 5  # 60 examples: two batches a pass, and 10 left out
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:4])
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == 50
    assert not torch.equal(first, second)
    assert {tuple(row) for row in first.tolist()} <= {tuple(row) for row in data.train_inputs.tolist()}


def test_both_methods_see_the_same_batches_and_another_seed_others(train):
    seen = {}

    def spy(name, base):
        def estimator(objective, params):
            seen.setdefault(name, objective.targets.tolist())
            return base(objective, params)

        return estimator

    for name, seed, base in (("a", 0, backprop_gradient), ("b", 0, NORMAL), ("c", 1, backprop_gradient)):
        train(estimator=spy(name, base), batch_size=25, max_iterations=1, seeds=[seed])
    assert seen["a"] == seen["b"] != seen["c"]


def test_the_training_loss_of_batches_is_the_mean_since_the_last_evaluation(train):
    losses = []

    def estimator(objective, params):
        estimate = backprop_gradient(objective, params)
        losses.append(estimate.loss.item())
        return estimate

    (run,) = train(estimator=estimator, batch_size=20, evaluate_every=3, max_iterations=7).runs
    expected = [losses[0], sum(losses[1:4]) / 3, sum(losses[4:7]) / 3, losses[7]]
    assert run.train_loss == pytest.approx(expected)
    assert (run.every, run.iterations, len(run.step_seconds), len(run.test_loss)) == (3, 7, 7, 4)


def test_a_threshold_is_looked_at_when_evaluated(train):
    (run,) = train(threshold=0.6, max_iterations=500, evaluate_every=7).runs
    assert run.status == "reached"
    assert run.iterations % 7 == 0
    (every,) = train(threshold=0.6, max_iterations=500).runs
    assert every.iterations <= run.iterations


def test_a_run_that_diverges_between_evaluations_ends_there(train):
    (run,) = train(learning_rate=1e38, evaluate_every=100, max_iterations=1000).runs
    assert run.status == "diverged"
    assert run.iterations < 100


def test_augment_is_applied_to_the_inputs_of_each_batch_and_to_nothing_else(train, data):
    given, seen = [], []

    def augment(inputs):
        given.append(inputs)
        return inputs + torch.rand(())

    def estimator(objective, params):
        seen.append(objective.inputs)
        return backprop_gradient(objective, params)

    before = torch.random.get_rng_state()
    train(estimator=estimator, augment=augment, batch_size=25, max_iterations=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(given) == len(seen) == 4  # the test set is evaluated as it is
    shifts = [(after - inputs).mean().item() for inputs, after in zip(given, seen, strict=True)]
    assert len({round(shift, 4) for shift in shifts}) == 4
    again = list(shifts)
    seen.clear()
    given.clear()
    train(estimator=estimator, augment=augment, batch_size=25, max_iterations=3)
    assert [(after - inputs).mean().item() for inputs, after in zip(given, seen, strict=True)] == again


@pytest.mark.parametrize("size", [1, 7, 29, 30, 1000])
def test_the_test_set_may_go_through_the_model_in_parts(train, data, size):
    model = initialise(with_batchnorm, 0)
    whole = evaluate(model, params_of(model), data.test_inputs, data.test_targets)
    parts = evaluate(model, params_of(model), data.test_inputs, data.test_targets, size)
    torch.testing.assert_close(parts, whole)
    sizes = []
    model[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    evaluate(model, params_of(model), data.test_inputs, data.test_targets, size)
    assert sum(sizes) == 30
    assert max(sizes) <= size
    assert_same_runs(train(MLP, seeds=(0, 1), test_batch_size=size), train(MLP, seeds=(0, 1)))  # a stack


# schedulers, and estimators with a state


class Recording(torch.optim.SGD):
    """Notes the learning rate of each step."""

    def __init__(self, params, rates):
        self.rates = rates
        super().__init__(params, lr=0.8)

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize("estimator", [backprop_gradient, forward_gradient])
def test_a_scheduler_steps_after_each_evaluation_but_the_first(train, estimator):
    rates = []
    train(
        estimator=estimator,
        optimizer=partial(Recording, rates=rates),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        evaluate_every=2,
        max_iterations=5,
        seeds=(0, 1),
    )
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2] * 2


def test_a_scheduler_slows_updates_from_factors_too(train):
    def step_lengths(scheduler):
        ends = [
            train(MLP, forward_gradient, learning_rate=1e-3, max_iterations=n, scheduler=scheduler).params[0]
            for n in (1, 2)
        ]
        return (ends[1]["fc1.weight"] - ends[0]["fc1.weight"]).norm().item()

    slower = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.25)
    assert step_lengths(slower) == pytest.approx(step_lengths(None) / 4, rel=1e-3)


class Stateful:
    """Counts its calls since it began anew, and by which seed."""

    def __init__(self):
        self.seeds, self.calls = [], 0

    def reset(self, seed):
        self.seeds.append(seed)
        self.calls = 0

    def __call__(self, objective, params):
        self.calls += 1
        return backprop_gradient(objective, params)


def test_an_estimator_with_a_state_begins_anew_for_each_seed(train):
    estimator = Stateful()
    history = train(estimator=estimator, seeds=(3, 5), max_iterations=4)
    assert history.together == 1
    assert estimator.seeds == [3, 5]
    assert estimator.calls == 5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"estimator": Stateful()}, "the estimator has a state"),
        ({"augment": lambda inputs: inputs}, "augment draws from torch's global generator"),
        ({"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1)}, "the scheduler belongs to one opt"),
    ],
)
def test_what_else_cannot_be_stacked(train, options, reason):
    assert train(seeds=(0, 1), max_iterations=1, **options).together == 1
    with pytest.raises(ValueError, match=f"together=True is not possible here: {reason}"):
        train(seeds=(0, 1), together=True, **options)


# what is told in between


@pytest.mark.parametrize("stacked", [True, False])
def test_each_evaluation_is_told_with_the_run_so_far(train, stacked):
    told = []
    history = train(
        seeds=(4, 2),
        together=stacked,
        evaluate_every=2,
        max_iterations=5,
        on_evaluation=lambda run: told.append((run.seed, run.iterations, len(run.test_loss), run.status)),
    )
    expected = [(0, 1, ""), (2, 2, ""), (4, 3, ""), (5, 4, "completed")]
    for run in history.runs:
        assert [rest for seed, *rest in told if seed == run.seed] == [list(values) for values in expected]


def test_seeds_that_have_stopped_are_not_told_again(train):
    told = []
    history = train(
        threshold=0.6,
        max_iterations=500,
        seeds=range(4),
        together=True,
        on_evaluation=lambda run: told.append(run.seed),
    )
    assert [told.count(run.seed) for run in history.runs] == [len(run.test_loss) for run in history.runs]


def test_the_bar_shows_loss_accuracy_and_images_per_second(train, capsys):
    train(batch_size=20, evaluate_every=5, max_iterations=2000, progress="blobs", progress_every=7, learning_rate=0.01)
    bar = capsys.readouterr().err
    assert "images/s, loss=" in bar
    assert "test accuracy=" in bar
    assert "40.0k" in bar  # 2000 steps of 20


# updates from factors


def test_plain_sgd_updates_from_the_factors_and_any_other_from_gradients(train, monkeypatch):
    written_out = []
    read = Gradients.__getitem__
    monkeypatch.setattr(Gradients, "__getitem__", lambda self, name: written_out.append(name) or read(self, name))
    estimator = partial(forward_gradient, num_tangents=2)
    plain = train(MLP, estimator, learning_rate=1e-3, together=False)
    assert written_out == []
    # the same steps, by an optimizer that is not plain and steps alike
    other = train(MLP, estimator, optimizer=lambda p: torch.optim.SGD(p, 1e-3, weight_decay=1e-30), together=False)
    assert len(written_out) == 6  # in the first step; later ones are written over it
    assert_same_runs(plain, other)
