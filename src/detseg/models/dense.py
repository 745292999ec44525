"""What RetinaNet, FCOS and their kin share: every cell of a pyramid predicts classes and a box, with no second stage.

A dense detector is backbone x pyramid x head x references (anchors, or squares around points) x assigner x coder x
losses x NMS, each a constructor argument; a paper's file wires what it names and adds its own loss terms. It has no
paper of its own; the form of the head is that of Lin et al. 2017 (arXiv:1708.02002, figure 3). Differs from
torchvision, to which the results are equal: the images of a batch are assigned, scored and decoded together.

Letters: B images, N references of one image over all levels, A references per cell, K classes, G objects of all
images, P positive references of all images, C candidates for detections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from detseg.losses.box_loss import BoxLoss, Coder, compared
from detseg.losses.distribution import DistributionFocalLoss
from detseg.losses.grid_box import GridBoxLoss
from detseg.losses.normalise import normaliser
from detseg.losses.quality import ClassificationLoss
from detseg.nn.backbone import Backbone
from detseg.nn.normalize import Normalize
from detseg.ops.nms import Suppression, suppress_per_image
from detseg.structures import Detections, Target
from detseg.targets.crowds import inside_crowd, learnable
from detseg.targets.lattice import Lattice, References, build_lattice
from detseg.targets.matchers import BETWEEN
from detseg.targets.priors import GridCoder
from detseg.targets.sparse import paired_iou
from detseg.targets.task_aligned import PredictionAssigner, Predictions

CROWD_OVERLAP = 0.7  # share of a reference inside a crowd region from which it teaches nothing, as in Detectron


class Assigner(Protocol):
    """Anything that says which object each reference shall learn."""

    def __call__(self, boxes: Tensor, image: Tensor, batch: int, lattice: Lattice) -> Tensor:
        """Return ``(B, N)`` int64: a row of ``boxes`` (G, 4), -1 for background or -2 to ignore.

        ``image`` (G,) is the image of each box, ascending; ``batch`` is B.
        """
        ...


AnyAssigner = Assigner | PredictionAssigner


@dataclass
class DenseOutputs:
    """What the network says about every reference.

    Attributes:
        logits: ``(B, N, K)`` of the classes; ``(B, N, K + 1)``, background first, where a softmax reads them (SSD).
        regression: ``(B, N, 4)``, in the coder's terms; or ``(B, N, 4 * n)``, logits of n values for each of the four.
        quality: ``(B, N)`` logits of how good a box is, such as FCOS's centreness, or ``None``.
        references: lays the references over the levels.
        image_size: (height, width) of the padded images.
        feature_sizes: (rows, columns) of each level.
        nominal: the backbone's strides.
    """

    logits: Tensor
    regression: Tensor
    quality: Tensor | None
    references: References
    image_size: tuple[int, int]
    feature_sizes: tuple[tuple[int, int], ...]
    nominal: tuple[int, ...]

    @property
    def lattice(self) -> Lattice:
        """The references of one image; laid when asked for, so that an export of ``forward`` has the network alone."""
        strides = tuple(self.references.strides(self.image_size, self.feature_sizes, self.nominal))
        return build_lattice(self.references, self.feature_sizes, strides, self.logits.device)


@dataclass
class Assignment:
    """What the references of a batch shall learn.

    Attributes:
        matched: ``(B, N)`` int64: the object of each reference, -1 for background, -2 for ignored.
        rows: ``(P,)`` the positive references, counted through the batch (image * N + reference).
        boxes: ``(P, 4)`` the box that each of them learns.
        labels: ``(B * N,)`` int64: the class of each reference, negative for background and ignored ones.
        references: ``(P, 4)`` the positive references.
        scale: ``(B,)`` the weight of each image's references: one over the number of positives.
        quality: ``(P,)`` in [0, 1], what each positive's class shall score, where the assigner says so, or ``None``.
    """

    matched: Tensor
    rows: Tensor
    boxes: Tensor
    labels: Tensor
    references: Tensor
    scale: Tensor
    quality: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """The scale of each positive's image, times its quality where the assigner gives one, ``(P,)``."""
        own = self.scale[self.rows // self.matched.shape[1]]  # (P,)
        return own if self.quality is None else own * self.quality


class DenseDetector(nn.Module):
    """The composition that dense detectors share.

    Args:
        num_classes: foreground classes.
        backbone: gives pyramid levels of one width.
        head: takes the levels, and gives logits ``(B, N, K)``, regression ``(B, N, 4)``, or ``(B, N, 4 * n)`` with a
            ``distribution_loss`` of n bins, and quality ``(B, N)`` or ``None``.
        references: lays anchors, or squares around points, over the levels.
        assigner: says which object each reference learns, by where it lies or by what is predicted there.
        coder: of boxes.
        classification_loss: of all references; called with logits ``(B * N, K)``, labels ``(B * N,)`` and weights
            ``(B * N,)`` for a scalar, where ``classification_term`` does not say otherwise.
        box_loss: of the positive ones.
        nms: of the detections of one image.
        per_image: divide the losses of an image by its own positives and average, as torchvision's RetinaNet does;
            else divide by those of the batch (over all ranks).
        score_threshold: detections must score higher, in [0, 1).
        top_k: how many candidates per level (in SSD: per class) go to NMS.
        max_detections: how many detections per image stay.
        distribution_loss: of the positive ones, where the head predicts a distribution over the values of each number
            and not the number itself; ``None`` where it does not.
        loss_weights: factors of the terms ``classification``, ``box``, ``distribution`` and those of the paper; 1 for
            those that are missing.

    Raises:
        ValueError: ``loss_weights`` has a term that the model has not, or ``box_loss`` is of another coder's numbers.
    """

    backbone: Backbone
    term_names: ClassVar[tuple[str, ...]] = ("classification", "box", "distribution")

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        head: nn.Module,
        references: References,
        assigner: AnyAssigner,
        coder: Coder,
        classification_loss: ClassificationLoss | Callable[..., Tensor],
        box_loss: BoxLoss,
        nms: Suppression,
        per_image: bool,
        score_threshold: float,
        top_k: int,
        max_detections: int,
        distribution_loss: DistributionFocalLoss | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(box_loss, GridBoxLoss) and not isinstance(coder, GridCoder):
            raise ValueError(
                f"{type(self).__name__}: GridBoxLoss compares offsets behind a sigmoid, as YOLOv2 and YOLOv3 predict "
                "them; take SmoothL1, or a loss of boxes such as GIoULoss"
            )
        self.loss_weights = _check_weights(loss_weights, self.term_names)
        self.num_classes = num_classes
        self.normalize = Normalize(backbone.mean, backbone.std)
        self.backbone = backbone
        self.head = head
        self.references = references
        self.assigner = assigner
        self.coder = coder
        self.classification_loss = classification_loss
        self.box_loss = box_loss
        self.distribution_loss = distribution_loss
        self.nms = nms
        self.per_image = per_image
        self.score_threshold = score_threshold
        self.top_k = top_k
        self.max_detections = max_detections

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> DenseOutputs:
        """Run the network on ``(B, 3, H, W)`` RGB in [0, 1]; ``targets`` are not read. See ``Detector.forward``."""
        levels = self.backbone(self.normalize(images, sizes))  # L x (B, C, H / s, W / s)
        logits, regression, quality = self.head(levels)  # (B, N, K), (B, N, 4), (B, N) or None
        feature_sizes = tuple((level.shape[2], level.shape[3]) for level in levels)
        size = images.shape[2], images.shape[3]
        nominal = tuple(self.backbone.strides)
        return DenseOutputs(logits, regression, quality, self.references, size, feature_sizes, nominal)

    def loss(self, outputs: DenseOutputs, targets: list[Target]) -> dict[str, Tensor]:
        """Return ``loss_classification`` and the terms of ``box_terms``, scalars; see ``Detector.loss``."""
        assignment = self.assign(outputs, targets)
        terms = {"loss_classification": self.classification_term(outputs, assignment)}
        terms |= self.box_terms(outputs, assignment)
        return {name: term * self.loss_weights.get(name.removeprefix("loss_"), 1.0) for name, term in terms.items()}

    def classification_term(self, outputs: DenseOutputs, assignment: Assignment) -> Tensor:
        """Return the scalar loss of the classes, of every reference that is not ignored."""
        weights = assignment.scale[:, None].expand_as(assignment.matched)  # (B, N)
        if bool((assignment.matched == BETWEEN).any()):
            weights = weights.masked_fill(assignment.matched == BETWEEN, 0.0)
        logits = outputs.logits.flatten(0, 1)  # (B * N, K)
        quality = self.quality(outputs, assignment)  # (B * N,) or None
        loss: Tensor = self.classification_loss(logits, assignment.labels, weights.flatten(), quality)
        return loss

    def box_terms(self, outputs: DenseOutputs, assignment: Assignment) -> dict[str, Tensor]:
        """Return ``loss_box`` of the positive references and, where they are distributions, ``loss_distribution``."""
        raw = outputs.regression.flatten(0, 1)[assignment.rows].float()  # (P, 4 * n)
        boxes, references = assignment.boxes, assignment.references  # (P, 4) each
        pairs = compared(self.box_loss, self.coder, self.codes(raw), boxes, references)  # (P, 4) each
        terms = {"loss_box": self.box_loss(*pairs, assignment.weights)}
        if self.distribution_loss is not None:
            wanted = self.coder.encode(boxes, references)  # (P, 4)
            terms["loss_distribution"] = self.distribution_loss(raw, wanted, assignment.weights)
        return terms

    def codes(self, regression: Tensor) -> Tensor:
        """Return what the coder decodes ``(..., 4)``: the regression itself, or the expectation of ``(..., 4 * n)``."""
        return regression if self.distribution_loss is None else self.distribution_loss.expectation(regression)

    @torch.no_grad()
    def quality(self, outputs: DenseOutputs, assignment: Assignment) -> Tensor | None:
        """Return what the class of each reference shall score ``(B * N,)``, or ``None`` where it is 1 or 0."""
        own = assignment.quality
        if own is None:
            if not getattr(self.classification_loss, "wants_quality", False):
                return None
            boxes = self._boxes(outputs, outputs.lattice, assignment.rows)  # (P, 4)
            own = paired_iou(boxes, assignment.boxes).nan_to_num(0.0).clamp(0.0, 1.0)  # (P,)
        return own.new_zeros(len(assignment.labels)).index_put_((assignment.rows,), own)

    def assign(self, outputs: DenseOutputs, targets: list[Target]) -> Assignment:
        """Say what every reference of a batch shall learn; crowd regions are ignored."""
        lattice = outputs.lattice
        matched, score, objects, classes = self._match(outputs, lattice, targets)  # (B, N) twice, (G, 4), (G,)
        rows = (matched.flatten() >= 0).nonzero()[:, 0]  # (P,)
        box = matched.flatten()[rows]  # (P,)
        labels = torch.full_like(matched.flatten(), -1)  # (B * N,)
        labels[rows] = classes[box]
        # Not under no_grad as the matching is: the normaliser asks whether gradients are wanted (see there).
        quality = None if score is None else score.flatten()[rows]  # (P,)
        scale = self._scale(rows // lattice.total, len(targets), quality)
        references = lattice.boxes[rows % lattice.total]  # (P, 4)
        return Assignment(matched, rows, objects[box], labels, references, scale, quality)

    @torch.no_grad()
    def _match(
        self, outputs: DenseOutputs, lattice: Lattice, targets: list[Target]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return the object of each reference ``(B, N)``, and what it shall score ``(B, N)`` if the assigner says so.

        Boxes ``(G, 4)`` and classes ``(G,)`` of the objects follow.
        """
        taught = [learnable(target) for target in targets]
        objects, image = flat_boxes(taught, lattice)  # (G, 4), (G,)
        classes = torch.cat([target.labels for target in taught])  # (G,)
        score = None
        if isinstance(self.assigner, PredictionAssigner):
            seen = Predictions(outputs.logits.flatten(0, 1), lambda rows: self._boxes(outputs, lattice, rows))
            matched, score = self.assigner.align(objects, classes, image, len(targets), lattice, seen)  # (B, N) each
        else:
            matched = self.assigner(objects, image, len(targets), lattice)  # (B, N)
        for index, target in enumerate(targets):
            inside = inside_crowd(lattice.boxes, target, CROWD_OVERLAP)  # (N,)
            if inside is not None:
                matched[index].masked_fill_(inside & (matched[index] < 0), BETWEEN)
        return matched, score, objects, classes

    def _boxes(self, outputs: DenseOutputs, lattice: Lattice, rows: Tensor) -> Tensor:
        """Return the predicted boxes of references counted through the batch ``(R,)``, ``(R, 4)`` xyxy pixels."""
        codes = self.codes(outputs.regression.flatten(0, 1)[rows].float())  # (R, 4)
        return self.coder.decode(codes, lattice.boxes[rows % lattice.total])

    def _scale(self, image: Tensor, batch: int, quality: Tensor | None) -> Tensor:
        count = torch.bincount(image, minlength=batch)  # (B,)
        if quality is not None:  # not bincount's weights, which a GPU adds up in any order
            count = quality.new_zeros(batch).index_add_(0, image, quality)  # (B,)
        if self.per_image:
            return 1.0 / (count.clamp(min=1) * batch)
        return (1.0 / normaliser(count.sum())).expand(batch)

    @torch.no_grad()
    def predict(self, outputs: DenseOutputs, sizes: Tensor) -> list[Detections]:
        """Return detections per image, best first, clipped to ``sizes`` (B, 2); see ``Detector.predict``."""
        lattice = outputs.lattice
        image, reference, label, score = self.candidates(outputs)  # (C,) each
        regression = outputs.regression[image, reference].float()  # (C, 4 * n)
        boxes = self.decode(regression, reference, lattice)  # (C, 4)
        return suppress_per_image(boxes, score, label, image, sizes, nms=self.nms, most=self.max_detections)

    def decode(self, regression: Tensor, reference: Tensor, lattice: Lattice) -> Tensor:
        """Return boxes ``(C, 4)`` xyxy pixels of ``(C, 4 * n)`` about references, given by number ``(C,)``."""
        return self.coder.decode(self.codes(regression), lattice.boxes[reference])

    def scores(self, logits: Tensor, quality: Tensor | None) -> Tensor:
        """Return the scores ``(C,)`` of candidates from their class and quality logits ``(C,)``."""
        return logits.sigmoid() if quality is None else (logits.sigmoid() * quality.sigmoid()).sqrt()

    def candidates(self, outputs: DenseOutputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image, reference, label and score ``(C,)`` of the ``top_k`` best above the threshold on every level.

        The images stand in order. Only logits that can reach the threshold go through a sigmoid.
        """
        # sqrt(p * quality) > t needs p > t ** 2
        bound = self.score_threshold if outputs.quality is None else self.score_threshold**2
        lowest = math.log(bound / (1 - bound)) - 1e-3 if bound > 0 else -math.inf  # the exact test follows
        image, reference, label = (outputs.logits > lowest).nonzero().unbind(1)  # (C,) each
        quality = None if outputs.quality is None else outputs.quality[image, reference].float()  # (C,)
        score = self.scores(outputs.logits[image, reference, label].float(), quality)  # (C,)
        ends = torch.tensor(outputs.lattice.counts, device=score.device).cumsum(0)  # (L,)
        group = image * len(ends) + torch.bucketize(reference, ends, right=True)  # (C,)
        keep = best_per_group(score, group, self.top_k, threshold=self.score_threshold)
        return image[keep], reference[keep], label[keep], score[keep]

    def positives_per_level(self, assignment: Assignment, lattice: Lattice) -> dict[str, Tensor]:
        """Return how many references of each level learn an object, by name (``positives_p3`` has stride 8)."""
        counts = torch.split((assignment.matched >= 0).sum(0), lattice.counts)  # L x (N_l,)
        names = [f"positives_p{round(math.log2(stride))}" for stride in self.backbone.strides]
        return {name: count.sum().float() for name, count in zip(names, counts, strict=True)}


def _check_weights(weights: Mapping[str, float] | None, terms: Sequence[str]) -> dict[str, float]:
    given = {name: float(value) for name, value in (weights or {}).items()}
    if unknown := sorted(set(given) - set(terms)):
        raise ValueError(f"loss_weights has {unknown}; the terms of this model are {list(terms)}")
    return given


def flat_boxes(targets: list[Target], lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Return the boxes of all images ``(G, 4)`` as float32 and the image of each ``(G,)`` int64."""
    boxes = torch.cat([target.boxes for target in targets]).to(lattice.boxes)  # (G, 4)
    counts = torch.tensor([len(target) for target in targets])  # (B,)
    return boxes, torch.repeat_interleave(counts).to(boxes.device)


def best_per_group(scores: Tensor, group: Tensor, count: int, *, threshold: float) -> Tensor:
    """Return the indices of the ``count`` best scores above ``threshold`` in every group.

    Args:
        scores: ``(C,)``.
        group: ``(C,)`` int64 >= 0, ascending.
        count: how many may stay in a group.
        threshold: scores must be higher.

    Returns:
        ``(M,)`` int64, group by group, best first.
    """
    kept = (scores > threshold).nonzero()[:, 0]  # (M,)
    sizes = [size for size in torch.bincount(group[kept]).tolist() if size]  # an untrained model keeps millions:
    parts = zip(torch.split(kept, sizes), torch.split(scores[kept], sizes), strict=True)  # sorting all takes seconds
    best = [index[score.topk(min(count, len(score))).indices] for index, score in parts]
    return torch.cat(best) if best else kept
