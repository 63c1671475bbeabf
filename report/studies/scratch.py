"""Backprop from scratch: its agreement with PyTorch, and why a published framework learned so much more slowly.

The study repeats what the predecessors published, a small net on the disc set, and takes the two things in which
their framework differed from PyTorch one at a time. What a training gave is kept in one file, run by run, and what is
there is not done again; so it can be interrupted.

    python -m report.studies.scratch            # everything
    python -m report.studies.scratch steps      # or one of agreement, training, steps
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.measuring import interleave
from fwdlib.checks import check_choice
from fwdlib.data import load_disc
from fwdlib.methods import tinynet, tinynet_figures
from fwdlib.results import write_json
from fwdlib.statistics import Interval, median_interval, paired_ratio, t_interval
from report.studies.common import RESULTS, either, reopen

FILE = RESULTS / "scratch.json"

# The predecessors' protocol, as their test.py has it: one-hot targets, batches in the same order in every epoch.
SIZES = (2, 25, 25, 25, 2)
NUM_POINTS = 1000  # of each of training, validation and test
BATCH_SIZE = 50
LEARNING_RATE = 0.001
NUM_EPOCHS = 1001
GOAL = 0.95  # of the validation points right
SEEDS = list(range(1, either(11, 3)))

# What they published: mean and standard deviation over ten runs, table 1 of their report.
PUBLISHED = {
    "tinynet": {"accuracy": (0.9699, 0.0093), "seconds": (13.16, 0.75)},
    "PyTorch": {"accuracy": (0.9717, 0.0072), "seconds": (12.87, 0.92)},
}
NUM_PUBLISHED = 10

AGREEMENT_STEPS = 1000
OPTIMIZERS = {"PyTorch": {}, "PyTorch, foreach": {"foreach": True}, "PyTorch, fused": {"fused": True}}
PARTS = ("agreement", "training", "steps")


class Cell(NamedTuple):
    """How the predecessors' framework and PyTorch differed: both ways of each difference."""

    name: str
    divided: bool  # by the batch size, in the backward pass of each linear layer, though the loss sums
    xavier: bool  # normal weights with gain sqrt 2 and no biases, in place of PyTorch's default

    @property
    def learning_rate(self) -> float:
        """What PyTorch's learning rate has to be for the same steps."""
        return LEARNING_RATE / BATCH_SIZE if self.divided else LEARNING_RATE


CELLS = {
    cell.name: cell
    for cell in (
        Cell("as PyTorch", divided=False, xavier=False),
        Cell("Xavier", divided=False, xavier=True),
        Cell("divided", divided=True, xavier=False),
        Cell("divided, Xavier", divided=True, xavier=True),
    )
}
THEIRS = {"tinynet": "divided, Xavier", "PyTorch": "as PyTorch"}  # which of them they compared
TRAININGS = [
    *(("tinynet", name) for name in CELLS),
    *(("PyTorch", name) for name in THEIRS.values()),
]


class DividingLinear(tinynet.Linear):
    """The predecessors' linear layer: its own gradients are means over the batch, what it passes on is not."""

    def backward(self, grad: Tensor) -> Tensor:
        """Add the gradients of weight and bias, divided by the batch size, and return that of the inputs.

        Args:
            grad: of the outputs.
        """
        return super().backward(grad / len(grad)) * len(grad)


# --- measuring -------------------------------------------------------------------------------------------------------


def build(seed: int, cell: Cell = CELLS["as PyTorch"], activation: str = "ReLU", **options: Any) -> tinynet.Sequential:
    """Return the predecessors' net with the initial parameters of a seed.

    Args:
        seed: of the parameters.
        cell: which linear layer, and which initial parameters.
        activation: the name of one of tinynet's.
        options: for the linear layers.
    """
    draw = runtime.generator(seed, purpose="parameters")
    linear = DividingLinear if cell.divided else tinynet.Linear
    layers: list[tinynet.Module] = []
    for inside, outside in itertools.pairwise(SIZES):
        layers += [linear(inside, outside, generator=draw, **options), getattr(tinynet, activation)()]
    net = tinynet.Sequential(*layers[:-1])
    if cell.xavier:
        tinynet.xavier_normal_(net, math.sqrt(2), draw)
    return net


