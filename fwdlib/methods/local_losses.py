r"""Training by local losses: each hidden block learns from a loss of its own.

A model is a chain of blocks, :math:`a_l = f_l(a_{l-1})`, as in :mod:`fwdlib.methods.feedback`. Each hidden block gets a
head :math:`W_l`, which predicts the classes from the block's output alone, and its loss. The readout of the model
learns from the model's loss and passes nothing on. The rules differ in what else a block learns from:

============================== ======= ====================================== ============================
rule                           paper   a block learns from                    noise
============================== ======= ====================================== ============================
:class:`LocalBackprop`         L-BP    its own loss and, as errors pass from  none
                                       block to block, those of later blocks
:class:`LocalGreedyBackprop`   LG-BP   its own loss, by its exact gradient    none
:class:`LocalForwardGradient`  LG-FG-A its own loss, by a forward gradient    that of the units of a part;
                                                                              none for one unit in each
============================== ======= ====================================== ============================

The outputs of a block are divided into parts: groups of channels and, for images, patches. Each part has a copy of the
loss of its own, in which the values of the other parts are constants (*replicated feature aggregation*, Ren et al.
2023, arXiv 2210.03310, section 4). All copies have the same value and are computed once. Because each part has its own
derivative, a forward gradient of it has the noise of the units of the part, and not of the layer. The head is linear,
so the derivative of a part's loss is the part of the derivative of the block's loss: with exact gradients, dividing
into parts changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlib.checks import check_choice, check_count
from fwdlib.methods.feedback import ADAM, LearnedFeedback, Step, hand_in
from fwdlib.objectives import check_scalar
from fwdlib.tangents import AnyGenerator, random_signs
from fwdlib.training import MakeOptimizer

HEADS = ("grid", "mean")


class LocalLosses(LearnedFeedback):
    """The base of the rules: heads of the hidden blocks, which start at zero and learn by an optimizer of their own."""

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

    def _feedback_shapes(self, sites: list[list[torch.Size]]) -> list[torch.Size]:
        # (channels, patches) of the weight of each block's head; also keeps the sites and the patches along a side.
        self._sites = sites
        self._sides = [_side(of_block[-1], self.grid) for of_block in sites]
        return [
            torch.Size((of_block[-1][0], side**2 if self.head == "grid" else 1))
            for of_block, side in zip(sites, self._sides, strict=True)
        ]

    def _features(self, output: Tensor, side: int) -> Tensor:
        # What the head reads, (B, channels, patches).
        means = _means(output, side)
        return means.mean(-1, keepdim=True) if self.head == "mean" else means

    def _logits(self, output: Tensor, weight: Tensor, side: int) -> tuple[Tensor, Tensor]:
        # The features (B, all), and what the head makes of them (B, classes).
        features = self._features(output, side).flatten(1)
        return features, features @ weight.flatten(1).t()

    def _head(self, step: Step, output: Tensor, weight: Tensor, side: int) -> tuple[Tensor, Tensor]:
        # The error of the head's logits (B, classes), and the gradient of its weight (classes, all features).
        features, logits = self._logits(output, weight, side)
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            (error,) = torch.autograd.grad(check_scalar(step.loss_of(logits, step.targets)), logits)
        return error, error.t() @ features

    def _gradient(self, error: Tensor, output: Tensor, weight: Tensor, side: int) -> Tensor:
        # Of the local loss by the block's outputs.
        of_features = (error @ weight.flatten(1)).reshape(len(error), *weight.shape[1:])
        num_patches = side**2
        of_features = of_features.expand(-1, -1, num_patches) / (output[0, 0].numel() // num_patches)
        if self.head == "mean":
            of_features = of_features / num_patches
        return _spread(of_features, side, output.shape[1:])


class LocalBackprop(LocalLosses):
    """Train all blocks by the exact gradient of the sum of the local losses: *L-BP* of Ren et al. 2023.

    Errors pass from block to block, so that a block also learns for those behind it: the heads help backprop, they do
    not replace it.

    Bias: none for the sum of the losses. Variance: only that of the batch.

    Cost: that of backprop, and the heads.

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
    """

    def _evaluate(self, step: Step) -> tuple[Tensor, ...]:
        matrix = step.matrix.detach().requires_grad_()
        *hidden, readout = step.network.blocks
        activation, total = step.inputs, 0
        with torch.enable_grad():
            for block, weight, side in zip(hidden, self._by_site(matrix), self._sides, strict=True):
                (activation,), _ = block.run(step.tensors, activation, None, [None])
                _, logits = self._logits(activation, weight, side)
                total = total + check_scalar(step.loss_of(logits, step.targets))
            (logits,), _ = readout.run(step.tensors, activation.detach(), None, [None])
            loss = check_scalar(step.loss_of(logits, step.targets))
            grads = torch.autograd.grad(total + loss, [*step.leaves.values(), matrix], materialize_grads=True)
        return loss.detach(), loss.new_zeros(0, len(step.inputs)), grads[-1], *grads[:-1]


class LocalGreedyBackprop(LocalLosses):
    r"""Train each block by the exact gradient of its own local loss alone: *LG-BP* of Ren et al. 2023.

    .. math:: \delta_l = W_l^T e_l, \qquad \nabla W_l = e_l\, \phi_l^T

    where :math:`\phi_l` are the features that the head reads: the block's outputs, or for images their means over the
    patches. :math:`e_l` is the derivative of the loss by the logits :math:`W_l \phi_l`. No derivative passes between
    blocks. Inside a block, the derivative is autograd's; a block with one layer of weights passes no error through any
    weight.

    Bias: none for the local losses. For the loss of the model, the difference between these and it. Variance: only that
    of the batch.

    Cost: one forward pass, the heads, and the products of the weights' gradients: two thirds of backprop's products.
    Activations are kept for one block at a time at least; autograd keeps all, as by backprop.

    Args:
        model: see :class:`LocalBackprop`, and for the other arguments and errors, too.
        inputs: a batch for the model, or a part of one.
        optimizer: of the heads.
        grid: patches.
        head: ``"grid"`` or ``"mean"``.
        recorded: replay the kernels.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> estimator = LocalGreedyBackprop(model, torch.zeros(2, 4))
        >>> [tuple(head.shape) for head in estimator.feedback]
        [(3, 8, 1)]
    """

    def _evaluate(self, step: Step) -> tuple[Tensor, ...]:
        *hidden, readout = step.network.blocks
        activation, outputs, deltas, gradients = step.inputs, [], [], []
        along = step.inputs.new_zeros(len(step.u), len(step.inputs))
        heads = self._by_site(step.matrix)
        for block, weight, side, entering in zip(hidden, heads, self._sides, self._entering(step.u), strict=True):
            found, tangents = block.run(step.tensors, activation, None, entering, live_only=True)
            activation = found[-1].detach()
            error, of_head = self._head(step, activation, weight, side)
            gradients.append(of_head)
            keeps = [*block.layers.values(), True]
            of_sites, slopes = self._errors(error, weight, side, tangents, activation, entering, keeps)
            outputs, deltas, along = outputs + found, deltas + of_sites, along + slopes
        (logits,), _ = readout.run(step.tensors, activation, None, [None])
        loss, grads = hand_in(step, lambda error: deltas, [*outputs, logits])
        return loss, along, torch.cat(gradients, 1), *grads

    def _entering(self, u: Tensor) -> list[list[Tensor | None]]:
        # For each block what enters at its sites. With one item, the block has one site, its output.
        return [[None]] * len(self._sites)

    def _errors(
        self,
        error: Tensor,
        weight: Tensor,
        side: int,
        tangents: Tensor | None,
        output: Tensor,
        entering: Sequence[Tensor | None],
        keeps: list[bool],
    ) -> tuple[list[Tensor], Tensor]:
        # The error of each site, and the derivatives (K, B) of the examples' losses along all signs.
        return [self._gradient(error, output, weight, side)], error.new_zeros(0, len(error))


class LocalForwardGradient(LocalGreedyBackprop):
    r"""Train each block by a forward gradient of its own local loss: *LG-FG-A* of Ren et al. 2023.

    Signs :math:`u`, independent for each unit and example, perturb the outputs of every hidden block and of its inner
    layers, if it names any. They go forward to the head of their block and no further. For each part p of the outputs,
    :math:`s_p = e_l \cdot W_{l,p}\, \dot a_{l,p}` is the derivative of the part's loss, where :math:`\dot a` are the
    tangents of the block's outputs, and

    .. math:: \delta_i = \frac{1}{K} \sum_k s_{p(i)}\, u_i

    estimates that of its units. A unit of an inner layer that acts on several parts gets the sum of all :math:`s_p` of
    its block. A unit behind a ReLU whose output is 0 is not perturbed, as in the paper.

    Bias: none for the local losses. Variance, for one tangent, a block of one layer and a part whose q units have the
    derivatives v: :math:`|v|^2 - v_i^2` for unit i. With one unit in each part it is zero, because :math:`u^2 = 1`.

    Cost: that of :class:`LocalGreedyBackprop` for blocks of one layer, whose tangents go through the heads alone;
    otherwise also a forward pass with tangents behind the first layer of each block.

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
        num_units = sum(shape.numel() for of_block in self._sites for shape in of_block)
        return random_signs((self.num_tangents, num_examples, num_units), self.matrix.detach(), generator)

    def _entering(self, u: Tensor) -> list[list[Tensor | None]]:
        pieces = iter(u.split_with_sizes([shape.numel() for of_block in self._sites for shape in of_block], -1))
        return [[next(pieces).reshape(*u.shape[:2], *shape) for shape in of_block] for of_block in self._sites]

    def _errors(
        self,
        error: Tensor,
        weight: Tensor,
        side: int,
        tangents: Tensor,
        output: Tensor,
        entering: Sequence[Tensor],
        keeps: list[bool],
    ) -> tuple[list[Tensor], Tensor]:
        num_groups = _divisor(self.num_groups, output.shape[1])
        means = _means(tangents.flatten(0, 1), side)  # (K B, channels, patches)
        if self.head == "mean":
            means, weight = means / side**2, weight.expand(-1, -1, side**2)
        of_parts, head = (_by_part(x, num_groups) for x in (means, weight))
        d = torch.bmm(of_parts, head.transpose(1, 2)).unflatten(1, (len(tangents), -1))  # tangents of the logits
        slopes = (d * error).sum(-1)  # (parts, K, B)
        of_all = slopes.sum(0)
        deltas = []
        for u, is_kept in zip(entering, keeps, strict=True):
            if is_kept:
                delta = _cut(u, num_groups, side) * slopes.movedim(0, 2).reshape(
                    *u.shape[:2], num_groups, 1, side, 1, side, 1
                )
            else:
                delta = u * of_all.reshape(*u.shape[:2], *[1] * (u.dim() - 2))
            deltas.append((delta[0] if len(u) == 1 else delta.mean(0)).reshape(u.shape[1:]))
        return deltas, of_all


def _by_part(x: Tensor, num_groups: int) -> Tensor:
    # (N, channels, patches) -> (groups and patches, N, channels of a group), contiguous as a product wants it
    return x.unflatten(1, (num_groups, -1)).permute(1, 3, 0, 2).flatten(0, 1).contiguous()


def _cut(u: Tensor, num_groups: int, side: int) -> Tensor:
    # (K, B, channels, ...) -> (K, B, groups, channels of a group, side, rows, side, columns), a view
    rows, columns = (u.shape[3] // side, u.shape[4] // side) if u.dim() == 5 else (1, 1)
    return u.reshape(*u.shape[:2], num_groups, -1, side, rows, side, columns)


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
