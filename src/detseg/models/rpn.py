"""Region proposal network of `"Faster R-CNN" <https://arxiv.org/abs/1506.01497>`_, section 3.1.

One head serves all levels, as in `"Feature Pyramid Networks" <https://arxiv.org/abs/1612.03144>`_, section 4.1.

Equal to torchvision's on the same weights. Differs in what is computed: only the anchors kept before NMS are decoded,
only sampled ones are encoded, and anchors are matched through the windows that a box can reach. Crowd regions are
ignored, see ``targets.crowds``.

Letters: B images, N anchors of one image over all levels, A anchors per cell, K kept proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from detseg.losses.box_loss import compared
from detseg.losses.normalise import normaliser
from detseg.losses.smooth_l1 import SmoothL1
from detseg.ops.boxes import clip_boxes, large_enough
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Detections, Target
from detseg.targets.anchors import AnchorGenerator, grid_strides
from detseg.targets.coders import BoxCoder
from detseg.targets.crowds import inside_crowd, learnable
from detseg.targets.lattice import Lattice, build_lattice
from detseg.targets.matchers import BETWEEN
from detseg.targets.samplers import BalancedSampler
from detseg.targets.sparse import SparseIoUMatcher

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of (prediction, target), summed to a scalar."""


@dataclass
class RPNOutputs:
    """What the network says about every anchor.

    Attributes:
        objectness: ``(B, N)`` logits.
        deltas: ``(B, N, 4)`` box regression.
        lattice: the anchors ``lattice.boxes`` ``(N, 4)`` and how many of them each level has.
    """

    objectness: Tensor
    deltas: Tensor
    lattice: Lattice


@dataclass
class AnchorSamples:
    """The anchors that the first stage learns from, as rows of the flattened ``(B * N,)``.

    Attributes:
        positive: ``(P,)`` int64, anchors of an object.
        background: ``(Q,)`` int64.
        boxes: ``(P, 4)`` xyxy pixels, the objects of the positive ones.
    """

    positive: Tensor
    background: Tensor
    boxes: Tensor


