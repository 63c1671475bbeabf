"""The models of the course. All return logits, shape (B, classes): the softmax belongs to the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LogisticRegression(nn.Module):
    """One linear layer, 4 -> 3, with weight and bias drawn from N(0, 1)."""

    def __init__(self, num_features: int = 4, num_classes: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (B, features) to logits (B, classes)."""
        return self.linear(inputs)


class MLP(nn.Module):
    """Three linear layers, 4 -> 64 -> 8 -> 3, with ReLU between them and all parameters drawn from U(-1, 1)."""

    def __init__(self, num_features: int = 4, num_classes: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_features, 64)
        self.fc2 = nn.Linear(64, 8)
        self.fc3 = nn.Linear(8, num_classes)
        for p in self.parameters():
            nn.init.uniform_(p, -1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (B, features) to logits (B, classes)."""
        hidden = F.relu(self.fc1(inputs))
        hidden = F.relu(self.fc2(hidden))
        return self.fc3(hidden)


class CNN(nn.Module):
    """Two 3x3 convolutions with 2 and 4 channels, one 2x2 max-pool, two linear layers; torch's own initialisation."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 4, 3, padding=1)
        self.fc1 = nn.Linear(4 * 14 * 14, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (B, 1, 28, 28) to logits (B, classes)."""
        hidden = F.relu(self.conv1(inputs))
        hidden = F.relu(self.conv2(hidden))
        hidden = F.max_pool2d(hidden, 2).flatten(1)
        hidden = F.relu(self.fc1(hidden))
        return self.fc2(hidden)


def initialise(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return ``build()`` with its random initialisation fixed by ``seed``; torch's global generator is left as it was.

    Example:
        >>> a, b = initialise(MLP, seed=0), initialise(MLP, seed=0)
        >>> torch.equal(a.fc1.weight, b.fc1.weight)
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def num_parameters(model: nn.Module) -> int:
    """Return P, the number of trainable parameters.

    Example:
        >>> [num_parameters(model()) for model in (LogisticRegression, MLP, CNN)]
        [15, 867, 50986]
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
