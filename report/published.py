"""One training iteration the way the published notebooks take it, to time it beside ours on the same machine.

The notebooks (davidraamirez/GradientWithoutBackpropagation, 2023) predict one example at a time, in a Python loop,
inside the function that is differentiated; take one jvp per parameter tensor, each a pass of its own (logistic
regression, MLP); compute the training loss once more after the update; and evaluate the test set in the same loop,
inside the timer. This module does the same work in our words, with our models, so that the ratio of the times says
what the code does and not what machine it ran on. It is for timing only.
"""

from __future__ import annotations

from collections.abc import Callable

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
    loader = DataLoader(TensorDataset(data.test_inputs, data.test_targets), shuffle=True)

    def loss(params: Params) -> Tensor:
        return F.nll_loss(predict(model, params, data.train_inputs).log(), data.train_targets)

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
        return updated

    def evaluate(params: Params) -> None:
        # inside the published timer: every test example twice, for the losses and for the errors
        inputs, targets = data.test_inputs, data.test_targets
        if not per_tensor:
            drawn = [next(iter(loader)) for _ in range(len(targets))]
            inputs, targets = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        F.nll_loss(predict(model, params, inputs).log(), targets).item()
        pairs = zip(predict(model, params, inputs), targets, strict=True)
        sum(int(probability.argmax() != target) for probability, target in pairs)
        if per_tensor:
            loss(params).item()

    return step
