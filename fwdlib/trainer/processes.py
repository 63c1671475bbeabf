"""The processes that train one model together. In the usual case there is one, alone.

:mod:`fwdlib.trainer.distributed` has those that torch.distributed connects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


class AlreadyReportedError(RuntimeError):
    """Process 0 has already reported this error."""


class Processes:
    """One process, alone. A subclass stands for several, each of which works on its share of every batch."""

    rank: int = 0
    """The number of this process. Process 0 writes the files."""
    size: int = 1
    """The number of processes."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over the shares of all processes, a scalar."""
        import torch.nn.functional as F  # only here: fwdlib.bench.scaling needs no torch

        return F.cross_entropy(logits, targets)

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's share of the examples of a batch."""
        return rows

    def each(self, part: T) -> T:
        """Return a part of a checkpoint that saves the state of every process's ``part``, and restores each."""
        return part

    def check_alike(self, about: Mapping[str, str]) -> None:
        """Refuse to train together if the processes would not train the same thing.

        Args:
            about: what this process would train, name -> value in words.

        Raises:
            ValueError: in process 0, if two processes differ; the message says in what.
            AlreadyReportedError: in the others.
        """

    def settle(self, model: nn.Module) -> None:
        """Set the buffers of all processes to their mean, and check that the parameters are equal.

        Raises:
            RuntimeError: if the parameters differ.
        """

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what ``make()`` returns in process 0.

        Raises:
            Exception: in process 0, what ``make`` raises; in the others AlreadyReportedError.
        """
        return make()

    def reported_once(self, error: Exception) -> Exception:
        """Return the error to raise when all processes find the same one: only process 0 reports it."""
        return error if self.rank == 0 else AlreadyReportedError(str(error))


ALONE = Processes()


def num_started() -> int:
    """Return how many processes torchrun, or another program that sets ``WORLD_SIZE``, has started together; else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Tell whether this process is process 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""The environment variable by which torchrun counts its restarts."""


def num_restarts() -> int:
    """Return how often torchrun has restarted the processes because it lost one."""
    return int(os.environ.get(RESTARTS, "0"))


def prime_factors(number: int) -> list[int]:
    """Return the prime factors of a whole number, in rising order.

    Example:
        >>> prime_factors(12)
        [2, 2, 3]
    """
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors
