"""Trainings of several seeds, as figures draw them."""

from __future__ import annotations

from typing import Any

import numpy as np


def losses_over(runs: list[dict[str, Any]], over: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the test losses of trainings that were evaluated at the same moments, as far as the shortest goes.

    Args:
        runs: one for each seed.
        over: the series that the losses are drawn over, for example ``"seconds"``.

    Returns:
        The median of this series, shape (evaluations,), and the quartiles of the losses, (3, evaluations); nan where a
        loss is.
    """
    length = min(len(run["test"]) for run in runs)
    losses = np.array([[float(loss) for loss in run["test"][:length]] for run in runs])
    where = np.median([run[over][:length] for run in runs], axis=0)
    return where, np.quantile(losses, (0.25, 0.5, 0.75), axis=0)
