"""`"Fast R-CNN" <https://arxiv.org/abs/1504.08083>`_, Girshick, 2015.

One feature map per image, RoIPool of every proposal, two heads with one loss (equation 1), trained from mini-batches of
few images with many regions each (section 2.3), and truncated SVD of the fully connected layers in prediction (section
3.1). Differs from the paper: a proposal without any object in its image is background whatever the lower threshold
says, so that an image without objects teaches that much.
"""

from __future__ import annotations

from collections.abc import Callable

from detseg.models.box_branch import BoxBranch
from detseg.models.two_stage import TwoStageDetector
from detseg.nn import Backbone
from detseg.ops.proposer import Proposer


class FastRCNN(TwoStageDetector):
    """Class and box of every proposal, from features that all proposals of an image share.

    Args:
        num_classes: K foreground classes.
        backbone: gives the map that regions are read from; several levels of equal width work too.
        proposer: proposes regions from the image: selective search, sliding windows.
        box: makes the heads from ``num_classes`` and ``channels``; its numbers are arguments of ``BoxBranch``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        proposer: Proposer,
        box: Callable[..., BoxBranch] = BoxBranch,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            proposer=proposer,
            box=box(num_classes=num_classes, channels=backbone.channels[0]),
        )
