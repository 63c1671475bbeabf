"""What linear layers do beyond their formula."""

import torch
from torch import nn

from fwdlib.objectives import BatchLoss, params_of
from fwdlib.stacked.estimator import stacked_jvp
from fwdlib.tangents import normal
from tests.stacked.rules.cases import total


def test_a_row_of_the_table_at_padding_idx_has_no_tangent_as_it_has_no_gradient():
    table = nn.Embedding(4, 3, padding_idx=1).double()
    objective = BatchLoss(table, torch.tensor([[1, 2], [1, 0]]), None, total)
    tangents = normal(params_of(table), 2, torch.Generator().manual_seed(0))
    _, slopes = stacked_jvp(objective, params_of(table), tangents)
    total(table(objective.inputs)).backward()
    torch.testing.assert_close(slopes, (tangents["weight"] * table.weight.grad).sum((1, 2)))
