"""The table of calls."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from fwdlib.stacked.explain import explain
from tests.stacked.networks import small_net


def test_explain_names_functions_without_a_rule_and_leaves_the_model_unchanged():
    model, inputs, _ = small_net(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Softsign())
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    table = explain(model, inputs)
    assert list(table[table["by"] == "torch.func.jvp"]["function"]) == ["torch.nn.functional.softsign"]
    assert list(table["shape"]) == [(5, 4)] * 5 + [(5, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_explain_restores_what_a_pass_changes_in_python_and_numpy():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls, self.seen = nn.Linear(3, 2), 0, []
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, inputs):
            self.calls += 1
            outputs = self.layer(inputs) * random.random() * np.random.rand()
            self.seen.append(self.calls)
            self.mean = self.mean + outputs.detach().mean(0)
            return outputs

    model = Counting()
    mean, python, numpy = model.mean, random.getstate(), np.random.get_state()[1].tolist()
    explain(model, torch.randn(5, 3))
    assert (model.calls, model.seen) == (0, [])
    assert model.mean is mean
    assert not mean.any()
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy


LAYERS_WITH_RULES = [
    (nn.Conv1d(3, 4, 3), (5, 3, 8)),
    (nn.Conv2d(3, 4, 3), (5, 3, 8, 8)),
    *((layer, (5, 4, 8)) for layer in (nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(2), nn.BatchNorm1d(4))),
    *((layer, (5, 4, 8, 8)) for layer in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2))),
    *((layer, (5, 4, 8, 8)) for layer in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(8), nn.Flatten())),
    *((layer, (5, 4)) for layer in (nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU())),
    *((layer, (5, 4)) for layer in (nn.ELU(), nn.LeakyReLU(), nn.Softplus(), nn.Dropout(), nn.Softmax(1))),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS_WITH_RULES, ids=lambda value: str(value))
def test_common_layers_call_only_functions_with_rules(layer, shape):
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.layer = nn.Parameter(torch.zeros(())), layer

        def forward(self, inputs):
            return self.layer(inputs + self.shift)

    assert set(explain(Moved(), torch.randn(shape)).by) == {"rule"}
