"""What every model offers, so that tasks, callbacks and notebooks need not know which one they hold.

Behaviour never depends on ``self.training`` beyond what norm and dropout layers do themselves. Losses and
predictions come from the outputs of one forward pass.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from detseg.structures import Detections, SemanticMap, Target


@runtime_checkable
class Detector(Protocol):
    """A model that finds objects: boxes, and masks where it has them.

    Attributes:
        num_classes: foreground classes, always; a background class inside a model is the model's own affair.
    """

    num_classes: int

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Any:
        """Run the network.

        Args:
            images: ``(B, 3, H, W)`` RGB in [0, 1], padded at the right and the bottom.
            sizes: ``(B, 2)`` int64, the valid height and width; ``None`` means all images are whole.
            targets: read by two-stage models alone, where truth joins the proposals that are trained on. It never
                reaches ``predict``.

        Returns:
            The raw outputs, a dataclass per family.
        """
        ...

    def loss(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """Return named scalar terms, which the task sums; every one touches its head even without objects."""
        ...

    def predict(self, outputs: Any, sizes: Tensor) -> list[Detections]:
        """Return detections per image, best first, in pixels of the batch's images, clipped to ``sizes``."""
        ...


@runtime_checkable
class Segmenter(Protocol):
    """A model that gives every pixel a class.

    Attributes:
        num_classes: classes of the semantic map; a background, where the data has one, is among them.
    """

    num_classes: int

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Any:
        """Return logits ``(B, K, H, W)`` at the size of ``images``; see ``Detector.forward`` for the arguments.

        With an auxiliary head they come as ``detseg.models.segmenter.SegmenterOutputs``, which holds its logits too.
        """
        ...

    def loss(self, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """Return named scalar terms of the logits against ``targets[i].semantic``."""
        ...

    def predict(self, outputs: Any, sizes: Tensor) -> list[SemanticMap]:
        """Return the likeliest class per pixel, each map cropped to its valid size."""
        ...
