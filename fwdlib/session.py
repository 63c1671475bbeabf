"""What surrounds a run of ``train()``: in the usual case one process that keeps no file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fwdlib.data import Dataset
from fwdlib.history import Run

if TYPE_CHECKING:
    from fwdlib.estimators import Estimator


class Running(NamedTuple):
    """Everything that changes while one seed trains, and what the run depends on."""

    seed: int
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    estimator: Estimator
    batches: Any
    """With ``state_dict()`` and ``load_state_dict(state)``."""
    generator: torch.Generator
    """The source of the tangents."""
    data: Dataset
    batch_size: int | None
    evaluate_every: int
    max_iterations: int


class Progress(NamedTuple):
    """How far a run has come."""

    iteration: int
    run: Run
    recent: list[list[float]]
    """Training losses since the last evaluation."""
    seconds: float


class Session:
    """One process that keeps no file: the default of ``train(session=...)``.

    :class:`fwdlib.trainer.session.TrainerSession` keeps a checkpoint and shares each batch among several processes.
    """

    rank: int = 0
    """The number of this process. Process 0 draws the progress bar and writes the files."""
    size: int = 1
    """The number of processes that share each batch."""

    def check(self, num_seeds: int, batch_size: int | None, num_examples: int) -> None:
        """Refuse a run that this session cannot hold.

        Raises:
            ValueError: if it cannot.
        """

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over the examples of all processes, a scalar."""
        return F.cross_entropy(logits, targets)

    def share(self, rows: Tensor) -> Tensor:
        """Return the part of a batch that this process works on."""
        return rows

    def begin(self, running: Running) -> Progress | None:
        """Start the run of a single seed.

        Returns:
            The progress to continue from, with everything in ``running`` brought to that state; None to start anew.
        """
        return None

    def before_evaluation(self, running: Running, progress: Progress) -> None:
        """Note the state of the run. A resumed run repeats the evaluation that follows."""

    def after_evaluation(self, *, is_finite: bool) -> None:
        """Keep the noted state.

        Args:
            is_finite: whether the training and test losses are numbers.
        """
