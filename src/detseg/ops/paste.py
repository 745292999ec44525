"""Put small masks back into the image: `"Mask R-CNN" <https://arxiv.org/abs/1703.06870>`_, section 3.1.

The geometry is torchvision's ``paste_masks_in_image`` (one cell of zeros around the mask, boxes cut to whole pixels,
bilinear), the result is already thresholded. On a CPU each box is resized alone, so that small objects cost little; on
a GPU all are resampled by two matrix products, in chunks of bounded memory.

Letters: N masks, S cells of a padded mask's side, H and W of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1 << 26  # floats in a pasted chunk: 256 MB


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], *, threshold: float = 0.5) -> Tensor:
    """Return full-size masks ``(N, H, W)`` bool.

    Args:
        masks: ``(N, M, M)`` probabilities inside each box.
        boxes: ``(N, 4)`` xyxy pixels, finite.
        size: (H, W) of the image.
        threshold: a pixel belongs to the object where its probability exceeds this.
    """
    cells = F.pad(masks.float(), (1, 1, 1, 1))  # (N, S, S)
    frames = _frames(boxes.float(), cells.shape[-1] / masks.shape[-1])  # (N, 4)
    if masks.device.type == "cpu":
        return _paste_each(cells, frames, size, threshold)
    step = max(1, _CHUNK // max(1, size[0] * size[1]))
    chunks = zip(torch.split(cells, step), torch.split(frames, step), strict=True)
    pasted = [_paste_together(some, where, size) > threshold for some, where in chunks]
    return torch.cat(pasted)  # (N, H, W); split gives one empty chunk where N is 0


def _frames(boxes: Tensor, scale: float) -> Tensor:
    """Grow boxes about their centres by ``scale`` and cut them to whole pixels: ``(N, 4)`` int64, both ends inside."""
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale  # (N, 2)
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5  # (N, 2)
    return torch.cat([centre - half, centre + half], dim=1).long()  # (N, 4)


def _paste_each(cells: Tensor, frames: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    pasted = torch.zeros((len(cells), *size), dtype=torch.bool)  # (N, H, W)
    for index, (x0, y0, x1, y1) in enumerate(frames.tolist()):
        sides = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1 + 1, size[1]), min(y1 + 1, size[0])
        if left >= right or top >= bottom:
            continue
        soft = F.interpolate(cells[index, None, None], sides, mode="bilinear", align_corners=False)[0, 0]  # (h, w)
        pasted[index, top:bottom, left:right] = soft[top - y0 : bottom - y0, left - x0 : right - x0] > threshold
    return pasted


def _paste_together(cells: Tensor, frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the resampled masks ``(N, H, W)``; in full precision, as the edge of a mask hangs on the third digit."""
    with torch.autocast(cells.device.type, enabled=False):  # it would make the products bfloat16 or float16
        return _resample(cells, frames, size)


def _resample(cells: Tensor, frames: Tensor, size: tuple[int, int]) -> Tensor:
    rows = _weights(frames[:, 1], frames[:, 3], size[0], cells.shape[-1])  # (N, H, S)
    columns = _weights(frames[:, 0], frames[:, 2], size[1], cells.shape[-1])  # (N, W, S)
    return rows @ cells @ columns.transpose(1, 2)  # (N, H, W)


def _weights(first: Tensor, last: Tensor, length: int, cells: int) -> Tensor:
    """Return how much each cell counts at each pixel along one axis, ``(N, length, cells)``; 0 outside the frame."""
    pixel = torch.arange(length, device=first.device)  # (length,)
    side = (last - first + 1).clamp(min=1)[:, None]  # (N, 1)
    inside = (pixel >= first[:, None]) & (pixel < first[:, None] + side)  # (N, length)
    # Half-pixel centres, as interpolate does with align_corners=False; beyond the outer cells their value holds.
    source = ((pixel - first[:, None] + 0.5) * (cells / side) - 0.5).clamp(0, cells - 1)  # (N, length)
    hat = 1 - (source[..., None] - torch.arange(cells, device=first.device)).abs()  # (N, length, cells)
    return hat.clamp(min=0) * inside[..., None]
