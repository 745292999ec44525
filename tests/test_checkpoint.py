from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import detseg
import tiny_models
from detseg.allow import RefusedTarget
from detseg.checkpoint import build_plain, check_resume, init_from, load, read_stamp, without_downloads
from detseg.nn.weights import CheckpointMismatch
from detseg.stamp import make_stamp
from shared import REPO

MODEL = {"_target_": "tiny_models.BrightBox", "num_classes": 2, "threshold": 0.4, "weights": "COCO_V1"}


def save(path: Path, model: nn.Module, *, node: dict[str, Any] | None = None, names=("cat", "dog"), **stamp) -> Path:
    """Write what a run writes: the net under ``model.``, other state beside it, the stamp."""
    config = {"truth": "boxes", "model": MODEL if node is None else node, "data": {"size_divisor": 16}}
    made = make_stamp(config, class_names=names, category_ids=range(11, 11 + len(names)), num_classes=len(names))
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, "meters.count": torch.zeros(1)}, "detseg": {**made, **stamp}, "epoch": 3}, path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = tiny_models.BrightBox(num_classes=2, threshold=0.25)
    return save(tmp_path / "best.ckpt", model)


def test_load_rebuilds_the_model_with_its_weights(path):
    predictor = load(path, allow=["tiny_models"])
    assert isinstance(predictor.model, tiny_models.BrightBox)
    assert predictor.model.threshold.item() == 0.25  # the file's, not the config's 0.4
    assert predictor.model.weights is None  # nothing is downloaded
    assert (predictor.class_names, predictor.category_ids) == (["cat", "dog"], [11, 12])
    assert predictor.size_divisor == 16 and not predictor.training


def test_load_of_a_real_model_is_the_model(tmp_path):
    from detseg.models import UNet

    sizes = {"num_classes": 2, "width": 4, "depth": 2, "padding": True}
    model, node = UNet(**sizes).eval(), {"_target_": "detseg.models.UNet", **sizes}
    loaded = detseg.load(save(tmp_path / "unet.ckpt", model, node=node, truth="semantic"))
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert_close(loaded.model(images), model(images), rtol=0, atol=0)


def test_a_target_outside_the_allowed_packages_is_refused_before_anything_is_called(path, tmp_path):
    with pytest.raises(RefusedTarget, match=r"tiny_models\.BrightBox"):
        load(path)
    tiny_models.CALLED.clear()
    node = {
        "_target_": "torch.nn.Sequential",
        "_args_": [{"_target_": "tiny_models.trap"}, {"_target_": "os.system", "command": "true"}],
    }
    bad = save(tmp_path / "bad.ckpt", nn.Identity(), node=node)
    with pytest.raises(RefusedTarget, match=r"os\.system"):
        load(bad, allow=["tiny_models"])
    assert tiny_models.CALLED == []
    transform = {"_target_": "detseg.data.cache.os.system", "command": "true"}
    with pytest.raises(RefusedTarget, match="the module os"):
        load(
            save(tmp_path / "bad.ckpt", tiny_models.BrightBox(num_classes=2), eval_transform=transform),
            allow=["tiny_models"],
        )


def test_resume_takes_the_same_model_and_the_same_classes_alone(path):
    model = tiny_models.BrightBox(num_classes=2, threshold=0.5)
    check_resume(model, path, ["cat", "dog"])
    with pytest.raises(
        CheckpointMismatch, match=r"resume=.*trained for cat, dog, the data have dog, cat\. .*init_from"
    ):
        check_resume(model, path, ["dog", "cat"])
    with pytest.raises(CheckpointMismatch, match=r"keys only in the model: weight.* instead of resume"):
        check_resume(nn.Linear(1, 1), path, ["cat", "dog"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"import torch", "cannot be read with weights_only=True"),
        (b"PK\x03\x04 cut short", "is damaged"),
    ],
)
def test_a_file_that_is_none_gets_no_unsafe_advice(tmp_path, content, said):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.ckpt {said}") as caught:
        load(tmp_path / "x.ckpt")
    assert "False" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_with_objects_is_not_opened(tmp_path):
    torch.save({"state_dict": {}, "thing": tiny_models.BrightBox(num_classes=1)}, tmp_path / "objects.ckpt")
    with pytest.raises(ValueError, match=r"objects\.ckpt cannot be read with weights_only=True"):
        load(tmp_path / "objects.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        load(tmp_path / "broken.ckpt")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt does not exist"):
        load(tmp_path / "nothing.ckpt")
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"no stamp.*state_dict, epoch.*CheckpointStamp.*init_from"):
        load(tmp_path / "other.ckpt")
    torch.save({"detseg": make_stamp(None, class_names=["a"])}, tmp_path / "hand.ckpt")
    with pytest.raises(ValueError, match=r"stamp has no model.*built by hand.*init_from"):
        load(tmp_path / "hand.ckpt")
    later = make_stamp(None, class_names=["a"]) | {"format": 99}
    torch.save({"detseg": later}, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match=r"format 99, this detseg reads 1"):
        read_stamp(tmp_path / "later.ckpt")


