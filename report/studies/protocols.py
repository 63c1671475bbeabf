"""The three models by two protocols: as it was published, each departure of the published code by itself, and fairly.

*As published*: the settings of the published notebooks, and what their code does otherwise than their text says, each
of it a switch that is turned on alone. *Fair*: the same starts, split, batch, optimizer, stop and device for every
method, and for each a learning rate of its own from one grid at equal budget, tuned with seeds of their own.

Iterations are counted here; what an iteration takes is measured apart, all forms taking turns.

    python -m report.studies.protocols                  # everything that is not there yet
    python -m report.studies.protocols logistic mlp     # some of the models
    python -m report.studies.protocols steps            # the time of an iteration, with nothing beside it
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.measuring import interleave
from fwdlib.checks import check_choice
from fwdlib.data import Dataset, load_kmnist, load_penguins
from fwdlib.estimators import Estimator, GradientEstimate, backprop_gradient, forward_gradient
from fwdlib.models import CNN, MLP, LogisticRegression, initialise
from fwdlib.objectives import BatchLoss, Objective, assign_gradients, params_of
from fwdlib.results import write_json
from fwdlib.tangents import AnyGenerator, Params, normal
from fwdlib.training import train
from report.studies.common import RESULTS, either, reopen
from report.studies.published_code import published_backprop_step, published_step

FOLDER = RESULTS / "protocols"
STEPS = "steps.json"
WARM_UP = either(
    60, 20
)  # iterations that the published CNN had been trained for with backprop before the run that was reported


class Model(NamedTuple):
    """One of the three, with the published settings."""

    build: Callable[[], nn.Module]
    load: Callable[[], Dataset]
    learning_rate: float
    threshold: float | None
    max_iterations: int
    blocks: str
    num_seeds: int
    num_tuning_seeds: int


MODELS = {
    "logistic": Model(LogisticRegression, load_penguins, 0.2, 0.3, 2_000, "parameter", *either((100, 20), (10, 3))),
    "mlp": Model(MLP, load_penguins, 0.05, 0.2, 1_000, "parameter", *either((100, 20), (10, 3))),
    "cnn": Model(CNN, load_kmnist, 0.001, None, either(100, 30), "joint", *either((20, 6), (6, 1))),
}
GRID = range(-2, 9)  # learning rates of the fair protocol: powers of two times the published one
FIRST_SEED, FIRST_TUNING_SEED = 1, 1001
NUM_DRAWS = 2000


class Training(NamedTuple):
    """What is trained, apart from the seeds."""

    estimator: Callable[[Dataset], Estimator]
    learning_rate: float
    options: dict[str, Any] = {}  # noqa: RUF012 - of train()
    num_seeds: int | None = None  # None for the model's
    skipped: int = 0  # values of the series that the published run does not show


def standardised(params: Params, num_tangents: int = 1, generator: AnyGenerator = None) -> Params:
    """Sample normal tangents, and give those of each tensor mean zero and variance one, as the published code does.

    That deletes from the estimate of a tensor's gradient its mean component.
    """
    sampled = normal(params, num_tangents, generator)
    rows = {name: v.flatten(1) for name, v in sampled.items()}
    rows = {name: (v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True) for name, v in rows.items()}
    return {name: v.reshape(sampled[name].shape) for name, v in rows.items()}


def on_the_test_set(data: Dataset) -> Estimator:
    """Return backprop that from its second call on differentiates, and stops by, the loss of the test set."""
    calls = 0

    def estimate(objective: BatchLoss, params: Params) -> GradientEstimate:
        nonlocal calls
        calls += 1
        if calls > 1:
            objective = BatchLoss(objective.model, data.test_inputs, data.test_targets)
        return backprop_gradient(objective, params)

    return estimate


def with_double_softmax(objective: BatchLoss, params: Params) -> GradientEstimate:
    """Differentiate the loss of a model that ends in a softmax to which the loss applies another."""
    twice = BatchLoss(
        objective.model, objective.inputs, objective.targets, lambda y, t: F.cross_entropy(y.softmax(1), t)
    )
    return backprop_gradient(twice, params)


def published(name: str) -> dict[str, dict[str, Training]]:
    """Return the trainings at the published settings: form of a method -> its name -> training.

    The first form of each method is the text's, the others have one departure of the code each.

    Args:
        name: of the model.
    """
    model = MODELS[name]
    rate, blocks = model.learning_rate, model.blocks
    backprop = lambda data: backprop_gradient  # noqa: E731
    forward = partial(forward_gradient, blocks=blocks, tangents="normal")
    found = {
        "backprop": {"as the text says": Training(backprop, rate)},
        "forward": {"as the text says": Training(lambda data: forward, rate)},
    }
    if blocks == "parameter":
        sampler = partial(forward, tangents=standardised)
        found["forward"]["standardised tangents"] = Training(lambda data: sampler, rate)
        found["forward"]["one tangent for all tensors"] = Training(
            lambda data: partial(forward_gradient, tangents="normal"), rate
        )
    if name == "logistic":
        found["backprop"]["step of 0.01"] = Training(backprop, 0.01, {"max_iterations": 20_000})
    if name == "mlp":
        found["backprop"]["trained on the test set"] = Training(on_the_test_set, rate)
    if name == "cnn":
        found["backprop"]["double softmax"] = Training(lambda data: with_double_softmax, rate)
        for_each = {"optimizer": "Adam", "batch_size": 1, "evaluate_every": 499}
        for form, estimator, skipped in (
            ("Adam, one image a step", backprop_gradient, 0),
            ("Adam, double softmax, warm start", with_double_softmax, WARM_UP),
        ):
            options = for_each | {"max_iterations": 499 * (model.max_iterations + skipped)}
            found["backprop"][form] = Training(lambda data, e=estimator: e, rate, options, either(None, 1), skipped)
    return found


METHODS: dict[str, Estimator] = {  # of the fair protocol
    "backprop": backprop_gradient,
    "forward gradient": partial(forward_gradient, tangents="normal"),
    "rank-one": forward_gradient,
    "rank-one, K = 16": partial(forward_gradient, num_tangents=16),
}


def measure(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Train a model by both protocols and return everything that its file then holds.

    Args:
        name: of the model.
        folder: where the files are.

    Returns:
        ``settings``, ``source``, ``environment``, and ``published``: method -> form -> runs; ``equal``: method ->
        runs at the published rate; ``tuning``: method -> power -> cost; ``fair``: method -> runs at the best rate.
        Runs are lists, one item a seed: ``seed``, ``status``, ``iterations``, and first and last ``train_loss``,
        ``test_loss``, ``accuracy``; with the ``learning_rate``.

    Raises:
        ValueError: if the file holds trainings with other settings.
    """
    model, file = MODELS[name], folder / f"{name}.json"
    data = model.load()
    settings = {key: value for key, value in model._asdict().items() if key not in ("build", "load")}
    settings |= {"grid": list(GRID), "first_seed": FIRST_SEED, "first_tuning_seed": FIRST_TUNING_SEED}
    found = reopen(file, settings) | {"source": data.source._asdict()}
    found["num_test"], found["num_train"] = len(data.test_targets), len(data.train_targets)

    def run(part: str, method: str, form: str, training: Training, num_seeds: int, first: int) -> dict[str, Any]:
        rows = found.setdefault(part, {}).setdefault(method, {})
        if form not in rows:
            rows[form] = _train(model, data, training, num_seeds, first, f"{name}, {method}, {form}")
            write_json(file, found)
        return rows[form]

    for method, forms in published(name).items():
        for form, training in forms.items():
            num_seeds = training.num_seeds or model.num_seeds
            run("published", method, form, training, num_seeds, FIRST_SEED)
    found["statements"] = _statements(model, data)
    write_json(file, found)
    for method, estimator in tqdm(METHODS.items(), desc=name, unit="method"):

        def at(power: int, estimator: Estimator = estimator) -> Training:
            return Training(lambda data: estimator, model.learning_rate * 2.0**power)

        powers = list(GRID)
        costs = {
            power: _cost(run("tuning", method, str(power), at(power), model.num_tuning_seeds, FIRST_TUNING_SEED), model)
            for power in powers
        }
        best = min(powers, key=costs.__getitem__)
        run("equal", method, "0", at(0), model.num_seeds, FIRST_SEED)
        run("fair", method, str(best), at(best), model.num_seeds, FIRST_SEED)
    return found


