"""Training steps that several processes share, each kind with another amount to exchange.

=================== ================================================================================================
method              what a process exchanges
=================== ================================================================================================
DDP                 all gradients, each step (torch's DistributedDataParallel)
PowerSGD, rank r    two thin factors of each gradient matrix, each step, and the vectors as they are: Vogels et al.
                    2019, arXiv 1905.13727, torch's own hook, with error feedback and warm start. The first two steps
                    exchange all gradients, as the hook demands
local SGD, H steps  all parameters, after H steps of its own: Stich 2019, arXiv 1805.09767, torch's own averager
rank-one, K = k     k directional derivatives and the loss, each step
no exchange         nothing: each process trains by itself, on its own share
=================== ================================================================================================

All take plain SGD steps on the mean loss of the processes' shares. Local SGD steps on its own share, and so does a
process without exchange.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from fwdlib.estimators import forward_gradient
from fwdlib.objectives import BatchLoss, params_of
from fwdlib.trainer.distributed import data_parallel
from fwdlib.trainer.processes import Processes

POWER_SGD = "PowerSGD, rank {}"
LOCAL_SGD = "local SGD, {} steps"
RANK_ONE = "rank-one, K = {}"
NO_EXCHANGE = "no exchange"
METHODS = (
    "DDP",
    *map(POWER_SGD.format, (1, 4)),
    *map(LOCAL_SGD.format, (10, 100, 1000)),
    *map(RANK_ONE.format, (1, 16, 64)),
    NO_EXCHANGE,
)

Step = Callable[[Tensor, Tensor], None]


def period(method: str) -> int:
    """Return after how many steps the processes have the same parameters again; 1 if they never have.

    Example:
        >>> period("local SGD, 100 steps"), period("DDP")
        (100, 1)
    """
    return _number(method) if method.startswith("local SGD") else 1


def make_step(method: str, model: nn.Module, learning_rate: float, processes: Processes) -> Step:
    """Return a step on a process's own share of a batch, inputs and targets.

    Args:
        method: one of :data:`METHODS`, or one like it with another number.
        model: trained in place; the same in all processes.
        learning_rate: of plain SGD.
        processes: what :func:`fwdlib.trainer.distributed.joined` yields.

    Raises:
        ValueError: if the method is unknown.
    """
    if method == NO_EXCHANGE:
        return _backward(model, model, learning_rate)
    if method.startswith("rank-one"):
        return _forward(model, learning_rate, processes, _number(method))
    if method.startswith("local SGD"):
        averager = PeriodicModelAverager(_number(method), warmup_steps=0)
        plain = _backward(model, model, learning_rate)

        def local(inputs: Tensor, targets: Tensor) -> None:
            plain(inputs, targets)
            averager.average_parameters(model.parameters())

        averager.step = 1  # it averages when its count of steps is a multiple, and counts the first as none
        return local
    if method != "DDP" and not method.startswith("PowerSGD"):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    # The hook starts exchanges of one bucket while those of another run, and gloo does not keep their order.
    buckets = {} if method == "DDP" else {"bucket_cap_mb": 10_000}
    wrapped = data_parallel(model, **buckets)
    if method != "DDP":
        state = PowerSGDState(None, matrix_approximation_rank=_number(method), start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, powerSGD_hook)
    return _backward(wrapped, model, learning_rate)


def _backward(called: nn.Module, model: nn.Module, learning_rate: float) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(called(inputs), targets).backward()
        optimizer.step()

    return step


def _forward(model: nn.Module, learning_rate: float, processes: Processes, num_tangents: int) -> Step:
    params = params_of(model)

    @torch.no_grad()
    def step(inputs: Tensor, targets: Tensor) -> None:
        objective = BatchLoss(model, inputs, targets, processes.loss)
        estimate = forward_gradient(objective, params, num_tangents=num_tangents, tangents="rank-one")
        estimate.grads.add_to_(params, -learning_rate)

    return step


def _number(method: str) -> int:
    return int(re.findall(r"\d+", method)[-1])
