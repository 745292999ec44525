"""The composition that all two-stage detectors share: proposals x region features x heads.

First proposed by `"R-CNN" <https://arxiv.org/abs/1311.2524>`_; here every stage is a part with its own arguments. A
paper's file wires the parts that it names. Proposals come from a region proposal network, which learns, or from a
proposer, which does not: selective search, sliding windows.

Letters: B images, R regions of all images, N proposals of one image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detseg.models.box_branch import RegionBranch, RegionOutputs, RegionSamples
from detseg.models.mask_branch import MaskBranch
from detseg.models.rpn import AnchorSamples, RegionProposalNetwork, RPNOutputs
from detseg.nn import Backbone, Normalize
from detseg.ops.boxes import clip_boxes
from detseg.ops.proposer import Proposer
from detseg.structures import Detections, Target


@dataclass
class TwoStageOutputs:
    """The raw heads, and what is needed to run the second stage on other regions.

    Attributes:
        features: per level ``(B, C, H, W)``.
        sizes: ``(B, 2)`` valid height and width.
        rpn: objectness and deltas of every anchor; ``None`` where proposals come from elsewhere.
        given: those proposals, per image ``(N, 4)`` xyxy pixels; ``None`` with a region proposal network.
        anchors: those of the first stage that learn; ``None`` where no targets were given, as all below.
        regions: what the second stage says about the regions that learn, one entry per stage of a cascade.
        mask_logits: ``(P, K, S, S)`` of the sampled regions with an object; ``None`` without a mask branch too.
    """

    features: list[Tensor]
    sizes: Tensor
    rpn: RPNOutputs | None = None
    given: list[Tensor] | None = None
    anchors: AnchorSamples | None = None
    regions: list[RegionOutputs] | None = None
    mask_logits: Tensor | None = None

    @property
    def samples(self) -> RegionSamples | None:
        """The regions that the last stage learns from; ``None`` where no targets were given."""
        return None if self.regions is None else self.regions[-1].samples


class TwoStageDetector(nn.Module):
    """Propose regions, then classify, refine and perhaps segment each.

    Args:
        num_classes: K foreground classes.
        backbone: gives the maps that regions are read from; under an RPN all levels are of equal width.
        box: classifies and refines them.
        rpn: proposes regions from the maps.
        proposer: proposes regions from the image, without learning; for a model without ``rpn``.
        mask: draws masks in the boxes found, or ``None``.

    Raises:
        ValueError: not exactly one of ``rpn`` and ``proposer`` is given.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        box: RegionBranch,
        rpn: RegionProposalNetwork | None = None,
        proposer: Proposer | None = None,
        mask: MaskBranch | None = None,
    ) -> None:
        super().__init__()
        if (rpn is None) == (proposer is None):
            raise ValueError(
                f"{type(self).__name__}: rpn is {'not ' if rpn is None else ''}given, and so is proposer; proposals "
                "come from one of the two, so give either"
            )
        self.num_classes = num_classes
        self.strides = list(backbone.strides)
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        self.rpn = rpn
        self.proposer = proposer
        self.box = box
        self.mask = mask

    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        targets: list[Target] | None = None,
        proposals: list[Tensor] | None = None,
    ) -> TwoStageOutputs:
        """Return the raw heads: of all anchors, and with targets also of the regions sampled for the loss.

        Args:
            images: ``(B, 3, H, W)`` RGB in [0, 1], padded at the right and the bottom.
            sizes: ``(B, 2)`` int64 valid height and width; ``None`` means all images are whole.
            targets: one per image; they join the proposals and steer the sampling.
            proposals: per image ``(N, 4)`` xyxy pixels, made before; ``None``: the model makes its own. Read by models
                without a region proposal network alone.

        Raises:
            ValueError: a target has a label outside 0..K-1, or not every image has a target or proposals.
        """
        if sizes is None:
            sizes = torch.tensor(images.shape[-2:], device=images.device).repeat(len(images), 1)  # (B, 2)
        outputs = TwoStageOutputs(self.backbone(self.normalize(images, sizes)), sizes)
        if self.rpn is not None:
            outputs.rpn = self.rpn(outputs.features, (images.shape[2], images.shape[3]))
        else:
            outputs.given = self._given(images, sizes, proposals)
        if targets is not None:
            self._check(targets, len(images))
            self._learn(outputs, targets)
        return outputs

    def _learn(self, outputs: TwoStageOutputs, targets: list[Target]) -> None:
        """Add what the loss is computed from."""
        if self.rpn is not None and outputs.rpn is not None:
            outputs.anchors = self.rpn.sample(outputs.rpn.lattice, targets)
        boxes = self._boxes(outputs, outputs.sizes, training=True)
        outputs.regions = self.box.learn(outputs.features, boxes, targets, self.strides, outputs.sizes)
        if self.mask is not None:
            positives = self.mask.positives(outputs.regions[-1].samples)  # (P, 5)
            outputs.mask_logits = self.mask(outputs.features, positives, self.strides)

    def loss(self, outputs: TwoStageOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return the named loss terms, scalars.

        Args:
            outputs: of ``forward`` with the same targets.
            targets: one per image.

        Raises:
            ValueError: the outputs were made without targets.
        """
        if outputs.regions is None:
            raise ValueError(
                "a two-stage loss needs regions sampled about the objects; call model(images, sizes, targets)"
            )
        losses: dict[str, Tensor] = {}
        if self.rpn is not None and outputs.rpn is not None and outputs.anchors is not None:
            losses |= self.rpn.loss(outputs.rpn, outputs.anchors)
        losses |= self.box.losses(outputs.regions)
        if self.mask is not None and outputs.mask_logits is not None:
            losses |= self.mask.loss(outputs.mask_logits, outputs.regions[-1].samples, targets)
        return losses

    @torch.no_grad()
    def predict(self, outputs: TwoStageOutputs, sizes: Tensor) -> list[Detections]:
        """Return the detections of each image, best first; the second stage runs here, on test-time proposals.

        Args:
            outputs: of ``forward``, with or without targets.
            sizes: ``(B, 2)`` valid height and width.
        """
        boxes = self._boxes(outputs, sizes, training=False)
        found = self.box.find(outputs.features, boxes, self.strides, sizes)
        return found if self.mask is None else self.mask.draw(outputs.features, found, self.strides, sizes)

    def proposals(self, outputs: TwoStageOutputs, sizes: Tensor) -> list[Detections]:
        """Return the test-time proposals of each image, best first, all of label 0; see ``predict``.

        Scores are the RPN's objectness; those of a proposer fall evenly from 1, as it only ranks.
        """
        if self.rpn is not None and outputs.rpn is not None:
            return self.rpn.propose(outputs.rpn, sizes, training=False)
        found = []
        for boxes in self._boxes(outputs, sizes, training=False):
            falling = torch.arange(len(boxes), 0, -1, device=boxes.device) / max(1, len(boxes))  # (N,)
            found.append(Detections(boxes, falling, torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)))
        return found

    def _boxes(self, outputs: TwoStageOutputs, sizes: Tensor, *, training: bool) -> list[Tensor]:
        """Return the proposals of each image ``(N, 4)``, best first."""
        if self.rpn is not None and outputs.rpn is not None:
            return [found.boxes for found in self.rpn.propose(outputs.rpn, sizes, training=training)]
        return [clip_boxes(boxes, size) for boxes, size in zip(outputs.given or [], sizes, strict=True)]

    def _given(self, images: Tensor, sizes: Tensor, proposals: list[Tensor] | None) -> list[Tensor]:
        """Return the proposals that came with the images, or else the proposer's, on the images' device."""
        if proposals is None:
            assert self.proposer is not None  # __init__ saw to it
            pixels = (images.detach() * 255).round().clamp(0, 255).byte().cpu()  # (B, 3, H, W)
            whole = [(int(height), int(width)) for height, width in sizes.tolist()]
            proposals = [self.proposer(image[:, :h, :w]) for image, (h, w) in zip(pixels, whole, strict=True)]
        if len(proposals) != len(images):
            raise ValueError(f"{type(self).__name__}: {len(images)} images but proposals for {len(proposals)}")
        return [boxes.to(images.device, torch.float32) for boxes in proposals]

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