def _statements(model: Model, data: Dataset) -> dict[str, Any]:
    # What is said of the tangents and of their estimates, in numbers; each a mean over draws, with its standard error.
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


def _cost(runs: dict[str, Any], model: Model) -> float:
    # The median of the iterations to the threshold, or where there is none of the training loss at the end.
    values, arrived = (runs["train_loss"], "completed") if model.threshold is None else (runs["iterations"], "reached")
    return float(np.median([v if s == arrived else np.inf for v, s in zip(values, runs["status"], strict=True)]))


def _train(model: Model, data: Dataset, training: Training, num_seeds: int, first: int, words: str) -> dict[str, Any]:
    options = {"optimizer": "SGD", "max_iterations": model.max_iterations} | training.options
    history = train(
        model.build,
        data,
        training.estimator(data),
        learning_rate=training.learning_rate,
        threshold=model.threshold,
        seeds=range(first, first + num_seeds),
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


def measure_steps(folder: Path = FOLDER) -> dict[str, Any]:
    """Time an iteration of each model in every form, taking turns, with nothing beside them, and save it.

    Returns:
        ``seconds``: model -> form -> seconds per iteration, one number a round; ``environment``. The forms are
        ``METHODS``, ``"forward, published form"`` (a jvp for each tensor, where that is the published form), and what
        the published code takes for an iteration of either method, evaluations inside, ``"forward, their code"`` and
        ``"backprop, their code"``.
    """
    found: dict[str, Any] = {"environment": runtime.environment(), "seconds": {}}
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
        found["seconds"][name] = interleave(ours, seconds=either(20, 4), min_rounds=either(15, 6), block_seconds=0.05)
        found["seconds"][name] |= interleave(theirs, seconds=either(5, 1), min_rounds=either(9, 2))
    write_json(folder / STEPS, found)
    return found


def _step(model: Model, data: Dataset, estimator: Estimator) -> Callable[[], object]:
    network = initialise(model.build, FIRST_SEED)
    objective: Objective = BatchLoss(network, data.train_inputs, data.train_targets)
    params, optimizer = params_of(network), torch.optim.SGD(network.parameters(), lr=1e-9)

    def step() -> None:
        assign_gradients(network, estimator(objective, params).grads)
        optimizer.step()

    return step


def main(words: list[str]) -> None:
    """Measure what ``words`` name: some of the models, ``steps``, or everything.

    Raises:
        ValueError: if a word is not the name of one.
    """
    for word in words or [*MODELS, "steps"]:
        check_choice("model", word, [*MODELS, "steps"])
        if word == "steps":
            measure_steps()
        else:
            measure(word)


if __name__ == "__main__":
    runtime.keep_freed_memory()
    main(sys.argv[1:])
