"""Which weights learn at which rate: one group per layer of the body, numbers by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from detseg.nn import TinyBackbone
from detseg.nn.backbone import TimmBackbone, TorchvisionBackbone
from detseg.tasks.groups import body_prefix, choose_rates, chosen_rates, layers_of_body, parameter_groups


def with_body(body: nn.Module, *, pyramid: bool = False) -> nn.Module:
    """Return a model of a body, under a pyramid or not, and a head."""
    model = nn.Module()
    model.backbone = nn.ModuleDict({"body": body, "fpn": nn.Conv2d(4, 4, 1)}) if pyramid else body
    model.head = nn.Linear(4, 2)
    return model


class TestLayers:
    @pytest.mark.parametrize(
        ("body", "counts"),
        [
            (TinyBackbone(widths=(8, 16), depth=2, stem=4), [3, 9, 6, 9, 6]),  # stem, then two blocks per stage
            (TorchvisionBackbone(name="resnet18"), [3, 6, 6, 9, 6, 9, 6, 9, 6]),
            (TimmBackbone(name="convnext_atto"), [4, 18, 22, 58, 22]),  # its stages keep their blocks to themselves
            (TimmBackbone(name="tf_efficientnet_lite0"), [3, 6, *[9] * 15]),
        ],
        ids=["tiny", "resnet18", "convnext", "lite0"],
    )
    def test_every_parameter_of_the_body_has_its_block(self, body: nn.Module, counts: list[int]):
        found = layers_of_body(with_body(body))
        assert list(Counter(found.values()).values()) == counts
        assert list(found) == [f"backbone.{name}" for name, _ in body.named_parameters()]
        assert list(found.values()) == sorted(found.values())  # from the image on

    def test_a_pyramid_is_no_body(self):
        names = layers_of_body(with_body(TinyBackbone(widths=(8,), stem=4), pyramid=True))
        assert {name.split(".")[1] for name in names} == {"body"} and set(names.values()) == {0, 1}
        assert body_prefix(names) == "backbone.body." and body_prefix(["head.weight"]) == "backbone."


class TestRates:
    def rates(self, model: nn.Module, **settings: float) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in parameter_groups(model, rate=0.1, **settings)}

    def test_each_layer_is_a_factor_below_the_next(self):
        model = with_body(TinyBackbone(widths=(8, 16), stem=4), pyramid=True)
        found = self.rates(model, layer_decay=0.5, backbone_lr_scale=0.4)
        plain = {name: rate for name, rate in found.items() if not name.endswith("_no_decay")}
        assert plain == pytest.approx({"body_00": 0.005, "body_01": 0.01, "body_02": 0.02, "rest": 0.1})
        assert {name.removesuffix("_no_decay") for name in found} == set(plain) and len(found) == 8

    def test_all_parameters_are_in_one_group_each_also_beside_untrained_ones(self):
        model = with_body(TinyBackbone(widths=(8, 16), stem=4))
        model.backbone.stem.requires_grad_(False)
        groups = parameter_groups(model, rate=0.1, layer_decay=0.5)
        ours = [id(value) for group in groups for value in group["params"]]
        assert sorted(ours) == sorted(id(value) for value in model.parameters() if value.requires_grad)
        assert {group["name"]: group["lr"] for group in groups}["body_01"] == pytest.approx(0.1 * 0.25)  # not shifted

    def test_a_step_moves_each_layer_by_its_rate(self):
        model = with_body(TinyBackbone(widths=(8,), stem=4))
        optimizer = torch.optim.SGD(parameter_groups(model, rate=0.1, layer_decay=0.5), lr=0.1)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        for value in model.parameters():
            value.grad = torch.ones_like(value)
        optimizer.step()
        moved = {name: float((before[name] - value.detach()).mean()) for name, value in model.named_parameters()}
        assert moved["backbone.stem.0.weight"] == pytest.approx(0.025, rel=1e-3)
        assert moved["backbone.stages.0.0.body.0.weight"] == pytest.approx(0.05, rel=1e-3)
        assert moved["head.bias"] == pytest.approx(0.1, rel=1e-3)

    @pytest.mark.parametrize("factor", [0.0, -0.5, 1.01])
    def test_a_factor_out_of_range_is_refused(self, factor: float):
        with pytest.raises(ValueError, match=r"task.layer_decay is .*\(0, 1\]"):
            parameter_groups(with_body(TinyBackbone(widths=(8,))), rate=0.1, layer_decay=factor)

    def test_a_model_without_a_backbone_cannot_have_layers(self):
        model = nn.Sequential(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"task.layer_decay is 0.5.*2 parameters.*1.0"):
            parameter_groups(model, rate=0.1, layer_decay=0.5)


class TestChosenRates:
    def stepped(self, rate: float, decay: float = 0.01) -> tuple[torch.optim.Optimizer, Any]:
        """Return an optimiser of two groups, the second without decay, after two of four steps of a falling rate."""
        weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        groups = [{"params": weights[:1], "lr": rate / 2}, {"params": weights[1:], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
        for _ in range(2):
            optimizer.step()
            schedule.step()
        return optimizer, schedule

    def resumed(self, rate: float, decay: float = 0.01) -> tuple[torch.optim.Optimizer, Any, list[str]]:
        before, its_schedule = self.stepped(1.0)
        optimizer, schedule = self.stepped(rate, decay)
        chosen = chosen_rates(optimizer)
        optimizer.load_state_dict(before.state_dict())
        schedule.load_state_dict(its_schedule.state_dict())
        return optimizer, schedule, choose_rates(optimizer, [schedule], chosen)

    def test_a_new_rate_takes_the_place_of_the_checkpoints(self):
        optimizer, schedule, changed = self.resumed(0.1, decay=0.5)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.05])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
        assert changed[:2] == ["learning rate 0.05, it was 0.5", "weight decay 0.5, it was 0.01"]
        optimizer.step()
        schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0125, 0.025])

    def test_the_same_rate_leaves_everything_as_it_was(self):
        optimizer, schedule, changed = self.resumed(1.0)
        assert changed == [] and schedule.base_lrs == [0.5, 1.0]
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]

    def test_without_a_schedule_the_rate_is_noted_too(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.2)
        assert chosen_rates(optimizer) == [{"initial_lr": 0.2, "weight_decay": 0.0}]
        assert optimizer.state_dict()["param_groups"][0]["initial_lr"] == 0.2
