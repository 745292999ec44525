"""torchvision's SSD and SSDlite beside ours, on the same weights and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detseg.structures import Target


@torch.no_grad()
def liven(theirs: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Make the model say something: norms know these images, logits and box deltas spread on every level.

    Return the levels.
    """
    norms = [(module, module.momentum) for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)]
    batch, _ = theirs.transform(list(images))
    for norm, _ in norms:
        norm.train().momentum = 1.0
    if norms:
        theirs.head(list(theirs.backbone(batch.tensors).values()))
    for norm, momentum in norms:
        norm.eval().momentum = momentum
    levels = theirs.backbone(batch.tensors)
    for head, spread in ((theirs.head.classification_head, 1.5), (theirs.head.regression_head, 0.5)):
        for predictor, level in zip(head.module_list, levels.values(), strict=True):
            layer = predictor if isinstance(predictor, nn.Conv2d) else predictor[-1]
            layer.weight *= spread / float(predictor(level).std())
    return levels


class Given(nn.Module):
    """In place of a body that has run on the same images before."""

    def __init__(self, levels: dict[str, Tensor]) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.levels


def objects(count: int, size: int, *, empty: int | None = None) -> list[Target]:
    """Boxes of many sizes in each image; image ``empty`` has none."""
    generator = torch.Generator().manual_seed(3)
    targets = []
    for index in range(count):
        number = 0 if index == empty else 8
        corner = torch.rand((number, 2), generator=generator) * size * 0.6
        side = 8 + torch.rand((number, 2), generator=generator) ** 2 * size * 0.7
        boxes = torch.cat([corner, corner + side], dim=1).clamp(max=size - 1.0)
        targets.append(Target(boxes=boxes, labels=torch.randint(0, 3, (number,), generator=generator)))
    return targets


def torchvision_losses(theirs: nn.Module, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
    """Their losses exist in training mode alone, and with labels from 1 on; the layers stay in evaluation mode."""
    theirs.training = True
    found = theirs(list(images), [{"boxes": target.boxes, "labels": target.labels + 1} for target in targets])
    theirs.training = False
    return {"loss_classification": found["classification"], "loss_box": found["bbox_regression"]}


def torchvision_outputs(theirs: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits ``(B, N, K + 1)`` and deltas ``(B, N, 4)``."""
    found = theirs.head(list(theirs.backbone(images).values()))
    return found["cls_logits"], found["bbox_regression"]
