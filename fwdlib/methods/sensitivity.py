r"""Few parameters, many steps: exact gradients of a simulated process by forward mode, in constant memory.

A process is a state that a function advances, :math:`z_{t+1} = s(z_t, \theta)`, for T steps: the integrator of a
differential equation, a training loop whose learning rate is a parameter, a recurrent layer. Beside the state runs its
derivative along K tangents of the parameters,

.. math:: \dot z_{t+1} = \frac{\partial s}{\partial z}\, \dot z_t + \frac{\partial s}{\partial \theta}\, v.

With the P unit tangents that is the exact gradient. Nothing of the past is kept, so the memory does not depend on T;
backprop keeps all states, or some of them and computes each step twice. The time grows with P: forward mode wins up to
some dozens of parameters (Ma et al. 2021, *A Comparison of Automatic Differentiation and Continuous Sensitivity
Analysis for Derivatives of Differential Equation Solutions*, arXiv 1812.01892).

:func:`sensitivity_gradient` is the estimator for a :class:`~fwdlib.methods.process.ProcessLoss`, and
:func:`online_gradient` the one for element-wise recurrence, where a few tangents are exact for any number of
parameters. :func:`~fwdlib.methods.reverse.reverse_gradient` is their rival.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten
from tqdm.auto import tqdm

from fwdlib import runtime
from fwdlib.estimators import GradientEstimate, combined
from fwdlib.methods.process import ProcessLoss, is_inexact, parted
from fwdlib.methods.process_runs import Layout, Moment, Run, either, find_step
from fwdlib.objectives import requiring_grad
from fwdlib.tangents import AnyGenerator, Params, Sampler, check_params, count_tangents, divisor_of, sample_tangents


@torch.no_grad()
def sensitivity_gradient(
    objective: ProcessLoss,
    params: Params,
    *,
    num_tangents: int = 1,
    tangents: str | Sampler = "unit",
    generator: AnyGenerator = None,
    compiled: bool | None = None,
    progress: str | None = "steps",
) -> GradientEstimate:
    """Compute the gradient of a process by forward mode: exact with unit tangents, else an estimate.

    This is real-time recurrent learning (Williams & Zipser 1989) for few parameters, and the forward hypergradient of
    Franceschi et al. 2017, *Forward and Reverse Gradient-Based Hyperparameter Optimization* (arXiv 1703.01785, eq. 14).

    Cost: the work of 1 + K runs of the process; one state and K tangents of it in memory, whatever T is.

    Args:
        objective: the process.
        params: the point.
        num_tangents: K; leave it out for unit tangents, which are P.
        tangents: as for :func:`fwdlib.forward_gradient`, but for those that need layers.
        generator: where random tangents come from.
        compiled: whether the steps run as machine code, some of them at a time; None for yes if there is a compiler
            and the process is long, or used again. Compiling takes seconds to half a minute, once for each process, and
            is done anew if Python values that the step reads change.
        progress: title of the progress bar, which appears after two seconds; None for no bar.

    Returns:
        The estimate. With unit tangents the ``jvps`` are the gradient's components.

    Raises:
        FloatingPointError: if the loss or a derivative is not finite: the message names the first such step.
        ValueError: if a step changes the layout of the state or reads a parameter that there is not, or as
            :func:`fwdlib.forward_gradient`.
        TypeError: if the objective is not a process, or as :func:`fwdlib.forward_gradient`.
        NotImplementedError: if a function of the step has no forward derivative.
        RuntimeError: if ``compiled`` is True and there is no compiler.
    """
    if not isinstance(objective, ProcessLoss):
        raise TypeError(
            f"sensitivity_gradient needs a ProcessLoss, got {type(objective).__name__}; for any other objective use "
            f"forward_gradient(..., tangents='unit')"
        )
    check_params(params)
    params = {name: p.detach() for name, p in params.items()}
    num_tangents = count_tangents(params, num_tangents, tangents)
    along = sample_tangents(params, num_tangents, tangents, generator)
    loss, jvps = 0, 0
    for moment in sensitivities(objective, params, along, compiled=compiled, progress=progress):
        value, derivatives = _loss_along(objective, params, along, moment)
        if not (value.isfinite() and derivatives.isfinite().all()):
            raise FloatingPointError(_where_it_diverged(objective, params, moment.num_steps))
        loss, jvps = loss + value, jvps + derivatives
    return combined(loss, jvps, along, divisor_of(num_tangents, tangents))


@torch.no_grad()
def sensitivities(
    process: ProcessLoss,
    params: Params,
    tangents: Params,
    *,
    compiled: bool | None = None,
    progress: str | None = "steps",
) -> Iterator[Moment]:
    """Run a process with the derivatives of its state along given tangents, and yield both at its moments.

    Args:
        process: the process.
        params: the point.
        tangents: for each parameter of shape (...) a tensor of shape (K, ...).
        compiled: as for :func:`sensitivity_gradient`.
        progress: as for :func:`sensitivity_gradient`.

    Yields:
        The state after each number of steps in ``process.moments``.

    Raises:
        ValueError: as :func:`sensitivity_gradient`.
        NotImplementedError: as :func:`sensitivity_gradient`.
        RuntimeError: as :func:`sensitivity_gradient`.
    """
    run, done = Run(process, params, tangents, compiled), 0
    with tqdm(total=process.num_steps, desc=progress, disable=progress is None, delay=2, leave=False) as bar:
        for moment in process.moments:
            while done < moment:
                num = run.advance(done, moment)
                done += num
                bar.update(num)
            yield run.moment(moment)


@torch.no_grad()
def online_gradient(
    objective: ProcessLoss,
    params: Params,
    *,
    elementwise: Sequence[str],
    compiled: bool | None = None,
    progress: str | None = "steps",
) -> GradientEstimate:
    r"""Compute the exact gradient of an element-wise recurrence while its inputs come in, for any number of units.

    Where unit i of the state depends on component i of each parameter alone, the derivatives of all units by their own
    components are one tangent of ones for each parameter, :math:`e_i = \partial z_i / \partial a_i`. At a loss,

    .. math:: \frac{\partial L}{\partial a_i} = \sum_n \frac{\partial L}{\partial z_{ni}}\, e_{ni},

    where :math:`\partial L/\partial z` is the derivative of the loss by the present state: no step of the past is
    needed (Zucchet et al. 2023, *Online learning of long-range dependencies*, arXiv 2305.15947, section 3). It is taken
    by a backward pass through the loss alone, which also gives the gradients of the parameters of a readout.

    Cost: the work of 1 + K runs, K being the number of ``elementwise`` parameters, and the memory of 1 + K states.

    Args:
        objective: the process. Its step uses the ``elementwise`` parameters alone; its loss may use any.
        params: the point.
        elementwise: names of the parameters of the step. Their shapes are the last axes of the state's tensors.
        compiled: as for :func:`sensitivity_gradient`.
        progress: as for :func:`sensitivity_gradient`.

    Returns:
        The exact gradient; ``jvps`` is empty.

    Raises:
        ValueError: if the step mixes units or uses another parameter; checked at the first steps of each call, or once
            where steps are compiled.
        FloatingPointError: as :func:`sensitivity_gradient`.
    """
    check_params(params)
    params = {name: p.detach() for name, p in params.items()}
    ones = _ones(params, elementwise)
    step = find_step(objective, params, objective.start(params), trace=False)
    key = (*elementwise, *((name, p.shape) for name, p in params.items()))
    if step is None or key not in step.elementwise:
        _check_elementwise(objective, params, elementwise, ones)
    grads, total = {name: torch.zeros_like(p) for name, p in params.items()}, 0
    for moment in sensitivities(objective, params, ones, compiled=compiled, progress=progress):
        leaves, spec = tree_flatten(moment.state)
        leaves = [x.detach().clone() for x in leaves]
        own = {name: p.clone() for name, p in params.items()}
        inexact = [x for x in leaves if is_inexact(x)]
        with requiring_grad([*inexact, *own.values()]), torch.enable_grad():
            loss = objective.loss_at(moment.num_steps, tree_unflatten(leaves, spec), own)
            by_loss = torch.autograd.grad(loss, [*inexact, *own.values()], materialize_grads=True)
        if not all(g.isfinite().all() for g in (loss, *by_loss)):
            raise FloatingPointError(_where_it_diverged(objective, params, moment.num_steps))
        total = total + loss.detach()
        for name, direct in zip(own, by_loss[len(inexact) :], strict=True):
            grads[name] += direct
        eligibility = [e for e in tree_leaves(moment.tangents) if e is not None]
        for k, name in enumerate(elementwise):
            for g, e in zip(by_loss, eligibility, strict=False):
                grads[name] += (g.conj() * e[k]).real.sum_to_size(params[name].shape)
    step = step or find_step(objective, params, objective.start(params), trace=False)
    if step is not None:
        step.elementwise.add(key)
    return GradientEstimate(total, grads, total.new_empty(0))


def _loss_along(process: ProcessLoss, params: Params, along: Params, moment: Moment) -> tuple[Tensor, Tensor]:
    # The loss of one state, and its derivatives along the K tangents.
    leaves, spec = tree_flatten(moment.state)
    layout = Layout(list(params), spec, [*map(is_inexact, leaves)])
    state, others = parted(moment.state)
    slopes = [x for x in tree_leaves(moment.tangents) if x is not None]
    point, tangents, _ = layout.cut([*params.values(), *(along[name] for name in params), *state, *slopes])

    def loss(point: Params) -> tuple[list[Tensor], list[Tensor]]:
        own, state = layout.uncut(point, others)
        return [process.loss_at(moment.num_steps, state, own)], []

    (value,), (derivatives,), _ = either(process.loss, loss, point, tangents)
    return value, derivatives


def _where_it_diverged(process: ProcessLoss, params: Params, moment: int) -> str:
    # Runs the process once more, without derivatives, to find the first state that is not finite.
    values = ", ".join(f"{name} = {_short(p)}" for name, p in params.items())
    state = process.start(params)
    for t in range(moment + 1):
        for path, x in tree_flatten_with_path(state)[0]:
            if is_inexact(x) and not x.isfinite().all():
                where = f"state{keystr(path)} is {x[~x.isfinite()][0].item()} after {t} of {process.num_steps} steps"
                return (
                    f"{where}, with {values}. Either the process diverges there, and needs smaller steps or another "
                    f"start, or a parameter has left the domain of a function of the step"
                )
        if t < moment:
            state = process.advance(state, params, t, process.inputs_between(t, t + 1), 1)
    return (
        f"all states up to step {moment} are finite, but the loss there or its derivative is not, with {values}: see "
        f"the loss, and functions without a finite derivative, such as sqrt at 0"
    )


def _short(p: Tensor) -> str:
    values = [f"{x:.4g}" for x in p.flatten()[:4].tolist()]
    return values[0] if p.dim() == 0 else f"[{', '.join(values)}{', ...' if p.numel() > 4 else ''}]"


def _ones(params: Params, elementwise: Sequence[str]) -> Params:
    # One tangent for each name, of ones in its parameter and zeros elsewhere.
    if not elementwise or not set(elementwise) <= params.keys():
        raise ValueError(f"elementwise must name parameters, among {', '.join(params)}, got {list(elementwise)}")
    rows = torch.eye(len(elementwise))
    return {
        name: torch.stack(
            [torch.full_like(p, row[elementwise.index(name)] if name in elementwise else 0) for row in rows]
        )
        for name, p in params.items()
    }


def _check_elementwise(process: ProcessLoss, params: Params, elementwise: Sequence[str], ones: Params) -> None:
    # Along other weights of its components, a parameter of an element-wise step moves each unit by its own weight times
    # as much. The weights all differ: a step that mixes units may well keep a pattern.
    num = min(3, process.num_steps)
    draw = runtime.generator(0, next(iter(params.values())).device, "weights of units")

    def random(x: Tensor) -> Tensor:  # zeros, such as the first inputs often are, hide what a step does
        return torch.randn(x.shape, generator=draw, dtype=x.dtype, device=x.device) if is_inexact(x) else x

    initial, inputs = tree_map(random, process.start(params)), tree_map(random, process.inputs_between(0, num))
    short = ProcessLoss(process.step, initial, process.loss, num, inputs=inputs[0] if inputs else None)
    weights = {
        name: (0.5 + torch.rand(p.shape, generator=draw).to(p) if name in elementwise else torch.zeros_like(p))
        for name, p in params.items()
    }
    other = {name: torch.randn(p.shape, generator=draw).to(p) for name, p in params.items()}
    used = {name: torch.zeros_like(p) if name in elementwise else other[name] for name, p in params.items()}
    along = {name: torch.cat([v, v * weights[name], used[name].unsqueeze(0)]) for name, v in ones.items()}
    run = Run(short, params, along, False)
    run.advance(0, num)
    for path, x in tree_flatten_with_path(run.moment(num).tangents)[0]:
        if x is None:
            continue
        if x[-1].any():
            raise ValueError(f"the step uses a parameter that elementwise does not name, {list(elementwise)}")
        for k, name in enumerate(elementwise):
            try:
                expected = x[k] * weights[name]
            except RuntimeError:
                expected = None
            rounding = 1e-5 * x[k].abs().nan_to_num(0, 0).max().item()
            if expected is None or not torch.allclose(
                x[len(elementwise) + k], expected, rtol=1e-4, atol=rounding, equal_nan=True
            ):
                raise ValueError(
                    f"the step is not element-wise: unit i of state{keystr(path)} depends on other components of "
                    f"{name!r} than component i. Use sensitivity_gradient, or reverse_gradient"
                )
