"""What a forward pass advances, and that it is restored. Most of it is tested by the engines that run a pass again."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from fwdlib.estimators import forward_gradient
from fwdlib.forward.rewind import Rewind
from fwdlib.objectives import ClosureLoss, params_of


def test_the_random_numbers_of_all_accelerators_are_restored_for_functions_without_a_model(monkeypatch):
    states = {0: "first", 1: "second"}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    rewind = Rewind(nn.Module(), only_torch=True)
    before = torch.rand(())
    states.update({0: "drawn", 1: "drawn"})
    rewind()
    assert states == {0: "first", 1: "second"}
    assert torch.rand(()) == before


class Noisy(nn.Module):
    """A layer whose noise is numpy's and Python's, and that the stacked engine refuses when it transforms."""

    def __init__(self):
        super().__init__()
        self.layer, self.transforms = nn.Linear(3, 3), False

    def forward(self, x):
        h = self.layer(x * np.random.rand() + random.random())
        slope = torch.func.vmap(torch.func.grad(lambda row: self.layer(row).tanh().sum()))
        return h + slope(x) if self.transforms else h


@pytest.mark.parametrize("num_tangents", [1, 3])
@pytest.mark.parametrize("num_taken", [0, 1, 2])
def test_the_noise_is_that_of_one_pass_when_a_model_is_refused_for_the_first_time(num_taken, num_tangents):
    found = []
    for estimates in (False, True):
        np.random.seed(0)
        random.seed(0)
        torch.manual_seed(0)
        model, losses = Noisy(), []
        objective = ClosureLoss(model, lambda model=model: model(torch.ones(4, 3)).square().sum())
        options = {"num_tangents": num_tangents, "generator": torch.Generator()}
        for i in range(num_taken + 2):
            model.transforms = i >= num_taken
            if estimates:
                losses.append(forward_gradient(objective, params_of(model), **options).loss)
            else:
                losses.append(objective.run().detach())
        found.append([*losses, np.random.rand(), random.random()])
    torch.testing.assert_close(*found)