def test_weights_that_do_not_fit_show_both_sides(tmp_path):
    path = save(tmp_path / "a.ckpt", tiny_models.BrightBox(num_classes=3))  # stamped as two classes
    with pytest.raises(CheckpointMismatch, match=r"head\.weight \(3, 2\) in the file, \(2, 2\) in the model"):
        load(path, allow=["tiny_models"])
    path = save(tmp_path / "b.ckpt", nn.Linear(1, 1))
    with pytest.raises(
        CheckpointMismatch, match=r"keys only in the model: .*head\.weight.*keys only in the file: weight"
    ):
        load(path, allow=["tiny_models"])


def test_init_from_wants_the_same_classes(path):
    model = tiny_models.BrightBox(num_classes=4)
    with pytest.raises(CheckpointMismatch, match=r"2 classes \(cat, dog\), the model has 4.*drop_head"):
        init_from(model, path)
    same = tiny_models.BrightBox(num_classes=2)
    assert init_from(same, path) == []
    assert float(same.threshold.detach()) == 0.25


def test_init_from_with_drop_head_keeps_the_body_and_a_new_head(path):
    source = load(path, allow=["tiny_models"]).model
    model = tiny_models.BrightBox(num_classes=4)
    before = model.head.weight.detach().clone()
    assert sorted(init_from(model, path, drop_head=True)) == ["head.bias", "head.weight"]
    assert torch.equal(model.backbone.weight, source.backbone.weight)
    assert torch.equal(model.head.weight, before) and float(model.threshold.detach()) == 0.25
    model.backbone = nn.Linear(3, 3)
    with pytest.raises(CheckpointMismatch, match=r"backbone\.weight"):
        init_from(model, path, drop_head=True)


def test_init_from_reads_a_plain_state_dict(tmp_path):
    source, model = tiny_models.BrightBox(num_classes=2), tiny_models.BrightBox(num_classes=2)
    torch.save(source.state_dict(), tmp_path / "state.pth")
    init_from(model, tmp_path / "state.pth")
    assert torch.equal(model.head.weight, source.head.weight)


def test_downloads_are_taken_out_and_numbers_stay():
    node = {
        "weights": "COCO_V1",
        "backbone": {"weights": "default", "body": {"encoder_weights": "imagenet", "pretrained": True}},
        "coder": {"weights": [10.0, 10.0, 5.0, 5.0]},
        "losses": [{"class_weights": [1, 2]}, {"weights_backbone": "x"}],
    }
    assert without_downloads(node) == {
        "weights": None,
        "backbone": {"weights": None, "body": {"encoder_weights": None, "pretrained": False}},
        "coder": {"weights": [10.0, 10.0, 5.0, 5.0]},
        "losses": [{"class_weights": [1, 2]}, {"weights_backbone": None}],
    }


def test_building_from_plain_values():
    net = build_plain(
        {
            "_target_": "torch.nn.Sequential",
            "_args_": [{"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3, "_convert_": "all"}],
        }
    )
    assert net[0].weight.shape == (3, 2)
    later = build_plain({"_target_": "torch.nn.Linear", "_partial_": True, "in_features": 5})
    assert later(out_features=1).weight.shape == (1, 5)
    assert build_plain([1, {"a": None}]) == [1, {"a": None}]
    assert build_plain("${oc.env:HOME}") == "${oc.env:HOME}"  # nothing is interpolated
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear\(width\)"):
        build_plain({"_target_": "torch.nn.Linear", "width": 1})


@pytest.mark.slow
@pytest.mark.parametrize("choice", sorted(path.stem for path in (REPO / "conf" / "model").glob("*_small.yaml")))
def test_a_real_run_can_be_loaded(choice, in_tmp):
    """From config through Trainer, averaged weights and checkpoint to a prediction, for every family."""
    images = ["data.train_images=16", "data.val_images=4", "data.batch_size=4", "data.num_workers=0"]
    cfg = detseg.load_config(
        f"model={choice}",
        "callbacks=[default,ema]",
        *images,
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.accelerator=cpu",
    )
    run = detseg.build(cfg)
    run.trainer.fit(run.task, run.data)
    best = Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt"
    loaded = detseg.load(best)
    assert loaded.class_names == list(run.data.class_names)
    trained = run.task.model.eval()
    images = torch.rand(1, 3, 128, 128)
    with torch.inference_mode():
        ours = trained.predict(trained(images), torch.tensor([[128, 128]]))[0]
        theirs = loaded.model.predict(loaded.model(images), torch.tensor([[128, 128]]))[0]
    fields = ("labels",) if hasattr(ours, "ignore_index") else ("boxes", "scores", "labels")
    for name in fields:
        assert_close(getattr(theirs, name), getattr(ours, name), rtol=0, atol=0)
    photo = torch.randint(0, 255, (3, 90, 120), dtype=torch.uint8)
    found = loaded(photo)
    assert len(found) == 1
    if hasattr(found[0], "boxes"):
        assert bool((found[0].boxes[:, 2] <= 120).all()) and bool((found[0].boxes[:, 3] <= 90).all())
    else:
        assert found[0].size == (90, 120)
