"""What linear layers do beyond their formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.estimator import stacked_jvp
from fwdlib.tangents import normal
from tests.stacked.rules.cases import total
from tests.stacked.rules.test_arguments import draw, in_pass, in_torch


def test_a_row_of_the_table_at_padding_idx_has_no_tangent_as_it_has_no_gradient():
    table = nn.Embedding(4, 3, padding_idx=1).double()
    objective = BatchLoss(table, torch.tensor([[1, 2], [1, 0]]), None, total)
    tangents = normal(params_of(table), 2, torch.Generator().manual_seed(0))
    _, slopes = stacked_jvp(objective, params_of(table), tangents)
    total(table(objective.inputs)).backward()
    torch.testing.assert_close(slopes, (tangents["weight"] * table.weight.grad).sum((1, 2)))


OPTIONS = [{"padding_idx": -2}, {"scale_grad_by_freq": True}, {"max_norm": 0.7}, {"max_norm": 0.7, "norm_type": 1.0}]


@pytest.mark.parametrize("options", [*OPTIONS, {"padding_idx": 2, "max_norm": 0.5, "scale_grad_by_freq": True}])
@pytest.mark.parametrize("is_result", [False, True], ids=["parameter", "activation"])
def test_embedding_has_the_derivative_of_backprop(options, is_result):
    indices = torch.tensor([[1, 2], [2, 0]])

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(draw(4, 3))

        def forward(self, indices):
            return F.embedding(indices, self.table * 1.5 if is_result else self.table, **options)

    model, copy = Lookup(), Lookup()
    tangents = normal(params_of(model), 2, torch.Generator().manual_seed(0))
    loss, slopes = stacked_jvp(BatchLoss(model, indices, None, total), params_of(model), tangents)
    expected = total(copy(indices))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(slopes, (tangents["table"] * copy.table.grad).sum((1, 2)))
    assert torch.equal(model.table, copy.table)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("other", [draw(4, 3), 2], ids=["v alone", "v and g"])
def test_weight_norm_agrees_with_its_formula(dim, other):
    def call(x, function):
        g = (other if isinstance(other, torch.Tensor) else x).sin()
        return function(x, g.sum() if dim == -1 else g.sum(1 - dim, keepdim=True), dim)

    def formula(v, g, dim):
        return v * g / (v.square().sum() if dim == -1 else v.square().sum(1 - dim, keepdim=True)).sqrt()

    x, tangents = draw(4, 3), draw(2, 4, 3)
    found = in_pass(lambda x: call(x, torch._weight_norm), x, tangents)[0]
    values, slopes = in_torch(lambda x: call(x, formula), x, tangents)
    torch.testing.assert_close(found.primal, values[0])
    torch.testing.assert_close(found.tangents, torch.stack([slope[0] for slope in slopes]))
