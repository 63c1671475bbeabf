"""Frank-Wolfe with forward gradients: convergence, training, and the memory of a step.

The convergence runs take a million steps on problems whose optimum is known. The trainings are logistic regression on
MNIST in l1 balls of several radii; first, each method's learning rate without a constraint is tuned. All results are in
one file, which is saved after each item, so the study can be interrupted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench import memory
from fwdlib.bench.compared import find_task
from fwdlib.bench.measuring import steps_to_measure
from fwdlib.data import Dataset, load_images
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.methods.frank_wolfe import FrankWolfe, frank_wolfe, frank_wolfe_gap, shrink_into
from fwdlib.objectives import BatchLoss, assign_gradients, params_of
from fwdlib.results import write_json
from fwdlib.training import make_optimizer, train
from report.names import FRANK_WOLFE
from report.studies.common import climb, held_out, main, reopen

# Convergence: the distance to a goal, in a ball of radius 1 around zero.
NUM_PARAMS = 20
PLACES = {"near the centre": 0.1, "inside": 0.5, "outside": 2.0}  # the ball's norm of the goal
BALLS = ("l1", "l2", "linf")
FORMS = {  # whether the gradient is exact, and whether it is averaged
    "exact gradient": (True, False),
    "plain": (False, False),
    "averaged": (False, True),
}
FIRST = 100  # the section fits slopes from this step on
RECORDS_PER_DECADE = 4
CHUNK = 1000

# Training
MIDDLE = 100  # the radius of plain Frank-Wolfe, and of the long trainings
MIDDLE_L2 = 30  # the radius of the l2 ball, for comparison
EVALUATIONS = 10
TUNING_SEED = 100
BASE_RATE = 1e-4  # times a power of two, for SGD
ESTIMATORS: dict[str, Estimator] = {
    "backprop": backprop_gradient,
    "forward gradient": partial(forward_gradient, tangents="normal"),
    "activity": partial(forward_gradient, tangents="activity"),
}
FIRST_POWERS = {"backprop": 13, "forward gradient": 5, "activity": 10}  # first guesses of the learning rate of SGD
HOLDS = 0.99  # of the l1 norm

# Memory
MEMORY_ESTIMATORS = {name: ESTIMATORS[name] for name in ("backprop", "forward gradient")}
MEMORY_ESTIMATORS["rank-one"] = forward_gradient
MEMORY_RADIUS = 1e4


class Settings(NamedTuple):
    """Length of the study, by default for the report."""

    num_steps: int = 1_000_000
    """Of a convergence run."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Of the convergence runs."""
    radii: tuple[int, ...] = (10, 30, 100, 300, 1000)
    training_seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    batch_size: int = 256
    iterations: int = 2_000
    long: int = 10_000
    """Iterations of the averaged forward gradient, for which 2,000 are too few."""
    num_held_out: int = 10_000
    memory: tuple[tuple[str, int], ...] = (
        ("mnist-logistic", 256),
        ("mnist-mlp", 256),
        ("20x256", 4096),
        ("paper-cnn", 256),
    )
    """Models and batch sizes."""

    def kept(self) -> dict[str, Any]:
        """Return what the measurements depend on, as the file keeps it."""
        fixed = {"num_params": NUM_PARAMS, "places": PLACES, "first": FIRST, "holds": HOLDS}
        fixed |= {"middle": MIDDLE, "middle_l2": MIDDLE_L2}
        return fixed | {name: value for name, value in self._asdict().items() if name != "memory"}


FULL = Settings()
SHORT = Settings(
    num_steps=100_000,
    radii=(30, 100, 300),
    training_seeds=(1, 2),
    iterations=500,
    long=1_000,
    memory=(("mnist-logistic", 256), ("mnist-mlp", 256)),
)