class RPNHead(nn.Module):
    """3x3 convolutions, then objectness and box deltas of every anchor by 1x1; one head for all levels.

    Args:
        channels: of every level.
        anchors: A, per cell.
        depth: 3x3 convolutions.
        width: channels of the 3x3 convolutions; ``None``: as many as the levels have.
    """

    def __init__(self, *, channels: int, anchors: int, depth: int = 1, width: int | None = None) -> None:
        super().__init__()
        widths = [channels, *[width or channels] * depth]
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True))
            for before, after in pairwise(widths)
        ]
        self.conv = nn.Sequential(*blocks)
        self.cls_logits = nn.Conv2d(widths[-1], anchors, 1)
        self.bbox_pred = nn.Conv2d(widths[-1], anchors * 4, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)  # Faster R-CNN, section 3.1.3
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # all these have a bias

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return objectness ``(B, N)`` and deltas ``(B, N, 4)`` of all levels, cell by cell."""
        objectness, deltas = [], []
        for feature in features:
            hidden = self.conv(feature)  # (B, C, H, W)
            objectness.append(self.cls_logits(hidden).permute(0, 2, 3, 1).flatten(1))  # (B, H * W * A)
            deltas.append(self.bbox_pred(hidden).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))  # (B, H*W*A, 4)
        return torch.cat(objectness, dim=1).float(), torch.cat(deltas, dim=1).float()


class RegionProposalNetwork(nn.Module):
    """Score and shape anchors, and propose the best of them.

    Args:
        channels: of every level.
        anchors: default: sides 32 to 512 on five levels, three shapes.
        depth: 3x3 convolutions of the head.
        width: channels of these convolutions; ``None``: as many as the levels have. The paper has 512 on the map of
            VGG-16, 256 on that of ZF (section 3.1).
        coder: of the box deltas.
        matcher: anchors to objects; default: positive from IoU 0.7, background below 0.3, and the best of each object.
        sampler: anchors per image in the loss; default 256, at most half of them positive.
        nms: among the proposals of one level; default threshold 0.7.
        objectness_loss: summed loss of (logits, 0 or 1), both ``(n,)``.
        box_loss: summed loss of (deltas, wanted deltas), both ``(n, 4)``, or of boxes likewise.
        pre_nms_train: proposals per level that go into NMS when targets are given.
        pre_nms_test: likewise when none are.
        post_nms_train: proposals per image that come out of NMS when targets are given.
        post_nms_test: likewise when none are.
        score_threshold: lowest objectness probability of a proposal.
        min_size: shortest side of a proposal in pixels.
        crowd_overlap: share of an anchor inside a crowd region from which it is no background example.

    Raises:
        ValueError: the levels have different numbers of anchors per cell: one head serves them all.
    """

    def __init__(
        self,
        *,
        channels: int,
        anchors: AnchorGenerator | None = None,
        depth: int = 1,
        width: int | None = None,
        coder: BoxCoder | None = None,
        matcher: SparseIoUMatcher | None = None,
        sampler: BalancedSampler | None = None,
        nms: Suppression | None = None,
        objectness_loss: Loss | None = None,
        box_loss: Loss | None = None,
        pre_nms_train: int = 2000,
        pre_nms_test: int = 1000,
        post_nms_train: int = 2000,
        post_nms_test: int = 1000,
        score_threshold: float = 0.0,
        min_size: float = 1e-3,
        crowd_overlap: float = 0.7,
    ) -> None:
        super().__init__()
        sides = [[32.0], [64.0], [128.0], [256.0], [512.0]]  # FPN, section 4.1
        self.anchors = anchors or AnchorGenerator(sizes=sides, ratios=[[0.5, 1.0, 2.0]])
        if len(set(self.anchors.num_anchors())) != 1:
            raise ValueError(
                f"RegionProposalNetwork: the levels have {self.anchors.num_anchors()} anchors per cell; one head "
                "serves all levels, so give each the same number"
            )
        self.head = RPNHead(channels=channels, anchors=self.anchors.num_anchors()[0], depth=depth, width=width)
        self.coder = coder or BoxCoder()
        self.matcher = matcher or SparseIoUMatcher(positive=0.7, negative=0.3, allow_low_quality=True)
        self.sampler = sampler or BalancedSampler(size=256, positive_fraction=0.5)
        self.nms = nms or BatchedNMS(threshold=0.7)
        self.objectness_loss = objectness_loss or nn.BCEWithLogitsLoss(reduction="sum")
        self.box_loss = box_loss or SmoothL1(beta=1 / 9)
        self.pre_nms_train, self.pre_nms_test = pre_nms_train, pre_nms_test
        self.post_nms_train, self.post_nms_test = post_nms_train, post_nms_test
        self.score_threshold = score_threshold
        self.min_size = min_size
        self.crowd_overlap = crowd_overlap

    def forward(self, features: Sequence[Tensor], image_size: tuple[int, int]) -> RPNOutputs:
        """Return logits and deltas of every anchor.

        Args:
            features: per level ``(B, C, H, W)``, finest first.
            image_size: (height, width) of the padded images in pixels.
        """
        cells = tuple((feature.shape[2], feature.shape[3]) for feature in features)
        lattice = build_lattice(self.anchors, cells, tuple(grid_strides(image_size, cells)), features[0].device)
        objectness, deltas = self.head(features)
        return RPNOutputs(objectness=objectness, deltas=deltas, lattice=lattice)

    @torch.no_grad()
    def propose(self, outputs: RPNOutputs, sizes: Tensor, *, training: bool) -> list[Detections]:
        """Return the proposals of each image, best objectness first, label 0.

        Args:
            outputs: of ``forward``.
            sizes: ``(B, 2)`` valid height and width.
            training: whether the limits for training or those for testing hold.
        """
        limit, keep = (self.pre_nms_train, self.post_nms_train) if training else (self.pre_nms_test, self.post_nms_test)
        logits, boxes, levels = self._best_anchors(outputs, limit)  # (B, K), (B, K, 4), (K,)
        boxes = clip_boxes(boxes, sizes)  # (B, K, 4)
        scores = logits.sigmoid()  # (B, K)
        valid = large_enough(boxes, self.min_size) & (scores >= self.score_threshold)  # (B, K); NaN is never valid
        found = []
        for image in range(len(boxes)):
            rows = valid[image].nonzero().flatten()  # (k,)
            best, confidence = self.nms(boxes[image, rows], scores[image, rows], levels[rows])  # (k,) each
            rows = rows[best[:keep]]  # (k,)
            found.append(Detections(boxes[image, rows], confidence[:keep], torch.zeros_like(rows)))
        return found

    def _best_anchors(self, outputs: RPNOutputs, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, decoded boxes and level of the ``limit`` best anchors of every level."""
        rows, levels, start = [], [], 0
        for level, scores in enumerate(torch.split(outputs.objectness, outputs.lattice.counts, dim=1)):
            best = scores.topk(min(limit, scores.shape[1]), dim=1).indices  # (B, k)
            rows.append(best + start)
            levels.append(best.new_full((best.shape[1],), level))
            start += scores.shape[1]
        row = torch.cat(rows, dim=1)  # (B, K)
        deltas = outputs.deltas.gather(1, row[..., None].expand(-1, -1, 4))  # (B, K, 4)
        boxes = self.coder.decode(deltas, outputs.lattice.boxes[row])  # (B, K, 4)
        return outputs.objectness.gather(1, row), boxes, torch.cat(levels)

    @torch.no_grad()
    def sample(self, lattice: Lattice, targets: Sequence[Target]) -> AnchorSamples:
        """Draw the anchors to learn from.

        Args:
            lattice: the anchors, of ``RPNOutputs``.
            targets: one per image.
        """
        objects = [learnable(target).boxes for target in targets]  # per image (M, 4)
        matches = self._match(lattice, objects, targets)  # (B, N)
        labels = (matches >= 0).long() - (matches == BETWEEN).long()  # (B, N): 1, 0 or -1
        drawn = [self.sampler(row) for row in labels]
        positive = torch.cat([rows + image * lattice.total for image, (rows, _) in enumerate(drawn)])  # (P,)
        background = torch.cat([rows + image * lattice.total for image, (_, rows) in enumerate(drawn)])  # (Q,)
        truth = torch.cat(objects).to(lattice.boxes)[matches.flatten()[positive]]  # (P, 4)
        return AnchorSamples(positive=positive, background=background, boxes=truth)

    def _match(self, lattice: Lattice, objects: list[Tensor], targets: Sequence[Target]) -> Tensor:
        """Return ``(B, N)``: the object of each anchor counted through the batch, -1 background, -2 ignored."""
        counts = torch.tensor([len(boxes) for boxes in objects], device=lattice.boxes.device)  # (B,)
        image = torch.arange(len(objects), device=lattice.boxes.device).repeat_interleave(counts)  # (G,)
        matches = self.matcher(torch.cat(objects).to(lattice.boxes), image, len(objects), lattice)  # (B, N)
        for row, target in zip(matches, targets, strict=True):
            crowd = inside_crowd(lattice.boxes, target, self.crowd_overlap)  # (N,)
            if crowd is not None:
                row[crowd & (row < 0)] = BETWEEN
        return matches

    def loss(self, outputs: RPNOutputs, samples: AnchorSamples) -> dict[str, Tensor]:
        """Return ``loss_objectness`` and ``loss_rpn_box``, both per sampled anchor (eq. 1 as torchvision weighs it).

        In training the anchors of all ranks count.

        Args:
            outputs: of ``forward``.
            samples: of ``sample`` for the same images.
        """
        drawn = len(samples.positive) + len(samples.background)
        count = normaliser(torch.tensor(drawn, device=outputs.objectness.device))
        logits = outputs.objectness.flatten()[torch.cat([samples.positive, samples.background])]  # (P + Q,)
        wanted = torch.zeros_like(logits)  # (P + Q,)
        wanted[: len(samples.positive)] = 1.0
        deltas = outputs.deltas.flatten(0, 1)[samples.positive]  # (P, 4)
        anchors = outputs.lattice.boxes[samples.positive % outputs.lattice.total]  # (P, 4)
        pairs = compared(self.box_loss, self.coder, deltas, samples.boxes, anchors)  # (P, 4) each
        return {
            "loss_objectness": self.objectness_loss(logits, wanted) / count,
            "loss_rpn_box": self.box_loss(*pairs) / count,
        }
