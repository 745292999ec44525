"""Boxes and their classes, by whatever detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from detseg.metrics import BoxConfusion, CocoAP, VocAP
from detseg.structures import Detections, Target
from detseg.tasks.base import MakeScheduler, Task, per_class, scalars


class Detection(Task):
    """Detection with COCO AP, and VOC's where wanted: the whole of one-stage and anchor-free detectors.

    Logged beside the loss terms: ``map``, ``map_50``, ..., ``map/<class>``, and what the model's own ``diagnostics``
    gives: with anchors the positives per level and the easy negatives' share of the loss, without anchors the positives
    per level and the share of points that lie in more than one object. With ``voc_ap`` also ``voc_map`` and
    ``voc_map/<class>``, at IoU 0.5 and without objects marked difficult.

    Args:
        model: see ``Task``, as all others but the last.
        optimizer: waits for its parameters.
        scheduler: waits for the optimiser and ``total_steps``.
        class_names: by label.
        monitor: the figure by which checkpoints are compared.
        mode: which end of ``monitor`` is better.
        backbone_lr_scale: learning rate of the backbone's body relative to the rest.
        decay_one_dimensional: weight decay on norms and biases too.
        channels_last: keep images and weights with the channels innermost.
        layer_decay: learning rate of a layer of the body relative to the next.
        voc_ap: 2007 for VOC's AP at 11 points, 2010 for the area under the curve, ``None`` for COCO's figures alone.

    Raises:
        ValueError: ``voc_ap`` is another number, or as of ``Task``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: MakeScheduler | None = None,
        class_names: Sequence[str],
        monitor: str,
        mode: str = "max",
        backbone_lr_scale: float = 1.0,
        decay_one_dimensional: bool = False,
        channels_last: bool = False,
        layer_decay: float = 1.0,
        voc_ap: int | str | None = None,
    ) -> None:
        self.voc_ap = None if voc_ap is None else str(voc_ap)  # read by configure_metrics, which the base calls
        super().__init__(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            class_names=class_names,
            monitor=monitor,
            mode=mode,
            backbone_lr_scale=backbone_lr_scale,
            decay_one_dimensional=decay_one_dimensional,
            channels_last=channels_last,
            layer_decay=layer_decay,
        )

    def configure_metrics(self) -> dict[str, Metric]:
        """Return AP of boxes, and which class is taken for which."""
        metrics: dict[str, Metric] = {"box": CocoAP(iou_type="bbox", class_names=self.class_names)}
        metrics["confusion"] = BoxConfusion(class_names=self.class_names)
        if self.voc_ap is not None:
            style = cast(Literal["2007", "2010"], self.voc_ap)  # VocAP says so if it is neither
            metrics["voc"] = VocAP(style=style, class_names=self.class_names)
        return metrics

    def update_metrics(
        self, metrics: Mapping[str, Metric], predictions: list[Detections], truths: list[Target], **context: Any
    ) -> None:
        """Count the boxes of one batch."""
        for name in ("box", "confusion", "voc"):
            if name in metrics:
                metrics[name].update(predictions, truths)

    def name_figures(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return the twelve COCO figures, VOC's where wanted, and AP per class."""
        prefixes = {"box": "", "voc": "voc_"}
        wanted = {prefix: values[name] for name, prefix in prefixes.items() if name in values}
        figures: dict[str, float] = {}
        for prefix, found in wanted.items():
            figures |= scalars(found, prefix)
            figures |= per_class(found["map_per_class"], self.class_names, f"{prefix}map")
        return figures
