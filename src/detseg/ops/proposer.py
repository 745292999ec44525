"""What proposes regions from an image alone, without learning."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Proposer(Protocol):
    """Regions in which an object may lie: the same image gives the same ones everywhere.

    Attributes:
        key: name, version and every parameter as text; proposals are kept on disk under it.
    """

    @property
    def key(self) -> str:
        """Name, version and every parameter as text."""
        ...

    def __call__(self, image: Tensor) -> Tensor:
        """Return regions ``(N, 4)`` float32 xyxy pixels, best first, each once, inside the image; N may be 0.

        Args:
            image: ``(3, H, W)`` uint8 RGB.
        """
        ...
