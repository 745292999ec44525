"""`"R-CNN" <https://arxiv.org/abs/1311.2524>`_: a classification network on a crop of every proposal.

Girshick, Donahue, Darrell and Malik, 2014, "Rich Feature Hierarchies for Accurate Object Detection and Semantic
Segmentation". As a two-stage detector: the maps are the image itself, regions are warped crops of it, the head is a
whole network, and SVMs and ridge regression follow the fine-tuning (``SVMBranch``). Differs from the paper:
torchvision's AlexNet (Krizhevsky 2014, one column) instead of CaffeNet, the images' mean colour instead of ImageNet's
mean image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from detseg.models.svm_branch import SVMBranch
from detseg.models.two_stage import TwoStageDetector
from detseg.nn import Backbone
from detseg.ops.proposer import Proposer


class Pixels(Backbone):
    """The image as its own feature map, of stride 1.

    Args:
        mean: what the network above was trained with, RGB in [0, 1].
        std: likewise.
    """

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.channels, self.strides = [3], [1]
        self.mean, self.std = list(mean), list(std)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the images ``(B, 3, H, W)`` as they are."""
        return [images]


class RCNN(TwoStageDetector):
    """Warp every proposal to one size and classify it by a network of its own.

    Args:
        num_classes: K foreground classes.
        proposer: proposes regions from the image: selective search, sliding windows.
        box: makes the network and what follows it from ``num_classes`` and ``channels``; its pooling is a
            ``WarpedCrop``, its head a ``RegionNetwork``.
    """

    def __init__(self, *, num_classes: int, proposer: Proposer, box: Callable[..., SVMBranch]) -> None:
        branch = box(num_classes=num_classes, channels=3)
        super().__init__(
            num_classes=num_classes,
            backbone=Pixels(mean=branch.mean, std=branch.std),
            proposer=proposer,
            box=branch,
        )
