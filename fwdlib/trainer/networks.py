"""The networks of ``python -m fwdlib train``. All return logits, shape (B, classes).

Those of Bacho & Chu 2024 have BatchNorm, which makes the loss of an example depend on the others of its batch. In its
place each takes ``norm="layer"``, a normalisation over all units of an example, ``"group"``, over at most 16 groups of
them, or ``"none"``. :class:`LocalMixer` is that of Ren et al. 2023.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class MixerSize(NamedTuple):
    """A size of LocalMixer."""

    num_blocks: int
    patches: int
    """Along each side of the image."""
    channels: int
    groups: int


MIXERS = {  # Ren et al. 2023, table 2: blocks, patches, channels, groups
    "S/1/1": MixerSize(1, 1, 256, 1),
    "M/1/16": MixerSize(1, 1, 512, 16),
    "M/8/16": MixerSize(4, 8, 512, 16),
    "L/8/64": MixerSize(4, 8, 2048, 64),
}


class LocalMixer(nn.Module):
    """The network of Ren et al. 2023 (arXiv 2210.03310) for local losses, as in its program; no layer mixes examples.

    The image is cut into patches, and each becomes a vector of channels. The last layer of each block is linear in each
    group of channels by itself, so a unit before it acts on one part of the block's output: its position and group.
    Each layer is normalised over the channels of a position, the grouped one over those of a group, without scale or
    shift. The readout is linear in the channels' means over the patches.

    Args:
        size: a name in :data:`MIXERS`.
        num_channels: channels of the images.
        image_size: height and width of the images; a multiple of the patches along a side.
        num_classes: logits.

    Raises:
        ValueError: if the image cannot be cut into these patches.
    """

    def __init__(
        self, size: str = "M/1/16", num_channels: int = 1, image_size: int = 28, num_classes: int = 10
    ) -> None:
        num_blocks, patches, channels, groups = MIXERS[size]
        if image_size % patches:
            raise ValueError(f"LocalMixer {size} needs images whose side is a multiple of {patches}, got {image_size}")
        super().__init__()
        patch = image_size // patches
        self.embedding = Embedding(nn.Conv2d(num_channels, channels, patch, stride=patch), channels, groups)
        self.mixers = nn.ModuleList(Mixer(patches, channels, groups) for _ in range(num_blocks - 1))
        self.readout = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    def blocks(self) -> list[nn.Module]:
        """Return the blocks, the readout last."""
        return [self.embedding, *self.mixers, self.readout]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        for block in self.blocks():
            images = block(images)
        return images


class Embedding(nn.Sequential):
    """The first block: a linear layer for each patch, then the grouped one."""

    def __init__(self, patches: nn.Conv2d, channels: int, groups: int) -> None:
        grouped = nn.Conv2d(channels, channels, 1, groups=groups), ChannelNorm(groups), nn.ReLU()
        super().__init__(nn.Sequential(patches, ChannelNorm(1), nn.ReLU()), *grouped)

    def layers(self) -> dict[nn.Module, bool]:
        """Return the inner layer; a unit of it acts on its own part only."""
        return {self[0]: True}


class Mixer(nn.Module):
    """A further block: a linear layer across the patches, one across the channels, the grouped one, and a skip."""

    ends_in_relu = True

    def __init__(self, patches: int, channels: int, groups: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(
            *(nn.Flatten(2), nn.Linear(patches**2, patches**2), nn.Unflatten(2, (patches, patches))),
            *(ChannelNorm(1), nn.ReLU()),
        )
        self.channels = nn.Sequential(nn.Conv2d(channels, channels, 1), ChannelNorm(1), nn.ReLU())
        self.groups = nn.Sequential(nn.Conv2d(channels, channels, 1, groups=groups), ChannelNorm(groups))

    def layers(self) -> dict[nn.Module, bool]:
        """Return the inner layers; a unit of the first acts on all groups, one of the second on its own part only."""
        return {self.tokens: False, self.channels: True}

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, channels, patches, patches)."""
        return torch.relu(x + self.groups(self.channels(self.tokens(x))))


class ChannelNorm(nn.Module):
    """Normalise the channels of each position (B, channels, height, width), in groups; no scale, no shift."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised channels."""
        last = x.movedim(1, -1)
        grouped = last.unflatten(-1, (self.groups, -1))
        return F.layer_norm(grouped, grouped.shape[-1:]).flatten(-2).movedim(-1, 1)
