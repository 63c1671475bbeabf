"""Frank-Wolfe with forward gradients: what is measured, and how the page prints it.

Three things: the Frank-Wolfe gap over a million steps on problems whose optimum is known, logistic regression on MNIST
in l1 balls of several radii, and the peak memory of a step. All of it is kept item by item in one file, and what is
there is not done again; so it can be interrupted.

    python -m report.studies.frank_wolfe                # everything
    python -m report.studies.frank_wolfe memory         # or one of memory, tuning, training, convergence
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from fwdlib import runtime
from fwdlib.bench import measuring
from fwdlib.bench.compared import find_task, perceptron, prepare
from fwdlib.checks import check_choice
from fwdlib.data import Dataset, load_images
from fwdlib.estimators import Estimator, backprop_gradient, forward_gradient
from fwdlib.methods import figures as beyond
from fwdlib.methods.frank_wolfe import FrankWolfe, frank_wolfe, frank_wolfe_gap, l2_reach, shrink_into
from fwdlib.objectives import BatchLoss, assign_gradients, params_of
from fwdlib.results import write_json
from fwdlib.statistics import median_interval, t_interval
from fwdlib.training import make_optimizer, train
from report import published
from report.studies.common import RESULTS, climb, either, held_out, reopen

FILE = RESULTS / "frank_wolfe.json"

# The distance to a point c, in a ball of radius 1 around zero. Where c is tells where the optimum is.
NUM_PARAMS = 20
PLACES = {"near the centre": 0.1, "inside": 0.5, "outside": 2.0}  # the ball's norm of c
BALLS = ("l1", "l2", "linf")
FORMS = {  # whether the gradient is the exact one, and whether it is averaged
    "exact gradient": (True, False),
    "plain": (False, False),
    "averaged": (False, True),
}
NUM_STEPS = either(1_000_000, 100_000)
FIRST = 100  # the slopes are taken from here on
RECORDS_A_DECADE = 4
SEEDS = list(range(10))
CHUNK = 1000

# MNIST
RADII = either((10, 30, 100, 300, 1000), (30, 100, 300))
TRAINING_SEEDS = either([1, 2, 3, 4, 5], [1, 2])
BATCH_SIZE = 256
ITERATIONS = either(2_000, 500)
MIDDLE = 100  # the radius of plain Frank-Wolfe, and of the long trainings
MIDDLE_L2 = 30  # of the l2 ball, for comparison
LONG = either(10_000, 1_000)  # steps with the averaged forward gradient, for which 2,000 are too few
EVALUATIONS = 10
TUNING_SEED = 100
NUM_HELD_OUT = 10_000
ESTIMATORS: dict[str, Estimator] = {
    "backprop": backprop_gradient,
    "forward gradient": partial(forward_gradient, tangents="normal"),
    "activity": partial(forward_gradient, tangents="activity"),
}
FIRST_POWERS = {"backprop": 13, "forward gradient": 5, "activity": 10}  # of two, times 1e-4, for unconstrained SGD
HOLDS = 0.99  # of the l1 norm
FALLS = 1.1  # a gap that falls by less than this factor in a decade of steps has levelled off
SOLVED = 1e-9  # of the gap at the start: the exact gradient can be at the optimum after one step

# Memory: model and batch
MEMORY = either(
    (("mnist-logistic", 256), ("mnist-mlp", 256), ("20x256", 4096), ("paper-cnn", 256)),
    (("mnist-logistic", 256), ("mnist-mlp", 256)),
)
MEMORY_ESTIMATORS = {name: ESTIMATORS[name] for name in ("backprop", "forward gradient")}
MEMORY_ESTIMATORS["rank-one"] = forward_gradient
MEMORY_RADIUS = 1e4
LESS = 0.9  # of backprop's memory


def measure(words: list[str], file: Path = FILE) -> dict[str, Any]:
    """Measure what is not in the file yet, and return everything that it then holds.

    Args:
        words: which of ``PARTS``.
        file: where it is kept.

    Returns:
        ``settings``, ``environment``, ``source``, and the parts, each item by its name.

    Raises:
        ValueError: if the file was made with other settings.
    """
    found = reopen(file, settings_now())
    for word in words:
        done = found.setdefault(word, {})
        for name, job in tqdm(list(PARTS[word](found)), desc=word, unit="item"):
            if name not in done:
                done[name] = job()
                write_json(file, found)
    return found


def settings_now() -> dict[str, Any]:
    """Return what the measurements depend on; a file with others is not gone on with."""
    return {
        "num_params": NUM_PARAMS,
        "places": PLACES,
        "num_steps": NUM_STEPS,
        "first": FIRST,
        "seeds": SEEDS,
        "radii": list(RADII),
        "training_seeds": TRAINING_SEEDS,
        "batch_size": BATCH_SIZE,
        "iterations": ITERATIONS,
        "middle": MIDDLE,
        "middle_l2": MIDDLE_L2,
        "long": LONG,
        "num_held_out": NUM_HELD_OUT,
        "holds": HOLDS,
    }


# --- convergence -----------------------------------------------------------------------------------------------------


def convergence_jobs(_: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each run and what makes it."""
    for ball, form in itertools.product(BALLS, FORMS):
        yield f"{ball}, {form}", partial(converge, ball, form)


