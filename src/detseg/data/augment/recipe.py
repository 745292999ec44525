"""Which augmentations a sample gets, in which order, and when the heavy ones stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from detseg.data.augment.colour import PhotometricDistort
from detseg.data.augment.context import Context, Scene
from detseg.data.augment.framing import Frame, centred, iou_crop, through, zoom_out
from detseg.data.augment.joining import Size
from detseg.data.augment.mixing import mix
from detseg.data.augment.mosaic import mosaic, quarters
from detseg.data.augment.pasting import choose, paste
from detseg.data.augment.variety import varied
from detseg.data.geometry import Place, ResizeAndCrop, Window
from detseg.structures import Target

Range = tuple[float, float]


class Painter(Protocol):
    """The recipe that augmentation is part of: sizes, and what follows once a window is drawn."""

    geometry: ResizeAndCrop
    min_side: float
    min_visible: float
    cat_max_ratio: float

    def render(self, image: torch.Tensor, target: Target, place: Place) -> Scene:
        """Return what shows through a window, mirrored and recoloured, without objects that it left too little of."""
        ...


class Augment:
    """Augmentations in this order: one image or a mosaic, then mixup with another image, then pasted objects.

    Every image among them is resized, mirrored and recoloured as it would be alone, with its own random numbers; zoom
    out, IoU crop and the recipe's ``cat_max_ratio`` are left out of mosaics, whose ``mosaic_scale`` replaces the
    recipe's ``scale``. Where images may
    be joined, one that ``scale`` makes smaller is filled up, also where its size is not fixed. What a sample is depends
    on (seed, epoch, index), and on its batch's number where sizes change, alone.

    Args:
        photometric: probability of changing each of brightness, contrast, saturation and hue, in SSD's order.
        photometric_channels: probability of reordering red, green and blue.
        zoom_out: probability of putting the image on a larger canvas.
        zoom_out_max: largest side of that canvas relative to the image's.
        iou_crop: probability of cutting out a patch that shows enough of some object.
        iou_crop_overlaps: IoU of patch and object, of which one is demanded; 0 asks for the object's centre alone, 1
            leaves the image whole.
        mosaic: probability of putting four images together.
        mosaic_scale: (lowest, highest) factor of each image on top of the resizing.
        mosaic_centre: (lowest, highest) place of the common corner as a share of height and width.
        mixup: probability of laying another image over the sample.
        mixup_alpha: the first image's share is drawn from Beta(alpha, alpha).
        copy_paste: probability of pasting objects of another image; needs instance masks.
        copy_paste_share: probability of each object to be pasted.
        close_epochs: mosaic, mixup and copy-paste are left out of the last epochs, this many.
        multi_scale: image sizes of which one is drawn for a batch: factors of the recipe's own, or (height, width)
            pairs in pixels that images are stretched to. ``None``: one size.
        multi_scale_every: batches that have one size in a row.

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(
        self,
        *,
        photometric: float = 0.0,
        photometric_channels: float = 0.0,
        zoom_out: float = 0.0,
        zoom_out_max: float = 4.0,
        iou_crop: float = 0.0,
        iou_crop_overlaps: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
        mosaic: float = 0.0,
        mosaic_scale: Sequence[float] = (0.5, 1.5),
        mosaic_centre: Sequence[float] = (0.25, 0.75),
        mixup: float = 0.0,
        mixup_alpha: float = 32.0,
        copy_paste: float = 0.0,
        copy_paste_share: float = 0.5,
        close_epochs: int = 0,
        multi_scale: Sequence[float | Sequence[int]] | None = None,
        multi_scale_every: int = 10,
    ) -> None:
        self.photometric, self.photometric_channels = photometric, photometric_channels
        self.zoom_out, self.zoom_out_max = zoom_out, zoom_out_max
        self.iou_crop, self.iou_crop_overlaps = iou_crop, [float(demand) for demand in iou_crop_overlaps]
        self.mosaic, self.mixup, self.mixup_alpha = mosaic, mixup, mixup_alpha
        self.mosaic_scale = _range("mosaic_scale", mosaic_scale)
        self.mosaic_centre = _range("mosaic_centre", mosaic_centre, highest=1.0)
        self.copy_paste, self.copy_paste_share = copy_paste, copy_paste_share
        self.close_epochs, self.multi_scale_every = close_epochs, multi_scale_every
        self.multi_scale = list(multi_scale or [])
        self._check()
        self.recolour = PhotometricDistort(probability=photometric, channels=photometric_channels)
        self.recolours = photometric > 0 or photometric_channels > 0

    @property
    def active(self) -> bool:
        """Whether anything is on; a recipe goes its plain way otherwise."""
        return self.recolours or self.zoom_out > 0 or self.iou_crop > 0 or self.heavy or bool(self.multi_scale)

    @property
    def heavy(self) -> bool:
        """Whether any of those is on that join several images and are closed for the last epochs."""
        return self.mosaic > 0 or self.mixup > 0 or self.copy_paste > 0

    def check_truth(self, truth: str) -> None:
        """Raise unless everything that is on has a meaning for a kind of truth.

        Args:
            truth: ``boxes``, ``instances`` or ``semantic``.

        Raises:
            ValueError: it has none; the message says what to do.
        """
        if self.copy_paste > 0 and truth != "instances":
            raise ValueError(
                f"augment.copy_paste={self.copy_paste} cuts objects out by their masks, but truth is {truth}: give "
                "truth=instances, where the data have masks, or copy_paste=0"
            )
        if self.mixup > 0 and truth == "semantic":
            raise ValueError(
                f"augment.mixup={self.mixup} lays two images over each other, but truth is semantic, which has one "
                "class for each pixel: give mixup=0"
            )

    def closed(self, context: Context) -> bool:
        """Say whether the epoch is one of the last, in which no images are joined."""
        return context.epochs is not None and context.epoch >= context.epochs - self.close_epochs

    def __call__(self, recipe: Painter, image: torch.Tensor, target: Target, context: Context) -> Scene:
        """Return the augmented sample.

        Args:
            recipe: whose sizes and further steps are used.
            image: ``(3, H, W)`` uint8 RGB.
            target: the truth in its pixels.
            context: where it stands in the training, and the other images.
        """
        geometry = recipe.geometry
        if self.multi_scale:
            number = context.choice(len(self.multi_scale), every=self.multi_scale_every)
            geometry = geometry.zoomed(self.multi_scale[number])
        if self.closed(context):
            return self._alone(recipe, geometry, (image, target))
        scene = self._first(recipe, geometry, (image, target), context)
        canvas = _size(scene[0])
        if _happens(self.mixup):
            other = self._alone(recipe, geometry, context.another(), canvas)
            share = float(torch.distributions.Beta(self.mixup_alpha, self.mixup_alpha).sample())
            scene = mix(scene, other, share)
        if _happens(self.copy_paste):
            source, objects = self._alone(recipe, geometry, context.another(), canvas)
            objects = objects[choose(objects, self.copy_paste_share)]
            scene = paste(scene, (source, objects), min_side=recipe.min_side, min_visible=recipe.min_visible)
        return scene

    def _first(self, recipe: Painter, geometry: ResizeAndCrop, scene: Scene, context: Context) -> Scene:
        """Return the image itself, or a mosaic that it is part of."""
        canvas = geometry.canvas(_size(scene[0]))
        if not _happens(self.mosaic) or min(canvas) < 2:
            return self._alone(recipe, geometry, scene)
        low, high = self.mosaic_centre
        down, right = (low + (high - low) * torch.rand(2)).tolist()
        parts, cells = quarters(canvas, (down, right)), []
        for number, part in enumerate(parts):
            image, target = context.another() if number else scene
            window = geometry.draw(_size(image), canvas=part.size, scale=self.mosaic_scale, anchor=part.anchor)
            cells.append(recipe.render(image, target, self._place(geometry, window)))
        return mosaic(cells, parts, canvas)

    def _alone(self, recipe: Painter, geometry: ResizeAndCrop, scene: Scene, canvas: Size | None = None) -> Scene:
        """Return one image, zoomed out and cropped as it may be, on a canvas of its own or of a given size."""
        image, target = scene
        size = _size(image)
        frame, cut = Frame((0, 0), size), False
        if _happens(self.zoom_out):
            frame = zoom_out(frame, self.zoom_out_max)
        if _happens(self.iou_crop):
            frame, cut = iou_crop(frame, target.boxes[~target.iscrowd], self.iou_crop_overlaps)
        if cut:
            target = target[centred(target.boxes, frame) | target.iscrowd]
        if canvas is None and self.heavy:  # scaled down it is filled up, or others would find no room on it
            canvas = geometry.canvas(frame.size, within=size)
        good = varied(target, recipe.cat_max_ratio, see=lambda window: through(window, frame, size))
        window = geometry.draw(frame.size, within=size, canvas=canvas, good=good)
        return recipe.render(image, target, self._place(geometry, through(window, frame, size)))

    def _place(self, geometry: ResizeAndCrop, window: Window) -> Place:
        return Place(window=window, fill=geometry.fill, recolour=self.recolour if self.recolours else None)

    def _check(self) -> None:
        """Raise unless every number is in its range."""
        names = ("photometric", "photometric_channels", "zoom_out", "iou_crop", "mosaic", "mixup", "copy_paste",
                 "copy_paste_share")  # fmt: skip
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a probability, 0 to 1, got {getattr(self, name)}")
        if self.zoom_out_max < 1 or not self.mixup_alpha > 0 or not self.iou_crop_overlaps:
            raise ValueError(
                f"augment.zoom_out_max={self.zoom_out_max} must be at least 1, mixup_alpha={self.mixup_alpha} above 0, "
                f"iou_crop_overlaps={self.iou_crop_overlaps} not empty"
            )
        if self.close_epochs < 0 or self.multi_scale_every < 1:
            raise ValueError(
                f"augment.close_epochs={self.close_epochs} must be at least 0, "
                f"multi_scale_every={self.multi_scale_every} at least 1"
            )
        for choice in self.multi_scale:
            ResizeAndCrop().zoomed(choice)


def _happens(probability: float) -> bool:
    """Draw whether something happens; nothing is drawn for what never does."""
    return probability > 0 and float(torch.rand(())) < probability


def _size(image: torch.Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _range(name: str, values: Sequence[float], *, highest: float = float("inf")) -> Range:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= highest:
        limit = "" if highest == float("inf") else f" <= {highest:g}"
        raise ValueError(f"augment.{name} must be [lowest, highest] with 0 < lowest <= highest{limit}, got {values}")
    return float(values[0]), float(values[1])
