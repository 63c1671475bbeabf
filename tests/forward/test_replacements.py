"""Functions in place of torch's: the same values, and backprop's derivatives, in both engines."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.estimators import backprop_gradient
from fwdlib.forward.derivatives import derivatives_along
from fwdlib.objectives import ClosureLoss, params_of
from fwdlib.tangents import normal

INDICES = torch.tensor([[1, 2, 1], [2, 0, 3], [2, 2, 2]])
FLAT, OFFSETS = INDICES.flatten(), torch.tensor([0, 2, 2, 7])
WEIGHTS = torch.linspace(-1, 2, 9).double()
LOOK_UPS = {
    "plain": lambda w: F.embedding(INDICES, w),
    "padding": lambda w: F.embedding(INDICES, w, padding_idx=2),
    "padding from the end": lambda w: F.embedding(INDICES, w, -2),
    "by frequency": lambda w: F.embedding(INDICES, w, scale_grad_by_freq=True),
    "by name": lambda w: F.embedding(weight=w, input=INDICES, padding_idx=1, scale_grad_by_freq=True),
    "renormalised": lambda w: F.embedding(INDICES, w, max_norm=0.7, norm_type=1.0),
    "torch's own": lambda w: torch.embedding(w, INDICES, 2),
    "torch's own, with no padding": lambda w: torch.embedding(w, INDICES, -2),
    "a bag": lambda w: F.embedding_bag(INDICES, w),
    "bags by offsets": lambda w: F.embedding_bag(FLAT, w, OFFSETS),
    "bags with a last offset": lambda w: F.embedding_bag(FLAT, w, OFFSETS, include_last_offset=True, mode="sum"),
    "the sum of a bag": lambda w: F.embedding_bag(INDICES, w, mode="sum"),
    "the greatest of a bag": lambda w: F.embedding_bag(INDICES, w, mode="max"),
    "the greatest of bags": lambda w: F.embedding_bag(FLAT, w, OFFSETS, mode="max"),
    "a bag with padding": lambda w: F.embedding_bag(INDICES, w, padding_idx=2),
    "bags with padding": lambda w: F.embedding_bag(FLAT, w, OFFSETS, padding_idx=-2, mode="sum"),
    "weights": lambda w: F.embedding_bag(INDICES, w, mode="sum", per_sample_weights=WEIGHTS.view(3, 3)),
    "weights and padding": lambda w: F.embedding_bag(
        FLAT, w, OFFSETS, mode="sum", per_sample_weights=WEIGHTS, padding_idx=1
    ),
    "trained weights": lambda w: F.embedding_bag(FLAT, w, OFFSETS, mode="sum", per_sample_weights=w.flatten()[:9]),
    "renormalised bags": lambda w: F.embedding_bag(INDICES, w, None, 0.7, 1.0),
}


class LookUp(nn.Module):
    def __init__(self, look_up, is_result):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(4, 3, generator=draw, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.look_up, self.is_result = look_up, is_result

    def forward(self):
        return (self.look_up(self.table * self.scale if self.is_result else self.table) * self.scale).sin().sum()


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("engine", ["torch", "stacked"])
@pytest.mark.parametrize("is_result", [False, True], ids=["parameter", "activation"])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_derivatives_are_those_of_backprop(name, is_result, engine, num_tangents):
    if is_result and name == "renormalised bags":
        pytest.skip("torch refuses to renormalise what requires a gradient")
    model, copy = (LookUp(LOOK_UPS[name], is_result) for _ in range(2))
    tangents = normal(params_of(model), num_tangents, torch.Generator().manual_seed(1))
    expected = backprop_gradient(ClosureLoss(copy, copy), params_of(copy))
    objective = ClosureLoss(model, model)
    if engine == "torch":
        loss, jvps, *_ = derivatives_along(objective, params_of(model), tangents, engine="torch")
    else:
        stacked = pytest.importorskip("fwdlib.stacked.estimator")
        loss, jvps = stacked.stacked_jvp(objective, params_of(model), tangents)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(
        jvps, sum((tangents[n] * g).reshape(num_tangents, -1).sum(1) for n, g in expected.grads.items())
    )
    torch.testing.assert_close(model.state_dict(), copy.state_dict())
