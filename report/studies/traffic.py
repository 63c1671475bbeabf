"""Learning over a slow link: the test loss that each method reaches for the bytes that a process has sent.

Four processes on this machine share each batch. They train the same network on MNIST from the same starts, each method
at its own learning rate, tuned in the same way, until a process has sent as many bytes as the study allows, or for a
number of steps. The model of the first process is evaluated. The kernel counts the bytes, with the headers of the
exchange. The file keeps every finished training, so the study can be interrupted.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench import links
from fwdlib.bench.compared import perceptron
from fwdlib.bench.shared_steps import LOCAL_SGD, METHODS, NO_EXCHANGE, POWER_SGD, RANK_ONE, make_step, period
from fwdlib.data import Dataset
from fwdlib.models import initialise, num_parameters
from fwdlib.results import write_json
from fwdlib.trainer.distributed import joined, start
from fwdlib.trainer.processes import Processes
from report.names import TRAFFIC
from report.studies.common import climb, flat_images, losses_of, main, reopen

WIDTHS = (784, 256, 256, 10)
BASE_RATE = 1e-3  # times a power of two
FIRST_POWERS = {  # the first guess of the power, by the beginning of the method's name; 7 for the others
    "rank-one, K = 1": 0,
    "rank-one, K = 16": 2,
    "rank-one, K = 64": 3,
}


class Settings(NamedTuple):
    """Length of the trainings.

    The learning rate of a method is half of the one with the lowest training loss in a training for tuning, from a seed
    of its own. Half, for every method, because the best rate of a short training may diverge in a longer one.
    """

    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = tuple(range(1, 11))
    num_steps: int = 2000
    tuning_steps: int = 300
    tuning_seed: int = 100
    num_processes: int = 4
    batch_size: int = 64
    """Of each process."""
    megabytes: float = 100.0
    """A training ends when a process has sent as much, 10^6 bytes each."""
    num_train: int = 2000
    """Training examples on which the training loss is evaluated."""


FULL = Settings()
SHORT = Settings(
    methods=("DDP", POWER_SGD.format(1), LOCAL_SGD.format(10), RANK_ONE.format(1), NO_EXCHANGE),
    seeds=(1, 2),
    num_steps=60,
    tuning_steps=20,
    num_processes=2,
    megabytes=10.0,
)


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Tune and train with each method, and return everything that the file then holds.

    Returns:
        ``settings``, ``environment``, ``num_params``, ``source``; ``runs``: for each training its method, learning
        rate, seed, purpose (``"tuning"`` or ``"measured"``), and by evaluation the number of ``steps``, the ``bytes``
        that the first process has sent, training and test loss, and test accuracy. A training that diverged ends
        early, with nan.
    """
    file = folder / TRAFFIC
    kept = {name: value for name, value in settings._asdict().items() if name not in ("methods", "seeds")}
    found = reopen(file, kept | {"widths": WIDTHS}, runs=[])
    data = flat_images("MNIST", 2000)
    found |= {"source": data.source._asdict(), "num_params": num_parameters(perceptron(*WIDTHS))}  # saved with the runs

    def run(method: str, power: int, seeds: Sequence[int], purpose: str, num_steps: int) -> list[dict[str, Any]]:
        # All seeds that are missing train one after the other in the same processes.
        key = {"method": method, "power": power, "purpose": purpose}
        known = {done["seed"]: done for done in found["runs"] if key.items() <= done.items()}
        if missing := [seed for seed in seeds if seed not in known]:
            made = _together(settings, method, power, missing, num_steps)
            known |= {seed: key | {"seed": seed} | run for seed, run in zip(missing, made, strict=True)}
            found["runs"] += [known[seed] for seed in missing]
            write_json(file, found)
        return [known[seed] for seed in seeds]

    for method in tqdm(settings.methods, desc="traffic", unit="method"):

        def cost(power: int, method: str = method) -> tuple[float, ...]:
            (tuned,) = run(method, power, [settings.tuning_seed], "tuning", max(settings.tuning_steps, period(method)))
            value = float(tuned["train"][-1])
            return (math.inf if math.isnan(value) else value,)

        power = climb(cost, FIRST_POWERS.get(method, 7)) - 1
        run(method, power, settings.seeds, "measured", settings.num_steps)
    return found


def _together(
    settings: Settings, method: str, power: int, seeds: Sequence[int], num_steps: int
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="fwdlib-") as folder:
        path = Path(folder) / "found.json"
        start(settings.num_processes, _work, settings, method, power, seeds, num_steps, path)
        return json.loads(path.read_text())["runs"]


def _work(settings: Settings, method: str, power: int, seeds: Sequence[int], num_steps: int, path: Path) -> None:
    # In each of the processes.
    runtime.keep_freed_memory()
    torch.set_num_threads(1)
    data = flat_images("MNIST", 2000)
    with joined(torch.device("cpu")) as processes:
        rate = BASE_RATE * 2.0**power
        found = [_train(settings, processes, data, method, rate, seed, num_steps) for seed in seeds]
        if processes.rank == 0:
            write_json(path, {"runs": found})


def moments(num_steps: int, every: int) -> list[int]:
    """Return the steps after which a training is evaluated: up to twelve in each doubling, at multiples of ``every``.

    Example:
        >>> moments(20, 1)
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    """
    wanted = {0, num_steps // every * every}
    wanted |= {every * round(2 ** (i / 12)) for i in range(12 * max(1, num_steps).bit_length())}
    return sorted(step for step in wanted if step <= num_steps)


def _train(
    settings: Settings,
    processes: Processes,
    data: Dataset,
    method: str,
    learning_rate: float,
    seed: int,
    num_steps: int,
) -> dict[str, Any]:
    torch.manual_seed(seed)  # the tangents are the same in all processes
    model = initialise(partial(perceptron, *WIDTHS), seed)
    step = make_step(method, model, learning_rate, processes)
    draw = runtime.generator(seed, purpose="batches")
    found: dict[str, list[float]] = {"steps": [], "bytes": [], "train": [], "test": [], "accuracy": []}
    begun, done = links.traffic(), 0
    evaluated = 0  # bytes that only the evaluations have sent

    def evaluate() -> bool:
        # In process 0; returns whether to go on.
        sent = links.traffic().since(begun).num_bytes - evaluated
        losses = losses_of(model, data, settings.num_train)
        for name, value in ({"steps": done, "bytes": sent} | losses).items():
            found[name].append(value)
        return not math.isnan(losses["train"]) and sent < 1e6 * settings.megabytes

    for moment in moments(num_steps, period(method)):
        while done < moment:
            rows = torch.randint(len(data.train_targets), (settings.batch_size * processes.size,), generator=draw)
            rows = processes.share(rows)
            step(data.train_inputs[rows], data.train_targets[rows])
            done += 1
        before = links.traffic()
        goes_on = processes.from_first(evaluate)
        evaluated += links.traffic().since(before).num_bytes
        if not goes_on:
            break
    return {"learning_rate": learning_rate, **found}


if __name__ == "__main__":
    main(measure, FULL, SHORT)
