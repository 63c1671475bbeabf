"""The networks of ``python -m fwdlib train``, after Bacho & Chu 2024. All return logits, shape (B, classes).

Theirs have BatchNorm, which makes the loss of an example depend on the others of its batch. In its place each takes
``norm="layer"``, a normalisation over all units of an example, ``"group"``, over at most 16 groups of them, or
``"none"``.
"""

from __future__ import annotations

import math

from torch import nn

MOST_GROUPS = 16  # of a group norm


def hidden_layer(layer: nn.Linear | nn.Conv2d, norm: str = "batch") -> list[nn.Module]:
    """Return a layer, its normalisation, and ReLU.

    Args:
        layer: linear, or convolutional in two dimensions.
        norm: ``"batch"``, ``"layer"``, ``"group"`` or ``"none"``.
    """
    is_linear = isinstance(layer, nn.Linear)
    size = layer.out_features if is_linear else layer.out_channels
    match norm:
        case "batch":
            return [layer, (nn.BatchNorm1d if is_linear else nn.BatchNorm2d)(size), nn.ReLU()]
        case "layer":
            return [layer, nn.GroupNorm(1, size), nn.ReLU()]
        case "group":
            return [layer, nn.GroupNorm(math.gcd(MOST_GROUPS, size), size), nn.ReLU()]
    return [layer, nn.ReLU()]


def fully_connected(
    num_inputs: int = 784, num_hidden: int = 2, width: int = 800, num_classes: int = 10, norm: str = "batch"
) -> nn.Sequential:
    """Return the fully connected network of Bacho & Chu 2024: linear, BatchNorm and ReLU per hidden layer, then linear.

    Args:
        num_inputs: numbers in an example; images (B, ...) are flattened.
        num_hidden: hidden layers.
        width: units in each hidden layer; the paper uses 800, and 1000 for CIFAR10.
        num_classes: logits.
        norm: see :func:`hidden_layer`.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in [num_inputs, *[width] * num_hidden][:num_hidden]:
        layers += hidden_layer(nn.Linear(fan_in, width), norm)
    return nn.Sequential(*layers, nn.Linear(width if num_hidden else num_inputs, num_classes))


def shallow_cnn(num_channels: int = 1, size: int = 28, num_classes: int = 10, norm: str = "batch") -> nn.Sequential:
    """Return the CNN of Bacho & Chu 2024, 15C5-40C5-P2-128 with BatchNorm and ReLU after each layer but the last.

    The paper's text has a max-pool after the first convolution, too; its code has none, and neither has this.

    Args:
        num_channels: channels of the images.
        size: height and width of the images.
        num_classes: logits.
        norm: see :func:`hidden_layer`.
    """
    side = (size - 8) // 2
    return nn.Sequential(
        *hidden_layer(nn.Conv2d(num_channels, 15, 5), norm),
        *hidden_layer(nn.Conv2d(15, 40, 5), norm),
        *(nn.MaxPool2d(2), nn.Flatten()),
        *hidden_layer(nn.Linear(40 * side * side, 128), norm),
        nn.Linear(128, num_classes),
    )


def alexnet(num_classes: int = 100, norm: str = "batch") -> nn.Sequential:
    """Return AlexNet in the widths of Krizhevsky 2014 with BatchNorm before each ReLU, for images (B, 3, 224, 224)."""

    def convolution(fan_in: int, fan_out: int, kernel: int, **options: int) -> list[nn.Module]:
        return hidden_layer(nn.Conv2d(fan_in, fan_out, kernel, **options), norm)

    def linear(fan_in: int, fan_out: int) -> list[nn.Module]:
        return hidden_layer(nn.Linear(fan_in, fan_out), norm)

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
