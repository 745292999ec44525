"""SPP-net for detection: one feature map per image, every proposal pooled out of it into a vector of fixed length.

He, Zhang, Ren and Sun, 2014, `"Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition"
<https://arxiv.org/abs/1406.4729>`_, section 4. Only the layers above the pooling learn from proposals: the convolutions
keep the weights of a classification network. Linear SVMs and ridge regression of boxes on top are those of R-CNN.
Differs from the paper: one image scale (section 4.1 also combines five), and gradients would pass through the pooling
if ``frozen`` were false.
"""

from __future__ import annotations

from collections.abc import Callable

from detseg.models.box_branch import BoxBranch
from detseg.models.two_stage import TwoStageDetector
from detseg.nn import Backbone, freeze_batch_norm
from detseg.ops.proposer import Proposer


class SPPNet(TwoStageDetector):
    """Classify proposals by a spatial pyramid of their part of the feature map.

    Args:
        num_classes: K foreground classes.
        backbone: gives the one map that regions are read from.
        proposer: proposes regions from the image: selective search, sliding windows.
        box: makes the layers above from ``num_classes`` and ``channels``; its pooling is a ``PyramidPooling``.
        frozen: the convolutions learn nothing, as in the paper. Without weights learnt elsewhere they need to.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        proposer: Proposer,
        box: Callable[..., BoxBranch],
        frozen: bool = True,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            proposer=proposer,
            box=box(num_classes=num_classes, channels=backbone.channels[0]),
        )
        if frozen:
            freeze_batch_norm(backbone.requires_grad_(False))
