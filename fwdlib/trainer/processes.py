"""The processes that train one model together, as ``train()`` sees them; in the usual case there is one, alone.

Those of torch.distributed are in :mod:`fwdlib.trainer.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


class ToldElsewhereError(RuntimeError):
    """What is wrong stands in the message of another process, the first: there is nothing to add."""


class Workers:
    """One process, alone. A subclass is for several, each of which works on its share of every batch."""

    rank: int = 0
    """Which one this is; the first, 0, writes the files."""
    size: int = 1
    """How many there are."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over the shares of all processes, a scalar."""
        return F.cross_entropy(logits, targets)

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of the examples of a batch."""
        return rows

    def each(self, part: T) -> T:
        """Return a part of a checkpoint that holds what every process has of it."""
        return part

    def check_alike(self, about: Mapping[str, str]) -> None:
        """Refuse to train together what is not the same.

        Args:
            about: what it is, name -> value in words.

        Raises:
            ValueError: in the first process, if a value differs between two; the message says which, and how.
            ToldElsewhereError: in the others.
        """

    def settle(self, model: nn.Module) -> None:
        """Give all processes the same buffers, the mean of theirs, and see that they have the same parameters.

        Raises:
            RuntimeError: if they have not.
        """

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what ``make()`` returns in the first process.

        Raises:
            Exception: in the first process, what ``make`` raises; in the others ToldElsewhereError.
        """
        return make()

    def told(self, error: Exception) -> Exception:
        """Return the error to raise where all processes find the same: it itself in the first process alone."""
        return error if self.rank == 0 else ToldElsewhereError(str(error))


ALONE = Workers()


def num_started() -> int:
    """Return how many processes torchrun, or what sets the same variable, has started for the same work; alone 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Tell whether this process is the first of those, or alone."""
    return os.environ.get("RANK", "0") == "0"


def num_restarts() -> int:
    """Return how often torchrun has started them anew, because one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
