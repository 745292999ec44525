"""A step whose loss or gradient was not finite, done again from its file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detseg.callbacks import Guard
from detseg.cli.main import main
from detseg.engine.half import HalfWeights
from detseg.engine.replay import describe, replay
from guarded_models import BRIGHT, DARK, MoodyRegions, fit, images, make_task

ALLOW = ["guarded_models"]


def stopped(directory: Path, bad: float, *, dropout: float = 0.0, **settings: Any) -> Path:
    """Train until the guard stops the run; return the file that it leaves."""
    torch.manual_seed(5)
    batches = [images(0), images(1, bad), images(2)]
    with pytest.raises(FloatingPointError):
        fit(directory, make_task(dropout=dropout), batches, Guard(), **settings)
    (path,) = directory.glob("nonfinite_step_*.pt")
    return path


class TestReplay:
    def test_a_loss_is_nan_again_and_the_first_layer_is_named(self, tmp_path: Path):
        found = replay(stopped(tmp_path, DARK), allow=ALLOW)
        assert found.reproduced and found.step == 1
        assert found.layer == "log (Log), from finite input (2,)"
        assert found.images == ["10, 11"] and str(found.terms[0]["loss_classification"]) == "nan"
        assert "head.weight" in found.gradients and not found.operation

    def test_of_a_gradient_the_operation_is_named(self, tmp_path: Path):
        found = replay(stopped(tmp_path, BRIGHT), allow=ALLOW)
        assert found.reproduced and not found.layer and found.operation == "MulBackward0"
        assert set(found.gradients) == {"backbone.body.weight", "backbone.body.bias", "norm.weight", "norm.bias"}
        assert "the outputs of all layers are finite" in describe(found)

    def test_losses_repeat_to_the_last_bit_with_dropout_and_without(self, tmp_path: Path):
        path = stopped(tmp_path, BRIGHT, dropout=0.5)
        recorded = torch.load(path, weights_only=True)["windows"][0]["batches"][0]["terms"]
        first, second = replay(path, allow=ALLOW).terms[0], replay(path, allow=ALLOW).terms[0]
        assert first == second == {name: float(text) for name, text in recorded.items()}

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_losses_repeat_in_other_precisions_too(self, precision: str, tmp_path: Path):
        """In bf16-true the norms and the images are in 32 bits and the products in 16, as in the run."""
        plugins: dict[str, Any] = {"precision": precision}
        if precision == "bf16-true":
            plugins = {"plugins": [HalfWeights(device="cpu")]}
        path = stopped(tmp_path, BRIGHT, **plugins)
        content = torch.load(path, weights_only=True)
        found, recorded = replay(path, allow=ALLOW), content["windows"][0]["batches"][0]["terms"]
        assert content["precision"] == precision and found.reproduced and not found.layer
        assert found.terms[0] == {name: float(text) for name, text in recorded.items()}

    def test_an_accumulated_step_is_done_whole(self, tmp_path: Path):
        found = replay(stopped(tmp_path, DARK, accumulate_grad_batches=2), allow=ALLOW)
        assert found.step == 0 and found.images == ["0, 1", "10, 11"]
        assert [str(terms["loss_box"]) == "nan" for terms in found.terms] == [False, True]

    def test_frozen_and_evaluating_parts_stay_so(self, tmp_path: Path):
        task = make_task()
        task.model.backbone.requires_grad_(False)
        task.model.norm.momentum = None
        with pytest.raises(FloatingPointError):
            fit(tmp_path, task, [images(0, DARK)], Guard())
        found = replay(tmp_path / "nonfinite_step_0.pt", allow=ALLOW)
        assert not any(name.startswith("backbone") for name in found.gradients) and found.gradients

    def test_what_is_finite_here_is_said_to_be(self, tmp_path: Path):
        path = stopped(tmp_path, DARK)
        content = torch.load(path, weights_only=True)
        content["windows"][0]["batches"][0]["batch"]["images"].fill_(0.4)
        torch.save(content, path)
        found = replay(path, allow=ALLOW)
        assert not found.reproduced and describe(found).endswith("try the run's own device")


class TestVerb:
    def test_prints_what_it_finds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        path = stopped(tmp_path, DARK)
        capsys.readouterr()
        assert main(["replay", str(path), "device=cpu", "allow=[guarded_models]"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("step 1; when it was written: loss nan (loss_classification nan")
        assert lines[1] == "images 10, 11" and lines[2].startswith("  loss nan (")
        assert lines[3] == "first output that is not finite: log (Log), from finite input (2,)"
        assert lines[4].startswith("6 gradients are not finite, first ") and lines[5] == "reproduced"

    def test_refuses_what_it_cannot_read_in_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        path = stopped(tmp_path, DARK)
        capsys.readouterr()
        (tmp_path / "foreign.pt").write_bytes(b"no file of torch's")
        torch.save({"state_dict": {}}, tmp_path / "other.pt")
        for arguments, code, said in (
            ([str(path)], 1, "guarded_models"),  # not allowed without being named
            ([str(tmp_path / "none.pt")], 2, "does not exist"),
            ([str(tmp_path / "foreign.pt")], 1, "cannot be read"),
            ([str(tmp_path / "other.pt")], 1, "no replay file"),
            ([str(path), "lr=1"], 2, "takes a file"),
        ):
            assert main(["replay", *arguments]) == code
            first = capsys.readouterr().err.splitlines()[0]
            assert first.startswith("detseg: ") and said in first
        assert main(["replay"]) == 2 and "needs a file" in capsys.readouterr().err
        assert main(["replay", "--help"]) == 0 and "usage: detseg replay" in capsys.readouterr().out

    def test_of_a_directory_takes_the_newest(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        path = stopped(tmp_path, DARK)
        (old := path.with_name("nonfinite_step_0.pt")).write_bytes(b"of a start before")
        os.utime(old, (1, 1))
        assert replay(path.parent, allow=["guarded_models"]).reproduced
        (tmp_path / "empty").mkdir()
        assert main(["replay", str(tmp_path / "empty")]) == 2
        assert "holds no nonfinite_step_<n>.pt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_an_error_a_file_and_no_nan(tmp_path: Path, capsys: Any, monkeypatch: Any):
    """From the command line to the replay, with a detector of the package."""
    monkeypatch.chdir(tmp_path)
    small = ["data.train_images=8", "data.val_images=3", "data.test_images=2", "data.batch_size=2"]
    rest = ["data.num_workers=0", "data.image_size=64", "trainer.max_epochs=8", "trainer.log_every_n_steps=1"]
    wild = ["optimizer=sgd", "optimizer.lr=1e18", "trainer.gradient_clip_val=null", "scheduler=constant"]
    command = ["train", "model=fcos_small", "trainer=cpu", "callbacks.images=null", *small, *rest, *wild]
    assert main(command) == 1
    assert "is not finite" in (said := capsys.readouterr().err) or "the loss is" in said
    (path,) = tmp_path.glob("runs/*/*/nonfinite_step_*.pt")
    assert f"detseg replay {path}" in said
    files = [file for file in path.parent.rglob("*") if file.suffix in (".pt", ".ckpt", ".csv", ".json")]
    for file in files:
        if file.suffix in (".pt", ".ckpt"):
            state = torch.load(file, weights_only=True)["state_dict"]
            assert all(bool(value.isfinite().all()) for value in state.values()), file
        else:
            assert "nan" not in file.read_text().lower(), file
    assert main(["replay", str(path)]) == 0
    assert capsys.readouterr().out.strip().endswith("reproduced")


def test_a_model_that_is_given_proposals_gets_the_same_again(tmp_path: Path):
    batches = [replace(one, proposals=[torch.full((3, 4), 0.25)] * 2) for one in (images(0), images(1, DARK))]
    task = make_task(kind=MoodyRegions)
    with pytest.raises(FloatingPointError):
        fit(tmp_path, task, batches, Guard())
    (path,) = tmp_path.glob("nonfinite_step_*.pt")
    recorded = torch.load(path, weights_only=True)["windows"][0]["batches"][0]["terms"]
    found = replay(path, allow=ALLOW)
    assert found.reproduced and found.terms[0]["loss_regions"] == float(recorded["loss_regions"]) == 0.25
