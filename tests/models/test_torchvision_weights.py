from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from detseg.models.box_branch import BoxBranch
from detseg.models.faster_rcnn import BOX_LAYERS, FasterRCNN
from detseg.models.torchvision_weights import ClassLayer, coco_ids, load_torchvision, load_torchvision_state
from detseg.nn import BackboneWithFPN, CheckpointMismatch, TorchvisionBackbone
from models.two_stage_oracle import pair


class Head(nn.Module):
    """Two class layers as a two-stage model and a dense one have them."""

    def __init__(self, classes: int, anchors: int = 2) -> None:
        super().__init__()
        self.cls_score = nn.Linear(3, classes + 1)
        self.bbox_pred = nn.Linear(3, (classes + 1) * 4)
        self.dense = nn.Conv2d(3, classes * anchors, 1)


LAYERS = (
    ClassLayer("cls_score", background=True),
    ClassLayer("bbox_pred", background=True, width=4),
    ClassLayer("dense", anchors=2),
)


def published(outputs: int = 91) -> dict[str, Tensor]:
    """A state dict whose rows say which class (and anchor, and coordinate) they belong to."""
    ids = torch.arange(outputs).float()
    boxes = (ids[:, None] * 10 + torch.arange(4)).flatten()
    dense = torch.cat([ids, ids + 1000])
    return {
        "cls_score.weight": ids[:, None].repeat(1, 3),
        "cls_score.bias": ids,
        "bbox_pred.weight": boxes[:, None].repeat(1, 3),
        "bbox_pred.bias": boxes,
        "dense.weight": dense[:, None, None, None].repeat(1, 3, 1, 1),
        "dense.bias": dense,
    }


