"""What follows R-CNN's training: the stages from one command, killed between and within them."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from detseg.checkpoint import load
from detseg.config import ConfigError, build, load_config
from detseg.durable import check_seal
from detseg.engine import stages
from detseg.engine.stages import check_stages, fit_stages, key_of, stages_of
from detseg.experiment import Outcome, begin, train
from detseg.models.svm_branch import SVMBranch

QUICK = [
    "trainer=cpu",
    "model=rcnn_small",
    "model.proposer.mode=single",
    "model.proposer.limit=40",
    "model.box.pooling.output_size=32",
    "model.box.pooling.context=4",
    "model.box.head.backbone.widths=[16,32,64]",
    "model.box.head.backbone.stem=8",
    "data.train_images=12",
    "data.val_images=4",
    "data.batch_size=4",
    "data.eval_batch_size=4",
    "data.num_workers=0",
    "data.image_size=64",
    "trainer.max_epochs=2",
    "callbacks.images=null",
    "callbacks.curves=null",
]


def run_of(in_tmp: Path) -> Path:
    (found,) = {path.parent for path in in_tmp.glob("runs/*/*/resolved.yaml")}
    return found


def state(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=True)
    return {key.removeprefix("model."): value for key, value in content["state_dict"].items()}


def go(*overrides: str) -> Outcome:
    return train(load_config(*QUICK, *overrides))


def test_one_command_trains_fits_and_measures(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    outcome = go()
    run = run_of(in_tmp)
    best, last, before = (run / "checkpoints" / name for name in ("best.ckpt", "last.ckpt", "last-1.ckpt"))
    assert outcome.checkpoint == best and best.samefile(last) and check_seal(best) is not None
    fitted, tuned = state(best), state(before)
    assert bool(fitted["box.svms.fitted"]) and bool(fitted["box.ridge.fitted"]) and not bool(tuned["box.svms.fitted"])
    assert fitted["box.svms.weight"].abs().sum() > 0 and fitted["box.ridge.weight"].abs().sum() > 0
    for key in tuned:
        if not key.startswith(stages.FITTED):
            assert_close(fitted[key], tuned[key], rtol=0, atol=0)
    (place,) = (run / "stages").iterdir()
    assert sorted(path.name for path in place.iterdir()) == ["features.pt", "ridge.pt", "svm.pt"]
    # What was measured is the fitted model, and loggers know.
    assert json.loads((run / "metrics.json").read_text())["map"] == pytest.approx(outcome.figures["map"])
    rows = [row for row in csv.DictReader((run / "csv" / "metrics.csv").open()) if row["val/map"]]
    assert len(rows) == 3 and float(rows[-1]["val/map"]) == pytest.approx(outcome.figures["map"])
    predictor = load(best)
    assert isinstance(predictor.model.box, SVMBranch) and bool(predictor.model.box.svms.fitted)
    assert "features of 12 images (12 new)" in caplog.text and "stage svm in" in caplog.text


@pytest.mark.slow
def test_the_fitted_machines_are_those_of_the_training_split_as_it_is(in_tmp: Path) -> None:
    """Without augmentation, from the last epoch's weights: made here once more by hand, image by image."""
    go()
    run = run_of(in_tmp)
    again = build(load_config(*QUICK))
    model: Any = again.task.model
    model.load_state_dict(state(run / "checkpoints" / "last-1.ckpt"))
    model.eval()
    found = []
    again.data.proposer = None  # the model's own, of whole images
    for batch in again.data.eval_dataloader("train"):
        batch = again.data.on_after_batch_transfer(batch, 0)
        outputs = model(batch.images, batch.sizes)
        found += [
            model.box.examples(outputs.features, row, boxes, batch.targets[row], [1])
            for row, boxes in enumerate(outputs.given)
        ]
    model.box.fit_svms(lambda: found)
    model.box.fit_ridge(lambda: found)
    fitted = state(run / "checkpoints" / "best.ckpt")
    assert_close(fitted["box.svms.weight"], model.box.svms.weight, rtol=1e-3, atol=1e-5)
    assert_close(fitted["box.svms.bias"], model.box.svms.bias, rtol=1e-3, atol=1e-4)
    assert_close(fitted["box.ridge.weight"], model.box.ridge.weight, rtol=1e-3, atol=1e-6)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, Any]]:
    """AP and state of a run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        outcome = go()
        assert outcome.checkpoint is not None
        return outcome.figures["map"], state(outcome.checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["features", "svm", "ridge", "checkpoint", "measure"])
def test_a_run_that_ended_anywhere_goes_on_without_doing_anything_twice(
    where: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[float, dict[str, Any]]
) -> None:
    figure, whole = undisturbed
    made: list[str] = []
    follow(monkeypatch, made, stop_in=where)
    with pytest.raises(Killed):
        go()
    run = run_of(in_tmp)
    assert not (run / "metrics.json").exists()
    before, made[:] = list(made), []
    monkeypatch.undo()
    monkeypatch.chdir(in_tmp)
    follow(monkeypatch, made)
    outcome = train(load_config(f"resume={run}"))
    twice = [name for name in before[:-1] if name in made and name != "checkpoint"]
    assert twice == [] and "training" not in made
    assert {"svm", "ridge"} <= {*before, *made} and sum("image" in name for name in {*before, *made}) == 12
    assert outcome.figures["map"] == pytest.approx(figure)
    for key, value in state(run / "checkpoints" / "best.ckpt").items():
        assert_close(value, whole[key], rtol=1e-5, atol=1e-6)


def follow(monkeypatch: pytest.MonkeyPatch, made: list[str], stop_in: str = "") -> None:
    """Note what is done; raise in the middle of ``stop_in``."""

    def note(name: str, *, stop: bool) -> None:
        made.append(name)
        if stop:
            raise Killed(name)

    write, svm, ridge = stages.write_sealed, SVMBranch.fit_svms, SVMBranch.fit_ridge

    def written(content: Any, path: Path, **options: Any) -> int:
        if path.parent.name == "features":
            note(f"image {path.stem}", stop=stop_in == "features" and path.stem == "000006")
        return write(content, path, **options)

    def fitted(kind: str, fit: Any) -> Any:
        return lambda self, images: (fit(self, images), note(kind, stop=stop_in == kind))[0]

    keep, measure = stages._keep, __import__("detseg.experiment").experiment.measure
    monkeypatch.setattr(stages, "write_sealed", written)
    monkeypatch.setattr(SVMBranch, "fit_svms", fitted("svm", svm))
    monkeypatch.setattr(SVMBranch, "fit_ridge", fitted("ridge", ridge))
    monkeypatch.setattr(
        stages, "_keep", lambda *rest: (keep(*rest), note("checkpoint", stop=stop_in == "checkpoint"))[0]
    )
    monkeypatch.setattr(
        "detseg.experiment.measure", lambda *rest: (note("measure", stop=stop_in == "measure"), measure(*rest))[1]
    )
    monkeypatch.setattr(
        "detseg.tasks.two_stage.TwoStageDetection.on_train_epoch_start", lambda self: note("training", stop=False)
    )


@pytest.mark.slow
def test_a_kill_leaves_whole_files_alone(in_tmp: Path) -> None:
    """SIGKILL in the middle of writing the seventh image."""
    child = os.fork()
    if child == 0:
        real = stages.write_sealed

        def kill(content: Any, path: Path, **options: Any) -> int:
            if path.stem == "000006":
                path.write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(content, path, **options)

        stages.write_sealed = kill  # type: ignore[assignment]
        try:
            go()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run = run_of(in_tmp)
    files = sorted((run / "stages").glob("*/features/*.pt"))
    assert [stages._is_whole(path) for path in files] == [True] * 6 + [False]
    outcome = train(load_config(f"resume={run}"))
    assert outcome.checkpoint is not None and bool(state(outcome.checkpoint)["box.svms.fitted"])


@pytest.mark.slow
def test_more_epochs_train_the_softmax_and_fit_anew(in_tmp: Path) -> None:
    go()
    run = run_of(in_tmp)
    first = state(run / "checkpoints" / "best.ckpt")["box.svms.weight"]
    (place,) = (run / "stages").iterdir()
    train(load_config(f"resume={run}", "trainer.max_epochs=3"))
    (other,) = (run / "stages").iterdir()
    assert other != place
    last = state(run / "checkpoints" / "best.ckpt")
    assert bool(last["box.svms.fitted"]) and (last["box.svms.weight"] - first).abs().max() > 1e-4
    assert not bool(state(run / "checkpoints" / "last-1.ckpt")["box.svms.fitted"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "done"),
    [("model.box.classifier=softmax", ["ridge"]), ("model.box.box_regression=false", ["svm"])],
)
def test_ablations_fit_less(override: str, done: list[str], in_tmp: Path) -> None:
    outcome = go(override)
    assert outcome.checkpoint is not None
    found = state(outcome.checkpoint)
    assert [name for name in ("svm", "ridge") if bool(found[f"box.{name.replace('svm', 'svms')}.fitted"])] == done
    (place,) = (run_of(in_tmp) / "stages").iterdir()
    assert sorted(path.stem for path in place.iterdir()) == sorted(["features", *done])


@pytest.mark.slow
def test_an_average_of_weights_is_what_is_fitted_to(in_tmp: Path) -> None:
    outcome = go("callbacks=[default,ema]", "callbacks.images=null", "callbacks.curves=null")
    assert outcome.checkpoint is not None
    content = torch.load(outcome.checkpoint, weights_only=True)
    raw, average = content["current_model_state"], content["state_dict"]
    key = "model.box.predictor.cls_score.weight"
    assert (raw[key] - average[key]).abs().max() > 0
    assert bool(average["model.box.svms.fitted"]) and outcome.figures["map"] >= 0
    before = state(run_of(in_tmp) / "checkpoints" / "last-1.ckpt")
    assert_close(average[key], before[key.removeprefix("model.")], rtol=0, atol=0)


@pytest.mark.slow
def test_a_class_without_objects_is_named(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = SVMBranch.examples

    def without_pears(self: SVMBranch, features: Any, image: int, boxes: Any, target: Any, strides: Any) -> Any:
        return original(self, features, image, boxes, target[target.labels != 1], strides)

    monkeypatch.setattr(SVMBranch, "examples", without_pears)
    outcome = go()
    assert "stage svm: the training split has no objects of pear; it is never predicted" in caplog.text
    assert outcome.checkpoint is not None
    assert state(outcome.checkpoint)["box.svms.known"].tolist() == [True, False, True]


@pytest.mark.slow
def test_no_object_at_all_is_one_line_with_a_remedy(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SVMBranch.examples
    monkeypatch.setattr(
        SVMBranch, "examples", lambda self, f, i, boxes, target, s: original(self, f, i, boxes, target[:0], s)
    )
    with pytest.raises(ValueError, match=r"not one object.*classifier=softmax") as raised:
        go()
    assert "\n" not in str(raised.value)


def test_other_models_several_processes_and_nothing_to_fit(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = build(load_config("trainer=cpu", "model=faster_rcnn_small"))
    assert stages_of(other.task.model) == [] and not fit_stages(other)
    run = build(load_config(*QUICK))
    assert stages_of(run.task.model) == ["svm", "ridge"]
    monkeypatch.setattr(type(run.trainer), "world_size", 2)
    with pytest.raises(ConfigError, match=r"RCNN fits svm and ridge .* this run has 2; set trainer\.devices=1"):
        begin(run)
    check_stages(other)
    check_stages(build(load_config(*QUICK, "model.box.classifier=softmax", "model.box.box_regression=false")))


def test_a_limited_run_looks_at_as_many_images(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    go("trainer.limit_train_batches=2", "trainer.max_epochs=1")
    assert "features of 8 images (8 new)" in caplog.text


def test_the_key_changes_with_what_changes_features(in_tmp: Path) -> None:
    first, same = build(load_config(*QUICK)), build(load_config(*QUICK, "data.eval_batch_size=2"))
    other = build(load_config(*QUICK, "model.box.svm.cost=0.1"))
    assert key_of(first) == key_of(same) != key_of(other)
    first.task.model.box.svms.bias.fill_(3.0)  # type: ignore[union-attr,operator]
    assert key_of(first) == key_of(same)
    first.task.model.box.predictor.cls_score.bias.data.fill_(3.0)  # type: ignore[union-attr]
    assert key_of(first) != key_of(same)
