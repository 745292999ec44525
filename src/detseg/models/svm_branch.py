"""The second stage of `"R-CNN" <https://arxiv.org/abs/1311.2524>`_, which SPP-net shares: three fits in a row.

Girshick et al. 2014. A softmax over K + 1 classes fine-tunes the network on sampled regions (section 2.3); it is what
gradients train, without a loss on boxes. Then linear SVMs are fitted to its features, with the objects themselves as
positives and proposals of small IoU as negatives (appendix B), and ridge regression moves boxes (appendix C). Until
they are fitted the softmax scores regions, and boxes stay. Differs: margins go through a sigmoid, as scores lie in
[0, 1].

Letters: B images, R regions of all images, N proposals and M objects of one image, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detseg.models.box_branch import BoxBranch, Loss, RegionHead, RegionOutputs, RegionSamples, TwoLayerHead
from detseg.models.region_features import RegionFeatures, stack_regions
from detseg.models.region_svms import RegionExamples, RegionRidge, RegionSVMs, half
from detseg.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from detseg.nn.region_network import RegionNetwork
from detseg.ops.boxes import box_iou
from detseg.ops.nms import BatchedNMS, Suppression
from detseg.structures import Detections, Target
from detseg.targets.coders import BoxCoder
from detseg.targets.crowds import inside_crowd, learnable
from detseg.targets.hard_negatives import HardNegativeSVM
from detseg.targets.matchers import IoUMatcher
from detseg.targets.samplers import BalancedSampler, Sampler

Images = Callable[[], Iterable[RegionExamples]]
"""Reads the examples of every image anew."""


class ClassPredictor(nn.Module):
    """Logits of background and K classes; boxes are left where they are.

    Args:
        in_features: numbers of a region.
        num_classes: K.
    """

    def __init__(self, *, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(R, K + 1)``, background first, and deltas ``(R, K + 1, 4)`` of zero."""
        logits: Tensor = self.cls_score(hidden).float()  # (R, K + 1)
        return logits, logits.new_zeros(()).expand(*logits.shape, 4)


