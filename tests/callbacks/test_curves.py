"""Curves and confusion matrices: when they are drawn, and what of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from detseg.callbacks import Curves, curves
from detseg.callbacks.curves import confusion, pictures, precision_recall, proposal_recall, short
from detseg.metrics import MeanIoU, ProposalRecall
from tiny_task import TinyTask, fit


class Measured(TinyTask):
    """Has the tables of a detector with one class found and one without objects."""

    def on_validation_epoch_end(self):
        precision = torch.full((2, 101), float("nan"))
        precision[0] = torch.linspace(1, 0, 101)
        self.tables = {
            "val": {
                "box": {"map": torch.tensor(0.5), "precision_50": precision},
                "confusion": {"confusion": torch.tensor([[5, 1, 2], [0, 0, 0], [3, 0, 0]])},
            }
        }


def drawn(directory):
    return sorted(path.name for path in (directory / "pictures").glob("*.png"))


def test_drawn_every_n_epochs_and_at_the_end(tmp_path):
    fit(Measured(), tmp_path, Curves(every_n_epochs=2), epochs=5)
    epochs = [1, 3, 4]
    assert drawn(tmp_path) == [f"val_epoch_00{e}_{name}.png" for e in epochs for name in ("confusion", "pr_box")]


def test_the_last_ones_are_not_drawn_twice(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(curves, "pictures", lambda *given: calls.append(given) or {})
    fit(Measured(), tmp_path, Curves(every_n_epochs=2), epochs=4)
    assert len(calls) == 2 and calls[0][1] == ["class0", "class1"]


def test_loggers_get_the_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    fit(Measured(), tmp_path, Curves(every_n_epochs=1), epochs=2, logger=logger)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert set(events.Tags()["images"]) == {"val/confusion", "val/pr_box"}
    assert [event.step for event in events.Images("val/pr_box")] == [5, 11], "where the figures are"


def test_a_task_without_tables_draws_nothing(tmp_path):
    fit(TinyTask(), tmp_path, Curves(every_n_epochs=1), epochs=1)
    assert not (tmp_path / "pictures").exists()
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        Curves(every_n_epochs=0)


def test_what_a_segmenter_has():
    metric = MeanIoU(num_classes=3)
    metric.confusion += torch.tensor([[900_000, 10, 0], [3, 500, 7], [0, 0, 0]])
    found = pictures({"pixel": metric.compute()}, ["sky", "grass", "tree"])
    assert set(found) == {"confusion"} and found["confusion"].dtype == np.uint8


def test_colours_are_shares_of_rows_and_classes_without_objects_have_no_curve():
    matrix = np.array([[1, 0], [0, 1000]])
    picture = confusion(matrix, ["a", "b"])
    other = confusion(matrix * np.array([[7], [1]]), ["a", "b"])
    dark = [int((image.sum(axis=2) < 200).sum()) for image in (picture, other)]
    assert dark[0] == pytest.approx(dark[1], rel=0.05)  # as dark, whatever the counts
    precision = np.full((2, 101), np.nan)
    nothing = precision_recall(precision, ["a", "b"])
    precision[1] = 0.5
    one = precision_recall(precision, ["a", "b"])
    assert nothing.shape == one.shape and (nothing != one).any(axis=2).sum() > 1000


def test_many_classes_are_grey_and_without_numbers():
    many = np.tile(np.linspace(1, 0, 101), (40, 1))
    names = [f"class{k}" for k in range(40)]
    curve = precision_recall(many, names).astype(int)
    coloured = (curve.max(axis=2) - curve.min(axis=2) > 30).sum()
    assert coloured == 0
    assert max(confusion(np.eye(40, dtype=np.int64), names).shape) <= 1280


def test_counts_are_short():
    assert [short(n) for n in (0, 950, 12_345, 4_560_000, 7_000_000_000)] == ["0", "950", "12.3k", "4.56M", "7G"]


def test_proposals_have_a_picture_of_their_own():
    """It depends on the recall, and is empty of curves where there was no object to be found."""
    metric = ProposalRecall(limits=(10, 100))
    none = pictures({"proposal": metric.compute()}, ["a"])
    assert set(none) == {"proposals"}
    points = np.array([1, 10, 100])
    low, high = (proposal_recall(points, np.full((3, 10), recall)) for recall in (0.2, 0.9))
    assert low.shape == high.shape == none["proposals"].shape == (440, 1050, 3)
    coloured = [(image.max(axis=2).astype(int) - image.min(axis=2) > 60) for image in (low, high, none["proposals"])]
    # The axes run from row 40 or so, recall 1.02, to row 385 or so, recall 0.
    below, above = (coloured[0][rows].sum() - coloured[1][rows].sum() for rows in (slice(300, 340), slice(60, 100)))
    assert below > 300 and above < -300
    assert coloured[2].sum() < coloured[0].sum() / 2  # the legends alone