def test_coco_has_80_ids_with_gaps() -> None:
    ids = coco_ids()
    assert len(ids) == 80 and ids[0] == 1 and ids[-1] == 90
    assert not {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & set(ids)


@pytest.mark.parametrize("classes", [80, 90])
def test_rows_go_to_their_classes(classes: int) -> None:
    head = Head(classes)
    load_torchvision_state(head, published(), layers=LAYERS)
    ids = torch.tensor(coco_ids() if classes == 80 else list(range(1, 91))).float()
    with_background = torch.cat([torch.zeros(1), ids])
    assert_close(head.cls_score.bias, with_background)
    assert_close(head.cls_score.weight[:, 1], with_background)
    assert_close(head.bbox_pred.bias, (with_background[:, None] * 10 + torch.arange(4)).flatten())
    assert_close(head.dense.bias, torch.cat([ids, ids + 1000]))


def test_a_dense_head_of_91_classes_is_taken_as_it_is() -> None:
    dense = nn.Module()
    dense.dense = nn.Conv2d(3, 91 * 2, 1)
    state = {key: value for key, value in published().items() if key.startswith("dense")}
    load_torchvision_state(dense, state, layers=LAYERS)
    assert_close(dense.dense.bias, state["dense.bias"])


def test_other_numbers_of_classes_are_an_error_with_both() -> None:
    with pytest.raises(CheckpointMismatch, match=r"file has 91 classes \(background included\), the model 3"):
        load_torchvision_state(Head(3), published(), layers=LAYERS)
    with pytest.raises(CheckpointMismatch, match="file has 4 classes"):
        load_torchvision_state(Head(80), published(4), layers=LAYERS)


def test_boxes_per_class_and_one_for_all_do_not_fit_and_the_message_says_so(tmp_path: Path) -> None:
    path = tmp_path / "fasterrcnn.pth"
    torch.save(pair("faster")[0].state_dict(), path)
    backbone = BackboneWithFPN(backbone=TorchvisionBackbone(name="resnet18", frozen_norm=True), extra="pool")
    with pytest.raises(CheckpointMismatch, match=r"file has a box for each class, the model one for all; set class_ag"):
        FasterRCNN(num_classes=5, backbone=backbone, box=partial(BoxBranch, class_agnostic=True), weights=path)
    agnostic = published(6) | {"bbox_pred.weight": torch.zeros(4, 3), "bbox_pred.bias": torch.zeros(4)}
    with pytest.raises(CheckpointMismatch, match=r"one box for all classes, the model one for each.*agnostic to true"):
        load_torchvision_state(Head(5), agnostic, layers=LAYERS)


def test_a_part_may_be_loaded_alone() -> None:
    head, state = Head(3), published(4)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    load_torchvision_state(head, state, layers=LAYERS, only=("cls_score.", "bbox_pred.bias"))
    assert_close(head.cls_score.weight, state["cls_score.weight"])
    assert_close(head.bbox_pred.bias, state["bbox_pred.bias"])
    assert_close(head.bbox_pred.weight, before["bbox_pred.weight"])
    with pytest.raises(CheckpointMismatch, match=r"1 keys only in the model: cls_score\.bias"):
        load_torchvision_state(head, {"cls_score.weight": state["cls_score.weight"]}, only=("cls_score.",))


def faster(classes: int = 5) -> FasterRCNN:
    backbone = BackboneWithFPN(backbone=TorchvisionBackbone(name="resnet18", frozen_norm=True), extra="pool")
    return FasterRCNN(num_classes=classes, backbone=backbone, box=BoxBranch)


def old(key: str) -> str:
    """Spell a key as files from before torchvision 0.13 do."""
    key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    if ".fpn." in key:
        blocks, level, _, name = key.rsplit(".", 3)
        key = f"{blocks}.{level}.{name}"
    return key


def test_old_files_load_and_set_the_epsilon_that_they_were_trained_with(tmp_path: Path) -> None:
    theirs, _ = pair("faster")
    path = tmp_path / "fasterrcnn.pth"
    torch.save({old(key): value for key, value in theirs.state_dict().items()}, path)
    ours = faster()
    load_torchvision(
        ours,
        path,
        builder="fasterrcnn_resnet50_fpn",
        layers=BOX_LAYERS,
        renames={r"^roi_heads\.box_(head|predictor)\.": r"box.\1."},
    )
    state = theirs.state_dict()
    for mine, other in (
        ("rpn.head.conv.0.0.weight", "rpn.head.conv.0.0.weight"),
        ("backbone.fpn.inner_blocks.2.0.bias", "backbone.fpn.inner_blocks.2.0.bias"),
        ("box.head.fc7.weight", "roi_heads.box_head.fc7.weight"),
    ):
        assert_close(ours.state_dict()[mine], state[other])
    norms = [module for module in ours.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert norms and all(norm.eps == 0.0 for norm in norms)


def test_new_files_leave_the_epsilon(tmp_path: Path) -> None:
    theirs, _ = pair("faster")
    path = tmp_path / "fasterrcnn.pth"
    torch.save(theirs.state_dict(), path)
    backbone = BackboneWithFPN(backbone=TorchvisionBackbone(name="resnet18", frozen_norm=True), extra="pool")
    ours = FasterRCNN(num_classes=5, backbone=backbone, weights=path)
    assert all(norm.eps == 1e-5 for norm in ours.modules() if isinstance(norm, FrozenBatchNorm2d))
    assert_close(ours.box.head.fc6.weight, theirs.roi_heads.box_head.fc6.weight)


def test_a_file_that_lacks_parts_is_an_error_that_names_them() -> None:
    theirs, _ = pair("faster")
    state = {key: value for key, value in theirs.state_dict().items() if "rpn" not in key}
    renames = {r"^roi_heads\.box_(head|predictor)\.": r"box.\1."}
    with pytest.raises(CheckpointMismatch, match=r"6 keys only in the model: rpn\.head\.conv\.0\.0\.weight"):
        load_torchvision_state(faster(), state, layers=BOX_LAYERS, renames=renames)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="has weights COCO_V1"):
        load_torchvision(faster(), "COCO_V7", builder="fasterrcnn_resnet50_fpn")
    with pytest.raises(FileNotFoundError):
        load_torchvision(faster(), "absent/file.pth", builder="fasterrcnn_resnet50_fpn")


def test_a_published_name_goes_through_torchvisions_own_download(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, _ = pair("faster")
    enum = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights
    asked = []

    def fetch(self: object, **options: object) -> dict[str, Tensor]:
        asked.append((self, options))
        return dict(theirs.state_dict())

    monkeypatch.setattr(enum, "get_state_dict", fetch)
    backbone = BackboneWithFPN(backbone=TorchvisionBackbone(name="resnet18", frozen_norm=True), extra="pool")
    ours = FasterRCNN(num_classes=5, backbone=backbone, weights="COCO_V1")
    assert asked == [(enum.COCO_V1, {"progress": False, "check_hash": True})]
    assert all(norm.eps == 0.0 for norm in ours.modules() if isinstance(norm, FrozenBatchNorm2d))
