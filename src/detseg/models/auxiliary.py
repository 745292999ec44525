"""Segmenters that score a second map too, for the loss alone, with torchvision's names of layers.

Zhao et al. 2017, "Pyramid Scene Parsing Network" (arXiv:1612.01105, section 3.3), has the auxiliary loss; torchvision's
FCN and DeepLabV3 have it as a head of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from detseg.models.segmenter import Outputs, SegmenterOutputs, SemanticSegmenter
from detseg.models.torchvision_weights import load_torchvision
from detseg.nn import Backbone


class AuxiliarySegmenter(SemanticSegmenter):
    """Base of segmenters with a ``backbone``, a ``classifier`` of its last map and perhaps an ``aux_classifier``."""

    backbone: Backbone
    aux_classifier: nn.Module | None

    def add_auxiliary(
        self, auxiliary: Callable[..., nn.Module] | None, *, weights: str | Path | None, builder: str
    ) -> None:
        """Build the second head and load published weights; what a constructor ends with.

        Args:
            auxiliary: makes the layers that score the last map but one from its channels and K; ``None``: none.
            weights: of torchvision's ``builder``, by name (downloads) or as the path of a state dict, or ``None``.
            builder: torchvision's function that has the same architecture.

        Raises:
            CheckpointMismatch: the weights do not fit.
        """
        self.aux_classifier = (
            None if auxiliary is None else auxiliary(channels=self.backbone.channels[-2], num_classes=self.num_classes)
        )
        if weights is not None:
            parts = () if self.aux_classifier is not None else ("backbone.", "classifier.")
            load_torchvision(self, weights, builder=builder, only=parts)

    def with_auxiliary(self, logits: Tensor, maps: Sequence[Tensor]) -> Outputs:
        """Return logits ``(B, K, H, W)``, and beside them those of the last of ``maps`` but one, if that is scored."""
        if self.aux_classifier is None:
            return logits
        return SegmenterOutputs(logits=logits, auxiliary=self.aux_classifier(maps[-2]))
