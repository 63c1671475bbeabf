"""How learning rates are tuned in the report's studies: on a grid of powers of two, uphill from a first guess."""

from __future__ import annotations

from collections.abc import Callable


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
