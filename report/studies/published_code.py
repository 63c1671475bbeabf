"""One training iteration the way the published notebooks take it, to time it beside ours on the same machine.

The notebooks (davidraamirez/GradientWithoutBackpropagation, 2023) predict one example at a time, in a Python loop,
inside the function that is differentiated; take one jvp per parameter tensor, each a pass of its own (logistic
regression, MLP); compute the training loss once more after the update; and evaluate the test set in the same loop,
inside the timer. This module does the same work in our words, with our models, so that the ratio of the times says
what the code does and not what machine it ran on. It is for timing only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader, TensorDataset

from fwdlib.data import Dataset
from fwdlib.tangents import Params


def predict(model: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    """Return the class probabilities of inputs (N, ...), shape (N, classes), one example after the other."""
    rows = [functional_call(model, params, (inputs[i : i + 1],)).softmax(1) for i in range(len(inputs))]
    return torch.cat(rows)


def published_step(
    model: nn.Module, data: Dataset, learning_rate: float, per_tensor: bool
) -> Callable[[Params], Params]:
    """Return a function that takes params through one published forward-gradient iteration.

    Args:
        model: one of the three, for its structure.
        data: the data set; the whole training part is the batch.
        learning_rate: of the update.
        per_tensor: as for logistic regression and the MLP: a jvp per parameter tensor with standardised tangents, and
            the training loss once more. Else as for the CNN: one jvp with normal tangents, of parameters that still
            require gradients, so that the reverse graph is built as well; and test images drawn one by one, each from
            a new iterator of a data loader.
    """
    loss = partial(_loss, model, data.train_inputs, data.train_targets)
    evaluate = _evaluation(model, data, drawn=not per_tensor)

    def derivative_of_one(params: Params, name: str, tangent: Tensor) -> Tensor:
        return jvp(lambda value: loss({**params, name: value}), (params[name],), (tangent,))[1]

    def step(params: Params) -> Params:
        params = {name: p.detach().requires_grad_(not per_tensor) for name, p in params.items()}
        tangents = {name: torch.randn_like(p) for name, p in params.items()}
        if per_tensor:
            tangents = {name: (v - v.mean()) / v.std() for name, v in tangents.items()}
            slopes = {name: derivative_of_one(params, name, v) for name, v in tangents.items()}
        else:
            slopes = dict.fromkeys(params, jvp(loss, (params,), (tangents,))[1])
        with torch.no_grad():
            updated = {name: p - learning_rate * slopes[name] * tangents[name] for name, p in params.items()}
        evaluate(updated)
        if per_tensor:
            loss(updated).item()
        return updated

    return step


def published_backprop_step(
    model: nn.Module, data: Dataset, learning_rate: float, one_by_one: bool
) -> Callable[[Params], Params]:
    """Return a function that takes params through one published backprop iteration.

    Args:
        model: one of the three, for its structure.
        data: the data set.
        learning_rate: of the update.
        one_by_one: as for the CNN: a step of Adam for each training image but the last. Else one step of gradient
            descent on all of them, predicted one after the other.
    """
    evaluate = _evaluation(model, data, drawn=one_by_one)
    parts = [slice(i, i + 1) for i in range(len(data.train_targets) - 1)] if one_by_one else [slice(None)]

    def step(params: Params) -> Params:
        params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        optimizer = (torch.optim.Adam if one_by_one else torch.optim.SGD)(list(params.values()), lr=learning_rate)
        for part in parts:
            optimizer.zero_grad()
            _loss(model, data.train_inputs[part], data.train_targets[part], params).backward()
            optimizer.step()
        evaluate(params)
        return params

    return step


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, params: Params) -> Tensor:
    return F.nll_loss(predict(model, params, inputs).log(), targets)


def _evaluation(model: nn.Module, data: Dataset, drawn: bool) -> Callable[[Params], None]:
    """Return what the published timer holds besides: every test example predicted twice, for the losses and the errors.

    Args:
        model: one of the three.
        data: the data set.
        drawn: whether the test images are drawn one by one, each from a new iterator of a data loader.
    """
    loader = DataLoader(TensorDataset(data.test_inputs, data.test_targets), shuffle=True)

    @torch.no_grad()
    def evaluate(params: Params) -> None:
        inputs, targets = data.test_inputs, data.test_targets
        if drawn:
            images = [next(iter(loader)) for _ in range(len(targets))]
            inputs, targets = (torch.cat(parts) for parts in zip(*images, strict=True))
        _loss(model, inputs, targets, params).item()
        pairs = zip(predict(model, params, inputs), targets, strict=True)
        sum(int(probability.argmax() != target) for probability, target in pairs)

    return evaluate
