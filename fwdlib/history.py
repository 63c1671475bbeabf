"""The outcome of a training run as plain data, so that records and figures need no training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fwdlib.tangents import Params


@dataclass
class Run:
    """What happened to one seed."""

    seed: int
    status: str
    """``"reached"``: the threshold; ``"not reached"``: after all iterations; ``"completed"``: all iterations, without a
    threshold; ``"diverged"``: the training loss was not finite at iteration ``iterations``."""
    iterations: int
    """Optimizer steps taken."""
    train_loss: list[float] = field(default_factory=list)
    """Before the first step, then after each step, or after every ``every`` steps the mean over them. The test series
    have values at the same steps."""
    test_loss: list[float] = field(default_factory=list)
    test_errors: list[int] = field(default_factory=list)
    """Misclassified test examples."""
    step_seconds: list[float] = field(default_factory=list)
    """Time of estimate and optimizer step, without evaluation; empty for seeds that share their steps."""
    every: int = 1
    """Steps between two values of a series: value i follows ``i * every`` steps, the last value all steps."""

    def end(self, num_test: int) -> tuple[float, int]:
        """Return the test loss and the number of test errors at the end of the run.

        A diverged run gets an infinite loss, and every example counts as an error: the argmax of nan is class 0, so
        examples of class 0 would count as correct.

        Args:
            num_test: size of the test set.
        """
        return (float("inf"), num_test) if self.status == "diverged" else (self.test_loss[-1], self.test_errors[-1])


@dataclass
class History:
    """The runs of one call of :func:`fwdlib.training.train`, in the order of its seeds."""

    runs: list[Run]
    params: list[Params]
    """The final parameters of each run."""
    num_test: int
    together: int
    """How many seeds shared a step; 1 if they ran one after the other."""
    seconds: float
    """Time of all steps, without evaluation."""