def measure(settings: Settings, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Measure what the file in ``folder`` does not hold yet.

    Returns:
        The content of the file: ``settings``, ``environment``, ``source``, and for each part its items by name.
    """
    found = reopen(folder / FRANK_WOLFE, settings.kept())
    for part in parts:
        done = found.setdefault(part, {})
        for name, job in tqdm(list(PARTS[part](settings, found)), desc=part, unit="item"):
            if name not in done:
                done[name] = job()
                write_json(folder / FRANK_WOLFE, found)
    return found


# --- convergence -----------------------------------------------------------------------------------------------------


def convergence_jobs(settings: Settings, _: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each convergence run, and the function that makes it."""
    for ball, form in itertools.product(BALLS, FORMS):
        yield f"{ball}, {form}", partial(converge, ball, form, settings.num_steps, settings.seeds)


def converge(ball: str, form: str, num_steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Run Frank-Wolfe for all places and seeds at once.

    A seed draws the direction of the goal and the tangents. All places of a ball share both.

    Returns:
        ``steps``, those that are recorded, and place -> ``gap`` and ``error``, with a list for each seed: the
        Frank-Wolfe gap of the exact gradient, and how far the loss is above its optimum, both relative to the start.
    """
    is_exact, averaged = FORMS[form]
    goals = torch.stack([place_goals(ball, seed) for seed in seeds])  # (seeds, places, P)
    best = distance(project(goals, ball), goals)
    tangents = draw_tangents(seeds, NUM_PARAMS)

    def gradient(x: Tensor) -> Tensor:
        g = x - goals
        if is_exact:
            return g
        v = next(tangents).unsqueeze(1)
        return (g * v).sum(-1, keepdim=True) * v

    def gap_and_error(x: Tensor) -> tuple[Tensor, Tensor]:
        return frank_wolfe_gap(x - goals, x, ball, 1.0), distance(x, goals) - best

    start = torch.zeros_like(goals)
    at_start = gap_and_error(start)
    steps, records = record_steps(num_steps), []
    points = frank_wolfe(gradient, start, ball=ball, radius=1.0, averaged=averaged)
    bar = tqdm(points, desc=f"{ball}, {form}", total=num_steps, leave=False, mininterval=2)
    for k, x in enumerate(bar):
        if k in steps:
            records.append([value / first for value, first in zip(gap_and_error(x), at_start, strict=True)])
        if k == num_steps:
            break
    gap, error = (torch.stack(values, -1).tolist() for values in zip(*records, strict=True))  # (seeds, places, steps)
    return {"steps": steps} | {
        place: {"gap": [row[i] for row in gap], "error": [row[i] for row in error]} for i, place in enumerate(PLACES)
    }


def place_goals(ball: str, seed: int) -> Tensor:
    """Return the goals of a seed, shape (places, P): one direction, at several distances from the centre."""
    drawn = torch.randn(NUM_PARAMS, generator=runtime.generator(seed, purpose="goal"), dtype=torch.float64)
    order = {"l1": 1, "l2": 2, "linf": torch.inf}[ball]
    return torch.tensor(list(PLACES.values()), dtype=torch.float64).outer(
        drawn / torch.linalg.vector_norm(drawn, order)
    )


def distance(x: Tensor, goals: Tensor) -> Tensor:
    """Return the objective, half the squared distance to the goals."""
    return 0.5 * (x - goals).square().sum(-1)


def project(points: Tensor, ball: str) -> Tensor:
    """Return the nearest points of the ball of radius 1, which are the optimum.

    For l1, Duchi et al. 2008: all entries shrink by one threshold, which comes from the sorted entries.
    """
    if ball == "linf":
        return points.clamp(-1, 1)
    if ball == "l2":
        return points / torch.linalg.vector_norm(points, dim=-1, keepdim=True).clamp(min=1)
    sizes = points.abs().sort(-1, descending=True).values
    counts = torch.arange(1, points.shape[-1] + 1)
    thresholds = (sizes.cumsum(-1) - 1) / counts
    return points.sign() * (points.abs() - thresholds.amax(-1, keepdim=True).clamp(min=0)).clamp(min=0)


def draw_tangents(seeds: Sequence[int], num_params: int) -> Iterator[Tensor]:
    """Yield normal tangents, shape (seeds, P), without end, each seed's from its own generator."""
    draws = [runtime.generator(seed) for seed in seeds]
    while True:
        many = [torch.randn(CHUNK, num_params, generator=draw, dtype=torch.float64) for draw in draws]
        yield from torch.stack(many, 1)


def record_steps(num_steps: int) -> list[int]:
    """Return the steps that are recorded: from 10 on, a few in each decade."""
    powers = np.arange(RECORDS_PER_DECADE, round(RECORDS_PER_DECADE * np.log10(num_steps)) + 1) / RECORDS_PER_DECADE
    return sorted({round(10**power) for power in powers})


# --- training --------------------------------------------------------------------------------------------------------


def build() -> nn.Module:
    """Return logistic regression on MNIST that starts at zero, the centre of each ball."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def tuning_jobs(settings: Settings, found: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each method, and the function that tunes its learning rate without a constraint."""
    data = load_images("MNIST")
    found["source"] = data.source._asdict()
    for method in ESTIMATORS:
        yield method, partial(tune, held_out(data, settings.num_held_out), method, settings)


def tune(data: Dataset, method: str, settings: Settings) -> dict[str, Any]:
    """Return the learning rate of plain SGD with the fewest test errors, of those that differ by powers of two."""

    @functools.cache
    def cost(power: int) -> tuple[float, ...]:
        key = {"method": method, "ball": None, "averaged": None, "radius": None}
        key |= {"iterations": settings.iterations, "seed": TUNING_SEED}
        done = fit(data, make_optimizer("SGD", BASE_RATE * 2**power), key, settings.batch_size)
        return (1,) if done["status"] == "diverged" else (0, done["test_errors"][-1])

    return {"learning_rate": BASE_RATE * 2 ** climb(cost, FIRST_POWERS[method])}


def training_jobs(settings: Settings, found: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each training, and the function that makes it."""
    data = load_images("MNIST")
    for seed, planned in itertools.product(settings.training_seeds, plan(settings)):
        key = planned | {"seed": seed}
        if key["averaged"] is None:
            optimizer = make_optimizer("SGD", found["tuning"][key["method"]]["learning_rate"])
        else:
            options = {"ball": key["ball"], "radius": float(key["radius"]), "averaged": key["averaged"]}
            optimizer = partial(FrankWolfe, **options)
        yield name_of(key), partial(fit, data, optimizer, key, settings.batch_size)


def plan(settings: Settings) -> list[dict[str, Any]]:
    """Return the trainings of each seed. ``averaged``, ball and radius are None for SGD without a constraint."""
    forms = [(None, None, None), ("l1", False, MIDDLE), *(("l1", True, radius) for radius in settings.radii)]
    runs = [(method, *form, settings.iterations) for form in forms for method in ESTIMATORS]
    runs += [("forward gradient", "l1", True, MIDDLE, settings.long)]
    runs += [(method, "l2", True, MIDDLE_L2, settings.iterations) for method in ("backprop", "forward gradient")]
    return [dict(zip(("method", "ball", "averaged", "radius", "iterations"), run, strict=True)) for run in runs]


def name_of(key: dict[str, Any]) -> str:
    """Return the name under which the file keeps a training."""
    form = {None: "SGD", False: "plain", True: "averaged"}[key["averaged"]]
    ball = "l2, " if key["ball"] == "l2" else ""
    return f"{key['method']}, {form}, {ball}radius {key['radius']}, {key['iterations']} steps, seed {key['seed']}"


def fit(data: Dataset, optimizer: Callable, key: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Train once.

    Args:
        data: with the test set to count errors on.
        optimizer: as :func:`fwdlib.training.train` takes it.
        key: what distinguishes this training; see :func:`plan`.
        batch_size: examples in a step.

    Returns:
        ``key``, the test errors over the steps, and for the weights and biases at the end: the share that is not zero,
        the share that holds ``HOLDS`` of the l1 norm, the largest first, and this norm.
    """
    iterations = key["iterations"]
    history = train(
        build,
        data,
        ESTIMATORS[key["method"]],
        optimizer=optimizer,
        max_iterations=iterations,
        batch_size=batch_size,
        evaluate_every=iterations // EVALUATIONS,
        test_batch_size=10_000,
        seeds=[key["seed"]],
        progress=name_of(key),
        progress_every=50,
    )
    (run,) = history.runs
    sizes = torch.cat([p.flatten() for p in history.params[0].values()]).abs().sort(descending=True).values.double()
    held = sizes.cumsum(0) < HOLDS * sizes.sum()
    return key | {
        "status": run.status,
        "steps": [i * run.every for i in range(len(run.test_errors))],
        "train_loss": run.train_loss,
        "test_errors": run.test_errors,
        "num_test": history.num_test,
        "nonzero": (sizes > 0).double().mean().item(),
        "holding": (held.sum().item() + 1) / len(sizes),
        "norm": sizes.sum().item(),
    }


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_jobs(settings: Settings, _: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield model, estimator and form of each step, and the function that measures its memory in a new process."""
    for (model, batch), method, form in itertools.product(
        settings.memory, MEMORY_ESTIMATORS, ("SGD", "plain", "averaged")
    ):
        yield f"{model}, {method}, {form}", partial(memory_of, model, batch, method, form)


def memory_of(model: str, batch: int, method: str, form: str) -> dict[str, Any]:
    """Return the bytes that a step needs at its peak, beyond model and batch, as the benchmark measures them.

    Raises:
        RuntimeError: if the process that measures fails.
    """
    arguments = {"model": model, "batch": batch, "method": method, "form": form}
    try:
        num_bytes = memory.peak_bytes("report.studies.frank_wolfe:steps_of", arguments)
    except RuntimeError as error:
        raise RuntimeError(f"memory of {model}, batch {batch}, {method}, {form}: {error}") from error
    return {"model": model, "title": find_task(model).title, **arguments, "bytes": num_bytes}


def steps_of(model: str, batch: int, method: str, form: str) -> Callable[[], None]:
    """Return a few steps on a model, ready to be measured."""
    return steps_to_measure(partial(_make_step, method, form), model, batch=batch)


def _make_step(method: str, form: str, net: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    if form == "SGD":
        optimizer = torch.optim.SGD(net.parameters(), 1e-9)
    else:
        params = shrink_into(net.parameters(), "l1", MEMORY_RADIUS)
        optimizer = FrankWolfe(params, ball="l1", radius=MEMORY_RADIUS, averaged=form == "averaged")

    def step() -> None:
        optimizer.zero_grad()
        assign_gradients(net, MEMORY_ESTIMATORS[method](BatchLoss(net, inputs, targets), params_of(net)).grads)
        optimizer.step()

    return step


PARTS = {"memory": memory_jobs, "tuning": tuning_jobs, "training": training_jobs, "convergence": convergence_jobs}

if __name__ == "__main__":
    main(measure, FULL, SHORT, PARTS)
