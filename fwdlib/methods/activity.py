r"""Activity perturbation: forward gradients by the outputs of the hidden blocks, alone or with a control variate.

Random signs enter behind every hidden block, as in :mod:`fwdlib.methods.feedback`, and one forward pass gives the
derivative s of each example's loss along all of them. Their noise is that of the units, and not of the weights.

====================================== ==================================================== ============
rule                                   the error of block l                                 from
====================================== ==================================================== ============
:class:`ActivityForwardGradient`       :math:`s\, u_l`                                      Ren et al.
:class:`ControlVariateForwardGradient` :math:`B_l^T e + (s - p)\, u_l`, where p is what     this project
                                       FDFA's feedback predicts of s
====================================== ==================================================== ============
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fwdlib.checks import check_choice, check_count, check_fraction
from fwdlib.methods.feedback import ADAM, DirectFeedbackAlignment, ForwardDirectFeedbackAlignment
from fwdlib.tangents import AnyGenerator, random_signs
from fwdlib.training import MakeOptimizer

WEIGHTS = ("example", "batch")


class ControlVariateForwardGradient(ForwardDirectFeedbackAlignment):
    r"""Add a forward gradient of the residual to FDFA's estimate: of the part that its feedback does not predict.

    The pass of :class:`~fwdlib.methods.feedback.ForwardDirectFeedbackAlignment` also gives, for each example, the
    derivative of its loss along all tangents, :math:`s = \sum_l \delta_l \cdot u_l`. The feedback predicts
    :math:`p = \sum_l (B_l^T e) \cdot u_l`, so

    .. math:: \delta_l \approx B_l^T e + \alpha\, (s - p)\, u_l

    averaged over the K tangents, is an activity-perturbed forward gradient with the feedback as its control variate.

    Bias: none for :math:`\alpha = 1`, with any feedback; else (1 - alpha) times FDFA's. Second moment of the added
    term for rademacher tangents: :math:`\alpha^2 n_l |r|^2` for each example, K = 1, where :math:`r_l = \delta_l -
    B_l^T e` is the residual of all hidden units together and n_l the units of block l. Without feedback, the residual
    is the gradient itself, and the rule is that of Ren et al. 2022, at the outputs of the activations.

    Cost: that of FDFA. No extra pass.

    BatchNorm in training mode mixes the examples, and s of an example does not contain the effect of its activations on
    the losses of the others. ``weights="example"`` leaves this effect out: a small bias. ``weights="batch"`` weights
    all examples with the derivative of the whole loss: no bias, and about B times the variance.

    Args:
        model: made of blocks; see :func:`~fwdlib.methods.blocks.blocks_of`.
        inputs: a batch for the model.
        optimizer: of the feedback.
        num_tangents: K.
        tangents: ``"rademacher"`` or ``"normal"``.
        alpha: weight of the residual; 0 is FDFA.
        alpha_decay: the factor of alpha after each estimate.
        weights: ``"example"`` or ``"batch"``.
        recorded: see :class:`~fwdlib.methods.feedback.DirectFeedbackAlignment`.

    Raises:
        ValueError: if an argument is out of its range, or the model does not show its blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        *,
        optimizer: MakeOptimizer = ADAM,
        num_tangents: int = 1,
        tangents: str = "rademacher",
        alpha: float = 1.0,
        alpha_decay: float = 1.0,
        weights: str = "example",
        recorded: bool = False,
    ) -> None:
        self._first_alpha = check_fraction("alpha", alpha)
        self.alpha_decay = check_fraction("alpha_decay", alpha_decay)
        self.weights = check_choice("weights", weights, WEIGHTS)
        options = {"optimizer": optimizer, "num_tangents": num_tangents, "tangents": tangents, "recorded": recorded}
        super().__init__(model, inputs, **options)

    def reset(self, seed: int = 0) -> None:
        """Start again: all feedback zero, alpha as it was given."""
        super().reset(seed)
        self.alpha = self._first_alpha

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the feedback, that of its optimizer, and alpha."""
        return super().state_dict() | {"alpha": self.alpha}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.alpha = state["alpha"]

    def _deltas(self, matrix: Tensor, error: Tensor, along: Tensor, u: Tensor, alpha: float | Tensor) -> Tensor:
        deltas = super()._deltas(matrix, error, along, u, alpha)
        residual = along - (deltas * u).sum(2)  # (K, B)
        return deltas + _forward_gradient(residual * alpha, u, self.weights)

    def _learn(self, feedback_gradient: Tensor | None) -> None:
        super()._learn(feedback_gradient)
        self.alpha *= self.alpha_decay


class ActivityForwardGradient(DirectFeedbackAlignment):
    r"""Perturb the activities: *FG-A*, the forward gradient of Ren et al. 2023 (arXiv 2210.03310, section 3).

    Signs :math:`u_l`, independent for each unit and example, enter behind every hidden block in one forward pass, which
    gives the derivative s of each example's loss along all of them.

    .. math:: \delta_l = s\, u_l

    averaged over the K tangents. It is :class:`ControlVariateForwardGradient` without feedback. A unit behind a ReLU
    whose output is 0 is not perturbed, as in the paper: it has no gradient.

    Bias: none. Second moment: that of the control variate, where the residual is the whole gradient and n counts the
    units that are not switched off. The stacked engine's ``"activity"`` tangents enter in front of the activations.

    Cost: one forward pass with tangents behind the first block, and the products of the weights' gradients.

    For BatchNorm in training mode and ``weights`` see :class:`ControlVariateForwardGradient`.

    Args:
        model: made of blocks; see :func:`~fwdlib.methods.blocks.blocks_of`.
        inputs: a batch for the model.
        num_tangents: K.
        weights: ``"example"`` or ``"batch"``.
        recorded: see :class:`~fwdlib.methods.feedback.DirectFeedbackAlignment`.

    Raises:
        ValueError: if an argument is out of its range, or the model does not show its blocks.
    """

    live_only = True

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        *,
        num_tangents: int = 1,
        weights: str = "example",
        recorded: bool = False,
    ) -> None:
        self.num_tangents = check_count("num_tangents", num_tangents)
        self.weights = check_choice("weights", weights, WEIGHTS)
        super().__init__(model, inputs, recorded=recorded)

    def reset(self, seed: int = 0) -> None:
        """Start again. There is no feedback."""
        self.matrix.zero_()

    def _draw(self, num_examples: int, generator: AnyGenerator) -> Tensor:
        return random_signs((self.num_tangents, num_examples, sum(self._sizes)), self.matrix.detach(), generator)

    def _deltas(self, matrix: Tensor, error: Tensor, along: Tensor, u: Tensor, alpha: float | Tensor) -> Tensor:
        return _forward_gradient(along, u, self.weights)


def _forward_gradient(along: Tensor, u: Tensor, weights: str) -> Tensor:
    # The mean over the tangents u (K, B, units), weighted with the derivatives (K, B) along them.
    if weights == "batch":
        along = along.sum(1, keepdim=True).expand_as(along)
    return (along.unsqueeze(2) * u).mean(0)
