"""Test accuracy of every train mode on the same networks.

Each mode has learning rates of its own, tuned on images held out of the training set: first the rate of the weights,
then, where the feedback learns, the rate of the feedback. Half the rate of the weights replaces it if the worst of
three seeds is then better. Then the mode trains on all training images, from several seeds. Each task and mode has a
file that keeps every finished training. So the study can be interrupted, and several processes can share the work.

    python -m report.studies.feedback MNIST-2x800        # all modes of a task
    python -m report.studies.feedback MNIST-2x800-FDFA   # one mode
    python -m report.studies.feedback steps              # the time of a step; run nothing else meanwhile
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.atomic import check_own
from fwdlib.bench.measuring import interleave
from fwdlib.data import Dataset
from fwdlib.estimators import Estimator, GradientEstimate
from fwdlib.models import initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.results import write_json
from fwdlib.stacked.recording import Recording
from fwdlib.tangents import Params
from fwdlib.trainer import experiment
from fwdlib.trainer.settings import Settings as TrainerSettings
from report.names import (
    DEPTH_MODES,
    DEPTHS,
    FEEDBACK,
    LEARNS,
    LOCAL_MODES,
    MAIN_MODES,
    MIXER_MODES,
    PLAIN,
    RECORDED,
    STEPS,
    TASKS,
    feedback_file,
)
from report.studies.common import climb, held_out, main, once, reopen

BASE_RATE = 1e-4  # times a power of two
NETWORKS: dict[str, dict[str, Any]] = {  # by the name in a task
    "2x800": {"conv": False},
    "2x1000": {"conv": False},
    "cnn": {"conv": True},
    "S-1-1": {"mixer": "S/1/1"},
    "M-1-16": {"mixer": "M/1/16"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"dataset": task.dataset, **NETWORKS[task.network]} for name, task in TASKS.items()
} | {task: {"dataset": "MNIST", "n_layers": depth} for task, depth in DEPTHS.items()}
NO_MIXING = {"norm": "layer"}  # in place of BatchNorm, which makes an example's loss depend on its batch
MODES: dict[str, dict[str, Any]] = {  # options, with the powers of the first guesses of the learning rates
    "BP": {"train_mode": "BP", "power": 2},
    "FDFA": {"train_mode": "FDFA", "power": 2},
    "DKP": {"train_mode": "DKP", "power": 2},
    "DFA": {"train_mode": "DFA", "power": 2},
    "L-BP": {"train_mode": "L-BP", "power": 2, "feedback_power": 3},
    "LG-BP": {"train_mode": "LG-BP", "power": 2, "feedback_power": 3},
    "LG-FG-A": {"train_mode": "LG-FG-A", "power": 2, "feedback_power": 3},
    "FG-GUIDED": {"train_mode": "FG-GUIDED", "power": 2, "feedback_power": 3},
    "FG-CV": {"train_mode": "FG-CV", "power": 1},
    "FG-A": {"train_mode": "FG-A", "power": 3},
    "FG": {"train_mode": "FG", "power": 0},
    "FG-RANK1": {"train_mode": "FG-RANK1", "power": 0},
    "FG-A, whole batch": {"train_mode": "FG-A", "weights": "batch", "power": 1},
    "FG-CV, alpha 0.1": {"train_mode": "FG-CV", "alpha": 0.1, "power": 3},
    "FG-CV, alpha to 0": {"train_mode": "FG-CV", "alpha_decay": 0.5, "power": 3},
    "BP, LayerNorm": {"train_mode": "BP", **NO_MIXING, "power": 2},
    "FG-A, LayerNorm": {"train_mode": "FG-A", **NO_MIXING, "power": 0},
    "FG-CV, LayerNorm": {"train_mode": "FG-CV", **NO_MIXING, "power": 1},
    "LG-FG-A, 16 groups": {"train_mode": "LG-FG-A", "num_groups": 16, "power": 2, "feedback_power": 3},
}


class Length(NamedTuple):
    """How long each mode of a task trains, and which modes."""

    epochs: int
    tuning_steps: int
    seeds: tuple[int, ...]
    modes: tuple[str, ...]


class Settings(NamedTuple):
    """Length of the study: of the trainings of each task, and of the timing."""

    tasks: dict[str, Length]
    seconds: float
    """Of timing, for each network."""
    num_rounds: int
    """At least, of timing."""
    num_held_out: int = 10_000
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    """The first one tunes. All of them choose between the rate that it found and half of that."""


SEEDS = tuple(range(1, 11))
FULL = Settings(
    {
        name: Length(3, 200, SEEDS, task.modes) if task.network == "cnn" else Length(10, 800, SEEDS, task.modes)
        for name, task in TASKS.items()
    }
    | {task: Length(2, 400, SEEDS[:5], DEPTH_MODES) for task in DEPTHS},
    seconds=60,
    num_rounds=15,
)
SHORT = Settings(
    {
        "MNIST-2x800": Length(1, 100, (1, 2), (*MAIN_MODES, "FG-A, LayerNorm")),
        "KMNIST-2x800": Length(1, 100, (1, 2), LOCAL_MODES),
        "FashionMNIST-2x800": Length(1, 100, (1, 2), LOCAL_MODES),
        "MNIST-cnn": Length(1, 30, (1,), LOCAL_MODES),
        "MNIST-M-1-16": Length(1, 100, (1, 2), MIXER_MODES),
        **{task: Length(1, 50, (1,), DEPTH_MODES) for task in DEPTHS},
    },
    seconds=8,
    num_rounds=6,
)
PARTS = (
    *FULL.tasks,
    *(Path(feedback_file(task, mode)).stem for task, length in FULL.tasks.items() for mode in length.modes),
    Path(STEPS).stem,
)


def measure(settings: Settings, folder: Path, parts: Sequence[str] = PARTS) -> None:
    """Train the modes that ``parts`` name, and time the steps if they name these."""
    jobs = [
        (task, mode)
        for task, length in settings.tasks.items()
        for mode in length.modes
        if task in parts or Path(feedback_file(task, mode)).stem in parts
    ]
    for task, mode in tqdm(jobs, desc="feedback", unit="mode", disable=not jobs):
        measure_mode(settings, folder, task, mode)
    if Path(STEPS).stem in parts:
        measure_steps(settings, folder)


def measure_mode(settings: Settings, folder: Path, task: str, mode: str) -> dict[str, Any]:
    """Tune and train one mode of a task, and return everything that its file then holds.

    Returns:
        ``task``, ``mode``, ``settings``, ``source``, ``environment``, and ``runs``: for each training the powers of its
        learning rates, seed, purpose (``"tuning"`` or ``"measured"``), status, and the series of the run.
    """
    length, options = settings.tasks[task], dict(MODES[mode])
    start, feedback_start = options.pop("power"), options.pop("feedback_power", 0)
    given = TrainerSettings(**OPTIONS[task], **options, epochs=length.epochs)
    whole = experiment.load(given, runtime.resolve_device("cpu"))
    described = {name: value for name, value in asdict(given).items() if name not in (*experiment.PASSING, "lr")}
    described |= {"tuning_steps": length.tuning_steps, "num_held_out": settings.num_held_out}
    file = folder / FEEDBACK / feedback_file(task, mode)
    found = reopen(file, described, task=task, mode=mode, runs=[]) | {"source": whole.source._asdict()}

    def run(power: int, feedback_power: int, seed: int, purpose: str) -> dict[str, Any]:
        key = {"power": power, "feedback_power": feedback_power, "seed": seed, "purpose": purpose}
        num_held_out = settings.num_held_out if purpose == "tuning" else 0
        return once(found, file, key, lambda: _train(given, whole, length, key, num_held_out))

    def cost(power: int, feedback_power: int, seed: int = settings.tuning_seeds[0]) -> tuple[float, ...]:
        done = run(power, feedback_power, seed, "tuning")
        return (1,) if done["status"] == "diverged" else (0, done["test_errors"][-1], done["test_loss"][-1])

    def worst(power: int) -> tuple[float, ...]:
        return max(cost(power, feedback_power, seed) for seed in settings.tuning_seeds)

    feedback_power = feedback_start
    power = climb(lambda power: cost(power, feedback_start), start)
    if LEARNS[mode]:
        feedback_power = climb(lambda feedback_power: cost(power, feedback_power), feedback_start)
    power = min(power, power - 1, key=worst)  # one seed finds rates that are too near the edge for others
    found["chosen"] = {"power": power, "feedback_power": feedback_power}
    for seed in length.seeds:
        run(power, feedback_power, seed, "measured")
    return found


def _train(
    given: TrainerSettings, whole: Dataset, length: Length, key: dict[str, Any], num_held_out: int
) -> dict[str, Any]:
    # With held-out images it is a training for tuning, without any it is one that counts.
    rates = {"lr": BASE_RATE * 2 ** key["power"], "b_lr": BASE_RATE * 2 ** key["feedback_power"]}
    given = TrainerSettings(**(asdict(given) | rates | {"seed": key["seed"]}))
    data = held_out(whole, num_held_out) if num_held_out else whole
    steps = len(data.train_targets) // given.batch_size
    history = experiment.fit(
        given,
        data,
        max_iterations=length.tuning_steps if num_held_out else steps * length.epochs,
        evaluate_every=min(steps, length.tuning_steps) if num_held_out else steps,
        progress=f"{given.name}, {key['purpose']}, lr {given.lr:g}, b-lr {given.b_lr:g}",
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


def measure_steps(settings: Settings, folder: Path) -> dict[str, Any]:
    """Time a training step of each mode as ``train()`` takes it, and save the times. The modes take turns.

    The feedback rules replay what they have recorded, as in ``python -m fwdlib train``. For a fair comparison FDFA is
    also timed without recording, and backprop with it.

    Returns:
        ``seconds``: net -> mode -> seconds per step, one number a round; ``environment``.
    """
    found: dict[str, Any] = {"environment": runtime.environment(), "seconds": {}}
    check_own(folder / FEEDBACK, [STEPS], STEPS, found)
    for task in ("MNIST-2x800", "MNIST-cnn"):
        steps = {}
        for mode in MAIN_MODES:
            options = OPTIONS[task] | {"train_mode": MODES[mode]["train_mode"], "lr": 1e-9, "b_lr": 1e-9}
            given = TrainerSettings(**options)
            steps[mode] = _step(given)
            if mode == "BP":
                steps[RECORDED] = _step(given, recorded=True)
                steps[PLAIN] = _plain_step(given)
            if mode == "FDFA":
                steps["FDFA, not recorded"] = _step(given, recorded=False)
        for step in steps.values():
            step()
        found["seconds"][task] = interleave(
            steps, seconds=settings.seconds, min_rounds=settings.num_rounds, block_seconds=0.1
        )
    write_json(folder / FEEDBACK / STEPS, found)
    return found


def _step(given: TrainerSettings, recorded: bool | None = None) -> Callable[[], object]:
    inputs, targets, data = _batch(given)
    build = experiment.network(given, data)
    model = initialise(build, 0)
    estimate = experiment.estimator(given, build, data, 1)
    if recorded is not None and given.train_mode == "BP":
        estimate = _recorded_backprop()
    elif recorded is not None:
        estimate.recorded = recorded
    params, objective = params_of(model), BatchLoss(model, inputs, targets)
    optimizer = experiment.optimizer(given.optimizer, given.lr, 0.0)(list(params.values()))

    def step() -> None:
        grads = estimate(objective, params).grads
        for name, p in params.items():
            p.grad = grads[name]
        optimizer.step()

    return step


def _plain_step(given: TrainerSettings) -> Callable[[], object]:
    # Backprop as everyone writes it.
    inputs, targets, data = _batch(given)
    model = initialise(experiment.network(given, data), 0)
    optimizer = experiment.optimizer(given.optimizer, given.lr, 0.0)(list(model.parameters()))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def _batch(given: TrainerSettings) -> tuple[Tensor, Tensor, Dataset]:
    draw = runtime.generator(0, purpose="benchmark")
    inputs = torch.randn(given.batch_size, 1, 28, 28, generator=draw)
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


if __name__ == "__main__":
    main(measure, FULL, SHORT, PARTS)
