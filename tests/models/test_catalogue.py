from __future__ import annotations

from pathlib import Path

import pytest

from detseg import models

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


def test_every_file_of_the_group_is_listed_with_paper_and_year():
    cards = {card.name: card for card in models.available()}
    assert set(cards) == {path.stem for path in CONF.glob("*.yaml")}
    assert (cards["unet"].year, cards["unet"].paper[:30]) == (2015, 'Ronneberger, Fischer & Brox, "')
    assert [name for name, card in cards.items() if not card.paper or not 1998 <= card.year <= 2030] == []


def test_a_small_form_has_the_paper_of_what_it_inherits_from():
    cards = {card.name: card for card in models.available()}
    assert "# paper" not in (CONF / "unet_small.yaml").read_text()
    assert cards["unet_small"].paper == cards["unet"].paper
    assert str(cards["unet_small"]).startswith("unet_small")


def test_oldest_paper_first():
    years = [card.year for card in models.available()]
    assert years == sorted(years)


def test_class_names_are_loaded_when_asked_for():
    assert {"FCOS", "FasterRCNN", "MaskRCNN", "RetinaNet", "UNet", "available"} <= set(dir(models))
    assert models.UNet.__module__ == "detseg.models.unet"
    with pytest.raises(AttributeError, match=r"detseg.models has no 'Perceptron'; it has FCN, FCOS"):
        models.Perceptron  # noqa: B018
