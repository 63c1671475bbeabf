"""Seeds that train at once: their parameters get a leading axis, and the estimator is vmapped over it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap
from torch.optim import Optimizer

from fwdlib.estimators import Estimator, GradientEstimate
from fwdlib.objectives import BatchLoss
from fwdlib.tangents import Params, Replicates


def single_estimate(
    estimator: Estimator, objective: BatchLoss, generators: list[torch.Generator]
) -> Callable[[Params], GradientEstimate]:
    """Return the estimator as a function of the parameters of one seed, whose generator is the only one of the list."""
    return partial(estimator, objective, **({"generator": generators[0]} if _draws(estimator) else {}))


def replicated_estimate(
    estimator: Estimator, objective: BatchLoss, generators: list[torch.Generator]
) -> Callable[[Params], GradientEstimate]:
    """Return the estimator as a function of the parameters (S, ...) of several seeds, each with its generator.

    Raises:
        ValueError: when it is called, if the model or the estimator draws numbers that are not each seed's own.
    """
    replicates, draws = Replicates(generators), _draws(estimator)

    def one(params: Params, index: Tensor) -> GradientEstimate:
        return estimator(objective, params, **({"generator": replicates.at(index)} if draws else {}))

    def every(params: Params) -> GradientEstimate:
        try:
            return vmap(one)(params, replicates.indices)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise ValueError(
                "the model or the estimator draws random numbers that cannot be each seed's own (a functional dropout, "
                "or an estimator without a keyword `generator`); pass together=False"
            ) from error

    return every


def _draws(estimator: Estimator) -> bool:
    return "generator" in inspect.signature(estimator).parameters


def keep_rows(
    params: Params, optimizer: Optimizer, make: Callable[[list[Tensor]], Optimizer], kept: list[int]
) -> tuple[Params, Optimizer]:
    """Keep some of the seeds, with an optimizer in the state that it had for them.

    Args:
        params: parameters (S, ...).
        optimizer: their optimizer, an elementwise one.
        make: makes another optimizer like it.
        kept: the rows to keep.
    """
    smaller = {name: p[kept] for name, p in params.items()}
    successor = make(list(smaller.values()))
    for before, after in zip(params.values(), smaller.values(), strict=True):
        for key, value in optimizer.state.get(before, {}).items():
            has_rows = isinstance(value, Tensor) and value.shape[:1] == before.shape[:1]
            successor.state[after][key] = value[kept] if has_rows else value
    return smaller, successor
