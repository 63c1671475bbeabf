"""Time to a given loss: how far each method is from 0.5 on MNIST, with its own learning rate.

Steps are counted here, and last as long as ``python -m fwdlib bench`` says: so the comparison does not depend on what
else this machine did in the hour that this takes. Every finished training is kept, so it can be interrupted.

    python -m report.studies.descent            # all methods
    python -m report.studies.descent backprop   # some
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.checks import check_choice
from fwdlib.data import load_images
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.results import write_json
from fwdlib.training import train
from report.studies.common import RESULTS, climb, either, reopen

FILE = RESULTS / "descent.json"
THRESHOLD = 0.5
BATCH_SIZE = 64
MAX_ITERATIONS = either(20_000, 2_000)
EVALUATE_EVERY = 20
SEEDS = either([1, 2, 3, 4, 5], [1])

# Learning rates are tuned on one grid, 1e-4 times a power of two: half of the one with the lowest loss after
# TUNING_ITERATIONS with a seed of its own, uphill from a first guess until it gets worse. Half, for every method,
# because the best on such a short way diverges on a longer one.
TUNING_SEED = 100
TUNING_ITERATIONS = either(3_000, 200)

METHODS: dict[str, tuple[Estimator, int]] = {  # with the power of the first guess
    "backprop": (backprop_gradient, 11),
    "rank-one": (forward_gradient, 2),
    "rank-one, K = 16": (partial(forward_gradient, num_tangents=16), 5),
    "per-example": (partial(forward_gradient, tangents="per-example"), 3),
    "activity": (partial(forward_gradient, tangents="activity"), 6),
}


def build() -> nn.Module:
    """Return the multilayer network of the bench."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def measure(methods: list[str], file: Path = FILE) -> dict[str, Any]:
    """Tune and train with each of ``methods``, and return everything that ``file`` then holds.

    Returns:
        ``settings``, ``environment``, and ``runs``: for each training its method, learning rate, seed, purpose
        (``"tuning"`` or ``"measured"``), status, number of iterations and training losses, the mean over each
        ``EVALUATE_EVERY`` batches.

    Raises:
        ValueError: if ``file`` holds trainings with other settings.
    """
    data = load_images("MNIST", num_test=200)
    settings = {
        "model": "784-1024-1024-10",
        "threshold": THRESHOLD,
        "batch_size": BATCH_SIZE,
        "max_iterations": MAX_ITERATIONS,
        "tuning_iterations": TUNING_ITERATIONS,
        "evaluate_every": EVALUATE_EVERY,
        "data": data.source._asdict(),
    }
    found = reopen(file, settings, runs=[])

    def run(method: str, power: int, seed: int, purpose: str, max_iterations: int) -> dict[str, Any]:
        key = {"method": method, "power": power, "seed": seed, "purpose": purpose}
        learning_rate = 1e-4 * 2**power
        for done in found["runs"]:
            if key.items() <= done.items():
                return done
        history = train(
            build,
            data,
            METHODS[method][0],
            learning_rate=learning_rate,
            threshold=THRESHOLD,
            max_iterations=max_iterations,
            batch_size=BATCH_SIZE,
            evaluate_every=EVALUATE_EVERY,
            seeds=[seed],
            progress=f"{method}, learning rate {learning_rate:g}, seed {seed}",
        )
        (result,) = history.runs
        done = key | {
            "learning_rate": learning_rate,
            "status": result.status,
            "iterations": result.iterations,
            "train_loss": result.train_loss,
        }
        found["runs"].append(done)
        write_json(file, found)
        return done

    for method in tqdm(methods, desc="descent", unit="method"):
        power = tune(partial(run, method), METHODS[method][1]) - 1
        for seed in SEEDS:
            run(method, power, seed, "measured", MAX_ITERATIONS)
    return found


def tune(run: Callable[..., dict[str, Any]], power: int) -> int:
    """Return the power of the learning rate that does best, uphill from ``power``."""

    def cost(power: int) -> tuple[float, float]:
        done = run(power, TUNING_SEED, "tuning", TUNING_ITERATIONS)
        if done["status"] == "reached":
            return (0, done["iterations"])
        return (1, float("inf") if done["status"] == "diverged" else done["train_loss"][-1])

    return climb(cost, power)


if __name__ == "__main__":
    runtime.keep_freed_memory()
    measure([check_choice("method", name, METHODS) for name in sys.argv[1:]] or list(METHODS))
