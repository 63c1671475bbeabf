"""Statements in the notebooks that a run could contradict, and that no cell computes."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog

from fwdlib.data import load_images, load_kmnist, load_penguins
from fwdlib.estimators import backprop_gradient
from fwdlib.models import CNN, MLP, initialise
from fwdlib.objectives import BatchLoss, params_of


def test_1a_the_training_penguins_are_linearly_separable():
    data = load_penguins()
    inputs, targets = data.train_inputs.numpy(), data.train_targets.numpy()
    # (w_target - w_other) . x >= 1 for all others: a linear programme over the 15 weights and biases
    rows = []
    for x, target in zip(np.c_[inputs, np.ones(len(inputs))], targets, strict=True):
        for other in {0, 1, 2} - {int(target)}:
            row = np.zeros((3, 5))
            row[target], row[other] = -x, x
            rows.append(row.ravel())
    found = linprog(np.zeros(15), A_ub=np.array(rows), b_ub=-np.ones(len(rows)), bounds=(None, None))
    assert found.success, found.message


def losses(learning_rate, *, forget, steps=100):
    data, model = load_penguins(), initialise(MLP, 0)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=learning_rate), []
    for _ in range(steps):
        found.append(F.cross_entropy(model(data.train_inputs), data.train_targets))
        if not forget:
            optimizer.zero_grad()
        found[-1].backward()
        optimizer.step()
    return [loss.item() for loss in found]


def test_2a_gradients_that_pile_up_throw_the_loss_far_above_its_start():
    kept, forgotten = losses(0.05, forget=False), losses(0.05, forget=True)
    assert sum(loss < 0.2 for loss in forgotten) > sum(loss < 0.2 for loss in kept)  # it crosses the threshold sooner
    faster = losses(0.1, forget=True)
    assert max(faster) > 10 * faster[0]
    steps = losses(0.1, forget=False)
    assert all(after < before for before, after in itertools.pairwise(steps))


def starts_dead(data, seed):
    model = initialise(CNN, seed)
    grads = backprop_gradient(
        BatchLoss(model, data.train_inputs[:500], data.train_targets[:500]), params_of(model)
    ).grads
    return not grads["conv1.weight"].any()


def test_3a_seed_0_starts_dead_on_the_digits_and_learns_on_kmnist():
    assert starts_dead(load_images("digits"), 0)
    if os.environ.get("FWDLIB_DATA") is None:
        pytest.skip("KMNIST is not here")
    assert not starts_dead(load_kmnist(), 0)
