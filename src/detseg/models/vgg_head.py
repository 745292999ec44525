"""The fully connected layers of VGG-16 as the head of region-based detectors.

Simonyan and Zisserman 2014, `"Very Deep Convolutional Networks for Large-Scale Image Recognition"
<https://arxiv.org/abs/1409.1556>`_, table 1, configuration D. Used so by `"Fast R-CNN"
<https://arxiv.org/abs/1504.08083>`_ (section 2.2) and Faster R-CNN: the last pooling layer gives way to RoIPool of
7 x 7, fc6 and fc7 keep their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torchvision

from detseg.models.box_branch import TwoLayerHead
from detseg.nn import load_weights, read_state
from detseg.nn.backbone import is_file

LAYERS = {"classifier.0": "fc6", "classifier.3": "fc7"}
"""Names of torchvision's vgg16, and ours."""


class VGGHead(TwoLayerHead):
    """fc6 and fc7 of VGG-16, each with a ReLU and dropout.

    Args:
        shape: of one region's features; (512, 7, 7) for published weights.
        width: of both layers.
        dropout: probability of dropping a number after each layer while training.
        weights: ``default`` or a name of torchvision's for ``vgg16`` (both download), the path of its state dict, or
            ``None``.

    Raises:
        CheckpointMismatch: the weights have other shapes, or lack these layers.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        width: int = 4096,
        dropout: float = 0.5,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(shape=shape, width=width, dropout=dropout)
        if weights is None:
            return
        if is_file(weights):
            state = read_state(weights)
        else:
            enum = torchvision.models.get_model_weights("vgg16")
            state = enum["DEFAULT" if weights == "default" else str(weights)].get_state_dict(check_hash=True)
        own = {
            key.replace(theirs, ours): value
            for key, value in state.items()
            for theirs, ours in LAYERS.items()
            if key.startswith(f"{theirs}.")
        }
        load_weights(self, own, source=f"vgg16 {weights}")
