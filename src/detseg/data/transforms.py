"""Recipes: how an image and its truth become what a model is fed.

Built on ``torchvision.transforms.v2`` and tv_tensors. Geometry comes first, so that colour is changed on the small
image; images stay uint8. Boxes, labels, masks, crowd and difficult flags and areas are dropped together. Proposals go
where boxes go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from detseg.data.augment import Augment, Context
from detseg.data.augment.colour import ColourJitter, HueShift
from detseg.data.augment.variety import varied
from detseg.data.geometry import UNLABELLED, LabelMask, Place, ResizeAndCrop, Windowed
from detseg.ops.boxes import clip_boxes
from detseg.structures import PanopticMap, SemanticMap, Target

Size = Sequence[int]
"""(height, width) in pixels."""


class Recipe:
    """Resize, crop, flip and recolour; the named recipes below differ in their defaults alone.

    Args:
        size: (height, width) that the image is stretched to, or ``None``.
        short_side: pixels that the shorter side gets, the shape kept; used where ``size`` is ``None``.
        long_side: pixels that the longer side gets at most, or exactly where ``short_side`` is ``None`` too.
            All three ``None``: the image keeps its size.
        scale: (lowest, highest) factor drawn uniformly and applied on top of the resizing.
        crop: (height, width) of the window cut out at random, filled up where the image is smaller. ``None``: ``size``,
            or with the shape kept, a window no larger than the resized image.
        cat_max_ratio: a crop is drawn anew, ``geometry.TRIES`` times in all, while one class fills more than this share
            of its labelled pixels, or none of them is labelled; 1 takes the first, and so does a target without a map.
        flip: probability of mirroring left and right.
        vertical_flip: probability of mirroring top and bottom; for images without an up, as under a microscope.
        brightness, contrast, saturation: factors are drawn from ``[1 - x, 1 + x]``; 0 leaves the step out.
        hue: the hue is turned by up to this share of the full circle, 0 to 0.5.
        min_side: objects and proposals whose clipped box is narrower or lower than this many pixels are dropped.
        min_visible: objects of which less than this share of the box is left after the crop are dropped. Of a proposal
            and of a crowd any part that is large enough stays.
        fill: grey value of pixels outside the image.
        augment: what goes beyond one image and one window, or ``None``.

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(
        self,
        *,
        size: Size | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        scale: Sequence[float] = (1.0, 1.0),
        crop: Size | None = None,
        cat_max_ratio: float = 1.0,
        flip: float = 0.0,
        vertical_flip: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        min_side: float = 1.0,
        min_visible: float = 0.1,
        fill: int = 114,
        augment: Augment | None = None,
    ) -> None:
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f"cat_max_ratio is a share of pixels, above 0 and at most 1 (off), got {cat_max_ratio}")
        self.min_side, self.min_visible, self.cat_max_ratio = min_side, min_visible, cat_max_ratio
        self.augment = augment if augment is not None and augment.active else None
        self.geometry = ResizeAndCrop(
            size=size, short_side=short_side, long_side=long_side, scale=scale, crop=crop, fill=fill
        )
        steps: list[nn.Module] = [self.geometry]
        if flip:
            steps.append(v2.RandomHorizontalFlip(flip))
        if vertical_flip:
            steps.append(v2.RandomVerticalFlip(vertical_flip))
        if brightness or contrast or saturation:
            steps.append(ColourJitter(brightness=brightness, contrast=contrast, saturation=saturation))
        if hue:
            steps.append(HueShift(hue))
        self.steps = steps

    def __call__(
        self, image: Tensor, target: Target, context: Context | None = None
    ) -> tuple[tv_tensors.Image, Target]:
        """Return the transformed image and its target.

        Args:
            image: ``(3, H, W)`` uint8 RGB.
            target: the truth in the pixels of ``image``.
            context: where the sample stands in the training, and the other images; ``augment`` needs it, and is left
                out without.
        """
        if self.augment is None or context is None:
            return self.render(image, target, self._place(image, target))
        image, target = self.augment(self, image, target, context)
        return tv_tensors.Image(image), target

    def render(self, image: Tensor, target: Target, place: Windowed) -> tuple[tv_tensors.Image, Target]:
        """Return what shows through the window of ``place``, mirrored and recoloured; see ``__call__``."""
        parts = _parts(image, target, place.view)
        steps: list[Any] = [place, *self.steps[1:]]
        for step in steps:
            parts = step(parts)
        return parts["image"], _finish(target, parts, self.min_side, self.min_visible)

    def _place(self, image: Tensor, target: Target) -> Windowed:
        """Return the step that cuts the window out: one that looks for variety where that is asked for."""
        good = varied(target, self.cat_max_ratio)
        if good is None:
            return self.geometry
        window = self.geometry.draw((image.shape[-2], image.shape[-1]), good=good)
        return Place(window=window, fill=self.geometry.fill)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.steps))})"


class DetectionTrain(Recipe):
    """Training recipe for boxes and instance masks: mirrored half of the time, other changes off."""

    def __init__(
        self,
        *,
        size: Size | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        scale: Sequence[float] = (1.0, 1.0),
        crop: Size | None = None,
        cat_max_ratio: float = 1.0,
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        min_side: float = 1.0,
        min_visible: float = 0.1,
        fill: int = 114,
        augment: Augment | None = None,
    ) -> None:
        super().__init__(
            size=size, short_side=short_side, long_side=long_side, scale=scale, crop=crop, cat_max_ratio=cat_max_ratio,
            flip=flip, vertical_flip=vertical_flip, brightness=brightness, contrast=contrast, saturation=saturation,
            hue=hue, min_side=min_side, min_visible=min_visible, fill=fill, augment=augment,
        )  # fmt: skip


