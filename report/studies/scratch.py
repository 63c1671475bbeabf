"""Backprop from scratch: how well it agrees with PyTorch, and why a published framework learned much more slowly.

The published comparison trained a small net on points inside and outside of a disc. The framework differed from PyTorch
in two things. The trainings here repeat the comparison with each difference on and off. All results are in one file,
which is saved after each run, so the study can be interrupted. The times of ``steps`` are always taken again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench.measuring import interleave
from fwdlib.methods import tinynet
from fwdlib.methods.disc import load_disc
from fwdlib.results import write_json
from report.names import CELLS, COMPARED, SCRATCH
from report.studies.common import main, reopen

# The published protocol, from its test.py: one-hot targets, and in every epoch the same batches in the same order.
SIZES = (2, 25, 25, 25, 2)
NUM_POINTS = 1000  # in each of the training, validation and test sets
BATCH_SIZE = 50
LEARNING_RATE = 0.001
GOAL = 0.95  # of the validation points right

OPTIMIZERS = {"PyTorch": {}, "PyTorch, foreach": {"foreach": True}, "PyTorch, fused": {"fused": True}}
TRAININGS = [*(("tinynet", cell) for cell in CELLS), *(("PyTorch", cell) for cell in COMPARED.values())]
PARTS = ("agreement", "training", "steps")
WARM_UPS = 5  # epochs before the timing


class Settings(NamedTuple):
    """Length of the study, by default for the report."""

    seeds: tuple[int, ...] = tuple(range(1, 11))
    """Of the trainings."""
    num_epochs: int = 1001
    """Of a training."""
    agreement_steps: int = 1000
    seconds: float = 30.0
    """Of timing, for each number of threads."""


FULL = Settings()
SHORT = Settings(seeds=(1, 2), seconds=5.0)


def measure(settings: Settings, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Measure what the file in ``folder`` does not hold yet, and take the times again if ``parts`` name ``"steps"``.

    Returns:
        The content of the file: ``settings``, ``environment``, ``source``, ``runs``, each with its ``key``, and
        ``steps``, number of threads -> as :func:`step_seconds` returns it.
    """
    file, kept = folder / SCRATCH, {"num_epochs": settings.num_epochs, "agreement_steps": settings.agreement_steps}
    kept |= {"sizes": SIZES, "num_points": NUM_POINTS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE}
    found = reopen(file, kept | {"goal": GOAL}, runs=[]) | {"source": load_disc().source._asdict()}
    done = [run["key"] for run in found["runs"]]
    for key in tqdm([job for part in parts for job in _jobs(settings, part)], desc="scratch", unit="run"):
        if list(key) not in done:
            with use_threads(1):
                found["runs"].append({"key": list(key), **_run(settings, *key)})
            write_json(file, found)
    if "steps" in parts:
        found["steps"] = {}
        for number in sorted({1, torch.get_num_threads()}):
            with use_threads(number):
                found["steps"][str(number)] = step_seconds(settings.seconds)
        write_json(file, found)
    return found


def _jobs(settings: Settings, part: str) -> list[tuple]:
    if part == "agreement":
        activations, losses = ("ReLU", "Tanh", "Sigmoid"), ("MSELoss", "CrossEntropyLoss")
        cases = itertools.product(activations, losses, tinynet.REDUCTIONS, (0.0, 0.9))
        return [("ratio",), ("derivatives",), *(("agreement", *case) for case in cases)]
    if part == "training":
        return [("training", *training, seed) for seed in settings.seeds for training in TRAININGS]
    return []


def _run(settings: Settings, kind: str, *options: Any) -> dict[str, Any]:
    if kind == "agreement":
        return {"difference": agreement(*options, num_steps=settings.agreement_steps)}
    if kind == "ratio":
        return {"ratios": gradient_ratios()}
    if kind == "derivatives":
        return {"errors": derivative_errors()}
    return train(*options, num_epochs=settings.num_epochs)


class DividingLinear(tinynet.Linear):
    """The published linear layer: its own gradients are means over the batch, but not those that it passes on."""

    def backward(self, grad: Tensor) -> Tensor:
        """Add the gradients of weight and bias, divided by the batch size, and return that of the inputs."""
        return super().backward(grad / len(grad)) * len(grad)


def build(seed: int, cell: str = "as PyTorch", activation: str = "ReLU", **options: Any) -> tinynet.Sequential:
    """Return the published net with the initial parameters of a seed.

    Args:
        seed: of the parameters.
        cell: which linear layer and which initial parameters, one of :data:`report.names.CELLS`.
        activation: name of one of tinynet's.
        options: for the linear layers.
    """
    draw = runtime.generator(seed, purpose="parameters")
    linear = DividingLinear if CELLS[cell].divided else tinynet.Linear
    layers: list[tinynet.Module] = []
    for inside, outside in itertools.pairwise(SIZES):
        layers += [linear(inside, outside, generator=draw, **options), getattr(tinynet, activation)()]
    net = tinynet.Sequential(*layers[:-1])
    if CELLS[cell].xavier:
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
    """Return a training step by tinynet."""
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
    """Return the same step in PyTorch, as its documentation writes it."""
    criterion = getattr(nn, loss)(reduction=reduction)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum, **options)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        criterion(net(inputs), targets).backward()
        optimizer.step()

    return step


def rate_of(cell: str) -> float:
    """Return the learning rate with which PyTorch takes the steps of a cell."""
    return LEARNING_RATE / BATCH_SIZE if CELLS[cell].divided else LEARNING_RATE


