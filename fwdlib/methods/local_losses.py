r"""Training by local losses: each hidden block has a loss of its own, so no derivative passes between blocks.

A model is a chain of blocks, :math:`a_l = f_l(a_{l-1})`, as in :mod:`fwdlib.methods.feedback`. Each hidden block gets a
head :math:`W_l`, which predicts the classes from the block's output alone. Block and head learn from the loss of this
prediction; the input of the block is a constant for them. The readout of the model learns from the model's loss.

The outputs of a block are divided into parts: groups of channels and, for images, patches. Each part has a copy of the
loss of its own, in which the values of the other parts are constants (*replicated feature aggregation*, Ren et al.
2023, arXiv 2210.03310, section 4). All copies have the same value and are computed once. Because each part has its own
derivative, a forward gradient of it has the noise of the units of the part, and not of the layer.

================================ =================================================== ==================================
rule                             gradient of a unit's output                         noise
================================ =================================================== ==================================
:class:`LocalBackprop`           that of the local loss, :math:`W_l^T e_l`           none
:class:`LocalForwardGradient`    :math:`s u`: its sign u, and s the derivative of    that of the units of its part; none
                                 the part's loss along the signs of the part         for one unit in each part
================================ =================================================== ==================================

The head is linear, so the derivative of a part's loss is the part of the derivative of the block's loss: dividing into
parts changes the noise alone, and with exact gradients (*LG-BP* of the paper) nothing. Inside a block, the derivative
from its output to its own parameters is autograd's. A block with one layer of weights passes no error through any
weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlib.checks import check_choice, check_count
from fwdlib.methods.blocks import ErrorsOfBlocks, Network
from fwdlib.methods.feedback import ADAM, LearnedFeedback
from fwdlib.objectives import check_scalar
from fwdlib.tangents import AnyGenerator, Params, random_signs
from fwdlib.training import MakeOptimizer

HEADS = ("grid", "mean")


class LocalBackprop(LearnedFeedback):
    r"""Train each block by the exact gradient of its own local loss: *L-BP* of Ren et al. 2023.

    .. math:: \delta_l = W_l^T e_l, \qquad \nabla W_l = e_l\, \phi_l^T

    where :math:`\phi_l` are the features that the head reads: the block's outputs, or for images their means over the
    patches. :math:`e_l` is the derivative of the loss by the logits :math:`W_l \phi_l`. The heads start at zero.

    Bias: none for the local losses. For the loss of the model, the difference between these and it. Variance: only that
    of the batch.

    Cost: one forward pass, the heads, and the products of the weights' gradients: two thirds of backprop's products.
    Activations are kept for one block at a time at least; autograd keeps all, as by backprop.

    Args:
        model: made of blocks; see :func:`~fwdlib.methods.blocks.blocks_of`. Hidden blocks return (B, units) or
            (B, channels, height, width).
        inputs: a batch for the model, or a part of one.
        optimizer: of the heads: from a list of tensors to an optimizer; default Adam at 1e-4.
        grid: an image is cut into at most ``grid`` x ``grid`` patches of one size: for each block the largest number
            that divides the sides of its output.
        head: ``"grid"``, a weight for each patch and channel; ``"mean"``, one for each channel, shared by the patches
            as in Ren et al.
        recorded: see :class:`~fwdlib.methods.feedback.DirectFeedbackAlignment`.

    Raises:
        ValueError: if an argument is out of its range, the model does not show its blocks, or a hidden block returns
            anything but units or images.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> estimator = LocalBackprop(model, torch.zeros(2, 4))
        >>> [tuple(head.shape) for head in estimator.feedback]
        [(3, 8, 1)]
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        *,
        optimizer: MakeOptimizer = ADAM,
        grid: int = 1,
        head: str = HEADS[0],
        recorded: bool = False,
    ) -> None:
        self.grid = check_count("grid", grid)
        self.head = check_choice("head", head, HEADS)
        super().__init__(model, inputs, optimizer=optimizer, recorded=recorded)

    def _feedback_shapes(self, shapes: list[torch.Size]) -> list[torch.Size]:
        # (channels, patches) of the head's weight; also keeps the shapes of the outputs and the patches along a side.
        self._outputs = shapes
        self._sides = [_side(shape, self.grid) for shape in shapes]
        return [
            torch.Size((shape[0], side**2 if self.head == "grid" else 1))
            for shape, side in zip(shapes, self._sides, strict=True)
        ]

    def _evaluate(
        self,
        network: Network,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        u: Tensor,
        matrix: Tensor,
        alpha: float | Tensor,
        leaves: Params,
        tensors: Params | None,
    ) -> tuple[Tensor, ...]:
        # As DirectFeedbackAlignment: the loss, the derivatives along u, and the gradients of heads and leaves.
        *hidden, logits = network.run(tensors, inputs, [None] * len(self._shapes))[0]
        deltas, gradients = [], []
        along = inputs.new_zeros(len(u), len(inputs))
        signs = u.split_with_sizes([shape.numel() for shape in self._outputs], -1) if len(u) else [u] * len(hidden)
        heads = self._by_block(matrix)
        for block, output, weight, side, signs_of in zip(
            network.blocks[:-1], hidden, heads, self._sides, signs, strict=True
        ):
            values = output.detach()
            features = _means(values, side)  # (B, channels, patches)
            if self.head == "mean":
                features = features.mean(-1, keepdim=True)
            error = _error(loss_of, features.flatten(1) @ weight.flatten(1).t(), targets)
            gradients.append(error.t() @ features.flatten(1))
            is_live = values != 0 if block.ends_in_relu else None
            delta, slopes = self._delta(error, weight, side, values, signs_of, is_live)
            deltas.append(delta)
            along = along + slopes
        with torch.enable_grad():
            loss = check_scalar(loss_of(ErrorsOfBlocks.apply(lambda error: deltas, logits, *hidden), targets))
            grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return loss.detach(), along, torch.cat(gradients, 1), *grads

    def _delta(
        self,
        error: Tensor,
        weight: Tensor,
        side: int,
        values: Tensor,
        signs: Tensor,
        is_live: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        # The gradient that the outputs of a block get, and the derivatives of the examples' losses along the signs.
        of_features = (error @ weight.flatten(1)).reshape(len(error), *weight.shape[1:])
        num_patches = side**2
        of_features = of_features.expand(-1, -1, num_patches) / (values[0, 0].numel() // num_patches)
        if self.head == "mean":
            of_features = of_features / num_patches
        return _spread(of_features, side, values.shape[1:]), error.new_zeros(len(signs), len(error))


class LocalForwardGradient(LocalBackprop):
    r"""Train each block by a forward gradient of its local loss: *LG-FG-A* of Ren et al. 2023, activity perturbation.

    Signs :math:`u`, independent for each unit and example, perturb the outputs of every hidden block. They go through
    the head of the block and no further. For each part p of the outputs, :math:`s_p = e_l \cdot W_{l,p} u_p` is the
    derivative of the part's loss, and

    .. math:: \delta_i = \frac{1}{K} \sum_k s_{p(i)}\, u_i

    estimates that of its units. A unit behind a ReLU whose output is 0 is not perturbed, as in the paper.

    Bias: none for the local losses. Variance, for one tangent and a part whose q units have the derivatives v:
    :math:`|v|^2 - v_i^2` for unit i. With one unit in each part it is zero, because :math:`u^2 = 1`.

    Cost: that of :class:`LocalBackprop`; the tangents go through the heads alone.

    Args:
        model: made of blocks; see :func:`~fwdlib.methods.blocks.blocks_of`. Hidden blocks return (B, units) or
            (B, channels, height, width).
        inputs: a batch for the model, or a part of one.
        num_groups: groups of channels: for each block the largest number up to this one that divides its channels. As
            many as there are channels make a group of each.
        num_tangents: K.
        optimizer: of the heads.
        grid: see :class:`LocalBackprop`; each patch of each group is a part.
        head: see :class:`LocalBackprop`.
        recorded: see :class:`~fwdlib.methods.feedback.DirectFeedbackAlignment`.

    Raises:
        ValueError: if an argument is out of its range, the model does not show its blocks, or a hidden block returns
            anything but units or images.

    Example:
        >>> from fwdlib import BatchLoss, params_of
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> estimator = LocalForwardGradient(model, torch.zeros(2, 4), num_groups=4)
        >>> objective = BatchLoss(model, torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 2]))
        >>> estimator(objective, params_of(model)).jvps.shape
        torch.Size([1])
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        *,
        num_groups: int = 100,
        num_tangents: int = 1,
        optimizer: MakeOptimizer = ADAM,
        grid: int = 1,
        head: str = HEADS[0],
        recorded: bool = False,
    ) -> None:
        self.num_groups = check_count("num_groups", num_groups)
        self.num_tangents = check_count("num_tangents", num_tangents)
        super().__init__(model, inputs, optimizer=optimizer, grid=grid, head=head, recorded=recorded)

    def _draw(self, num_examples: int, generator: AnyGenerator) -> Tensor:
        num_units = sum(shape.numel() for shape in self._outputs)
        return random_signs((self.num_tangents, num_examples, num_units), self.matrix.detach(), generator)

    def _delta(
        self,
        error: Tensor,
        weight: Tensor,
        side: int,
        values: Tensor,
        signs: Tensor,
        is_live: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        channels, num_patches = values.shape[1], side**2
        num_groups = _divisor(self.num_groups, channels)
        u = signs.reshape(len(signs), *values.shape)
        if is_live is not None:
            u = u * is_live
        means = _means(u.flatten(0, 1), side).unflatten(1, (num_groups, -1))  # (K B, groups, channels, patches)
        if self.head == "mean":
            means = means / num_patches
        parts = weight.unflatten(1, (num_groups, -1)).expand(-1, -1, -1, num_patches)
        d = torch.einsum("ngcp,ogcp->ngpo", means, parts).unflatten(0, (len(signs), -1))  # tangents of the logits
        slopes = (d * error[:, None, None]).sum(-1)  # (K, B, groups, patches)
        weights = slopes.unsqueeze(3).expand(-1, -1, -1, channels // num_groups, -1).flatten(2, 3)
        weights = _spread(weights.flatten(0, 1), side, values.shape[1:]).reshape(u.shape)
        return (weights * u).mean(0), slopes.flatten(2).sum(2)


def _error(loss_of: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    # The derivative of the loss by the logits (B, classes).
    logits = logits.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(check_scalar(loss_of(logits, targets)), logits)[0]


def _divisor(most: int, *sizes: int) -> int:
    # The largest number up to ``most`` that divides all sizes.
    return next(n for n in range(min(most, *sizes), 0, -1) if not any(size % n for size in sizes))


def _side(shape: torch.Size, most: int) -> int:
    # Patches along each side of an output of this shape, without the batch.
    if len(shape) == 1:
        return 1
    if len(shape) != 3:
        raise ValueError(
            f"local losses need hidden blocks that return (B, units) or (B, channels, height, width), and one returns "
            f"(B, {', '.join(map(str, shape))}): put the axis of the features first, or flatten"
        )
    return _divisor(most, *shape[1:])


def _means(x: Tensor, side: int) -> Tensor:
    # The means over the patches, (N, channels, patches).
    if x.dim() == 2:
        return x.unsqueeze(2)
    return F.avg_pool2d(x, (x.shape[2] // side, x.shape[3] // side)).flatten(2)


def _spread(x: Tensor, side: int, shape: torch.Size) -> Tensor:
    # (N, channels, patches) -> (N, *shape): the value of its patch at each position.
    if len(shape) == 1:
        return x.squeeze(2)
    rows, columns = shape[1] // side, shape[2] // side
    cells = x.reshape(*x.shape[:2], side, 1, side, 1).expand(-1, -1, -1, rows, -1, columns)
    return cells.reshape(len(x), *shape)
