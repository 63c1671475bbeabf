"""Gradient estimators: pure functions of (objective, params).

Each returns a :class:`GradientEstimate`, so ``train()`` and your own loop can take any of them. ``functools.partial``
sets the options. The only thing that an estimate changes outside itself is the state that a forward pass of ordinary
training changes as well: the generator, and the buffers of a :class:`~fwdlib.objectives.BatchLoss`'s model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import grad_and_value, jvp, vmap

from fwdlib.by_backward import OTHERS
from fwdlib.checks import check_choice, check_count
from fwdlib.forward_mode import ForwardMode, Rewind, quiet_vmap, tangents_on, without_tape
from fwdlib.objectives import ClosureLoss, ModelLoss, Objective, assign_gradients, params_of, swapped
from fwdlib.tangents import TANGENTS, AnyGenerator, Params, Sampler, check_params, is_transformed, sample_tangents

BLOCKS = ("joint", "parameter")
ENGINES = ("auto", "stacked", "torch")
STRUCTURED = ("rank-one", "per-example", "activity")  # tangents that the stacked engine never writes out
RESCALES = ("unbiased",)
RANK_TOLERANCE = 1e-12  # eigenvalues below it, relative to the largest, count as zero


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
    check_params(params)
    if is_transformed():
        grads, (loss, buffers) = grad_and_value(_with_buffers(objective), has_aux=True)(params)
        _keep_buffers(objective, buffers)
        return GradientEstimate(loss.detach(), grads, loss.new_empty(0))
    own = _own(objective, params)
    leaves = own or {name: p.detach() for name, p in params.items()}
    with requiring_grad(leaves), torch.enable_grad(), _placed(objective, leaves, is_own=bool(own)) as evaluate:
        loss = evaluate()
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        else:  # a constant
            found = [torch.zeros_like(p) for p in leaves.values()]
    return GradientEstimate(loss.detach(), dict(zip(leaves, found, strict=True)), loss.new_empty(0))


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
    ``"stacked"`` sends the primal and its tangents through the model as one batch (:mod:`fwdlib.stacked`); structured
    tangents are never written out there, so a pass costs less than one of backprop. ``"auto"`` takes the stacked engine
    where it is faster: for the loss of a model with joint blocks, along structured tangents or several others. Where
    that engine refuses the model, ``"auto"`` takes torch's along the same tangents, then and from then on.

    Every operation of the model needs a forward derivative in torch, or a backward pass that can be differentiated; one
    that has neither raises NotImplementedError with its name. BatchNorm's running
    statistics advance once per estimate, Dropout draws one mask per estimate: see
    :class:`~fwdlib.objectives.BatchLoss`.

    Args:
        objective: params -> scalar.
        params: the point, a dict of real tensors.
        num_tangents: K, how many tangents to average over.
        tangents: ``"rank-one"``, ``"normal"``, ``"rademacher"``, ``"orthonormal"`` or a sampler (see
            :mod:`fwdlib.tangents`); for the loss of a model also ``"per-example"`` and ``"activity"`` (see
            :mod:`fwdlib.stacked.perturbations`), which have less variance and exist in the stacked engine alone.
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
            or does not go with the others, there are no parameters, or the objective is not a scalar.
        TypeError: if a parameter is not a real floating tensor, or the objective does not show its model and the
            stacked engine is asked for.
        NotImplementedError: if a function of the model has no forward derivative.

    Example:
        >>> objective = lambda p: (p["x"] ** 2).sum()
        >>> params = {"x": torch.tensor([1.0, 2.0])}
        >>> draw = torch.Generator().manual_seed(0)
        >>> estimate = forward_gradient(objective, params, num_tangents=10_000, tangents="rademacher", generator=draw)
        >>> [round(value, 1) for value in estimate.grads["x"].tolist()]
        [2.1, 4.0]
    """
    check_choice("blocks", blocks, BLOCKS)
    check_choice("engine", engine, ENGINES)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if isinstance(tangents, str):
        check_choice("tangents", tangents, dict.fromkeys([*TANGENTS, *STRUCTURED]))
    is_structured = isinstance(tangents, str) and tangents in STRUCTURED
    can_fall_back = engine == "auto" and tangents == "rank-one"
    derivatives = _directional_derivatives if engine == "torch" else _derivatives_by_either_engine
    if engine == "auto":
        is_suited = is_structured and _suits_stacked(objective, blocks, chunk_size)
        engine = "stacked" if is_suited and not (can_fall_back and objective.model in _REFUSED) else "torch"
    if engine == "stacked":
        if blocks != "joint" or chunk_size is not None:
            raise ValueError(f"the stacked engine takes blocks='joint' and no chunk_size, got {blocks!r}, {chunk_size}")
        from fwdlib.stacked.estimator import stacked_gradient

        rewind = _rewinding(objective.model, generator) if can_fall_back else None
        try:
            return stacked_gradient(objective, params, num_tangents, tangents, generator)
        except NotImplementedError:
            if rewind is None:
                raise
        rewind()
        _REFUSED.add(objective.model)
    if is_structured and tangents not in TANGENTS:
        raise ValueError(
            f"{tangents!r} tangents belong to the layers of a model: they need a BatchLoss or ClosureLoss, "
            f"blocks='joint', no chunk_size, and engine 'auto' or 'stacked'"
        )
    sampled = sample_tangents(params, num_tangents, tangents, generator)
    if blocks == "joint":
        loss, jvps = derivatives(objective, params, sampled, chunk_size)
        grads = {name: total / num_tangents for name, total in _combine(jvps, sampled).items()}
        return GradientEstimate(loss, grads, jvps)
    loss, jvps = _directional_derivatives(objective, params, _one_block_at_a_time(sampled), chunk_size)
    jvps = jvps.reshape(num_tangents, len(params))
    grads = {
        name: torch.tensordot(jvps[:, i].to(v.dtype), v, dims=1) / num_tangents
        for i, (name, v) in enumerate(sampled.items())
    }
    return GradientEstimate(loss, grads, jvps)