class SemanticTrain(DetectionTrain):
    """Training recipe for maps: the same steps; pixels outside the image get the ignore index.

    Crop-based training as in DeepLab's line (Chen et al. 2017, arXiv:1706.05587, section 4) is ``scale=(0.5, 2.0)``
    and ``crop``, with ``cat_max_ratio=0.75`` as in MMSegmentation; ``augment.photometric`` gives SSD's colours.
    """


class DetectionEval(Recipe):
    """Evaluation recipe for boxes and instance masks: resize and nothing else; no object is dropped."""

    def __init__(
        self, *, size: Size | None = None, short_side: int | None = None, long_side: int | None = None
    ) -> None:
        super().__init__(size=size, short_side=short_side, long_side=long_side, min_side=0.0, min_visible=0.0)


class SemanticEval(DetectionEval):
    """Evaluation recipe for maps: resize and nothing else."""


def _parts(image: Tensor, target: Target, view: Tensor | None) -> dict[str, Any]:
    """Wrap what geometry changes in tv_tensors, so that each v2 transform treats it as what it is."""
    parts: dict[str, Any] = {"image": tv_tensors.Image(image)}
    for name, boxes in {"boxes": target.boxes, "proposals": target.proposals, "view": view}.items():
        if boxes is not None:
            size = (image.shape[-2], image.shape[-1])
            parts[name] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size, clamping_mode=None)
    if target.masks is not None:
        parts["masks"] = tv_tensors.Mask(target.masks)
    if target.semantic is not None:
        parts["semantic"] = LabelMask(target.semantic.labels[None])
    if target.panoptic is not None:
        parts["panoptic"] = tv_tensors.Mask(target.panoptic.segments[None])
    return parts


def _finish(target: Target, parts: dict[str, Any], min_side: float, min_visible: float) -> Target:
    """Clip the boxes, drop what the crop left too little of, and put the target together again."""
    size = (parts["image"].shape[-2], parts["image"].shape[-1])
    boxes = parts["boxes"].as_subclass(Tensor)  # (N, 4), possibly beyond the image
    clipped = _clip(boxes, parts)  # (N, 4)
    sides = clipped[:, 2:] - clipped[:, :2]  # (N, 2)
    area = target.area * _box_areas(clipped) / _box_areas(target.boxes).clamp(min=1e-6)  # (N,) grows and is cut alike
    visible = _box_areas(clipped) / _box_areas(boxes).clamp(min=1e-6)  # (N,) in [0, 1]
    masks = parts["masks"].as_subclass(Tensor) if "masks" in parts else None  # (N, H, W)
    enough = (visible >= min_visible) | target.iscrowd  # a corner of a crowd may fill the crop, and is no background
    kept = (sides >= min_side).all(dim=1) & enough
    if masks is not None and min_side > 0:  # evaluation keeps every object
        doubtful = (kept & ((visible < 0.999) | (sides < 8).any(dim=1))).nonzero()[:, 0]  # looking at all masks is slow
        kept[doubtful] = masks[doubtful].flatten(1).any(dim=1)
        for row in (kept & (visible < 0.999)).nonzero()[:, 0].tolist():
            clipped[row] = _mask_box(masks[row])  # of an L that lost its foot, the clipped box is too large
    changed = replace(
        target,
        boxes=clipped,
        masks=masks,
        area=area,
        size=size,
        semantic=_semantic(target.semantic, parts),
        panoptic=_panoptic(target.panoptic, parts),
        proposals=_proposals(parts, min_side),
    )
    return changed if bool(kept.all()) else changed[kept]


def _clip(boxes: Tensor, parts: dict[str, Any]) -> Tensor:
    """Return boxes ``(N, 4)`` cut to the image, and to what shows of the source where that is less."""
    size = torch.tensor([parts["image"].shape[-2], parts["image"].shape[-1]])
    clipped = clip_boxes(boxes, size)
    if "view" not in parts:
        return clipped
    view = clip_boxes(parts["view"].as_subclass(Tensor), size)[0].to(boxes)  # (4,)
    return torch.minimum(torch.maximum(clipped, view[:2].repeat(2)), view[2:].repeat(2))


def _proposals(parts: dict[str, Any], min_side: float) -> Tensor | None:
    """Return the proposals ``(P, 4)`` clipped to the image, without those of which too little or nothing is left."""
    if "proposals" not in parts:
        return None
    clipped = _clip(parts["proposals"].as_subclass(Tensor), parts)
    sides = clipped[:, 2:] - clipped[:, :2]  # (P, 2)
    return clipped[((sides >= min_side) & (sides > 0)).all(dim=1)]


def _box_areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # (N,)


def _mask_box(mask: Tensor) -> Tensor:
    """Return xyxy ``(4,)`` around the pixels of ``mask`` (H, W), which is not empty."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def _semantic(semantic: SemanticMap | None, parts: dict[str, Any]) -> SemanticMap | None:
    if semantic is None:
        return None
    labels = parts["semantic"].as_subclass(Tensor)[0]  # (H, W)
    labels = torch.where(labels == UNLABELLED, semantic.ignore_index, labels)
    return SemanticMap(labels, ignore_index=semantic.ignore_index)


def _panoptic(panoptic: PanopticMap | None, parts: dict[str, Any]) -> PanopticMap | None:
    if panoptic is None:
        return None
    return replace(panoptic, segments=parts["panoptic"].as_subclass(Tensor)[0])
