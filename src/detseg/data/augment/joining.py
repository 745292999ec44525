"""Targets of several images on one canvas, every field of every object in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detseg.structures import PanopticMap, SemanticMap, Target

Size = tuple[int, int]
"""(height, width) in pixels."""


def moved(target: Target, offset: Size, canvas: Size) -> Target:
    """Return objects and proposals as seen on a larger canvas; the maps are left out.

    Args:
        target: in the pixels of an image of ``target.size``, which lies wholly on the canvas.
        offset: (down, right), where the image's corner lies.
        canvas: its size.
    """
    shift = target.boxes.new_tensor([offset[1], offset[0]]).repeat(2)  # (4,)
    masks = target.masks
    if masks is not None and canvas != target.size:
        large = masks.new_zeros((len(masks), *canvas))  # (N, H, W)
        large[:, offset[0] : offset[0] + target.size[0], offset[1] : offset[1] + target.size[1]] = masks
        masks = large
    proposals = None if target.proposals is None else target.proposals + shift
    return replace(
        target, boxes=target.boxes + shift, masks=masks, size=canvas, semantic=None, panoptic=None, proposals=proposals
    )


def joined(targets: Sequence[Target]) -> Target:
    """Return the objects and proposals of all; what there is once per image (id, file, size, maps) is the first's.

    Raises:
        ValueError: only some have masks, or only some have proposals.
    """
    return replace(
        targets[0],
        boxes=torch.cat([target.boxes for target in targets]),
        labels=torch.cat([target.labels for target in targets]),
        masks=_all_or_none("masks", targets, [target.masks for target in targets]),
        iscrowd=torch.cat([target.iscrowd for target in targets]),
        area=torch.cat([target.area for target in targets]),
        difficult=torch.cat([target.difficult for target in targets]),
        proposals=_all_or_none("proposals", targets, [target.proposals for target in targets]),
    )


def joined_semantic(maps: Sequence[SemanticMap], offsets: Sequence[Size], canvas: Size) -> SemanticMap:
    """Return maps that lie side by side as one; what none covers is ignored."""
    labels = torch.full(canvas, maps[0].ignore_index)  # (H, W)
    for part, (top, left) in zip(maps, offsets, strict=True):
        height, width = part.size
        labels[top : top + height, left : left + width] = torch.where(
            part.labels == part.ignore_index, maps[0].ignore_index, part.labels
        )
    return SemanticMap(labels, ignore_index=maps[0].ignore_index)


def joined_panoptic(maps: Sequence[PanopticMap], offsets: Sequence[Size], canvas: Size) -> PanopticMap:
    """Return maps that lie side by side as one; segments are counted through, what none covers is void."""
    segments, known = torch.zeros(canvas, dtype=torch.int64), 0  # (H, W)
    for part, (top, left) in zip(maps, offsets, strict=True):
        height, width = part.segments.shape
        shown = torch.where(part.segments > 0, part.segments + known, 0)
        segments[top : top + height, left : left + width] = shown
        known += len(part.labels)
    return PanopticMap(
        segments=segments,
        labels=torch.cat([part.labels for part in maps]),
        is_thing=torch.cat([part.is_thing for part in maps]),
    )


def _all_or_none(name: str, targets: Sequence[Target], values: Sequence[Tensor | None]) -> Tensor | None:
    given = [value for value in values if value is not None]
    if given and len(given) < len(values):
        files = ", ".join(target.file or f"image {target.image_id}" for target in targets)
        raise ValueError(f"{len(given)} of {len(values)} images to be joined have {name}; all or none must: {files}")
    return torch.cat(given) if given else None
