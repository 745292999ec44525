"""A trained model that takes photos and answers in the photos' own pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detseg.models.inference import predict_images
from detseg.structures import Detections, SemanticMap, Target

Photo: TypeAlias = str | Path | NDArray[np.uint8] | Tensor
"""A file, an array ``(H, W, 3)`` or a tensor ``(3, H, W)``; the last two RGB uint8."""

Transform: TypeAlias = Callable[[Tensor, Target], tuple[Tensor, Target]]
"""An evaluation recipe of ``detseg.data.transforms``."""


class Predictor(nn.Module):
    """A model with all that it needs to be used: ``predictor("photo.jpg")[0]``.

    Args:
        model: a detector or segmenter as ``detseg.models.contract`` describes it; also reachable as ``.model``.
        class_names: by label.
        category_ids: the training data's own ids by label.
        transform: how a photo is resized for the model; ``None`` leaves it as it is.
        size_divisor: sides are padded to multiples of this many pixels.

    Raises:
        ValueError: the numbers of classes, names and ids disagree.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        class_names: Sequence[str],
        category_ids: Sequence[int] | None = None,
        transform: Transform | None = None,
        size_divisor: int = 32,
    ) -> None:
        super().__init__()
        self.model = model
        self.class_names = list(class_names)
        self.category_ids = list(range(len(self.class_names))) if category_ids is None else list(category_ids)
        self.transform, self.size_divisor = transform, size_divisor
        counts = {len(self.class_names), len(self.category_ids), getattr(model, "num_classes", len(self.class_names))}
        if len(counts) > 1:
            raise ValueError(
                f"Predictor: the model has {getattr(model, 'num_classes', '?')} classes, there are "
                f"{len(self.class_names)} names ({', '.join(self.class_names)}) and "
                f"{len(self.category_ids)} category ids"
            )
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def forward(self, photos: Photo | Sequence[Photo], *, batch_size: int = 8) -> list[Detections] | list[SemanticMap]:
        """Return what the model finds, one per photo, in the photo's own pixels and in host memory.

        Args:
            photos: one photo or several: files, RGB arrays ``(H, W, 3)`` or RGB tensors ``(3, H, W)``, uint8.
            batch_size: photos in one pass of the model.

        Raises:
            ValueError: an array or tensor has another shape or type; the message says which photo.
        """
        many = photos if isinstance(photos, list | tuple) else [cast(Photo, photos)]
        found: list[Any] = []
        for start in range(0, len(many), batch_size):
            group = [as_image(photo, start + place) for place, photo in enumerate(many[start : start + batch_size])]
            found += self._predict(group)
        return found

    def _predict(self, images: list[Tensor]) -> list[Any]:
        """Predict uint8 images (3, H, W) in one pass."""
        from detseg.data.sample import Sample, collate

        samples = [Sample(*self._prepare(image)) for image in images]
        batch = collate(samples, self.size_divisor)
        pixels = batch.images.to(self.device).float() / 255  # (B, 3, H, W)
        sizes = batch.sizes.to(self.device)  # (B, 2)
        given = {} if batch.proposals is None else {"proposals": [boxes.to(self.device) for boxes in batch.proposals]}
        found = predict_images(self.model, pixels, sizes, **given)
        return [
            _resize(answer.cpu(), (int(size[0]), int(size[1])), (image.shape[-2], image.shape[-1]))
            for answer, size, image in zip(found, batch.sizes, images, strict=True)
        ]

    def _prepare(self, image: Tensor) -> tuple[Tensor, Target]:
        nothing = Target(
            boxes=torch.zeros((0, 4)),
            labels=torch.zeros(0, dtype=torch.int64),
            size=(image.shape[-2], image.shape[-1]),
            proposals=self._propose(image),
        )
        return (image, nothing) if self.transform is None else self.transform(image, nothing)

    def _propose(self, image: Tensor) -> Tensor | None:
        """Return the regions ``(N, 4)`` of a photo that the model shall look at; ``None`` where it finds its own.

        They are of the photo as it is, as in training and evaluation.
        """
        proposer = getattr(self.model, "proposer", None)
        return None if proposer is None else cast(Tensor, proposer(image.as_subclass(Tensor)))


def as_image(photo: Photo, place: int = 0) -> Tensor:
    """Return a photo as an RGB uint8 tensor ``(3, H, W)``.

    Args:
        photo: a file, an array or a tensor.
        place: its number among several, for the message.
    """
    if isinstance(photo, str | Path):
        from detseg.data.image import read_image

        return cast(Tensor, read_image(photo))
    image = torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1) if _is_array(photo) else photo
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        what = f"{tuple(photo.shape)} {photo.dtype}" if hasattr(photo, "shape") else type(photo).__name__
        raise ValueError(
            f"photo {place} is {what}; give a file, an RGB uint8 array (H, W, 3) or an RGB uint8 tensor (3, H, W)"
        )
    return image


def _is_array(photo: object) -> bool:
    return isinstance(photo, np.ndarray) and photo.ndim == 3 and photo.shape[2] == 3 and photo.dtype == np.uint8


def _resize(
    answer: Detections | SemanticMap, source: tuple[int, int], size: tuple[int, int]
) -> Detections | SemanticMap:
    """Bring an answer from the (height, width) that the model saw to the photo's."""
    return answer.resize(source, size) if isinstance(answer, Detections) else answer.resize(size)
