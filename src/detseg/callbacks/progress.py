"""Progress: a bar where somebody watches a terminal, quiet lines in a file, a pipe or a batch job."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from torch import Tensor

SHOWN = (
    "train/loss",
    "val/loss",
    "val/map",
    "val/map_50",
    "val/voc_map",
    "val/mask_map",
    "val/mask_map_50",
    "val/miou",
    "val/dice",
)
"""What a line shows of the logged figures, where they exist, in this order."""


def progress_bar(*, refresh_rate: int = 10, bar: bool | None = None) -> ProgressBar:
    """Return Lightning's rich bar on a terminal, else ``LineProgress``.

    Args:
        refresh_rate: steps between two drawings of the bar.
        bar: true or false decides; ``None`` looks whether standard error and output are terminals.
    """
    wanted = sys.stdout.isatty() and sys.stderr.isatty() if bar is None else bar
    return RichProgressBar(refresh_rate=refresh_rate) if wanted else LineProgress()


class LineProgress(ProgressBar):
    """Print one line per epoch: its number, the main figures, and the seconds that it took.

    Args:
        shown: names of logged figures; those that a task does not log are left out.
    """

    def __init__(self, *, shown: Sequence[str] = SHOWN) -> None:
        super().__init__()
        self.shown = tuple(shown)
        self._enabled = True
        self._started = 0.0
        self._validated = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def disable(self) -> None:
        """Print nothing; Lightning calls it on every process but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, also of an epoch that a resumed run is in the middle of."""
        self._started = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started, self._validated = time.perf_counter(), False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that this epoch has figures of its own; those of an earlier one are not printed again."""
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's line, with the figures of a validation where it had one."""
        if self._enabled:
            last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
            shown = [name for name in self.shown if self._validated or not name.startswith("val/")]
            line = format_figures(trainer.callback_metrics, shown)
            seconds = time.perf_counter() - self._started
            print(f"epoch {trainer.current_epoch + 1}{last}  {line}  {seconds:.1f} s", flush=True)


def format_figures(figures: Mapping[str, Tensor], shown: Sequence[str]) -> str:
    """Return ``"name value"`` of those in ``shown`` that exist, separated by two spaces; NaN prints as ``n/a``."""
    values = {name: float(figures[name]) for name in shown if name in figures}
    return "  ".join(f"{name} n/a" if value != value else f"{name} {value:.4f}" for name, value in values.items())
