"""What the report's studies have in common: where results are, how a study goes on, how learning rates are tuned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fwdlib import runtime
from fwdlib.data import Dataset

T = TypeVar("T")
VARIABLE = "FWDLIB_EVIDENCE"
"""Set by :mod:`report.evidence`: the folder of results of a rebuild of all studies, each in a short form."""
IS_SHORT = bool(os.environ.get(VARIABLE))
RESULTS = Path(os.environ.get(VARIABLE) or Path(__file__).parents[1] / "results")


def either(whole: T, short: T) -> T:
    """Return the first, or in a rebuild in short form the second."""
    return short if IS_SHORT else whole


def reopen(file: Path, settings: dict[str, Any], **begin: Any) -> dict[str, Any]:
    """Return what a study has kept in its file so far, with ``settings`` and the present ``environment``.

    Args:
        file: there or not.
        settings: of the study, as JSON gives them back.
        begin: what an empty file would hold beside them.

    Raises:
        ValueError: if the file was made with other settings.
    """
    found = json.loads(file.read_text("utf-8")) if file.is_file() else begin
    kept = found.setdefault("settings", settings)
    if kept != settings:
        missing = "not there"
        before, now = ({name: of.get(name, missing) for name in kept | settings} for of in (kept, settings))
        name = next(name for name in before if before[name] != now[name])
        raise ValueError(
            f"{file} was made with other settings: {name} was {before[name]!r} and is {now[name]!r} now. Delete the "
            f"file to start anew."
        )
    return found | {"environment": runtime.environment()}


def climb(cost: Callable[[int], tuple[float, ...]], power: int) -> int:
    """Return the power of two at the bottom of ``cost``, walking from ``power`` as long as it falls.

    Args:
        cost: of a power; called once more for one that was seen, so it had better remember.
        power: the first guess.

    Example:
        >>> climb(lambda power: (abs(power - 3),), 0)
        3
    """
    for direction in (1, -1):
        while cost(power + direction) < cost(power):
            power += direction
    return power


def held_out(data: Dataset, number: int) -> Dataset:
    """Return the data with the last images of the training set in place of the test set.

    Args:
        data: a data set.
        number: how many images to hold out.
    """
    train_inputs, test_inputs = data.train_inputs.tensor_split([-number])
    train_targets, test_targets = data.train_targets.tensor_split([-number])
    return data._replace(
        train_inputs=train_inputs, train_targets=train_targets, test_inputs=test_inputs, test_targets=test_targets
    )
