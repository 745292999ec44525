"""How a trained segmenter is asked: about the whole image or window by window, at several sizes, mirrored too, refined.

Windows and the mean over sizes and mirror images are the usual protocol of PSPNet (Zhao et al., arXiv:1612.01105,
section 4.1) and DeepLab (Chen et al., arXiv:1706.05587, section 4.1), the refinement is DeepLab's dense CRF
(arXiv:1412.7062, section 3.2). Logits of windows that overlap are averaged; probabilities of sizes and mirror images
are.

Letters: B images, K classes, H x W pixels, h x w valid ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Ask = Callable[[Tensor], Tensor]
"""Gives logits ``(n, K, h, w)`` of images ``(n, 3, h, w)``."""
Refine = Callable[[Tensor, Tensor], Tensor]
"""Gives probabilities ``(K, h, w)`` of logits and the RGB image in [0, 1], such as ``ops.dense_crf.dense_crf``."""


class Inference:
    """A way to ask a segmenter, set by ``SemanticSegmenter.inference`` at any time, after training too.

    Args:
        window: side of the windows in pixels; ``None`` asks about the whole image.
        stride: pixels between two windows, at most ``window``; ``None`` is two thirds of it. Read with
            ``window`` alone.
        scales: sizes at which the image is looked at, as factors; [1.0] is as it is.
        flip: also the mirror image at each size.
        refine: works on the probabilities and the image at the end, or ``None``.
        chunk: windows in one pass of the model, which bounds memory in prediction; validation's loss is still that of
            the whole image.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        *,
        window: int | None = None,
        stride: int | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        refine: Refine | None = None,
        chunk: int = 8,
    ) -> None:
        side = None if window is None else (max(1, window * 2 // 3) if stride is None else stride)
        if window is not None and (window < 1 or not 1 <= (side or 0) <= window):
            raise ValueError(
                f"Inference: window={window}, stride={stride}; a window has at least 1 pixel, and windows may lie no "
                "farther apart than they are wide"
            )
        if not scales or min(scales) <= 0 or chunk < 1:
            raise ValueError(
                f"Inference: scales={list(scales)}, chunk={chunk}; give factors above 0 and at least 1 window"
            )
        self.window, self.stride, self.chunk = window, side, chunk
        self.scales, self.flip, self.refine = [float(scale) for scale in scales], flip, refine

    @property
    def plain(self) -> bool:
        """Whether the model's own answer about the whole image is the only one that is wanted."""
        return self.window is None and self.scales == [1.0] and not self.flip

    def __call__(self, ask: Ask, logits: Tensor | None, images: Tensor, sizes: Tensor) -> Iterator[Tensor]:
        """Yield the probabilities of each image, ``(K, h, w)`` of its valid pixels.

        Args:
            ask: the model.
            logits: ``(B, K, H, W)`` that it gave for the batch, read where ``plain``; ``None`` if it was not asked yet.
            images: ``(B, 3, H, W)`` RGB in [0, 1].
            sizes: ``(B, 2)`` valid height and width.
        """
        given = [None] * len(images) if logits is None or not self.plain else logits
        for own, image, (height, width) in zip(given, images, sizes.tolist(), strict=True):
            image = image[:, :height, :width]  # (3, h, w)
            found = self._views(ask, image) if own is None else own[:, :height, :width].float().softmax(0)  # (K, h, w)
            yield found if self.refine is None else self.refine(found.clamp(min=1e-8).log(), image)

    def _views(self, ask: Ask, image: Tensor) -> Tensor:
        """Return the mean probabilities ``(K, h, w)`` over sizes and mirror images of ``(3, h, w)``."""
        size = (image.shape[-2], image.shape[-1])
        answers = []
        for scale, mirrored in product(self.scales, (False, True) if self.flip else (False,)):
            seen = image if scale == 1.0 else _resize(image, tuple(max(1, round(side * scale)) for side in size))
            seen = seen.flip(-1) if mirrored else seen
            found = ask(seen[None])[0].float() if self.window is None else self._windows(ask, seen)  # (K, h', w')
            found = found.flip(-1) if mirrored else found
            answers.append((found if scale == 1.0 else _resize(found, size)).softmax(0))
        return torch.stack(answers).mean(0)

    def _windows(self, ask: Ask, image: Tensor) -> Tensor:
        """Return the mean logits ``(K, h, w)`` of all windows over each pixel of ``(3, h, w)``."""
        assert self.window is not None and self.stride is not None
        height, width = (min(self.window, side) for side in image.shape[-2:])  # of a window
        places = list(
            product(_starts(image.shape[-2], height, self.stride), _starts(image.shape[-1], width, self.stride))
        )
        total: Tensor | None = None  # (K, h, w)
        count = image.new_zeros(image.shape[-2:])  # (h, w)
        for first in range(0, len(places), self.chunk):
            group = places[first : first + self.chunk]
            cut = torch.stack([image[:, top : top + height, left : left + width] for top, left in group])
            for (top, left), answer in zip(group, ask(cut).float(), strict=True):
                if total is None:
                    total = answer.new_zeros(answer.shape[0], *image.shape[-2:])
                total[:, top : top + height, left : left + width] += answer
                count[top : top + height, left : left + width] += 1
        assert total is not None  # every image has a window
        return total / count


def ask_by(model: nn.Module, inference: Inference) -> None:
    """Have a segmenter asked this way from now on.

    Raises:
        ValueError: the model is no segmenter.
    """
    if not hasattr(model, "inference"):
        raise ValueError(
            f"{type(model).__name__} is no semantic segmenter, so it cannot be asked by windows, sizes or with a CRF; "
            "leave inference at null"
        )
    setattr(model, "inference", inference)  # noqa: B010  # a module's attributes are tensors and modules to the checker


def predict_images(model: nn.Module, images: Tensor, sizes: Tensor, **given: Any) -> list[Any]:
    """Return what a detector or segmenter finds where no loss is wanted: one prediction per image.

    Args:
        model: obeys the contract of ``detseg.models.contract``. A segmenter has a ``predict_images`` of its own, which
            saves the pass over whole images whose logits a loss alone would read.
        images: ``(B, 3, H, W)`` RGB in [0, 1].
        sizes: ``(B, 2)`` int64, valid height and width.
        **given: further arguments of its ``forward``, such as proposals.
    """
    own = getattr(model, "predict_images", None)
    predict: Any = model.predict
    found: list[Any] = predict(model(images, sizes, **given), sizes) if own is None else own(images, sizes)
    return found


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along one side: every ``stride`` pixels, the last one flush with the end."""
    return [*range(0, length - window, stride), length - window]


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Interpolate ``(C, h, w)`` bilinearly, smoothed where it shrinks."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
