from __future__ import annotations

import re

import torch
from lightning.pytorch.callbacks import RichProgressBar

from detseg.callbacks import LineProgress, progress_bar
from detseg.callbacks.progress import format_figures
from tiny_task import TinyTask, fit


def test_a_line_per_epoch_with_the_figures_after_validation(tmp_path, capsys):
    trainer = fit(TinyTask(), tmp_path, progress_bar(bar=False), epochs=2)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"epoch 1/2  train/loss \d+\.\d{4}  val/map -\d+\.\d{4}  \d+\.\d s", lines[0]), lines[0]
    assert f"val/map {float(trainer.callback_metrics['val/map']):.4f}" in lines[1]


def test_other_processes_print_nothing(tmp_path, capsys):
    lines = LineProgress()
    lines.disable()
    fit(TinyTask(), tmp_path, lines, epochs=1)
    assert capsys.readouterr().out.strip() == ""
    lines.enable()
    fit(TinyTask(), tmp_path, lines, epochs=1)
    assert capsys.readouterr().out.count("epoch 1/1") == 1


def test_the_bar_is_for_terminals(monkeypatch):
    assert isinstance(progress_bar(bar=True, refresh_rate=3), RichProgressBar)
    assert progress_bar(bar=True, refresh_rate=3).refresh_rate == 3
    assert isinstance(progress_bar(), LineProgress)  # pytest is no terminal
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    assert isinstance(progress_bar(), RichProgressBar)


def test_figures_that_do_not_exist_are_left_out_and_nan_is_not_a_number():
    figures = {"b": torch.tensor(float("nan")), "a": torch.tensor(0.12345), "c": torch.tensor(1.0)}
    assert format_figures(figures, ("a", "b", "missing")) == "a 0.1235  b n/a"


def test_figures_of_an_earlier_validation_are_not_printed_again(tmp_path, capsys):
    fit(TinyTask(), tmp_path, progress_bar(bar=False), epochs=3, check_val_every_n_epoch=2)
    lines = capsys.readouterr().out.strip().splitlines()
    assert ["val/map" in line for line in lines] == [False, True, False]
