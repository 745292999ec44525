"""torchvision's Faster and Mask R-CNN beside ours, on the same weights and the same padded images."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from detseg.models.box_branch import BoxBranch
from detseg.models.faster_rcnn import BOX_LAYERS, BOX_RENAMES, FasterRCNN
from detseg.models.mask_rcnn import MASK_LAYERS, MASK_RENAMES, MaskRCNN
from detseg.models.rpn import RegionProposalNetwork
from detseg.models.torchvision_weights import load_torchvision_state
from detseg.nn import BackboneWithFPN, TorchvisionBackbone
from detseg.structures import Target
from detseg.targets.samplers import BalancedSampler

CLASSES = 5
SIZES = [(128, 160), (150, 128), (97, 192)]


def perturb(model: nn.Module) -> None:
    """Make the heads say something: fresh heads give nearly the same score everywhere."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, norm in model.named_modules():
            if name.endswith("bn3"):
                norm.weight.fill_(0.2)  # or the residual sums of a random ResNet-50 grow without bound
        for name, parameter in model.named_parameters():
            if "rpn.head" in name or "box_predictor" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(8).add_(noise * (0.03 if "cls" in name else 0.01))
            elif "mask_predictor" in name:
                parameter.mul_(0.2).add_(torch.randn(parameter.shape, generator=generator) * 0.01)


@lru_cache(maxsize=4)
def pair(kind: str, body: str = "resnet18", *, sample_all: bool = False) -> tuple[nn.Module, FasterRCNN | MaskRCNN]:
    """Return torchvision's model and ours with its weights, both in eval mode; nobody changes them.

    Args:
        kind: ``faster`` or ``mask``.
        body: name of the ResNet.
        sample_all: whether nothing is sampled away, so that chance plays no part in the losses.
    """
    backbone = resnet_fpn_backbone(backbone_name=body, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5)
    options: dict[str, Any] = {"num_classes": CLASSES + 1, "min_size": 1, "max_size": 4096, "_skip_resize": True}
    if sample_all:
        options |= {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
    theirs = (TorchvisionMaskRCNN if kind == "mask" else TorchvisionFasterRCNN)(backbone, **options)
    theirs.transform.resize = lambda image, target=None: (image, target)  # it resizes in eval mode in any case
    perturb(theirs)

    ours_backbone = BackboneWithFPN(backbone=TorchvisionBackbone(name=body, frozen_norm=True), extra="pool")
    rpn, box = partial(RegionProposalNetwork), partial(BoxBranch)
    if sample_all:
        rpn = partial(rpn, sampler=BalancedSampler(size=10**6, positive_fraction=0.5))
        box = partial(box, sampler=BalancedSampler(size=10**6, positive_fraction=0.25))
    if kind == "mask":
        ours: FasterRCNN | MaskRCNN = MaskRCNN(num_classes=CLASSES, backbone=ours_backbone, rpn=rpn, box=box)
        load_torchvision_state(ours, theirs.state_dict(), layers=MASK_LAYERS, renames=MASK_RENAMES)
    else:
        ours = FasterRCNN(num_classes=CLASSES, backbone=ours_backbone, rpn=rpn, box=box)
        load_torchvision_state(ours, theirs.state_dict(), layers=BOX_LAYERS, renames=BOX_RENAMES)
    return theirs.eval(), ours.eval()


def images(count: int) -> list[Tensor]:
    """Images in [0, 1] of different sizes, two of them not divisible by 32."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand((3, *size), generator=generator) for size in SIZES[:count]]


def padded(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the batch ``(B, 3, H, W)`` padded to multiples of 32, and the valid sizes ``(B, 2)``."""
    sizes = torch.tensor([picture.shape[1:] for picture in pictures])
    height, width = ((sizes.amax(0) + 31) // 32 * 32).tolist()
    batch = torch.zeros(len(pictures), 3, height, width)
    for place, picture in zip(batch, pictures, strict=True):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    return batch, sizes


def objects(count: int, *, empty: int | None = None) -> list[Target]:
    """Boxes of many sizes with random masks in each image; image ``empty`` has none."""
    generator = torch.Generator().manual_seed(2)
    targets = []
    for index, size in enumerate(SIZES[:count]):
        number = 0 if index == empty else 5
        corner = torch.rand((number, 2), generator=generator) * 50
        side = 10 + torch.rand((number, 2), generator=generator) * 60
        boxes = torch.cat([corner, corner + side], dim=1).clamp(max=97.0)
        labels = torch.randint(0, CLASSES, (number,), generator=generator)
        masks = torch.rand((number, *size), generator=generator) > 0.4
        targets.append(Target(boxes=boxes, labels=labels, masks=masks, image_id=index))
    return targets


def torchvision_targets(targets: list[Target]) -> list[dict[str, Tensor | None]]:
    return [
        {"boxes": target.boxes, "labels": target.labels + 1, "masks": target.masks.to(torch.uint8)}
        for target in targets
        if target.masks is not None
    ]


def torchvision_losses(model: nn.Module, pictures: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
    """Return torchvision's losses under our names; it gives them in train mode alone."""
    losses = model.train()(pictures, torchvision_targets(targets))
    model.eval()
    names = {"loss_rpn_box_reg": "loss_rpn_box", "loss_box_reg": "loss_box"}
    return {names.get(name, name): value.detach() for name, value in losses.items()}
