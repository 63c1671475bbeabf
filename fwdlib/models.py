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


def fully_connected(
    num_inputs: int = 784, num_hidden: int = 2, width: int = 800, num_classes: int = 10
) -> nn.Sequential:
    """Return hidden layers of linear map, BatchNorm and ReLU, and a linear readout, as Bacho & Chu 2024 train them.

    Args:
        num_inputs: numbers in an example; images (B, ...) are flattened.
        num_hidden: hidden layers.
        width: units of each; there 800, and 1000 for CIFAR10.
        num_classes: logits.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in [num_inputs, *[width] * num_hidden][:num_hidden]:
        layers += [nn.Linear(fan_in, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width if num_hidden else num_inputs, num_classes))


def shallow_cnn(
    num_channels: int = 1, size: int = 28, num_classes: int = 10, *, pool_first: bool = False
) -> nn.Sequential:
    """Return the CNN of Bacho & Chu 2024, 15C5-40C5-P2-128 with BatchNorm and ReLU after each layer but the last.

    Args:
        num_channels: of the images.
        size: their height and width.
        num_classes: logits.
        pool_first: another max-pool after the first convolution, as their text has it; their code has none there.
    """
    pool: list[nn.Module] = [nn.MaxPool2d(2)] if pool_first else []
    side = ((size - 4) // (2 if pool_first else 1) - 4) // 2
    return nn.Sequential(
        *(nn.Conv2d(num_channels, 15, 5), nn.BatchNorm2d(15), nn.ReLU(), *pool),
        *(nn.Conv2d(15, 40, 5), nn.BatchNorm2d(40), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(40 * side * side, 128), nn.BatchNorm1d(128), nn.ReLU()),
        nn.Linear(128, num_classes),
    )


def alexnet(num_classes: int = 100) -> nn.Sequential:
    """Return AlexNet in the widths of Krizhevsky 2014 with BatchNorm before each ReLU, for images (B, 3, 224, 224)."""

    def convolution(fan_in: int, fan_out: int, kernel: int, **options: int) -> list[nn.Module]:
        return [nn.Conv2d(fan_in, fan_out, kernel, **options), nn.BatchNorm2d(fan_out), nn.ReLU()]

    def linear(fan_in: int, fan_out: int) -> list[nn.Module]:
        return [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]

    return nn.Sequential(
        *convolution(3, 64, 11, stride=4, padding=2),
        nn.MaxPool2d(3, 2),
        *convolution(64, 192, 5, padding=2),
        nn.MaxPool2d(3, 2),
        *convolution(192, 384, 3, padding=1),
        *convolution(384, 256, 3, padding=1),
        *convolution(256, 256, 3, padding=1),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        *linear(256 * 6 * 6, 4096),
        *linear(4096, 4096),
        nn.Linear(4096, num_classes),
    )


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
