"""Quality under a budget: the losses that each method reaches in the same processor time, and the memory it needs.

Every method trains the same networks on MNIST from the same starts and batches, in its eager form, at its own learning
rate. Only its steps count against the time, in one thread: neither evaluation nor what else the machine does. The file
keeps every finished training, so the study can be interrupted.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.compared import perceptron
from fwdlib.bench.measuring import STEPS_OF_MEMORY
from fwdlib.bench.memory import peaks_bytes
from fwdlib.bench.rivals import CHECKPOINTS, in_backward, two_point
from fwdlib.data import Dataset
from fwdlib.methods.feedback import ForwardDirectFeedbackAlignment
from fwdlib.models import initialise
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.results import write_json
from fwdlib.stacked.step import SGDStep
from report.grids import diverged
from report.names import BUDGET
from report.studies.common import climb, flat_images, losses_of, main, once, reopen

METHODS = {  # with the power of the first guess of the learning rate
    **dict.fromkeys(("in-backward", "L checkpoints"), 11),
    "rank-one": 2,
    "activity": 6,
    "FDFA": 9,
    "two-point": 2,
}
PARTS = tuple(METHODS)
NETWORKS: dict[str, tuple[int, ...]] = {"MLP": (784, 256, 256, 10), "20 layers": (784, *[256] * 20, 10)}
BASE_RATE = 1e-4  # times a power of two

Step = Callable[[], Tensor]


class Settings(NamedTuple):
    """Length and settings of the trainings.

    The learning rate of a method is half of the one with the lowest training loss after ``tuning_seconds``, from a seed
    of its own, and is halved again until a training of full length from that seed does not diverge, which means that it
    ends below its start. So for every method, because the best rate of a short training may diverge in a longer one.
    """

    seeds: tuple[int, ...] = tuple(range(1, 11))
    seconds: float = 60.0
    tuning_seconds: float = 6.0
    tuning_seed: int = 100
    batch_size: int = 64
    num_evaluations: int = 12
    num_train: int = 2000
    """Training examples on which the training loss is evaluated."""


FULL = Settings()
SHORT = Settings(seeds=(1, 2), seconds=1.0, tuning_seconds=0.3, num_evaluations=4)


def make_step(method: str, model: nn.Module, inputs: Tensor, targets: Tensor, learning_rate: float) -> Step:
    """Return a training step of plain SGD on whatever ``inputs`` and ``targets`` hold at the time.

    Args:
        method: one of :data:`METHODS`.
        model: trained in place.
        inputs: a batch.
        targets: its targets.
        learning_rate: of the weights.
    """
    if method in CHECKPOINTS:
        return in_backward(model, inputs, targets, learning_rate, method)
    if method == "two-point":
        return two_point(model, inputs, targets, learning_rate)
    if method == "FDFA":
        return _feedback(model, inputs, targets, learning_rate)
    return partial(SGDStep(model, learning_rate=learning_rate, tangents=method, compiled=False), inputs, targets)


def _feedback(model: nn.Module, inputs: Tensor, targets: Tensor, learning_rate: float) -> Step:
    rule = ForwardDirectFeedbackAlignment(model, inputs)
    objective = BatchLoss(model, inputs, targets)

    @torch.no_grad()
    def step() -> Tensor:
        params = params_of(model)
        estimate = rule(objective, params)
        for name, p in params.items():
            p.add_(estimate.grads[name], alpha=-learning_rate)
        return estimate.loss

    return step


def measure(settings: Settings, folder: Path, methods: Sequence[str] = PARTS) -> dict[str, Any]:
    """Tune and train with each of ``methods``, and return everything that the file then holds.

    Returns:
        ``settings``, ``environment``; ``memory``, by network and method, the bytes of a step above the parameters;
        ``chosen``, likewise, the power of the learning rate; and ``runs``: for each training its network, method,
        learning rate, seed, purpose (``"tuning"``, ``"check"`` or ``"measured"``), number of steps, and by evaluation
        the ``seconds`` spent in steps, training and test loss, and test accuracy; a training that diverged ends early,
        with nan.
    """
    torch.set_num_threads(1)
    data, file = flat_images("MNIST", 2000), folder / BUDGET
    kept = {name: value for name, value in settings._asdict().items() if name not in ("seeds", "tuning_seed")}
    found = reopen(file, kept | {"networks": NETWORKS, "data": data.source._asdict()}, runs=[], memory={}, chosen={})
    for network in NETWORKS:
        missing = [method for method in methods if method not in found["memory"].get(network, {})]
        if missing:
            peaks = peaks_bytes("report.studies.budget:_steps", {"methods": missing, "network": network})
            found["memory"].setdefault(network, {}).update(zip(missing, peaks, strict=True))
            write_json(file, found)

    def run(network: str, method: str, power: int, seed: int, purpose: str, seconds: float) -> dict[str, Any]:
        key = {"network": network, "method": method, "power": power, "seed": seed, "purpose": purpose}
        return once(found, file, key, lambda: _train(settings, data, network, method, power, seed, seconds))

    for network, method in tqdm(list(itertools.product(NETWORKS, methods)), desc="budget", unit="method"):

        def cost(power: int, network: str = network, method: str = method) -> tuple[float, ...]:
            tuned = run(network, method, power, settings.tuning_seed, "tuning", settings.tuning_seconds)
            return (math.inf if diverged(tuned["train"]) else float(tuned["train"][-1]),)

        power = climb(cost, METHODS[method]) - 1
        while diverged(run(network, method, power, settings.tuning_seed, "check", settings.seconds)["train"]):
            power -= 1
        found["chosen"].setdefault(network, {})[method] = power
        write_json(file, found)
        for seed in settings.seeds:
            run(network, method, power, seed, "measured", settings.seconds)
    return found


def _train(
    settings: Settings, data: Dataset, network: str, method: str, power: int, seed: int, seconds: float
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = initialise(lambda: perceptron(*NETWORKS[network]), seed)
    draw = runtime.generator(seed, purpose="batches")
    inputs, targets = (part[: settings.batch_size].clone() for part in (data.train_inputs, data.train_targets))
    step = make_step(method, model, inputs, targets, BASE_RATE * 2.0**power)
    spent, steps = 0.0, 0
    found: dict[str, list[float]] = {"seconds": [], "train": [], "test": [], "accuracy": []}
    for i in range(settings.num_evaluations + 1):
        while spent < seconds * i / settings.num_evaluations:
            rows = torch.randint(len(data.train_targets), (settings.batch_size,), generator=draw)
            inputs.copy_(data.train_inputs[rows])
            targets.copy_(data.train_targets[rows])
            started = time.process_time()
            step()
            spent += time.process_time() - started
            steps += 1
        losses = losses_of(model, data, settings.num_train)
        for name, value in ({"seconds": spent} | losses).items():
            found[name].append(value)
        if math.isnan(losses["train"]):
            break
    return {"learning_rate": BASE_RATE * 2.0**power, "steps": steps, **found}


def _steps(methods: Sequence[str], network: str) -> list[Callable[[], None]]:
    # For fwdlib.bench.memory: a few steps of each method, which have been taken on a tiny network before.
    def take_steps(method: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        step = make_step(method, model, inputs, targets, 1e-9)
        for _ in range(STEPS_OF_MEMORY):
            step()

    def work(method: str, *widths: int) -> Callable[[], None]:
        return partial(take_steps, method, perceptron(*widths), torch.randn(64, widths[0]), torch.zeros(64).long())

    for method in methods:
        work(method, 4, 8, 8, 2)()
    return [work(method, *NETWORKS[network]) for method in methods]


if __name__ == "__main__":
    main(measure, FULL, SHORT, PARTS)
