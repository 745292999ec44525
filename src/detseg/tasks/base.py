"""What every task shares: steps, logging, optimiser and schedule. The model's architecture is none of its business."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from detseg.models.inference import predict_images
from detseg.structures import Batch, Detections, SemanticMap, Target
from detseg.tasks.buffers import share_buffers
from detseg.tasks.groups import choose_rates, chosen_rates, parameter_groups, peak_rate
from detseg.tasks.guarding import StepGuard, clip_gradients
from detseg.tasks.position import POSITION, Position
from detseg.tasks.processes import world_size
from detseg.tasks.proposals import given_proposals
from detseg.tasks.rows import MeanRow, TrainRow

log = logging.getLogger(__name__)

Prediction = Detections | SemanticMap

COUNT = re.compile(r"(^|_)count(_|$)")
"""Names of counts of objects or pixels: kept in ``results``, where they explain an n/a, but not logged."""


class MakeScheduler(Protocol):
    """A schedule that waits for the optimiser and the number of its steps; see ``detseg.tasks.schedules``."""

    def __call__(self, optimizer: Optimizer, *, total_steps: int) -> LRScheduler:
        """Return the schedule."""


class Task(L.LightningModule):
    """A model under training: subclasses say which figures count.

    Validation and test do one forward pass in eval mode, from which both the losses and the predictions come, and count
    the predictions in the photo's own pixels against the truth as the files have it. Figures are updated in the steps
    and computed once, at the end of the epoch.

    Args:
        model: obeys the contract of ``detseg.models.contract``.
        optimizer: waits for its parameters, such as ``partial(torch.optim.AdamW, lr=1e-3)``.
        scheduler: waits for the optimiser and ``total_steps``; ``None`` keeps the learning rate.
        class_names: by label; per-class figures are logged under them.
        monitor: the figure by which checkpoints are compared, such as ``"val/map"``.
        mode: ``"max"`` or ``"min"``: which end of ``monitor`` is better.
        backbone_lr_scale: learning rate of the backbone's body relative to the rest.
        decay_one_dimensional: weight decay on norms and biases too.
        channels_last: keep images and weights with the channels innermost, which speeds up depthwise bodies on a CPU
            and convolutions on a GPU; results differ by rounding alone.
        layer_decay: learning rate of a layer of the body relative to the next; see ``parameter_groups``.

    Raises:
        ValueError: the model's number of classes is not that of the names, or ``mode`` is neither word.
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
    ) -> None:
        super().__init__()
        if mode not in ("max", "min"):
            raise ValueError(f"task.mode is {mode!r}; it must be max or min")
        count = int(cast(Any, model).num_classes)
        if count != len(class_names):
            raise ValueError(
                f"the model has {count} classes, but {len(class_names)} names are given: {', '.join(class_names)}; "
                "build the model with num_classes as the data module says"
            )
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.layout) if channels_last else model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.class_names = list(class_names)
        self.monitor, self.mode = monitor, mode
        self.backbone_lr_scale, self.decay_one_dimensional = backbone_lr_scale, decay_one_dimensional
        self.layer_decay = layer_decay
        self.position = Position()
        self.guard: StepGuard | None = None
        """What watches the steps from within while training, such as ``detseg.callbacks.Guard``."""
        self.gradient_norm: Tensor | None = None
        """Of the last step's gradients before they were clipped, on their device; ``None`` without a guard."""
        self.results: dict[str, dict[str, float]] = {}
        """Stage ("val", "test") -> every figure and count of its last epoch by name without stage; NaN is n/a."""
        self.tables: dict[str, dict[str, Mapping[str, Tensor]]] = {}
        """Stage -> what each metric computed last, by the metric's name: curves and confusion matrices for pictures."""
        self._chosen: list[dict[str, float]] | None = None
        self.train_row = TrainRow()
        self.mean_rows = {"val": MeanRow(), "test": MeanRow()}
        self.meters = nn.ModuleDict(
            {f"{stage}_meters": nn.ModuleDict(self.configure_metrics()) for stage in ("val", "test")}
        )

    # What a family says about itself

    def configure_metrics(self) -> dict[str, Metric]:
        """Return fresh metrics by name, for one stage."""
        raise NotImplementedError

    def update_metrics(
        self, metrics: Mapping[str, Metric], predictions: list[Any], truths: list[Target], **context: Any
    ) -> None:
        """Count the predictions of one batch, in the photos' own pixels.

        Args:
            metrics: those of ``configure_metrics``.
            predictions: one per image.
            truths: one per image, as the files have them.
            **context: ``outputs`` of the model and the ``batch``, for figures about more than the predictions.
        """
        raise NotImplementedError

    def name_figures(self, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Return what is logged from the metrics' values, by name without the stage."""
        raise NotImplementedError

    # Steps

    def forward(self, batch: Batch) -> list[Prediction]:
        """Return predictions in the pixels of the batch's images, in whatever mode the model is."""
        return predict_images(self.model, self._images(batch), batch.sizes, **given_proposals(batch))

    def on_fit_start(self) -> None:
        """Refuse what would end the process without a word.

        Raises:
            ValueError: with ``channels_last`` on a CPU, a 1x1 convolution of stride 2 has channels that are no multiple
                of 8: oneDNN's gradient of its weights writes beyond its memory (seen with torch 2.14 on AVX-512).
        """
        self.position.prepare(self.trainer)
        if self.layout != torch.channels_last or self.device.type != "cpu":
            return
        for name, layer in self.model.named_modules():
            strided = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
            if strided and layer.in_channels % 8 and layer.weight.requires_grad:
                raise ValueError(
                    f"task.channels_last: layer {name} is a 1x1 convolution of stride {layer.stride} on "
                    f"{layer.in_channels} channels, whose training crashes on a CPU in this layout; set it to false"
                )

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the sum of the model's loss terms.

        Raises:
            FloatingPointError: the loss is NaN or infinite; looked at on a CPU in every step, else when logging. A
                guard does so instead where there is one, before the optimiser's step.
        """
        if self.guard is not None:
            self.guard.take(batch)
        outputs = self.model(self._images(batch), batch.sizes, batch.targets, **given_proposals(batch))
        terms: dict[str, Tensor] = cast(Any, self.model).loss(outputs, batch.targets)
        loss = torch.stack(list(terms.values())).sum()
        every = cast(Any, self.trainer).log_every_n_steps  # 0: never
        due = every > 0 and (self.global_step + 1) % every == 0
        if self.guard is None and (due or loss.device.type == "cpu"):
            self._check_finite(loss, terms, batch)
        if due:
            figures = {"loss": loss, **terms, **self._diagnose(outputs, batch)}
            self.train_row.add(self.trainer, {f"train/{name}": value for name, value in figures.items()})
        return loss if self.guard is None else self.guard.follow(loss, terms)

    def validation_step(  # type: ignore[override]  # Lightning passes lists on to callbacks as well
        self, batch: Batch, batch_index: int
    ) -> list[Prediction]:
        """Return the predictions in the photos' own pixels, one per image, for callbacks."""
        return self._evaluation_step(batch, batch_index, "val")

    def test_step(  # type: ignore[override]  # Lightning passes lists on to callbacks as well
        self, batch: Batch, batch_index: int
    ) -> list[Prediction]:
        """Return the predictions in the photos' own pixels, one per image, for callbacks."""
        return self._evaluation_step(batch, batch_index, "test")

    def predict_step(self, batch: Batch, batch_index: int) -> list[Prediction]:
        """Return the predictions in the photos' own pixels, one per image."""
        return restore(self(batch), batch) if len(batch) else []

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Send the step's figures to the loggers, where they are due and the optimiser stepped."""
        self.train_row.step_done(self.trainer)

    def on_train_epoch_end(self) -> None:
        """Leave no row behind."""
        self.train_row.flush(self.trainer)

    def on_validation_epoch_start(self) -> None:
        """Measure one model, not one per process; an average of weights is in place by now."""
        share_buffers(self.model)

    def on_validation_epoch_end(self) -> None:
        """Compute the validation split's figures."""
        self._finish("val")
        self.position.validated(self.trainer)

    def on_test_epoch_end(self) -> None:
        """Compute the test split's figures."""
        self._finish("test")

    def _evaluation_step(self, batch: Batch, batch_index: int, stage: str) -> list[Prediction]:
        if not len(batch):  # a process without images
            return []
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            # Two-stage losses sample: the same samples whatever ran before, and training is none the wiser. An image
            # that is a batch of its own has the same number on every count of processes.
            torch.manual_seed(batch_index * world_size() + self.global_rank)
            outputs = self.model(self._images(batch), batch.sizes, batch.targets, **given_proposals(batch))
            terms: dict[str, Tensor] = cast(Any, self.model).loss(outputs, batch.targets)
        figures = {"loss": torch.stack(list(terms.values())).sum(), **terms, **self._diagnose(outputs, batch)}
        self.mean_rows[stage].add(figures, images=len(batch))
        try:
            predictions = restore(cast(Any, self.model).predict(outputs, batch.sizes), batch)
        except ValueError as error:  # detections check themselves, but know no image
            raise ValueError(f"{error}; predicted for one of the images {_names(batch.targets)}") from error
        truths = batch.targets if batch.truths is None else batch.truths
        self.update_metrics(self.metrics(stage), predictions, truths, outputs=outputs, batch=batch)
        return predictions

    def _images(self, batch: Batch) -> Tensor:
        return batch.images.contiguous(memory_format=self.layout)  # (B, 3, H, W)

    def _diagnose(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Return what only this model's family has, such as its positives per level; nothing where it gives none."""
        diagnostics = getattr(self.model, "diagnostics", None)
        if diagnostics is None:
            return {}
        with torch.no_grad():
            return cast("dict[str, Tensor]", diagnostics(outputs, batch.targets))

    def metrics(self, stage: str) -> dict[str, Metric]:
        """Return the metrics of ``stage``, ``"val"`` or ``"test"``, by name."""
        meters = cast(nn.ModuleDict, self.meters[f"{stage}_meters"])
        return {name: cast(Metric, metric) for name, metric in meters.items()}

    def _finish(self, stage: str) -> None:
        values = {name: metric.compute() for name, metric in self.metrics(stage).items()}
        for metric in self.metrics(stage).values():
            metric.reset()
        self.tables[stage] = values
        losses = self.mean_rows[stage].take()
        own = self.name_figures(values)
        figures = own | {name: value for name, value in losses.items() if name not in own}
        self.results[stage] = figures
        logged = {
            f"{stage}/{name}": value
            for name, value in figures.items()
            if name in losses or not (math.isnan(value) or COUNT.search(name))
        }
        if self.monitor.startswith(f"{stage}/"):  # n/a here too: a missing key would stop the checkpoint callback
            logged.setdefault(self.monitor, figures.get(self.monitor.removeprefix(f"{stage}/"), math.nan))
        self.log_dict(logged, on_step=False, on_epoch=True)

    def _check_finite(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Batch) -> None:
        if bool(loss.isfinite()):
            return
        values = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
        raise FloatingPointError(
            f"the loss of step {self.global_step} is {float(loss.detach())} ({values}) on images "
            f"{_names(batch.targets[:4])} ...; "
            "lower optimizer.lr, lengthen the warm-up, or set trainer.gradient_clip_val"
        )

    # Resuming, see ``detseg.tasks.position``

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the place in the run, and the state of the random numbers of every process; bring figures to disk."""
        self.train_row.save(self.trainer)
        checkpoint[POSITION] = self.position.capture(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the place in the run."""
        self.position.load(self, checkpoint)

    def on_train_start(self) -> None:
        """Let a resumed run go on with the figures and random numbers of the one before, at its config's rates.

        Raises:
            ValueError: the checkpoint is from within an epoch, and the batches are not the same ones.
        """
        self.position.restore(self)
        self.train_row.start(self.trainer)
        if self._chosen is not None:
            schedules = [entry.scheduler for entry in self.trainer.lr_scheduler_configs]
            changed = choose_rates(self.trainer.optimizers[0], schedules, self._chosen)
            if changed and self.trainer.is_global_zero:
                more = f" and {len(changed) - 3} groups more" if len(changed) > 3 else ""
                log.warning("going on with %s%s, as the config says", "; ".join(changed[:3]), more)

    # Optimisation

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says; with a guard, which judges the clipping's own norm, the norm is taken just once."""
        plugin = self.trainer.precision_plugin
        scaled = getattr(plugin, "scaler", None) is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        if self.guard is None or (gradient_clip_val and scaled):  # Lightning's error about fused optimisers is right
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = plugin.main_params(optimizer)
        self.gradient_norm = clip_gradients(parameters, value=gradient_clip_val, algorithm=gradient_clip_algorithm)
        self.guard.judge(self.gradient_norm, optimizer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser over ``parameter_groups``, and the schedule, which steps with it."""
        optimizer = self.optimizer(self.parameter_groups())
        if self.scheduler is None:
            self._chosen = chosen_rates(optimizer)
            return optimizer
        total = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = self.scheduler(optimizer, total_steps=total)
        self._chosen = chosen_rates(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups, see ``detseg.tasks.groups.parameter_groups``."""
        return parameter_groups(
            self.model,
            rate=peak_rate(self.optimizer),
            backbone_lr_scale=self.backbone_lr_scale,
            decay_one_dimensional=self.decay_one_dimensional,
            layer_decay=self.layer_decay,
        )


def restore(predictions: Iterable[Prediction], batch: Batch) -> list[Any]:
    """Return predictions in the photos' own pixels, as ``batch.truths`` has them; without truths, as they are."""
    found = list(predictions)
    if batch.truths is None:
        return found
    sizes = [(int(height), int(width)) for height, width in batch.sizes.tolist()]
    return [
        prediction.resize(truth.size if truth.size != (0, 0) else size)
        if isinstance(prediction, SemanticMap)
        else prediction.resize(size, truth.size if truth.size != (0, 0) else size)
        for prediction, size, truth in zip(found, sizes, batch.truths, strict=True)
    ]


def _names(targets: Iterable[Target]) -> str:
    return ", ".join(target.file or str(target.image_id) for target in targets)


def scalars(values: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Return the single numbers among a metric's values, each under ``prefix`` and its name."""
    return {
        f"{prefix}{name}": float(value)
        for name, value in values.items()
        if not isinstance(value, Mapping) and torch.as_tensor(value).ndim == 0
    }


def per_class(values: Tensor | Sequence[float], class_names: Sequence[str], prefix: str) -> dict[str, float]:
    """Return one figure per class under ``prefix/<class name>``."""
    return {f"{prefix}/{name}": float(value) for name, value in zip(class_names, values, strict=True)}
