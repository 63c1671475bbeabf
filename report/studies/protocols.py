"""The three models by two protocols: as published, one departure of the published code at a time, and fairly.

*As published*: the settings of the published notebooks. Where their code does something else than their text says, the
departure is a switch, and each is turned on alone. *Fair*: the same starts, split, batch, optimizer, stop and device
for every method, and a learning rate of its own for each, tuned on one grid, at equal budget, on separate seeds.

The trainings count iterations. What an iteration takes is timed separately, all forms taking turns.

    python -m report.studies.protocols logistic mlp     # two of the models
    python -m report.studies.protocols steps            # the time of an iteration; run nothing else meanwhile
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.atomic import check_own
from fwdlib.bench.measuring import interleave
from fwdlib.data import Dataset, load_kmnist, load_penguins
from fwdlib.estimators import Estimator, GradientEstimate, backprop_gradient, forward_gradient
from fwdlib.models import CNN, MLP, LogisticRegression, initialise
from fwdlib.objectives import BatchLoss, Objective, assign_gradients, params_of
from fwdlib.results import write_json
from fwdlib.tangents import AnyGenerator, Params, normal
from fwdlib.training import train
from report import published
from report.names import AS_PUBLISHED, PROTOCOLS, STEPS
from report.studies.common import main, reopen
from report.studies.published_code import published_backprop_step, published_step

PUBLISHED = published.load()["predecessors"]
GRID = range(-2, 9)  # learning rates of the fair protocol: powers of two times the published one
FIRST_SEED, FIRST_TUNING_SEED = 1, 1001
NUM_DRAWS = 2000


class Model(NamedTuple):
    """One of the three, with the published settings."""

    build: Callable[[], nn.Module]
    load: Callable[[], Dataset]
    blocks: str
    learning_rate: float
    threshold: float | None = None


MODELS = {
    name: Model(*ours, PUBLISHED[name]["learning_rate"], PUBLISHED[name].get("threshold"))
    for name, ours in {
        "logistic": (LogisticRegression, load_penguins, "parameter"),
        "mlp": (MLP, load_penguins, "parameter"),
        "cnn": (CNN, load_kmnist, "joint"),
    }.items()
}
METHODS: dict[str, Estimator] = {  # of the fair protocol
    "backprop": backprop_gradient,
    "forward gradient": partial(forward_gradient, tangents="normal"),
    "rank-one": forward_gradient,
    "rank-one, K = 16": partial(forward_gradient, num_tangents=16),
}
COMPARED = ("backprop", "forward gradient")  # by the published texts
PARTS = (*MODELS, Path(STEPS).stem)


class Length(NamedTuple):
    """How long a model trains, and how often."""

    max_iterations: int
    num_seeds: int
    num_tuning_seeds: int
    num_more_seeds: int
    """Of the trainings that published claims compare: as the text says, and both methods at their best rates."""


class Settings(NamedTuple):
    """Length of the study."""

    models: dict[str, Length]
    warm_up: int
    """Iterations with backprop before the run of the CNN that counts."""
    num_adam_seeds: int
    """Seeds of the departures that take a step for each image."""
    seconds: tuple[float, float]
    """Of timing, for each model: of our forms, and of the published code."""
    num_rounds: tuple[int, int]
    """At least, of timing."""


FULL = Settings(
    {
        "logistic": Length(2_000, 100, 20, 1_000),
        "mlp": Length(1_000, 100, 20, 1_000),
        "cnn": Length(PUBLISHED["cnn"]["num_iterations"], 20, 6, 20),
    },
    warm_up=PUBLISHED["cnn"]["warm_up"],
    num_adam_seeds=20,
    seconds=(20, 5),
    num_rounds=(15, 9),
)
SHORT = Settings(
    {"logistic": Length(2_000, 10, 3, 10), "mlp": Length(1_000, 10, 3, 10), "cnn": Length(30, 6, 1, 6)},
    warm_up=20,
    num_adam_seeds=1,
    seconds=(4, 1),
    num_rounds=(6, 2),
)


class Training(NamedTuple):
    """What is trained, apart from the seeds."""

    estimator: Callable[[Dataset], Estimator]
    learning_rate: float
    options: dict[str, Any] = {}  # noqa: RUF012 - of train()
    num_seeds: int | None = None  # None for the model's
    skipped: int = 0  # values at the start of the series that the published run does not show


def standardised(params: Params, num_tangents: int = 1, generator: AnyGenerator = None) -> Params:
    """Sample normal tangents, and shift and scale those of each tensor to mean zero and variance one.

    The published code does so. The estimate of a tensor's gradient then lacks the gradient's mean component.
    """
    sampled = normal(params, num_tangents, generator)
    rows = {name: v.flatten(1) for name, v in sampled.items()}
    rows = {name: (v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True) for name, v in rows.items()}
    return {name: v.reshape(sampled[name].shape) for name, v in rows.items()}


def on_the_test_set(data: Dataset) -> Estimator:
    """Return an estimator that gives backprop's gradient of the training loss once, and of the test loss thereafter.

    The loss that it returns, by which a training stops, is that of the test set, too.
    """
    calls = 0

    def estimate(objective: BatchLoss, params: Params) -> GradientEstimate:
        nonlocal calls
        calls += 1
        if calls > 1:
            objective = BatchLoss(objective.model, data.test_inputs, data.test_targets)
        return backprop_gradient(objective, params)

    return estimate


def with_double_softmax(objective: BatchLoss, params: Params) -> GradientEstimate:
    """Differentiate the loss of a model that ends in a softmax, where the loss applies another softmax."""
    twice = BatchLoss(
        objective.model, objective.inputs, objective.targets, lambda y, t: F.cross_entropy(y.softmax(1), t)
    )
    return backprop_gradient(twice, params)


def as_published(settings: Settings, name: str) -> dict[str, dict[str, Training]]:
    """Return the trainings at the published settings: method -> form -> training.

    The first form of each method is the text's; each other form has one departure of the code.
    """
    model, theirs = MODELS[name], PUBLISHED[name]
    rate, blocks = model.learning_rate, model.blocks
    backprop = lambda data: backprop_gradient  # noqa: E731
    forward = partial(forward_gradient, blocks=blocks, tangents="normal")
    found = {
        "backprop": {AS_PUBLISHED: Training(backprop, rate)},
        "forward": {AS_PUBLISHED: Training(lambda data: forward, rate)},
    }
    if blocks == "parameter":
        sampler = partial(forward, tangents=standardised)
        found["forward"]["standardised tangents"] = Training(lambda data: sampler, rate)
        found["forward"]["one tangent for all tensors"] = Training(
            lambda data: partial(forward_gradient, tangents="normal"), rate
        )
    if name == "logistic":
        found["backprop"]["step of 0.01"] = Training(backprop, theirs["learning_rate_used"], {"max_iterations": 20_000})
    if name == "mlp":
        found["backprop"]["trained on the test set"] = Training(on_the_test_set, rate)
    if name == "cnn":
        found["backprop"]["double softmax"] = Training(lambda data: with_double_softmax, rate)
        num_steps = theirs["steps_per_iteration"]
        for_each = {"optimizer": "Adam", "batch_size": 1, "evaluate_every": num_steps}
        for form, estimator, skipped in (
            ("Adam, one image a step", backprop_gradient, 0),
            ("Adam, double softmax, warm start", with_double_softmax, settings.warm_up),
        ):
            options = for_each | {"max_iterations": num_steps * (settings.models[name].max_iterations + skipped)}
            found["backprop"][form] = Training(
                lambda data, e=estimator: e, rate, options, settings.num_adam_seeds, skipped
            )
    return found


def measure(settings: Settings, folder: Path, parts: Sequence[str] = PARTS) -> None:
    """Train the models that ``parts`` name, and time the iterations if they name these."""
    for part in parts:
        if part in MODELS:
            measure_model(settings, folder, part)
        else:
            measure_steps(settings, folder)


def measure_model(settings: Settings, folder: Path, name: str) -> dict[str, Any]:
    """Train a model by both protocols and return everything that its file then holds.

    Returns:
        ``settings``, ``source``, ``environment``, and ``published``: method -> form -> runs; ``equal``: method ->
        runs at the published rate; ``tuning``: method -> power -> cost; ``fair``: method -> runs at the best rate.
        Runs are lists, one item a seed: ``seed``, ``status``, ``iterations``, and first and last ``train_loss``,
        ``test_loss``, ``accuracy``; with the ``learning_rate``.
    """
    model, length, file = MODELS[name], settings.models[name], folder / PROTOCOLS / f"{name}.json"
    data = model.load()
    kept = {key: value for key, value in model._asdict().items() if key not in ("build", "load")}
    kept |= length._asdict() | {"grid": list(GRID), "first_seed": FIRST_SEED, "first_tuning_seed": FIRST_TUNING_SEED}
    found = reopen(file, kept) | {"source": data.source._asdict()}
    found["num_test"], found["num_train"] = len(data.test_targets), len(data.train_targets)

    def run(part: str, method: str, form: str, training: Training, num_seeds: int, first: int) -> dict[str, Any]:
        rows = found.setdefault(part, {}).setdefault(method, {})
        if form not in rows:
            seeds = range(first, first + num_seeds)
            rows[form] = _train(model, data, training, length.max_iterations, seeds, f"{name}, {method}, {form}")
            write_json(file, found)
        return rows[form]

    for method, forms in as_published(settings, name).items():
        for form, training in forms.items():
            num_seeds = length.num_more_seeds if form == AS_PUBLISHED else training.num_seeds or length.num_seeds
            run("published", method, form, training, num_seeds, FIRST_SEED)
    found["statements"] = _statements(model, data)
    write_json(file, found)
    for method, estimator in tqdm(METHODS.items(), desc=name, unit="method"):

        def at(power: int, estimator: Estimator = estimator) -> Training:
            return Training(lambda data: estimator, model.learning_rate * 2.0**power)

        costs = {
            power: _cost(
                run("tuning", method, str(power), at(power), length.num_tuning_seeds, FIRST_TUNING_SEED),
                has_threshold=model.threshold is not None,
            )
            for power in GRID
        }
        best = min(GRID, key=costs.__getitem__)
        num_seeds = length.num_more_seeds if method in COMPARED else length.num_seeds
        run("equal", method, "0", at(0), length.num_seeds, FIRST_SEED)
        run("fair", method, str(best), at(best), num_seeds, FIRST_SEED)
    return found


def _statements(model: Model, data: Dataset) -> dict[str, Any]:
    # What others state about tangents and estimates, in numbers: each a mean over draws, with its standard error.
    network = initialise(model.build, FIRST_SEED)
    objective, params = BatchLoss(network, data.train_inputs, data.train_targets), params_of(network)
    exact = sum(g.square().sum() for g in backprop_gradient(objective, params).grads.values())
    draw = runtime.generator(FIRST_SEED, purpose="statements")
    jvps = [
        forward_gradient(objective, params, num_tangents=50, generator=draw, tangents="normal").jvps
        for _ in range(NUM_DRAWS // 50)
    ]
    last = {name: p for name, p in params.items() if p.dim() == 1}.popitem()  # the biases of the readout
    v = standardised(dict([last]), 100 * NUM_DRAWS, draw)[last[0]]
    return {
        "length of the mean estimate along the gradient": _mean_and_error(torch.cat(jvps).square() / exact),
        "mean product of two standardised components": _mean_and_error(v[:, 0] * v[:, 1]),
        "num_components": v.shape[1],
        "num_draws": NUM_DRAWS,
    }


def _mean_and_error(values: torch.Tensor) -> list[float]:
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


def _cost(runs: dict[str, Any], *, has_threshold: bool) -> float:
    # The median of the iterations to the threshold; without a threshold, of the training loss at the end.
    values, success = (runs["iterations"], "reached") if has_threshold else (runs["train_loss"], "completed")
    return float(np.median([v if s == success else np.inf for v, s in zip(values, runs["status"], strict=True)]))


def _train(
    model: Model, data: Dataset, training: Training, max_iterations: int, seeds: Sequence[int], words: str
) -> dict[str, Any]:
    options = {"optimizer": "SGD", "max_iterations": max_iterations} | training.options
    history = train(
        model.build,
        data,
        training.estimator(data),
        learning_rate=training.learning_rate,
        threshold=model.threshold,
        seeds=seeds,
        progress=words,
        **options,
    )
    runs, num_test, start = history.runs, history.num_test, training.skipped
    ends = [run.end(num_test) for run in runs]
    return {
        "learning_rate": training.learning_rate,
        "seed": [run.seed for run in runs],
        "status": [run.status for run in runs],
        "iterations": [run.iterations // options.get("evaluate_every", 1) - start for run in runs],
        "train_loss_start": [run.train_loss[start] for run in runs],
        "train_loss": [run.train_loss[-1] for run in runs],
        "test_loss": [loss for loss, _ in ends],
        "accuracy_start": [1 - run.test_errors[start] / num_test for run in runs],
        "accuracy": [1 - errors / num_test for _, errors in ends],
    }


def measure_steps(settings: Settings, folder: Path) -> dict[str, Any]:
    """Time an iteration of each model in every form, and save the times. The forms take turns.

    Returns:
        ``seconds``: model -> form -> seconds per iteration, one number a round; ``environment``. The forms are those of
        ``METHODS``; ``"forward, published form"``, with a jvp for each tensor where that is the published form; and
        ``"forward, their code"`` and ``"backprop, their code"``: what the published code counts as an iteration,
        evaluations inside.
    """
    found: dict[str, Any] = {"environment": runtime.environment(), "seconds": {}}
    check_own(folder / PROTOCOLS, [STEPS], STEPS, found)
    (seconds, their_seconds), (num_rounds, num_their_rounds) = settings.seconds, settings.num_rounds
    for name, model in MODELS.items():
        data = model.load()
        ours = {form: _step(model, data, estimator) for form, estimator in METHODS.items()}
        ours["forward, published form"] = _step(
            model, data, partial(forward_gradient, blocks=model.blocks, tangents="normal")
        )
        network = initialise(model.build, FIRST_SEED)
        forward = published_step(network, data, model.learning_rate, model.blocks == "parameter")
        backprop = published_backprop_step(network, data, model.learning_rate, name == "cnn")
        params = params_of(network)
        theirs = {"forward, their code": lambda f=forward, p=params: f(p)}
        theirs["backprop, their code"] = lambda f=backprop, p=params: f(p)
        found["seconds"][name] = interleave(ours, seconds=seconds, min_rounds=num_rounds, block_seconds=0.05)
        found["seconds"][name] |= interleave(theirs, seconds=their_seconds, min_rounds=num_their_rounds)
    write_json(folder / PROTOCOLS / STEPS, found)
    return found


def _step(model: Model, data: Dataset, estimator: Estimator) -> Callable[[], object]:
    network = initialise(model.build, FIRST_SEED)
    objective: Objective = BatchLoss(network, data.train_inputs, data.train_targets)
    params, optimizer = params_of(network), torch.optim.SGD(network.parameters(), lr=1e-9)

    def step() -> None:
        assign_gradients(network, estimator(objective, params).grads)
        optimizer.step()

    return step


if __name__ == "__main__":
    main(measure, FULL, SHORT, PARTS)
