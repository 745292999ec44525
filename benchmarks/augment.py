"""CPU milliseconds per sample of each augmentation, beside torchvision's v2 where it has one, in one run and process.

    python benchmarks/augment.py                              # 480 x 640 photos with 8 masks, to 320 x 320
    python benchmarks/augment.py --height 320 --width 320 --objects 0 --rounds 60

Both get the same photos, already decoded, with boxes and masks, and give images of one size. Ours is the whole recipe
(window, flip, dropped objects); torchvision's is the operation, resizing, flip and ``SanitizeBoundingBoxes``. Samples
alternate (theirs, ours, ...), the first of each does not count, medians are shown; where torchvision has nothing, there
is a dash. CPU time, so that other work on the machine counts little. OpenCV and torch have one thread each, as a data
worker has.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from detseg.data.augment import Augment, Context, Scene
from detseg.data.transforms import DetectionTrain
from detseg.structures import Target

PHOTOS = 16


def photo(number: int, options: argparse.Namespace) -> Scene:
    """Draw smooth noise with ellipses for objects, from a seed."""
    rng = np.random.default_rng(number)
    height, width = options.height, options.width
    noise = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    pixels = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    masks = np.zeros((options.objects, height, width), np.uint8)
    boxes = np.zeros((options.objects, 4), np.float32)
    for row in range(options.objects):
        half = rng.integers(8, min(height, width) // 5, 2)
        centre = rng.integers(half, [width, height] - half)
        cv2.ellipse(masks[row], tuple(centre.tolist()), tuple(half.tolist()), 0, 0, 360, 1, -1)
        boxes[row] = [*(centre - half), *(centre + half + 1)]
    target = Target(
        boxes=torch.from_numpy(boxes), labels=torch.zeros(options.objects, dtype=torch.int64),
        masks=torch.from_numpy(masks).bool(), size=(height, width), image_id=number,
    )  # fmt: skip
    return torch.from_numpy(pixels).permute(2, 0, 1), target


def ours(augment: dict[str, Any], options: argparse.Namespace, **recipe: Any) -> Callable[[Scene, Context], Any]:
    made = DetectionTrain(size=(options.size, options.size), augment=Augment(**augment), **recipe)
    return lambda scene, context: made(*scene, context)


def theirs(*steps: Any) -> Callable[[Scene, Context], Any]:
    """Return torchvision's transforms on what it takes: an image, boxes, masks and labels."""
    sanitize = v2.SanitizeBoundingBoxes(labels_getter=lambda parts: parts[3])
    together = v2.Compose([*steps, v2.RandomHorizontalFlip(0.5), sanitize])

    def apply(scene: Scene, context: Context) -> Any:
        image, target = scene
        size = (image.shape[-2], image.shape[-1])
        boxes = tv_tensors.BoundingBoxes(target.boxes, format="XYXY", canvas_size=size)
        assert isinstance(target.masks, Tensor)
        return together((tv_tensors.Image(image), boxes, tv_tensors.Mask(target.masks), target.labels))

    return apply


def pairs(options: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Return torchvision's and ours by name."""
    side = options.size
    resize = v2.Resize((side, side), antialias=True)
    jitter = [v2.ScaleJitter((side, side), (0.1, 2.0)), v2.RandomCrop((side, side), pad_if_needed=True, fill=114)]
    zoom = v2.RandomZoomOut(fill={tv_tensors.Image: 114, tv_tensors.Mask: 0}, p=1.0)
    half_zoom = v2.RandomZoomOut(fill={tv_tensors.Image: 114, tv_tensors.Mask: 0}, p=0.5)
    return {
        "resize and flip": (theirs(resize), ours({}, options)),
        "photometric": (theirs(resize, v2.RandomPhotometricDistort()), ours(
            {"photometric": 0.5, "photometric_channels": 0.5}, options)),
        "zoom out": (theirs(zoom, resize), ours({"zoom_out": 1.0}, options)),
        "IoU crop": (theirs(v2.RandomIoUCrop(), resize), ours({"iou_crop": 1.0}, options)),
        "SSD, all three": (
            theirs(v2.RandomPhotometricDistort(), half_zoom, v2.RandomIoUCrop(), resize),
            ours({"photometric": 0.5, "photometric_channels": 0.5, "zoom_out": 0.5, "iou_crop": 1.0}, options)),
        "large scale jitter": (theirs(*jitter), ours({}, options, scale=(0.1, 2.0))),
        "mosaic": (None, ours({"mosaic": 1.0}, options)),
        "mixup": (None, ours({"mixup": 1.0}, options)),
        "copy-paste": (None, ours({"copy_paste": 1.0}, options)),
        "mosaic and mixup": (None, ours({"mosaic": 1.0, "mixup": 1.0}, options)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480, help="of the photos")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--size", type=int, default=320, help="of the samples, both sides")
    parser.add_argument("--objects", type=int, default=8, help="per photo")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    photos = [photo(number, options) for number in range(PHOTOS)]
    context = Context(images=PHOTOS, read=photos.__getitem__)
    print(f"{'ms per sample':<22}{'torchvision':>12}{'ours':>8}{'times':>8}")
    for name, both in pairs(options).items():
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(options.rounds + 1):
            for one, taken in zip(both, times, strict=True):
                if one is not None:
                    torch.manual_seed(number)
                    start = time.process_time()
                    one(photos[number % PHOTOS], context)
                    taken.append((time.process_time() - start) * 1000)
        mine, other = statistics.median(times[1][1:]), statistics.median(times[0][1:]) if times[0] else None
        shown = f"{'-':>12}{mine:>8.2f}" if other is None else f"{other:>12.2f}{mine:>8.2f}{other / mine:>7.1f}x"
        print(f"{name:<22}{shown}", flush=True)


if __name__ == "__main__":
    main()
