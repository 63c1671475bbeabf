"""Models of timm, small."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from timm.models import convmixer, focalnet, ghostnet, metaformer, mlp_mixer, nfnet, volo

from tests.zoo.case import NUM_CLASSES, Builder, Case, images


def make(name: str, size: int = 32, **options: Any) -> Case:
    return images(timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **options), size=size)


def mixer(**options: Any) -> Case:
    return images(mlp_mixer.MlpMixer(NUM_CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=16, **options))


def metaformer_of(**options: Any) -> Case:
    return images(
        metaformer.MetaFormer(
            num_classes=NUM_CLASSES, depths=[1] * 4, dims=[8, 8, 32, 32], drop_path_rate=0.2, **options
        )
    )


NORMS = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2


def ghost() -> Case:
    blocks = [[[3, 16, 16, 0, 1]], [[5, 48, 24, 0.25, 2]], [[3, 64, 32, 0.25, 1]]]
    return images(ghostnet.GhostNet(blocks, NUM_CLASSES, drop_rate=0.2))


def norm_free() -> Case:
    settings = nfnet.NfCfg(
        depths=(1, 1), channels=(16, 32), stem_chs=8, attn_layer="se", group_size=8, extra_conv=True, attn_kwargs={}
    )
    return images(nfnet.NormFreeNet(settings, NUM_CLASSES))


def focal() -> Case:
    return images(focalnet.FocalNet(num_classes=NUM_CLASSES, embed_dim=8, depths=(1, 1), use_post_norm=True))


def vision_outlooker() -> Case:
    sizes = {"layers": (1, 1), "embed_dims": (8, 16), "num_heads": (2, 2), "outlook_attention": (True, False)}
    return images(volo.VOLO(img_size=32, num_classes=NUM_CLASSES, mlp_ratio=2, **sizes))


# name of the case -> name in timm, size of the images, options that make it small
SMALL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "DeiT, distilled": (
        "deit_tiny_distilled_patch16_224",
        32,
        {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.2},
    ),
    "BEiT": ("beit_base_patch16_224", 32, {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "EVA": ("eva02_tiny_patch14_224", 28, {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "CaiT": ("cait_xxs24_224", 32, {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "XCiT": ("xcit_nano_12_p16_224", 32, {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "CoaT": (
        "coat_tiny",
        32,
        {
            "img_size": 32,
            "embed_dims": [16] * 4,
            "serial_depths": [1] * 4,
            "parallel_depth": 1,
            "num_heads": 8,
        },
    ),
    "LeViT": (
        "levit_128s",
        64,
        {"img_size": 64, "embed_dim": (8, 16, 16), "key_dim": 4, "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
    ),
    "PVT v2": ("pvt_v2_b0", 32, {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}),
    "Twins": (
        "twins_svt_small",
        32,
        {
            "img_size": 32,
            "embed_dims": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "wss": [2] * 4,
        },
    ),
    "ConvNeXt v2": ("convnextv2_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    "Hiera": ("hiera_tiny_224", 32, {"img_size": (32, 32), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    "DaViT": ("davit_tiny", 32, {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (2, 2), "window_size": 4}),
    "EdgeNeXt": ("edgenext_xx_small", 32, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    "CrossViT": (
        "crossvit_tiny_240",
        48,
        {
            "img_size": 48,
            "img_scale": (1.0, 1.0),
            "patch_size": [12, 16],
            "embed_dim": [8, 16],
            "depth": [[1, 1, 0]],
            "num_heads": [2, 2],
            "mlp_ratio": [2, 2, 1],
        },
    ),
    "ConViT": (
        "convit_tiny",
        32,
        {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "local_up_to_layer": 1},
    ),
}
MODELS: dict[str, Builder] = {
    name: partial(make, architecture, size, **options) for name, (architecture, size, options) in SMALL.items()
} | {
    "MLP-Mixer": mixer,
    "gMLP": partial(mixer, block_layer=mlp_mixer.SpatialGatingBlock, mlp_ratio=4, mlp_layer=mlp_mixer.GatedMlp),
    "ResMLP": partial(mixer, block_layer=mlp_mixer.ResBlock, mlp_ratio=4, norm_layer=mlp_mixer.Affine),
    "ConvMixer": lambda: images(convmixer.ConvMixer(16, 2, kernel_size=3, patch_size=4, num_classes=NUM_CLASSES)),
    "PoolFormer": partial(metaformer_of, token_mixers=metaformer.Pooling),
    "CAFormer": partial(
        metaformer_of, token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2, norm_layers=NORMS
    ),
    "GhostNet": ghost,
    "NFNet": norm_free,
    "FocalNet": focal,
    "VOLO": vision_outlooker,
}
