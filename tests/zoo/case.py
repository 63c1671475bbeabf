"""What a case of the zoo is: a small model with random weights, and a loss of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 5


class Case(NamedTuple):
    """A model and its loss on a batch."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    """Takes the model, returns a scalar."""
    num_examples: int
    in_double: bool = False
    """Whether the model computes parts in float32 whatever its dtype is; the zoo then reads float64 for float32."""
    has_eval: bool = True
    """Whether there is a loss in eval mode."""


Builder = Callable[[], Case]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def logits_of(output: Any) -> Tensor:
    """Return the mean of all logits that a classifier returns: those of auxiliary heads as well."""
    if isinstance(output, dict):
        output = [output[key] for key in ("logits", "out", "aux") if output.get(key) is not None]
    if isinstance(output, (list, tuple)):
        return torch.stack([logits_of(part) for part in output if part is not None]).mean(0)
    return output


def classifies(model: nn.Module, inputs: Tensor, **options: Any) -> Case:
    """Return a case with the cross entropy of a classifier: logits (B, C, ...) for inputs (B, ...)."""

    def loss(model: nn.Module) -> Tensor:
        logits = logits_of(model(inputs))
        targets = torch.arange(logits.numel() // logits.shape[1]).reshape(len(logits), *logits.shape[2:])
        return F.cross_entropy(logits, targets % logits.shape[1])

    return Case(model, loss, len(inputs), **options)


def images(model: nn.Module, size: int = 32, channels: int = 3, batch: int = 4, **options: Any) -> Case:
    return classifies(model, torch.randn(batch, channels, size, size), **options)


def regresses(model: nn.Module, *inputs: Tensor, **options: Any) -> Case:
    """Return a case with the mean squared error of a model's one output to fixed targets."""

    def loss(model: nn.Module) -> Tensor:
        output = model(*inputs)
        targets = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        return F.mse_loss(output, targets)

    return Case(model, loss, len(inputs[0]), **options)
