"""Train, evaluate and predict from the command line, on a tiny Orchard, with all that they leave behind."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

from detseg.cli.main import main
from drawn_data import scenes, write_voc

TINY = [
    "trainer=cpu",
    "data.train_images=4",
    "data.val_images=3",
    "data.test_images=2",
    "data.batch_size=2",
    "data.num_workers=0",
    "data.image_size=64",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
]


def only_run(directory: Path) -> Path:
    """Return the run directory with the latest id below ``directory``/runs."""
    return max((path.parent for path in directory.glob("runs/*/*/environment.json")), key=lambda path: path.name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train Mask R-CNN and U-Net once for this file; return their run directories."""
    runs = {}
    for model in ("mask_rcnn_small", "unet_small"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp(model))
            assert main(["train", f"model={model}", *TINY]) == 0
            runs[model] = only_run(Path.cwd())
    return runs


def checkpoint(run: Path) -> str:
    return str(run / "checkpoints" / "best.ckpt")


class TestTrain:
    def test_leaves_config_environment_figures_pictures_and_checkpoints(self, trained: dict[str, Path]):
        run = trained["unet_small"]
        resolved = yaml.safe_load((run / "resolved.yaml").read_text())
        assert resolved["model"]["num_classes"] == 5 and resolved["seed"] == 1
        environment = json.loads((run / "environment.json").read_text())
        assert (
            environment["versions"]["torch"] == torch.__version__.partition("+")[0] or environment["versions"]["torch"]
        )
        assert {"commit", "command", "platform"} <= environment.keys()
        rows = list(csv.DictReader((run / "csv" / "metrics.csv").open()))
        assert [row for row in rows if row["val/miou"]] and [row for row in rows if row["train/loss"]]
        assert list((run / "pictures").glob("*.png"))
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}

    def test_figures_of_the_end_are_those_of_the_best_checkpoint(self, trained: dict[str, Path]):
        run = trained["unet_small"]
        figures = json.loads((run / "metrics.json").read_text())
        rows = list(csv.DictReader((run / "csv" / "metrics.csv").open()))
        logged = next(float(row["val/miou"]) for row in rows if row["val/miou"])
        assert figures["miou"] == pytest.approx(logged, abs=1e-6) and 0 <= figures["iou/grass"] <= 1

    def test_a_run_directory_is_its_name_and_id(self, trained: dict[str, Path]):
        run = trained["mask_rcnn_small"]
        assert run.parent.name == "orchard-mask_rcnn_small" and len(run.name) == 24

    def test_resume_goes_on_and_init_from_starts_anew(
        self, trained: dict[str, Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
    ):
        last = trained["unet_small"] / "checkpoints" / "last.ckpt"
        before = torch.load(last, weights_only=True)
        quick = [*TINY, "callbacks.images=null", "evaluate_after=false", "model=unet_small"]
        assert main(["train", *quick, f"resume={last}", "trainer.max_epochs=2", "name=resumed"]) == 0
        after = torch.load(only_run(in_tmp) / "checkpoints" / "last.ckpt", weights_only=True)
        assert (before["global_step"], after["global_step"]) == (2, 4)
        assert main(["train", *quick, f"init_from={last}", "trainer.max_epochs=1", "name=anew"]) == 0
        anew = torch.load(next(in_tmp.glob("runs/anew/*/checkpoints/last.ckpt")), weights_only=True)
        assert anew["global_step"] == 2 and anew["epoch"] == before["epoch"]
        capsys.readouterr()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_resume_is_exact(self, workers: int, in_tmp: Path):
        """The order of images and what a two-stage loss samples: with workers, which read ahead, and without."""
        options = ["model=faster_rcnn_small", "scheduler=constant", "callbacks.images=null", "evaluate_after=false"]
        both = ["train", *TINY, *options, f"data.num_workers={workers}"]
        assert main([*both, "trainer.max_epochs=2", "name=whole"]) == 0
        assert main([*both, "trainer.max_epochs=1", "name=half"]) == 0
        (last,) = in_tmp.glob("runs/half/*/checkpoints/last.ckpt")
        assert main([*both, "trainer.max_epochs=2", "name=rest", f"resume={last}"]) == 0
        losses = {}
        for name in ("whole", "rest"):
            rows = list(csv.DictReader(next(in_tmp.glob(f"runs/{name}/*/csv/metrics.csv")).open()))
            losses[name] = [(row["step"], row["train/loss"]) for row in rows if row["train/loss"]]
        assert len(losses["rest"]) == 2 and losses["rest"] == losses["whole"][2:]

    def test_resume_says_what_it_cannot_do(
        self, trained: dict[str, Path], in_tmp: Path, capsys: pytest.CaptureFixture[str], caplog: Any
    ):
        last = trained["unet_small"] / "checkpoints" / "last.ckpt"
        assert main(["train", *TINY, "model=mask_rcnn_small", f"resume={last}"]) == 1
        said = capsys.readouterr().err
        assert "resume=" in said and "sky" in said and "apple" in said and "init_from" in said
        assert main(["train", *TINY, "model=unet_small", f"resume={last}", f"init_from={last}"]) == 2
        assert "set one of them" in capsys.readouterr().err
        quick = [*TINY, "model=unet_small", "callbacks.images=null", "evaluate_after=false"]
        assert main(["train", *quick, f"resume={last}"]) == 0
        assert "nothing was trained; raise trainer.max_epochs" in caplog.text + capsys.readouterr().out

    def test_sweep_has_a_directory_per_trial_named_by_what_varies(self, in_tmp: Path):
        quick = [*TINY, "callbacks=none", "logger=none", "trainer.limit_train_batches=1", "data.val_images=1"]
        assert main(["train", "-m", "model=unet_small", "seed=1,2", *quick]) == 0
        trials = sorted(path.parent for path in in_tmp.glob("runs/*/*/*/resolved.yaml"))
        assert [trial.name for trial in trials] == ["seed=1", "seed=2"] and trials[0].parent == trials[1].parent
        assert [yaml.safe_load((trial / "resolved.yaml").read_text())["seed"] for trial in trials] == [1, 2]

    def test_a_checkpoint_of_a_sweep_is_named_as_it_lies(self, trained: dict[str, Path], in_tmp: Path):
        trial = in_tmp / "runs" / "x" / "model=unet_small,seed=2" / "é (1)"
        shutil.copytree(trained["unet_small"] / "checkpoints", trial)
        ckpt = trial / "best.ckpt"
        assert main(["evaluate", f"ckpt={ckpt}"]) == 0
        quick = [*TINY, "model=unet_small", "callbacks=none", "evaluate_after=false", "trainer.limit_train_batches=1"]
        assert main(["train", *quick, f"init_from={ckpt}", "name=anew"]) == 0

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_broken_image_is_named_in_one_line(self, workers: int, in_tmp: Path, capsys: pytest.CaptureFixture[str]):
        for split in ("train", "val"):
            write_voc(in_tmp, scenes(), split)
        whole = in_tmp / "JPEGImages" / "train_2.png"
        Image.open(whole).save(whole.with_suffix(".jpg"))
        whole.unlink()
        content = whole.with_suffix(".jpg").read_bytes()
        whole.with_suffix(".jpg").write_bytes(content[: len(content) // 2])
        options = ["trainer=cpu", "trainer.max_epochs=1", "callbacks=none", "logger=none", "data.batch_size=1"]
        assert main(["train", "data=voc", f"data.root={in_tmp}", *options, f"data.num_workers={workers}"]) == 1
        first, second = capsys.readouterr().err.strip().splitlines()[-2:]
        assert first.startswith("detseg: ") and "train_2.jpg: the image cannot be decoded" in first
        assert second.startswith("(DataError;")


class TestEvaluate:
    def test_boxes_and_masks_in_cocos_format(self, trained: dict[str, Path], in_tmp: Path):
        assert main(["evaluate", f"ckpt={checkpoint(trained['mask_rcnn_small'])}", "voc_ap=2007"]) == 0
        run = only_run(in_tmp)
        rows = json.loads((run / "predictions.json").read_text())
        assert rows and {"image_id", "category_id", "bbox", "score", "segmentation"} == rows[0].keys()
        assert all(len(row["bbox"]) == 4 and 0 <= row["score"] <= 1 for row in rows)
        assert {row["image_id"] for row in rows} <= {0, 1, 2}
        assert rows[0]["segmentation"]["size"] == [64, 64] and isinstance(rows[0]["segmentation"]["counts"], str)
        figures = json.loads((run / "metrics.json").read_text())
        trained_figures = json.loads((trained["mask_rcnn_small"] / "metrics.json").read_text())
        assert figures["map"] == pytest.approx(trained_figures["map"]) and "mask_map" in figures
        assert "voc_map" in figures and "voc_map" not in trained_figures
        assert figures["loss"] == pytest.approx(trained_figures["loss"])

    def test_another_split_of_other_data(self, trained: dict[str, Path], in_tmp: Path):
        ckpt = checkpoint(trained["mask_rcnn_small"])
        assert main(["evaluate", f"ckpt={ckpt}", "split=test", "data.eval_batch_size=1"]) == 0
        other = ["data=orchard", "data.image_size=64", "data.val_images=1", "data.num_workers=0"]
        assert main(["evaluate", f"ckpt={ckpt}", *other, "name=other"]) == 0
        resolved = yaml.safe_load(next(in_tmp.glob("runs/other/*/resolved.yaml")).read_text())
        assert resolved["data"]["truth"] == "instances" and resolved["data"]["train_images"] == 800
        assert resolved["data"]["eval_transform"]["_target_"].endswith("DetectionEval")

    def test_voc_ap_needs_boxes(self, trained: dict[str, Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]):
        assert main(["evaluate", f"ckpt={checkpoint(trained['unet_small'])}", "voc_ap=2010"]) == 2
        assert "voc_ap" in capsys.readouterr().err

    def test_other_data_are_resized_as_the_checkpoints_own(self, in_tmp: Path, capsys: pytest.CaptureFixture[str]):
        quick = ["model=unet_small", "callbacks.images=null", "data.eval_transform.size=[32,32]"]
        assert main(["train", *TINY, *quick]) == 0
        ckpt = checkpoint(only_run(in_tmp))
        small = ["data=orchard", "data.image_size=64", "data.val_images=2", "data.num_workers=0"]
        assert main(["evaluate", f"ckpt={ckpt}", *small, "name=same"]) == 0
        assert main(["evaluate", f"ckpt={ckpt}", *small, "data.eval_transform.size=[64,64]", "name=other"]) == 0
        for name, size in {"same": [32, 32], "other": [64, 64]}.items():
            resolved = yaml.safe_load(next(in_tmp.glob(f"runs/{name}/*/resolved.yaml")).read_text())
            assert resolved["data"]["eval_transform"]["size"] == size

    def test_segmenters_are_asked_by_windows_or_refined(self, trained: dict[str, Path], in_tmp: Path):
        ckpt, figures = checkpoint(trained["unet_small"]), {}
        for name, more in {
            "plain": [],
            "sliding": ["inference=sliding", "inference.window=40"],
            "crf": ["inference=crf", "inference.refine.iterations=2"],
        }.items():
            assert main(["evaluate", f"ckpt={ckpt}", f"name={name}", *more]) == 0
            figures[name] = json.loads(next(in_tmp.glob(f"runs/{name}/*/metrics.json")).read_text())
        assert figures["plain"]["loss"] == figures["sliding"]["loss"] == figures["crf"]["loss"]
        assert len({row["pixel_accuracy"] for row in figures.values()}) == 3

    def test_a_detector_cannot_be_asked_so(
        self, trained: dict[str, Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
    ):
        assert main(["evaluate", f"ckpt={checkpoint(trained['mask_rcnn_small'])}", "inference=crf"]) == 2
        assert "MaskRCNN is no semantic segmenter" in capsys.readouterr().err

    def test_maps_as_index_pngs(self, trained: dict[str, Path], in_tmp: Path):
        assert main(["evaluate", f"ckpt={checkpoint(trained['unet_small'])}"]) == 0
        rows = json.loads((only_run(in_tmp) / "predictions.json").read_text())
        maps = [np.asarray(Image.open(row["map"])) for row in rows]
        assert [row["image_id"] for row in rows] == [0, 1, 2]
        assert all(labels.shape == (64, 64) and labels.max() <= 4 for labels in maps)


class TestPredict:
    @pytest.fixture
    def photos(self, in_tmp: Path) -> Path:
        folder = in_tmp / "photos"
        folder.mkdir()
        for name, size in (("a.png", (80, 60)), ("b.JPG", (48, 96))):
            noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name)
        (folder / "notes.txt").write_text("no photo")
        return folder

    def test_a_folder_of_photos_in_their_own_pixels(self, trained: dict[str, Path], photos: Path, in_tmp: Path):
        ckpt = checkpoint(trained["mask_rcnn_small"])
        assert main(["predict", f"ckpt={ckpt}", f"source={photos}", "threshold=0.0"]) == 0
        run = next(in_tmp.glob("runs/predict/*"))
        rows = json.loads((run / "predictions.json").read_text())
        assert {Path(row["file"]).name for row in rows} <= {"a.png", "b.JPG"} and rows
        assert {row["category"] for row in rows} <= {"apple", "pear", "orange"}
        sizes = {Path(row["file"]).name: row["segmentation"]["size"] for row in rows}
        assert all(sizes[name] == {"a.png": [60, 80], "b.JPG": [96, 48]}[name] for name in sizes)
        assert {path.name for path in (run / "pictures").iterdir()} == {"a.png", "b.png"}

    def test_a_glob_and_maps(self, trained: dict[str, Path], photos: Path, in_tmp: Path):
        source = f"source='{photos}/*.png'"
        assert (
            main(
                [
                    "predict",
                    f"ckpt={checkpoint(trained['unet_small'])}",
                    source,
                    "pictures=false",
                    "inference=multi_scale",
                ]
            )
            == 0
        )
        (row,) = json.loads(next(in_tmp.glob("runs/predict/*/predictions.json")).read_text())
        assert np.asarray(Image.open(row["map"])).shape == (60, 80)
        assert not list(in_tmp.glob("runs/predict/*/pictures"))


def test_every_photo_has_files_of_its_own(tmp_path: Path):
    from detseg.prediction import _predictions

    paths = [tmp_path / name for name in ("a.jpg", "a_2.jpg", "b/a.jpg", "c/a.jpg", "a_1.jpg")]
    named = _predictions(lambda group, batch_size: group, paths, 2)  # type: ignore[arg-type]
    assert [name for _, name, _ in named] == ["a", "a_2", "a_1", "a_3", "a_1_1"]


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, code, said",
        [
            (["train", "model=unet_small", "trainer.max_epoch=1"], 2, "Did you mean trainer.max_epochs"),
            (["train", "model=unett_small"], 2, "Did you mean unet_small"),
            (["train", "unet_small"], 2, "detseg: 'unet_small' has no value: write key=value. Did you mean model="),
            (["train", "--cfg", "job", "seed=[1"], 2, "at input '[1'"),
            (["train", "model=unet_small", "resume=nowhere.ckpt"], 2, "resume=nowhere.ckpt: there is no such file"),
            (["train", "model=unet_small", "data.truth=boxen"], 1, "data.truth='boxen'"),
            (["train", "data=coco"], 2, "data.root has no default: give data.root=..."),
            (["train", "data.eval_transform.size=64"], 1, "size must be [height, width] in pixels"),
            (["train", "trainer.fast_dev_run=-1"], 2, "trainer: fast_dev_run"),
            (["evaluate", "ckpt=nowhere.ckpt"], 2, "nowhere.ckpt does not exist"),
            (["evaluate"], 2, "which checkpoint?"),
            (["evaluate", "-m", "ckpt=a"], 2, "takes key=value and --help, not -m"),
            (["predict", "ckpt=a.ckpt"], 2, "needs source=..."),
            (["predict", "ckpt=a.ckpt", "source=nowhere"], 2, "source=nowhere: no such file"),
            (["predict", "ckpt=a.ckpt", "sauce=x"], 2, "Did you mean source?"),
        ],
    )
    def test_one_line_and_an_exit_code(
        self, arguments: list[str], code: int, said: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
    ):
        assert main(arguments) == code
        text = capsys.readouterr().err
        assert said in text and "Traceback" not in text and text.startswith("detseg: ")

    def test_another_number_of_classes(
        self, trained: dict[str, Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
    ):
        ckpt = checkpoint(trained["unet_small"])
        assert main(["train", "model=mask_rcnn_small", *TINY, f"init_from={ckpt}"]) == 1
        said = capsys.readouterr().err
        assert "5 classes" in said and "3" in said and "drop_head=true" in said


def test_same_seed_gives_bitwise_equal_losses(in_tmp: Path):
    """Two whole runs, augmentation and validation included, against a third from another seed."""
    import detseg

    losses = []
    for seed in (1, 1, 2):
        cfg = detseg.load_config("model=fcos_small", f"seed={seed}", *TINY, "trainer.max_epochs=2", "callbacks=none")
        run = detseg.build(cfg)
        run.trainer.fit(run.task, run.data)
        rows = list(csv.DictReader((Path(cfg.paths.output_dir) / "csv" / "metrics.csv").open()))
        losses.append([(row["train/loss"], row["val/loss"]) for row in rows])
        values = [float(value) for pair in losses[-1] for value in pair if value]
        assert len(values) == 6 and all(math.isfinite(value) for value in values)
    assert losses[0] == losses[1] != losses[2]


def test_stamp_rebuilds_the_trained_model(trained: dict[str, Path]):
    import detseg

    predictor = detseg.load(checkpoint(trained["unet_small"]))
    saved = torch.load(checkpoint(trained["unet_small"]), weights_only=True)["state_dict"]
    for name, value in predictor.model.named_parameters():
        assert_close(value.detach(), saved[f"model.{name}"], rtol=0, atol=0)
