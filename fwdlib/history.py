"""What a training run leaves behind: plain data, so that records and figures need no training loop."""

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
    """``"reached"`` the threshold; ``"not reached"`` after all iterations; ``"completed"`` them, there being no
    threshold; ``"diverged"``: the training loss was not finite at iteration ``iterations``."""
    iterations: int
    """Optimizer steps taken."""
    train_loss: list[float] = field(default_factory=list)
    """Before the first step and after each (or each ``every``): then the mean since the value before. The test series
    alike, at that step."""
    test_loss: list[float] = field(default_factory=list)
    test_errors: list[int] = field(default_factory=list)
    """Misclassified test examples."""
    step_seconds: list[float] = field(default_factory=list)
    """Time of estimate + optimizer step, evaluation excluded; empty for a seed of a stack, whose steps are shared."""
    every: int = 1
    """Steps between two values of a series: value i is that after ``i * every`` steps, the last that after all."""

    def end(self, num_test: int) -> tuple[float, int]:
        """Return the test loss and errors that the run ended with.

        One that has diverged gets an infinite loss and everything wrong: the argmax of nan is class 0, and what happens
        to be of class 0 is not a success.

        Args:
            num_test: size of the test set.
        """
        return (float("inf"), num_test) if self.status == "diverged" else (self.test_loss[-1], self.test_errors[-1])


@dataclass
class History:
    """The runs of one call of :func:`fwdlib.training.train`, in the order of its seeds."""

    runs: list[Run]
    params: list[Params]
    """The parameters that each run ended with."""
    num_test: int
    stack_size: int
    """How many seeds shared a step; 1 where they ran one after the other."""
    seconds: float
    """All steps together, evaluation excluded."""
