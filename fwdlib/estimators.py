"""Gradient estimators: pure functions of (objective, params).

Each returns a :class:`GradientEstimate`, so ``train()`` and your own loop can take any of them. ``functools.partial``
sets the options. The only thing that an estimate changes outside itself is the state that a forward pass of ordinary
training changes as well: the generator, and the buffers of a :class:`~fwdlib.objectives.BatchLoss`'s model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from fwdlib.checks import check_choice, check_count
from fwdlib.objectives import (
    ClosureLoss,
    ModelLoss,
    Objective,
    assign_gradients,
    check_depends,
    check_objective,
    check_scalar,
    keep_buffers,
    loss_and_buffers,
    params_of,
    requiring_grad,
    through_hooks,
)
from fwdlib.tangents import (
    NAMED,
    AnyGenerator,
    Params,
    Sampler,
    check_generator,
    count_tangents,
    divisor_of,
    is_transformed,
    sample_tangents,
    weighted_sum,
)

BLOCKS = ("joint", "parameter")
ENGINES = ("auto", "stacked", "torch")
STRUCTURED = ("rank-one", "per-example", "activity")  # tangents that the stacked engine never writes out


class GradientEstimate(NamedTuple):
    """What an estimator returns: the loss at params, an estimate of its gradient, and the jvps it was made from."""

    loss: Tensor
    """Scalar, without a graph."""
    grads: Params
    """The same keys and shapes as the parameters."""
    jvps: Tensor
    """Directional derivatives, shape (K,), or (K, number of parameters) with ``blocks="parameter"``; (0,) for
    backprop."""


Estimator = Callable[[Objective, Params], GradientEstimate]


def backprop_gradient(objective: Objective, params: Params) -> GradientEstimate:
    """Compute the exact gradient by reverse mode: the baseline of every comparison.

    Bias and variance: none.

    Args:
        objective: params -> scalar.
        params: the point, a dict of real tensors.

    Returns:
        The estimate; ``jvps`` is empty.

    Raises:
        ValueError: if there are no parameters or the objective is not a scalar.
        TypeError: if a parameter is not a real floating tensor.

    Example:
        >>> backprop_gradient(lambda p: (p["x"] ** 2).sum(), {"x": torch.tensor([1.0, 2.0])}).grads["x"]
        tensor([2., 4.])
    """
    check_objective(objective, params)
    if is_transformed():
        grads, (loss, buffers) = grad_and_value(partial(loss_and_buffers, objective), has_aux=True)(params)
        keep_buffers(objective, buffers)
        return GradientEstimate(loss.detach(), grads, loss.new_empty(0))
    if isinstance(objective, ModelLoss):
        with objective.placed(params) as leaves:
            loss, grads = _loss_and_gradient(objective, objective.run, leaves)
    else:
        leaves = {name: p.detach() for name, p in params.items()}
        loss, grads = _loss_and_gradient(objective, lambda: objective(leaves), leaves)
    return GradientEstimate(loss, grads, loss.new_empty(0))


def _loss_and_gradient(objective: Objective, evaluate: Callable[[], Tensor], leaves: Params) -> tuple[Tensor, Params]:
    with requiring_grad(leaves.values()), torch.enable_grad():
        loss = check_scalar(evaluate())
        found = [None] * len(leaves)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    check_depends(all(g is None for g in found), objective, leaves)
    grads = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(leaves.items(), found, strict=True)}
    return loss.detach(), grads


@torch.no_grad()
def forward_gradient(
    objective: Objective,
    params: Params,
    *,
    num_tangents: int = 1,
    tangents: str | Sampler = "rank-one",
    blocks: str = "joint",
    engine: str = "auto",
    chunk_size: int | None = None,
    generator: AnyGenerator = None,
) -> GradientEstimate:
    r"""Estimate the gradient from directional derivatives alone, without a backward pass: the mean over K tangents.

    .. math:: g(\theta) = \frac{1}{K} \sum_{k=1}^{K} (\nabla f(\theta) \cdot v_k)\, v_k

    Baydin, Pearlmutter, Syme, Wood & Torr 2022, *Gradients without Backpropagation*, algorithm 1 (there K = 1, normal);
    Flügel et al. 2024, *Beyond Backpropagation: Optimization with Multi-Tangent Forward Gradients* (arXiv 2410.17764),
    the mean.

    Bias: none, for tangents with :math:`\mathbb E[v v^\top] = I`, as all samplers of :mod:`fwdlib.tangents` draw them.

    Mean squared error, P being the number of parameters: :math:`(P + 1)/K\, |\nabla f|^2` for normal tangents,
    :math:`(P - 1)/K\, |\nabla f|^2` for rademacher ones, :math:`(P/K - 1)\, |\nabla f|^2` for orthonormal ones. With
    ``blocks="parameter"`` each parameter tensor is estimated from directional derivatives of its own, so P and the
    gradient are those of the tensor: less variance, for one jvp per tensor.

    The squared cosine with the gradient is K/(P + K - 1) on average for normal tangents, K/P for orthonormal ones.

    With blocks the error is :math:`\sum_l (P_l + 1)/K\, |\nabla_l f|^2` over the tensors l for normal tangents, with
    :math:`P_l - 1` for rademacher ones. The blocks of one tangent are one draw, cut by tensor: those of orthonormal
    tangents are not at right angles.

    Cost: one jvp per tangent, or per tangent and tensor; one jvp is one pass forward, in which no activations are kept
    and no graph is built (so an outer ``torch.func.grad`` sees a constant). All jvps go through the model together
    unless ``chunk_size`` is set. The tangents themselves take K P numbers, with blocks K P times the number of tensors.

    Engines: both give the same numbers from the same tangents, up to rounding. ``"torch"`` is torch's own forward mode.
    ``"stacked"`` sends the primal and its tangents through the objective as one batch (:mod:`fwdlib.stacked`);
    structured tangents are never written out there, so a pass costs less than one of backprop. ``"auto"`` takes the
    stacked engine where it is faster: with joint blocks, along structured tangents of a model or several tangents of
    any objective. Where that engine refuses the objective, ``"auto"`` takes torch's along the same tangents, then and
    from then on.

    Every operation of the model needs a forward derivative in torch, or a backward pass that can be differentiated; one
    that has neither raises NotImplementedError with its name. BatchNorm's running
    statistics advance once per estimate, Dropout draws one mask per estimate: see
    :class:`~fwdlib.objectives.BatchLoss`.

    Args:
        objective: params -> scalar.
        params: the point, a dict of real tensors.
        num_tangents: K, how many tangents to average over.
        tangents: ``"rank-one"``, ``"normal"``, ``"rademacher"``, ``"orthonormal"`` or a sampler (see
            :mod:`fwdlib.tangents`). ``"unit"`` gives the exact gradient, the sum over K = P unit tangents, one for each
            of the P parameters; leave out ``num_tangents``. For the loss of a model also ``"per-example"`` and
            ``"activity"`` (see :mod:`fwdlib.stacked.perturbations`), which have less variance and exist in the stacked
            engine alone.
        blocks: ``"joint"``, one tangent over all parameters together, or ``"parameter"``, one per parameter tensor.
        engine: ``"auto"``, ``"stacked"`` or ``"torch"``.
        chunk_size: how many tangents go through torch's engine at once; None for all. Bounds the memory and changes no
            number.
        generator: where the tangents come from; None for torch's global generator.

    Returns:
        The estimate; ``jvps`` has shape (K,), or (K, number of parameters) with ``blocks="parameter"``. The
        ``grads`` of the stacked engine are a mapping that writes out a gradient when it is read;
        ``grads.add_to_(params, -learning_rate)`` takes a step of SGD without writing one out.

    Raises:
        ValueError: if ``num_tangents`` or ``chunk_size`` is below 1, ``tangents``, ``blocks`` or ``engine`` is unknown
            or does not go with the others, there are no parameters, the batch is empty, or the objective is not a
            scalar or, for the loss of a model, a constant.
        TypeError: if a parameter is not a real floating tensor, or the generator no generator.
        NotImplementedError: if a function of the model has no forward derivative, the model changes or reads a tape
            that is not there (hooks of activations and modules, ``grad_fn``), averages gradients over processes, or has
            a state that a second pass would advance again.

    Example:
        >>> objective = lambda p: (p["x"] ** 2).sum()
        >>> params = {"x": torch.tensor([1.0, 2.0])}
        >>> draw = torch.Generator().manual_seed(0)
        >>> estimate = forward_gradient(objective, params, num_tangents=10_000, tangents="rademacher", generator=draw)
        >>> [round(value, 1) for value in estimate.grads["x"].tolist()]
        [2.1, 4.0]
    """
    check_objective(objective, params)
    check_choice("blocks", blocks, BLOCKS)
    check_choice("engine", engine, ENGINES)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_generator(generator)
    if not callable(tangents):
        check_choice("tangents", tangents, dict.fromkeys([*NAMED, *STRUCTURED]))
    is_structured = isinstance(tangents, str) and tangents in STRUCTURED
    from fwdlib.forward.derivatives import derivatives_along, either_engine, suits_stacked

    num_tangents = count_tangents(params, num_tangents, tangents)
    is_suited = suits_stacked(objective, num_tangents, blocks, chunk_size)
    if engine == "stacked" and (blocks != "joint" or chunk_size is not None):
        raise ValueError(f"the stacked engine takes blocks='joint' and no chunk_size, got {blocks!r}, {chunk_size}")

    def by_stack() -> GradientEstimate:
        from fwdlib.stacked.estimator import stacked_gradient

        return stacked_gradient(objective, params, num_tangents, tangents, generator)

    def by_derivatives() -> GradientEstimate:
        sampled = sample_tangents(params, num_tangents, tangents, generator)
        along = sampled if blocks == "joint" else _one_block_at_a_time(sampled)
        by = engine if blocks == "joint" else "torch"
        found = derivatives_along(objective, params, along, engine=by, chunk_size=chunk_size)
        return combined(found.loss, found.jvps, found.trained(sampled), divisor_of(num_tangents, tangents))

    if engine == "stacked" or (engine == "auto" and is_structured and is_suited and tangents not in NAMED):
        return _hooked(objective, params, by_stack())
    if is_structured and tangents not in NAMED:
        raise ValueError(
            f"{tangents!r} tangents belong to the layers of a model: they need a BatchLoss or ClosureLoss, "
            f"blocks='joint', no chunk_size, and engine 'auto' or 'stacked'"
        )
    if engine == "auto" and is_structured and is_suited:
        return _hooked(objective, params, either_engine(objective, by_stack, by_derivatives, generator))
    return _hooked(objective, params, by_derivatives())


def combined(loss: Tensor, jvps: Tensor, tangents: Params, divisor: int) -> GradientEstimate:
    """Return the estimate that derivatives along K tangents give: the sum of jvp times tangent, over a divisor.

    Args:
        loss: scalar.
        jvps: shape (K,), or by blocks (K * n,), where each belongs to one of the n tensors.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).
        divisor: see :func:`fwdlib.tangents.divisor_of`.
    """
    num_tangents = len(next(iter(tangents.values())))
    jvps = jvps if len(jvps) == num_tangents else jvps.reshape(num_tangents, len(tangents))
    of_tensors = [jvps] * len(tangents) if jvps.dim() == 1 else jvps.unbind(1)
    pairs = zip(of_tensors, tangents.items(), strict=True)
    grads = {name: weighted_sum(jvp / divisor, v) for jvp, (name, v) in pairs}  # in half precision the sum overflows
    return GradientEstimate(loss, grads, jvps)


def _hooked(objective: Objective, params: Params, estimate: GradientEstimate) -> GradientEstimate:
    return estimate._replace(grads=through_hooks(objective, params, estimate.grads))


def forward_grad_(
    model: nn.Module, closure: Callable[[], Tensor], *, num_examples: int | None = None, **options: Any
) -> Tensor:
    """Set ``.grad`` of a model's parameters to a forward gradient, in place of ``zero_grad()`` and ``loss.backward()``.

    Works with any model and any inputs: the closure calls the model as your loop does. What was in ``.grad`` is
    replaced, so gradients do not accumulate. A parameter that the loss does not use gets zeros from the stacked engine,
    noise of mean zero from torch's engine, and None from backprop.

    The closure may be called several times, once for each tangent in torch's engine: let it draw no new batch. What it
    keeps of a call, such as the logits, is a constant afterwards.

    Args:
        model: the module whose trainable parameters get a ``.grad``.
        closure: takes nothing, calls the model and returns the loss, a scalar.
        num_examples: B, for ``"per-example"`` and ``"activity"`` tangents.
        options: of :func:`forward_gradient`, for example ``num_tangents=4`` or ``generator=...``.

    Returns:
        The loss, a scalar without a graph.

    Raises:
        ValueError: as :func:`forward_gradient`.
        TypeError: as :func:`forward_gradient`.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> inputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> loss = forward_grad_(model, lambda: nn.functional.cross_entropy(model(inputs), targets), num_tangents=4)
        >>> loss.shape, model.weight.grad.shape
        (torch.Size([]), torch.Size([2, 3]))
    """
    estimate = forward_gradient(ClosureLoss(model, closure, num_examples), params_of(model), **options)
    assign_gradients(model, estimate.grads)
    return estimate.loss


def _one_block_at_a_time(tangents: Params) -> Params:
    # K tangents over n tensors -> K * n tangents, each zero outside one tensor: row k * n + i is tangent k of tensor i.
    n = len(tangents)
    rows = {}
    for i, (name, v) in enumerate(tangents.items()):
        mask = torch.zeros(n, dtype=v.dtype, device=v.device)
        mask[i] = 1
        rows[name] = (v.unsqueeze(1) * mask.reshape(n, *[1] * (v.dim() - 1))).flatten(0, 1)
    return rows
