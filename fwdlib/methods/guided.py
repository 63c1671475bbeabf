r"""Guided tangents: the derivative of the model's loss along a direction that a local loss proposes.

A random tangent seldom points near the gradient. Fournier et al. 2023 (arXiv 2306.06968) take the gradient of a local
loss as the tangent instead, and only ask forward mode how far to go along it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fwdlib.methods.feedback import Step, hand_in
from fwdlib.methods.local_losses import LocalLosses


class GuidedForwardGradient(LocalLosses):
    r"""Project the gradient of the model's loss on that of each block's local loss (Fournier et al. 2023, section 3).

    The head of block l proposes the gradient :math:`g_l = W_l^T e_l` of its local loss, for each example. It enters
    behind the block as a tangent of its own, and one forward pass gives the derivatives :math:`s_l` of the example's
    loss along all of them.

    .. math:: \delta_l = \frac{s_l}{|g_l|^2}\, g_l

    is the orthogonal projection of the example's gradient by the outputs of block l onto :math:`g_l`. The readout's
    gradient is exact.

    Bias: what is orthogonal to the proposal is missing. Variance: only that of the batch; there is no random tangent.

    Cost: one forward pass in which each block adds a tangent for the blocks behind it, the heads, and the products of
    the weights' gradients.

    BatchNorm in training mode mixes the examples; the derivative of an example's loss leaves out its effect on others.

    Args:
        model: made of blocks; see :func:`~fwdlib.methods.blocks.blocks_of`. Hidden blocks return (B, units) or
            (B, channels, height, width). Inside a block, the derivative is autograd's.
        inputs: a batch for the model, or a part of one.
        optimizer: of the heads.
        grid: see :class:`~fwdlib.methods.local_losses.LocalBackprop`.
        head: see :class:`~fwdlib.methods.local_losses.LocalBackprop`.
        recorded: see :class:`~fwdlib.methods.feedback.DirectFeedbackAlignment`.

    Raises:
        ValueError: if an argument is out of its range, the model does not show its blocks, or a hidden block returns
            anything but units or images.
    """

    def _evaluate(self, step: Step) -> tuple[Tensor, ...]:
        *hidden, readout = step.network.blocks
        activation, tangents = step.inputs, None
        outputs, proposals, gradients = [], [], []
        for row, (block, weight, side) in enumerate(zip(hidden, self._by_site(step.matrix), self._sides, strict=True)):
            (output,), tangents = block.run(step.tensors, activation, tangents, [None])
            activation = output.detach()
            error, of_head = self._head(step, activation, weight, side)
            proposal = self._gradient(error, activation, weight, side)
            outputs.append(output)
            proposals.append(proposal)
            gradients.append(of_head)
            own = proposal.new_zeros(len(hidden), *proposal.shape)
            own[row] = proposal
            tangents = own if tangents is None else tangents + own
        (logits,), tangents = readout.run(step.tensors, activation, tangents, [None])
        along = step.inputs.new_zeros(0, len(step.inputs))

        def deltas(error: Tensor) -> list[Tensor]:
            nonlocal along
            along = (error * tangents).flatten(2).sum(2)  # (blocks, B)
            return [_projected(s, proposal) for s, proposal in zip(along, proposals, strict=True)]

        loss, grads = hand_in(step, deltas, [*outputs, logits])
        return loss, along, torch.cat(gradients, 1), *grads


def _projected(along: Tensor, proposal: Tensor) -> Tensor:
    # The projection on the proposal (B, ...) of a gradient whose products with it are ``along`` (B,); zero where it is.
    square = proposal.square().flatten(1).sum(1)
    scale = torch.where(square > 0, along / square.clamp_min(torch.finfo(square.dtype).tiny), 0)
    return scale.reshape(-1, *[1] * (proposal.dim() - 1)) * proposal
