"""Rows of padding are not trained by noise: neither more nor less than backprop trains them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwdlib.estimators import backprop_gradient, forward_gradient
from fwdlib.methods.projection import projected_gradient
from fwdlib.objectives import BatchLoss, assign_gradients, params_of
from fwdlib.seeds import replicated_estimate

INPUTS = torch.randint(0, 5, (8, 6), generator=torch.Generator().manual_seed(0))
INPUTS[:, 3:] = 0
TARGETS = torch.arange(8) % 3


class Looked(nn.Module):
    """Sums rows of a table whose row 0 is one of padding, and may use the table otherwise, too."""

    def __init__(self, table=None, other=None):
        super().__init__()
        self.table = table or nn.Embedding(5, 4, padding_idx=0)
        self.last, self.other = nn.Linear(4, 3), other

    def forward(self, indices):
        rows = self.table(indices)
        if self.table.weight.dtype != torch.float32:  # what reads no values is no use
            raise TypeError
        logits = self.last(rows.sum(1) if rows.dim() == 3 else rows)
        return logits if self.other is None else logits + self.other(self.table, indices)


FREE = {  # the row of padding has no gradient
    "an embedding": Looked,
    "a bag": lambda: Looked(nn.EmbeddingBag(5, 4, padding_idx=0)),
    "a function": lambda: Looked(nn.EmbeddingBag(5, 4, padding_idx=0), lambda t, x: F.embedding(x, t.weight, 0).sum()),
    "by position": lambda: Looked(None, lambda table, x: torch.embedding(table.weight, x, 0).sum()),
}
USED = {  # it has one, by another use
    "tied": lambda table, x: (table.weight.sum(0) * 0.1).sum(),
    "tied in a list": lambda table, x: torch.cat([table.weight, table.weight]).sum() * 0.1,
    "another look-up": lambda table, x: F.embedding(x, table.weight).sum() * 0.1,
    "another padding": lambda table, x: F.embedding(x, table.weight, 1).sum() * 0.1,
}
ESTIMATORS = {
    "backprop": backprop_gradient,
    **{
        f"{kind}, {engine}, K = {k}": partial(forward_gradient, tangents=kind, engine=engine, num_tangents=k)
        for kind in ("rank-one", "normal")
        for engine in ("torch", "stacked", "auto")
        for k in (1, 3)
    },
    "blocks": partial(forward_gradient, blocks="parameter", num_tangents=2),
    "per-example": partial(forward_gradient, tangents="per-example"),
    "activity": partial(forward_gradient, tangents="activity", num_tangents=2),
    "projected": projected_gradient,
    "projected, K = 3": partial(projected_gradient, num_tangents=3),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", FREE)
def test_a_row_of_padding_stays_as_it_is(name, estimator):
    torch.manual_seed(0)
    model = FREE[name]()
    before = model.table.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        assign_gradients(model, ESTIMATORS[estimator](BatchLoss(model, INPUTS, TARGETS), params_of(model)).grads)
        optimizer.step()
    assert torch.equal(model.table.weight[0], before[0])
    assert not torch.equal(model.table.weight[1:], before[1:])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", USED)
def test_a_row_that_has_a_gradient_by_another_use_is_trained(name, estimator):
    torch.manual_seed(0)
    model = Looked(None, USED[name])
    grads = ESTIMATORS[estimator](BatchLoss(model, INPUTS, TARGETS, lambda y, _: y.square().mean()), params_of(model))
    assert grads.grads["table.weight"][0].any()


def test_seeds_in_a_stack_leave_it_alone_too():
    models = [Looked() for _ in range(2)]
    params = {name: p.detach() for name, p in torch.func.stack_module_state(models)[0].items()}
    estimator = partial(forward_gradient, tangents="normal", num_tangents=2)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    estimate = replicated_estimate(estimator, BatchLoss(models[0], INPUTS, TARGETS), generators)
    grads = estimate(params).grads["table.weight"]
    assert not grads[:, 0].any()
    assert grads[:, 1:].any()


def test_a_step_by_factors_leaves_it_alone_too():
    model = Looked()
    before = model.table.weight.detach().clone()
    estimate = forward_gradient(BatchLoss(model, INPUTS, TARGETS), params_of(model), engine="stacked")
    with torch.no_grad():
        estimate.grads.add_to_(params_of(model), -1.0)
    assert torch.equal(model.table.weight[0], before[0])
    assert not torch.equal(model.table.weight[1:], before[1:])
