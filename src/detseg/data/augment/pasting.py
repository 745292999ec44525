"""Copy-paste of objects by their masks.

Ghiasi et al. 2021, "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation",
arXiv:2012.07177, section 3. Some objects of one image are laid over another; what they hide is taken out of the masks,
boxes and areas of the objects below. Edges are not blended: the paper found that it makes no difference. An object
below is dropped when less than the recipe's ``min_visible`` of it is left, in the paper only when nothing is.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou, masks_to_boxes

from detseg.data.augment.context import Scene
from detseg.data.augment.joining import joined
from detseg.data.geometry import as_image, as_pixels
from detseg.structures import Target

COVERED = 0.5
"""IoU with a pasted object from which on a proposal of its image comes along."""


def choose(target: Target, share: float) -> Tensor:
    """Draw the objects to be pasted, each with probability ``share``, ``(N,)`` bool; never a crowd.

    Raises:
        ValueError: there are no masks.
    """
    if target.masks is None:
        raise ValueError(f"copy-paste: image {target.image_id} has no masks; it needs instance masks")
    drawn = torch.rand(len(target)) < share
    return drawn & ~target.iscrowd & target.masks.flatten(1).any(dim=1)


def paste(below: Scene, above: Scene, *, min_side: float = 1.0, min_visible: float = 0.1) -> Scene:
    """Lay all objects of ``above`` over ``below``, an image of the same size.

    Args:
        below: its id and file become the result's.
        above: only the pixels under its masks are used.
        min_side: objects below whose box becomes narrower or lower than this many pixels are dropped.
        min_visible: objects below of which a smaller share is left are dropped, but for crowds.

    Raises:
        ValueError: an image has no masks, or the lower one has a semantic or panoptic map.
    """
    (image, target), (source, pasted) = below, above
    if target.semantic is not None or target.panoptic is not None:
        raise ValueError(f"copy-paste: image {target.image_id} has a map of classes, in which pasted objects have none")
    if target.masks is None or pasted.masks is None:
        raise ValueError(f"copy-paste: image {target.image_id} or {pasted.image_id} has no masks; both need them")
    if not len(pasted):
        return below
    cover = pasted.masks.any(dim=0)  # (H, W)
    pixels = as_pixels(image).copy()
    cv2.copyTo(as_pixels(source), cover.numpy().astype(np.uint8), pixels)
    pasted = replace(pasted, proposals=_covering(pasted))
    return as_image(pixels), joined([_hidden(target, cover, min_side, min_visible), pasted])


def _hidden(target: Target, cover: Tensor, min_side: float, min_visible: float) -> Target:
    """Take the pixels of ``cover`` (H, W) out of the objects of ``target``."""
    assert target.masks is not None
    rows = (target.masks & cover).flatten(1).any(dim=1).nonzero()[:, 0]  # (R,) objects that lose something
    if not len(rows):
        return target
    before = target.masks[rows]  # (R, H, W)
    after = before & ~cover
    share = after.flatten(1).sum(dim=1) / before.flatten(1).sum(dim=1)  # (R,)
    left = share > 0
    boxes, masks, area = target.boxes.clone(), target.masks.clone(), target.area.clone()
    boxes[rows[left]] = mask_boxes(after[left]).to(boxes)
    masks[rows], area[rows] = after, area[rows] * share
    sides = boxes[rows, 2:] - boxes[rows, :2]  # (R, 2)
    kept = torch.ones(len(target), dtype=torch.bool)
    enough = (share >= min_visible) | target.iscrowd[rows]  # what is left of a crowd is no background
    kept[rows] = left & enough & (sides >= min_side).all(dim=1)
    return replace(target, boxes=boxes, masks=masks, area=area)[kept]


def _covering(pasted: Target) -> Tensor | None:
    """Return the proposals that are about a pasted object; the others show what was not pasted."""
    if pasted.proposals is None:
        return None
    near: Tensor = box_iou(pasted.proposals, pasted.boxes)  # (P, N)
    return pasted.proposals[(near >= COVERED).any(dim=1)]


def mask_boxes(masks: Tensor) -> Tensor:
    """Return xyxy ``(N, 4)`` around masks ``(N, H, W)``, none empty: outer edges of the outermost pixels."""
    boxes: Tensor = masks_to_boxes(masks)
    return boxes + boxes.new_tensor([0, 0, 1, 1])
