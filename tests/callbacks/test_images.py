from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor

from detseg.callbacks import ImageLogger, wandb_logger
from detseg.callbacks.images import WIDEST, pair
from detseg.callbacks.overlays import Shown, wandb_overlays
from detseg.data import DetectionEval, Orchard
from detseg.structures import Batch, Detections, SemanticMap, Target


class Oracle(L.LightningModule):
    """Answers with the truth, in the photo's own pixels, as the tasks do."""

    def __init__(self, class_names: list[str], truth: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.class_names, self.truth = class_names, truth

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> list[Any]:
        truths = batch.truths or batch.targets
        if self.truth == "semantic":
            return [truth.semantic for truth in truths]
        return [Detections(t.boxes, torch.full((len(t),), 0.75), t.labels, t.masks) for t in truths]

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def orchard(truth: str, **options: Any) -> Orchard:
    return Orchard(
        truth=truth, train_images=2, val_images=5, test_images=3, batch_size=2, num_workers=0, image_size=64, **options
    )


def trainer(root: Path, callback: L.Callback, loggers: list[Logger], epochs: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[callback], logger=loggers, default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=1,
        limit_train_batches=1,
    )  # fmt: skip


def fit(root: Path, truth: str, callback: L.Callback, loggers: list[Logger] = [], epochs: int = 1) -> L.Trainer:  # noqa: B006
    data = orchard(truth)
    run = trainer(root, callback, loggers, epochs)
    run.fit(Oracle(data.class_names, truth), data)
    return run


def test_sheets_of_every_epoch_go_to_the_run(tmp_path: Path) -> None:
    fit(tmp_path, "boxes", ImageLogger(dirpath=tmp_path / "seen", images=3), epochs=2)
    sheets = sorted((tmp_path / "seen").iterdir())
    assert [sheet.name for sheet in sheets] == ["val_epoch_000.png", "val_epoch_001.png"]
    first, second = (np.array(Image.open(sheet)) for sheet in sheets)
    np.testing.assert_array_equal(first, second)  # the same images, and the oracle's answers do not change
    tall, wide = first.shape[:2]
    assert wide == 2 * (2 * 320 + 4) + 8, "two pairs beside each other, 64 px images enlarged fivefold"
    assert 2 * 320 < tall < 2 * 380, "three pairs in two rows"


@pytest.mark.parametrize(("every", "drawn"), [(2, [1, 3, 4]), (10, [4])])
def test_every_nth_and_the_last_epoch_are_drawn(tmp_path: Path, every: int, drawn: list[int]) -> None:
    fit(tmp_path, "boxes", ImageLogger(every_n_epochs=every, images=1), epochs=5)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"val_epoch_{epoch:03d}.png" for epoch in drawn]


def test_evaluation_draws_once_per_split(tmp_path: Path) -> None:
    data = orchard("boxes")
    module = Oracle(data.class_names, "boxes")
    run = trainer(tmp_path, ImageLogger(images=2), [])
    run.validate(module, data, verbose=False)
    run.test(module, data, verbose=False)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["test.png", "val.png"]


def test_no_images_draws_nothing(tmp_path: Path) -> None:
    fit(tmp_path, "boxes", ImageLogger(images=0))
    assert not (tmp_path / "pictures").exists()


def test_predictions_return_to_the_pixels_of_the_picture(tmp_path: Path) -> None:
    # The data are shown at 96 px while truths and predictions are in the photo's 64: drawn, the two must coincide.
    for truth in ("instances", "semantic"):
        data = orchard(truth, eval_transform=DetectionEval(size=(96, 96)))
        callback = ImageLogger(images=4)
        batch = next(iter(data.val_dataloader()))
        callback._keep(Oracle(data.class_names, truth).validation_step(batch, 0), batch)
        assert len(callback._shown) == 2 and callback._shown[0].image.shape == (96, 96, 3)
        for item in callback._shown:
            if isinstance(item.found, SemanticMap):
                assert item.target.semantic is not None and item.found.size == (96, 96)
                assert (item.found.labels == item.target.semantic.labels).float().mean() > 0.99
            else:
                assert len(item.target) and item.found.masks is not None and item.target.masks is not None
                torch.testing.assert_close(item.found.boxes, item.target.boxes, atol=1e-3, rtol=0)
                assert (item.found.masks == item.target.masks).float().mean() > 0.98


