"""torchvision's dense detectors beside ours, on the same weights and padded images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import resnet18
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detseg.nn import BackboneWithFPN, TorchvisionBackbone
from detseg.structures import Target

CHANNELS = 64  # of the pyramid: FCOS's group norm has 32 groups


def torchvision_backbone() -> nn.Module:
    """A ResNet-18 with P3 to P7, quick enough for a test."""
    extra = LastLevelP6P7(CHANNELS, CHANNELS)
    pyramid = _resnet_fpn_extractor(resnet18(weights=None), 5, returned_layers=[2, 3, 4], extra_blocks=extra)
    # The extractor fixes 256 channels; a narrower pyramid is built over the same body.
    pyramid.fpn = type(pyramid.fpn)([128, 256, 512], CHANNELS, extra_blocks=extra)
    pyramid.out_channels = CHANNELS
    return pyramid


def our_backbone() -> BackboneWithFPN:
    body = TorchvisionBackbone(name="resnet18", weights=None, strides=(8, 16, 32))
    return BackboneWithFPN(backbone=body, channels=CHANNELS, extra="p6p7_from_p5")


def perturb(model: nn.Module) -> None:
    """Make the head say something: weights from a seed, wide enough that scores spread over (0, 1)."""
    generator = torch.Generator().manual_seed(5)
    head = model.head
    assert isinstance(head, nn.Module)
    for name, parameter in head.named_parameters():
        if parameter.ndim == 4:
            scale = 0.3 if "bbox_reg" in name else 1.0
            spread = scale / (parameter.shape[1] * 9) ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        if name.endswith("bbox_reg.bias"):
            parameter.data.fill_(0.4)  # FCOS's distances pass a ReLU: most shall live
        if name.endswith("cls_logits.bias"):
            parameter.data.fill_(-3.0)


def images(count: int) -> list[Tensor]:
    """Images in [0, 1] of different sizes, none divisible by 32."""
    generator = torch.Generator().manual_seed(2)
    sizes = [(150, 200), (170, 120), (96, 210)][:count]
    return [torch.rand((3, *size), generator=generator) for size in sizes]


def objects(count: int, *, empty: int | None = None) -> list[Target]:
    """Boxes of many sizes in each image; image ``empty`` has none."""
    generator = torch.Generator().manual_seed(3)
    targets = []
    for index in range(count):
        number = 0 if index == empty else 7
        corner = torch.rand((number, 2), generator=generator) * 60
        side = 6 + torch.rand((number, 2), generator=generator) ** 2 * 110
        boxes = torch.cat([corner, corner + side], dim=1).clamp(max=96.0)
        targets.append(Target(boxes=boxes, labels=torch.randint(0, 3, (number,), generator=generator)))
    return targets


def padded(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the batch ``(B, 3, H, W)`` padded to multiples of 32, and the valid sizes ``(B, 2)``."""
    sizes = torch.tensor([picture.shape[1:] for picture in pictures])
    height, width = ((sizes.amax(0) + 31) // 32 * 32).tolist()
    batch = torch.zeros(len(pictures), 3, height, width)
    for place, picture in zip(batch, pictures, strict=True):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    return batch, sizes


def torchvision_targets(targets: list[Target]) -> list[dict[str, Tensor]]:
    return [{"boxes": target.boxes, "labels": target.labels} for target in targets]
