"""The toy data set of points inside and outside a disc."""

import numpy as np
import pytest
import torch

from fwdlib.data import describe
from fwdlib.methods.disc import load_disc


def test_disc_points_are_labelled_by_their_distance():
    disc = load_disc(num_train=500, num_test=300)
    assert [tuple(tensor.shape) for tensor in disc[:4]] == [(500, 2), (500,), (300, 2), (300,)]
    assert [tensor.dtype for tensor in disc[:2]] == [torch.float32, torch.int64]
    for inputs, targets in (disc[:2], disc[2:4]):
        distances = np.hypot(*(inputs.double().numpy() - 0.5).T)
        np.testing.assert_array_equal(distances <= 1 / np.sqrt(2 * np.pi), targets.numpy() == 1)
    assert disc.class_names[disc.train_targets[disc.train_inputs.sub(0.5).norm(dim=1).argmin()]] == "inside"
    assert disc.source.substitute_for is None
    assert "(500, 2) (row, feature)" in describe(disc)


def test_disc_points_are_uniform_and_half_of_them_inside():
    n = 100_000
    disc = load_disc(num_train=n, num_test=n)
    for inputs, targets in (disc[:2], disc[2:4]):
        assert 0 <= inputs.min() < inputs.max() < 1
        assert abs(targets.double().mean() - 0.5) < 5 * (0.25 / n) ** 0.5
        assert (inputs.double().mean(0) - 0.5).abs().max() < 5 * (1 / 12 / n) ** 0.5
        assert (inputs.double().var(0) - 1 / 12).abs().max() < 5 * ((1 / 80 - 1 / 144) / n) ** 0.5
    assert not set(map(tuple, disc.train_inputs.tolist())) & set(map(tuple, disc.test_inputs.tolist()))


def test_disc_is_seeded_and_more_points_begin_with_the_same():
    one, again, other = (load_disc(seed=seed) for seed in (1, 1, 2))
    assert one.source.fingerprint == again.source.fingerprint
    assert torch.equal(one.train_inputs, again.train_inputs)
    assert not torch.equal(one.train_inputs, other.train_inputs)
    more = load_disc(seed=1, num_test=2000)
    assert torch.equal(more.test_inputs[:1000], one.test_inputs)
    assert torch.equal(more.train_inputs, one.train_inputs)


@pytest.mark.parametrize("options", [{"num_train": 0}, {"num_test": -1}, {"seed": -1}, {"device": "abacus"}], ids=str)
def test_disc_checks_its_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        load_disc(**options)
