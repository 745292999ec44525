"""`"Cascade R-CNN: Delving into High Quality Object Detection" <https://arxiv.org/abs/1712.00726>`_.

Cai and Vasconcelos, 2018: several second stages in a row, each with heads of its own, trained on the boxes that the
one before has refined and on objects of a higher IoU (section 4). Boxes are class-agnostic, and each stage regresses
them in finer units.

Differs from the paper: the class probabilities of all stages are averaged as each gives them on its own boxes, as in
detectron2 (there all heads are run again on the last boxes, which costs twice as many passes); and each stage draws its
regions anew, with a fixed share of positives at most (the published code keeps all that the first stage drew).

Letters: B images, N proposals of one image, R regions of all images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from detseg.models.box_branch import BoxBranch, RegionBranch, RegionOutputs
from detseg.models.mask_branch import MaskBranch
from detseg.models.region_features import stack_regions
from detseg.models.rpn import RegionProposalNetwork
from detseg.models.torchvision_weights import load_torchvision
from detseg.models.two_stage import TwoStageDetector
from detseg.nn import Backbone
from detseg.ops.boxes import clip_boxes, large_enough
from detseg.structures import Detections, Target
from detseg.targets.coders import BoxCoder
from detseg.targets.matchers import IoUMatcher

AGNOSTIC = partial(BoxBranch, class_agnostic=True)
"""The stages' default: one box per region."""


@dataclass(kw_only=True)
class CascadeStage:
    """What one stage of a cascade has for itself.

    Attributes:
        matcher: regions to objects; the IoU rises from stage to stage.
        coder: of the box deltas; its weights grow as the boxes that come in get closer.
        weight: of the stage's terms in the loss.
    """

    matcher: IoUMatcher
    coder: BoxCoder = field(default_factory=lambda: BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)))
    weight: float = 1.0


def published_stages() -> dict[str, CascadeStage]:
    """Return the paper's three stages: IoU 0.5, 0.6 and 0.7 (section 4), with the weights of the published code."""
    parts = {"first": (0.5, 10.0, 1.0), "second": (0.6, 20.0, 0.5), "third": (0.7, 30.0, 0.25)}
    return {
        name: CascadeStage(
            matcher=IoUMatcher(positive=iou, negative=iou, allow_low_quality=False),
            coder=BoxCoder(weights=(unit, unit, unit / 2, unit / 2)),
            weight=weight,
        )
        for name, (iou, unit, weight) in parts.items()
    }


class CascadeBranch(RegionBranch):
    """Box branches in a row; the boxes that one refines are the regions of the next.

    Args:
        num_classes: K foreground classes.
        channels: of every level that regions are read from.
        box: makes each stage from ``num_classes``, ``channels``, ``matcher`` and ``coder``; with ``class_agnostic``.
        stages: by name, in order; one that is ``None`` is left out. Default: the paper's three.

    Raises:
        ValueError: there is no stage, or a stage has boxes per class.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        box: Callable[..., BoxBranch] = AGNOSTIC,
        stages: Mapping[str, CascadeStage | None] | None = None,
    ) -> None:
        super().__init__()
        chosen = [stage for stage in (stages or published_stages()).values() if stage is not None]
        if not chosen:
            raise ValueError(
                f"CascadeBranch: all of the stages {', '.join(stages or ())} are left out; give at least one"
            )
        self.weights = [stage.weight for stage in chosen]
        self.stages = nn.ModuleList(
            box(num_classes=num_classes, channels=channels, matcher=stage.matcher, coder=stage.coder)
            for stage in chosen
        )
        for branch in self._branches():
            branch.compress = copy(branch.compress)  # it remembers what it made of one head
        if not all(branch.class_agnostic for branch in self._branches()):
            raise ValueError(
                "CascadeBranch: the next stage needs one refined box per region, but this one has one per class; set "
                "class_agnostic to true"
            )

    def learn(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        strides: Sequence[int],
        sizes: Tensor,
    ) -> list[RegionOutputs]:
        """Return the outputs of every stage for the regions that it draws; see ``RegionBranch``.

        A stage draws from what the one before made of its regions, and from the objects themselves.
        """
        outputs: list[RegionOutputs] = []
        for branch in self._branches():
            (made,) = branch.learn(features, proposals, targets, strides, sizes)
            outputs.append(made)
            refined = refine(branch, made.box_deltas, made.samples.boxes, sizes)  # per image (S, 4)
            proposals = [boxes[large_enough(boxes, branch.min_size)] for boxes in refined]  # per image (N, 4)
        return outputs

    def losses(self, stages: Sequence[RegionOutputs]) -> dict[str, Tensor]:
        """Return ``loss_classifier_1``, ``loss_box_1`` and so on, each stage's times its weight."""
        return {
            f"{name}_{number}": weight * value
            for number, (branch, outputs, weight) in enumerate(
                zip(self._branches(), stages, self.weights, strict=True), start=1
            )
            for name, value in branch.losses([outputs]).items()
        }

    def find(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], strides: Sequence[int], sizes: Tensor
    ) -> list[Detections]:
        """Return the detections of each image, best first; see ``RegionBranch``.

        The last stage places the boxes and decides with its limits; the probabilities are the mean of all stages'.
        """
        boxes, branches, scores = list(proposals), self._branches(), []
        for number, branch in enumerate(branches):
            hidden = branch.embed(features, stack_regions(boxes), strides, compressed=True)  # (R, out_features)
            logits, deltas = branch.predictor(hidden)  # (R, K + 1), (R, 1, 4)
            scores.append(logits.softmax(dim=1)[:, 1:])  # (R, K)
            if number + 1 < len(branches):
                boxes = refine(branch, deltas, boxes, sizes)
        return branches[-1].detect_scored(torch.stack(scores).mean(dim=0), deltas, boxes, sizes)

    def _branches(self) -> list[BoxBranch]:
        return [branch for branch in self.stages if isinstance(branch, BoxBranch)]


