"""The command line before anything heavy is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from detseg.cli.main import VERBS, main


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS) and "usage: detseg <verb>" in text


def test_no_verb_is_a_question_for_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_a_wrong_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["trian", "model=fcos"]) == 2
    said = capsys.readouterr()
    assert "no verb 'trian'. Did you mean 'train'?" in said.err and said.out == ""


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("detseg 0.")


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_help_of_a_verb_shows_its_keys(verb: str, capsys: pytest.CaptureFixture[str]):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "ckpt: ???" in text and f"usage: detseg {verb}" in text


def test_train_help_lists_groups_and_keys():
    """In a process of its own: Hydra writes past pytest's capture."""
    code = "import sys; from detseg.cli.main import main; sys.exit(main(['train', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in ("detseg train -m", "model: ", "orchard", "max_epochs: ", "retinanet_small"):
        assert expected in done.stdout