def twin_of(net: tinynet.Sequential) -> nn.Sequential:
    """Return the same net in PyTorch."""
    layers = []
    for layer in net.layers:
        if isinstance(layer, tinynet.Linear):
            outside, inside = layer.params["weight"].shape
            layers.append(nn.Linear(inside, outside, dtype=layer.params["weight"].dtype))
        else:
            layers.append(getattr(nn, type(layer).__name__)())
    twin = nn.Sequential(*layers)
    twin.load_state_dict(net.params)
    return twin


Step = Callable[[Tensor, Tensor], object]


def tinynet_step(
    net: tinynet.Sequential, lr: float, loss: str = "MSELoss", reduction: str = "sum", momentum: float = 0.0
) -> Step:
    """Return a training step of our own.

    Args:
        net: that it trains.
        lr: the learning rate.
        loss: the name of a loss.
        reduction: of the loss.
        momentum: of SGD.
    """
    criterion, optimizer = getattr(tinynet, loss)(reduction), tinynet.SGD(net, lr, momentum)

    def step(inputs: Tensor, targets: Tensor) -> None:
        net.zero_grad()
        criterion(net(inputs), targets)
        net.backward(criterion.backward())
        optimizer.step()

    return step


def torch_step(
    net: nn.Module, lr: float, loss: str = "MSELoss", reduction: str = "sum", momentum: float = 0.0, **options: Any
) -> Step:
    """Return the same step in PyTorch, as its documentation writes it.

    Args:
        net: that it trains.
        lr: the learning rate.
        loss: the name of a loss.
        reduction: of the loss.
        momentum: of SGD.
        options: of ``torch.optim.SGD``: which of its implementations.
    """
    criterion = getattr(nn, loss)(reduction=reduction)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum, **options)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        criterion(net(inputs), targets).backward()
        optimizer.step()

    return step


def train(framework: str, cell: Cell, seed: int, num_epochs: int = NUM_EPOCHS) -> dict[str, Any]:
    """Train the net by one framework, as the predecessors did.

    Args:
        framework: ``"tinynet"`` or ``"PyTorch"``.
        cell: the differences to take over.
        seed: of points and parameters.
        num_epochs: how many.

    Returns:
        ``arrival``: the first epoch after which the goal was met, infinite if none; ``test_errors`` at the end; and
        ``epochs`` with the ``loss`` and ``errors`` of the validation set after them.
    """
    data = load_disc(num_train=NUM_POINTS, num_test=2 * NUM_POINTS, seed=seed)
    targets = F.one_hot(data.train_targets, 2).float()
    batches = list(zip(data.train_inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True))
    inputs, labels = data.test_inputs, data.test_targets  # half for validation, half for the test
    net: Any = build(seed, cell)
    if framework == "tinynet":
        step = tinynet_step(net, LEARNING_RATE)
    else:
        net = twin_of(net)
        step = torch_step(net, cell.learning_rate)
    shown, found = set(epochs_shown(num_epochs)), {"arrival": math.inf, "epochs": [], "loss": [], "errors": []}
    for epoch in range(1, num_epochs + 1):
        for batch in batches:
            step(*batch)
        with torch.no_grad():
            outputs = net(inputs)
        validation, test = (outputs.argmax(1) != labels).split(NUM_POINTS)
        errors = int(validation.sum())
        if errors <= (1 - GOAL) * NUM_POINTS:
            found["arrival"] = min(found["arrival"], epoch)
        if epoch in shown:
            loss = (outputs - F.one_hot(labels, 2))[:NUM_POINTS].square().sum()
            for name, value in (("epochs", epoch), ("loss", loss.item()), ("errors", errors)):
                found[name].append(value)
    return found | {"test_errors": int(test.sum())}


def epochs_shown(num_epochs: int) -> list[int]:
    """Return after which epochs a training is looked at: about 20 a decade, the first and the last."""
    return sorted(set(np.geomspace(1, num_epochs, 1 + round(20 * math.log10(num_epochs))).round().astype(int).tolist()))


def agreement(activation: str, loss: str, reduction: str, momentum: float) -> float:
    """Return by how much any parameter differs from PyTorch's after the same steps, in float64.

    Args:
        activation: the name of one.
        loss: the name of one.
        reduction: of the loss.
        momentum: of SGD.
    """
    net = build(0, activation=activation, dtype=torch.float64)
    twin = twin_of(net)
    lr = (0.1 if reduction == "mean" else LEARNING_RATE) * (1 - momentum)
    own, theirs = tinynet_step(net, lr, loss, reduction, momentum), torch_step(twin, lr, loss, reduction, momentum)
    data = load_disc(num_train=NUM_POINTS)
    inputs, targets = data.train_inputs.double(), data.train_targets
    if loss == "MSELoss":
        targets = F.one_hot(targets, 2).double()
    batches = list(zip(inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True))
    for batch in itertools.islice(itertools.cycle(batches), AGREEMENT_STEPS):
        own(*batch)
        theirs(*batch)
    return max((net.params[name] - p).abs().max().item() for name, p in twin.named_parameters())