@torch.no_grad()
def refine(branch: BoxBranch, deltas: Tensor, boxes: Sequence[Tensor], sizes: Tensor) -> list[Tensor]:
    """Return the boxes that a stage makes of its regions, per image ``(N, 4)``, clipped to the image.

    A region whose deltas are not finite stays where it is. No gradient passes, as in the published code.

    Args:
        branch: the stage.
        deltas: ``(R, 1, 4)``.
        boxes: per image ``(N, 4)``, together R.
        sizes: ``(B, 2)`` valid height and width.
    """
    refined = []
    for delta, box, size in zip(torch.split(deltas[:, 0], [len(box) for box in boxes]), boxes, sizes, strict=True):
        moved = branch.coder.decode(delta, box)  # (N, 4)
        sane = moved.isfinite().all(dim=1, keepdim=True)  # (N, 1)
        refined.append(clip_boxes(moved.where(sane, box), size))  # (N, 4)
    return refined


class CascadeRCNN(TwoStageDetector):
    """Region proposals, then several stages of class and box, and perhaps masks in the boxes of the last.

    Args:
        num_classes: K foreground classes.
        backbone: gives the pyramid, or a single map.
        rpn: makes the first stage from ``channels``; its numbers are arguments of ``RegionProposalNetwork``.
        box: makes each of the later stages; its numbers are arguments of ``BoxBranch``.
        stages: what each of them has for itself; see ``CascadeBranch``.
        mask: makes a mask branch from ``num_classes`` and ``channels``; ``None``: boxes alone.
        weights: torchvision's name of weights of its Faster R-CNN (``COCO_V1``; downloads) or a state dict's path: of
            these the backbone and the region proposals are taken; the stages start anew. ``None``: nothing.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        rpn: Callable[..., RegionProposalNetwork] = RegionProposalNetwork,
        box: Callable[..., BoxBranch] = AGNOSTIC,
        stages: Mapping[str, CascadeStage | None] | None = None,
        mask: Callable[..., MaskBranch] | None = None,
        weights: str | Path | None = None,
    ) -> None:
        channels = backbone.channels[0]
        super().__init__(
            num_classes=num_classes,
            backbone=backbone,
            rpn=rpn(channels=channels),
            box=CascadeBranch(num_classes=num_classes, channels=channels, box=box, stages=stages),
            mask=mask(num_classes=num_classes, channels=channels) if mask is not None else None,
        )
        if weights is not None:
            load_torchvision(self, weights, builder="fasterrcnn_resnet50_fpn", only=("backbone.", "rpn."))
