"""What the losses of a class map share: a name, a factor, the ignore index; and sums of several. No paper.

B = images, K = classes, H, W = pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from detseg.structures.maps import IGNORE_INDEX


class MapLoss(nn.Module):
    """Base of one term.

    Args:
        weight: factor, above 0.
        ignore_index: label of pixels that do not count.

    Attributes:
        name: of the term, without ``loss_``.
        weighs_pixels: whether it is a sum over pixels that a weight map can change, such as U-Net's.
        terms: what ``forward`` returns, by name.

    Raises:
        ValueError: the factor is not above 0.
    """

    name = ""
    weighs_pixels = False

    def __init__(self, *, weight: float = 1.0, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        if not weight > 0:
            raise ValueError(f"{type(self).__name__}: weight {weight} must be above 0; leave the loss out instead")
        self.weight, self.ignore_index = weight, ignore_index

    @property
    def terms(self) -> tuple[str, ...]:
        """See the class."""
        return (f"loss_{self.name}",)

    def forward(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``{"loss_<name>": ...}``, a scalar; zero where no pixel counts.

        Args:
            logits: ``(B, K, H, W)``.
            labels: ``(B, H, W)`` int64 in 0..K-1 or the ignore index.
            pixel_weights: ``(B, H, W)``, or ``None``.

        Raises:
            ValueError: there are weights of pixels, and the loss is no sum over pixels.
        """
        check_pixel_weights(self, self.weighs_pixels, pixel_weights)
        return {f"loss_{self.name}": self.weight * self.value(logits, labels, pixel_weights)}

    def value(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Tensor:
        """Return the loss, a scalar, before the factor."""
        raise NotImplementedError


class ClassesLoss(MapLoss):
    """Base of a term that is the mean over some classes.

    Args:
        classes: to average over, ``[1]`` for a binary map's foreground; ``None`` means all.
        weight: factor, above 0.
        ignore_index: label of pixels that do not count.
    """

    def __init__(
        self, *, classes: Sequence[int] | None = None, weight: float = 1.0, ignore_index: int = IGNORE_INDEX
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index)
        self.classes = None if classes is None else list(classes)


class SumOfLosses(nn.Module):
    """Several losses of one map, each with its own factor; all their terms are named in the log.

    Args:
        losses: by any name; ``None`` leaves one out. One that does not say its ``terms`` is asked at the first step,
            and one that does not say whether it ``weighs_pixels`` is given their weights.

    Attributes:
        weighs_pixels: whether one of them does.
        terms: those of all, by name.

    Raises:
        ValueError: none is left, two give a term of the same name, or their ignore indices differ.
    """

    def __init__(self, *, losses: Mapping[str, Any]) -> None:
        super().__init__()
        kept = {name: loss for name, loss in losses.items() if loss is not None}
        indices = {loss.ignore_index for loss in kept.values()}
        if len(indices) != 1:
            raise ValueError(f"SumOfLosses: {len(kept)} losses with ignore indices {sorted(indices)}; give one or more")
        self.losses = nn.ModuleDict(kept)
        self.ignore_index: int = indices.pop()
        self.weighs_pixels = any(_weighs(loss) for loss in kept.values())
        self.terms: tuple[str, ...] = ()
        for loss in kept.values():
            own = getattr(loss, "terms", ())
            self._refuse_twice(self.terms, own)
            self.terms += tuple(own)

    def forward(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None) -> dict[str, Tensor]:
        """Return the terms of all losses; see ``MapLoss``. Weights of pixels go to those that are sums over pixels."""
        check_pixel_weights(self, self.weighs_pixels, pixel_weights)
        terms: dict[str, Tensor] = {}
        for loss in self.losses.values():
            given = cast("dict[str, Tensor]", loss(logits, labels, pixel_weights if _weighs(loss) else None))
            self._refuse_twice(terms, given)
            terms |= given
        return terms

    def _refuse_twice(self, known: Iterable[str], given: Iterable[str]) -> None:
        if twice := sorted({*known} & {*given}):
            raise ValueError(f"SumOfLosses: two of {list(self.losses)} give the term {twice[0]}; leave one out")


def _weighs(loss: nn.Module) -> bool:
    return bool(getattr(loss, "weighs_pixels", True))


def check_pixel_weights(loss: nn.Module, weighs: bool, pixel_weights: Tensor | None) -> None:
    """Raise a ``ValueError`` where there are weights of pixels, and the loss has nothing that they could weigh."""
    if pixel_weights is not None and not weighs:
        raise ValueError(
            f"{type(loss).__name__} has no sum over pixels that separation could weigh; set separation=0, or add a "
            "cross entropy"
        )


def widen(logits: Tensor) -> Tensor:
    """Return half precision as float32: counts and sums of 1e6 pixels are beyond its 8 or 11 bits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def weights_of_classes(values: Sequence[float] | None) -> Tensor | None:
    """Return the weights of classes that a config gives, ``(K,)`` float32, or ``None``."""
    return None if values is None else torch.tensor([float(value) for value in values])


def check_class_weights(loss: nn.Module, weights: Tensor | None, classes: int) -> None:
    """Raise a ``ValueError`` with both numbers where weights ``(K,)`` are not those of the model's classes."""
    if weights is not None and len(weights) != classes:
        raise ValueError(
            f"{type(loss).__name__} has {len(weights)} class weights, but the model has {classes} classes; give one "
            "weight per class"
        )


def chosen_classes(values: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Return the entries ``(K,)`` of the chosen classes, ``None`` for all.

    Raises:
        ValueError: there is no such class.
    """
    if classes is None:
        return values
    if wrong := [label for label in classes if not 0 <= label < len(values)]:
        raise ValueError(f"the loss names class {wrong[0]}, but the model has {len(values)}: 0..{len(values) - 1}")
    return values[list(classes)]