def test_tensorboard_gets_the_sheet(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(
        tmp_path, "semantic", ImageLogger(images=2), [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path)]
    )
    events = EventAccumulator(str(run.loggers[0].log_dir), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["val/pictures"]
    (image,) = events.Images("val/pictures")
    written = np.array(Image.open(tmp_path / "pictures" / "val_epoch_000.png"))
    assert (image.height, image.width) == written.shape[:2]


def test_mlflow_gets_the_sheet_as_an_artifact(tmp_path: Path) -> None:
    logger = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    fit(tmp_path, "boxes", ImageLogger(images=1), [logger])
    (artifact,) = (tmp_path / "artifacts").rglob("*.png")
    assert artifact.parent.name == "pictures"
    assert artifact.read_bytes() == (tmp_path / "pictures" / "val_epoch_000.png").read_bytes()


def test_wandb_gets_boxes_and_masks_as_its_own_overlays(tmp_path: Path) -> None:
    logger = wandb_logger(save_dir=tmp_path, offline=True)
    try:
        fit(tmp_path, "instances", ImageLogger(images=2), [logger])
        media = tmp_path / "wandb"
        images = list(media.rglob("media/images/val/pictures*.png"))
        masks = list(media.rglob("media/images/mask/**/*.png"))
        boxes = [json.loads(path.read_text()) for path in media.rglob("*.boxes2D.json")]
    finally:
        logger.experiment.finish()
    assert len(images) == 2 and all(Image.open(path).size == (64, 64) for path in images)
    assert len(boxes) == 4, "truth and prediction of two images"
    assert len(masks) == 2, "the oracle's masks are the truth's, and wandb keeps equal files once"
    target = orchard("instances").dataset("val")[0].target
    captions = [[box["box_caption"] for box in entry["box_data"]] for entry in boxes]
    names = [["apple", "pear", "orange"][label] for label in target.labels.tolist()]
    assert names in captions and [f"{name} 0.75" for name in names] in captions


def objects() -> tuple[Target, Detections]:
    masks = torch.zeros((2, 4, 4), dtype=torch.bool)
    masks[0, :2], masks[1, 1:3] = True, True
    boxes = torch.tensor([[0.0, 0, 4, 2], [0, 1, 4, 3]])
    labels = torch.tensor([1, 0])
    target = Target(boxes=boxes, labels=labels, masks=masks, image_id=9)
    return target, Detections(boxes, torch.tensor([0.9, 0.1]), labels, masks)


def test_overlays_of_instances() -> None:
    target, found = objects()
    overlays = wandb_overlays([Shown(np.zeros((4, 4, 3), np.uint8), target, found)], ["a", "b"], 0.5)
    assert overlays["caption"] == ["9"]
    (masks,) = overlays["masks"]
    np.testing.assert_array_equal(masks["ground_truth"]["mask_data"][:, 0], [2, 2, 1, 0])  # label + 1, the first on top
    np.testing.assert_array_equal(masks["prediction"]["mask_data"][:, 0], [2, 2, 0, 0])  # the second scores too little
    assert masks["prediction"]["class_labels"] == {0: "background", 1: "a", 2: "b"}
    (boxes,) = overlays["boxes"]
    assert len(boxes["ground_truth"]["box_data"]) == 2
    (box,) = boxes["prediction"]["box_data"]
    assert box["position"] == {"minX": 0.0, "minY": 0.0, "maxX": 4.0, "maxY": 2.0} and box["domain"] == "pixel"
    assert box["class_id"] == 1 and box["box_caption"] == "b 0.90"
    assert box["scores"]["score"] == pytest.approx(0.9)


def test_overlays_of_maps_and_of_boxes_alone() -> None:
    target, found = objects()
    semantic = SemanticMap(torch.tensor([[0, 1], [255, 1]]))
    image = np.zeros((2, 2, 3), np.uint8)
    overlays = wandb_overlays(
        [Shown(image, Target(target.boxes, target.labels, semantic=semantic), semantic)], ["a", "b"], 0
    )
    assert "boxes" not in overlays
    shown = overlays["masks"][0]["prediction"]
    np.testing.assert_array_equal(shown["mask_data"], [[0, 1], [255, 1]])
    assert shown["class_labels"] == {0: "a", 1: "b", 255: "no class"}
    bare = Shown(image, Target(target.boxes, target.labels), Detections(found.boxes, found.scores, found.labels))
    assert set(wandb_overlays([bare], ["a", "b"], 0)) == {"caption", "boxes"}


def test_wide_pairs_are_made_smaller() -> None:
    target = Target(boxes=torch.zeros((0, 4)), labels=torch.zeros(0, dtype=torch.int64))
    image = np.full((500, 1000, 3), 7, np.uint8)
    picture = pair(Shown(image, target, Detections.empty()), ["a"], 0.3)
    assert picture.shape[1] == WIDEST and 240 < picture.shape[0] < 265


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images=-1.*at least 0"):
        ImageLogger(images=-1)
    with pytest.raises(ValueError, match="every_n_epochs=0 at least 1"):
        ImageLogger(every_n_epochs=0)