def gradient_ratios() -> list[float]:
    """Return for each parameter PyTorch's gradient over that of the dividing layers, its least and largest component.

    Same weights, same batch, summed loss, float64. Components that are zero in both are left out.
    """
    net = build(0, CELLS["divided"], dtype=torch.float64)
    twin, data, criterion = twin_of(net), load_disc(num_train=BATCH_SIZE), tinynet.MSELoss("sum")
    inputs, targets = data.train_inputs.double(), F.one_hot(data.train_targets, 2).double()
    criterion(net(inputs), targets)
    net.backward(criterion.backward())
    nn.MSELoss(reduction="sum")(twin(inputs), targets).backward()
    ratios = torch.cat([(p.grad / net.grads[name]).flatten() for name, p in twin.named_parameters()])
    ratios = ratios[~ratios.isnan()]
    return [ratios.min().item(), ratios.max().item()]


def derivative_errors() -> dict[str, list[float]]:
    """Return by how much the predecessors' derivatives of Tanh and Sigmoid are off, and ours: activation -> both.

    The largest difference from central ones between -4 and 4, with a gradient of 1 at the outputs.
    """
    x, found = torch.linspace(-4, 4, 161, dtype=torch.float64), {}
    one = torch.ones_like(x)
    theirs = {
        "Tanh": 1 - x.tanh().tanh() ** 2,  # the tanh of what is one already
        "Sigmoid": one.sigmoid() * (1 - one.sigmoid()),  # of the gradient, in place of the activation
    }
    for name, published in theirs.items():
        layer = getattr(tinynet, name)()
        measured = (layer(x + 1e-5) - layer(x - 1e-5)) / 2e-5
        layer(x)
        found[name] = [(slope - measured).abs().max().item() for slope in (published, layer.backward(one))]
    return found


def step_seconds(seconds: float = either(30.0, 5.0)) -> dict[str, list[float]]:
    """Time an epoch of each, taking turns on the same batches, and return the seconds of a step, one number a round.

    Args:
        seconds: to spend.
    """
    data = load_disc(num_train=NUM_POINTS)
    targets = F.one_hot(data.train_targets, 2).float()
    batches = list(zip(data.train_inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True))
    lr = 1e-6  # so that all of them stay where they are
    steps = {"tinynet": tinynet_step(build(0), lr)}
    steps |= {name: torch_step(twin_of(build(0)), lr, **options) for name, options in OPTIMIZERS.items()}

    def epoch(step: Step) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                step(*batch)

        return run

    epochs = {name: epoch(step) for name, step in steps.items()}
    for _ in range(5):
        for run in epochs.values():
            run()
    found = interleave(epochs, seconds=seconds, min_rounds=15, max_rounds=200)
    return {name: [value / len(batches) for value in values] for name, values in found.items()}


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Let torch use so many threads within, and as many as before after that."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(parts: list[str], file: Path = FILE) -> dict[str, Any]:
    """Do what ``file`` does not have yet of ``parts``, and return everything that it then holds.

    Args:
        parts: some of ``PARTS``. Times are taken anew whenever they are asked for.
        file: where it is kept.

    Raises:
        ValueError: if it was made with other settings.
    """
    settings = {
        **{"sizes": list(SIZES), "num_points": NUM_POINTS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE},
        **{"num_epochs": NUM_EPOCHS, "goal": GOAL, "agreement_steps": AGREEMENT_STEPS},
    }
    found = reopen(file, settings) | {"source": load_disc().source._asdict()}
    jobs = [job for part in parts for job in _jobs(part)]
    done = [run["key"] for run in found.setdefault("runs", [])]
    for key in tqdm(jobs, desc="scratch", unit="run"):
        if list(key) in done:
            continue
        with use_threads(1):
            found["runs"].append({"key": list(key), **_run(*key)})
        write_json(file, found)
    if "steps" in parts:
        found["steps"] = {}
        for number in sorted({1, torch.get_num_threads()}):
            with use_threads(number):
                found["steps"][str(number)] = step_seconds()
        write_json(file, found)
    return json.loads(file.read_text())


