"""Layers and sizes of the networks, against the paper, its code and torchvision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fwdlib.models import num_parameters
from fwdlib.trainer import settings
from fwdlib.trainer.networks import MIXERS, LocalMixer, alexnet, fully_connected, shallow_cnn
from fwdlib.trainer.settings import NORMS


def test_fully_connected_is_linear_batchnorm_relu():
    model = fully_connected(12, num_hidden=3, width=7, num_classes=5)
    kinds = [type(module) for module in model]
    assert kinds == [nn.Flatten, *[nn.Linear, nn.BatchNorm1d, nn.ReLU] * 3, nn.Linear]
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, 5)
    assert num_parameters(fully_connected()) == (784 + 1 + 2) * 800 + (800 + 1 + 2) * 800 + 8010
    assert fully_connected(12, num_hidden=0)(torch.zeros(2, 12)).shape == (2, 10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("build", [fully_connected, shallow_cnn])
def test_only_batchnorm_mixes_the_examples(build, norm):
    torch.manual_seed(0)
    model = build(norm=norm)
    inputs = torch.randn(4, 1, 28, 28, requires_grad=True)
    (of_first,) = torch.autograd.grad(model(inputs)[0].square().sum(), inputs)
    assert of_first[0].any()
    assert of_first[1:].any() == (norm == "batch")


def test_shallow_cnn_is_that_of_the_code():
    model = shallow_cnn()
    linear = next(module for module in model if isinstance(module, nn.Linear))
    assert linear.in_features == 4000
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert shallow_cnn(3, 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("size", "images", "thousands"),
    [("S/1/1", (1, 28), 272), ("M/1/16", (1, 28), 429), ("M/8/16", (3, 32), 919), ("L/8/64", (3, 32), 13_100)],
)
def test_local_mixer_has_the_published_number_of_parameters(size, images, thousands):
    # Theirs count the heads of the local losses, with biases; ours belong to the rule.
    model = LocalMixer(size, *images)
    num_heads = len(model.blocks()) - 1
    with_heads = num_parameters(model) + num_heads * 10 * (MIXERS[size].channels + 1)
    assert with_heads == pytest.approx(1000 * thousands, rel=3e-3)
    assert model(torch.zeros(2, images[0], images[1], images[1])).shape == (2, 10)


def test_local_mixer_mixes_no_examples_and_refuses_images_it_cannot_cut():
    inputs = torch.randn(3, 1, 8, 8, requires_grad=True)
    (of_first,) = torch.autograd.grad(LocalMixer("M/8/16", 1, 8)(inputs)[0].square().sum(), inputs)
    assert of_first[0].any()
    assert not of_first[1:].any()
    assert tuple(MIXERS) == settings.MIXERS
    with pytest.raises(ValueError, match="multiple of 8, got 28"):
        LocalMixer("M/8/16")


def test_alexnet_is_as_large_as_torchvision_s():
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = (
        [p.shape for p in m.parameters() if p.dim() > 1] for m in (alexnet(), torchvision.models.AlexNet(100))
    )
    assert ours == theirs
    assert alexnet().eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 100)
