"""Networks that people use, at sizes for a processor, each as a chain of parts: every part can be a checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lambda(nn.Module):
    """A part without parameters."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(x)


class Words(nn.Module):
    """Embeddings of tokens and of their places."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) / 50)

    def forward(self, x: Tensor) -> Tensor:
        """Look the tokens up."""
        return self.tokens(x) + self.places


class Block(nn.Module):
    """A block of a transformer of the GPT kind: causal attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform each place."""
        b, t, width = x.shape
        heads = self.inputs(self.before_attention(x)).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.outputs(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.before_mlp(x))


def gpt(vocabulary: int = 256, length: int = 64, width: int = 128, num_blocks: int = 4) -> nn.Sequential:
    """Return a transformer that predicts the next token; its logits have shape (B, vocabulary, length)."""
    return nn.Sequential(
        Words(vocabulary, length, width),
        *[Block(width, 4) for _ in range(num_blocks)],
        nn.LayerNorm(width),
        nn.Linear(width, vocabulary, bias=False),
        Lambda(lambda x: x.transpose(1, 2)),
    )


class Patches(nn.Module):
    """The first part of torchvision's vision transformer: patches, the class token and the places."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.convolution, self.token, self.places = vit.conv_proj, vit.class_token, vit.encoder.pos_embedding

    def forward(self, x: Tensor) -> Tensor:
        """Cut the images into patches."""
        x = self.convolution(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places


def vit() -> nn.Sequential:
    """Return torchvision's vision transformer for images of 32 x 32: four layers of width 128, patches of 4 x 4."""
    from torchvision.models import VisionTransformer

    whole = VisionTransformer(
        image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=10
    )
    return nn.Sequential(
        Patches(whole), *whole.encoder.layers, whole.encoder.ln, Lambda(lambda x: x[:, 0]), whole.heads
    )


def resnet18() -> nn.Sequential:
    """Return torchvision's ResNet-18 with ten classes."""
    from torchvision.models import resnet18 as build

    whole = build(num_classes=10)
    stem = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool)
    blocks = [block for layer in (whole.layer1, whole.layer2, whole.layer3, whole.layer4) for block in layer]
    return nn.Sequential(stem, *blocks, whole.avgpool, nn.Flatten(), whole.fc)


def mobilenet_v3() -> nn.Sequential:
    """Return torchvision's small MobileNetV3 with ten classes."""
    from torchvision.models import mobilenet_v3_small as build

    whole = build(num_classes=10)
    return nn.Sequential(*whole.features, whole.avgpool, nn.Flatten(), whole.classifier)
