"""What a loss of boxes is, and how detectors call one: on the coder's numbers, or on the boxes that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor


class Coder(Protocol):
    """Turns boxes into what a head predicts about a reference, and back."""

    def encode(self, boxes: Tensor, anchors: Tensor, /) -> Tensor:
        """Return ``(N, 4)`` for boxes and references ``(N, 4)`` each."""
        ...

    def decode(self, deltas: Tensor, anchors: Tensor, /) -> Tensor:
        """Return boxes ``(N, 4)``."""
        ...


class BoxLoss(Protocol):
    """A loss of pairs ``(P, 4)``, summed over them with a weight each.

    Attributes:
        of_boxes: whether the pairs are boxes in pixels; else they are what the coder makes of them.
    """

    of_boxes: ClassVar[bool]

    def __call__(self, prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return a scalar; ``weights`` is ``(P,)``."""
        ...


def is_of_boxes(loss: Callable[..., Tensor]) -> bool:
    """Say whether a loss is one of boxes in pixels; torch's own losses say nothing and are not."""
    return bool(getattr(loss, "of_boxes", False))


def compared(
    loss: Callable[..., Tensor], coder: Coder, codes: Tensor, boxes: Tensor, references: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what a loss of boxes compares, predicted and wanted, ``(P, 4)`` each: boxes in pixels, or codes.

    Args:
        loss: a ``BoxLoss``, or any other function of two tensors.
        coder: of boxes.
        codes: ``(P, 4)`` predicted, in the coder's terms.
        boxes: ``(P, 4)`` xyxy pixels, the truth.
        references: ``(P, 4)`` xyxy pixels, what the codes are about.
    """
    if is_of_boxes(loss):
        return coder.decode(codes, references), boxes
    return codes, coder.encode(boxes, references)
