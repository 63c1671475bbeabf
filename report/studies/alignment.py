"""Test accuracy of every train mode on the same nets: the study behind the report's section on feedback.

Each mode has learning rates of its own, tuned on 10 000 images held out of the training set: first that of the weights,
then, where the feedback learns, that of the feedback. Then it trains on all training images, from several seeds. There
is a file for each task and mode, every finished training is kept in it, and what is there is not done again; so it can
be interrupted, and several processes can share the work.

    python -m report.studies.alignment                          # everything
    python -m report.studies.alignment MNIST-2x800 FDFA BP      # a task, and some of its modes
    python -m report.studies.alignment steps                    # the time of a step, with nothing beside it
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.measuring import interleave
from fwdlib.checks import check_choice
from fwdlib.data import Dataset
from fwdlib.estimators import Estimator, GradientEstimate
from fwdlib.models import initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.results import write_json
from fwdlib.stacked.recording import Recording
from fwdlib.tangents import Params
from fwdlib.trainer import experiment
from fwdlib.trainer.settings import Settings
from report.studies.common import RESULTS, climb, either, held_out, reopen

FOLDER = RESULTS / "feedback"
STEPS = "steps.json"
PLAIN = "loss.backward()"
TUNING_SEED = 100
NUM_HELD_OUT = 10_000
BASE_RATE = 1e-4  # times a power of two


class Study(NamedTuple):
    """A data set and a net, with the modes that are compared on it."""

    options: dict[str, Any]
    epochs: int
    tuning_steps: int
    seeds: tuple[int, ...]
    modes: tuple[str, ...]


MODES: dict[str, dict[str, Any]] = {  # with the power of the first guess of the learning rate; or a fixed one
    "BP": {"train_mode": "BP", "power": 2},
    "FDFA": {"train_mode": "FDFA", "power": 2},
    "DKP": {"train_mode": "DKP", "power": 2},
    "DFA": {"train_mode": "DFA", "power": 2},
    "FG-CV": {"train_mode": "FG-CV", "power": 1},
    "FG-A": {"train_mode": "FG-A", "power": 1},
    "FG": {"train_mode": "FG", "power": 0},
    "FG-RANK1": {"train_mode": "FG-RANK1", "power": 0},
    "FG-CV, no feedback": {"train_mode": "FG-CV", "power": 2, "feedback_power": -60},  # FG-A, each example by itself
    "FG-CV, alpha 0.1": {"train_mode": "FG-CV", "alpha": 0.1, "power": 3},
    "FG-CV, alpha to 0": {"train_mode": "FG-CV", "alpha_decay": 0.5, "power": 3},
}
EIGHT = tuple(MODES)[:8]
STUDIES = {
    "MNIST-2x800": Study({"dataset": "MNIST"}, *either((10, 800, (1, 2, 3), tuple(MODES)), (1, 100, (1, 2), EIGHT))),
    "FashionMNIST-2x800": Study(
        {"dataset": "FashionMNIST"}, *either((10, 800, (1, 2, 3)), (1, 100, (1, 2))), ("BP", "FDFA")
    ),
    "MNIST-cnn": Study(
        {"dataset": "MNIST", "conv": True}, *either((3, 200, (1, 2, 3), EIGHT), (1, 30, (1,), ("BP", "FDFA")))
    ),
}
LEARNED = ("FDFA", "DKP", "FG-CV")  # train modes whose feedback has a learning rate


def path_of(task: str, mode: str, folder: Path = FOLDER) -> Path:
    """Return the file of a mode in a study."""
    return folder / f"{task}-{mode.replace(', ', '-').replace(' ', '-')}.json"


def measure(task: str, mode: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Tune and train one mode of a study, and return everything that its file then holds.

    Args:
        task: one of ``STUDIES``.
        mode: one of its modes.
        folder: where the files are.

    Returns:
        ``task``, ``mode``, ``settings``, ``source``, ``environment``, and ``runs``: for each training the powers of its
        learning rates, seed, purpose (``"tuning"`` or ``"measured"``), status, and the series of the run.

    Raises:
        ValueError: if the file holds trainings with other settings.
    """
    study = STUDIES[task]
    first = dict(MODES[mode])
    start, fixed = first.pop("power"), first.pop("feedback_power", None)
    settings = Settings(**study.options, **first, epochs=study.epochs)
    whole = experiment.load(settings, runtime.resolve_device("cpu"))
    described = {name: value for name, value in asdict(settings).items() if name not in (*experiment.PASSING, "lr")}
    described |= {"tuning_steps": study.tuning_steps, "num_held_out": NUM_HELD_OUT}
    file = path_of(task, mode, folder)
    found = reopen(file, described, task=task, mode=mode, runs=[]) | {"source": whole.source._asdict()}

    def run(power: int, feedback_power: int, seed: int, purpose: str) -> dict[str, Any]:
        key = {"power": power, "feedback_power": feedback_power, "seed": seed, "purpose": purpose}
        for done in found["runs"]:
            if key.items() <= done.items():
                return done
        done = key | _train(settings, whole, study, key)
        found["runs"].append(done)
        write_json(file, found)
        return done

    def cost(power: int, feedback_power: int) -> tuple[float, ...]:
        done = run(power, feedback_power, TUNING_SEED, "tuning")
        return (1,) if done["status"] == "diverged" else (0, done["test_errors"][-1], done["test_loss"][-1])

    feedback_power = fixed or 0
    power = climb(lambda power: cost(power, feedback_power), start)
    if settings.train_mode in LEARNED and fixed is None:
        feedback_power = climb(lambda feedback_power: cost(power, feedback_power), 0)
    for seed in study.seeds:
        run(power, feedback_power, seed, "measured")
    return found


