"""Learning by bytes, beside the section on several processes: what :mod:`report.studies.traffic` trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fwdlib.bench.scaling_figures import plot_traffic
from fwdlib.statistics import Interval, difference_by_seed, median_interval
from report.names import LEARNED, TRAFFIC, read
from report.sections.seeds import losses_over

MEGABYTES = (1, 100)
"""The budgets, 10^6 bytes each."""
FORWARD, SILENT = "rank-one", "no exchange"


def load(folder: Path) -> dict[str, Any] | None:
    """Return the results of the study, None where nothing was measured."""
    return read(folder / TRAFFIC)


def context(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the template prints of it, None where nothing was measured."""
    by_method = _by_method(found)
    if not by_method:
        return None
    rows = {method: _row(runs) for method, runs in by_method.items()}
    return {
        "settings": found["settings"],
        "environment": found["environment"],
        "num_params": found["num_params"],
        "budgets": MEGABYTES,
        "rows": rows,
        "best": {budget: _best(rows, budget) for budget in MEGABYTES},
        "best_sending": {budget: _best(_without(rows, SILENT), budget) for budget in MEGABYTES},
        "best_forward": {budget: _best(rows, budget, FORWARD) for budget in MEGABYTES},
        "silent": rows.get(SILENT),
        "too_large": 4 * found["num_params"] > 1e6 * MEGABYTES[0],  # one exchange of all gradients
        "behind": {budget: _behind(rows, budget) for budget in MEGABYTES},
        "num_seeds": min(row["num_seeds"] for row in rows.values()),
    }


def figures(found: dict[str, Any] | None) -> dict[str, Figure]:
    """Return the figure of the section by name."""
    by_method = _by_method(found)
    if not by_method:
        return {}
    curves = {}
    for method, runs in by_method.items():
        curves[method] = dict(zip(("bytes", "quartiles"), losses_over(runs, "bytes"), strict=True))
    return {"traffic": plot_traffic(curves)}


def _by_method(found: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"] if found else ():
        if run["purpose"] == "measured":
            by_method.setdefault(run["method"], []).append(run)
    return by_method


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    last = runs[0]
    within = {budget: {run["seed"]: _within(run, budget) for run in runs} for budget in MEGABYTES}
    return {
        "learning_rate": last["learning_rate"],
        "num_seeds": len(runs),
        "bytes": last["bytes"][-1] / last["steps"][-1],
        "sent": last["bytes"][-1],
        "arrival": median_interval([_arrival(run) for run in runs]),
        "steps": {budget: last["steps"][_index(last, budget)] for budget in MEGABYTES},
        "test": {budget: median_interval([loss for loss, _ in of.values()]) for budget, of in within.items()},
        "accuracy": {budget: median_interval([100 * a for _, a in of.values()]) for budget, of in within.items()},
        "losses": {budget: {seed: loss for seed, (loss, _) in of.items()} for budget, of in within.items()},
    }


def _index(run: dict[str, Any], megabytes: float) -> int:
    return max(i for i, sent in enumerate(run["bytes"]) if sent <= 1e6 * megabytes)


def _arrival(run: dict[str, Any]) -> float:
    # The megabytes that had been sent when the training loss was low enough.
    pairs = zip(run["bytes"], map(float, run["train"]), strict=True)
    return min((sent / 1e6 for sent, loss in pairs if loss <= LEARNED), default=math.inf)


def _within(run: dict[str, Any], megabytes: float) -> tuple[float, float]:
    # Test loss and accuracy when as much had been sent. A run that diverged counts as infinite loss.
    i = _index(run, megabytes)
    loss = float(run["test"][i])
    return (math.inf if math.isnan(loss) else loss), run["accuracy"][i]


def _best(rows: dict[str, Any], budget: int, begins: str = "") -> str | None:
    loss: Callable[[str], float] = lambda method: rows[method]["test"][budget].estimate  # noqa: E731
    return min((method for method in rows if method.startswith(begins)), key=loss, default=None)


def _without(rows: dict[str, Any], begins: str) -> dict[str, Any]:
    return {method: row for method, row in rows.items() if not method.startswith(begins)}


def _behind(rows: dict[str, Any], budget: int) -> Interval | None:
    # The test loss of the best method with scalars over that of the best other one, seed by seed.
    forward = _best(rows, budget, FORWARD)
    other = _best(_without(rows, FORWARD), budget)
    if forward is None or other is None:
        return None
    losses = rows[forward]["losses"][budget], rows[other]["losses"][budget]
    if any(math.isinf(loss) for of in losses for loss in of.values()):
        return None
    return difference_by_seed(*losses)
