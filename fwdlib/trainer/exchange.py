"""The mean of a few numbers over all processes, which forward mode differentiates like any other function.

The mean is linear, so it is its own derivative. As a part of the loss, it needs no change in any forward estimator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import handle_torch_function, has_torch_function_unary

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass, register_rule
from fwdlib.trainer.processes import prime_factors

GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14


class Exchange:
    """The mean of a small tensor over all processes.

    The processes stand in a grid whose sides are the prime factors of their number, and gather along one side after the
    other. With four processes, each sends two messages one after the other; the ring of gloo's all-reduce takes six.
    For a few numbers only the messages count. All processes add the same numbers in the same order.
    """

    def __init__(self, device: torch.device) -> None:
        self.size = dist.get_world_size()
        self._sides = prime_factors(self.size)
        names = [f"side {i}" for i in range(len(self._sides))]
        mesh = init_device_mesh(device.type, tuple(self._sides), mesh_dim_names=tuple(names))
        self._groups = [mesh.get_group(name) for name in names]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of ``values``, whose shape must be the same in all processes."""
        total = values.detach().reshape(-1)
        for side, group in zip(self._sides, self._groups, strict=True):
            rows = total.new_empty(side * len(total))
            GATHER(rows, total, group=group)
            total = rows.view(side, -1).sum(0)
        return (total / self.size).reshape(values.shape)


class _Mean(torch.autograd.Function):
    # For torch's own forward mode.
    @staticmethod
    def forward(values: Tensor, exchange: Exchange) -> Tensor:
        return exchange.mean(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Exchange], output: Tensor) -> None:
        ctx.exchange = inputs[1]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return mean_over_processes(tangent, ctx.exchange)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, values: Tensor, exchange: Exchange) -> tuple[Tensor, int | None]:
        return mean_over_processes(values, exchange), in_dims[0]


def mean_over_processes(values: Tensor, exchange: Exchange) -> Tensor:
    """Return the mean of ``values`` over all processes, differentiable in forward mode.

    The stacked engine exchanges value and derivatives together, torch's forward mode one after the other.

    Raises:
        NotImplementedError: for tangents of examples, of which each process knows only its own.
    """
    if has_torch_function_unary(values) or torch._C._len_torch_function_stack():
        return handle_torch_function(mean_over_processes, (values,), values, exchange)
    return _Mean.apply(values, exchange)


@register_rule(mean_over_processes)
def _mean_over_processes(run: Pass, values: Any, exchange: Exchange) -> Dual:
    if run.perturbation.per_example:
        raise NotImplementedError(
            "tangents of activities or of single examples cannot be shared among processes, as no process knows the "
            "examples of the others. Use tangents of the weights, such as 'rank-one'."
        )
    return Dual(exchange.mean(run.stack(values)))