_REFUSED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that the stacked engine has refused: with ``engine="auto"`` they go to torch's from then on."""


def _rewinding(model: nn.Module, generator: AnyGenerator) -> Callable[[], None]:
    # What restores all that an estimate advances: random numbers and buffers.
    rewind = Rewind(model)
    generators = [] if generator is None else getattr(generator, "generators", [generator])
    states = [g.get_state() for g in generators]

    def restore() -> None:
        rewind()
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)

    return restore


def _suits_stacked(objective: Objective, blocks: str, chunk_size: int | None) -> bool:
    return isinstance(objective, ModelLoss) and blocks == "joint" and chunk_size is None


def forward_grad_(model: nn.Module, closure: Callable[[], Tensor], **options: Any) -> Tensor:
    """Set ``.grad`` of a model's parameters to a forward gradient, in place of ``zero_grad()`` and ``loss.backward()``.

    Works with any model and any inputs: the closure calls the model as your loop does.

    Args:
        model: the module whose trainable parameters get a ``.grad``.
        closure: takes nothing, calls the model and returns the loss, a scalar.
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
    estimate = forward_gradient(ClosureLoss(model, closure), params_of(model), **options)
    assign_gradients(model, estimate.grads)
    return estimate.loss


@torch.no_grad()
def projected_gradient(
    objective: Objective,
    params: Params,
    *,
    num_tangents: int = 1,
    tangents: str | Sampler = "normal",
    rescale: str | None = None,
    chunk_size: int | None = None,
    generator: AnyGenerator = None,
) -> GradientEstimate:
    r"""Project the gradient orthogonally onto the span of K tangents, from directional derivatives alone.

    .. math:: g(\theta) = V\,(V^\top V)^{-1}\,d = P_V \nabla f(\theta), \qquad d = V^\top \nabla f(\theta)

    with the tangents as the columns of V: of all vectors in their span the one closest to the gradient. Flügel,
    Coquelin, Weiel, Debus, Streit & Götz 2024, *Beyond Backpropagation: Optimization with Multi-Tangent Forward
    Gradients* (arXiv 2410.17764), the orthogonal projection, "FROG". For K >= P tangents in general position it is the
    gradient itself. It is never longer than the gradient, up to rounding, and it depends on the span alone.

    Bias: :math:`\mathbb E g = K/P\, \nabla f` for K <= P normal or orthonormal tangents, P being the number of
    parameters: always too short. ``rescale="unbiased"`` multiplies by P over the rank of V, and there is none. For
    rademacher tangents the same holds with the expected rank for K, which is less than K only where P is small. The
    components of rank-one tangents are not exchangeable between tensors, so for them neither holds exactly.

    Mean squared error: :math:`(1 - K/P)\, |\nabla f|^2`, and :math:`\mathbb E|g|^2 = K/P\, |\nabla f|^2`; rescaled
    :math:`(P/K - 1)\, |\nabla f|^2`, that of the mean over orthonormal tangents, and less by :math:`(1 + 1/K)\, |\nabla
    f|^2` than that of the mean over normal ones. The squared cosine with the gradient is K/P on average.

    So a learning rate of :func:`forward_gradient` has to be multiplied by about P/K to suit it.

    Cost: K jvps as in :func:`forward_gradient`, and :math:`O(K^2 P + K^3)` for the Gram matrix, that is O(K P) more for
    each jvp: no small part of it where a batch is small. The matrix is summed and decomposed in float64 whatever the
    parameters are, and for float64 ones the solution is refined once, so that the error is about the condition number
    of V times the rounding of the jvps, not its square.

    Tangents that are repeated, zero or more than P are welcome: the Gram matrix of the tangents, scaled to unit length,
    is inverted through its eigenvalues, and one below 1e-12 of the largest counts as zero. What is left is the
    projection onto the span of the others.

    Args:
        objective: params -> scalar.
        params: the point, a dict of real tensors.
        num_tangents: K, how many tangents to project on.
        tangents: ``"normal"``, ``"rademacher"``, ``"orthonormal"``, ``"rank-one"`` or a sampler (see
            :mod:`fwdlib.tangents`).
        rescale: None for the projection, ``"unbiased"`` for P over the rank times it.
        chunk_size: how many tangents go through the model at once; None for all.
        generator: where the tangents come from; None for torch's global generator.

    Returns:
        The estimate; ``jvps`` has shape (K,).

    Raises:
        ValueError: if ``num_tangents`` or ``chunk_size`` is below 1, ``tangents`` or ``rescale`` is unknown, there are
            no parameters, or the objective is not a scalar.
        TypeError: if a parameter is not a real floating tensor.

    Example:
        >>> objective = lambda p: (p["x"] ** 2).sum()
        >>> params = {"x": torch.tensor([1.0, 2.0])}
        >>> draw = torch.Generator().manual_seed(0)
        >>> shadow = projected_gradient(objective, params, generator=draw).grads["x"]  # on a line
        >>> whole = projected_gradient(objective, params, num_tangents=2, generator=draw).grads["x"]
        >>> round(shadow.norm().item(), 2), [round(value, 4) for value in whole.tolist()]
        (1.22, [2.0, 4.0])
    """
    if rescale is not None:
        check_choice("rescale", rescale, RESCALES)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    sampled = sample_tangents(params, num_tangents, tangents, generator)
    loss, jvps = _derivatives_by_either_engine(objective, params, sampled, chunk_size)
    coefficients, rank = _solve_gram(sampled, jvps)
    if rescale == "unbiased":
        coefficients = coefficients * (sum(p.numel() for p in params.values()) / rank.clamp(min=1))
    return GradientEstimate(loss, _combine(coefficients, sampled), jvps)


def _combine(coefficients: Tensor, tangents: Params) -> Params:
    return {name: torch.tensordot(coefficients.to(v.dtype), v, dims=1) for name, v in tangents.items()}


def _solve_gram(tangents: Params, jvps: Tensor) -> tuple[Tensor, Tensor]:
    # The least c with V^T V c = d, and the rank of V. By eigenvalues rather than Cholesky, which is faster but neither
    # tells the rank nor fails reliably where it is short; and without a branch on data, so that it can be vmapped.
    rows, d = [v.reshape(len(jvps), -1) for v in tangents.values()], jvps.double()
    gram = sum(wide @ wide.mT for wide in map(Tensor.double, rows))
    squares = gram.diagonal()
    scale = torch.where(squares > 0, squares, torch.inf).rsqrt()  # a zero tangent stays zero
    values, vectors = torch.linalg.eigh(scale.unsqueeze(1) * gram * scale)
    kept = values > RANK_TOLERANCE * values[-1]
    root = scale.unsqueeze(1) * vectors * torch.where(kept, values, torch.inf).rsqrt()  # root root^T inverts the matrix
    c = root @ (root.mT @ d)
    if jvps.dtype == d.dtype:  # else the rounding of the jvps is more than that of c
        c = c + root @ (root.mT @ (d - sum(wide @ (c @ wide) for wide in map(Tensor.double, rows))))
    return c, kept.sum(dtype=d.dtype)


def _one_block_at_a_time(tangents: Params) -> Params:
    # K tangents over n tensors -> K * n tangents, each zero outside one tensor: row k * n + i is tangent k of tensor i.
    n = len(tangents)
    rows = {}
    for i, (name, v) in enumerate(tangents.items()):
        mask = torch.zeros(n, dtype=v.dtype, device=v.device)
        mask[i] = 1
        rows[name] = (v.unsqueeze(1) * mask.reshape(n, *[1] * (v.dim() - 1))).flatten(0, 1)
    return rows


def _derivatives_by_either_engine(
    objective: Objective, params: Params, tangents: Params, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    # Several tangents of a model are one stacked pass, where that is possible, and a pass for each with torch's engine.
    is_single = len(next(iter(tangents.values()))) == 1
    if is_single or is_transformed() or not _suits_stacked(objective, "joint", chunk_size):
        return _directional_derivatives(objective, params, tangents, chunk_size)
    if objective.model not in _REFUSED:
        from fwdlib.stacked.estimator import stacked_jvp

        rewind = Rewind(objective.model)
        try:
            return stacked_jvp(objective, params, tangents)
        except NotImplementedError:
            rewind()
            _REFUSED.add(objective.model)
    return _directional_derivatives(objective, params, tangents, chunk_size)


def _directional_derivatives(
    objective: Objective, params: Params, tangents: Params, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    # The loss, and one jvp for each of the rows of `tangents`.
    if is_transformed() or not isinstance(objective, ModelLoss):
        return _vmapped_derivatives(objective, params, tangents, chunk_size)
    # One pass for each tangent, on tensors that the model can use in every way it uses its parameters.
    rewind = Rewind(objective.model)
    own = _own(objective, params)
    leaves = own or {name: p.detach().clone() for name, p in params.items()}
    jvps = []
    for row in range(len(next(iter(tangents.values())))):
        if row:
            rewind()
        tangent = {name: v[row] for name, v in tangents.items()}
        try:
            with _placed(objective, leaves, is_own=bool(own)) as evaluate:
                loss, derivative = _along(evaluate, leaves, tangent, without_tape(objective.model.parameters()))
        except RuntimeError as error:
            if "Nested forward mode" in str(error):
                rewind()  # the model calls torch.func.jvp, which nests in another torch.func.jvp alone
                return _vmapped_derivatives(objective, params, tangents, chunk_size)
            if "does not require grad" not in str(error):
                raise
            rewind()  # the model calls torch.autograd.grad by its own parameters, which takes a tape
            with _placed(objective, leaves, is_own=bool(own)) as evaluate:
                loss, derivative = _along(evaluate, leaves, tangent, requiring_grad(leaves))
        jvps.append(derivative)
    return loss, torch.stack(jvps)


def _along(
    evaluate: Callable[[], Tensor], leaves: Params, tangent: Params, tape: AbstractContextManager
) -> tuple[Tensor, Tensor]:
    with _named_refusal(), tangents_on(leaves, tangent), tape, torch.enable_grad():
        with ForwardMode(leaves):
            loss = evaluate()
        loss, derivative = forward_ad.unpack_dual(loss)
    return loss.detach(), torch.zeros_like(loss) if derivative is None else derivative.detach()


def _vmapped_derivatives(
    objective: Objective, params: Params, tangents: Params, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    # All tangents in one vmapped pass, or in as few as chunk_size allows.
    evaluate = _with_buffers(objective)
    params = {name: p.detach() for name, p in params.items()}

    def along(tangent: Params) -> tuple[Tensor, Tensor, Params]:
        return jvp(evaluate, (params,), (tangent,), has_aux=True)

    with _named_refusal(), torch.enable_grad():
        if len(next(iter(tangents.values()))) == 1:
            tangent = {name: v[0] for name, v in tangents.items()}
            is_plain = not is_transformed() and not isinstance(objective, ModelLoss)
            loss, jvps, buffers = _function_along(objective, params, tangent) if is_plain else along(tangent)
            jvps = jvps.reshape(1)
        else:  # randomness="same": one Dropout mask for all tangents, in every chunk
            with quiet_vmap():
                losses, jvps, buffers = vmap(along, randomness="same", chunk_size=chunk_size)(tangents)
            loss, buffers = losses[0], {name: buffer[0] for name, buffer in buffers.items()}
    _keep_buffers(objective, buffers)
    return loss, jvps


def _function_along(objective: Objective, params: Params, tangent: Params) -> tuple[Tensor, Tensor, Params]:
    # torch.func.jvp without the overhead of its wrappers: half the time of a step on the smallest objectives.
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p.detach(), tangent[name]) for name, p in params.items()}
        with ForwardMode(duals):
            loss = check_scalar(objective(duals))
        loss, derivative = forward_ad.unpack_dual(loss)
    return loss.detach(), torch.zeros_like(loss) if derivative is None else derivative.detach(), {}


@contextmanager
def _named_refusal() -> Iterator[None]:
    # Torch's own messages name the function, and advise to file a feature request.
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        if OTHERS in first or (not isinstance(error, NotImplementedError) and "jvp" not in first):
            raise
        raise NotImplementedError(
            f"torch has no forward derivative for a function of this objective: {first} Write that function by others "
            f"that have one, give its torch.autograd.Function a `jvp`, or use backprop_gradient."
        ) from error


def _own(objective: Objective, params: Params) -> Params | None:
    return objective.own(params) if isinstance(objective, ModelLoss) else None


@contextmanager
def _placed(objective: Objective, leaves: Params, *, is_own: bool) -> Iterator[Callable[[], Tensor]]:
    # Yield the loss as a function of nothing, with the leaves in the places of the model's parameters.
    if not isinstance(objective, ModelLoss):
        yield lambda: check_scalar(objective(leaves))
    elif is_own:
        yield lambda: check_scalar(objective.run())
    else:
        objective.check_names(leaves)
        with swapped(objective.model, leaves, {}):
            yield lambda: check_scalar(objective.run())


@contextmanager
def requiring_grad(leaves: Params) -> Iterator[None]:
    """Let tensors require a gradient, for as long as the context lasts."""
    frozen = [p for p in leaves.values() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_()
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _with_buffers(objective: Objective) -> Callable[[Params], tuple[Tensor, Params]]:
    evaluate = objective.with_buffers if isinstance(objective, ModelLoss) else lambda params: (objective(params), {})

    def checked(params: Params) -> tuple[Tensor, Params]:
        with ForwardMode(params):
            loss, buffers = evaluate(params)
        return check_scalar(loss), buffers

    return checked


def check_scalar(loss: Any) -> Tensor:
    """Return what an objective returned, if it is a scalar tensor.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the objective must return a scalar tensor, got {shape}; reduce it with .mean() or .sum()")
    return loss


def _keep_buffers(objective: Objective, buffers: dict[str, Any]) -> None:
    if buffers and isinstance(objective, ModelLoss):
        objective.set_buffers(buffers)
