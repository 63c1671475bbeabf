"""Gradients without backpropagation: forward gradients beside backprop.

``import fwdlib`` is quick and imports no torch. A public name is imported from its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> its module. The blocks follow the way of the data: objective, estimator, training, results.
PUBLIC = {
    "BatchLoss": "objectives",
    "ClosureLoss": "objectives",
    "params_of": "objectives",
    "assign_gradients": "objectives",
    "forward_gradient": "estimators",
    "projected_gradient": "methods.projection",
    "backprop_gradient": "estimators",
    "forward_grad_": "estimators",
    "forward_step_": "steps",
    "GradientEstimate": "estimators",
    "sample_tangents": "tangents",
    "SGDStep": "stacked.step",
    "ProcessLoss": "methods.process",
    "sensitivity_gradient": "methods.sensitivity",
    "explain": "stacked.explain",
    "register_rule": "stacked.forward_pass",
    "Dual": "stacked.dual",
    "train": "training",
    "evaluate": "training",
    "make_optimizer": "training",
    "Dataset": "data",
    "load_penguins": "data",
    "load_kmnist": "data",
    "load_images": "data",
    "save_run": "results",
    "load_run": "results",
}

__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fwdlib' has no attribute {name!r}; it has {', '.join(PUBLIC)}")
    value = getattr(importlib.import_module(f"fwdlib.{PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