def _train(settings: Settings, whole: Dataset, study: Study, key: dict[str, Any]) -> dict[str, Any]:
    rates = {"lr": BASE_RATE * 2 ** key["power"], "b_lr": BASE_RATE * 2 ** key["feedback_power"]}
    settings = Settings(**(asdict(settings) | rates | {"seed": key["seed"]}))
    is_tuning = key["purpose"] == "tuning"
    data = held_out(whole, NUM_HELD_OUT) if is_tuning else whole
    steps = len(data.train_targets) // settings.batch_size
    history = experiment.fit(
        settings,
        data,
        max_iterations=study.tuning_steps if is_tuning else steps * study.epochs,
        evaluate_every=min(steps, study.tuning_steps) if is_tuning else steps,
        progress=f"{settings.name}, {key['purpose']}, lr {settings.lr:g}, b-lr {settings.b_lr:g}",
        progress_every=50,
    )
    (run,) = history.runs
    return rates | {
        "status": run.status,
        "iterations": run.iterations,
        "train_loss": run.train_loss,
        "test_loss": run.test_loss,
        "test_errors": run.test_errors,
        "num_test": len(data.test_targets),
    }


def measure_steps(folder: Path = FOLDER) -> dict[str, Any]:
    """Time a training step of each mode, as ``train()`` takes it, in turns on the same net, and save it.

    The feedback rules replay what they have recorded, as ``python -m fwdlib train`` has them do. For a fair comparison
    FDFA is also timed without recording, and backprop with it.

    Returns:
        ``seconds``: net -> mode -> seconds per step, one number a round; ``environment``.
    """
    found: dict[str, Any] = {"environment": runtime.environment(), "seconds": {}}
    for task in ("MNIST-2x800", "MNIST-cnn"):
        steps = {}
        for mode in EIGHT:
            options = STUDIES[task].options | {"train_mode": MODES[mode]["train_mode"], "lr": 1e-9, "b_lr": 1e-9}
            steps[mode] = _step(Settings(**options))
            if mode == "BP":
                steps["BP, recorded"] = _step(Settings(**options), recorded=True)
                steps[PLAIN] = _plain_step(Settings(**options))
            if mode == "FDFA":
                steps["FDFA, not recorded"] = _step(Settings(**options), recorded=False)
        for step in steps.values():
            step()
        found["seconds"][task] = interleave(steps, seconds=either(60, 8), min_rounds=either(15, 6), block_seconds=0.1)
    write_json(folder / STEPS, found)
    return found


def _step(settings: Settings, recorded: bool | None = None) -> Callable[[], object]:
    inputs, targets, data = _batch(settings)
    build = experiment.network(settings, data)
    model = initialise(build, 0)
    estimate = experiment.estimator(settings, build, data, 1)
    if recorded is not None and settings.train_mode == "BP":
        estimate = _recorded_backprop()
    elif recorded is not None:
        estimate.recorded = recorded
    params, objective = params_of(model), BatchLoss(model, inputs, targets)
    optimizer = experiment.optimizer(settings.optimizer, settings.lr, 0.0)(list(params.values()))

    def step() -> None:
        grads = estimate(objective, params).grads
        for name, p in params.items():
            p.grad = grads[name]
        optimizer.step()

    return step


def _plain_step(settings: Settings) -> Callable[[], object]:
    # Backprop as everyone writes it.
    inputs, targets, data = _batch(settings)
    model = initialise(experiment.network(settings, data), 0)
    optimizer = experiment.optimizer(settings.optimizer, settings.lr, 0.0)(list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def _batch(settings: Settings) -> tuple[Tensor, Tensor, Dataset]:
    draw = runtime.generator(0, purpose="benchmark")
    inputs = torch.randn(settings.batch_size, 1, 28, 28, generator=draw)
    targets = torch.randint(10, (len(inputs),), generator=draw)
    return inputs, targets, Dataset(inputs, targets, inputs, targets, tuple("0123456789"), None)


def _recorded_backprop() -> Estimator:
    recording = Recording()

    def estimate(objective: BatchLoss, params: Params) -> GradientEstimate:
        tensors = params | dict(objective.model.named_buffers())

        def evaluate(inputs: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(tensors, values, strict=True))
            leaves = {name: named[name].requires_grad_() for name in params}
            with torch.enable_grad():
                loss = objective.loss(functional_call(objective.model, named | leaves, (inputs,)), targets)
                grads = torch.autograd.grad(loss, list(leaves.values()))
            return loss.detach(), *grads

        with torch.no_grad():
            loss, *grads = recording(evaluate, objective.inputs, objective.targets, *tensors.values())
        return GradientEstimate(loss, dict(zip(params, grads, strict=True)), loss.new_empty(0))

    return estimate


def main(words: list[str]) -> None:
    """Measure what ``words`` name: a task and some of its modes, or a task, or everything.

    Raises:
        ValueError: if a word is not the name of one.
    """
    if words == ["steps"]:
        measure_steps()
        return
    tasks = [check_choice("task", words[0], STUDIES)] if words else list(STUDIES)
    jobs = [(task, mode) for task in tasks for mode in words[1:] or STUDIES[task].modes]
    for task, mode in jobs:
        check_choice("mode", mode, STUDIES[task].modes)
    for task, mode in tqdm(jobs, desc="feedback", unit="mode"):
        measure(task, mode)


if __name__ == "__main__":
    runtime.keep_freed_memory()
    main(sys.argv[1:])
