"""A table of the torch functions that a model calls in the stacked pass, and which of them are fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fwdlib.forward.rewind import Rewind
from fwdlib.objectives import params_of, swapped
from fwdlib.stacked.estimator import run
from fwdlib.stacked.forward_pass import Call
from fwdlib.stacked.perturbations import Perturbation
from fwdlib.tangents import check_params, random_signs

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def explain(model: nn.Module, inputs: Tensor) -> pd.DataFrame:
    """List the torch functions that a model calls in the stacked pass, and which of them have a rule.

    Functions without a rule go through :func:`torch.func.jvp`, which is exact and slow. What a forward pass changes of
    the model and of random numbers is restored.

    Args:
        model: any module.
        inputs: a batch for the model.

    Returns:
        A table with a row for each call on a tensor with tangents: ``function``, ``shape`` of its result, and ``by``:
        ``"rule"`` or ``"torch.func.jvp"``.

    Raises:
        NotImplementedError: if a function has neither a rule nor a forward derivative in torch, or the model changes
            what cannot be restored.

    Example:
        >>> explain(nn.Sequential(nn.Linear(3, 2), nn.Softsign()), torch.zeros(5, 3))
                               function   shape              by
        0    torch.nn.functional.linear  (5, 2)            rule
        1  torch.nn.functional.softsign  (5, 2)  torch.func.jvp
    """
    import pandas as pd

    params = {name: p.requires_grad_() for name, p in params_of(model).items()}
    check_params(params)
    calls: list[Call] = []
    perturbation = Perturbation(params, 1, len(inputs), random_signs)
    rewind = Rewind(model)
    try:
        with swapped(model, params, {}):
            run(model, lambda: model(inputs), perturbation, params, calls)
    finally:
        rewind()
    rows = [(call.name, call.shape, "rule" if call.has_rule else "torch.func.jvp") for call in calls]
    return pd.DataFrame(rows, columns=["function", "shape", "by"])
