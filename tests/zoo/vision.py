"""Models of torchvision, small."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torchvision import models
from torchvision.models import convnext, efficientnet, maxvit, regnet, segmentation, swin_transformer
from torchvision.models.detection import retinanet

from tests.zoo.case import NUM_CLASSES, Builder, Case, images


def vgg():
    layers = models.vgg.make_layers([8, "M", 16, "M"], batch_norm=True)
    head = nn.Linear(16 * 64, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, NUM_CLASSES)
    return images(nn.Sequential(layers, nn.Flatten(), *head))


def resnet(block=models.resnet.BasicBlock, **options):
    model = models.ResNet(block, [1, 1, 1, 1], **options)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, NUM_CLASSES)
    return images(model)


def mobilenet_v3():
    return images(models.mobilenet_v3_small(width_mult=0.25, num_classes=NUM_CLASSES))


def mobile_stages():
    make = partial(efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    fused = efficientnet.FusedMBConvConfig(1, 3, 2, 8, 8, 1)
    stages = [fused, make(4, 5, 2, 8, 16, 2), make(6, 3, 1, 16, 16, 1)]
    return images(efficientnet.EfficientNet(stages, dropout=0.2, last_channel=32, num_classes=NUM_CLASSES))


def next_stages():
    stages = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return images(convnext.ConvNeXt(stages, stochastic_depth_prob=0.2, num_classes=NUM_CLASSES))


def swin(**options):
    model = models.SwinTransformer(
        patch_size=[2, 2],
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=[4, 4],
        num_classes=NUM_CLASSES,
        **options,
    )
    return images(model, size=16, in_double=True)


def swin_v2():
    return swin(block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2)


def vit():
    model = models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=0.1,
        num_classes=NUM_CLASSES,
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zero as torchvision makes it, and then all gradients are
    return images(model)


def max_vit():
    model = maxvit.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.2,
        num_classes=NUM_CLASSES,
    )
    return images(model)


def reg():
    params = regnet.BlockParams([1, 1], [8, 16], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return images(models.RegNet(params, num_classes=NUM_CLASSES, stem_width=8))


def inception():
    """The blocks of Inception v3, which takes no narrow layers itself."""
    blocks = models.inception
    layers = [nn.Conv2d(3, 16, 3), blocks.InceptionA(16, 4), blocks.InceptionB(228), blocks.InceptionC(708, 8)]
    return images(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, NUM_CLASSES)), size=16)


def backbone():
    layers = {
        "low": nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True)),
        "out": nn.Conv2d(8, 16, 3, 2, 1),
    }
    return models._utils.IntermediateLayerGetter(nn.ModuleDict(layers), {"low": "aux", "out": "out"})


def fcn():
    aux = segmentation.fcn.FCNHead(8, NUM_CLASSES)
    return images(segmentation.FCN(backbone(), segmentation.fcn.FCNHead(16, NUM_CLASSES), aux))


def deeplab():
    head = segmentation.deeplabv3.DeepLabHead(16, NUM_CLASSES, (2, 4))
    return images(segmentation.DeepLabV3(backbone(), head))


def lraspp():
    body = models._utils.IntermediateLayerGetter(backbone(), {"low": "low", "out": "high"})
    return images(segmentation.LRASPP(body, 8, 16, NUM_CLASSES, 8))


class Pyramid(nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, 8, 1)

    def forward(self, x):
        return {"0": self.layer(x)}


def detector():
    """A detector, which has a loss in training mode alone."""
    anchors = retinanet.AnchorGenerator(((8,),), ((1.0,),))
    model = models.detection.RetinaNet(
        Pyramid(),
        NUM_CLASSES,
        min_size=32,
        max_size=32,
        anchor_generator=anchors,
        image_mean=[0] * 3,
        image_std=[1] * 3,
    )
    batch = list(torch.rand(2, 3, 32, 32))
    boxes = torch.tensor([[4.0, 4.0, 14.0, 14.0]])
    targets = [{"boxes": boxes + 8 * i, "labels": torch.tensor([i + 1])} for i in range(2)]
    return Case(model, lambda model: sum(model(batch, targets).values()), 2, has_eval=False)


def video():
    options = {"block": models.video.resnet.BasicBlock, "stem": models.video.resnet.R2Plus1dStem}
    makers = [models.video.resnet.Conv2Plus1D] * 4
    model = models.video.VideoResNet(conv_makers=makers, layers=[1, 1, 1, 1], num_classes=NUM_CLASSES, **options)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128, NUM_CLASSES)
    case = images(model, size=8, batch=2)
    clips = torch.randn(2, 3, 4, 8, 8)
    return case._replace(loss=lambda model: nn.functional.cross_entropy(model(clips), torch.tensor([0, 3])))


MODELS: dict[str, Builder] = {
    "VGG": vgg,
    "ResNet": resnet,
    "ResNeXt": lambda: resnet(models.resnet.Bottleneck, groups=4, width_per_group=4),
    "MobileNet v2": lambda: images(models.mobilenet_v2(width_mult=0.25, num_classes=NUM_CLASSES)),
    "MobileNet v3": mobilenet_v3,
    "EfficientNet": mobile_stages,
    "ConvNeXt": next_stages,
    "Swin": swin,
    "Swin v2": swin_v2,
    "ViT": vit,
    "MaxViT": max_vit,
    "DenseNet": lambda: images(models.DenseNet(4, (2, 2), 8, num_classes=NUM_CLASSES, drop_rate=0.1)),
    "DenseNet, memory efficient": lambda: images(models.DenseNet(4, (2, 2), 8, memory_efficient=True)),
    "SqueezeNet": lambda: images(models.SqueezeNet("1_1", NUM_CLASSES)),
    "ShuffleNet": lambda: images(models.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 32], NUM_CLASSES)),
    "RegNet": reg,
    "MNASNet": lambda: images(models.MNASNet(0.25, NUM_CLASSES)),
    "GoogLeNet with auxiliary heads": lambda: images(
        models.GoogLeNet(NUM_CLASSES, init_weights=False), size=64, batch=2
    ),
    "Inception": inception,
    "FCN": fcn,
    "DeepLab": deeplab,
    "LRASPP": lraspp,
    "RetinaNet": detector,
    "R(2+1)D": video,
}
