"""The stacked pass: forward gradients for the price of two forward passes, or less.

The primal and its tangents go through the model as one batch, so that each linear layer is one matrix product, and
structured tangents (:mod:`fwdlib.stacked.perturbations`) make what a weight's own tangent adds almost free. It works on
any model: what has no rule goes through :func:`torch.func.jvp`, call by call, and :func:`explain` tells which calls do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlib import runtime
from fwdlib.checks import check_choice, check_count, check_positive
from fwdlib.estimators import GradientEstimate, check_scalar
from fwdlib.objectives import BatchLoss, ModelLoss, params_of, swapped
from fwdlib.stacked.dual import Call, Dual, Pass, register_rule
from fwdlib.stacked.perturbations import PERTURBATIONS, DensePerturbation, DrawSigns, Perturbation
from fwdlib.tangents import (
    TANGENTS,
    AnyGenerator,
    Params,
    Sampler,
    check_params,
    is_transformed,
    random_signs,
    sample_tangents,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Dual", "SGDStep", "explain", "register_rule", "stacked_gradient", "stacked_jvp"]


@torch.no_grad()
def stacked_gradient(
    objective: ModelLoss,
    params: Params,
    num_tangents: int = 1,
    tangents: str | Sampler = "rank-one",
    generator: AnyGenerator = None,
) -> GradientEstimate:
    r"""Estimate the gradient as :func:`~fwdlib.estimators.forward_gradient` does, in one stacked pass.

    The tangents are structured, so neither they nor the estimate are written out before they are asked for:

    - ``"rank-one"``: a tangent a b^T for each weight, signs over its outputs and inputs. The least second moment of all
      tangents of unit variance, at two thirds of the products of backprop.
    - ``"per-example"``: the same, for each example by itself: up to B times less variance, for one product more.
    - ``"activity"``: signs for each unit and example, on the outputs of the layers (Ren et al. 2022, *Scaling Forward
      Gradient With Local Losses*): less variance by a factor of the layer's inputs, for one product more, and with the
      activations kept.
    - any sampler of :mod:`fwdlib.tangents`, ``"normal"`` for example: written out.

    Bias: none. Second moments: the table and the classes in :mod:`fwdlib.stacked.perturbations`.

    Cost: one pass with (1 + K) B rows. No graph is built and, activity tangents apart, no activation outlives the next
    layer, so the memory does not grow with depth.

    Where BatchNorm in training mode, or a function without a rule, mixes the examples of a batch, the perturbations of
    examples in the layers before it are weighted with the derivative of the whole loss: more variance, no bias. For a
    loss that is neither a mean nor a sum over examples that is so for all layers.

    Args:
        objective: the loss of a model on a batch; a plain function has no layers.
        params: the point, by the model's names. If these are the model's own tensors, as :func:`params_of` gives them,
            the model runs as it is; else by :func:`torch.func.functional_call`.
        num_tangents: K.
        tangents: one of the above.
        generator: where the randomness comes from; None for torch's global generator. (Dropout draws from that one.)

    Returns:
        The estimate. Its ``grads`` is a mapping that writes out a gradient when it is read;
        ``grads.add_to_(params, -learning_rate)`` takes a step of SGD without writing one out.

    Raises:
        TypeError: if the objective is no :class:`BatchLoss`, or a parameter is not a real floating tensor.
        ValueError: if the batch is empty, ``num_tangents`` is below 1, ``tangents`` is unknown, there are no
            parameters, or the loss is not a scalar.
        NotImplementedError: if a function of the model has neither a rule nor a forward derivative in torch.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> objective = BatchLoss(model, torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> estimate = stacked_gradient(objective, params_of(model), num_tangents=4)
        >>> estimate.jvps.shape, estimate.grads["weight"].shape
        (torch.Size([4]), torch.Size([2, 3]))
    """
    check_count("num_tangents", num_tangents)
    _check(objective, params)
    num_examples = objective.num_examples
    if isinstance(tangents, str):
        check_choice("tangents", tangents, dict.fromkeys([*PERTURBATIONS, *TANGENTS]))
    if tangents in PERTURBATIONS:
        if num_examples is None and PERTURBATIONS[tangents].per_example:
            raise ValueError(f"{tangents!r} tangents need the number of examples: ClosureLoss(..., num_examples=B)")
        draw_signs = partial(random_signs, generator=generator)
        perturbation = PERTURBATIONS[tangents](params, num_tangents, num_examples, draw_signs)
    else:
        sampled = sample_tangents(params, num_tangents, tangents, generator)
        perturbation = DensePerturbation(params, num_examples, sampled)
    loss, jvps, of_examples = _evaluate(objective, params, perturbation)
    grads = perturbation.gradients(jvps, of_examples)
    return GradientEstimate(loss, dict(grads) if is_transformed() else grads, jvps)


@torch.no_grad()
def stacked_jvp(objective: ModelLoss, params: Params, tangents: Params) -> tuple[Tensor, Tensor]:
    """Differentiate along given tangents, as :func:`torch.func.jvp` does, all of them in one stacked pass.

    Args:
        objective: the loss of a model on a batch.
        params: the point.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).

    Returns:
        The loss, and the K directional derivatives.

    Raises:
        TypeError: as :func:`stacked_gradient`.
        ValueError: as there, or if a tangent is missing or has another shape.
    """
    _check(objective, params)
    tangents = {name: tangents.get(name) for name in params}
    num_tangents = next((len(v) for v in tangents.values() if v is not None and v.dim()), 1)
    for name, p in params.items():
        expected, given = (num_tangents, *p.shape), None if tangents[name] is None else tuple(tangents[name].shape)
        if given != expected:
            raise ValueError(f"tangents[{name!r}] must have shape {expected}, got {given}")
    loss, jvps, _ = _evaluate(objective, params, DensePerturbation(params, objective.num_examples, tangents))
    return loss, jvps


class SGDStep:
    """A step of plain SGD with the stacked forward gradient, compiled to one graph where a C++ compiler is at hand.

    Small models gain most: there the calls of torch cost more than their arithmetic. The first call for each shape of
    batch traces and compiles the step, which takes seconds to a minute; only the signs are drawn outside of the graph.

    Args:
        model: whose parameters are updated, in place: those that it has, and that are trainable, when this is made.
        loss: ``(logits, targets) -> scalar``.
        learning_rate: of SGD; change it by the attribute of that name.
        num_tangents: K.
        tangents: ``"rank-one"``, ``"per-example"`` or ``"activity"``.
        compiled: whether to compile; None for where a compiler is found.
        generator: where the signs come from; None for torch's global generator.

    Raises:
        ValueError: if an argument is out of its range.
        RuntimeError: if ``compiled`` is True and there is no C++ compiler.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> step = SGDStep(model, learning_rate=0.1, compiled=False)
        >>> loss = step(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        learning_rate: float,
        num_tangents: int = 1,
        tangents: str = "rank-one",
        compiled: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.learning_rate = check_positive("learning_rate", learning_rate)
        self.num_tangents = check_count("num_tangents", num_tangents)
        self.tangents = check_choice("tangents", tangents, PERTURBATIONS)
        self.generator = generator
        self.compiled = runtime.has_compiler() if compiled is None else compiled
        if self.compiled and not runtime.has_compiler():
            raise RuntimeError(
                "compiled=True needs a C++ compiler, and none was found. Install g++ or clang++, name one in the "
                "environment variable CXX, or pass compiled=False."
            )
        self._params, self._buffers = params_of(model), dict(model.named_buffers())
        self._modules = list(model.modules())
        self._graphs: dict[tuple, tuple[Callable, int]] = {}

    @torch.no_grad()
    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one step and return the loss before it, a scalar.

        Raises:
            ValueError: as :func:`stacked_gradient`.
        """
        params, buffers = self._params, self._buffers
        draw_signs = partial(random_signs, generator=self.generator)
        if not self.compiled:
            _check(BatchLoss(self.model, inputs, targets, self.loss), params)
            return self._step(params, {}, inputs, targets, self.learning_rate, draw_signs)
        modes = tuple([module.training for module in self._modules])
        key = (inputs.shape, inputs.dtype, inputs.device, targets.shape, targets.dtype, modes)
        if key not in self._graphs:
            _check(BatchLoss(self.model, inputs, targets, self.loss), params)
            self._graphs[key] = self._compile(params, buffers, inputs, targets)
        graph, num_signs = self._graphs[key]
        like = next(iter(params.values()))
        rate = torch.as_tensor(self.learning_rate, dtype=like.dtype, device=like.device)
        return graph(params, buffers, inputs, targets, rate, draw_signs((num_signs,), like))

    def _step(
        self,
        params: Params,
        buffers: Params,
        inputs: Tensor,
        targets: Tensor,
        learning_rate: float | Tensor,
        draw_signs: DrawSigns,
    ) -> Tensor:
        perturbation = PERTURBATIONS[self.tangents](params, self.num_tangents, len(inputs), draw_signs)
        objective = BatchLoss(self.model, inputs, targets, self.loss)
        loss, jvps, of_examples = _evaluate(objective, params, perturbation, buffers)
        perturbation.gradients(jvps, of_examples).add_to_(params, -learning_rate)
        return loss

    def _compile(self, params: Params, buffers: Params, inputs: Tensor, targets: Tensor) -> tuple[Callable, int]:
        from torch.fx.experimental.proxy_tensor import make_fx

        # On copies: tracing runs the step, and may not train the model. A first run counts the signs.
        params, buffers = ({name: value.clone() for name, value in of.items()} for of in (params, buffers))
        like = next(iter(params.values()))
        rate = torch.as_tensor(self.learning_rate, dtype=like.dtype, device=like.device)
        count = _CountedSigns()
        self._step(params, buffers, inputs, targets, rate, count)

        def step(
            params: Params, buffers: Params, inputs: Tensor, targets: Tensor, rate: Tensor, signs: Tensor
        ) -> Tensor:
            return self._step(params, buffers, inputs, targets, rate, _GivenSigns(signs))

        signs = random_signs((count.total,), like)
        graph = make_fx(step)(params, buffers, inputs, targets, rate, signs)
        mode = "reduce-overhead" if inputs.is_cuda else None  # CUDA graphs
        return torch.compile(graph, mode=mode, dynamic=False), count.total


class _CountedSigns:
    def __init__(self) -> None:
        self.total = 0

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        self.total += math.prod(shape)
        return random_signs(shape, like)


class _GivenSigns:
    def __init__(self, signs: Tensor) -> None:
        self.signs = signs
        self.used = 0

    def __call__(self, shape: Sequence[int], like: Tensor) -> Tensor:
        start, self.used = self.used, self.used + math.prod(shape)
        return self.signs[start : self.used].reshape(shape).to(like.dtype)


@torch.no_grad()
def explain(model: nn.Module, inputs: Tensor) -> pd.DataFrame:
    """Tell which torch functions a model calls in the stacked pass, and which of them have a rule.

    Those that have none go through :func:`torch.func.jvp`, which is exact and slow. The model is left as it was.

    Args:
        model: any module.
        inputs: a batch for it.

    Returns:
        A table with a row for each call that has to do with tangents: ``function``, ``shape`` of its result, and
        ``by``, ``"rule"`` or ``"torch.func.jvp"``.

    Raises:
        NotImplementedError: if a function has neither a rule nor a forward derivative in torch.

    Example:
        >>> explain(nn.Sequential(nn.Linear(3, 2), nn.Softsign()), torch.zeros(5, 3))
                               function   shape              by
        0    torch.nn.functional.linear  (5, 2)            rule
        1  torch.nn.functional.softsign  (5, 2)  torch.func.jvp
    """
    import pandas as pd

    params = params_of(model)
    check_params(params)
    calls: list[Call] = []
    perturbation = Perturbation(params, 1, len(inputs), random_signs)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(), swapped(model, params, buffers), Pass(perturbation, params, calls):
        model(inputs)
    rows = [(call.name, call.shape, "rule" if call.has_rule else "torch.func.jvp") for call in calls]
    return pd.DataFrame(rows, columns=["function", "shape", "by"])


def _evaluate(
    objective: ModelLoss, params: Params, perturbation: Perturbation, buffers: Params | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    # The loss, its derivatives (K,), and what each example adds to them, (K, B), where that is known.
    own = None if buffers or is_transformed() else objective.own(params)
    if own is not None:
        with Pass(perturbation, own):
            loss = objective.run()
    else:
        with swapped(objective.model, params, buffers or {}), Pass(perturbation, params):
            loss = objective.run()
    check_scalar(loss)
    if not isinstance(loss, Dual):
        return loss.detach(), loss.new_zeros(perturbation.num_tangents), None
    k = perturbation.num_tangents
    stack = loss.stack
    return stack[0], stack[1 : 1 + k], stack[1 + k :].reshape(k, -1) if len(stack) > 1 + k else None


def _check(objective: ModelLoss, params: Params) -> None:
    if not isinstance(objective, ModelLoss):
        raise TypeError(
            f"the stacked engine needs the layers of a model: the objective must be a BatchLoss(model, inputs, "
            f"targets) or a ClosureLoss(model, closure), got {type(objective).__name__}. For a plain function use "
            f"forward_gradient(..., engine='torch')."
        )
    check_params(params)
    objective.check_names(params)
    if objective.num_examples == 0:
        raise ValueError("inputs is an empty batch: its mean loss is not a number, and it has no gradient")