def _jobs(part: str) -> list[tuple]:
    if part == "agreement":
        activations, losses = ("ReLU", "Tanh", "Sigmoid"), ("MSELoss", "CrossEntropyLoss")
        cases = itertools.product(activations, losses, tinynet.REDUCTIONS, (0.0, 0.9))
        return [("ratio",), ("derivatives",), *(("agreement", *case) for case in cases)]
    if part == "training":
        return [("training", *training, seed) for seed in SEEDS for training in TRAININGS]
    return []


def _run(what: str, *options: Any) -> dict[str, Any]:
    if what == "agreement":
        return {"difference": agreement(*options)}
    if what == "ratio":
        return {"ratios": gradient_ratios()}
    if what == "derivatives":
        return {"errors": derivative_errors()}
    framework, name, seed = options
    return train(framework, CELLS[name], seed)


# --- what the page prints --------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None where nothing was.

    Args:
        folder: of the results.
    """
    file = folder / FILE.name
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where no training was measured.

    Args:
        found: as :func:`load` returns it.
    """
    trainings = _trainings(found)
    if not trainings:
        return None
    rows = {key: _row(runs) for key, runs in trainings.items()}
    settings, factors, times = found["settings"], _factors(trainings), _times(found)
    ratio = next((run["ratios"] for run in found["runs"] if run["key"] == ["ratio"]), None)
    return {
        "settings": settings,
        "environment": found["environment"],
        "num_steps": _num_steps(settings),
        "num_seeds": max(row["num_seeds"] for row in rows.values()),
        "cells": {
            name: {"cell": cell, **rows["tinynet", name]} for name, cell in CELLS.items() if ("tinynet", name) in rows
        },
        "factors": factors,
        "goal": f"{100 * settings['goal']:g} %",
        "verdict": _verdict(factors),
        "xavier_helps": factors["xavier_divided"] is not None and factors["xavier_divided"].high < 1,
        "accuracies": [_accuracies(framework, rows) for framework in THEIRS],
        "twins": _twins(trainings),
        "agreement": _agreement(found),
        "derivatives": next((run["errors"] for run in found["runs"] if run["key"] == ["derivatives"]), None),
        "ratio": ratio,
        "ratio_is_batch_size": ratio is not None and all(abs(r / settings["batch_size"] - 1) < 1e-5 for r in ratio),
        "times": times,
        "faster": all(ratio.high < 1 for row in times for ratio in row["ratios"].values()),
        "published_seconds": {name: published["seconds"][0] for name, published in PUBLISHED.items()},
        "published_ratio": PUBLISHED["tinynet"]["seconds"][0] / PUBLISHED["PyTorch"]["seconds"][0],
    }


def _trainings(found: dict[str, Any] | None) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    # (framework, cell) -> seed -> training
    trainings: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for run in found["runs"] if found else []:
        if run["key"][0] == "training":
            _, framework, name, seed = run["key"]
            trainings.setdefault((framework, name), {})[seed] = run | {"arrival": float(run["arrival"])}
    return trainings


