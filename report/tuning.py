"""How learning rates are tuned in the report's studies: on a grid of powers of two, uphill from a first guess."""

from __future__ import annotations

from collections.abc import Callable

from fwdlib.data import Dataset


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
