from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detseg.nn import CheckpointMismatch, load_weights, read_state


class Model(nn.Module):
    def __init__(self, *, classes: int, width: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.cls_logits = nn.Linear(width, classes)


def test_equal_states_load_and_half_precision_is_cast():
    source, model = Model(classes=3), Model(classes=3)
    state = {key: value.half() for key, value in source.state_dict().items() if "num_batches" not in key}
    assert load_weights(model, state) == []
    assert_close(model.cls_logits.weight, source.cls_logits.weight.half().float())
    assert model.backbone[0].weight.dtype == torch.float32


def test_another_class_count_shows_both_sides_and_the_remedy():
    with pytest.raises(CheckpointMismatch) as caught:
        load_weights(Model(classes=5), Model(classes=3).state_dict(), source="old.pth")
    message = str(caught.value)
    assert message.startswith("old.pth does not fit the model. 2 keys of another shape")
    assert "cls_logits.weight (3, 4) in the file, (5, 4) in the model" in message
    assert "drop_head=True" in message
    assert caught.value.shapes[1] == ("cls_logits.bias", (3,), (5,))


def test_missing_and_unexpected_keys_are_named_and_counted():
    state = Model(classes=3).state_dict()
    state["other.weight"] = state.pop("cls_logits.weight")
    with pytest.raises(
        CheckpointMismatch, match=r"1 keys only in the model: cls_logits.weight; 1 keys only in the file: other"
    ):
        load_weights(Model(classes=3), state)
    long = {f"k{index}": torch.zeros(1) for index in range(9)} | Model(classes=3).state_dict()
    with pytest.raises(CheckpointMismatch, match="9 keys only in the file: k0, k1, k2, k3 and 5 more"):
        load_weights(Model(classes=3), long)


def test_drop_head_reuses_the_body_alone(caplog):
    source, model = Model(classes=3), Model(classes=5)
    before = model.cls_logits.weight.clone()
    with caplog.at_level(logging.INFO):
        dropped = load_weights(model, source.state_dict(), drop_head=True, source="old.pth")
    assert dropped == ["cls_logits.weight", "cls_logits.bias"]
    assert "old.pth: 2 keys are not loaded" in caplog.text
    assert_close(model.backbone[0].weight, source.backbone[0].weight)
    assert_close(model.cls_logits.weight, before)
    with pytest.raises(CheckpointMismatch, match=r"backbone.0.weight"):  # a body that differs is never dropped
        load_weights(Model(classes=3, width=8), source.state_dict(), drop_head=True)


def test_a_failed_load_changes_nothing():
    model = Model(classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointMismatch):
        load_weights(model, Model(classes=3).state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_read_state(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.pth")
    assert_close(read_state(tmp_path / "plain.pth")["a"], torch.ones(2))
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match=r"holds \['epoch', 'state_dict'\], not a plain state dict"):
        read_state(tmp_path / "whole.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nothing.pth does not exist"):
        read_state(tmp_path / "nothing.pth")
    (tmp_path / "rubbish.pth").write_bytes(b"not a file of torch's")
    with pytest.raises(ValueError, match=r"weights file .*rubbish.pth cannot be read with weights_only=True"):
        read_state(tmp_path / "rubbish.pth")