def _row(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    arrivals = [run["arrival"] for run in runs.values()]
    return {
        "arrivals": arrivals,
        "arrival": median_interval(arrivals),
        "never": sum(math.isinf(value) for value in arrivals),
        "accuracy": t_interval([100 * (1 - run["test_errors"] / NUM_POINTS) for run in runs.values()]),
        "loss": statistics.median(run["loss"][-1] for run in runs.values()),
        "num_seeds": len(runs),
    }


def _accuracies(framework: str, rows: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    # What was published for one of their frameworks, and what both of ours do with its settings.
    mean, deviation = PUBLISHED[framework]["accuracy"]
    published = normal_interval(100 * mean, 100 * deviation, NUM_PUBLISHED)
    ours = {name: rows[name, THEIRS[framework]] for name in THEIRS if (name, THEIRS[framework]) in rows}
    meets = [row["accuracy"].low <= published.high and published.low <= row["accuracy"].high for row in ours.values()]
    return {
        "framework": framework,
        "settings": THEIRS[framework],
        "published": published,
        "num_published": NUM_PUBLISHED,
        "ours": ours,
        "agrees": all(meets),
    }


def normal_interval(mean: float, deviation: float, number: int) -> Interval:
    """Return Student's 95 % interval of a mean from the standard deviation of single runs.

    Args:
        mean: of the runs.
        deviation: of the runs.
        number: of runs.
    """
    half = float(stats.t.ppf(0.975, number - 1)) * deviation / math.sqrt(number)
    return Interval(mean - half, mean, mean + half)


def _factors(trainings: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> dict[str, Interval | None]:
    # By how much one difference alone prolongs the way to the goal, seed by seed.
    def factor(after: str, before: str) -> Interval | None:
        first, second = (trainings.get(("tinynet", name), {}) for name in (after, before))
        taken = [(first[seed]["arrival"], second[seed]["arrival"]) for seed in sorted(first.keys() & second.keys())]
        ratios = [a / b for a, b in taken if math.isfinite(min(a, b))]  # finite / inf is 0: only one of them arrived
        return median_interval(ratios) if ratios else None

    return {
        "division": factor("divided", "as PyTorch"),
        "division_xavier": factor("divided, Xavier", "Xavier"),
        "xavier": factor("Xavier", "as PyTorch"),
        "xavier_divided": factor("divided, Xavier", "divided"),
        "both": factor("divided, Xavier", "as PyTorch"),
    }


def _verdict(factors: dict[str, Interval | None]) -> str | None:
    # Whether the division alone makes training longer, with either kind of initial parameters; None if not measured.
    division = [factors["division"], factors["division_xavier"]]
    if None in division:
        return None
    return "division" if all(factor.low > 1 for factor in division) else "unclear"


def _agreement(found: dict[str, Any]) -> dict[str, Any] | None:
    differences = [run["difference"] for run in found["runs"] if run["key"][0] == "agreement"]
    if not differences:
        return None
    largest = max(differences)
    return {"number": len(differences), "exponent": math.ceil(math.log10(largest)) if largest else None}


def _twins(trainings: dict[tuple[str, str], dict[int, dict[str, Any]]]) -> dict[str, Any] | None:
    # Trainings by both frameworks from the same parameters over the same batches, in float32.
    differences = [
        abs(run["test_errors"] - trainings["PyTorch", name][seed]["test_errors"])
        for framework, name in trainings
        if framework == "tinynet" and ("PyTorch", name) in trainings
        for seed, run in trainings[framework, name].items()
        if seed in trainings["PyTorch", name]
    ]
    if not differences:
        return None
    return {"same": differences.count(0), "number": len(differences), "largest": max(differences)}


def _times(found: dict[str, Any]) -> list[dict[str, Any]]:
    num_steps = _num_steps(found["settings"])
    return [
        {
            "threads": int(threads),
            "rounds": len(seconds["tinynet"]),
            "own": median_interval([num_steps * value for value in seconds["tinynet"]]),
            "torch": median_interval([num_steps * value for value in seconds["PyTorch"]]),
            "ratios": {name: paired_ratio(seconds["tinynet"], seconds[name]) for name in OPTIMIZERS},
        }
        for threads, seconds in found.get("steps", {}).items()
    ]


def _num_steps(settings: dict[str, Any]) -> int:
    return settings["num_epochs"] * settings["num_points"] // settings["batch_size"]


def figures(found: dict[str, Any] | None) -> dict[str, Figure]:
    """Return the figures of the section by name, none where no training was measured.

    Args:
        found: as :func:`load` returns it.
    """
    trainings = {name: runs for (framework, name), runs in _trainings(found).items() if framework == "tinynet"}
    if not trainings:
        return {}
    curves = {}
    for name, runs in trainings.items():
        epochs = np.array(next(iter(runs.values()))["epochs"])
        steps = found["settings"]["num_points"] // found["settings"]["batch_size"] * epochs
        curves[name] = {"epochs": epochs, "way": CELLS[name].learning_rate * steps}
        curves[name] |= {key: [run[key] for run in runs.values()] for key in ("loss", "errors")}
    arrivals = {name: [run["arrival"] for run in runs.values()] for name, runs in trainings.items()}
    goal = f"{100 * GOAL:g} % of the validation points are right"
    return {
        "scratch-validation": tinynet_figures.plot_validation(curves, NUM_POINTS, "summed squared error"),
        "scratch-arrivals": tinynet_figures.plot_epochs_until(arrivals, found["settings"]["num_epochs"], goal),
    }


def main(words: list[str]) -> None:
    """Measure the parts that ``words`` name, or everything.

    Raises:
        ValueError: if a word is not the name of a part.
    """
    measure([check_choice("part", word, PARTS) for word in words] or list(PARTS))


if __name__ == "__main__":
    runtime.keep_freed_memory()
    main(sys.argv[1:])
