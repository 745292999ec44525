"""The composition that all two-stage detectors share: proposals x region features x heads.

First proposed by `"R-CNN" <https://arxiv.org/abs/1311.2524>`_; here every stage is a part with its own arguments. A
paper's file wires the parts that it names.

Letters: B images, R regions of all images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detseg.models.box_branch import BoxBranch, RegionSamples
from detseg.models.mask_branch import MaskBranch
from detseg.models.rpn import AnchorSamples, RegionProposalNetwork, RPNOutputs
from detseg.nn import Backbone, Normalize
from detseg.structures import Detections, Target


@dataclass
class TwoStageOutputs:
    """The raw heads, and what is needed to run the second stage on other regions.

    Attributes:
        features: per level ``(B, C, H, W)``.
        sizes: ``(B, 2)`` valid height and width.
        rpn: objectness and deltas of every anchor.
        anchors: those of the first stage that learn; ``None`` where no targets were given, as all below.
        samples: the regions of the second stage that learn.
        class_logits: ``(R, K + 1)`` of the sampled regions, background first.
        box_deltas: ``(R, K + 1, 4)`` of the sampled regions.
        mask_logits: ``(P, K, S, S)`` of the sampled regions with an object; ``None`` without a mask branch too.
    """

    features: list[Tensor]
    sizes: Tensor
    rpn: RPNOutputs
    anchors: AnchorSamples | None = None
    samples: RegionSamples | None = None
    class_logits: Tensor | None = None
    box_deltas: Tensor | None = None
    mask_logits: Tensor | None = None


class TwoStageDetector(nn.Module):
    """Propose regions, then classify, refine and perhaps segment each.

    Args:
        num_classes: K foreground classes.
        backbone: gives the pyramid, all levels of equal width.
        rpn: proposes regions from the pyramid.
        box: classifies and refines them.
        mask: draws masks in the boxes found, or ``None``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        rpn: RegionProposalNetwork,
        box: BoxBranch,
        mask: MaskBranch | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = list(backbone.strides)
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        self.rpn = rpn
        self.box = box
        self.mask = mask

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None
    ) -> TwoStageOutputs:
        """Return the raw heads: of all anchors, and with targets also of the regions sampled for the loss.

        Args:
            images: ``(B, 3, H, W)`` RGB in [0, 1], padded at the right and the bottom.
            sizes: ``(B, 2)`` int64 valid height and width; ``None`` means all images are whole.
            targets: one per image; they join the proposals and steer the sampling.

        Raises:
            ValueError: a target has a label outside 0..K-1, or not every image has a target.
        """
        if sizes is None:
            sizes = torch.tensor(images.shape[-2:], device=images.device).repeat(len(images), 1)  # (B, 2)
        features = self.backbone(self.normalize(images, sizes))
        outputs = TwoStageOutputs(features, sizes, self.rpn(features, (images.shape[2], images.shape[3])))
        if targets is not None:
            self._check(targets, len(images))
            outputs.anchors = self.rpn.sample(outputs.rpn.lattice, targets)
            proposals = self.rpn.propose(outputs.rpn, sizes, training=True)
            outputs.samples = self.box.sample([found.boxes for found in proposals], targets)
            outputs.class_logits, outputs.box_deltas = self.box(features, outputs.samples.boxes, self.strides)
            if self.mask is not None:
                outputs.mask_logits = self.mask(features, self.mask.positives(outputs.samples), self.strides)
        return outputs

    def loss(self, outputs: TwoStageOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return the named loss terms, scalars.

        Args:
            outputs: of ``forward`` with the same targets.
            targets: one per image.

        Raises:
            ValueError: the outputs were made without targets.
        """
        anchors, samples = outputs.anchors, outputs.samples
        if anchors is None or samples is None or outputs.class_logits is None or outputs.box_deltas is None:
            raise ValueError(
                "a two-stage loss needs regions sampled about the objects; call model(images, sizes, targets)"
            )
        losses = self.rpn.loss(outputs.rpn, anchors)
        losses |= self.box.loss(outputs.class_logits, outputs.box_deltas, samples)
        if self.mask is not None and outputs.mask_logits is not None:
            losses |= self.mask.loss(outputs.mask_logits, samples, targets)
        return losses

    @torch.no_grad()
    def predict(self, outputs: TwoStageOutputs, sizes: Tensor) -> list[Detections]:
        """Return the detections of each image, best first; the second stage runs here, on test-time proposals.

        Args:
            outputs: of ``forward``, with or without targets.
            sizes: ``(B, 2)`` valid height and width.
        """
        boxes = [found.boxes for found in self.proposals(outputs, sizes)]
        logits, deltas = self.box(outputs.features, boxes, self.strides)
        found = self.box.detect(logits, deltas, boxes, sizes)
        return found if self.mask is None else self.mask.draw(outputs.features, found, self.strides, sizes)

    def proposals(self, outputs: TwoStageOutputs, sizes: Tensor) -> list[Detections]:
        """Return the test-time proposals of each image, best objectness first, all of label 0; see ``predict``."""
        return self.rpn.propose(outputs.rpn, sizes, training=False)

    def diagnostics(self, outputs: TwoStageOutputs, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return ``foreground_share``: the share of the sampled regions that have an object, a scalar in [0, 1].

        Empty where the outputs were made without targets.
        """
        if outputs.samples is None:
            return {}
        labels = torch.cat(outputs.samples.labels)  # (R,)
        return {"foreground_share": (labels > 0).sum() / max(1, len(labels))}

    def _check(self, targets: Sequence[Target], count: int) -> None:
        if len(targets) != count:
            raise ValueError(f"{type(self).__name__}: {count} images but {len(targets)} targets")
        for target in targets:
            labels = target.labels  # values are looked at in host memory only: a GPU would have to wait
            if labels.device.type == "cpu" and len(labels) and int(labels.max()) >= self.num_classes:
                raise ValueError(
                    f"{type(self).__name__}: image {target.image_id} has label {int(labels.max())}, but num_classes is "
                    f"{self.num_classes}; labels are 0..{self.num_classes - 1}"
                )
