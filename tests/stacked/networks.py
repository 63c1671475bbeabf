"""Small networks for the tests of the stacked engine."""

import torch
from torch import nn

CLASSES = torch.tensor([0, 1, 1, 0, 1])


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


def small_net(*between, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return model, torch.randn(5, 3, dtype=dtype), CLASSES


def small_cnn():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(*layers).double(), torch.randn(5, 1, 4, 4, dtype=torch.float64), CLASSES


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