def train(framework: str, cell: str, seed: int, num_epochs: int) -> dict[str, Any]:
    """Train the net as the published comparison did.

    Args:
        framework: ``"tinynet"`` or ``"PyTorch"``.
        cell: the differences from PyTorch, one of :data:`report.names.CELLS`.
        seed: of points and parameters.
        num_epochs: how many.

    Returns:
        ``arrival``: the first epoch after which the goal was met, infinite if none; ``test_errors`` at the end; and
        ``epochs``, with the ``loss`` and the ``errors`` on the validation set after each of them.
    """
    data = load_disc(num_train=NUM_POINTS, num_test=2 * NUM_POINTS, seed=seed)
    batches = _batches(data.train_inputs, F.one_hot(data.train_targets, 2).float())
    inputs, labels = data.test_inputs, data.test_targets  # half for validation, half for the test
    net: Any = build(seed, cell)
    if framework == "tinynet":
        step = tinynet_step(net, LEARNING_RATE)
    else:
        net = twin_of(net)
        step = torch_step(net, rate_of(cell))
    recorded, found = set(epochs_recorded(num_epochs)), {"arrival": math.inf, "epochs": [], "loss": [], "errors": []}
    for epoch in range(1, num_epochs + 1):
        for batch in batches:
            step(*batch)
        with torch.no_grad():
            outputs = net(inputs)
        validation, test = (outputs.argmax(1) != labels).split(NUM_POINTS)
        errors = int(validation.sum())
        if errors <= (1 - GOAL) * NUM_POINTS:
            found["arrival"] = min(found["arrival"], epoch)
        if epoch in recorded:
            loss = (outputs - F.one_hot(labels, 2))[:NUM_POINTS].square().sum()
            for name, value in (("epochs", epoch), ("loss", loss.item()), ("errors", errors)):
                found[name].append(value)
    return found | {"test_errors": int(test.sum())}


def epochs_recorded(num_epochs: int) -> list[int]:
    """Return the epochs after which a training is recorded: about 20 in a decade, the first and the last."""
    return sorted(set(np.geomspace(1, num_epochs, 1 + round(20 * math.log10(num_epochs))).round().astype(int).tolist()))


def agreement(activation: str, loss: str, reduction: str, momentum: float, num_steps: int) -> float:
    """Return the largest difference of any parameter from PyTorch's after the same steps, in float64."""
    net = build(0, activation=activation, dtype=torch.float64)
    twin = twin_of(net)
    lr = (0.1 if reduction == "mean" else LEARNING_RATE) * (1 - momentum)
    own, theirs = tinynet_step(net, lr, loss, reduction, momentum), torch_step(twin, lr, loss, reduction, momentum)
    data = load_disc(num_train=NUM_POINTS)
    targets = data.train_targets
    if loss == "MSELoss":
        targets = F.one_hot(targets, 2).double()
    batches = _batches(data.train_inputs.double(), targets)
    for batch in itertools.islice(itertools.cycle(batches), num_steps):
        own(*batch)
        theirs(*batch)
    return max((net.params[name] - p).abs().max().item() for name, p in twin.named_parameters())


def _batches(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True))


def gradient_ratios() -> list[float]:
    """Return PyTorch's gradient over that of the dividing layers, the smallest and the largest ratio of all components.

    Both have the same weights, the same batch and a summed loss, in float64. A component that is zero in both is left
    out.
    """
    net = build(0, "divided", dtype=torch.float64)
    twin, data, criterion = twin_of(net), load_disc(num_train=BATCH_SIZE), tinynet.MSELoss("sum")
    inputs, targets = data.train_inputs.double(), F.one_hot(data.train_targets, 2).double()
    criterion(net(inputs), targets)
    net.backward(criterion.backward())
    nn.MSELoss(reduction="sum")(twin(inputs), targets).backward()
    ratios = torch.cat([(p.grad / net.grads[name]).flatten() for name, p in twin.named_parameters()])
    ratios = ratios[~ratios.isnan()]
    return [ratios.min().item(), ratios.max().item()]


def derivative_errors() -> dict[str, list[float]]:
    """Return the errors of the published derivatives of Tanh and Sigmoid, and of ours: activation -> both.

    An error is the largest difference from central differences between -4 and 4, with a gradient of 1 at the outputs.
    """
    x, found = torch.linspace(-4, 4, 161, dtype=torch.float64), {}
    one = torch.ones_like(x)
    theirs = {
        "Tanh": 1 - x.tanh().tanh() ** 2,  # takes the tanh of the activation
        "Sigmoid": one.sigmoid() * (1 - one.sigmoid()),  # takes the gradient in place of the activation
    }
    for name, published in theirs.items():
        layer = getattr(tinynet, name)()
        measured = (layer(x + 1e-5) - layer(x - 1e-5)) / 2e-5
        layer(x)
        found[name] = [(slope - measured).abs().max().item() for slope in (published, layer.backward(one))]
    return found


def step_seconds(seconds: float) -> dict[str, list[float]]:
    """Time an epoch of each implementation, in turns on the same batches.

    Returns:
        Implementation -> the seconds of a step, a number for each round.
    """
    data = load_disc(num_train=NUM_POINTS)
    batches = _batches(data.train_inputs, F.one_hot(data.train_targets, 2).float())
    lr = 1e-6  # so small that nothing moves
    steps = {"tinynet": tinynet_step(build(0), lr)}
    steps |= {name: torch_step(twin_of(build(0)), lr, **options) for name, options in OPTIMIZERS.items()}

    def epoch(step: Step) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                step(*batch)

        return run

    epochs = {name: epoch(step) for name, step in steps.items()}
    for _ in range(WARM_UPS):
        for run in epochs.values():
            run()
    found = interleave(epochs, seconds=seconds, min_rounds=15, max_rounds=200)
    return {name: [value / len(batches) for value in values] for name, values in found.items()}


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Let torch use so many threads in a block, and its former number after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main(measure, FULL, SHORT, PARTS)
