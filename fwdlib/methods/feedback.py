r"""Training by direct feedback: each hidden layer gets the error of the output through a matrix of its own.

A model is a chain of blocks, :math:`a_l = f_l(a_{l-1})`, each ending in an activation. The last one, the readout, gives
the logits y. Backprop carries the error e, the derivative of the loss by y, back through all blocks. Here block l gets

.. math:: \delta_l = B_l^T e \qquad\text{instead of}\qquad \delta_l = (\partial y / \partial a_l)^T e

and turns it into gradients of its own parameters by its own local derivative. No derivative passes from one block to
another: the tape of each block ends at its input. The readout's gradient is exact. If a block names inner layers
(see :func:`~fwdlib.methods.blocks.blocks_of`), each of these gets its error in the same way, and no derivative passes
between layers either. The rules differ in the feedback B_l of shape (outputs, units of block l):

=================================== ================================================= ===================
rule                                feedback                                          needs also
=================================== ================================================= ===================
:class:`DirectFeedbackAlignment`    random and fixed                                  nothing
:class:`DirectKolenPollack`         moves along :math:`-e\, a_l^T`                    nothing
:class:`ForwardDirectFeedback...`   moves towards :math:`d\, u_l^T`, whose mean is    tangents in the same
                                    :math:`\partial y / \partial a_l`                 pass forward
=================================== ================================================= ===================

:mod:`fwdlib.methods.activity` has the rules that use the derivative along the tangents itself as the error. All are
estimators as :mod:`fwdlib.estimators` defines them. They are objects because they own their feedback.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fwdlib import runtime
from fwdlib.checks import check_choice, check_count
from fwdlib.estimators import GradientEstimate
from fwdlib.methods.blocks import ErrorsOfBlocks, Network, shapes_of
from fwdlib.objectives import BatchLoss, check_objective, check_scalar, own_params, params_of, requiring_grad
from fwdlib.tangents import AnyGenerator, Params, is_transformed, random_signs
from fwdlib.training import MakeOptimizer, make_optimizer

ADAM = make_optimizer("Adam", 1e-4)  # Bacho & Chu's
TANGENTS = ("rademacher", "normal")


class Step(NamedTuple):
    """What a rule computes one estimate from."""

    network: Network
    loss_of: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    u: Tensor
    """Tangents (K, B, all units); K = 0 for rules without any."""
    matrix: Tensor
    """The feedback."""
    alpha: float | Tensor
    leaves: Params
    """The parameters, as the tape sees them."""
    tensors: Params | None
    """What replaces the model's parameters and buffers; None for its own."""