def converge(ball: str, form: str) -> dict[str, Any]:
    """Run Frank-Wolfe for all places and seeds at once, and look at it at some steps.

    A seed draws a goal for each ball, which is scaled to each of the places, and the tangents, the same for all places.

    Returns:
        ``steps``, and place -> ``gap`` and ``error``, each a list for each seed: the Frank-Wolfe gap, and f above its
        optimum, both with the exact gradient and in units of their values at the start.
    """
    is_exact, averaged = FORMS[form]
    goals = torch.stack([place_goals(ball, seed) for seed in SEEDS])  # (seeds, places, P)
    best = distance(project(goals, ball), goals)
    tangents = draw_tangents(SEEDS, NUM_PARAMS)

    def gradient(x: Tensor) -> Tensor:
        g = x - goals
        if is_exact:
            return g
        v = next(tangents).unsqueeze(1)
        return (g * v).sum(-1, keepdim=True) * v

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        return frank_wolfe_gap(x - goals, x, ball, 1.0), distance(x, goals) - best

    start = torch.zeros_like(goals)
    at_start = look(start)
    steps, seen = record_steps(NUM_STEPS), []
    points = frank_wolfe(gradient, start, ball=ball, radius=1.0, averaged=averaged)
    bar = tqdm(points, desc=f"{ball}, {form}", total=NUM_STEPS, leave=False, mininterval=2)
    for k, x in enumerate(bar):
        if k in steps:
            seen.append([value / first for value, first in zip(look(x), at_start, strict=True)])
        if k == NUM_STEPS:
            break
    gap, error = (torch.stack(values, -1).tolist() for values in zip(*seen, strict=True))  # (seeds, places, steps)
    return {"steps": steps} | {
        place: {"gap": [row[i] for row in gap], "error": [row[i] for row in error]} for i, place in enumerate(PLACES)
    }


def place_goals(ball: str, seed: int) -> Tensor:
    """Return the goals of a seed, (places, P): one direction, in several distances from the centre."""
    drawn = torch.randn(NUM_PARAMS, generator=runtime.generator(seed, purpose="goal"), dtype=torch.float64)
    order = {"l1": 1, "l2": 2, "linf": torch.inf}[ball]
    return torch.tensor(list(PLACES.values()), dtype=torch.float64).outer(
        drawn / torch.linalg.vector_norm(drawn, order)
    )


def distance(x: Tensor, goals: Tensor) -> Tensor:
    """Return the objective, half the squared distance."""
    return 0.5 * (x - goals).square().sum(-1)


def project(points: Tensor, ball: str) -> Tensor:
    """Return the nearest points of the ball of radius 1: the optimum.

    For l1, Duchi et al. 2008: all entries shrink by one threshold, found from the sorted ones.
    """
    if ball == "linf":
        return points.clamp(-1, 1)
    if ball == "l2":
        return points / torch.linalg.vector_norm(points, dim=-1, keepdim=True).clamp(min=1)
    sizes = points.abs().sort(-1, descending=True).values
    counts = torch.arange(1, points.shape[-1] + 1)
    thresholds = (sizes.cumsum(-1) - 1) / counts
    return points.sign() * (points.abs() - thresholds.amax(-1, keepdim=True).clamp(min=0)).clamp(min=0)


