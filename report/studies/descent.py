"""Time to a given loss: how many steps each method takes to a loss of 0.5 on MNIST, at its own learning rate.

This study counts steps; ``python -m fwdlib bench`` says how long a step takes. So the comparison does not depend on
what else the machine did during the hour of the trainings. The file keeps every finished training, so the study can be
interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from tqdm import tqdm

from fwdlib.data import Dataset, load_images
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.training import train
from report.names import DESCENT, LEARNED
from report.studies.common import climb, main, once, reopen

METHODS: dict[str, tuple[Estimator, int]] = {  # with the power of the first guess of the learning rate
    "backprop": (backprop_gradient, 11),
    "rank-one": (forward_gradient, 2),
    "rank-one, K = 16": (partial(forward_gradient, num_tangents=16), 5),
    "per-example": (partial(forward_gradient, tangents="per-example"), 3),
    "activity": (partial(forward_gradient, tangents="activity"), 6),
}
PARTS = tuple(METHODS)
MODEL = "784-1024-1024-10"
BASE_RATE = 1e-4  # times a power of two


class Settings(NamedTuple):
    """Length and settings of the trainings.

    The learning rate of a method is half of the one with the lowest loss after ``tuning_iterations`` steps from a seed
    of its own. Half, for every method, because the best rate of such a short training diverges in a longer one.
    """

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    max_iterations: int = 20_000
    tuning_iterations: int = 3_000
    tuning_seed: int = 100
    threshold: float = LEARNED
    batch_size: int = 64
    evaluate_every: int = 20


FULL = Settings()
SHORT = Settings(seeds=(1,), max_iterations=2_000, tuning_iterations=200)


def build() -> nn.Module:
    """Return the multilayer network of the bench."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def measure(settings: Settings, folder: Path, methods: Sequence[str] = PARTS) -> dict[str, Any]:
    """Tune and train with each of ``methods``, and return everything that the file then holds.

    Returns:
        ``settings``, ``environment``, and ``runs``: for each training its method, learning rate, seed, purpose
        (``"tuning"`` or ``"measured"``), status, number of iterations, and training losses: the mean over each
        ``evaluate_every`` batches.
    """
    data, file = load_images("MNIST", num_test=200), folder / DESCENT
    kept = {name: value for name, value in settings._asdict().items() if name not in ("seeds", "tuning_seed")}
    found = reopen(file, kept | {"model": MODEL, "data": data.source._asdict()}, runs=[])

    def run(method: str, power: int, seed: int, purpose: str, max_iterations: int) -> dict[str, Any]:
        key = {"method": method, "power": power, "seed": seed, "purpose": purpose}
        return once(found, file, key, lambda: _train(settings, data, method, power, seed, max_iterations))

    for method in tqdm(methods, desc="descent", unit="method"):
        power = tune(partial(run, method), METHODS[method][1], settings) - 1
        for seed in settings.seeds:
            run(method, power, seed, "measured", settings.max_iterations)
    return found


def _train(
    settings: Settings, data: Dataset, method: str, power: int, seed: int, max_iterations: int
) -> dict[str, Any]:
    learning_rate = BASE_RATE * 2**power
    history = train(
        build,
        data,
        METHODS[method][0],
        learning_rate=learning_rate,
        threshold=settings.threshold,
        max_iterations=max_iterations,
        batch_size=settings.batch_size,
        evaluate_every=settings.evaluate_every,
        seeds=[seed],
        progress=f"{method}, learning rate {learning_rate:g}, seed {seed}",
    )
    (run,) = history.runs
    return {
        "learning_rate": learning_rate,
        "status": run.status,
        "iterations": run.iterations,
        "train_loss": run.train_loss,
    }


def tune(run: Callable[..., dict[str, Any]], power: int, settings: Settings) -> int:
    """Return the power of the best learning rate, found by walking from ``power`` while the result improves."""

    def cost(power: int) -> tuple[float, float]:
        done = run(power, settings.tuning_seed, "tuning", settings.tuning_iterations)
        if done["status"] == "reached":
            return (0, done["iterations"])
        return (1, float("inf") if done["status"] == "diverged" else done["train_loss"][-1])

    return climb(cost, power)


if __name__ == "__main__":
    main(measure, FULL, SHORT, PARTS)