class DirectFeedbackAlignment:
    r"""Send the error of the output to each block through a fixed random matrix (Nøkland 2016, arXiv 1609.01596).

    .. math:: \delta_l = B_l^T e, \qquad B_l \text{ random and fixed}

    Bias: as large as the error of the feedback; the forward weights learn to align with it. Variance: only that of the
    batch.

    Cost: one forward pass and the matrix products of the weights' gradients. Errors are not carried back, so it takes
    two thirds of backprop's products. Activations are kept, as by backprop.

    Args:
        model: made of blocks; see :func:`~fwdlib.methods.blocks.blocks_of`.
        inputs: a batch for the model, or a part of one; it shows the shapes of the blocks' outputs.
        seed: of the feedback.
        recorded: replay the model's kernels in each step instead of calling it, which is faster for small layers.
            Changes of parameters, buffers, ``train()`` and ``eval()`` take effect; other changes of model or loss, for
            example of a dropout's p, do not: see :class:`fwdlib.stacked.recording.Recording`.

    Raises:
        ValueError: if the model does not show its blocks.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> estimator = DirectFeedbackAlignment(model, torch.zeros(2, 4))
        >>> [tuple(feedback.shape) for feedback in estimator.feedback]
        [(3, 8)]
        >>> objective = BatchLoss(model, torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 2]))
        >>> estimator(objective, {name: p.detach() for name, p in model.named_parameters()}).grads["0.weight"].shape
        torch.Size([8, 4])
    """

    num_tangents = 0
    alpha, weights = 0.0, "example"  # of the residual: how much is added, and its weights
    live_only = False  # whether units that a ReLU has switched off get no tangent

    def __init__(self, model: nn.Module, inputs: Tensor, *, seed: int = 0, recorded: bool = False) -> None:
        self.recorded = recorded
        num_outputs, sites = self._made_for = shapes_of(model, inputs)
        self._shapes = self._feedback_shapes(sites)
        self._sizes = [shape.numel() for shape in self._shapes]
        self.matrix = nn.Parameter(next(model.parameters()).new_zeros(num_outputs, sum(self._sizes)), False)
        self._know(Network(model))
        self.reset(seed)

    @property
    def feedback(self) -> list[Tensor]:
        """The feedback of each site, shape (outputs, units...): views of ``matrix`` (outputs, all units)."""
        return self._by_site(self.matrix.detach())

    def reset(self, seed: int) -> None:
        """Start again: draw the feedback, Kaiming-uniform over the units of each block."""
        draw = runtime.generator(seed, purpose="feedback")
        for feedback in self.feedback:
            bound = math.sqrt(6 / feedback[0].numel())
            feedback.copy_(torch.rand(feedback.shape, generator=draw) * 2 * bound - bound)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the feedback."""
        return {"feedback": self.matrix.detach().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            ValueError: if it belongs to a different model.
        """
        given, own = tuple(state["feedback"].shape), tuple(self.matrix.shape)
        if given != own:
            raise ValueError(
                f"the state has feedback of shape {given}, this rule needs {own}: it belongs to a different model"
            )
        self.matrix.copy_(state["feedback"])

    @torch.no_grad()
    def __call__(self, objective: BatchLoss, params: Params, *, generator: AnyGenerator = None) -> GradientEstimate:
        """Estimate the gradient, and let the feedback learn from the same pass.

        Args:
            objective: the loss of a model on a batch, a mean or a sum over its examples.
            params: the point.
            generator: of the tangents, for rules that have any; None for torch's global generator.

        Returns:
            The estimate; ``jvps`` has shape (K,), empty for rules without tangents.

        Raises:
            TypeError: if the objective is not a :class:`BatchLoss`, or as :func:`fwdlib.forward_gradient`.
            ValueError: if the model has other blocks or another dtype than that which the rule was made for, a name in
                ``params`` is not a parameter of the model, the batch is empty, or the call is vmapped over seeds.
            RuntimeError: if the model itself raises it.
        """
        network = self._network_of(objective)
        check_objective(objective, params)
        if unknown := params.keys() - self._names:
            names = ", ".join(params_of(objective.model))
            raise ValueError(f"params has {min(unknown)!r}, which is not a parameter of the model; it has {names}")
        try:
            return self._estimate(network, objective, params, generator)
        except RuntimeError as error:
            if (dtype := next(objective.model.parameters()).dtype) == self.matrix.dtype:
                raise
            raise ValueError(
                f"this rule was made for a model of {self.matrix.dtype}, got one of {dtype}: make the rule after "
                f"model.to(...)"
            ) from error

    def _estimate(
        self, network: Network, objective: BatchLoss, params: Params, generator: AnyGenerator
    ) -> GradientEstimate:
        u = self._draw(len(objective.inputs), generator)  # (K, B, all units), K = 0 for rules without tangents
        if self.recorded:
            found = self._replay(network, objective, params, u)
        else:
            # The tape ends at the model's own parameters if ``params`` are these, else at tensors with their values.
            own = own_params(network.tensors(), params)
            leaves = own or {name: p.detach().requires_grad_() for name, p in params.items()}
            batch = objective.inputs, objective.targets, u
            matrix, tensors = self.matrix.detach(), None if own else leaves
            with requiring_grad(leaves.values()):
                found = self._evaluate(Step(network, objective.loss, *batch, matrix, self.alpha, leaves, tensors))
        loss, along, feedback_gradient, *grads = found
        self._learn(feedback_gradient)
        return GradientEstimate(loss, dict(zip(params, grads, strict=True)), along.sum(1))

    def _evaluate(self, step: Step) -> tuple[Tensor, ...]:
        # Returns the loss; the derivatives of the examples' losses, (K, B); the gradients of feedback and leaves.
        u = step.u
        behind = self._by_site(u) if len(u) else [None] * len(self._shapes)
        outputs, tangents = step.network.run(step.tensors, step.inputs, behind, live_only=self.live_only)
        along = feedback_gradient = step.inputs.new_zeros(0, len(step.inputs))

        def deltas(error: Tensor) -> list[Tensor]:
            nonlocal along, feedback_gradient
            if tangents is not None:
                along = (error * tangents).flatten(2).sum(2)
            error = error.flatten(1)
            feedback_gradient = self._feedback_gradient(step.matrix, error, outputs[:-1], tangents, u)
            return self._by_site(self._deltas(step.matrix, error, along, u, step.alpha))

        loss, grads = hand_in(step, deltas, outputs)
        return loss, along, feedback_gradient, *grads

    def _replay(self, network: Network, objective: BatchLoss, params: Params, u: Tensor) -> tuple[Any, ...]:
        tensors = network.tensors() | params
        names, trained, loss_of = tuple(tensors), tuple(params), objective.loss
        state, options = self._learning()
        num_others = 5 + len(state)

        def evaluate(*values: Tensor) -> tuple[Tensor, ...]:
            batch, named = values[:5], dict(zip(names, values[num_others:], strict=True))
            leaves = {name: named[name].detach().requires_grad_() for name in trained}
            found = self._evaluate(Step(network, loss_of, *batch, leaves, named | leaves))
            if not state:
                return found
            loss, along, feedback_gradient, *grads = found
            self._step(batch[3], feedback_gradient, dict(zip(state, values[5:num_others], strict=True)))
            return loss, along, *grads

        inputs = _dense(objective.inputs)
        batch = inputs, objective.targets.contiguous(), u, self.matrix.detach(), _number(self.alpha)
        modes = tuple([module.training for module in network.modules])
        key = names, trained, loss_of, modes, self.weights, torch.is_autocast_enabled(inputs.device.type), *options
        found = network.recording(evaluate, *batch, *state.values(), *tensors.values(), key=key)
        return (*found[:2], None, *found[2:]) if state else found

    def _network_of(self, objective: BatchLoss) -> Network:
        if not isinstance(objective, BatchLoss):
            raise TypeError(
                f"feedback needs the blocks of a model: pass a BatchLoss(model, inputs, targets), got "
                f"{type(objective).__name__}"
            )
        if is_transformed():
            raise ValueError("a feedback rule has a state, so each seed needs a rule of its own: pass together=False")
        network = self._network
        if network.model is not objective.model or self._read_parts() != self._parts:
            network = Network(objective.model)
            self._check_alike(network, objective.inputs)
            self._know(network)
        return network

    def _know(self, network: Network) -> None:
        # A layer that is replaced or added later is another part.
        self._network, self._names = network, frozenset(network.tensors())
        self._parts = self._read_parts()

    def _read_parts(self) -> tuple[list[str], list[int]]:
        modules = self._network.modules
        names = itertools.chain.from_iterable((*m._modules, *m._parameters, *m._buffers) for m in modules)
        return [*names], [id(child) for m in modules for child in m._modules.values()]

    def _check_alike(self, network: Network, inputs: Tensor) -> None:
        num_outputs, sites = self._made_for
        if len(network.blocks) != len(sites) + 1:
            raise ValueError(
                f"this rule was made for a model of {len(sites) + 1} blocks, got one of {len(network.blocks)}"
            )
        found = shapes_of(network.model, inputs[:1])
        if found != self._made_for:
            raise ValueError(
                f"this rule was made for a model whose hidden blocks return {_described(sites)} and that has "
                f"{num_outputs} outputs, got {_described(found[1])} and {found[0]}: make another rule for it"
            )

    def _feedback_shapes(self, sites: list[list[torch.Size]]) -> list[torch.Size]:
        # Of the feedback for one output, from the shapes of the sites of each hidden block for one example.
        return [shape for of_block in sites for shape in of_block]

    def _by_site(self, rows: Tensor) -> list[Tensor]:
        # (..., all units) -> for each site (..., units...), views
        pieces = rows.split_with_sizes(self._sizes, -1)
        return [
            piece if len(shape) == 1 else piece.view(*rows.shape[:-1], *shape)
            for piece, shape in zip(pieces, self._shapes, strict=True)
        ]

    def _draw(self, num_examples: int, generator: AnyGenerator) -> Tensor:
        return self.matrix.new_zeros(0, num_examples, sum(self._sizes))

    def _deltas(self, matrix: Tensor, error: Tensor, along: Tensor, u: Tensor, alpha: float | Tensor) -> Tensor:
        # The errors that the hidden units get in place of the derivatives of the loss, (B, all units).
        return error @ matrix

    def _feedback_gradient(
        self, matrix: Tensor, error: Tensor, outputs: list[Tensor], tangents: Tensor | None, u: Tensor
    ) -> Tensor:
        return matrix.new_zeros(0)

    def _learning(self) -> tuple[Params, tuple]:
        # The tensors that a recorded step of the feedback's optimizer changes, and the options that it depends on.
        return {}, ()

    def _learn(self, feedback_gradient: Tensor | None) -> None:
        pass


