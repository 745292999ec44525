"""The mask head of `"Mask R-CNN" <https://arxiv.org/abs/1703.06870>`_ (section 3, figure 4 right).

Equal to torchvision's on the same weights. Differs: one mask per foreground class (the paper's K; torchvision adds an
unused one for background), and predictions run in chunks, so that memory stays bounded.

Letters: R regions of all images, P cells of a pooled region's side, S = 2 P cells of a mask's side, K classes,
M objects of one image, H and W of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detseg.losses.normalise import normaliser
from detseg.models.box_branch import RegionSamples
from detseg.models.region_features import RegionAlign, stack_regions
from detseg.ops.paste import paste_masks
from detseg.structures import Detections, Target
from detseg.targets.crowds import learnable

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of (prediction, target), summed to a scalar."""

_PIXELS = 1 << 25  # mask pixels made float at once: 128 MB


class MaskPredictor(nn.Module):
    """Double the resolution, then one logit per class and cell."""

    def __init__(self, *, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(channels, width, 2, stride=2)
        self.mask_fcn_logits = nn.Conv2d(width, num_classes, 1)
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits ``(R, K, S, S)`` from ``(R, C, P, P)``."""
        logits: Tensor = self.mask_fcn_logits(self.conv5_mask(hidden).relu())  # (R, K, S, S)
        return logits.float()


class MaskBranch(nn.Module):
    """Draw a mask inside every box.

    Args:
        num_classes: K foreground classes.
        channels: of every pyramid level.
        widths: channels of the 3x3 convolutions.
        pooling: features of a region; default RoIAlign to 14 x 14 from four levels, thus masks of 28 x 28.
        mask_loss: summed loss of (logits, wanted share of each cell in [0, 1]), both ``(R, S, S)``.
        threshold: a pixel belongs to the object where its probability exceeds this.
        chunk: regions per pass in prediction; bounds memory.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        widths: Sequence[int] = (256, 256, 256, 256),
        pooling: RegionAlign | None = None,
        mask_loss: Loss | None = None,
        threshold: float = 0.5,
        chunk: int = 256,
    ) -> None:
        super().__init__()
        self.pooling = pooling or RegionAlign(output_size=14, sampling_ratio=2)
        blocks = []
        for before, after in zip([channels, *widths], widths, strict=False):
            convolution = nn.Conv2d(before, after, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # it has a bias
            blocks.append(nn.Sequential(convolution, nn.ReLU(inplace=True)))
        self.head = nn.Sequential(*blocks)
        width = widths[-1] if widths else channels
        self.predictor = MaskPredictor(channels=width, width=width, num_classes=num_classes)
        self.mask_loss = mask_loss or nn.BCEWithLogitsLoss(reduction="sum")
        self.threshold = threshold
        self.chunk = chunk

    def forward(self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]) -> Tensor:
        """Return logits ``(R, K, S, S)``.

        Args:
            features: per level ``(B, C, H, W)``.
            regions: ``(R, 5)`` image index and xyxy pixels.
            strides: pixels per cell of each level.
        """
        logits: Tensor = self.predictor(self.head(self.pooling(features, regions, strides)))
        return logits

    def positives(self, samples: RegionSamples) -> Tensor:
        """Return the regions that learn a mask, ``(R, 5)``: those with an object."""
        return stack_regions([box[label > 0] for box, label in zip(samples.boxes, samples.labels, strict=True)])

    def loss(self, logits: Tensor, samples: RegionSamples, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return ``loss_mask``, the mean over cells (of all ranks) of the mask of the true class (section 3).

        Args:
            logits: ``(R, K, S, S)`` of the regions that ``positives`` gave.
            samples: the sampled regions.
            targets: one per image, with masks.
        """
        labels = torch.cat([label[label > 0] - 1 for label in samples.labels])  # (R,)
        side = logits.shape[-1]
        wanted = torch.cat(
            [
                mask_targets(target, box[label > 0], row[label > 0], side)
                for target, box, label, row in zip(targets, samples.boxes, samples.labels, samples.objects, strict=True)
            ]
        )  # (R, S, S)
        chosen = logits[torch.arange(len(labels), device=labels.device), labels]  # (R, S, S)
        count = normaliser(torch.tensor(wanted.numel(), device=logits.device))
        return {"loss_mask": self.mask_loss(chosen, wanted.to(chosen)) / count}

    def draw(
        self, features: Sequence[Tensor], found: Sequence[Detections], strides: Sequence[int], sizes: Tensor
    ) -> list[Detections]:
        """Return the detections with masks of their image's valid size.

        Args:
            features: per level ``(B, C, H, W)``.
            found: detections without masks, one per image.
            strides: pixels per cell of each level.
            sizes: ``(B, 2)`` valid height and width.
        """
        regions = stack_regions([detections.boxes for detections in found])  # (R, 5)
        labels = torch.cat([detections.labels for detections in found])  # (R,)
        soft = []
        for some, label in zip(torch.split(regions, self.chunk), torch.split(labels, self.chunk), strict=True):
            logits = self(features, some, strides)  # (r, K, S, S)
            soft.append(logits[torch.arange(len(label), device=label.device), label].sigmoid())  # (r, S, S)
        parts = torch.split(torch.cat(soft), [len(detections) for detections in found])  # per image (N, S, S)
        return [
            Detections(
                detections.boxes,
                detections.scores,
                detections.labels,
                paste_masks(part, detections.boxes, (height, width), threshold=self.threshold),
            )
            for detections, part, (height, width) in zip(found, parts, sizes.tolist(), strict=True)
        ]


@torch.no_grad()
def mask_targets(target: Target, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    """Return what each region shall draw, ``(N, side, side)`` in [0, 1]: its object's mask inside the box.

    Args:
        target: of the image, with masks.
        boxes: ``(N, 4)`` xyxy pixels.
        objects: ``(N,)`` int64, row of each region's object among the learnable ones.
        side: S, cells of a mask's side.

    Raises:
        ValueError: the target has no masks.
    """
    if len(boxes) == 0:
        return boxes.new_zeros((0, side, side))
    masks = learnable(target).masks  # (M, H, W)
    if masks is None:
        raise ValueError(
            f"Target of image {target.image_id}: {len(target)} objects without masks; Mask R-CNN needs instance masks, "
            "so choose data with truth=instances"
        )
    step = max(1, _PIXELS // max(1, masks.shape[1] * masks.shape[2]))  # objects whose masks are float at once
    wanted = boxes.new_zeros((len(boxes), side, side))  # (N, S, S)
    for start in range(0, len(masks), step):
        rows = ((objects >= start) & (objects < start + step)).nonzero().flatten()  # (n,)
        regions = torch.cat([(objects[rows, None] - start).to(boxes), boxes[rows]], dim=1)  # (n, 5)
        wanted[rows] = roi_align(masks[start : start + step, None].to(boxes), regions, side)[:, 0]  # (n, S, S)
    return wanted