class SVMBranch(BoxBranch):
    """Classify regions by SVMs and move their boxes by ridge regression, after a softmax has trained the features.

    Args:
        num_classes: K foreground classes.
        channels: of the map that regions are read from.
        pooling: features of a region; see ``BoxBranch``.
        head: makes the layers above from their ``shape``; a ``RegionNetwork``, or any other head.
        classifier: ``svm``, or ``softmax`` for the one of the fine-tuning.
        box_regression: move boxes by ridge regression.
        features: what the SVMs see, ``fc7`` (the head's output) or ``pool5`` (a network's last map; of another head
            what it is given).
        svm: fits the SVMs; its numbers are arguments of ``HardNegativeSVM``.
        ridge_strength: lambda of the regression (appendix C: 1000).
        ridge_iou: IoU with its nearest object from which a proposal teaches the regression (appendix C: 0.6).
        matcher: regions to objects in fine-tuning; default: positive from IoU 0.5, background below (section 2.3).
        sampler: regions per image in fine-tuning; default 64, a quarter of them positive at most (section 2.3).
        coder: of the box deltas; default weights 1 (appendix C, equations 6 to 9). The regression is linear in them, so
            that no weights change a box.
        classification_loss: summed loss of (logits ``(R, K + 1)``, labels ``(R,)``).
        nms: among the boxes of one class; default threshold 0.3.
        score_threshold: lowest score of a detection, of the sigmoid of a margin or the softmax.
        detections_per_image: the most that are kept.
        min_size: shortest side of a detection in pixels.
        crowd_overlap: share of a region inside a crowd from which it is no background example.
        chunk: regions in one pass where no gradient is kept, which bounds memory; ``None``: all.

    Raises:
        ValueError: ``classifier`` or ``features`` is neither word, or a number is outside its range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        pooling: RegionFeatures | None = None,
        head: Callable[..., RegionHead] = TwoLayerHead,
        classifier: str = "svm",
        box_regression: bool = True,
        features: str = "fc7",
        svm: HardNegativeSVM | None = None,
        ridge_strength: float = 1000.0,
        ridge_iou: float = 0.6,
        matcher: IoUMatcher | None = None,
        sampler: Sampler | None = None,
        coder: BoxCoder | None = None,
        classification_loss: Loss | None = None,
        nms: Suppression | None = None,
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
        min_size: float = 1e-2,
        crowd_overlap: float = 0.7,
        chunk: int | None = 256,
    ) -> None:
        if classifier not in ("svm", "softmax") or features not in ("fc7", "pool5"):
            raise ValueError(
                f"SVMBranch: classifier={classifier!r} must be svm or softmax, and features={features!r} fc7 or pool5"
            )
        if ridge_strength <= 0 or not 0 < ridge_iou <= 1:
            raise ValueError(
                f"SVMBranch: ridge_strength={ridge_strength} must be above 0, ridge_iou={ridge_iou} in (0, 1]"
            )
        super().__init__(
            num_classes=num_classes,
            channels=channels,
            pooling=pooling,
            head=head,
            matcher=matcher,
            sampler=sampler or BalancedSampler(size=64, positive_fraction=0.25),
            coder=coder or BoxCoder(),
            classification_loss=classification_loss,
            box_loss=_nothing,
            nms=nms or BatchedNMS(threshold=0.3),
            score_threshold=score_threshold,
            detections_per_image=detections_per_image,
            min_size=min_size,
            crowd_overlap=crowd_overlap,
            chunk=chunk,
        )
        self.num_classes = num_classes
        self.classifier, self.box_regression, self.region_features = classifier, box_regression, features
        self.svm = svm or HardNegativeSVM()
        self.ridge_strength, self.ridge_iou = ridge_strength, ridge_iou
        own = ClassPredictor(in_features=self.head.out_features, num_classes=num_classes)
        self.predictor = own  # type: ignore[assignment]  # in the place of one that learns boxes too
        network = self.head if isinstance(self.head, RegionNetwork) else None
        maps = network.map_features if network else math.prod(self.pooling.shape(channels))
        width = self.head.out_features if features == "fc7" else maps
        self.svms = RegionSVMs(in_features=width, num_classes=num_classes)
        self.ridge = RegionRidge(in_features=maps, num_classes=num_classes)
        self.mean, self.std = (network.mean, network.std) if network else (list(IMAGENET_MEAN), list(IMAGENET_STD))

    @property
    def stages(self) -> list[str]:
        """What is to be fitted after the fine-tuning, in order: ``svm``, ``ridge``, both or nothing."""
        return ["svm"] * (self.classifier == "svm") + ["ridge"] * self.box_regression

    def forget(self) -> None:
        """Let the softmax score regions again, as when the features that the SVMs were fitted to learn on."""
        self.svms.fitted.fill_(False)
        self.ridge.fitted.fill_(False)

    def loss(self, logits: Tensor, deltas: Tensor, samples: RegionSamples) -> dict[str, Tensor]:
        """Return ``loss_classifier`` alone, per sampled region; see ``BoxBranch``."""
        return {"loss_classifier": super().loss(logits, deltas, samples)["loss_classifier"]}

    def losses(self, stages: Sequence[RegionOutputs]) -> dict[str, Tensor]:
        """Return the fine-tuning's loss; see ``RegionBranch``."""
        (outputs,) = stages
        return self.loss(outputs.class_logits, outputs.box_deltas, outputs.samples)

    def find(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], strides: Sequence[int], sizes: Tensor
    ) -> list[Detections]:
        """Return the detections of each image, best first; see ``RegionBranch``."""
        judged = [
            self.judge(maps, vectors) for maps, vectors in self._described(features, stack_regions(proposals), strides)
        ]
        scores, deltas = (torch.cat(parts) for parts in zip(*judged, strict=True))  # (R, K), (R, K + 1, 4)
        return self.detect_scored(scores, deltas, proposals, sizes)

    def judge(self, maps: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores ``(R, K)`` in [0, 1] and deltas ``(R, K + 1, 4)`` by whatever is fitted.

        Args:
            maps: ``pool5`` of the regions, ``(R, D5)``.
            vectors: ``fc7``, ``(R, D7)``.
        """
        logits, deltas = self.predictor(vectors)  # (R, K + 1), (R, K + 1, 4)
        scores = logits.softmax(dim=1)[:, 1:]  # (R, K)
        if self.classifier == "svm" and bool(self.svms.fitted):
            scores = self.svms(vectors if self.region_features == "fc7" else maps).sigmoid()  # (R, K)
        if self.box_regression and bool(self.ridge.fitted):
            deltas = F.pad(self.ridge(maps), (0, 0, 1, 0))  # (R, K + 1, 4)
        return scores, deltas

    def describe(self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return ``pool5`` ``(R, D5)`` and ``fc7`` ``(R, D7)`` of regions ``(R, 5)``."""
        pooled = self.pooling(features, regions, strides)  # (R, C, P, P)
        if isinstance(self.head, RegionNetwork):
            maps = self.head.maps(pooled)
            return maps, self.head.vectors(maps)
        return pooled.flatten(1), self.head(pooled)

    def _described(
        self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what ``describe`` returns, ``chunk`` regions at a time; at least once."""
        whole = self.chunk is None or torch.is_grad_enabled()
        for some in torch.split(regions, max(1, len(regions)) if whole or self.chunk is None else self.chunk):
            yield self.describe(features, some, strides)

    @torch.no_grad()
    def examples(
        self, features: Sequence[Tensor], image: int, boxes: Tensor, target: Target, strides: Sequence[int]
    ) -> RegionExamples:
        """Return what one image teaches the SVMs and the regression.

        Args:
            features: per level ``(B, C, H, W)``.
            image: which of the B.
            boxes: its proposals ``(N, 4)``.
            target: its objects.
            strides: pixels per cell of each level.
        """
        objects = learnable(target)
        truth, labels = objects.boxes.to(boxes), objects.labels.to(boxes.device)  # (M, 4), (M,)
        iou = box_iou(truth, boxes)  # (M, N)
        negative = self._negatives(iou, labels, boxes, target)  # (N, K)
        near = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)  # (N,)
        if len(truth) and self.box_regression:
            near = iou.amax(0) >= self.ridge_iou
        nearest = iou[:, near].argmax(0) if len(truth) else near.nonzero().flatten()  # (P,)
        kept = torch.cat([torch.ones_like(labels, dtype=torch.bool), negative.any(1)])  # (M + N,)
        regions = stack_regions([torch.cat([truth, boxes])])  # (M + N, 5)
        regions[:, 0] = image
        vectors, maps, lengths = self._kept(features, regions, strides, kept, torch.cat([labels < 0, near]))
        return RegionExamples(
            positives=vectors[: len(truth)],
            labels=labels.cpu(),
            regions=vectors[len(truth) :],
            negative=negative[negative.any(1)].cpu(),
            maps=maps,
            map_labels=labels[nearest].cpu(),
            deltas=self.coder.encode(truth[nearest], boxes[near]).cpu(),
            lengths=lengths,
        )

    def _negatives(self, iou: Tensor, labels: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Return for which classes each proposal is a negative, ``(N, K)`` bool, of IoU ``(M, N)`` with the objects."""
        if self.classifier != "svm":
            return torch.zeros(len(boxes), self.num_classes, dtype=torch.bool, device=boxes.device)
        nearest = iou.new_zeros(self.num_classes, len(boxes))  # (K, N), the highest IoU with an object of the class
        nearest = nearest.scatter_reduce(0, labels[:, None].expand_as(iou), iou, "amax")
        negative = (nearest < self.svm.negative_iou).T  # (N, K)
        crowd = inside_crowd(boxes, target, self.crowd_overlap)  # (N,)
        return negative if crowd is None else negative & ~crowd[:, None]

    def _kept(
        self, features: Sequence[Tensor], regions: Tensor, strides: Sequence[int], kept: Tensor, near: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the SVMs' features of the ``kept`` regions, ``pool5`` of the ``near`` ones, and the lengths of all."""
        vectors, maps = [], []
        lengths = torch.zeros(3, dtype=torch.float64)
        first = 0
        for pool5, fc7 in self._described(features, regions, strides):
            rows = slice(first, first := first + len(pool5))
            seen = fc7 if self.region_features == "fc7" else pool5  # (r, D)
            vectors.append(half(seen[kept[rows]]))
            maps.append(half(pool5[near[rows]]))
            for place, found in enumerate((seen, pool5)):
                lengths[place] += found.float().norm(dim=1).double().sum().cpu()
        lengths[2] = len(regions)
        return torch.cat(vectors), torch.cat(maps), lengths

    def fit_svms(self, images: Images) -> list[int]:
        """Fit the SVMs from the examples of all images; return the positives of each class.

        Raises:
            ValueError: there is not one object.
        """
        positives: list[list[Tensor]] = [[] for _ in range(self.num_classes)]
        lengths = torch.zeros(3, dtype=torch.float64)
        for image in images():
            lengths += image.lengths
            for label in sorted(set(image.labels.tolist())):
                positives[label].append(image.positives[image.labels == label])
        counts = [sum(len(rows) for rows in some) for some in positives]
        if sum(counts) == 0:
            raise ValueError(NO_OBJECTS)
        scale = self.svm.norm / max(float(lengths[0] / lengths[2]), 1e-12)

        def blocks() -> Iterator[tuple[Tensor, Tensor]]:
            for image in images():
                yield (image.regions.float() * scale).half(), image.negative

        nothing = torch.zeros(0, self.svms.weight.shape[1])
        scaled = [(torch.cat([nothing, *some]).float() * scale).half() for some in positives]  # per class (P, D)
        machines = self.svm.fit(scaled, blocks)
        self.svms.take(machines, scale=scale)
        return counts

    def fit_ridge(self, images: Images) -> list[int]:
        """Fit the regression from the examples of all images; return the pairs of each class.

        Raises:
            ValueError: no proposal is near an object.
        """
        counts = self.ridge.fit(
            [image.boxes_alone() for image in images()], strength=self.ridge_strength, norm=self.svm.norm
        )
        if sum(counts) == 0:
            raise ValueError(
                f"no proposal has IoU {self.ridge_iou} with an object, so there is nothing to learn boxes from; lower "
                "model.box.ridge_iou, take other proposals, or set model.box.box_regression=false"
            )
        return counts


NO_OBJECTS = (
    "the training split has not one object, so there is nothing to fit SVMs to; check the annotations and the data's "
    "class names, or set model.box.classifier=softmax model.box.box_regression=false"
)


def _nothing(deltas: Tensor, wanted: Tensor) -> Tensor:
    """Return the loss of boxes, 0: none are learnt by gradients."""
    return (deltas - wanted).sum() * 0.0