class LearnedFeedback(DirectFeedbackAlignment):
    """Feedback that starts at zero and that an optimizer of its own updates in each step; the base of such rules."""

    def __init__(
        self, model: nn.Module, inputs: Tensor, *, optimizer: MakeOptimizer = ADAM, recorded: bool = False
    ) -> None:
        self._make_optimizer = optimizer
        super().__init__(model, inputs, recorded=recorded)

    def reset(self, seed: int = 0) -> None:
        """Start again: all feedback zero."""
        self.matrix.zero_()
        self.optimizer = self._make_optimizer([self.matrix])

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the feedback and that of its optimizer."""
        return super().state_dict() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])

    def _learning(self) -> tuple[Params, tuple]:
        # Only a fused optimizer can be recorded, from its second step on: the first step makes its tensors.
        group, state = self.optimizer.param_groups[0], self.optimizer.state.get(self.matrix)
        if not (state and group.get("fused")):
            return {}, ()
        return state, tuple([value for name, value in group.items() if name != "params"])

    def _step(self, matrix: Tensor, feedback_gradient: Tensor, state: Params) -> None:
        # Takes the optimizer's next step on these tensors instead of its own.
        optimizer = self._make_optimizer([matrix])
        optimizer.param_groups[0] |= self.optimizer.param_groups[0] | {"params": [matrix]}
        optimizer.state[matrix] = state
        matrix.grad = feedback_gradient
        optimizer.step()

    def _learn(self, feedback_gradient: Tensor | None) -> None:
        if feedback_gradient is not None:  # else the recording has taken the step
            self.matrix.grad = feedback_gradient
            self.optimizer.step()


class DirectKolenPollack(LearnedFeedback):
    r"""Update the feedback as weights from the block to the output would be (Webster, Choi & Ahn 2021).

    .. math:: \delta_l = B_l^T e, \qquad \nabla B_l = e\, a_l^T

    summed over the batch, and applied by an optimizer with weight decay. If y = W a_l, then W has the same gradient:
    with plain SGD and decay for both, B_l - W shrinks by the factor 1 - rate x decay in each step, whatever the data.

    Bias: the initial mismatch, until the decay has removed it; if the network behind the block is nonlinear, always.
    Variance: only that of the batch.

    Cost: that of :class:`DirectFeedbackAlignment`, and a product of the size of the feedback.

    Args:
        model: made of blocks; see :func:`~fwdlib.methods.blocks.blocks_of`.
        inputs: a batch for the model.
        optimizer: of the feedback: from a list of tensors to an optimizer; default Adam at 1e-4. It brings the decay.
        recorded: see :class:`DirectFeedbackAlignment`.
    """

    def _feedback_gradient(
        self, matrix: Tensor, error: Tensor, outputs: list[Tensor], tangents: Tensor | None, u: Tensor
    ) -> Tensor:
        return error.t() @ torch.cat([output.detach().flatten(1) for output in outputs], 1)


class ForwardDirectFeedbackAlignment(LearnedFeedback):
    r"""Learn the feedback from forward-mode derivatives (Bacho & Chu 2024, arXiv 2212.07282, equations 7 and 8).

    Tangents :math:`u_l`, independent for each unit and example, enter behind every hidden block in one forward pass.
    At the output they are :math:`d = \sum_l (\partial y/\partial a_l)\, u_l`, so the mean of :math:`d\, u_l^T` is the
    Jacobian.

    .. math:: \delta_l = B_l^T e, \qquad \nabla B_l = B_l - \overline{d\, u_l^T}

    With plain SGD of rate :math:`\beta` that is an exponential average, :math:`B \gets (1 - \beta) B + \beta\,
    \overline{d\, u^T}`; the authors' program uses Adam.

    Bias: the feedback is one matrix for all examples, an average Jacobian of the past. It misses the difference between
    an example's own Jacobian and this average. Variance: small, because the feedback averages over batches.

    Cost: one forward pass with tangents behind the first block, and the matrix products of the weights' gradients: as
    many products as backprop.

    Args:
        model: made of blocks; see :func:`~fwdlib.methods.blocks.blocks_of`.
        inputs: a batch for the model.
        optimizer: of the feedback: from a list of tensors to an optimizer; default Adam at 1e-4, as published.
        num_tangents: K.
        tangents: ``"rademacher"``, which has the least variance and is drawn fastest, or ``"normal"``, as published.
        recorded: see :class:`DirectFeedbackAlignment`.

    Raises:
        ValueError: if ``num_tangents`` is below 1 or ``tangents`` unknown, or the model does not show its blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        *,
        optimizer: MakeOptimizer = ADAM,
        num_tangents: int = 1,
        tangents: str = "rademacher",
        recorded: bool = False,
    ) -> None:
        self.num_tangents = check_count("num_tangents", num_tangents)
        self.tangents = check_choice("tangents", tangents, TANGENTS)
        super().__init__(model, inputs, optimizer=optimizer, recorded=recorded)

    def _draw(self, num_examples: int, generator: AnyGenerator) -> Tensor:
        shape, like = (self.num_tangents, num_examples, sum(self._sizes)), self.matrix.detach()
        if self.tangents == "rademacher":
            return random_signs(shape, like, generator)
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

    def _feedback_gradient(
        self, matrix: Tensor, error: Tensor, outputs: list[Tensor], tangents: Tensor | None, u: Tensor
    ) -> Tensor:
        d = tangents.flatten(2).flatten(0, 1)  # (K B, outputs)
        return torch.addmm(matrix, d.t(), u.flatten(0, 1), alpha=-1 / len(d))


def hand_in(
    step: Step, deltas: Callable[[Tensor], list[Tensor]], outputs: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss, and the gradients of the leaves where each site gets its delta as error.

    Args:
        step: has the loss, the targets and the leaves.
        deltas: from the error of the logits to the errors of the sites.
        outputs: of the sites, then the logits.
    """
    with torch.enable_grad():
        loss = check_scalar(step.loss_of(ErrorsOfBlocks.apply(deltas, outputs[-1], *outputs[:-1]), step.targets))
        grads = torch.autograd.grad(loss, list(step.leaves.values()), materialize_grads=True)
    return loss.detach(), grads


def _described(sites: list[list[torch.Size]]) -> str:
    return ", ".join(" and ".join(str(tuple(shape)) for shape in of_block) for of_block in sites)


@functools.lru_cache(maxsize=1)
def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)  # a tensor without axes promotes no dtype


def _dense(x: Tensor) -> Tensor:
    # Without gaps or overlaps, because an expanded batch cannot be recorded.
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_channels_last else x.contiguous()
