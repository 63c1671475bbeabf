"""The timing pass: both methods on each model, taking turns in one process, with nothing else running.

For each seed both methods train from the same start to the same end, one after the other, so a slow moment of the
machine hits both alike. Compared are ratios within a pair. The published code's own iteration is timed in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.measuring import interleave
from fwdlib.data import Dataset, load_kmnist, load_penguins
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.models import CNN, MLP, LogisticRegression, initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.training import train
from report.studies.published_code import published_step


def measure(tasks: dict[str, dict[str, Any]], *, num_seeds: int, num_rounds: int = 5) -> dict[str, Any]:
    """Time every task and return the numbers, to be saved as JSON.

    Args:
        tasks: model name -> the parameters of its pair of notebooks: seed, learning_rate, blocks, and threshold and
            max_iterations or num_iterations.
        num_seeds: pairs of trainings per task.
        num_rounds: how often plain evaluation and published iteration take turns, per task.

    Returns:
        For each task the lists ``plain_seconds`` (one evaluation of the loss without derivative),
        ``published_seconds`` (one published iteration) and for each method ``step_seconds`` (median of a run),
        ``total_seconds`` and ``iterations``.
    """
    runtime.keep_freed_memory()
    models: dict[str, tuple[Callable[[], nn.Module], Dataset]] = {}
    penguins = load_penguins()
    models["logistic"], models["mlp"] = (LogisticRegression, penguins), (MLP, penguins)
    models["cnn"] = (CNN, load_kmnist())
    found: dict[str, Any] = {"environment": runtime.environment(), "tasks": {}}
    with tqdm(total=len(tasks) * num_seeds, desc="timings", unit="pair") as bar:
        for name, parameters in tasks.items():
            build, data = models[name]
            found["tasks"][name] = _measure_task(build, data, parameters, num_seeds, num_rounds, bar)
    return found


def _measure_task(
    build: Callable[[], nn.Module],
    data: Dataset,
    parameters: dict[str, Any],
    num_seeds: int,
    num_rounds: int,
    bar: tqdm,
) -> dict[str, Any]:
    methods: dict[str, Estimator] = {
        "backprop": backprop_gradient,
        "forward gradient": partial(forward_gradient, blocks=parameters["blocks"], tangents="normal"),
    }
    threshold = parameters.get("threshold")
    options = {
        "learning_rate": parameters["learning_rate"],
        "threshold": threshold,
        "max_iterations": parameters["num_iterations"] if threshold is None else parameters["max_iterations"],
        "progress": None,
    }
    for estimator in methods.values():  # warm: the first call of each operation is slower than the rest
        train(build, data, estimator, **{**options, "max_iterations": 3})
    runs: dict[str, list] = {name: [] for name in methods}
    for seed in runtime.seed_list(parameters["seed"], num_seeds):
        for name, estimator in methods.items():
            runs[name] += train(build, data, estimator, seeds=[seed], **options).runs
        bar.update()

    model = initialise(build, parameters["seed"])
    objective, params = BatchLoss(model, data.train_inputs, data.train_targets), params_of(model)
    step = published_step(model, data, parameters["learning_rate"], parameters["blocks"] == "parameter")

    @torch.no_grad()
    def evaluate() -> object:
        return objective(params)

    calls = {"plain": evaluate, "published": lambda: step(params)}
    seconds = interleave(calls, seconds=0, min_rounds=num_rounds, max_rounds=num_rounds)
    return {
        "plain_seconds": seconds["plain"],
        "published_seconds": seconds["published"],
        "methods": {
            name: {
                "seed": [run.seed for run in of_method],
                "status": [run.status for run in of_method],
                "iterations": [run.iterations for run in of_method],
                "step_seconds": [float(np.median(run.step_seconds)) if run.step_seconds else None for run in of_method],
                "total_seconds": [sum(run.step_seconds) for run in of_method],
            }
            for name, of_method in runs.items()
        },
    }