def draw_tangents(seeds: list[int], num_params: int) -> Iterator[Tensor]:
    """Yield normal tangents (seeds, P) for ever, each seed's from a generator of its own."""
    draws = [runtime.generator(seed) for seed in seeds]
    while True:
        many = [torch.randn(CHUNK, num_params, generator=draw, dtype=torch.float64) for draw in draws]
        yield from torch.stack(many, 1)


def record_steps(num_steps: int) -> list[int]:
    """Return where it is looked: from 10 on, a few times in each decade."""
    powers = np.arange(RECORDS_A_DECADE, round(RECORDS_A_DECADE * np.log10(num_steps)) + 1) / RECORDS_A_DECADE
    return sorted({round(10**power) for power in powers})


# --- training --------------------------------------------------------------------------------------------------------


def build() -> nn.Module:
    """Return logistic regression on MNIST that starts at zero, the centre of each ball."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def tuning_jobs(found: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the methods, each with the search of its learning rate without a constraint."""
    data = load_images("MNIST")
    found["source"] = data.source._asdict()
    for method in ESTIMATORS:
        yield method, partial(tune, held_out(data, NUM_HELD_OUT), method)


def tune(data: Dataset, method: str) -> dict[str, Any]:
    """Return the learning rate of plain SGD that errs least: a power of two, uphill from a first guess."""

    @functools.cache
    def cost(power: int) -> tuple[float, ...]:
        key = {"method": method, "ball": None, "averaged": None, "radius": None}
        key |= {"iterations": ITERATIONS, "seed": TUNING_SEED}
        done = fit(data, make_optimizer("SGD", 1e-4 * 2**power), key)
        return (1,) if done["status"] == "diverged" else (0, done["test_errors"][-1])

    return {"learning_rate": 1e-4 * 2 ** climb(cost, FIRST_POWERS[method])}


