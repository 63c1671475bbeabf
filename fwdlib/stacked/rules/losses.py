"""Rules of losses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwdlib.stacked.dual import Dual
from fwdlib.stacked.forward_pass import Pass
from fwdlib.stacked.rules.normalisation import log_softmax
from fwdlib.stacked.rules.reductions import sum_
from fwdlib.stacked.rules.rows import dual_of, is_autocast, is_half, parts_of
from fwdlib.stacked.rules.signatures import rule_of
from fwdlib.tangents import is_traced, is_transformed


@rule_of(F.cross_entropy)
def cross_entropy(
    run: Pass,
    logits: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Compute the log softmax and then the loss, which is linear in it."""
    is_soft = target.is_floating_point() or label_smoothing
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if run.has_tangents(weight) or run.has_tangents(target) or parts_of(run, logits)[0].dim() == 1:
        return NotImplemented
    if is_soft and (weight is not None or not 0 <= label_smoothing <= 1 or not _fits(target, logits, ignore_index)):
        return NotImplemented
    log_probs = log_softmax(run, _as_in_losses(run, logits), 1)
    if not is_soft:
        return nll_loss(run, log_probs, target, weight, None, ignore_index, None, reduction)
    stack, num_classes = log_probs.stack, logits.shape[1]
    count: int | Tensor = logits.numel() // num_classes
    if target.is_floating_point():
        losses = Dual(-(stack * ((1 - label_smoothing) * target + label_smoothing / num_classes)).sum(2))
    else:
        valid = target != ignore_index
        count = valid.sum()
        hard = nll_loss(run, log_probs, target, None, None, ignore_index, None, "none")
        uniform = torch.where(valid, -stack.mean(2), 0)
        losses = Dual((1 - label_smoothing) * hard.stack + label_smoothing * uniform)
    if reduction == "none":
        return losses
    total = sum_(run, losses)
    if reduction == "sum":
        return total
    mean = total.stack / count
    if not target.is_floating_point():
        _unless_ignored(mean[0], mean[1:], target, ignore_index)
    return Dual(mean)


def _unless_ignored(mean: Tensor, tangents: Tensor, target: Tensor, ignore_index: int) -> None:
    # The mean over no target at all is nan, and its gradient zero.
    is_readable = type(mean) is Tensor and mean.device.type == "cpu" and not (is_traced() or is_transformed())
    if is_readable and not math.isnan(mean.item()):
        return
    tangents.masked_fill_((target == ignore_index).all(), 0)


def _fits(target: Tensor, logits: Tensor, ignore_index: int) -> bool:
    # Whether the targets are probabilities, one for each logit, or class indices, as torch takes them.
    if not target.is_floating_point():
        return target.shape == (len(logits), *logits.shape[2:])
    is_as_wide = torch.promote_types(target.dtype, logits.dtype) == logits.dtype
    return target.shape == logits.shape and ignore_index < 0 and is_as_wide


@rule_of(F.nll_loss)
def nll_loss(
    run: Pass,
    log_probs: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    """Apply the loss to all rows: it is linear in the log probabilities."""
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if not isinstance(target, Tensor) or run.has_tangents(weight) or not run.has_tangents(log_probs):
        return NotImplemented
    primal, tangents = parts_of(run, log_probs)
    if primal.dim() < 2:
        return NotImplemented
    options = {"weight": weight, "ignore_index": ignore_index}
    if reduction != "none" and not run.perturbation.per_example:
        rows = primal, *tangents.unbind()
        rows = torch.stack([F.nll_loss(row, target, reduction=reduction, **options) for row in rows])
        if reduction == "mean":
            _unless_ignored(rows[0], rows[1:], target, ignore_index)
        return Dual(rows)
    stack = run.stack(log_probs)
    value = F.nll_loss(stack[0], target, reduction=reduction, **options)
    rows = stack[1:].flatten(0, 1)
    pieces = F.nll_loss(rows, target.repeat(len(stack) - 1, *[1] * (target.dim() - 1)), reduction="none", **options)
    pieces = pieces.reshape(len(stack) - 1, *target.shape)
    if reduction == "none":
        return dual_of(value, pieces)
    if reduction == "mean":
        dtype = torch.float32 if is_half(stack) else stack.dtype  # the total weight may be large
        options["weight"] = None if weight is None else weight.to(dtype)
        ones = stack.new_full(stack.shape[1:], -1, dtype=dtype)
        pieces = pieces / F.nll_loss(ones, target, reduction="sum", **options)
        _unless_ignored(value, pieces, target, ignore_index)
    pieces = pieces.flatten(2).sum(2) if pieces.dim() > 2 else pieces
    return dual_of(value, run.split_examples(pieces) if run.is_batch(log_probs) else pieces.sum(1))


@rule_of(F.mse_loss)
def mse_loss(
    run: Pass,
    x: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    """Compute the loss by its formula."""
    if size_average is not None or reduce is not None or weight is not None or x.shape != target.shape:
        return NotImplemented
    if reduction not in ("mean", "sum", "none"):
        return NotImplemented
    x, target = _as_in_losses(run, x), _as_in_losses(run, target)
    with run:
        squares = torch.square(x - target)
        return squares.mean() if reduction == "mean" else squares.sum() if reduction == "sum" else squares


def _as_in_losses(run: Pass, x: Tensor) -> Tensor:
    # Under autocast torch computes losses in float32.
    if not (is_half(x) and is_autocast(x)):
        return x
    with run:
        return x.float()