def training_jobs(found: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each training and what makes it."""
    data = load_images("MNIST")
    for seed, planned in itertools.product(TRAINING_SEEDS, plan()):
        key = planned | {"seed": seed}
        if key["averaged"] is None:
            optimizer = make_optimizer("SGD", found["tuning"][key["method"]]["learning_rate"])
        else:
            options = {"ball": key["ball"], "radius": float(key["radius"]), "averaged": key["averaged"]}
            optimizer = partial(FrankWolfe, **options)
        yield _name(key), partial(fit, data, optimizer, key)


def plan() -> list[dict[str, Any]]:
    """Return what is trained from each seed; ``averaged`` and ball are None for SGD without a constraint."""
    forms = [(None, None, None), ("l1", False, MIDDLE), *(("l1", True, radius) for radius in RADII)]
    runs = [(method, *form, ITERATIONS) for form in forms for method in ESTIMATORS]
    runs += [("forward gradient", "l1", True, MIDDLE, LONG)]
    runs += [(method, "l2", True, MIDDLE_L2, ITERATIONS) for method in ("backprop", "forward gradient")]
    return [dict(zip(("method", "ball", "averaged", "radius", "iterations"), run, strict=True)) for run in runs]


def _name(key: dict[str, Any]) -> str:
    form = {None: "SGD", False: "plain", True: "averaged"}[key["averaged"]]
    ball = "l2, " if key["ball"] == "l2" else ""
    return f"{key['method']}, {form}, {ball}radius {key['radius']}, {key['iterations']} steps, seed {key['seed']}"


def fit(data: Dataset, optimizer: Callable, key: dict[str, Any]) -> dict[str, Any]:
    """Train once, and say how well and how sparsely it ended.

    Returns:
        ``key``, the test errors over the steps, and of the weights and biases at the end: the shares of them that are
        not zero and that, the largest first, hold ``HOLDS`` of the l1 norm, and this norm.
    """
    iterations = key["iterations"]
    history = train(
        build,
        data,
        ESTIMATORS[key["method"]],
        optimizer=optimizer,
        max_iterations=iterations,
        batch_size=BATCH_SIZE,
        evaluate_every=iterations // EVALUATIONS,
        test_batch_size=10_000,
        seeds=[key["seed"]],
        progress=_name(key),
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


def memory_jobs(_: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield model, estimator and form of each step, and what measures its memory in a process of its own."""
    for (model, batch), method, form in itertools.product(MEMORY, MEMORY_ESTIMATORS, ("SGD", "plain", "averaged")):
        yield f"{model}, {method}, {form}", partial(memory_in_new_process, model, batch, method, form)


def memory_in_new_process(model: str, batch: int, method: str, form: str) -> dict[str, Any]:
    """Return the bytes that a step takes at its peak, beyond model and batch, as the benchmark measures them.

    Raises:
        RuntimeError: if it cannot be measured.
    """
    words = ["memory-of", model, str(batch), method, form]
    ended = subprocess.run(
        [sys.executable, "-m", "report.studies.frank_wolfe", *words], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        reason = ended.stderr.strip().splitlines() or [f"ended with code {ended.returncode}"]  # -9: out of memory
        raise RuntimeError(f"{' '.join(words)}: {reason[-1]}")
    key = {"model": model, "title": find_task(model).title, "batch": batch, "method": method, "form": form}
    return key | {"bytes": int(ended.stdout.split()[-1])}


def memory_of(model: str, batch: str, method: str, form: str) -> int:
    """Return the same, in this process. Another model warms up first: libraries are not what a step needs."""
    task = find_task(model)
    is_flat = len(task.shape) == 1
    tiny = perceptron(8, 8, 2) if is_flat else nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
    small = torch.randn(4, *((8,) if is_flat else (1, 8, 8)))
    _take_steps(tiny, small, torch.zeros(4, dtype=torch.long), method, form)
    prepared = prepare(task, batch=int(batch))
    gc.collect()
    before, peak = measuring._resident_memory()
    _take_steps(*prepared, method, form)
    return peak() - before


def _take_steps(net: nn.Module, inputs: Tensor, targets: Tensor, method: str, form: str) -> None:
    if form == "SGD":
        optimizer = torch.optim.SGD(net.parameters(), 1e-9)
    else:
        params = shrink_into(net.parameters(), "l1", MEMORY_RADIUS)
        optimizer = FrankWolfe(params, ball="l1", radius=MEMORY_RADIUS, averaged=form == "averaged")
    for _ in range(measuring.STEPS_OF_MEMORY):
        optimizer.zero_grad()
        assign_gradients(net, MEMORY_ESTIMATORS[method](BatchLoss(net, inputs, targets), params_of(net)).grads)
        optimizer.step()


PARTS = {"memory": memory_jobs, "tuning": tuning_jobs, "training": training_jobs, "convergence": convergence_jobs}


# --- what the page prints --------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Any] | None:
    """Return what was measured, None where nothing was.

    Args:
        folder: of the results.
    """
    file = folder / FILE.name
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where no convergence was measured.

    Args:
        found: as :func:`load` returns it.
    """
    if not found or not found.get("convergence"):
        return None
    settings = found["settings"]
    rows = {
        ball: {place: _forms(found["convergence"], ball, place) for place in settings["places"]}
        for ball in BALLS
        if all(f"{ball}, {form}" in found["convergence"] for form in FORMS)
    }
    verdicts = {ball: {place: _verdict(forms) for place, forms in places.items()} for ball, places in rows.items()}
    return {
        "settings": settings,
        "environment": found["environment"],
        "source": found.get("source"),
        "rows": rows,
        "verdicts": verdicts,
        "level_inside": [ball for ball, by_place in verdicts.items() if by_place["inside"]["plain"] == "level"],
        "falls_near": [ball for ball, by_place in verdicts.items() if by_place["near the centre"]["plain"] == "falls"],
        "num_decades": round(float(np.log10(settings["num_steps"] / settings["first"]))),
        "ahead_near": [ball for ball, places in rows.items() if _is_ahead(places["near the centre"])],
        "reach": _reach(settings, rows),
        "training": _trainings(found.get("training", {}), settings),
        "rates": {method: tuned["learning_rate"] for method, tuned in found.get("tuning", {}).items()},
        "memory": _memory(found.get("memory", {})),
        "quoted": published.load()["frank_wolfe"],
    }


def _forms(measured: dict[str, Any], ball: str, place: str) -> dict[str, Any]:
    return {form: _decay(measured[f"{ball}, {form}"], place) for form in FORMS}


def _decay(run: dict[str, Any], place: str) -> dict[str, Any]:
    """Return how the gap of one run fell: slopes seed by seed, and by what factor in each decade of steps."""
    steps, gaps = np.array(run["steps"]), np.maximum(run[place]["gap"], 1e-16)  # rounding can make one negative
    if (gaps[:, -1] < SOLVED).all():
        return {"solved": True}
    kept = steps >= FIRST
    slopes = [np.polyfit(np.log10(steps[kept]), np.log10(row[kept]), 1)[0] for row in gaps]
    ends = {int(step): gaps[:, i] for i, step in enumerate(steps)}
    decades = [step for step in ends if step >= FIRST and 10 * step in ends and np.log10(step / FIRST) % 1 == 0]
    return {
        "solved": False,
        "slope": t_interval(slopes),
        "falls": [median_interval(ends[step] / ends[10 * step]) for step in decades],
        "gap": median_interval(gaps[:, -1]),
        "error": median_interval([row[-1] for row in run[place]["error"]]),
    }


def _verdict(forms: dict[str, Any]) -> dict[str, str]:
    """Return whether the gap ``falls`` in each decade, is ``level`` in the last one, or neither can be told."""
    verdicts = {}
    for form, row in forms.items():
        if row["solved"] or all(fall.low > FALLS for fall in row["falls"]):
            verdicts[form] = "falls"
        else:
            verdicts[form] = "level" if row["falls"][-1].high < FALLS else "unclear"
    return verdicts


def _is_ahead(forms: dict[str, Any]) -> bool:
    """Tell whether plain Frank-Wolfe falls more steeply than the averaged form, beyond both intervals."""
    return forms["plain"]["slope"].high < forms["averaged"]["slope"].low


def _reach(settings: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any] | None:
    """Return where theory says that the plain form ends on the l2 ball, and where it does, in units of the start."""
    if "l2" not in rows:
        return None
    reach, away = l2_reach(settings["num_params"]), settings["places"]["outside"]
    predicted = ((away - reach) ** 2 - (away - 1) ** 2) / (away**2 - (away - 1) ** 2)
    measured = rows["l2"]["outside"]["plain"]["error"]
    return {"radius": reach, "predicted": predicted, "measured": measured}


def _trainings(runs: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the trainings by what was done, over the seeds; the name ends in the seed, which is left out."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        groups.setdefault(name.rpartition(", seed")[0], []).append(run)
    if not groups:
        return None
    rows = [_training(runs) for runs in groups.values()]
    rows.sort(key=lambda row: list(ESTIMATORS).index(row["method"]))  # stable: else as they were made

    steps, middle = settings["iterations"], settings["middle"]

    def at(method: str, ball: str | None, averaged: bool | None, radius: float | None, iterations: int = steps) -> Any:
        key = {"method": method, "ball": ball, "averaged": averaged, "radius": radius, "iterations": iterations}
        return next((row for row in rows if key.items() <= row.items()), None)

    found = {
        "backprop": at("backprop", "l1", True, middle),
        "activity": at("activity", "l1", True, middle),
        "plain": at("forward gradient", "l1", False, middle),
        "averaged": at("forward gradient", "l1", True, middle),
        "long": at("forward gradient", "l1", True, middle, settings["long"]),
        "l2": at("forward gradient", "l2", True, settings["middle_l2"]),
        "free": at("forward gradient", None, None, None),
    }
    return {
        "rows": rows,
        "num_seeds": max(row["num_seeds"] for row in rows),
        "num_test": next(iter(runs.values()))["num_test"],
        "num_params": sum(p.numel() for p in build().parameters()),
        "at": found,
        "behind": {name: _behind(found["backprop"], found[name]) for name in ("activity", "averaged", "long")},
    }


def _behind(first: dict[str, Any] | None, second: dict[str, Any] | None) -> Any:
    """Return by how many points the accuracy of the second is lower, seed by seed; None where one is missing."""
    if not first or not second:
        return None
    shared = first["accuracies"].keys() & second["accuracies"].keys()
    return t_interval([first["accuracies"][seed] - second["accuracies"][seed] for seed in sorted(shared)])


def _training(runs: list[dict[str, Any]]) -> dict[str, Any]:
    # What diverged has learned nothing.
    accuracies = {
        run["seed"]: 0.0 if run["status"] == "diverged" else 100 * (1 - run["test_errors"][-1] / run["num_test"])
        for run in runs
    }
    first = {key: runs[0][key] for key in ("method", "ball", "averaged", "radius", "iterations")}
    return first | {
        "form": {None: "SGD, no constraint", False: "plain", True: "averaged"}[first["averaged"]],
        "num_seeds": len(runs),
        "accuracies": accuracies,
        "accuracy": t_interval(list(accuracies.values())),
        "nonzero": 100 * float(np.mean([run["nonzero"] for run in runs])),
        "holding": 100 * float(np.mean([run["holding"] for run in runs])),
        "norm": float(np.mean([run["norm"] for run in runs])),
    }


def _memory(items: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row for each model and estimator, with the bytes of each form of step and their share of backprop's.

    And ``less``, the models for which averaged Frank-Wolfe by some forward gradient needs clearly less, with the least
    share of them, and ``not_less``, the others.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for item in items.values():
        first = {"model": item["model"], "title": item["title"], "batch": item["batch"], "method": item["method"]}
        row = rows.setdefault((item["model"], item["method"]), first | {"bytes": {}})
        row["bytes"][item["form"]] = item["bytes"]
    for (model, _), row in rows.items():
        whole = rows.get((model, "backprop"), {"bytes": {}})["bytes"].get("averaged")
        row["share"] = row["bytes"]["averaged"] / whole if whole and "averaged" in row["bytes"] else None
    if not rows:
        return None
    least: dict[str, float] = {}
    for row in rows.values():
        if row["share"] and row["method"] != "backprop":
            least[row["title"]] = min(row["share"], least.get(row["title"], math.inf))
    return {
        "rows": list(rows.values()),
        "less": {title: share for title, share in least.items() if share < LESS},
        "not_less": [title for title, share in least.items() if share >= LESS],
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure]:
    """Return the figures by the name of their file, of what was measured.

    Args:
        found: as :func:`load` returns it.
    """
    drawn: dict[str, Figure] = {}
    measured = found.get("convergence", {}) if found else {}
    balls = [ball for ball in BALLS if all(f"{ball}, {form}" in measured for form in FORMS)]

    def panel(ball: str, place: str, what: str) -> dict[str, np.ndarray]:
        return {form: np.array(measured[f"{ball}, {form}"][place][what]) for form in FORMS}

    if "l1" in balls:
        steps = measured["l1, plain"]["steps"]
        places = {f"l1 ball, goal {place}": panel("l1", place, "gap") for place in PLACES}
        drawn["frank-wolfe-gap"] = beyond.plot_decay(places, steps, "Frank-Wolfe gap, relative")
        others = {f"{ball} ball": panel(ball, "outside", "error") for ball in balls}
        drawn["frank-wolfe-error"] = beyond.plot_decay(others, steps, "loss above its optimum, relative")
    runs = list(found.get("training", {}).values()) if found else []
    if runs:
        curves: dict[str, dict[float | None, list[tuple[float, float]]]] = {}
        for run in runs:
            is_swept = run["averaged"] is not False and run["ball"] != "l2" and run["iterations"] == ITERATIONS
            if is_swept and run["status"] != "diverged":
                right = 1 - run["test_errors"][-1] / run["num_test"]
                curves.setdefault(run["method"], {}).setdefault(run["radius"], []).append((run["holding"], right))
        quantity = f"parameters that hold {100 * HOLDS:g} % of the l1 norm"
        drawn["frank-wolfe-sparsity"] = beyond.plot_sparsity(curves, quantity, runs[0]["num_test"])
    return drawn


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory-of"]:
        print(memory_of(*sys.argv[2:]))
    else:
        runtime.keep_freed_memory()
        measure([check_choice("part", word, PARTS) for word in sys.argv[1:]] or list(PARTS))
